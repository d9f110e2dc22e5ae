"""Decide when a layer stores its effective weight `W(z)`, and for how long.

The gate costs a little for every token, folding costs a lot once. The number of future tokens is unknown. So a layer
uses the gate until it has cost as much as folding, and then folds. This ski-rental rule costs at most twice the best
choice in hindsight. `generate` says how many calls it is going to make, and they count from the beginning. The folded
weight is valid until δ, the base weight, the set of active adapters, the dtype or the
device changes.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from copy import copy
from functools import cache
from typing import Any, cast

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.pytorch_utils import Conv1D

from ..spectral.arithmetic import fold_cost, gate_cost, products_cost
from ..spectral.function import invertible
from .forecast import present_forecast
from .parameters import BASIS_NAME, Delta
from .protocol import AdaptedLayer

# In 16 bit, W + ΔW rounds small changes away. The gate is used if less than this fraction of ΔW would survive.
SMALLEST_FRACTION = 0.98

_optimizer_steps = 0


@cache  # once per process
def _count_optimizer_steps() -> None:
    """Start counting the steps of all torch optimizers. Not done at import, which must not affect the process."""

    def count(*_: Any) -> None:
        global _optimizer_steps
        _optimizer_steps += 1

    register_optimizer_step_post_hook(count)


class Snapshot:
    """The tensors that a result was computed from, to detect whether they have changed since.

    Compared by identity, storage and version. δ on the CPU is also compared by value, because fused optimizers and
    writes through `.data` change no version. On other devices, comparing values would wait for the device. There it is
    done only after an optimizer step or a call of [`doubt`].
    """

    def __init__(self, layer: AdaptedLayer, names: tuple[str, ...]) -> None:
        _count_optimizer_steps()
        base_layer, deltas = layer.get_base_layer(), {name: layer.svf_delta[name] for name in names}
        # read from the modules' own dictionaries: attribute access is several times slower, and this runs in every call
        self._modules = [(layer._modules, "base_layer", base_layer)]
        self._modules += [(layer.svf_delta._modules, name, delta) for name, delta in deltas.items()]
        owners = [(base_layer, "weight"), (layer, BASIS_NAME), *((delta, "weight") for delta in deltas.values())]
        tensors = [(owner._parameters, key, owner._parameters[key]) for owner, key in owners]
        self._tensors = [(owner, key, weakref.ref(t), t.data_ptr(), t._version) for owner, key, t in tensors]
        self._values = [(owner, t.detach().clone()) for owner, _, t in tensors[2:]]
        self.dtype, self.device_type = base_layer.weight.dtype, base_layer.weight.device.type
        self._doubted, self._steps = False, _optimizer_steps

    def is_of(self, layer: AdaptedLayer) -> bool:
        """Whether it is of this layer. False for replicas of `nn.DataParallel`, which share the layer's attributes."""
        return self._modules[0][0] is layer._modules

    def doubt(self) -> None:
        """Compare the values of δ the next time, as they may be written through `.data` after this call."""
        self._doubted = True

    def holds(self) -> bool:
        """Whether W(z) of these adapters would still be computed from the same values."""
        for modules, name, module in self._modules:
            if modules.get(name) is not module:
                return False
        for parameters, name, reference, pointer, version in self._tensors:
            tensor = reference()
            if tensor is None or parameters.get(name) is not tensor:
                return False
            if tensor._version != version or tensor.data_ptr() != pointer:
                return False
        if self.device_type == "cpu" or self._doubted or self._steps != _optimizer_steps:
            self._doubted = not all(torch.equal(parameters["weight"], value) for parameters, value in self._values)
            self._steps = _optimizer_steps
        return not self._doubted


class _Folding:
    """The folded weight for one value of δ of these adapters, and what folding it depends on.

    All of it is replaced at once. So another thread that uses other adapters never sees a weight under wrong names.
    """

    def __init__(self, layer: AdaptedLayer, names: tuple[str, ...], dtype: torch.dtype, spent_before: int) -> None:
        self.weight: torch.Tensor | None = None  # W(z), `[out, in]`
        self.names, self.dtype, self.snapshot = names, dtype, Snapshot(layer, names)
        self.active = copy(layer.active_adapter) if layer.rows is None else None  # None for a mixed batch
        modules = [layer.get_base_layer(), *(layer.svf_delta[name] for name in names)]
        # with a hook, calling the base layer is more than a multiplication
        self.hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self.spent = 0  # cost of the gate for this value of δ, had it been used for all tokens
        self.spent_before = spent_before  # the same for the value before this one
        self.exact_enough: bool | None = None

    def is_current(self, names: tuple[str, ...], dtype: torch.dtype) -> bool:
        return self.names == names and self.dtype == dtype and self.snapshot.holds()

    def is_exact_enough(self, layer: AdaptedLayer) -> bool:
        """Whether enough of ΔW survives rounding to the compute dtype."""
        if self.exact_enough is None:
            self.exact_enough = (
                self.dtype.itemsize > 2
                or layer.surviving_fraction(layer.summed_delta(self.names), self.dtype) >= SMALLEST_FRACTION
            )
        return self.exact_enough


