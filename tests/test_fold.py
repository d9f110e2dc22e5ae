"""Folding: the same results as the gate, for as long as nothing it was made of changes, and no longer."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from peft_svf import SVFConfig, SVFLayer, SVFRuntimeConfig
from peft_svf.spectral import (
    delta_weight,
    effective_weight,
    fold_cost,
    folded_linear,
    gate_cost,
    projected_products,
    singular_basis,
    surviving_fraction,
)
from peft_svf.tuner.fold import Snapshot

SHAPES = [(24, 24), (16, 40), (40, 16)]  # [out, in]
IDS = torch.tensor([[3, 17, 5, 42, 8, 60, 11, 23], [7, 1, 33, 29, 50, 12, 4, 19]])


class OneLayer(nn.Module):
    def __init__(self, out: int, inp: int, bias: bool = True, conv1d: bool = False) -> None:
        super().__init__()
        self.linear: nn.Module = Conv1D(out, inp) if conv1d else nn.Linear(inp, out, bias=bias)
        if conv1d:
            nn.init.normal_(self.linear.weight, std=0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def adapted(
    out: int = 24,
    inp: int = 24,
    *,
    fold: str = "always",
    dtype: torch.dtype = torch.float32,
    std: float = 0.2,
    adapters: int = 1,
    r: int | None = None,
    **kwargs: Any,
) -> PeftModel:
    """A model of one adapted layer with random δ; same arguments, same numbers."""
    torch.manual_seed(1)
    base = OneLayer(out, inp, **kwargs).to(dtype)
    runtime = SVFRuntimeConfig(fold=fold, use_cache=False)
    model = get_peft_model(base, SVFConfig(target_modules=["linear"], r=r, runtime_config=runtime))
    for i in range(1, adapters):
        model.add_adapter(f"a{i}", SVFConfig(target_modules=["linear"], r=r and r + i, runtime_config=runtime))
    if adapters > 1:
        model.base_model.set_adapter(list(model.peft_config))
    for parameter in deltas(model):
        parameter.data.normal_(std=std)
    return model


def the_layer(model: PeftModel) -> SVFLayer:
    (layer,) = (module for module in model.modules() if isinstance(module, SVFLayer))
    return layer


def deltas(model: nn.Module) -> list[torch.Tensor]:
    return [p for name, p in model.named_parameters() if "svf_delta" in name]


def set_fold(model: PeftModel, fold: str) -> PeftModel:
    for config in model.peft_config.values():
        config.runtime_config.fold = fold
    return model


def changed(*models: PeftModel) -> None:
    """The next value of δ, the same for all models."""
    torch.manual_seed(2)
    changes = [0.05 * torch.randn(len(delta)) for delta in deltas(models[0])]
    for model in models:
        for delta, change in zip(deltas(model), changes, strict=True):
            delta.detach().add_(change)


def trained(model: PeftModel) -> PeftModel:
    """After one backward, before which a layer with out <= in does not know whether its output may be kept."""
    model(torch.randn(4, the_layer(model).in_features)).sum().backward()
    model.zero_grad()
    deltas(model)[0].detach().add_(0.0)
    return model


def is_folded(model: PeftModel) -> bool:
    return the_layer(model).fold.weight is not None


def reference(model: PeftModel, x: torch.Tensor) -> torch.Tensor:
    """The output in fp64, from an fp64 SVD."""
    layer = the_layer(model)
    base = layer.get_base_layer()
    weight = base.weight.detach().double()
    U, sigma, Vt = torch.linalg.svd(weight.mT if isinstance(base, Conv1D) else weight, full_matrices=False)
    z = torch.ones_like(sigma)
    for name in layer.active_adapters:
        delta = layer.svf_delta[name]().detach().double()
        z[: len(delta)] += delta
    y = x.double() @ (U * (sigma * z) @ Vt).mT
    return y if base.bias is None else y + base.bias.detach().double()


# ---------------------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_gate_fold_and_merged_agree_with_fp64(shape: tuple[int, int], bias: bool, conv1d: bool) -> None:
    model = adapted(*shape, bias=bias, conv1d=conv1d, adapters=2)
    x = torch.randn(3, 5, shape[1])
    expected = reference(model, x)
    with torch.no_grad():
        folded = model(x)
        assert is_folded(model)
        gated = set_fold(model, "never")(x)
        assert not is_folded(model)
        model.merge_adapter(["default", "a1"])
        merged = model(x)
    for result in (folded, gated, merged):
        assert (result - expected).norm() <= 1e-5 * expected.norm()


@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.booleans(), st.floats(0, 2), st.integers(0, 2**31)
)
@settings(max_examples=60, deadline=None)
def test_fold_is_the_gate_for_any_shape(out: int, inp: int, r: int, bias: bool, std: float, seed: int) -> None:
    model = adapted(out, inp, bias=bias, r=r, std=std)
    torch.manual_seed(seed)
    x = torch.randn(7, inp)
    with torch.no_grad():
        folded, gated = model(x), set_fold(model, "never")(x)
        scale = model.base_model.model(x).norm() + gated.norm() + 1e-6
    assert (folded - gated).norm() <= 1e-5 * scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_in_16_bit_every_way_is_as_exact_as_the_base_model(shape: tuple[int, int], dtype: torch.dtype) -> None:
    model = adapted(*shape, dtype=dtype, std=0.3)
    x = torch.randn(64, shape[1]).to(dtype)
    base = the_layer(model).get_base_layer()
    with torch.no_grad():
        exact_base = x.double() @ base.weight.double().mT + base.bias.double()
        base_error = (base(x).double() - exact_base).norm() / exact_base.norm()
        expected = reference(model, x)
        results = {"fold": model(x)}
        assert is_folded(model)
        results["gate"] = set_fold(model, "never")(x)
        model.merge_adapter()
        results["merged"] = model(x)
    for name, result in results.items():
        assert (result.double() - expected).norm() / expected.norm() <= 2 * base_error + 2**-9, name


def test_a_fresh_adapter_stays_the_base_model_bit_for_bit() -> None:
    model = adapted(std=0.0)
    x = torch.randn(5, 24)
    with torch.no_grad():
        assert torch.equal(model(x), the_layer(model).get_base_layer()(x))
    assert is_folded(model)


# ---------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("tokens", [1, 3, 60])  # both ways to get the gradient of δ
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("r", [2, 5, 8])
@pytest.mark.parametrize("shape", [(8, 8), (8, 11), (11, 8)])
def test_gradcheck(shape: tuple[int, int], r: int, bias: bool, tokens: int) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    basis = singular_basis(weight).vectors[:, :r].contiguous()
    delta = (0.3 * torch.randn(r, dtype=torch.float64)).requires_grad_()
    b = torch.randn(shape[0], dtype=torch.float64, requires_grad=True) if bias else None
    x = torch.randn(tokens, shape[1], dtype=torch.float64, requires_grad=True)

    # numerically, by W(z); the fold gets it ready made, so its derivative by δ is what the function adds
    def through_weight(x: torch.Tensor, delta: torch.Tensor, *b: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, effective_weight(weight, basis, delta), *b)

    class Checked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, delta: torch.Tensor, *b: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, delta, *b)
            return through_weight(x, delta, *b)

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            folded = effective_weight(weight, basis, inputs[1].detach())
            with torch.enable_grad():
                y = folded_linear(inputs[0], inputs[1], inputs[2] if bias else None, folded, basis)
            return torch.autograd.grad(y, inputs, dy)

    inputs = (x, delta) if b is None else (x, delta, b)
    assert torch.autograd.gradcheck(Checked.apply, inputs)


def gradients(model: PeftModel, x: torch.Tensor, call: Callable[..., Any] | None = None) -> list[torch.Tensor]:
    """Of all δ and the input, for a loss that is not linear."""
    x = x.clone().requires_grad_()
    y = model(x) if call is None else call(model, x)
    leaves = [*(d for d in deltas(model) if d.requires_grad), x]
    y.float().pow(2).sum().backward()
    found = [leaf.grad.clone() for leaf in leaves]
    model.zero_grad()
    return found


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 2e-5) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm() + 1e-7


INPUTS: dict[str, Callable[[int], torch.Tensor]] = {
    "2-D": lambda n: torch.randn(50, n),
    "3-D": lambda n: torch.randn(4, 9, n),
    "1-D": lambda n: torch.randn(n),
    "transposed": lambda n: torch.randn(4, n, 9).transpose(1, 2),
    "strided": lambda n: torch.randn(20, 2 * n)[:, ::2],
    "expanded": lambda n: torch.randn(1, 6, n).expand(3, 6, n),
    "empty": lambda n: torch.randn(0, n),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("adapters", [1, 3])
@pytest.mark.parametrize("r", [None, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_training_through_the_fold_is_training_through_the_gate(
    shape: tuple[int, int], r: int | None, adapters: int, kind: str
) -> None:
    model = trained(adapted(*shape, r=r, adapters=adapters, std=0.1))
    x = INPUTS[kind](shape[1])
    folded = gradients(model, x)
    assert is_folded(model)
    assert_close(folded, gradients(set_fold(model, "never"), x))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_singular_value_that_is_switched_off_has_the_right_gradient(shape: tuple[int, int]) -> None:
    model = adapted(*shape)
    the_layer(model).svf_delta["default"].weight.data[[0, 3]] = torch.tensor([-1.0, -1.0 + 1e-6])
    x = torch.randn(30, shape[1])
    found = gradients(model, x)
    assert found[0][0].abs() > 1e-3
    assert_close(found, gradients(set_fold(model, "never"), x))
    set_fold(model, "always")
    with torch.no_grad():
        assert (model(x) - reference(model, x)).norm() <= 1e-5 * reference(model, x).norm()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("fold", ["auto", "always"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_checkpointing(shape: tuple[int, int], fold: str, use_reentrant: bool) -> None:
    model = trained(adapted(*shape, fold=fold))
    x = torch.randn(30, shape[1])

    def call(model: PeftModel, x: torch.Tensor) -> torch.Tensor:
        # several calls before backward, so that the layer has reason to fold in between
        return sum(checkpoint(model, x * i, use_reentrant=use_reentrant) for i in range(1, 6))

    expected = gradients(adapted(*shape, fold="never"), x, call)
    for _ in range(3):
        assert_close(gradients(model, x, call), expected)
        with torch.no_grad():
            model(x)


def test_a_checkpoint_is_recomputed_after_other_adapters_were_used() -> None:
    model = trained(adapted(adapters=2, fold="auto"))
    x = torch.randn(100, 24, requires_grad=True)
    model.set_adapter("default")
    for _ in range(3):
        y = checkpoint(model, x, use_reentrant=False)
        with torch.no_grad():  # as DPO does with its reference adapter
            for name in ("a1", "default"):
                model.set_adapter(name)
                model(x)
        (found,) = torch.autograd.grad(y.pow(2).sum(), [the_layer(model).svf_delta["default"].weight])
        expected = adapted(adapters=2, fold="never")
        expected.set_adapter("default")
        assert_close([found], gradients(expected, x.detach())[:1])


@pytest.mark.parametrize("fold", ["auto", "always"])
def test_gradients_accumulate(fold: str) -> None:
    model, plain = trained(adapted(16, 40, fold=fold)), adapted(16, 40, fold="never")
    batches = [torch.randn(n, 40) for n in (3, 200, 1, 50)]
    for batch in batches:
        model(batch).pow(2).sum().backward()
        plain(batch).pow(2).sum().backward()
    assert is_folded(model)
    assert_close([d.grad for d in deltas(model)], [d.grad for d in deltas(plain)])


@pytest.mark.parametrize("shape", SHAPES)
def test_training_follows_the_same_path(shape: tuple[int, int]) -> None:
    models = [adapted(*shape, fold=fold) for fold in ("auto", "always", "never")]
    x, target = torch.randn(64, shape[1]), torch.randn(64, shape[0])
    for model in models:
        optimizer = torch.optim.AdamW(deltas(model), lr=1e-2)
        for _ in range(10):
            optimizer.zero_grad()
            (model(x) - target).pow(2).mean().backward()
            optimizer.step()
            with torch.no_grad():
                model(x)
    for model in models[:2]:
        assert torch.allclose(deltas(model)[0], deltas(models[2])[0], atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_autocast(shape: tuple[int, int]) -> None:
    model = trained(adapted(*shape, std=0.4))
    x = torch.randn(50, shape[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, y = gradients(model, x), model(x)
        assert is_folded(model)
        assert the_layer(model).fold.weight.dtype == y.dtype == torch.bfloat16
        set_fold(model, "never")
        expected = gradients(model, x)
    assert_close(found, expected, tolerance=0.03)
    assert found[-1].dtype == torch.float32
    assert found[0].dtype == torch.float32


def test_a_trainable_bias_gets_its_gradient() -> None:
    models = []
    for fold in ("always", "never"):
        torch.manual_seed(1)
        runtime = SVFRuntimeConfig(fold=fold, use_cache=False)
        config = SVFConfig(target_modules=["linear"], bias="all", init_weights=False, runtime_config=runtime)
        models.append(get_peft_model(OneLayer(24, 24), config))
    x = torch.randn(30, 24)
    for model in models:
        model(x).pow(2).sum().backward()
    found, expected = ([p.grad for p in model.parameters() if p.requires_grad] for model in models)
    assert len(found) == 2
    assert_close(found, expected)


def test_a_thawed_base_weight_gets_its_gradient() -> None:
    model = adapted()
    weight = the_layer(model).get_base_layer().weight
    weight.requires_grad_(True)
    model(torch.randn(30, 24)).sum().backward()
    assert weight.grad.norm() > 0


@pytest.mark.parametrize(("out", "inp", "expected"), [(24, 24, (50, 24)), (16, 40, (50, 16)), (40, 16, (50, 16))])
def test_only_the_layers_own_input_or_output_is_kept(out: int, inp: int, expected: tuple[int, int]) -> None:
    model = trained(adapted(out, inp))
    x = torch.randn(50, inp, requires_grad=True)
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    activations = [t for t in kept if t.shape[:1] == (50,)]
    assert [tuple(t.shape) for t in activations] == [expected]
    assert activations[0].data_ptr() in (x.data_ptr(), y.data_ptr())


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_whose_output_is_changed_in_place_trains_through_the_gate(
    shape: tuple[int, int], inplace: bool
) -> None:
    models = [adapted(*shape, fold=fold) for fold in ("always", "never")]
    x = torch.randn(50, shape[1])
    for step in range(3):
        found, expected = (
            gradients(model, x, lambda model, x: nn.functional.relu(model(x), inplace=inplace)) for model in models
        )
        assert_close(found, expected)
        assert is_folded(models[0]) is (shape[0] > shape[1] or (step > 0 and not inplace))
        changed(*models)


def test_an_output_changed_in_place_later_is_an_error_and_not_a_wrong_gradient() -> None:
    model = trained(adapted(16, 40))
    y = model(torch.randn(50, 40))
    y.relu_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@given(st.integers(1, 30), st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_both_ways_to_the_gradient_of_delta_agree(tokens: int, k: int, r: int, seed: int) -> None:
    torch.manual_seed(seed)
    a, b, basis = (torch.randn(n, k, dtype=torch.float64) for n in (tokens, tokens, min(r, k)))
    expected = torch.einsum("tk,rk,tl,rl->r", a, basis, b, basis)
    assert torch.allclose(projected_products(a, b, basis.mT), expected)
    many = projected_products(a.repeat(200, 1), b.repeat(200, 1), basis.mT)
    assert torch.allclose(many, 200 * expected)


# ---------------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.slow
@pytest.mark.parametrize("fold", ["auto", "always"])
def test_a_compiled_model_computes_the_same(fold: str) -> None:
    model, plain = adapted(16, 40, fold=fold), adapted(16, 40, fold="never")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(30, 40)
    for _ in range(3):
        assert_close(gradients(model, x, lambda _, x: compiled(x)), gradients(plain, x))
        with torch.no_grad():
            assert torch.allclose(compiled(x), plain(x), atol=1e-5)
            for pair in zip(deltas(model), deltas(plain), strict=True):
                change = torch.randn(16)
                for delta in pair:
                    delta.add_(0.1 * change)


@pytest.mark.slow
def test_the_folded_function_compiles() -> None:
    weight = torch.randn(16, 40)
    basis, delta = singular_basis(weight).vectors, (0.2 * torch.randn(16)).requires_grad_()
    folded, x = effective_weight(weight, basis, delta.detach()), torch.randn(30, 40)
    compiled = torch.compile(folded_linear, backend="aot_eager", fullgraph=True)
    results = [
        torch.autograd.grad(function(x, delta, None, folded, basis).pow(2).sum(), [delta])
        for function in (compiled, folded_linear)
    ]
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-4)


# ---------------------------------------------------------------------------------------------------- policy


def test_a_layer_folds_when_the_gate_has_cost_as_much() -> None:
    model = adapted(24, 24, fold="auto")
    per_call = gate_cost(24, 24, 20)
    calls = -(-fold_cost(24, 24, 24) // per_call)
    with torch.no_grad():
        for _ in range(calls - 1):
            model(torch.randn(20, 24))
            assert not is_folded(model)
        model(torch.randn(20, 24))
    assert is_folded(model)


def test_one_long_call_folds_at_once() -> None:
    model = adapted(fold="auto")
    with torch.no_grad():
        model(torch.randn(1000, 24))
    assert is_folded(model)


def test_never_frees_what_was_kept() -> None:
    model = adapted()
    x = torch.randn(5, 24)
    with torch.no_grad():
        model(x)
        assert is_folded(model)
        set_fold(model, "never")(x)
    assert not is_folded(model)


def test_release_folded() -> None:
    model = adapted()
    x = torch.randn(5, 24)
    with torch.no_grad():
        before = model(x)
        model.base_model.release_folded()
        assert not is_folded(model)
        assert torch.equal(model(x), before)
    assert is_folded(model)


def test_training_that_uses_the_gate_frees_the_folded_weight() -> None:
    model = adapted()
    the_layer(model).svf_delta["default"].weight.data[0] = -1.0
    x = torch.randn(50, 24)
    with torch.no_grad():
        model(x)
    assert is_folded(model)
    model(x)
    assert not is_folded(model)


def test_training_uses_what_a_rollout_folded() -> None:
    model = trained(adapted(16, 40, fold="auto"))
    with torch.no_grad():
        model(torch.randn(1000, 40))
    weight = the_layer(model).fold.weight
    model(torch.randn(1, 40)).sum().backward()
    assert the_layer(model).fold.weight is weight


def test_an_unknown_policy() -> None:
    with pytest.raises(ValueError, match="'auto', 'always' or 'never', got 'sometimes'"):
        SVFRuntimeConfig(fold="sometimes")
    model = adapted()
    with pytest.raises(ValueError, match="got 'nevr'"):
        model.peft_config["default"].runtime_config.fold = "nevr"
    assert model.peft_config["default"].runtime_config.fold == "always"


# ---------------------------------------------------------------------------------------------------- invalidation


def optimizer_step(model: PeftModel, make: Callable[..., torch.optim.Optimizer]) -> None:
    for delta in deltas(model):
        delta.grad = torch.ones_like(delta)
    make(deltas(model), lr=0.1).step()


CHANGES: dict[str, Callable[[PeftModel], Any]] = {
    "sgd": lambda m: optimizer_step(m, torch.optim.SGD),
    "adamw": lambda m: optimizer_step(m, torch.optim.AdamW),
    "adamw foreach": lambda m: optimizer_step(m, lambda p, lr: torch.optim.AdamW(p, lr=lr, foreach=True)),
    "adamw fused": lambda m: optimizer_step(m, lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True)),
    "in place": lambda m: [d.detach().add_(0.1) for d in deltas(m)],
    "data": lambda m: [d.data.add_(0.1) for d in deltas(m)],
    "data of one entry": lambda m: deltas(m)[0].data[3].add_(0.1),
    "data swapped": lambda m: setattr(deltas(m)[0], "data", deltas(m)[0].data + 0.1),
    "numpy": lambda m: deltas(m)[0].detach().numpy().__iadd__(0.1),
    "new parameter": lambda m: setattr(
        the_layer(m).svf_delta["default"], "weight", nn.Parameter(deltas(m)[0].detach() + 0.1)
    ),
    "load_state_dict": lambda m: m.load_state_dict(
        {k: v + 0.1 if "svf_delta" in k else v for k, v in m.state_dict().items()}
    ),
    "assign": lambda m: m.load_state_dict(
        {k: v + 0.1 if "svf_delta" in k else v for k, v in m.state_dict().items()}, assign=True
    ),
    "base weight": lambda m: the_layer(m).get_base_layer().weight.detach().mul_(1.5),
    "new base weight": lambda m: setattr(
        the_layer(m).get_base_layer(),
        "weight",
        nn.Parameter(1.5 * the_layer(m).get_base_layer().weight.detach(), requires_grad=False),
    ),
    "other adapter": lambda m: m.set_adapter("a1"),
    "both adapters": lambda m: m.base_model.set_adapter(["default", "a1"]),
    "disabled": lambda m: m.base_model.disable_adapter_layers(),
    "merged": lambda m: m.merge_adapter(["default"]),
    "merged with another": lambda m: m.merge_adapter(["default", "a1"]),
    "deleted": lambda m: (m.set_adapter("a1"), m.delete_adapter("default")),
    "bias": lambda m: the_layer(m).get_base_layer().bias.data.add_(1.0),
    "double": lambda m: m.double(),
    "hook": lambda m: the_layer(m).get_base_layer().register_forward_hook(lambda *a: a[-1] * 2),
    "inference mode": lambda m: [torch.inference_mode()(d.add_)(0.1) for d in map(torch.Tensor.detach, deltas(m))],
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_out_of_date_is_used(change: str) -> None:
    model, plain = (adapted(adapters=2, fold=fold) for fold in ("always", "never"))
    x = torch.randn(6, 24)
    for each in (model, plain):
        each.set_adapter("default")
        with torch.no_grad():
            before = each(x)
        CHANGES[change](each)
    x = x.to(next(model.parameters()).dtype)
    with torch.no_grad():
        found, expected = model(x), plain(x)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    if change not in ("merged", "double"):
        assert (found - before).norm() > 1e-3 * before.norm()


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are compared only in doubt, where looking at them would wait for the device."""
    init = Snapshot.__init__

    def elsewhere(self: Snapshot, *args: Any) -> None:
        init(self, *args)
        self.device_type = "cuda"

    monkeypatch.setattr(Snapshot, "__init__", elsewhere)


