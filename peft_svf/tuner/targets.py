"""Which weights of a model SVF can adapt: the modules to leave out, and the fraction that an adapter covers."""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import CodeType, FunctionType, SimpleNamespace
from typing import Any

import torch
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .config import SVFConfig

# An attribute of a weight that is no use of its values. T5 looks at `self.wo.weight.dtype` and then calls `self.wo`.
_ABOUT_A_WEIGHT = {"data", "data_ptr", "device", "dim", "dtype", "element_size", "grad", "is_cuda", "is_meta", "ndim"}
_ABOUT_A_WEIGHT |= {"numel", "requires_grad", "shape", "size"}
# Names of the weights of an expert in checkpoints that store each expert by itself.
_EXPERT_WEIGHTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


# -------------------------------------------------------------------------------------------------- modules left out


def unusable_modules(model: nn.Module) -> dict[str, str]:
    """Return the linear modules that an adapter cannot change correctly, and the reason for each.

    Some models read the weight of a module instead of calling it, as Mamba does, so an adapter on it has no effect.
    Some subclasses of `nn.Linear` compute something else, as the routers of Llama 4 and Phi-3.5-MoE do.
    """
    found: dict[str, str] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            continue
        dot = f"{prefix}." if prefix else ""
        for path, guards in _reads(type(module)):  # type: ignore[arg-type]
            child = _submodule(module, path)
            if _is_linear(child) and all(_may_hold(guard, module) for guard in guards):
                found[f"{dot}{path}"] = f"{type(module).__name__} reads its weight instead of calling it"
        if isinstance(module, nn.Linear) and not _is_only_a_product(module):
            found[prefix] = f"its class {type(module).__name__} does not return the output of a linear layer"
    return found


def leave_out_of_all_linear(config: SVFConfig, model: nn.Module, unusable: Mapping[str, str]) -> None:
    """Replace `target_modules="all-linear"` by the names of the modules that PEFT means, without the unusable ones."""
    _maybe_include_all_linear_layers(config, model)
    assert isinstance(config.target_modules, set)
    if left_out := sorted(config.target_modules & unusable.keys()):
        config.target_modules -= unusable.keys()
        warnings.warn(
            f'`target_modules="all-linear"` leaves out {len(left_out)} linear modules that an adapter cannot change. '
            f"The first is {left_out[0]}: {unusable[left_out[0]]}.",
            stacklevel=4,
        )


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        child = module._modules.get(name)
        if child is None:
            return None
        module = child
    return module


def _is_linear(module: nn.Module | None) -> bool:
    return isinstance(module, (nn.Linear, Conv1D)) or (
        isinstance(module, BaseTunerLayer) and "Linear" in type(module).__name__
    )


@cache
def _reads(kind: type) -> tuple[tuple[str, tuple[CodeType, ...]], ...]:
    """Return the modules `self.PATH` whose `weight` the methods of a class use, and the conditions of each use."""
    methods: dict[str, FunctionType] = {}
    for parent in kind.__mro__:
        if parent in (nn.Module, PreTrainedModel):
            break
        for name, value in vars(parent).items():
            value = inspect.unwrap(value) if callable(value) else value
            if isinstance(value, FunctionType):
                methods.setdefault(name, value)
    return tuple(
        each
        for name, method in methods.items()
        if not (name == "reset_parameters" or "init" in name or name.lstrip("_").startswith("tie"))
        and "weight" in _names(method.__code__)  # reading the source takes longer
        for each in _reads_of(method)
    )


def _names(code: CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return {*code.co_names, *(name for each in inner for name in _names(each))}


def _reads_of(method: FunctionType) -> Iterator[tuple[str, tuple[CodeType, ...]]]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):  # no source: built interactively or compiled
        return
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load)):
            continue
        path, user = ast.unparse(node.value), parents[node]
        if not path.startswith("self.") or not path.replace(".", "").isidentifier():
            continue
        if isinstance(user, ast.Attribute) and user.attr in _ABOUT_A_WEIGHT:
            continue
        if isinstance(user, ast.Call) and ast.unparse(user.func) in ("isinstance", "hasattr"):
            continue
        if not _needs_an_option(node, parents):
            yield path.removeprefix("self."), tuple(_guards(node, parents))


def _needs_an_option(node: ast.AST, parents: Mapping[ast.AST, ast.AST]) -> bool:
    """Whether a node only runs if an argument is not None, as in DeBERTa's decoder, which its models do not use."""
    while (parent := parents.get(node)) is not None:
        if (
            isinstance(parent, ast.If)
            and isinstance(parent.test, ast.Compare)
            and isinstance(parent.test.left, ast.Name)
        ):
            test = ast.unparse(parent.test).removeprefix(parent.test.left.id)
            if (test, node in parent.body) in ((" is None", False), (" is not None", True)):
                return True
        node = parent
    return False


