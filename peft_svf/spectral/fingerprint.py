"""Four numbers that tell one weight from another: σ_1, σ_mid, σ_k and ‖W‖_F.

An expert is a list of factors for the singular values of one particular base model. On any other base it still has the
right shape and computes nonsense, so the numbers travel with the adapter and are compared when it is attached.

What has to pass is the same weight in another precision, what has to fail is one whose singular vectors have turned.
The norm separates the two best: rounding to bf16 moves it by 1e-5 at most, noise of 1 % of the weight, with which a
random expert's ΔW is wrong by a quarter, by 5e-5 (docs/lab-notes/base-check.md, `benchmarks/base_check.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

NORM_TOLERANCE = 3e-5
SIGMA_TOLERANCE = 3e-3
# a relative error of bf16 in each weight, six times over; it averages out over many weights and less so over few
ROUNDING = 6 * 2**-9

LABELS = ("σ_1", "σ_mid", "σ_k", "‖W‖_F")


def fingerprint(spectrum: torch.Tensor) -> list[float]:
    """`[σ_1, σ_mid, σ_k, ‖W‖_F]` of a spectrum `[k]` in descending order."""
    s = spectrum.double()
    numbers = [s[0], s[(len(s) - 1) // 2], s[-1], s.square().sum().sqrt()]
    return [float(f"{x:.9g}") for x in torch.stack(numbers).tolist()]


def tolerances(expected: Sequence[float], shape: tuple[int, int]) -> list[float]:
    """By how much each number of a fingerprint may differ for a weight of this shape.

    A singular value may be 0, and rounding lifts it from there, so all are measured by their root mean square.
    """
    k, size = min(shape), shape[0] * shape[1]
    norm = expected[3]
    sigma_allowed = max(SIGMA_TOLERANCE, ROUNDING / k**0.5) * norm / k**0.5
    return [sigma_allowed] * 3 + [max(NORM_TOLERANCE, ROUNDING / size**0.5) * norm]


def fingerprint_difference(expected: Sequence[float], found: Sequence[float], shape: tuple[int, int]) -> str | None:
    """`None` if two fingerprints of weights of this shape agree, else the first number that does not, in words."""
    for label, want, have, allowed in zip(LABELS, expected, found, tolerances(expected, shape), strict=True):
        if abs(want - have) > allowed:
            return f"{label} is {have:.8g}, the adapter was made for {want:.8g}"
    return None
