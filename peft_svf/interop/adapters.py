"""The changes that adapters of other PEFT methods make, one ΔW per module.

Only what is understood is read, and any other setting is refused. Some initialisations rewrite the base weights, and
some options train biases, scales or embeddings as well. ΔW is then not the whole change.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME
from peft.utils.save_and_load import load_peft_weights
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..tuner.renames import current_names
from ..utils.files import read_text

# methods whose whole change is the ΔW that their layers return
ADDITIVE = ("LORA", "VERA", "LOHA", "LOKR", "FOURIERFT", "RANDLORA")
# fields that choose modules, shape ΔW, act in training only, or are no part of the computation
UNDERSTOOD = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *(
        "fan_in_fan_out",
        "r",
        "rank_pattern",
        "alpha_pattern",
        "alpha",
        "init_weights",
        "rank_dropout",
        "module_dropout",
    ),
    *("lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "eva_config"),
    *("projection_prng_key", "save_projection", "vera_dropout", "d_initial", "sparse", "very_sparse"),
    *("randlora_dropout", "randlora_alpha", "decompose_both", "decompose_factor", "rank_dropout_scale"),
    *("n_frequency", "scaling", "random_loc_seed", "n_frequency_pattern", "use_effective_conv2d"),
}
# the initialisations of LoRA that leave the base weights as they are
INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva", "mica")
# of the difference between two precisions of a weight, which is 0.2 % for bf16
SAME_BASE = 5e-3

# settings for single modules
PATTERNS = ("rank_pattern", "alpha_pattern", "n_frequency_pattern")

Change = Callable[[str, torch.Tensor], "torch.Tensor | None"]


@dataclass(frozen=True)
class Changes:
    """
    The changes of a fine-tuning.

    Attributes:
        of: Returns the ΔW of a module in the layout of its weight, given its name and the base weight; `None` if it is
            unchanged.
        left_out: Returns the squared norm of each change outside of the given modules, by name.
        modules: The names of the changed modules, if they are known.
    """

    of: Change
    left_out: Callable[[Collection[str]], dict[str, float]]
    modules: tuple[str, ...] = ()


def changes_of_folder(folder: Path, base: nn.Module) -> Changes:
    """Return the changes of a saved adapter. The base model only gives the shapes and is not touched.

    Raises:
        ValueError: The adapter changes more than single weights, does not fit the base model, or is incomplete.
    """
    written = json.loads(read_text(folder / CONFIG_NAME))
    config = PeftConfig.from_pretrained(str(folder))
    _check_config(config, str(folder), written)
    weights = load_peft_weights(str(folder), device="cpu")
    stored = _stored_base_weights(weights, base, folder)
    config.inference_mode = True
    moved = _moved_names(weights, base, config, folder)
    model = PeftModel(_skeleton(base, stored), config)
    key_mapping = {rf"^{re.escape(old)}(?=\.)": new for old, new in moved.items()}
    result = model.load_adapter(str(folder), "default", torch_device="cpu", key_mapping=key_mapping)
    if wrong := [*result.missing_keys, *result.unexpected_keys]:
        what = "lacks" if result.missing_keys else "has the unknown"
        raise ValueError(f"{folder} {what} {wrong[0]}. Pass a complete adapter of this base model.")
    return _of_layers(model.base_model.model, str(folder))


def changes_of_model(model: PeftModel, base: nn.Module) -> Changes:
    """Return the changes of the active adapters of a model.

    Raises:
        ValueError: An adapter changes more than single weights, or was made for other weights than the base model's.
    """
    for name in model.active_adapters:
        _check_config(model.peft_config[name], f"The adapter {name!r}", {})
    changes = _of_layers(model.base_model.model, "the adapter")
    modules = dict(base.named_modules())
    for name in changes.modules:
        layer: Any = model.base_model.model.get_submodule(name)
        if name not in modules or (not layer.merged and _differ(modules[name], layer.get_base_layer())):
            raise ValueError(
                f"The adapter was made for another {name} than the base model has. Pass the base model of the adapter, "
                "or merge the adapter and pass the merged model."
            )
    return changes


def _differ(here: nn.Module, there: nn.Module) -> bool:
    """Whether two modules have different weights. Quantized ones and those on the meta device are not compared."""
    a, b = (getattr(module, "weight", None) for module in (here, there))
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return False
    if any(type(w) is not nn.Parameter or w.is_meta or not w.is_floating_point() for w in (a, b)):
        return False
    return a.shape != b.shape or not (a.double() - b.to(a.device).double()).norm() <= SAME_BASE * a.double().norm()


# ---------------------------------------------------------------------------------------------------- what is refused


def _check_config(config: Any, where: str, written: Mapping[str, Any]) -> None:
    """Check that the ΔW of an adapter's layers is its whole change.

    Args:
        config: The config.
        where: The adapter, for messages.
        written: The fields as they are in the file, which may come from a newer PEFT.

    Raises:
        ValueError: The adapter changes something else as well, or may do so.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind == "SVF":
        raise ValueError(f"{where} is an SVF adapter already. Load it with `PeftModel.from_pretrained`.")
    if kind not in ADDITIVE:
        raise _refused(where, f"the method {kind}")
    if getattr(config, "init_lora_weights", True) not in INITIALISATIONS:
        raise _refused(where, f"`init_lora_weights={config.init_lora_weights!r}`")
    known = {field.name: field for field in fields(config)}
    for name, field in known.items():
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if name not in UNDERSTOOD and getattr(config, name) != default:
            raise _refused(where, f"`{name}`")
    for name, value in written.items():
        if name not in known and value:
            raise _refused(where, f"`{name}`, unknown to the installed PEFT")