def _guards(node: ast.AST, parents: Mapping[ast.AST, ast.AST]) -> Iterator[CodeType]:
    """Return the conditions around a node that only depend on the settings of the module."""
    while (parent := parents.get(node)) is not None:
        if isinstance(parent, ast.If) and node in parent.body and _is_setting(parent.test):
            yield compile(ast.Expression(parent.test), "<condition>", "eval")
        node = parent


def _is_setting(test: ast.expr) -> bool:
    allowed = (ast.BoolOp, ast.Compare, ast.Attribute, ast.Name, ast.Constant, ast.boolop, ast.cmpop, ast.expr_context)
    return all(
        isinstance(node, allowed) and getattr(node, "id", "self") == "self" and getattr(node, "attr", "") != "training"
        for node in ast.walk(test)
    )


def _may_hold(guard: CodeType, module: nn.Module) -> bool:
    try:
        return bool(eval(guard, {"self": module}))  # a comparison of attributes in the model's own code
    except AttributeError:
        return True


def _is_only_a_product(module: nn.Linear) -> bool:
    """Whether a linear module maps `[..., in]` to `[..., out]`, found by a call without values on the meta device."""
    forward: Callable[..., Any] = type(module).forward
    if forward is nn.Linear.forward or not module.weight.is_floating_point():  # quantized: PEFT knows the class
        return True
    if module.weight.shape != (module.out_features, module.in_features) or type(module.weight) is not nn.Parameter:
        return True
    probe = copy.copy(module)
    probe._parameters = {
        name: None if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=False)
        for name, parameter in module._parameters.items()
    }
    try:
        with torch.no_grad():
            output = forward(probe, torch.empty(1, 3, module.in_features, dtype=module.weight.dtype, device="meta"))
    except Exception:  # it needs values, or more than one argument
        return False
    return isinstance(output, torch.Tensor) and output.shape == (1, 3, module.out_features)


# ------------------------------------------------------------------------------------------------- fraction of weights


def linear_weights(model: nn.Module) -> dict[str, int]:
    """Return the number of weights of each linear module and of each parameter that holds MoE experts.

    The output layer is left out, as in `target_modules="all-linear"`. A weight that is shared counts once.
    """
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    found, seen, inside = expert_weights(model), set(), ""
    for name, module in model.named_modules():
        if module is output or (inside and name.startswith(inside)):
            continue
        base: Any = module
        if isinstance(module, BaseTunerLayer):
            inside, base = f"{name}.", module.get_base_layer()
        if not (_is_linear(module) and hasattr(base, "weight")) or id(base.weight) in seen:
            continue
        seen.add(id(base.weight))
        if isinstance(base, Conv1D):
            found[name] = base.weight.numel()
        elif hasattr(base, "in_features"):
            found[name] = base.in_features * base.out_features
    return found


def expert_weights(model: nn.Module) -> dict[str, int]:
    """Return the number of weights of each parameter that holds several MoE experts, `[experts, ., .]` in most models.

    transformers 5 stores experts like this. Their modules are no linear layers, so `target_modules` cannot name them.
    """
    found: dict[str, int] = {}
    for prefix, module in model.named_modules():
        kind = type(module).__name__.lower()
        if isinstance(module, (nn.Linear, Conv1D, nn.Embedding, BaseTunerLayer)) or "router" in kind:
            continue
        experts = "expert" in kind or "expert" in prefix.rpartition(".")[2].lower()
        for name, parameter in module.named_parameters(recurse=False):
            if experts and parameter.ndim >= 2 and "bias" not in name and parameter.is_floating_point():
                found[f"{prefix}.{name}"] = parameter.numel()
    return found


def adapted_fraction(weights: Mapping[str, int], adapted: set[str]) -> float:
    """Return which fraction of the linear weights belongs to the adapted modules."""
    return sum(size for name, size in weights.items() if name in adapted) / max(1, sum(weights.values()))


def warn_about_experts(config: SVFConfig, model: nn.Module, adapted: set[str], *, all_linear: bool) -> None:
    """Warn if `target_modules` also means MoE experts, which are no modules and stay as they are."""
    names = [name for name in expert_weights(model) if _is_meant(name, config, all_linear)]
    if not names:
        return
    weights = linear_weights(model)
    warnings.warn(
        f"`target_modules` also matches the parameters of MoE experts, such as {names[0]}. SVF cannot adapt them yet: "
        f"{adapted_fraction(weights, set(names)):.0%} of the linear weights are left out and "
        f"{adapted_fraction(weights, adapted):.0%} are adapted.",
        stacklevel=4,
    )


def _is_meant(name: str, config: SVFConfig, all_linear: bool) -> bool:
    owner, _, own = name.rpartition(".")
    if all_linear:
        every = SimpleNamespace(target_modules=".*", exclude_modules=config.exclude_modules)
        return not isinstance(check_target_module_exists(every, name), _ExcludedModule)
    one = [f"{owner}.0.{weight}" for weight in (own, *_EXPERT_WEIGHTS)]  # of the first expert, in older versions
    return any(check_target_module_exists(config, key) for key in (name, owner, *one))
