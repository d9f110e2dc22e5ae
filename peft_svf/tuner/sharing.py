"""Base weights with several owners: layers that share a weight, other modules that use it, and other tuners on it."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..utils.errors import BaseCheckError
from .config import SVFConfig
from .merge import Merge
from .protocol import AdaptedLayer

Layer = TypeVar("Layer", bound=AdaptedLayer)


class WholeModel:
    """The model that a layer is in, without keeping it alive. Copies and pickles of a layer do not know theirs."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self._model = None if model is None else weakref.ref(model)

    def __call__(self) -> nn.Module | None:
        return None if self._model is None else self._model()

    @property
    def name(self) -> str | None:
        """The Hub id or folder of the model, as far as transformers knows it."""
        name: str | None = getattr(getattr(self(), "config", None), "_name_or_path", None)
        return name or None

    def __reduce__(self) -> tuple[Any, ...]:
        return WholeModel, ()


def link(layers: Sequence[AdaptedLayer], adapter_name: str) -> None:
    """Let the layers that have the same base weight share the state of its merge, and δ of an adapter.

    With separate δ, merging one layer would change what the others compute, and none of them could undo it.
    """
    regroup(layers)
    first: dict[int, AdaptedLayer] = {}
    for layer in layers:
        if adapter_name in layer.svf_delta:
            owner = first.setdefault(id(layer.merge_state), layer)
            layer.svf_delta[adapter_name] = owner.svf_delta[adapter_name]


def regroup(layers: Sequence[AdaptedLayer]) -> None:
    """Let the layers share the state of a merge that have the same base weight now, as long as nothing is merged.

    Casting separates views of one tensor, and loading may separate or tie weights.
    """
    groups: dict[Hashable, list[AdaptedLayer]] = {}
    for layer in layers:
        groups.setdefault(_weight_key(layer), []).append(layer)
    for group in groups.values():
        if any(layer.merged_adapters for layer in group) or group[0].merge_state.layers == group:
            continue
        state = Merge(list(group))
        for layer in group:
            layer.merge_state, layer.merged_adapters = state, state.names


def first_owners(layers: Iterable[Layer]) -> list[Layer]:
    """Return one layer for each base weight, the first."""
    return list({id(layer.merge_state): layer for layer in reversed(list(layers))}.values())[::-1]


def _weight_key(layer: AdaptedLayer) -> Hashable:
    weight = getattr(layer.get_base_layer(), "weight", None)
    if not isinstance(weight, torch.Tensor):
        return id(layer)
    view = (weight.storage_offset(), weight.shape, weight.stride()) if _is_plain(weight) else ()
    return _memory(weight), view, layer.fan_in_fan_out


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_meta and tensor.numel() > 0


def _memory(tensor: torch.Tensor) -> Hashable:
    """What two tensors that share memory have in common."""
    return (tensor.device, tensor.untyped_storage().data_ptr()) if _is_plain(tensor) else id(tensor)


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors with the same `_memory` have an element in common."""
    if a is b or not (_is_plain(a) and _is_plain(b)) or a.dtype != b.dtype:
        return True
    ranges = []
    for tensor in (a, b):
        start = tensor.storage_offset()
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        ranges.append((start, start + sum((size - 1) * stride for size, stride in steps) + 1))
    low, high = max(start for start, _ in ranges), min(end for _, end in ranges)
    if low >= high:
        return False
    first = min(start for start, _ in ranges)
    marks = torch.zeros(max(end for _, end in ranges) - first, dtype=torch.bool)
    marks.as_strided(a.shape, a.stride(), a.storage_offset() - first).fill_(True)
    return bool(marks.as_strided(b.shape, b.stride(), b.storage_offset() - first).any())


def check_only_owner(model: nn.Module, layers: Sequence[AdaptedLayer], adapter_names: Sequence[str] | None) -> None:
    """Check that merging adapters into these layers changes nothing else, and that nothing else changes it.

    Args:
        model: The whole model.
        layers: The layers to merge.
        adapter_names: The adapters to merge; the active ones if `None`.

    Raises:
        ValueError: Another module uses the same weight, or another tuner is merged into it or active on it. The
            message names both.
    """
    _check_other_tuners(model, layers, adapter_names)
    users: dict[Hashable, list[tuple[str, nn.Module, torch.Tensor]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                users.setdefault(_memory(tensor), []).append((f"{name}.{key}", module, tensor))
    places = _places(model)
    for layer in first_owners(layers):
        weight = layer.get_base_layer().weight
        same = users.get(_memory(weight), [])
        if len(same) == 1:
            continue
        merging = _merging(layer, adapter_names)
        owners = [each for each in layer.merge_state.layers if all(name in each.svf_delta for name in merging)]
        prefixes = tuple(f"{place}." for owner in owners for place in places.get(id(owner), ()))
        for name, _, tensor in same:
            if not name.startswith(prefixes) and _overlap(weight, tensor):
                raise ValueError(
                    f"{layer.module_name} shares its weight with {name.removesuffix('.weight')}, so merging "
                    f"{_quoted(merging)} would change both. Untie the two, or leave the adapter unmerged."
                )


def _places(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of each module by its id."""
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
    return places


