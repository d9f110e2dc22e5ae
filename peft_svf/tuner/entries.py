"""The entries of one adapter in the state dict of a model.

PEFT finds them by names within keys, and so loses keys of modules that are called like another adapter. Here they are
found by layer and adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .layer import SVFLayer
from .parameters import BASIS_NAME

_FSDP = "_fsdp_wrapped_module."  # not in the keys of a state dict


def delta_keys(model: nn.Module, adapter_name: str) -> dict[str, SVFLayer]:
    """Return the layers that have an adapter, by the key of its δ."""
    return {
        f"{name}.svf_delta.{adapter_name}.weight".removeprefix("."): layer
        for name, layer in _layers(model)
        if adapter_name in layer.svf_delta
    }


def _layers(model: nn.Module) -> list[tuple[str, SVFLayer]]:
    named = model.named_modules()
    return [(name.replace(_FSDP, ""), module) for name, module in named if isinstance(module, SVFLayer)]


def without_adapter_name(key: str, adapter_name: str) -> str:
    """Return the key of a checkpoint for a key of the model. Only the keys of δ hold the name of the adapter."""
    ending = f".svf_delta.{adapter_name}.weight"
    return f"{key.removesuffix(ending)}.svf_delta.weight" if f".{key}".endswith(ending) else key


def adapter_entries(
    model: nn.Module, adapter_name: str, state_dict: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the entries of an adapter's δ.

    Raises:
        ValueError: A key is missing.
    """
    if not state_dict:
        return {}  # ranks that do not save have no state dict
    entries: dict[str, torch.Tensor] = {}
    seen = set()
    for key, layer in delta_keys(model, adapter_name).items():
        if key not in state_dict:
            raise ValueError(
                f"The state dict to save has no {key}, which belongs to adapter {adapter_name!r}. Pass a whole state "
                "dict, or none."
            )
        delta = layer.svf_delta[adapter_name]
        # layers that share their weight share δ, and files hold no tensor twice
        entries[key] = state_dict[key].clone() if id(delta) in seen else state_dict[key]
        seen.add(id(delta))
    return entries


def put_back(model: nn.Module, adapter_name: str, state_dict: dict[str, Any], others: Sequence[str]) -> None:
    """Add the keys to a state dict that PEFT has left out because they contain the name of another adapter.

    Such as those of `model.layers.0` if there is an adapter `"0"`.

    Args:
        model: The model.
        adapter_name: The adapter to save.
        state_dict: The copy of the state dict that PEFT has made for this adapter. It is changed.
        others: The other adapters.

    Raises:
        ValueError: The state dict was not made from the tensors of the model, as for sharded models, so the lost
            values are unknown.
    """
    parts = tuple(f".{name}." for name in others)
    ends = tuple(part[:-1] for part in parts)
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    own = {name.replace(_FSDP, ""): tensor for name, tensor in tensors}
    theirs = tuple(f".{container}{part}" for container in ("svf_delta", "modules_to_save") for part in parts)
    lost = [
        key
        for key in own
        if (key.endswith(ends) or any(part in key for part in parts))
        and key not in state_dict
        and not any(part in f".{key}" for part in theirs)
    ]
    if not lost:
        return
    known = [key for key, value in state_dict.items() if isinstance(value, torch.Tensor) and key in own]
    if known and all(_is_view(state_dict[key], own[key]) for key in known):
        state_dict.update({key: own[key].detach() for key in lost})
        return
    wanted = {*delta_keys(model, adapter_name), *_keys_of_wrappers(model, adapter_name)}
    if state_dict and (missing := sorted(wanted & set(lost))):
        names = [name for name in others if f".{name}." in missing[0] or missing[0].endswith(f".{name}")]
        raise ValueError(
            f"PEFT leaves {missing[0]} out of the state dict of adapter {adapter_name!r}, because adapter {names[0]!r} "
            f"is called like a module. Save without `state_dict`, or give {names[0]!r} another name."
        )


def foreign_biases(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Return the keys of biases in the model, by their keys in the checkpoint, where these differ.

    A module that only another adapter adapts is a plain one in the checkpoint.
    """
    return {
        f"{name}.bias": f"{name}.base_layer.bias"
        for name, layer in _layers(model)
        if adapter_name not in layer.svf_delta and layer.bias is not None
    }


def _is_view(value: torch.Tensor, own: torch.Tensor) -> bool:
    plain = type(value) in (torch.Tensor, nn.Parameter) and not hasattr(own, "ds_id")
    return plain and type(own) in (torch.Tensor, nn.Parameter) and value.data_ptr() == own.data_ptr()


def _keys_of_wrappers(model: nn.Module, adapter_name: str) -> list[str]:
    return [
        f"{name.replace(_FSDP, '')}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for key in module.adapter_state_dict_load_map(adapter_name).values()
    ]


def as_of_base(model: nn.Module, state_dict: dict[str, Any]) -> None:
    """Drop the singular bases from a state dict, and replace merged base weights by the original ones, in place.

    PEFT saves everything of a resized or adapted output layer with the adapter. The merged weight would be loaded as
    base weight.
    """
    for key in [key for key in state_dict if key.endswith(f".{BASIS_NAME}")]:
        del state_dict[key]
    for name, layer in _layers(model):
        if (original := layer.merge_state.before) is not None:
            base_layer = layer.get_base_layer()
            place = next(place for place, module in layer.named_modules() if module is base_layer)
            if f"{name}.{place}.weight" in state_dict:
                state_dict[f"{name}.{place}.weight"] = original


def check_loadable(model: nn.Module, adapter_name: str, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Check that values of δ can be put into a model.

    Args:
        model: The model.
        adapter_name: The adapter.
        state_dict: Values by the model's keys. Keys may be missing.

    Raises:
        ValueError: The adapter is merged, or layers that share their weight have different δ.
    """
    first: dict[int, str] = {}
    for key, layer in delta_keys(model, adapter_name).items():
        if adapter_name in layer.merged_adapters:
            raise ValueError(
                f"Adapter {adapter_name!r} is merged, so new values have no effect. Call `unmerge_adapter()` first."
            )
        known = first.setdefault(id(layer.svf_delta[adapter_name]), key)
        if known != key and known in state_dict and key in state_dict:
            a, b = state_dict[known], state_dict[key]
            if not (a.is_meta or b.is_meta) and not torch.equal(a, b):
                raise ValueError(
                    f"{known} and {key} differ in the checkpoint of adapter {adapter_name!r}, but the model has one "
                    "weight for both. Load it into a model with separate weights."
                )