VERSIONED = [change for change in CHANGES if not change.startswith("data") and change != "numpy"]


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("change", ["data swapped", *VERSIONED])
def test_nothing_out_of_date_is_used_where_values_are_not_compared(change: str) -> None:
    test_nothing_out_of_date_is_used(change)


IN_A_FRESH_PROCESS = """
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks as hooks
import peft_svf
from peft import get_peft_model
from peft_svf.tuner.fold import Snapshot

assert not hooks
runtime = peft_svf.SVFRuntimeConfig(fold="always", use_cache=False)
config = peft_svf.SVFConfig(target_modules=["0", "1"], runtime_config=runtime)
model = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config)
assert not hooks

# as on a GPU, where values are compared only after an optimizer step
init = Snapshot.__init__
Snapshot.__init__ = lambda self, *args: (init(self, *args), setattr(self, "device_type", "cuda"))[0]
deltas = [parameter for name, parameter in model.named_parameters() if "svf_delta" in name]
optimizer = torch.optim.AdamW(deltas, lr=0.1, fused=True)  # which changes no version
x = torch.randn(3, 8)
with torch.no_grad():
    before = model(x)
assert model.base_model.model[0].fold.weight is not None
assert len(hooks) == 1
for delta in deltas:
    delta.grad = torch.ones_like(delta)
optimizer.step()
with torch.no_grad():
    folded = model(x)
    runtime.fold = "never"
    gated = model(x)
assert not torch.allclose(folded, before, atol=1e-2)
assert torch.allclose(folded, gated, atol=1e-5)
"""


