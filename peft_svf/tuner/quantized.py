"""Base layers with quantized weights, of the backends that PEFT knows.

The gate only calls the base layer, so it works on all of them. What needs the weight gets what the backend makes of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from peft.utils.quantization_utils import QuantizationBackend


def is_coarse(base_layer: nn.Module) -> bool:
    """Whether weights are floats of less than 16 bits, or of a kind of tensor that may hold those (such as quanto's),
    in a layer of a kind that PEFT does not know to be quantized."""
    weight = getattr(base_layer, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return False  # integers have no singular basis, which says so
    return weight.dtype.itemsize < 2 or type(weight).__module__.partition(".")[0] not in ("torch", "deepspeed")


def keep_order(model: nn.Module) -> list[Any]:
    """Keep bitsandbytes from ordering 4-bit weights anew for the matrix instructions of a CPU, as it does at the first
    inference on some. It passes no gradient through weights in that order, and it does not find its way back when the
    model is saved, which includes saving and loading an adapter (0.50).

    Returns:
        `list`: The layers that would have, for `reorder`.

    Raises:
        ValueError: One has already.
    """
    found: list[Any] = []
    for name, module in model.named_modules():
        if getattr(getattr(getattr(module, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"{name} has 4-bit weights that bitsandbytes has ordered anew for inference on this CPU, and it can "
                "neither train nor save them so. Load the model again, and attach the adapter before the model is used."
            )
        if getattr(module, "support_avx512bf16_for_cpu", False):
            found.append(module)
    for module in found:
        module.support_avx512bf16_for_cpu = False
    return found


def reorder(layers: Iterable[Any]) -> None:
    """Take back `keep_order`."""
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True


def dequantized(backend: QuantizationBackend, base_layer: nn.Module, in_features: int) -> torch.Tensor:
    """What the base layer multiplies by, `[out, in]`: as its backend says, or, where that cannot tell, what comes out
    for each unit vector."""
    if backend.supports_merge:  # not so for GPTQ, AWQ and others
        try:
            return backend.get_base_weight(base_layer).detach()
        except NotImplementedError:
            pass  # some of torchao's tensors
    tensors = [*base_layer.parameters(), *base_layer.buffers()]
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)  # of scales, mostly
    with torch.no_grad():
        out: torch.Tensor = base_layer(torch.eye(in_features, dtype=dtype, device=tensors[0].device))
    bias = getattr(base_layer, "bias", None)
    return (out if bias is None else out - bias.detach()).mT


class Original:
    """The weight of a quantized base layer, kept aside while another one is in its place.

    The layer stays the same object, as hooks and offloading hold on to it; only HQQ's backend replaces it.
    """

    def __init__(self, backend: QuantizationBackend, base_layer: nn.Module) -> None:
        self._backend, self._base_layer = backend, base_layer
        self._weight = base_layer._parameters.get("weight")
        self._attributes = {} if self._weight is None else self._weight.__dict__.copy()
        self._state = copy.copy(getattr(base_layer, "state", None))  # bitsandbytes' int8: derived from the weight
        self._quant_state = getattr(base_layer, "quant_state", None)

    def weight(self) -> torch.Tensor:
        """Dequantized, `[out, in]`."""
        if self._weight is None:
            return self._backend.get_base_weight(self._base_layer).detach()
        stand_in: Any = SimpleNamespace(weight=self._weight, state=copy.copy(self._state))
        return self._backend.get_base_weight(stand_in).detach()

    def replace(self, layer: Any, weight: torch.Tensor) -> None:
        """Quantize a weight `[out, in]` into the base layer of a tuner layer."""
        try:
            self._backend.set_base_weight(layer, weight)
        finally:
            if self._weight is not None:  # bitsandbytes changes the attributes of the weight that is there
                self._weight.__dict__.clear()
                self._weight.__dict__.update(self._attributes)
        made = layer.base_layer
        if made is not self._base_layer and getattr(self._base_layer, "bias", None) is not None:
            made.bias = self._base_layer.bias

    def put_back(self, layer: Any) -> None:
        """As it was before `replace`, on the device where the layer is now."""
        layer.base_layer = self._base_layer
        if self._weight is None:
            return
        now = self._base_layer._parameters.pop("weight", None)
        self._base_layer.__dict__.pop("weight", None)  # where torchao's backend leaves a failed one
        weight: Any = self._weight
        if now is not None and now.device != weight.device:
            weight = weight.to(now.device)
        self._base_layer.register_parameter("weight", weight)
        if self._state is not None:
            self._base_layer.state = self._state
        if self._quant_state is not None:
            self._base_layer.quant_state = self._quant_state


def kept_share(weight: torch.Tensor, merged: torch.Tensor, stored: torch.Tensor, rows: int = 64) -> float:
    """How much of a change from `weight` to `merged` is in `stored`, which was rounded from that: 1 less the square of
    what is wrong, relative to that of the change; from evenly spaced rows."""
    index = torch.linspace(0, len(weight) - 1, min(rows, len(weight)), device=weight.device).round().long()
    change, left = merged[index].float() - weight[index].float(), stored[index].float() - weight[index].float()
    total = float(change.square().sum())
    return max(0.0, 1.0 - float((left - change).square().sum()) / total) if total > 0 else 1.0
