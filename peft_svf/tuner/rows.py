"""Mixed batches: each row of a batch uses an expert, or a mixture of experts, of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Union

import torch
from torch.nn.functional import pad

if TYPE_CHECKING:
    from .layer import SVFLayer

BASE = "__base__"  # PEFT's name for the base model in `adapter_names`

Groups = Union[Literal["module", "layer"], Mapping[str, int]]


class RowDeltas:
    """δ of every row in one layer: `Σ_k α_k δ_k`.

    Args:
        layer ([`SVFLayer`]): The layer.
        names (`list[str]`): The experts.
        weights (`torch.Tensor`): α, `[rows, experts]`; or the index of one expert for each row, `[rows]`, in integers,
            where the number of experts stands for the base model.
    """

    def __init__(self, layer: SVFLayer, names: Sequence[str], weights: torch.Tensor) -> None:
        self._layer, self._names, self._weights = layer, names, weights
        self._stacked: torch.Tensor | None = None
        self._last: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self._weights)

    def __call__(self, rows: int) -> torch.Tensor | None:
        """δ `[rows, r]` for a batch of so many rows; `None` if the layer has none of the experts.

        As many rows as weights were given for, or a multiple, each standing for several consecutive ones: beams,
        returned sequences, or tokens where a layer is called with the batch flattened.

        Raises:
            ValueError: Any other number.
        """
        if self._last is not None and len(self._last) == rows:
            return self._last
        if len(self) == 0 or rows % len(self):
            raise ValueError(
                f"{self._layer.module_name} was called with {rows} rows, but adapters were given for {len(self)}. Pass "
                "one entry for each row of the batch."
            )
        if not any(name in self._layer.svf_delta for name in self._names):
            return None
        # only now, as FSDP and offload have δ here only while the layer runs
        if self._stacked is None:
            self._stacked = _stack(self._layer, self._names, base=not self._weights.is_floating_point())
        weights = self._weights.to(self._stacked.device).repeat_interleave(rows // len(self), dim=0)
        if weights.is_floating_point():
            deltas = weights.to(self._stacked.dtype) @ self._stacked
        else:
            deltas = self._stacked[weights]
        if not deltas.requires_grad:
            self._last = deltas
        return deltas


def _stack(layer: SVFLayer, names: Sequence[str], base: bool) -> torch.Tensor:
    """The δ of all experts `[experts, widest r]`, zeros for those that the layer lacks, and for the base at the end."""
    deltas = {name: layer.svf_delta[name]() for name in names if name in layer.svf_delta}
    widest = max(deltas.values(), key=len)
    zeros = torch.zeros_like(widest)
    rows = [pad(deltas[name], (0, len(widest) - len(deltas[name]))) if name in deltas else zeros for name in names]
    return torch.stack([*rows, zeros] if base else rows)


def names_and_index(adapter_names: Sequence[str]) -> tuple[list[str], torch.Tensor]:
    """The distinct adapters, and for each row the index of its own; the base model has the last."""
    names = sorted(set(adapter_names) - {BASE})
    places = {name: i for i, name in enumerate([*names, BASE])}
    return names, torch.tensor([places[name] for name in adapter_names], dtype=torch.long)


def checked_weights(weights: Any, experts: int, groups: int | None) -> torch.Tensor:
    """Mixture weights as a tensor `[rows, experts, groups]`, with one group if `groups` is `None`.

    Raises:
        ValueError: Another shape, no rows, or values that are not finite.
    """
    weights = torch.as_tensor(weights)
    wanted = f"[rows, {experts}]" if groups is None else f"[rows, {experts}, {groups}]"
    shape = list(weights.shape)
    if shape[1:] != ([experts] if groups is None else [experts, groups]) or shape[0] == 0:
        raise ValueError(
            f"Mixture weights for {experts} adapters must have the shape {wanted}, got {shape}."
            + (" Weights with a third dimension need `groups`." if groups is None and len(shape) == 3 else "")
        )
    if not weights.is_floating_point():
        weights = weights.float()
    if not torch.isfinite(weights).all():
        row, *_ = (~torch.isfinite(weights)).nonzero()[0].tolist()
        raise ValueError(f"The mixture weights of row {row} are not finite: {weights[row].tolist()}.")
    return weights if groups is not None else weights.unsqueeze(-1)


def group_of_each(groups: Groups, modules: Sequence[str]) -> dict[str, int]:
    """The group of each module: its own (`"module"`), its block's (`"layer"`), or as given.

    Raises:
        ValueError: A given mapping that leaves a module out, or a group that is no index.
    """
    if groups == "module":
        return {name: i for i, name in enumerate(modules)}
    if groups == "layer":
        blocks = [re.sub(r"(\.\d+)\..*", r"\1", f".{name}") for name in modules]
        places = {block: i for i, block in enumerate(dict.fromkeys(blocks))}
        return {name: places[block] for name, block in zip(modules, blocks, strict=True)}
    if not isinstance(groups, Mapping):
        raise ValueError(f"`groups` must be 'module', 'layer' or a mapping from module names, got {groups!r}.")
    if missing := [name for name in modules if name not in groups]:
        raise ValueError(f"`groups` has no entry for {len(missing)} adapted modules, the first is {missing[0]!r}.")
    if wrong := [name for name in modules if not isinstance(groups[name], int) or groups[name] < 0]:
        raise ValueError(f"`groups` must hold indices, got {groups[wrong[0]]!r} for {wrong[0]!r}.")
    return {name: groups[name] for name in modules}


# In this order: what a model is given may hold several tensors, and not every one has the batch in front.
_BATCHED = ("input_ids", "inputs", "inputs_embeds", "input_features", "input_values", "pixel_values", "attention_mask")


def batch_size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """Rows of a model's inputs; `None` if they do not tell."""
    candidates = [*args[:1], *(kwargs.get(key) for key in _BATCHED), *kwargs.values()]
    return next((len(value) for value in candidates if isinstance(value, torch.Tensor) and value.ndim), None)


def names_hook(adapter_names: Sequence[str]) -> Callable[..., tuple[Any, Any]]:
    """A forward pre-hook that tells PEFT's own wrappers (`modules_to_save`) the adapter of each row."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        rows = batch_size(args, kwargs) or len(adapter_names)
        repeats = rows // len(adapter_names) if rows % len(adapter_names) == 0 else 1
        return args, {**kwargs, "adapter_names": [name for name in adapter_names for _ in range(repeats)]}

    return hook
