"""Put gates into the linear layers of vLLM. A layer's own method, quantized or not, is wrapped and called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import linear
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from .gated import GatedLinear, Linear, Part
from .slots import SlotTable

PLAIN = "UnquantizedLinearMethod"

# One opaque operation per layer, so that a compiled graph does not depend on which experts are in use. Its key is the
# layer's name, because graphs are cached on disk.
_LIBRARY = torch.library.Library("peft_svf", "FRAGMENT")
_LAYERS: dict[str, GatedLinear] = {}


def _linear(x: torch.Tensor, bias: torch.Tensor | None, key: str, out: int) -> torch.Tensor:
    return _LAYERS[key](x, bias)


def _fake_linear(x: torch.Tensor, bias: torch.Tensor | None, key: str, out: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out)


_LIBRARY.define("linear(Tensor x, Tensor? bias, str key, int out) -> Tensor")
_LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("peft_svf::linear", _fake_linear, lib=_LIBRARY)


class SVFLinearMethod(QuantizeMethodBase):
    """
    The method of a layer with gates.

    Args:
        layer: The layer, with its own method.
        parts: The weights in its output, in order.
        table: The slots of the engine.
    """

    def __init__(self, layer: Any, parts: Sequence[Part], table: SlotTable) -> None:
        self.layer, self.key, self.width = layer, layer.prefix, sum(part.shard.size for part in parts)
        self.is_plain = type(layer.quant_method).__name__ == PLAIN
        own: Linear | None = own_linear(layer)
        pieces = None
        if self.is_plain and GatedLinear.needs_pieces(parts):
            whole = local_weight(layer)
            pieces = [packed_linear(whole[part.columns]) for part in parts]
            if not layer.weight.numel():  # on a CPU, where the pieces are copies
                own = layer.cpu_linear = None
        self.linear = _LAYERS[self.key] = GatedLinear(parts, table, whole=own, pieces=pieces)

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to replace the weights, which the bases belong to.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(f"{self.key} serves experts, so its weights cannot be replaced. Start another engine.")

    def process_weights_after_loading(self, layer: Any) -> None:
        """Refuse to replace the weights, which the bases belong to.

        Raises:
            RuntimeError: Always.
        """
        self.create_weights()

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return the output of the layer, `[tokens, out]`."""
        found: torch.Tensor = torch.ops.peft_svf.linear(x, bias, self.key, self.width)
        return found

    def weight(self) -> torch.Tensor:
        """Return the local weight, `[out, in]`."""
        return (
            stored_weight(self.layer)
            if self.is_plain and self.layer.weight.numel()
            else _multiplied(self.layer, self.linear.base)
        )

    def fold(self, row: torch.Tensor) -> None:
        """Compute the weight of one expert, and keep it next to the layer's own.

        Args:
            row: δ of all modules, as in the table.
        """
        self.linear.folded = packed_linear(self.linear.folded_weight(self.weight(), row))

    def unfold(self) -> None:
        """Drop the folded weight. The layer's own was never changed."""
        self.linear.folded = None


def own_linear(layer: Any) -> Linear:
    """Return the multiplication by the weight of a layer, as its own method does it."""
    method = layer.quant_method
    return lambda x, bias: method.apply(layer, x, bias)


def stored_weight(layer: Any) -> torch.Tensor:
    """Return the weight of a layer that is neither quantized nor packed."""
    found: torch.Tensor = layer.weight.detach()
    return found


def local_weight(layer: Any) -> torch.Tensor:
    """Return the local weight of a layer without gates, `[out, in]`.

    If it is quantized, or packed as on a CPU, by a multiplication with the identity, which is exact.
    """
    if type(layer.quant_method).__name__ == PLAIN and layer.weight.numel():
        return stored_weight(layer)
    return _multiplied(layer, own_linear(layer))


def _multiplied(layer: Any, by: Linear) -> torch.Tensor:
    size = getattr(layer, "input_size_per_partition", layer.input_size)
    device = next((each.device for each in layer.parameters()), torch.device("cpu"))
    return by(torch.eye(size, dtype=layer.params_dtype, device=device), None).mT


def packed_linear(weight: torch.Tensor) -> Linear:
    """Return the multiplication by a weight `[out, in]`.

    On a CPU the weight is repacked, which is twice as fast for few tokens.
    """
    if weight.device.type != "cpu":
        return lambda x, bias: linear(x, weight, bias)
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    holder: Any = torch.nn.Module()
    holder.weight = torch.nn.Parameter(weight.contiguous(), requires_grad=False)
    dispatch_cpu_unquantized_gemm(holder, remove_weight=True)
    return lambda x, bias: holder.cpu_linear(x, holder.weight, bias)
