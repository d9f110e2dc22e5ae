"""Base layers with quantized weights, of the backends that PEFT supports.

The gate only calls the base layer, so it works with all of them. Code that needs the weight gets it dequantized by the
backend.
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
    """Whether the weight is stored below 16 bit by a backend that PEFT does not know.

    Tensor subclasses of other libraries (such as quanto's) count as well, because they may hide such a weight.
    """
    weight = getattr(base_layer, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return False  # `singular_basis` refuses integers by name
    return weight.dtype.itemsize < 2 or type(weight).__module__.partition(".")[0] not in ("torch", "deepspeed")


def keep_order(model: nn.Module) -> list[Any]:
    """Keep bitsandbytes from repacking 4-bit weights for the matrix instructions of the CPU.

    On some CPUs it does so at the first inference. Repacked weights pass no gradient and cannot be saved, which breaks
    saving and loading an adapter (bitsandbytes 0.50).

    Returns:
        `list`: The layers that would have been repacked, for `reorder`.

    Raises:
        ValueError: A layer has been repacked already.
    """
    found: list[Any] = []
    for name, module in model.named_modules():
        if getattr(getattr(getattr(module, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"{name} has 4-bit weights that bitsandbytes has repacked for inference on this CPU. It can neither "
                "train nor save them. Load the model again, and attach the adapter before the model is used."
            )
        if getattr(module, "support_avx512bf16_for_cpu", False):
            found.append(module)
    for module in found:
        module.support_avx512bf16_for_cpu = False
    return found


def reorder(layers: Iterable[Any]) -> None:
    """Undo `keep_order`."""
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True


def dequantized(backend: QuantizationBackend, base_layer: nn.Module, in_features: int) -> torch.Tensor:
    """Return the weight that the base layer multiplies by, `[out, in]`.

    Backends that cannot dequantize are measured: the layer is applied to every unit vector.
    """
    if backend.supports_merge:  # GPTQ, AWQ and others do not
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
    """The weight of a quantized base layer, stored while a merged one takes its place.

    The layer stays the same object, because hooks and offloading refer to it. Only HQQ's backend replaces it.
    """

    def __init__(self, backend: QuantizationBackend, base_layer: nn.Module) -> None:
        self._backend, self._base_layer = backend, base_layer
        self._weight = base_layer._parameters.get("weight")
        self._attributes = {} if self._weight is None else self._weight.__dict__.copy()
        self._state = copy.copy(getattr(base_layer, "state", None))  # bitsandbytes' int8 state, derived from the weight
        self._quant_state = getattr(base_layer, "quant_state", None)

    def weight(self) -> torch.Tensor:
        """Return the weight, dequantized, `[out, in]`."""
        if self._weight is None:
            return self._backend.get_base_weight(self._base_layer).detach()
        stand_in: Any = SimpleNamespace(weight=self._weight, state=copy.copy(self._state))
        return self._backend.get_base_weight(stand_in).detach()

    def replace(self, layer: Any, weight: torch.Tensor) -> None:
        """Quantize a weight `[out, in]` and put it into the base layer of a tuner layer."""
        try:
            self._backend.set_base_weight(layer, weight)
        finally:
            if self._weight is not None:  # bitsandbytes changes the attributes of the old weight
                self._weight.__dict__.clear()
                self._weight.__dict__.update(self._attributes)
        made = layer.base_layer
        if made is not self._base_layer and getattr(self._base_layer, "bias", None) is not None:
            made.bias = self._base_layer.bias

    def put_back(self, layer: Any) -> None:
        """Restore the state before `replace`, on the device where the layer is now."""
        layer.base_layer = self._base_layer
        if self._weight is None:
            return
        now = self._base_layer._parameters.pop("weight", None)
        self._base_layer.__dict__.pop("weight", None)  # torchao's backend leaves one here when it fails
        weight: Any = self._weight
        if now is not None and now.device != weight.device:
            weight = weight.to(now.device)
        self._base_layer.register_parameter("weight", weight)
        if self._state is not None:
            self._base_layer.state = self._state
        if self._quant_state is not None:
            self._base_layer.quant_state = self._quant_state


def kept_fraction(weight: torch.Tensor, merged: torch.Tensor, stored: torch.Tensor, rows: int = 64) -> float:
    """Return the fraction of the change from `weight` to `merged` that `stored`, a rounded `merged`, contains.

    1 less the squared error relative to the squared change, estimated from evenly spaced rows.
    """
    index = torch.linspace(0, len(weight) - 1, min(rows, len(weight)), device=weight.device).round().long()
    change, left = merged[index].float() - weight[index].float(), stored[index].float() - weight[index].float()
    total = float(change.square().sum())
    return max(0.0, 1.0 - float((left - change).square().sum()) / total) if total > 0 else 1.0
