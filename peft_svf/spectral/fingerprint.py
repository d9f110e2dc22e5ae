"""Four numbers that identify a weight: σ_1, σ_mid, σ_k and ‖W‖_F.

An expert rescales the singular values of one particular base model. On another base model it has the right shape but
computes nonsense. So the numbers are saved with the adapter and compared when it is attached.

The same weight in another precision must pass, and a weight with rotated singular vectors must fail. The norm separates
the two best. Rounding to bf16 changes it by at most 1e-5. Noise of 1 % of the weight changes it by 5e-5, and makes the
ΔW of a random expert wrong by 25 % (`benchmarks/base_check.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

NORM_TOLERANCE = 3e-5
SIGMA_TOLERANCE = 3e-3
# 6 times the relative rounding error of bf16; it averages out over the entries of a weight
ROUNDING = 6 * 2**-9

LABELS = ("σ_1", "σ_mid", "σ_k", "‖W‖_F")


def fingerprint(spectrum: torch.Tensor) -> list[float]:
    """Return `[σ_1, σ_mid, σ_k, ‖W‖_F]` of a spectrum `[k]` in descending order."""
    s = spectrum.double()
    numbers = [s[0], s[(len(s) - 1) // 2], s[-1], s.square().sum().sqrt()]
    return [float(f"{x:.9g}") for x in torch.stack(numbers).tolist()]


def tolerances(expected: Sequence[float], shape: tuple[int, int]) -> list[float]:
    """Return the tolerance of each number of a fingerprint for a weight of this shape.

    Relative to the root mean square of the singular values, because a single one may be 0 before rounding.
    """
    k, size = min(shape), shape[0] * shape[1]
    norm = expected[3]
    sigma_allowed = max(SIGMA_TOLERANCE, ROUNDING / k**0.5) * norm / k**0.5
    return [sigma_allowed] * 3 + [max(NORM_TOLERANCE, ROUNDING / size**0.5) * norm]


def fingerprint_difference(expected: Sequence[float], found: Sequence[float], shape: tuple[int, int]) -> str | None:
    """Return a description of the first number that differs beyond its tolerance, or `None` if there is none."""
    for label, want, have, allowed in zip(LABELS, expected, found, tolerances(expected, shape), strict=True):
        if abs(want - have) > allowed:
            return f"{label} is {have:.8g}, the adapter was made for {want:.8g}"
    return None
