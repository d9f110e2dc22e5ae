"""When a layer keeps its effective weight `W(z)`, and how long.

The gate costs a little with every token, folding costs a lot once. Without knowing how many tokens will come, a layer
uses the gate until that has cost as much as folding would have, and folds then: the ski-rental rule, never worse than
twice the best choice in hindsight. What it folded is used until δ, the base weight, the set of active adapters, the
dtype or the device changes.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.pytorch_utils import Conv1D

from ..spectral.arithmetic import fold_cost, gate_cost, products_cost
from ..spectral.function import invertible
from .parameters import BASIS_NAME, Delta

if TYPE_CHECKING:
    from .layer import SVFLayer

# In 16 bit, W + ΔW rounds small changes away. Where less than this share of ΔW would be left, the gate is used.
SMALLEST_SHARE = 0.98


_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


class Snapshot:
    """Recognises whether tensors are still the ones they were, and hold what they held.

    By identity, storage and version, and δ on the CPU by value, too: fused optimizers, and everything that writes
    through `.data`, leave no version. On other devices a comparison of values would wait for the device, so it is made
    only after an optimizer step or when [`doubt`] asked for it.
    """

    def __init__(self, layer: SVFLayer, names: tuple[str, ...]) -> None:
        base_layer, deltas = layer.get_base_layer(), {name: layer.svf_delta[name] for name in names}
        # looked up in the modules' own dictionaries, as attributes cost several times more, and this runs in every call
        self._modules = [(layer._modules, "base_layer", base_layer)]
        self._modules += [(layer.svf_delta._modules, name, delta) for name, delta in deltas.items()]
        owners = [(base_layer, "weight"), (layer, BASIS_NAME), *((delta, "weight") for delta in deltas.values())]
        tensors = [(owner._parameters, key, owner._parameters[key]) for owner, key in owners]
        self._tensors = [(owner, key, weakref.ref(t), t.data_ptr(), t._version) for owner, key, t in tensors]
        self._values = [(owner, t.detach().clone()) for owner, _, t in tensors[2:]]
        self.dtype, self.device_type = base_layer.weight.dtype, base_layer.weight.device.type
        self._doubted, self._steps = False, _optimizer_steps

    def is_of(self, layer: SVFLayer) -> bool:
        """Not so for the replicas of `nn.DataParallel`, which share the attributes of the layer."""
        return self._modules[0][0] is layer._modules

    def doubt(self) -> None:
        """δ may be written through `.data` after this: compare its values the next time."""
        self._doubted = True

    def holds(self) -> bool:
        """Whether W(z) of these adapters would still be made of the same."""
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


class Fold:
    """The folded weight of one layer and the bookkeeping behind it. Copies and pickles are empty."""

    def __init__(self) -> None:
        self.forget()

    def __reduce__(self) -> tuple[Any, ...]:
        return Fold, ()

    def forget(self) -> None:
        """Become as for a new layer: free the folded weight, and everything that was found out."""
        self.weight: torch.Tensor | None = None  # W(z), `[out, in]`
        self._names: tuple[str, ...] = ()
        self._active: list[str] | str | None = None  # as the layer has it; not known if it is for rows of a batch
        self._hooks: list[dict[int, Any]] = []  # all empty, or calling the base layer means more than multiplying
        self._dtype: torch.dtype | None = None
        self._snapshot: Snapshot | None = None  # of what the rest is about
        self._spent = 0  # what the gate has cost since the snapshot, or would have
        self._spent_before = 0  # the same, between the snapshot before and this one
        self._exact_enough: bool | None = None
        self._changed_in_place: bool | None = None  # the layer's output, by what follows; not known yet
        self._decisions: dict[tuple[tuple[str, ...], bool], tuple[torch.dtype, Snapshot, bool]] = {}

    def release(self) -> None:
        """Free the folded weight and start counting anew."""
        self.weight, self._snapshot, self._spent, self._spent_before = None, None, 0, 0

    def peek(self, layer: SVFLayer, names: tuple[str, ...]) -> torch.Tensor | None:
        """The folded weight for these adapters in the dtype of the base weight, if there is one that is up to date."""
        if self.weight is None or self._snapshot is None or self.weight.dtype != layer.get_base_layer().weight.dtype:
            return None
        self._snapshot.doubt()
        return self.weight if can_fold(layer, names) and self._is_current(layer, names, self.weight.dtype) else None

    def ready(self, layer: SVFLayer) -> torch.Tensor | None:
        """What `find` would answer, in a fraction of its time, when there is a folded weight and no gradient is asked
        for: decoding asks for every layer and every token."""
        if (
            self.weight is None
            or self._snapshot is None
            or torch.is_grad_enabled()
            or layer._active_adapter != self._active
            or any(self._hooks)
            or not _is_eager()
            or not self._snapshot.is_of(layer)
            or not self._snapshot.holds()
            or _policy(layer, self._names) == "never"
            or _compute_dtype(self._snapshot.dtype, self._snapshot.device_type) != self._dtype
        ):
            return None
        return self.weight

    def find(self, layer: SVFLayer, names: tuple[str, ...], x: torch.Tensor) -> torch.Tensor | None:
        """The folded weight of a layer for these adapters if it is to be used for this input, else `None`."""
        policy = _policy(layer, names)
        if policy == "never" or not can_fold(layer, names):
            if self._snapshot is not None:
                self.release()
            return None
        weight = layer.get_base_layer().weight
        dtype = _compute_dtype(weight.dtype, weight.device.type)
        if not self._is_current(layer, names, dtype):
            self._restart(layer, names, dtype)

        k, tokens = min(layer.shape), x.numel() // layer.in_features
        deltas = layer.delta_weights(names)
        r = max(len(delta) for delta in deltas)
        training = torch.is_grad_enabled() and any(delta.requires_grad for delta in deltas)
        self._spent += gate_cost(k, r, tokens)
        if training:  # backward goes through the gate, too, but gets the gradient of δ on the way
            self._spent += max(0, gate_cost(k, r, tokens) - products_cost(k, r, tokens, dtype))
        cost = 0 if policy == "always" else fold_cost(*layer.shape, r)
        if training or (torch.is_grad_enabled() and x.requires_grad):
            if not self._decided(layer, cost, training):
                if training:
                    self.weight = None  # soon out of date, and memory is short now
                return None
        elif self._spent < cost or not self._is_exact_enough(layer):
            return None
        if self.weight is None:
            with torch.inference_mode(False), torch.no_grad():  # a tensor made in inference mode is no use in training
                self.weight = layer.effective_weight(_delta(layer, names)).to(dtype)
        return self.weight

    def _is_current(self, layer: SVFLayer, names: tuple[str, ...], dtype: torch.dtype) -> bool:
        known = self._snapshot
        return known is not None and self._names == names and self._dtype == dtype and known.holds()

    def _restart(self, layer: SVFLayer, names: tuple[str, ...], dtype: torch.dtype) -> None:
        self.weight, self._names, self._dtype, self._snapshot = None, names, dtype, Snapshot(layer, names)
        self._active = copy(layer._active_adapter) if layer.rows is None else None
        modules = [layer.get_base_layer(), *(layer.svf_delta[name] for name in names)]
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._spent, self._spent_before = 0, self._spent
        self._exact_enough = None

    def _decided(self, layer: SVFLayer, cost: int, training: bool) -> bool:
        """Whether to fold where there will be a backward, in which δ gets a gradient (`training`) or only the input.

        Decided at the first such call for a value of δ and kept for all of them: deciding again later could make the
        recomputation in a checkpoint differ from the computation. What the value of δ before was used for tells how
        much may come.
        """
        assert self._snapshot is not None
        assert self._dtype is not None
        dtype, snapshot, fold = self._decisions.get((self._names, training), (None, None, False))
        if snapshot is None or dtype != self._dtype or not (snapshot is self._snapshot or snapshot.holds()):
            self._snapshot.doubt()
            if not self._snapshot.holds():
                self._restart(layer, self._names, self._dtype)
            snapshot = self._snapshot
            worth = self.weight is not None or max(self._spent, self._spent_before) >= cost
            fold = worth and self._is_exact_enough(layer)
            if training:
                fold = fold and self._may_keep_output(layer) and invertible(_delta(layer, self._names))
            self._decisions[self._names, training] = self._dtype, snapshot, fold
        snapshot.doubt()
        self._snapshot.doubt()
        return fold

    def _may_keep_output(self, layer: SVFLayer) -> bool:
        return layer.side == "input" or self._changed_in_place is False

    def watch(self, output: torch.Tensor) -> None:
        """Find out, once, whether the model changes the layer's output in place, such as by `nn.ReLU(inplace=True)`.
        Then a fold on the output side, which needs it in backward, is not possible."""
        if self._changed_in_place is not None or self._snapshot is None or not output.requires_grad:
            return
        same, version = output.detach(), output._version  # which share the counter
        same.data = same.new_empty(0)  # and no longer the memory

        def look(gradient: torch.Tensor) -> None:
            self._changed_in_place = bool(self._changed_in_place) or same._version != version

        output.register_hook(look)

    def _is_exact_enough(self, layer: SVFLayer) -> bool:
        """Whether enough of ΔW is left in the dtype to compute in."""
        assert self._dtype is not None
        if self._exact_enough is None:
            self._exact_enough = (
                self._dtype.itemsize > 2
                or layer.surviving_share(_delta(layer, self._names), self._dtype) >= SMALLEST_SHARE
            )
        return self._exact_enough


def _delta(layer: SVFLayer, names: tuple[str, ...]) -> torch.Tensor:
    delta = layer.summed_delta(names)
    assert delta is not None
    return delta


def _policy(layer: SVFLayer, names: tuple[str, ...]) -> str:
    choices = {layer.svf_config[name].runtime_config.fold for name in names}
    return "never" if "never" in choices else "always" if "always" in choices else "auto"


def _compute_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """What a base layer with weights of this dtype computes in: that, or what autocast makes of it."""
    if not torch.is_autocast_enabled(device_type) or dtype == torch.float64:
        return dtype
    return torch.get_autocast_dtype(device_type)


def _is_eager() -> bool:
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack())


def can_fold(layer: SVFLayer, names: tuple[str, ...]) -> bool:
    """Whether the layer owns plain tensors, calling its base layer means multiplying by its weight, and versions mean
    something. Not so under `torch.compile`, functorch, FSDP, ZeRO-3, tensor parallelism, offload, or with hooks."""
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


def has_plain_deltas(layer: SVFLayer, names: Sequence[str]) -> bool:
    """Whether the layer owns δ of these adapters itself, so that their versions mean something."""
    # in this order, as FSDP1 wraps δ
    return all(_is_untouched(layer.svf_delta[name], (Delta,)) for name in names) and all(
        map(_is_plain, layer.delta_weights(names))
    )


def _is_untouched(module: nn.Module, classes: tuple[type[nn.Module], ...]) -> bool:
    return (
        type(module) in classes
        and module._parameters.get("weight") is not None  # not so in the replicas of nn.DataParallel
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in module.__dict__  # accelerate's offload
        and not module._state_dict_pre_hooks  # FSDP2, whose parameters are only sometimes there
    )


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in (torch.Tensor, nn.Parameter)
        and not tensor.is_meta
        and not tensor.is_inference()
        and tensor.is_floating_point()
        and not hasattr(tensor, "ds_id")  # ZeRO-3
    )
