"""A linear layer of one or several weights, with a gate for each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .shards import GateFactors, Place, Shard
from .slots import SlotTable

Linear = Callable[[torch.Tensor, "torch.Tensor | None"], torch.Tensor]  # of an input `[tokens, in]` and a bias


@dataclass(frozen=True)
class Part:
    """One weight of a layer: where it is, and its gate. A weight without basis has no place for one."""

    name: str
    shard: Shard
    place: Place | None = None
    down: Linear | None = None
    up: Linear | None = None
    r: int = 0

    @classmethod
    def of(cls, name: str, shard: Shard, factors: GateFactors, pack: Callable[[torch.Tensor], Linear]) -> Part:
        """Return the part with its factors packed for multiplication. The factors themselves are not kept."""
        return cls(name, shard, factors.place, pack(factors.down.mT), pack(factors.up), factors.up.shape[1])

    @property
    def columns(self) -> slice:
        """Its columns of the output."""
        return slice(self.shard.start, self.shard.stop)

    def correction(self, h: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """Return what the gate adds, given δ of each token, `[tokens, r]`."""
        assert self.down is not None
        assert self.up is not None
        return self.up((self.down(h, None) * delta).to(h.dtype), None)

    def factors(self, weight: torch.Tensor) -> GateFactors:
        """Return the factors again, through multiplications with the identity, which are exact.

        Args:
            weight: Its local weight, `[out, in]`.
        """
        assert self.place is not None
        assert self.down is not None
        assert self.up is not None
        size = weight.shape[0] if self.place == "output" else weight.shape[1]
        eyes = [torch.eye(n, dtype=weight.dtype, device=weight.device) for n in (size, self.r)]
        return GateFactors(self.place, self.down(eyes[0], None), self.up(eyes[1], None).mT)


class GatedLinear:
    """
    Computes `y = W(z) x + b` with another z for each token. Tokens without an expert get the bits of the plain layer.

    Args:
        parts: The weights in the output, in order.
        table: The slots of the engine.
        whole: The plain layer.
        pieces: One linear per weight, if the layer can be cut. It must be, or be quantized, if several of its weights
            have a gate on their inputs. Replaces `whole` if that is `None`.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        table: SlotTable,
        *,
        whole: Linear | None = None,
        pieces: Sequence[Linear] | None = None,
    ) -> None:
        self.parts, self.table, self.whole, self.pieces = list(parts), table, whole, pieces
        self.folded: Linear | None = None

    @staticmethod
    def needs_pieces(parts: Sequence[Part]) -> bool:
        """Whether some of several weights get another input than the others."""
        return len(parts) > 1 and any(part.place == "input" for part in parts)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return the output for the tokens of the current step, `[..., out]`."""
        table = self.table
        if not table.in_use:
            return self.base(x, bias)
        if table.folded and self.folded is not None:
            return self.folded(x, bias)
        shape, x = x.shape, x.reshape(-1, x.shape[-1])
        deltas = {part.name: table.of_tokens(part.name, len(x)) for part in self.parts if part.place is not None}
        inputs = [x + part.correction(x, deltas[part.name]) if part.place == "input" else x for part in self.parts]
        y = self._each(x, inputs, bias)
        for part in self.parts:
            if part.place == "beside":
                y[:, part.columns] += part.correction(x, deltas[part.name])
            elif part.place == "output":  # before the bias
                h = y[:, part.columns]
                h = h.contiguous() if bias is None else h - bias[part.columns]
                y[:, part.columns] += part.correction(h, deltas[part.name])
        return y.view(*shape[:-1], y.shape[-1])

    def base(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return the output of the base model."""
        return self.whole(x, bias) if self.whole is not None else self._cut([x] * len(self.parts), bias)

    def _each(self, x: torch.Tensor, inputs: Sequence[torch.Tensor], bias: torch.Tensor | None) -> torch.Tensor:
        """Return the output for one input per weight."""
        if all(each is x for each in inputs):
            return self.base(x, bias)
        if len(inputs) == 1:
            return self.base(inputs[0], bias)
        if self.pieces is not None:
            return self._cut(inputs, bias)
        # A quantized layer cannot be cut: each input goes through all of it, and a part of each output is taken. Not in
        # one call: rounding depends on the number of tokens, and tokens of the base model would get other bits.
        outputs = {id(each): self.base(each, bias) for each in inputs}
        pairs = zip(inputs, self.parts, strict=True)
        return torch.cat([outputs[id(each)][:, part.columns] for each, part in pairs], dim=-1)

    def _cut(self, inputs: Sequence[torch.Tensor], bias: torch.Tensor | None) -> torch.Tensor:
        assert self.pieces is not None
        biases = [None if bias is None else bias[part.columns] for part in self.parts]
        return torch.cat([piece(x, b) for piece, x, b in zip(self.pieces, inputs, biases, strict=True)], dim=-1)

    def folded_weight(self, weight: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """Return the local W(z) of one expert, in the dtype of the weight.

        Args:
            weight: The local weight, `[out, in]`.
            row: δ of all modules, as in the table.
        """
        folded = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for part in self.parts:
            if part.place is not None:
                W = weight[part.columns]
                delta = row[self.table.ranges[part.name]].to(W.device)
                folded[part.columns] += part.factors(W).change(W, delta)
        return folded.to(weight.dtype)
