"""Linear layers of vLLM with a gate for each token. Wraps the layer's own method, quantized or not, which is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from .shards import GateFactors, Place, Shard
from .slots import SlotTable

PLAIN = "UnquantizedLinearMethod"

Linear = Callable[..., torch.Tensor]  # of an input and an optional bias

# One opaque operation per layer, so that a compiled graph does not depend on which experts are in use. Its key is the
# layer's name, because graphs are cached on disk.
_LIBRARY = torch.library.Library("peft_svf", "FRAGMENT")
_LAYERS: dict[str, SVFLinearMethod] = {}


def _linear(x: torch.Tensor, bias: torch.Tensor | None, key: str, out: int) -> torch.Tensor:
    return _LAYERS[key].compute(x, bias)


def _fake_linear(x: torch.Tensor, bias: torch.Tensor | None, key: str, out: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out)


_LIBRARY.define("linear(Tensor x, Tensor? bias, str key, int out) -> Tensor")
_LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("peft_svf::linear", _fake_linear, lib=_LIBRARY)


@dataclass(frozen=True)
class Part:
    """One weight of a layer: where it is, and its gate. A weight without basis has no place for one."""

    name: str
    shard: Shard
    place: Place | None = None
    r: int = 0
    down: Linear | None = None
    up: Linear | None = None

    @classmethod
    def of(cls, name: str, shard: Shard, factors: GateFactors) -> Part:
        """Return the part with its factors packed for multiplication. The factors themselves are not kept."""
        down, up = packed_linear(factors.down.mT), packed_linear(factors.up)
        return cls(name, shard, factors.place, factors.up.shape[1], down, up)

    def factors(self, like: torch.Tensor) -> GateFactors:
        """Return the factors again, through multiplications with the identity, which are exact.

        Args:
            like: The local weight, for dtype and device.
        """
        assert self.down is not None
        assert self.up is not None
        assert self.place is not None
        size = like.shape[0] if self.place == "output" else like.shape[1]
        eyes = [torch.eye(n, dtype=like.dtype, device=like.device) for n in (size, self.r)]
        return GateFactors(self.place, self.down(eyes[0]), self.up(eyes[1]).mT)


class SVFLinearMethod(QuantizeMethodBase):
    """
    Computes `y = W(z) x + b` with another z for each token.

    Args:
        layer: The layer.
        parts: The weights in its output, in order.
        table: The slots of the engine.
    """

    def __init__(self, layer: Any, parts: Sequence[Part], table: SlotTable) -> None:
        self.inner, self.layer, self.parts, self.table = layer.quant_method, layer, list(parts), table
        self.key, self.width = layer.prefix, sum(part.shard.size for part in parts)
        self.split: list[Linear] | None = None
        self.folded: Linear | None = None
        if len(parts) > 1 and any(part.place == "input" for part in parts) and self.is_plain:
            self.split = self._split()
        _LAYERS[self.key] = self

    @property
    def is_plain(self) -> bool:
        """Whether the weight is not quantized."""
        return type(self.inner).__name__ == PLAIN

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        """Raises:
        RuntimeError: Always. The bases belong to the weights that were loaded.
        """
        raise RuntimeError(f"{self.key} serves experts, so its weights cannot be replaced. Start another engine.")

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raises:
        RuntimeError: Always. The bases belong to the weights that were loaded.
        """
        self.create_weights()

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return the output of the layer, `[tokens, out]`."""
        return torch.ops.peft_svf.linear(x, bias, self.key, self.width)

    def compute(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return the output. Tokens without an expert get the same bits as from the layer's own method."""
        table = self.table
        if not table.in_use:
            return self._base(x, bias)
        if table.folded and self.folded is not None:
            return self.folded(x, bias)
        shape, x = x.shape, x.reshape(-1, x.shape[-1])
        index = table.index[: len(x)]

        def gate(part: Part, h: torch.Tensor) -> torch.Tensor:
            assert part.down is not None
            assert part.up is not None
            delta = table.values[:, table.ranges[part.name]][index]
            return part.up((part.down(h) * delta).to(h.dtype))

        gated = [x + gate(part, x) if part.place == "input" else x for part in self.parts]
        y = self._whole(x, gated, bias)
        for part in self.parts:
            if part.place in ("output", "beside"):
                here = slice(part.shard.start, part.shard.stop)
                h = x
                if part.place == "output":
                    h = y[:, here].contiguous() if bias is None else y[:, here] - bias[here]
                y[:, here] += gate(part, h)
        return y.view(*shape[:-1], y.shape[-1])

    def _base(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.split is not None and not self.layer.weight.numel():
            return self._pieces([x] * len(self.parts), bias)
        found: torch.Tensor = self.inner.apply(self.layer, x, bias)
        return found

    def _whole(self, x: torch.Tensor, inputs: list[torch.Tensor], bias: torch.Tensor | None) -> torch.Tensor:
        """Return the output for one input per weight."""
        different = [each for each in inputs if each is not x]
        if not different:
            return self._base(x, bias)
        if len(inputs) == 1:
            return self._base(inputs[0], bias)
        if self.split is not None:
            return self._pieces(inputs, bias)
        # A quantized weight cannot be cut: every input goes through all of it, and a part of each output is taken.
        asked = [x, *different]
        outputs = self._base(torch.cat(asked), bias).view(len(asked), len(x), -1)
        taken = [next(i for i, one in enumerate(asked) if one is each) for each in inputs]
        columns = [slice(part.shard.start, part.shard.stop) for part in self.parts]
        return torch.cat([outputs[i, :, place] for i, place in zip(taken, columns, strict=True)], dim=-1)

    def _pieces(self, inputs: Sequence[torch.Tensor], bias: torch.Tensor | None) -> torch.Tensor:
        assert self.split is not None
        pieces = [
            one(x, None if bias is None else bias[part.shard.start : part.shard.stop])
            for one, x, part in zip(self.split, inputs, self.parts, strict=True)
        ]
        return torch.cat(pieces, dim=-1)

    def weight(self) -> torch.Tensor:
        """Return the local weight, `[out, in]`, in the dtype of the layer. That of a quantized layer is rounded."""
        return local_weight(self._base, self.layer)

    def _split(self) -> list[Linear]:
        """Return one linear per weight. On a CPU, they replace the packed weight of the whole layer."""
        whole = self.weight()
        pieces = [packed_linear(whole[part.shard.start : part.shard.stop]) for part in self.parts]
        if not self.layer.weight.numel():
            self.layer.cpu_linear = None
        return pieces

    def fold(self, row: torch.Tensor) -> None:
        """Compute the weight of one expert, and keep it next to the layer's own.

        Args:
            row: δ of all modules, as in the table.
        """
        W = self.weight()
        folded = W.to(torch.promote_types(W.dtype, torch.float32), copy=True)
        for part in self.parts:
            if part.place is not None:
                here = slice(part.shard.start, part.shard.stop)
                delta = row[self.table.ranges[part.name]].to(folded.device)
                folded[here] += part.factors(W[here]).change(folded[here], delta)
        self.folded = packed_linear(folded.to(W.dtype))

    def unfold(self) -> None:
        """Drop the folded weight. The layer's own was never changed."""
        self.folded = None


def local_weight(apply: Linear, layer: Any) -> torch.Tensor:
    """Return the local weight of a layer, `[out, in]`: as it is, or by a multiplication with the identity.

    The latter is exact. It is necessary for quantized weights, and on a CPU, where vLLM keeps a packed copy only.
    """
    weight = getattr(layer, "weight", None)
    if weight is not None and weight.numel() and type(layer.quant_method).__name__ == PLAIN:
        found: torch.Tensor = weight.detach()
        return found
    size = getattr(layer, "input_size_per_partition", layer.input_size)
    device = next((each.device for each in layer.parameters()), torch.device("cpu"))
    return apply(torch.eye(size, dtype=layer.params_dtype, device=device), None).mT


def packed_linear(weight: torch.Tensor) -> Linear:
    """Return the multiplication by a weight `[out, in]`.

    On a CPU the weight is repacked, which is twice as fast for few tokens.
    """
    if weight.device.type != "cpu":
        return lambda x, bias=None: linear(x, weight, bias)
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    holder: Any = torch.nn.Module()
    holder.weight = torch.nn.Parameter(weight.contiguous(), requires_grad=False)
    dispatch_cpu_unquantized_gemm(holder, remove_weight=True)
    return lambda x, bias=None: holder.cpu_linear(x, holder.weight, bias)
