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


def dequantized(backend: QuantizationBackend, base_layer: nn.Module, in_features: int) -> torch.Tensor:
    """What the base layer multiplies by, `[out, in]`: as its backend says, or, where that cannot tell, what comes out
    for each unit vector."""
    state = getattr(getattr(base_layer, "weight", None), "quant_state", None)
    # on some CPUs bitsandbytes orders 4-bit weights anew at the first inference, which the backend does not know
    if not getattr(state, "packing_format_for_cpu", False):
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