def _check_other_tuners(model: nn.Module, layers: Sequence[AdaptedLayer], adapter_names: Sequence[str] | None) -> None:
    owners = {id(layer.get_base_layer()): layer for layer in layers}
    for kind, names, base_layer in other_adapters(model):
        layer = owners.get(id(base_layer))
        if layer is not None and (merging := _merging(layer, adapter_names)):
            raise ValueError(
                f"Cannot merge {_quoted(merging)} into {layer.module_name}, because {kind} has {_quoted(names)} on the "
                f"same weight. Neither could be unmerged exactly. Delete or unload {_quoted(names)} first."
            )


def check_no_other_tuner(adapter_name: str, config: SVFConfig, model: nn.Module) -> None:
    """Check that a base model is not changed by adapters of another PEFT method, before a saved adapter is attached.

    A new adapter may be trained on top of them, but a saved one was made for the plain base model.

    Raises:
        BaseCheckError: There is one that is active or merged, and `runtime_config.base_check` is `"error"`.
    """
    policy = config.runtime_config.base_check
    kind, names, _ = next(other_adapters(model), ("", [], model))
    if not names or not config.expected_fingerprint or policy == "ignore":
        return
    message = (
        f"Adapter {adapter_name!r} was made for the base model alone, but {kind} adapter {_quoted(names)} is active or "
        f"merged in this model. Delete or unload {_quoted(names)} first."
    )
    if policy == "error":
        raise BaseCheckError(message, 'To use both, pass a config with `SVFRuntimeConfig(base_check="warn")`.')
    warnings.warn(message, stacklevel=3)


def other_adapters(model: nn.Module) -> Iterator[tuple[str, list[str], nn.Module]]:
    """Yield method, names and base layer of each layer of another PEFT method that is active or merged."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and "svf_delta" not in module._modules:
            active = [] if module.disable_adapters else module.active_adapters
            present = module._get_available_adapters()
            if names := list(dict.fromkeys([*module.merged_adapters, *(name for name in active if name in present)])):
                yield type(module).__module__.split(".")[-2], names, module.get_base_layer()


def _merging(layer: AdaptedLayer, adapter_names: Sequence[str] | None) -> list[str]:
    active = layer.active_adapter
    wanted = adapter_names or ([active] if isinstance(active, str) else active)
    return [name for name in wanted if name in layer.svf_delta]


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)


def check_groups(layers: Sequence[AdaptedLayer], group_of: Mapping[str, int]) -> None:
    """Check that layers that share their weight are in the same group of mixture weights, as they share δ.

    Raises:
        ValueError: They are in different groups.
    """
    for layer in layers:
        first = layer.merge_state.layers[0]
        if group_of.get(layer.module_name, 0) != group_of.get(first.module_name, 0):
            raise ValueError(
                f"{first.module_name} and {layer.module_name} share one weight, so they cannot have different mixture "
                "weights. Put them into one group, or use one weight per expert."
            )
