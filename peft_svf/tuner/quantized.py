"""Base layers with quantized weights, of the backends that PEFT knows.

The gate only calls the base layer, so it works on all of them. What needs the weight gets what the backend makes of it.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from peft.utils.quantization_utils import QuantizationBackend


def keep_order(model: nn.Module) -> None:
    """Keep bitsandbytes from ordering 4-bit weights anew for the matrix instructions of a CPU, as it does at the first
    inference on some. It passes no gradient through weights in that order, and it does not find its way back when the
    model is saved, which includes saving and loading an adapter (0.50).

    Raises:
        ValueError: It has done so already.
    """
    for name, module in model.named_modules():
        if getattr(getattr(getattr(module, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"{name} has 4-bit weights that bitsandbytes has ordered anew for inference on this CPU, and it can "
                "neither train nor save them so. Load the model again, and attach the adapter before the model is used."
            )
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def dequantized(backend: QuantizationBackend, base_layer: nn.Module, in_features: int) -> torch.Tensor:
    """What the base layer multiplies by, `[out, in]`: as its backend says, or, where that cannot tell, what comes out
    for each unit vector."""
    try:
        return backend.get_base_weight(base_layer).detach()
    except (TypeError, NotImplementedError):
        pass  # GPTQ, AWQ and others
    tensors = [*base_layer.parameters(), *base_layer.buffers()]
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)  # of scales, mostly
    with torch.no_grad():
        out: torch.Tensor = base_layer(torch.eye(in_features, dtype=dtype, device=tensors[0].device))
    bias = getattr(base_layer, "bias", None)
    return (out if bias is None else out - bias.detach()).mT


def twin(base_layer: nn.Module) -> nn.Module:
    """A module that shares everything with a base layer until one of the two is given another weight."""
    other = type(base_layer).__new__(type(base_layer))
    other.__dict__ = base_layer.__dict__.copy()
    for name in ("_parameters", "_buffers"):
        other.__dict__[name] = base_layer.__dict__[name].copy()
    if "state" in other.__dict__:  # bitsandbytes' int8, which is derived from the weight
        other.__dict__["state"] = copy.copy(base_layer.__dict__["state"])
    return other


def requantize(backend: QuantizationBackend, layer: Any, base_layer: nn.Module, weight: torch.Tensor) -> None:
    """Give a tuner layer a base layer like `base_layer`, which stays as it is, with this weight `[out, in]`."""
    stored = base_layer._parameters.get("weight")
    attributes, own = None if stored is None else stored.__dict__.copy(), base_layer.__dict__.copy()
    layer.base_layer = twin(base_layer)
    try:
        backend.set_base_weight(layer, weight)
    except BaseException:
        layer.base_layer = base_layer
        raise
    finally:
        # bitsandbytes makes the new weight of the attributes of the one that is there, and tells its module
        base_layer.__dict__.update(own)
        if stored is not None and attributes is not None:
            stored.__dict__.clear()
            stored.__dict__.update(attributes)