def _refused(where: str, what: str) -> ValueError:
    return ValueError(
        f"{where} has {what}, so it may change more than the ΔW of its layers. Merge it first and pass the merged "
        "model: `from_weights(peft_model.merge_and_unload(), base)`."
    )


def _stored_base_weights(weights: Mapping[str, torch.Tensor], base: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the base model that are saved with an adapter, as PEFT does for output layers.

    Raises:
        ValueError: One differs from that of the base model.
    """
    here, stored = base.state_dict(), {}
    for key, value in weights.items():
        name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if name not in here:
            continue
        if here[name].shape != value.shape or not torch.equal(here[name].to(value.device, value.dtype), value):
            raise ValueError(
                f"{folder} holds another {name} than the base model has. Merge the adapter first and pass the merged "
                "model: `from_weights(peft_model.merge_and_unload(), base)`."
            )
        stored[name] = value
    return stored


def _moved_names(weights: Mapping[str, torch.Tensor], base: nn.Module, config: Any, folder: Path) -> dict[str, str]:
    """Return the current names of the modules that an older transformers has called differently, also in the config.

    Raises:
        ValueError: The config has settings for single modules, which may be under their old names.
    """
    prefix = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].prefix
    names = {key.partition(f".{prefix}")[0].removeprefix("base_model.model.") for key in weights}
    moved = current_names(base, names)
    if moved and (patterns := [name for name in PATTERNS if getattr(config, name, None)]):
        raise ValueError(
            f"{folder} has the module names of an older transformers version, and {patterns[0]} for some of them. Save "
            "it again with the installed version."
        )
    if isinstance(config.target_modules, (list, set)):
        config.target_modules = {moved.get(name, name) for name in config.target_modules}
    return moved


# ---------------------------------------------------------------------------------------------------- reading


def _skeleton(base: nn.Module, stored: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a copy of a model without its weights, which PEFT may change.

    Each weight is a zero that is seen as a whole matrix, on the CPU: PEFT cannot attach all methods on the meta device.
    """
    replaced: dict[int, Any] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if id(parameter) in replaced and name not in stored:  # a tied weight may be saved under its second name
            continue
        coarse = not parameter.is_floating_point() or parameter.dtype.itemsize < 2  # quantized
        dtype = torch.float32 if coarse else parameter.dtype  # PEFT casts the adapter to it
        empty = stored[name].clone() if name in stored else torch.zeros((), dtype=dtype).expand(parameter.shape)
        replaced[id(parameter)] = nn.Parameter(empty, requires_grad=False)
    for module in base.modules():
        weight = getattr(module, "weight", None)
        packed = type(weight) is not nn.Parameter and hasattr(module, "in_features")  # quantized, in another shape
        if packed and not any(True for _ in module.children()):
            quantized: Any = module
            linear = nn.Linear(quantized.in_features, quantized.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(torch.zeros(()).expand(linear.weight.shape), requires_grad=False)
            replaced[id(module)] = linear
    skeleton = copy.deepcopy(base, replaced)
    skeleton.__dict__.pop("hf_device_map", None)  # PEFT would distribute the zeros over devices
    return skeleton


def _of_layers(model: nn.Module, where: str) -> Changes:
    layers: dict[str, Any] = {
        name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
    }
    active: dict[str, list[str]] = {}
    for name, layer in layers.items():
        parts = [getattr(layer, part, {}) for part in layer.adapter_layer_names]
        if kept := [each for each in layer.active_adapters if any(each in part for part in parts)]:
            inner = layer.get_base_layer()
            if not (isinstance(inner, (nn.Linear, Conv1D)) or hasattr(inner, "in_features")):  # the latter: quantized
                raise _refused(where, f"a change of {name}, a {type(inner).__name__}")
            active[name] = kept

    def change(name: str, weight: torch.Tensor | None = None) -> torch.Tensor | None:
        if name not in active:
            return None
        layer = layers[name]
        training, layer.training = layer.training, False  # no dropout
        try:
            parts = [layer.get_delta_weight(adapter).double() for adapter in active[name]]
        finally:
            layer.training = training
        return sum(parts[1:], parts[0])

    def left_out(adapted: Collection[str]) -> dict[str, float]:
        rest = {name: change(name) for name in active if name not in adapted}
        return {name: float(each.square().sum()) for name, each in rest.items() if each is not None}

    return Changes(change, left_out, tuple(active))