class Fold:
    """The folded weight of one layer and its bookkeeping. Copies and pickles are empty.

    Several threads may use it at once. Each reads the present state once and changes only that.
    """

    def __init__(self) -> None:
        self.forget()

    def __reduce__(self) -> tuple[Any, ...]:
        return Fold, ()

    def forget(self) -> None:
        """Reset to the state of a new layer: free the folded weight and all bookkeeping."""
        self._state: _Folding | None = None
        self._changed_in_place: bool | None = None  # whether the model overwrites the layer's output; None: unknown
        self._decisions: dict[tuple[tuple[str, ...], bool], tuple[torch.dtype, Snapshot, bool]] = {}

    @property
    def weight(self) -> torch.Tensor | None:
        """W(z), `[out, in]`, possibly out of date; `None` if the layer is not folded."""
        return None if self._state is None else self._state.weight

    def release(self) -> None:
        """Free the folded weight and restart the count of its cost."""
        self._state = None

    def peek(self, layer: AdaptedLayer, names: tuple[str, ...]) -> torch.Tensor | None:
        """Return the folded weight for these adapters in the dtype of the base weight, if it is up to date."""
        state = self._state
        if state is None or state.weight is None or state.weight.dtype != layer.get_base_layer().weight.dtype:
            return None
        state.snapshot.doubt()
        return state.weight if can_fold(layer, names) and state.is_current(names, state.weight.dtype) else None

    def ready(self, layer: AdaptedLayer, names: tuple[str, ...] | None = None) -> torch.Tensor | None:
        """Return what `find` would return if there is a folded weight and no gradient is needed, else `None`.

        For the active adapters, or for `names` in a mixed batch.

        Decoding calls it for every layer and token, so it must take a fraction of the time of `find`.
        """
        state = self._state
        if (
            state is None
            or (weight := state.weight) is None
            or torch.is_grad_enabled()
            or (layer.active_adapter != state.active if names is None else names != state.names)
            or any(state.hooks)
            or not _is_eager()
            or not state.snapshot.is_of(layer)
            or not state.snapshot.holds()
            or _policy(layer, state.names) == "never"
            or _compute_dtype(state.snapshot.dtype, state.snapshot.device_type) != state.dtype
        ):
            return None
        return weight

    def find(self, layer: AdaptedLayer, names: tuple[str, ...], x: torch.Tensor) -> torch.Tensor | None:
        """Return the folded weight of a layer for these adapters if this input should use it, else `None`."""
        policy = _policy(layer, names)
        if policy == "never" or not can_fold(layer, names):
            self.release()
            return None
        weight = layer.get_base_layer().weight
        dtype = _compute_dtype(weight.dtype, weight.device.type)
        state = self._state
        if state is None or not state.is_current(names, dtype):
            state = self._restart(layer, names, dtype)

        k, tokens = min(layer.shape), x.numel() // layer.in_features
        deltas = layer.delta_weights(names)
        r = max(len(delta) for delta in deltas)
        training = torch.is_grad_enabled() and any(delta.requires_grad for delta in deltas)
        state.spent += gate_cost(k, r, tokens)
        if training:  # backward uses the gate, too, and computes the gradient of δ on the way
            state.spent += max(0, gate_cost(k, r, tokens) - products_cost(k, r, tokens, dtype))
        cost = 0 if policy == "always" else fold_cost(*layer.shape, r)
        if training or (torch.is_grad_enabled() and x.requires_grad):
            state, fold = self._decided(layer, state, cost, training)
            if not fold:
                if training:
                    state.weight = None  # out of date after the next step, and training is short of memory
                return None
        elif state.weight is None and (state.spent + self._cost_ahead(k, r) < cost or not state.is_exact_enough(layer)):
            return None
        folded = state.weight
        if folded is None:
            with torch.inference_mode(False), torch.no_grad():  # training cannot use a tensor made in inference mode
                folded = state.weight = layer.effective_weight(layer.summed_delta(names)).to(dtype)
        return folded

    def _cost_ahead(self, k: int, r: int) -> int:
        """Return what the gate is going to cost in the rest of this `generate`; 0 after its first call."""
        forecast = present_forecast()
        if forecast is None or self in forecast.counted:
            return 0
        forecast.counted.add(self)
        return forecast.calls * gate_cost(k, r, forecast.tokens)

    def _restart(self, layer: AdaptedLayer, names: tuple[str, ...], dtype: torch.dtype) -> _Folding:
        self._state = state = _Folding(layer, names, dtype, 0 if self._state is None else self._state.spent)
        return state

    def _decided(self, layer: AdaptedLayer, state: _Folding, cost: int, training: bool) -> tuple[_Folding, bool]:
        """Return the present state, and whether to fold if a backward follows, in which δ gets a gradient (`training`)
        or only the input does.

        Decided at the first such call for a value of δ and kept for all others. A later decision could make the
        recomputation of an activation checkpoint differ from the first computation. The use of the previous value of δ
        predicts the use of this one.
        """
        dtype, snapshot, fold = self._decisions.get((state.names, training), (None, None, False))
        if snapshot is None or dtype != state.dtype or not (snapshot is state.snapshot or snapshot.holds()):
            state.snapshot.doubt()
            if not state.snapshot.holds():
                state = self._restart(layer, state.names, state.dtype)
            snapshot = state.snapshot
            worth = state.weight is not None or max(state.spent, state.spent_before) >= cost
            fold = worth and state.is_exact_enough(layer)
            if training:
                fold = fold and self._may_keep_output(layer) and invertible(layer.summed_delta(state.names))
            self._decisions[state.names, training] = state.dtype, snapshot, fold
        snapshot.doubt()
        state.snapshot.doubt()
        return state, fold

    def _may_keep_output(self, layer: AdaptedLayer) -> bool:
        return layer.side == "input" or self._changed_in_place is False

    def watch(self, output: torch.Tensor) -> None:
        """Find out, once, whether the model changes the layer's output in place, as `nn.ReLU(inplace=True)` does.

        If so, a layer with its gate on the output cannot fold in training, as its backward needs the output.
        """
        if self._changed_in_place is not None or self._state is None or not output.requires_grad:
            return
        same, version = output.detach(), output._version  # shares the version counter
        same.data = same.new_empty(0)  # but no longer the memory

        def look(gradient: torch.Tensor) -> None:
            self._changed_in_place = bool(self._changed_in_place) or same._version != version

        output.register_hook(look)


