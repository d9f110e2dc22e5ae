"""Packed batches: the tokens of all rows are in one row `[1, tokens, ...]`, as in continuous batching.

Other batches last for one call, while a server adds and removes rows between two steps of the same batch. So δ of each
mixture is computed once, into a slot, and a step only says which slot each token uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Any

import torch

from .batch_layout import Layout
from .layer import SVFLayer, svf_layers
from .rows import RowCall, opened, wrong_length

BASE_SLOT = 0
_WHAT = "the packed rows"


class PackedRows:
    """
    Mixtures in slots, and packed batches of them.

    A slot holds a copy of δ. So a request in flight keeps its mixture while adapters are deleted or loaded anew.

    Args:
        model ([`SVFModel`]): The model. Its own inputs must be packed, `[1, tokens]`.

    Example:

        ```py
        >>> rows = PackedRows(model.base_model)
        >>> math = rows.add({"math": 1.0})
        >>> with rows.opened([math, 0], lengths=[5, 3]):  # 5 tokens of one prompt, 3 of another for the base model
        ...     model.base_model.model(input_ids=eight_tokens, position_ids=..., attention_mask=...)
        ```
    """

    def __init__(self, model: Any) -> None:
        self.model, self._layout = model, Layout(model.model)
        self._changing = Lock()
        self._free: list[int] = []
        self._slots = 1
        self._tables: dict[SVFLayer, _Table] = {}

    @torch.no_grad()
    def add(self, weights: Mapping[str, float]) -> int:
        """
        Put δ = Σ_k weights_k · δ_k into a free slot, and return its index.

        Args:
            weights (`dict[str, float]`): The weight of each adapter. Without any, the slot is `BASE_SLOT`.

        Raises:
            ValueError: An adapter has more than δ, or adapts a module that does not get the packed tokens in order. Or
                it is merged, or its δ is offloaded.
        """
        weights = {name: weight for name, weight in weights.items() if weight != 0}
        if not weights:
            return BASE_SLOT
        self.check(weights)
        with self._changing:
            if not self._free:
                self._free = list(range(self._slots, 2 * self._slots))
                self._slots *= 2
                for table in self._tables.values():
                    table.resize(self._slots, 0)
            slot = self._free.pop()
            output = self.model.model.get_output_embeddings()
            for layer in svf_layers(self.model.model):
                if any(name in layer.svf_delta for name in weights):
                    if layer not in self._tables:
                        self._tables[layer] = _Table(layer.get_base_layer() is getattr(output, "base_layer", output))
                    delta = _mixed(layer, weights)
                    self._tables[layer].resize(self._slots, len(delta), delta)
                    self._tables[layer].put(slot, delta)
        return slot

    def remove(self, slot: int) -> None:
        """Free a slot that no batch uses any more."""
        if slot == BASE_SLOT:
            return
        with self._changing:
            for table in self._tables.values():
                table.clear(slot)
            self._free.append(slot)

    def largest(self, slot: int) -> float:
        """Return the largest |δ| of a slot; NaN or infinity if it is not finite."""
        return max((float(table.values[slot].abs().max()) for table in self._holding(slot)), default=0.0)

    def _holding(self, slot: int) -> list[_Table]:
        return [table for table in self._tables.values() if slot in table.holds]

    def check(self, adapter_names: Iterator[str] | Sequence[str] | Mapping[str, float]) -> None:
        """Check that adapters work in packed batches.

        Raises:
            ValueError: An adapter has more than δ, or adapts a module that does not get the packed tokens in order. Or
                it is merged, or its δ is offloaded.
        """
        for name in adapter_names:
            config = self.model.peft_config[name]
            if config.modules_to_save or config.bias != "none":
                raise ValueError(f"Adapter {name!r} has `modules_to_save` or `bias`, which packed rows cannot share.")
            for layer in svf_layers(self.model.model, name):
                if self._layout.is_routed(layer.module_name):
                    raise ValueError(
                        f"Adapter {name!r} adapts {layer.module_name}, an expert of a mixture of experts. It gets "
                        "selected tokens, so it cannot tell which row they belong to. Train without this module."
                    )
                if layer.merged:
                    raise ValueError("Cannot use packed rows when there are merged adapters. Call `unmerge_adapter`.")
                if layer.delta_weights([name])[0].is_meta:
                    raise ValueError(f"{layer.module_name} is offloaded, so its adapters cannot use packed rows.")

    @contextmanager
    def opened(self, slots: Sequence[int], lengths: Sequence[int], kept: torch.Tensor | None = None) -> Iterator[None]:
        """
        Run a packed batch in this thread: row i has `lengths[i]` tokens, and uses `slots[i]`.

        Args:
            slots (`list[int]`): The slot of each row.
            lengths (`list[int]`): Number of tokens of each row, in the order of the tokens.
            kept (`torch.Tensor`, *optional*): The `logits_to_keep` of the model, if these are indices `[n]`.

        Raises:
            RuntimeError: Another thread has disabled the adapters of the model.
        """
        of_token = torch.tensor(slots).repeat_interleave(torch.tensor(lengths))
        batch = _Batch(of_token, kept, frozenset(slots), tuple(slots) if max(lengths) == 1 else None)
        call = RowCall(self.model, _WHAT, of_token, self._layout)
        # in a batch of the base model, all layers need to know that their active adapters do not count
        call.deltas = {
            layer: _TokenDeltas(batch, layer, self._tables.get(layer)) for layer in svf_layers(self.model.model)
        }
        with opened(call):
            yield


@dataclass
class _Batch:
    """
    Attributes:
        of_token: The slot of each token, `[tokens]`.
        kept: The tokens that the output layer gets, if not all.
        slots: The slots in use.
        repeats: The slots if each row has one token, so that the next batch can be the same; otherwise `None`.
    """

    of_token: torch.Tensor
    kept: torch.Tensor | None
    slots: frozenset[int]
    repeats: tuple[int, ...] | None
    _on: dict[torch.device, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def of_kept(self) -> torch.Tensor:
        assert self.kept is not None
        return self.of_token[self.kept.to("cpu", torch.long)]

    def on(self, device: torch.device) -> torch.Tensor:
        """The slot of each token, on a device."""
        if device not in self._on:
            self._on[device] = self.of_token.to(device)
        return self._on[device]


class _Table:
    """δ of one layer in each slot."""

    def __init__(self, is_output: bool) -> None:
        self.is_output = is_output
        self.values = torch.zeros(0, 0)
        self.holds: set[int] = set()
        self._last: tuple[tuple[int, ...], int, torch.Tensor] | None = None
        self._changes = 0

    def resize(self, slots: int, r: int, like: torch.Tensor | None = None) -> None:
        """Make room. A new tensor replaces a small one, which another thread may be reading."""
        rows, columns = self.values.shape
        if slots > rows or r > columns:
            values = (self.values if like is None else like).new_zeros(max(slots, rows), max(r, columns))
            values[:rows, :columns] = self.values
            self.values = values

    def put(self, slot: int, delta: torch.Tensor) -> None:
        """Write δ `[r]` into an empty slot."""
        self.values[slot, : len(delta)] = delta
        self.holds.add(slot)
        self._changes += 1

    def clear(self, slot: int) -> None:
        """Make a slot empty: δ = 0."""
        if slot in self.holds:
            self.values[slot] = 0
            self.holds.discard(slot)
            self._changes += 1

    def of(self, batch: _Batch) -> torch.Tensor:
        """δ of each token, `[tokens, r]`. It is kept for the next step of decoding, which repeats the same rows."""
        last, changes = self._last, self._changes  # before the values, which other threads change
        if batch.repeats is not None and last is not None and last[:2] == (batch.repeats, changes):
            return last[2]
        deltas = self.values[batch.on(self.values.device)]
        self._last = None if batch.repeats is None else (batch.repeats, changes, deltas)
        return deltas


class _TokenDeltas:
    """δ of each token in one layer during a packed batch; what [`RowDeltas`] is for other batches."""

    same: tuple[str, ...] = ()  # a packed batch is never folded

    def __init__(self, batch: _Batch, layer: SVFLayer, table: _Table | None) -> None:
        self._batch, self._layer, self._table = batch, layer, table

    def __call__(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return δ for an input of all tokens: `[1, tokens, r]`, `[r]` if it is the same one, `None` if it is 0."""
        batch, table = self._batch, self._table
        if table is None or not (batch.slots & table.holds):
            return None
        if len(batch.slots) == 1:
            return table.values[next(iter(batch.slots))]
        if table.is_output and batch.kept is not None:
            deltas = table.values[batch.of_kept.to(table.values.device)]
        else:
            deltas = table.of(batch)
        if x.numel() != len(deltas) * x.shape[-1]:
            raise wrong_length(_WHAT, len(deltas), x.numel() // x.shape[-1], self._layer.module_name)
        return deltas.reshape([*x.shape[:-1], -1])

    def check(self, x: torch.Tensor) -> None:
        """Do nothing: `__call__` checks an input, and a packed batch is never folded."""


def _mixed(layer: SVFLayer, weights: Mapping[str, float]) -> torch.Tensor:
    deltas = {name: layer.svf_delta[name]().detach() for name in weights if name in layer.svf_delta}
    mixed = torch.zeros_like(max(deltas.values(), key=len))
    for name, delta in deltas.items():
        mixed[: len(delta)] += weights[name] * delta
    return mixed