def test_optimizers_are_hooked_at_the_first_fold_and_not_at_import() -> None:
    done = subprocess.run([sys.executable, "-c", IN_A_FRESH_PROCESS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("after", ["rollout", "training", "merge"])
def test_an_optimizer_that_leaves_no_version(after: str) -> None:
    """As those that write to flat buffers do."""
    model, plain = trained(adapted(16, 40)), adapted(16, 40, fold="never")
    x = torch.randn(30, 40)
    for _ in range(2):
        for each in (model, plain):
            each(x).sum().backward()
            each.zero_grad()
            deltas(each)[0].data.add_(0.1)
        for _ in range(2):
            if after == "training":
                assert_close(gradients(model, x), gradients(plain, x))
                continue
            if after == "merge":
                model.merge_adapter()
            with torch.no_grad():
                assert torch.allclose(model(x), plain(x), atol=1e-4)
            if after == "merge":
                model.unmerge_adapter()


@pytest.mark.usefixtures("as_on_a_gpu")
def test_training_after_an_evaluation_with_other_values() -> None:
    """As with an exponential moving average, put in by version and taken out without."""
    model, plain = trained(adapted(16, 40)), adapted(16, 40, fold="never")
    x = torch.randn(30, 40)
    gradients(model, x)
    kept = deltas(model)[0].detach().clone()
    with torch.no_grad():
        deltas(model)[0].mul_(0.5)
        model(x)
    deltas(model)[0].data.copy_(kept)
    assert_close(gradients(model, x), gradients(plain, x))


@pytest.mark.parametrize("tokens", [4, 8, 16, 24])
@pytest.mark.parametrize("shape", SHAPES)
def test_checkpointing_with_frozen_deltas(shape: tuple[int, int], tokens: int) -> None:
    model, plain = adapted(*shape, fold="auto"), adapted(*shape, fold="never")
    x = torch.randn(tokens, shape[1])
    found = []
    for each in (model, plain):
        each.requires_grad_(False)
        leaf = x.clone().requires_grad_()
        sum(checkpoint(each, leaf * i, use_reentrant=False).pow(2).sum() for i in range(1, 9)).backward()
        found.append(leaf.grad)
    assert_close(found[:1], found[1:])


def test_finding_out_about_in_place_changes_holds_no_memory() -> None:
    model = adapted(16, 40)
    y = model(torch.randn(30, 40))
    storage = weakref.ref(y.untyped_storage())
    loss = y.clone().sum()
    del y
    gc.collect()
    assert storage() is None
    loss.backward()


def test_merging_and_folding_under_autocast_is_exact() -> None:
    model = adapted(16, 40, std=1e-3)
    layer = the_layer(model)
    weight = layer.get_base_layer().weight.detach().clone()
    delta = layer.svf_delta["default"]().detach()
    expected = delta_weight(weight, layer.basis, delta)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.merge_adapter()
        assert torch.equal(delta_weight(weight, layer.basis, delta), expected)
    assert ((layer.get_base_layer().weight - weight) - expected).norm() <= 1e-3 * expected.norm()


def test_an_adapter_that_the_layer_lacks_frees_what_was_folded() -> None:
    model = get_peft_model(tiny_llama(), SVFConfig(target_modules=["q_proj", "v_proj"]), adapter_name="wide").eval()
    model.add_adapter("narrow", SVFConfig(target_modules=["q_proj"]))
    set_fold(model, "always")
    layers = [module for module in model.modules() if isinstance(module, SVFLayer)]
    with torch.no_grad():
        model(input_ids=IDS)
        assert all(layer.fold.weight is not None for layer in layers)
        model.set_adapter("narrow")
        model(input_ids=IDS)
    assert [layer.fold.weight is not None for layer in layers] == ["narrow" in layer.svf_delta for layer in layers]


def test_a_mixture_has_a_runtime_config_of_its_own() -> None:
    model = adapted(adapters=2)
    model.base_model.add_weighted_adapter(["default", "a1"], [0.5, 0.5], "mix")
    model.peft_config["mix"].runtime_config.fold = "never"
    assert model.peft_config["default"].runtime_config.fold == "always"


def test_unmerging_brings_the_adapter_back() -> None:
    model = adapted()
    x = torch.randn(6, 24)
    with torch.no_grad():
        before = model(x)
        for _ in range(3):
            model.merge_adapter()
            merged = model(x)
            model.unmerge_adapter()
            assert torch.equal(merged, before)
            assert torch.equal(model(x), before)


def test_merging_takes_the_folded_weight_and_frees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    with torch.no_grad():
        model(torch.randn(6, 24))
    layer = the_layer(model)
    folded = layer.fold.weight.clone()
    monkeypatch.setattr(type(layer), "effective_weight", None)  # is not needed
    model.merge_adapter()
    assert torch.equal(layer.get_base_layer().weight, folded)
    assert not is_folded(model)


def test_moving_the_model_frees_the_folded_weight() -> None:
    model = adapted()
    with torch.no_grad():
        model(torch.randn(6, 24))
    model.to(torch.float64)
    assert not is_folded(model)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_no_folded_weight_and_its_own_bookkeeping(make: Callable[[PeftModel], PeftModel]) -> None:
    model = adapted()
    x = torch.randn(6, 24)
    with torch.no_grad():
        before = model(x)
        twin = make(model)
        assert not is_folded(twin)
        assert torch.equal(twin(x), before)
        deltas(twin)[0].add_(0.5)
        assert not torch.allclose(twin(x), before, atol=1e-3)
        assert torch.equal(model(x), before)


def test_nothing_of_the_fold_is_in_the_state_dict() -> None:
    model = adapted()
    keys = list(model.state_dict())
    with torch.no_grad():
        model(torch.randn(6, 24))
    assert list(model.state_dict()) == keys


def test_a_model_in_inference_mode() -> None:
    model = adapted()
    x = torch.randn(6, 24)
    expected = reference(model, x).float()
    with torch.inference_mode():
        assert torch.allclose(model(x), expected, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(model(x), expected, atol=1e-5)
    model(x).sum().backward()


def test_functorch_sees_the_delta_it_passes() -> None:
    model = adapted()
    x = torch.randn(6, 24)
    (name,) = (n for n, _ in model.named_parameters() if "svf_delta" in n)
    candidates = 0.2 * torch.randn(5, 24)

    def call(delta: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, {name: delta}, (x,))

    with torch.no_grad():
        together = torch.func.vmap(call)(candidates)
        for candidate, result in zip(candidates, together, strict=True):
            assert torch.allclose(call(candidate), result, atol=1e-5)
            deltas(model)[0].copy_(candidate)
            assert torch.allclose(model(x), result, atol=1e-5)


def test_replicas_of_data_parallel_use_the_gate() -> None:
    """Whose parameters are plain attributes."""
    model = adapted()
    x = torch.randn(6, 24)
    with torch.no_grad():
        expected = model(x)
        replica = the_layer(model)._replicate_for_data_parallel()
        base_layer = the_layer(model).get_base_layer()._replicate_for_data_parallel()
        base_layer.weight, base_layer.bias = (
            tensor.detach() for tensor in the_layer(model).get_base_layer().parameters()
        )
        replica._modules["base_layer"] = base_layer
        replica.original_module_basis = the_layer(model).basis.detach()
        assert torch.allclose(replica(x), expected, atol=1e-5)


def test_generation_is_the_same_with_and_without_folding() -> None:
    model = get_peft_model(tiny_llama(), SVFConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    for delta in deltas(model):
        delta.data.normal_(std=0.3)
    results = []
    for fold in ("auto", "always", "never"):
        set_fold(model, fold)
        results.append(model.generate(input_ids=IDS, max_new_tokens=60, min_new_tokens=60, do_sample=False))
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[2])


# ---------------------------------------------------------------------------------------------------- 16 bit


def true_share(weight: torch.Tensor, delta: torch.Tensor, dtype: torch.dtype) -> float:
    U, sigma, Vt = torch.linalg.svd(weight.double(), full_matrices=False)
    change = U[:, : len(delta)] * (sigma[: len(delta)] * delta.double()) @ Vt[: len(delta)]
    kept = (weight.double() + change).to(dtype).double() - weight.to(dtype).double()
    share = float((kept * change).sum() / change.pow(2).sum())
    return min(share, 2 - share)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["random", "constant", "leading", "few"])
@pytest.mark.parametrize("shape", [(96, 96), (96, 200), (200, 96)])
def test_the_estimated_share_is_the_true_one(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    weight = (0.05 * torch.randn(shape)).to(dtype)
    basis = singular_basis(weight.float()).vectors
    for size in (1e-4, 5e-4, 1e-3, 2e-3, 5e-3, 2e-2):
        delta = size * torch.randn(96)
        if kind == "constant":
            delta[:] = size
        elif kind == "leading":
            delta[8:] = 0
        elif kind == "few":
            delta *= torch.rand(96) < 0.1
        true = true_share(weight, delta, dtype)
        assert surviving_fraction(weight, basis, delta, dtype) == pytest.approx(true, abs=0.04)
        assert surviving_fraction(weight, basis, delta, dtype, rows=None) == pytest.approx(true, abs=0.01)


def test_nothing_is_lost_of_nothing_or_in_32_bit() -> None:
    weight = torch.randn(30, 50)
    basis = singular_basis(weight).vectors
    assert surviving_fraction(weight.bfloat16(), basis.bfloat16(), torch.zeros(30), torch.bfloat16) == 1.0
    assert surviving_fraction(weight, basis, 1e-3 * torch.randn(30), torch.float32) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("std", "folds"), [(1e-3, False), (0.2, True)])
def test_a_bf16_layer_folds_only_what_survives(std: float, folds: bool, training: bool) -> None:
    model = adapted(40, 24, dtype=torch.bfloat16, std=std)
    with torch.set_grad_enabled(training):
        model(torch.randn(50, 24).bfloat16())
    assert is_folded(model) is folds


def test_merging_in_bf16_says_what_is_lost() -> None:
    model = adapted(dtype=torch.bfloat16, std=1e-3)
    share = the_layer(model).surviving_fraction(deltas(model)[0].detach(), torch.bfloat16)
    with pytest.warns(UserWarning, match=rf"1 of 1 merged weights.*{share:.0%} of ΔW is left in linear"):
        model.merge_adapter()
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="too coarse"):
        model.merge_and_unload()


def test_only_what_was_merged_now_is_warned_of() -> None:
    model = get_peft_model(
        tiny_llama(dtype=torch.bfloat16), SVFConfig(target_modules=["q_proj", "v_proj"]), adapter_name="lossy"
    )
    model.add_adapter("fine", SVFConfig(target_modules=["q_proj"]))
    for name, delta in model.named_parameters():
        if "svf_delta" in name:
            delta.data.normal_(std=1e-3 if ".lossy." in name else 0.3)
    with pytest.warns(UserWarning, match="4 of 4 merged weights"):
        model.merge_adapter(["lossy"])
    model.unmerge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter(["fine"])


@pytest.mark.parametrize(("dtype", "std"), [(torch.float32, 1e-3), (torch.bfloat16, 0.2), (torch.bfloat16, 0.0)])
def test_merging_without_loss_is_silent(dtype: torch.dtype, std: float) -> None:
    model = adapted(dtype=dtype, std=std)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter()