def _policy(layer: AdaptedLayer, names: tuple[str, ...]) -> str:
    choices = {layer.svf_config[name].runtime_config.fold for name in names}
    return "never" if "never" in choices else "always" if "always" in choices else "auto"


def _compute_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype in which a base layer with weights of this dtype computes, autocast included."""
    if not torch.is_autocast_enabled(device_type) or dtype == torch.float64:
        return dtype
    return torch.get_autocast_dtype(device_type)


def _is_eager() -> bool:
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack())


def can_fold(layer: AdaptedLayer, names: tuple[str, ...]) -> bool:
    """Whether the layer may fold: it owns plain tensors with versions, and its base layer only multiplies.

    False under `torch.compile`, functorch, FSDP, ZeRO-3, tensor parallelism and offload, and with hooks.
    """
    if not _is_eager():
        return False
    base_layer = layer.get_base_layer()
    if base_layer is not layer.base_layer or not _is_untouched(base_layer, (nn.Linear, Conv1D)):
        return False
    weight = cast(torch.Tensor, base_layer.weight)
    if not _is_plain(weight) or weight.numel() != layer.in_features * layer.out_features:
        return False
    if weight.requires_grad and torch.is_grad_enabled():
        return False
    if layer.basis is None or not _is_plain(layer.basis):
        return False
    return has_plain_deltas(layer, names)


def has_plain_deltas(layer: AdaptedLayer, names: Sequence[str]) -> bool:
    """Whether the layer itself owns δ of these adapters, so that their versions are reliable."""
    # in this order, as FSDP1 wraps δ
    return all(_is_untouched(layer.svf_delta[name], (Delta,)) for name in names) and all(
        map(_is_plain, layer.delta_weights(names))
    )


def _is_untouched(module: nn.Module, classes: tuple[type[nn.Module], ...]) -> bool:
    return (
        type(module) in classes
        and module._parameters.get("weight") is not None  # replicas of nn.DataParallel have none
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in module.__dict__  # accelerate's offload
        and not module._state_dict_pre_hooks  # FSDP2, whose parameters exist only at times
    )


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in (torch.Tensor, nn.Parameter)
        and not tensor.is_meta
        and not tensor.is_inference()
        and tensor.is_floating_point()
        and not hasattr(tensor, "ds_id")  # ZeRO-3
    )
