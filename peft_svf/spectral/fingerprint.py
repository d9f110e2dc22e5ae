"""Four numbers that tell one weight from another: σ_1, σ_mid, σ_k and ‖W‖_F.

An expert is a list of factors for the singular values of one particular base model. On any other base it still has the
right shape and computes nonsense, so the numbers travel with the adapter and are compared when it is attached.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Relative to σ_1 for the singular values (Weyl: rounding moves each by at most the norm of the rounding error), to
# itself for the norm. A cast between fp32, bf16 and fp16 stays below a tenth of it; docs/design-notes.md has the
# measurements.
TOLERANCE = 2e-3

LABELS = ("σ_1", "σ_mid", "σ_k", "‖W‖_F")


def fingerprint(spectrum: torch.Tensor) -> list[float]:
    """`[σ_1, σ_mid, σ_k, ‖W‖_F]` of a spectrum `[k]` in descending order."""
    s = spectrum.double()
    numbers = [s[0], s[(len(s) - 1) // 2], s[-1], s.square().sum().sqrt()]
    return [float(f"{x:.8g}") for x in torch.stack(numbers).tolist()]


def fingerprint_difference(expected: Sequence[float], found: Sequence[float]) -> str | None:
    """`None` if the two agree, else the first number that does not, in words."""
    for label, want, have in zip(LABELS, expected, found, strict=True):
        scale = max(abs(want), abs(have)) if label == "‖W‖_F" else max(expected[0], found[0])
        if abs(want - have) > TOLERANCE * scale:
            return f"{label} is {have:.6g}, the adapter was made for {want:.6g}"
    return None
