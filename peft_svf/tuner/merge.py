"""The state of a base weight while adapters are merged into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .quantized import Original

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Merge:
    """
    The adapters that are merged into one base weight, and the weight before.

    Layers that have the same base weight share this object, so the weight is merged and restored once.

    Attributes:
        layers (`list`): The SVF layers of the weight.
        names (`list[str]`): The merged adapters.
        before (`torch.Tensor`, *optional*): The weight before the first merge.
        quantized ([`Original`], *optional*): The same for a quantized weight.
        fraction (`float`): The fraction of ΔW in the merged weight.
        checked (`bool`): Whether the whole model has been checked for this merge.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.names: list[str] = []
        self.before: torch.Tensor | None = None
        self.quantized: Original | None = None
        self.fraction = 1.0
        self.checked = False
        self._written: tuple[torch.Tensor, ...] | None = None

    def wrote(self, weight: torch.Tensor) -> None:
        """Remember the merged weight, to notice later changes by others."""
        self._written = bit_sums(weight)

    def is_intact(self, weight: torch.Tensor) -> bool:
        """Whether the weight is still the merged one. True if it cannot be read, as on the meta device."""
        found = bit_sums(weight)
        if self._written is None or found is None:
            return True
        return all(
            a.shape == b.shape and torch.equal(a.to(b.device), b) for a, b in zip(self._written, found, strict=True)
        )

    def converted(self, function: Callable[[torch.Tensor], torch.Tensor], weight: torch.Tensor, intact: bool) -> None:
        """Convert the stored weight as the merged one has just been, so that `unmerge` gives the converted base."""
        if self.before is not None:
            self.before = function(self.before)
        if intact:
            self.wrote(weight)

    def clear(self) -> None:
        """Forget the merge, after the weight was restored."""
        self.names.clear()
        self.before, self.quantized, self.fraction, self._written = None, None, 1.0, None


def bit_sums(weight: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
    """Return the sums of the rows and of the columns, over the bits as integers, so that every change shows."""
    weight = weight.detach()
    weight = weight.to_local() if hasattr(weight, "to_local") else weight  # FSDP2
    if weight.is_meta or weight.ndim != 2 or weight.numel() == 0 or not weight.is_floating_point():
        return None
    bits = weight.contiguous().view(_BITS[weight.dtype.itemsize])
    return bits.sum(0, dtype=torch.int64), bits.sum(1, dtype=torch.int64)
