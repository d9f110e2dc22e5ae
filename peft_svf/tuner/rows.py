"""Mixed batches: each batch row uses its own expert or its own mixture of experts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import count
from threading import Lock, local
from typing import Any, Literal, Union

import torch
from torch.nn.functional import pad

from .batch_layout import Layout
from .fold import Snapshot, can_fold
from .protocol import AdaptedLayer, DeltasOfRows

BASE = "__base__"  # PEFT's name for the base model in `adapter_names`

Groups = Union[Literal["module", "layer"], Mapping[str, int]]


@dataclass
class RowCall:
    """
    A mixed batch of one call of a model. It belongs to the thread that makes the call, so others do not see it.

    Attributes:
        model: The [`SVFModel`].
        what (`str`): Name of the argument that the rows were given by, for messages.
        weights (`torch.Tensor`): `[rows, ...]`, what δ the rows have; of equal rows it does not matter which is which.
        layout ([`Layout`]): Where the rows are in the inputs of the layers.
        expansion (`int`): How many rows `generate` makes of one, for beams or returned sequences.
        tokens (`set[int]`): Lengths of the model's current inputs.
        deltas: The δ of the rows in each layer.
        only_base (`bool`): Whether all rows use the base model. Then the adapters may be disabled.
        ended (`bool`): Whether the call is over.
    """

    model: Any
    what: str
    weights: torch.Tensor
    layout: Layout
    expansion: int = 1
    tokens: set[int] = field(default_factory=set)
    deltas: dict[Any, DeltasOfRows] = field(default_factory=dict)
    only_base: bool = False
    ended: bool = False
    _token_ids: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.weights)

    def check_inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, expanded: bool) -> None:
        """Compare the number of rows with that of a model's inputs, which may have unknown names.

        Args:
            args: The inputs.
            kwargs: More inputs.
            expanded (`bool`): Whether `generate` may have repeated the rows.

        Raises:
            ValueError: No input has an allowed number of rows.
        """
        rows = batch_size(args, kwargs)
        found = list(_lengths(kwargs.values())) if rows is None else [rows]
        if found and not set(found) & {self.rows, self.rows * (self.expansion if expanded else 1)}:
            raise wrong_length(self.what, self.rows, found[0])
        inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.ndim > 1]
        self.tokens = {t.shape[1] for t in inputs}
        given = kwargs.get("input_ids", args[0] if args else None)
        is_ids = isinstance(given, torch.Tensor) and given.ndim == 2 and not given.is_floating_point()
        self._token_ids = given if is_ids else None

    def check_layer(self, module_name: str, shape: Sequence[int]) -> int:
        """Return the number of rows of the input of a layer; 1 if all its tokens have the same δ.

        Raises:
            ValueError: The number is another one, or the rows could be something else.
        """
        found, allowed = (1 if len(shape) == 1 else shape[0]), (self.rows, self.rows * self.expansion)
        of_text = self.layout.is_of_text(module_name)
        if len(shape) == 2 and self.layout.is_routed(module_name):
            if not self._alike():
                raise ValueError(
                    f"{module_name} is an expert of a mixture of experts. It gets selected tokens, so it cannot tell "
                    f"which row of {self.what} they belong to. Pass rows with the same adapter, or leave the module "
                    "out of `target_modules`."
                )
            return 1  # δ is the same for all tokens
        if found not in allowed:
            flattened = len(shape) == 2 and any(found in (n * t for n in allowed) for t in self.tokens)
            if self.rows == 0 or not (flattened and of_text):
                raise wrong_length(self.what, self.rows, found, module_name)
        elif len(shape) > 2 and shape[1] in allowed and not (self.layout.has_rows_first(module_name) or self._alike()):
            raise ValueError(
                f"{module_name} got an input of shape {list(shape)}, where {self.what} could belong to the first or to "
                "the second dimension. Use another number of rows, or pad the inputs to another length."
            )
        if not of_text and not (self.layout.has_equal_rows(self._token_ids) or self._alike()):
            raise ValueError(
                f"{module_name} works on images or audio, of which each row must have the same number for {self.what}. "
                "Pass rows with the same adapter, or leave the module out of `target_modules`."
            )
        return found

    def _alike(self) -> bool:
        return bool((self.weights == self.weights[:1]).all())


_calls: ContextVar[tuple[RowCall, ...]] = ContextVar("peft_svf_row_calls", default=())
_opening = Lock()


@contextmanager
def opened(call: RowCall) -> Iterator[None]:
    """Run the layers of a call with the δ of its rows, in this thread only.

    Raises:
        RuntimeError: Another thread has disabled the adapters of the model, which a row needs.
    """
    modules = [call.model, *call.deltas]
    with _opening:
        if _is_disabled_elsewhere(call.model) and not call.only_base:
            raise _disabled(call.what)
        call.model.expert_calls += not call.only_base
        for module in modules:
            module.open_calls += 1
    token = _calls.set((call, *_calls.get()))
    try:
        yield
    finally:
        _calls.reset(token)
        call.ended = True
        with _opening:
            call.model.expert_calls -= not call.only_base
            for module in modules:
                module.open_calls -= 1


def check_may_disable(model: Any) -> None:
    """Remember that this thread disables the adapters of a model.

    Raises:
        RuntimeError: Another thread runs a mixed batch, which would go on with the base model. Or it has disabled the
            adapters itself, and would enable them while this thread still needs the base model.
    """
    own = open_call(model)
    with _opening:
        if model.expert_calls > (own is not None and not own.only_base):
            raise _cannot_disable("runs a mixed batch")
        if _is_disabled_elsewhere(model):
            raise _cannot_disable("has disabled them and may enable them again")
        model.disabled_by = _thread.number


def uses_rows(model: Any, adapter_names: Sequence[str] | None) -> bool:
    """Return whether the rows of a call count, although PEFT ignores `adapter_names` while the adapters are disabled.

    In the thread that has disabled them, all rows use the base model, as PEFT does it.

    Raises:
        RuntimeError: A row names an expert, and another thread has disabled the adapters.
    """
    if model.disabled_by is None:
        return True
    if adapter_names is None or not _is_disabled_elsewhere(model):
        return False
    if any(name != BASE for name in adapter_names):
        raise _disabled("`adapter_names`")
    return True


class _Thread(local):
    """A number for this thread. Unlike an identifier of Python, no later thread gets it again."""

    def __init__(self) -> None:
        self.number = next(_numbers)


_numbers = count()
_thread = _Thread()


def _is_disabled_elsewhere(model: Any) -> bool:
    return model.disabled_by is not None and model.disabled_by != _thread.number


def _cannot_disable(why: str) -> RuntimeError:
    return RuntimeError(
        f"The adapters of this model cannot be disabled: another thread {why}. For batches of the base model, pass "
        '`adapter_names=["__base__", ...]` instead.'
    )


def _disabled(what: str) -> RuntimeError:
    return RuntimeError(
        f"Another thread has disabled the adapters of this model, so {what} would have no effect. Enable them first. "
        'For batches of the base model, pass `adapter_names=["__base__", ...]` instead.'
    )


def open_call(model: Any) -> RowCall | None:
    """Return the mixed batch that this thread runs in a model, if any."""
    if not model.open_calls:  # torch.compile cannot trace a context variable
        return None
    return next((call for call in _open_calls() if call.model is model), None)


def _open_calls() -> Iterator[RowCall]:
    """Yield the mixed batches of this thread. Tasks of asyncio can also have inherited some that have ended."""
    return (call for call in _calls.get() if not call.ended)


def row_deltas(layer: Any) -> DeltasOfRows | None:
    """Return the δ of the rows in a layer, if this thread runs a mixed batch in it. Slow if no thread does.

    Raises:
        RuntimeError: The layer is a replica of `nn.DataParallel`, which splits the batch between threads.
    """
    if "_is_replica" in layer.__dict__:
        raise RuntimeError(f"{layer.module_name} is in an `nn.DataParallel`, which cannot run mixed batches.")
    return next((call.deltas[layer] for call in _open_calls() if layer in call.deltas), None)


class RowDeltas:
    """δ of every batch row in one layer: `Σ_k α_k δ_k`.

    Args:
        call ([`RowCall`]): The mixed batch.
        layer ([`AdaptedLayer`]): The layer.
        names (`list[str]`): The experts.
        weights (`torch.Tensor`): α, `[rows, experts]`. Or the integer index of one expert per row, `[rows]`, where the
            number of experts stands for the base model.

    Attributes:
        same (`tuple[str, ...]`): The expert if all rows use the same one and the layer has it, so that the layer may
            fold; otherwise empty.
    """

    def __init__(self, call: RowCall, layer: AdaptedLayer, names: Sequence[str], weights: torch.Tensor) -> None:
        self._call, self._layer, self._names, self._weights = call, layer, names, weights
        one = len(names) == 1 and names[0] in layer.svf_delta and not weights.is_floating_point() and not weights.any()
        self.same = tuple(names) if one else ()
        self._last: torch.Tensor | None = None  # δ of the last call, which decoding repeats
        self._made_of: tuple[Snapshot, int, torch.Tensor] | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return δ `[rows, 1, ..., r]` for an input `[rows, ..., in]`; `None` if the layer has none of the experts.

        The input has one row per row of the weights, or as many as `generate` makes of them. An input of two dimensions
        may be a batch with its tokens flattened.

        Raises:
            ValueError: The input has another number of rows, or its rows could be something else.
        """
        rows, given = self.check(x), self._call.rows
        present = tuple(name for name in self._names if name in self._layer.svf_delta)
        if not present:
            return None
        deltas = self._last if self._is_current(rows) else None
        if deltas is None:
            deltas = self._deltas(max(rows // given, 1))[:rows]
            self._remember(deltas, present)
        return deltas.reshape([rows, *[1] * (x.ndim - 2), -1] if x.ndim > 1 else [-1])

    def check(self, x: torch.Tensor) -> int:
        """Return the number of rows of an input.

        Raises:
            ValueError: The number differs from that of the weights, or its rows could be something else.
        """
        return self._call.check_layer(self._layer.module_name, x.shape)

    def _deltas(self, repeats: int) -> torch.Tensor:
        choices = not self._weights.is_floating_point()
        # not earlier: FSDP and offload have δ in place only while the layer runs
        deltas = {name: self._layer.svf_delta[name]() for name in self._names if name in self._layer.svf_delta}
        zeros = torch.zeros_like(max(deltas.values(), key=len))
        missing = zeros[:0]
        each = [_widened(deltas.get(name, missing), len(zeros)) for name in self._names]
        stacked = torch.stack([*each, zeros] if choices else each)
        weights = self._weights.to(stacked.device).repeat_interleave(repeats, dim=0)
        with torch.autocast(stacked.device.type, enabled=False):
            return stacked[weights] if choices else weights.to(stacked.dtype) @ stacked

    def _remember(self, deltas: torch.Tensor, present: tuple[str, ...]) -> None:
        # keep nothing that belongs to a graph or could change undetected
        if torch.is_grad_enabled() or self._weights.is_inference() or not can_fold(self._layer, present):
            self._last = self._made_of = None
            return
        made_of = Snapshot(self._layer, present), self._weights._version, self._weights.detach().clone()
        self._last, self._made_of = deltas, made_of

    def _is_current(self, rows: int) -> bool:
        if self._made_of is None or self._last is None or len(self._last) != rows or torch.is_grad_enabled():
            return False
        snapshot, version, weights = self._made_of
        if self._weights._version != version or not snapshot.holds():
            return False
        return self._weights.device.type != "cpu" or torch.equal(self._weights, weights)


def wrong_length(what: str, given: int, rows: int, module_name: str | None = None) -> ValueError:
    """The error for a wrong number of rows, in PEFT's words; with a name, for the input of a layer."""
    message = f"Length of {what} should be the same as the number of inputs, but got {given} and {rows} respectively."
    if module_name is not None:
        message += f" {module_name} got {rows}. Leave the module out of `target_modules`, or run one batch per adapter."
    return ValueError(message)


def _widened(delta: torch.Tensor, r: int) -> torch.Tensor:
    return delta if len(delta) == r else pad(delta, (0, r - len(delta)))


def names_and_index(adapter_names: Sequence[str]) -> tuple[list[str], torch.Tensor]:
    """Return the distinct adapters, and for each row the index of its adapter; the base model has the last index."""
    names = sorted(set(adapter_names) - {BASE})
    places = {name: i for i, name in enumerate([*names, BASE])}
    return names, torch.tensor([places[name] for name in adapter_names], dtype=torch.long)


def checked_weights(weights: Any, experts: int, groups: int | None) -> torch.Tensor:
    """Return mixture weights as a tensor `[rows, experts, groups]`, with one group if `groups` is `None`.

    Raises:
        ValueError: The shape is wrong, there are no rows, or a value is not finite.
    """
    weights = torch.as_tensor(weights)
    wanted = f"[rows, {experts}]" if groups is None else f"[rows, {experts}, {groups}]"
    shape = list(weights.shape)
    if shape[1:] != ([experts] if groups is None else [experts, groups]) or shape[0] == 0:
        raise ValueError(
            f"Mixture weights for {experts} adapters must have the shape {wanted}, got {shape}."
            + (" A third dimension needs `groups`." if groups is None and len(shape) == 3 else "")
        )
    if not weights.is_floating_point():
        weights = weights.float()
    if not torch.isfinite(weights).all():
        row, *_ = (~torch.isfinite(weights)).nonzero()[0].tolist()
        raise ValueError(f"The mixture weights of row {row} are not finite: {weights[row].tolist()}.")
    return weights if groups is not None else weights.unsqueeze(-1)


def group_of_each(groups: Groups, modules: Sequence[str]) -> dict[str, int]:
    """Return the group of each module: one per module (`"module"`), one per block (`"layer"`), or as given.

    Raises:
        ValueError: The given mapping lacks a module, or a group is not an index.
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


# not every input of a model has the batch as its first dimension
_BATCHED = ("input_ids", "inputs", "inputs_embeds", "input_features", "input_values", "attention_mask")


def batch_size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """Return the number of rows of a model's inputs, or `None` if it cannot be told."""
    return next(_lengths([*args[:1], *(kwargs.get(key) for key in _BATCHED)]), None)


def _lengths(values: Iterable[Any]) -> Iterator[int]:
    return (len(value) for value in values if isinstance(value, torch.Tensor) and value.ndim)


def expansion_of(kwargs: Mapping[str, Any], default: Any) -> int:
    """Return how many rows `generate` makes of one, from its arguments and the model's generation config."""

    def number(key: str) -> int:
        sources = (kwargs.get(key), getattr(kwargs.get("generation_config"), key, None), getattr(default, key, None))
        return next((int(value) for value in sources if value is not None), 1)

    return max(number("num_beams"), number("num_return_sequences"))


def names_hook(call: RowCall, adapter_names: Sequence[str]) -> Callable[..., tuple[Any, Any] | None]:
    """Return a forward pre-hook that passes the adapter of each row to PEFT's own wrappers (`modules_to_save`)."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> tuple[Any, Any] | None:
        # other threads call it, too: without `kwargs` while it is being removed
        if kwargs is None or open_call(call.model) is not call:
            return None
        rows = batch_size(args, kwargs) or len(adapter_names)
        repeats = rows // len(adapter_names) if rows % len(adapter_names) == 0 else 1
        known = [name if name in module._adapters else BASE for name in adapter_names]
        return args, {**kwargs, "adapter_names": [name for name in known for _ in range(repeats)]}

    return hook
