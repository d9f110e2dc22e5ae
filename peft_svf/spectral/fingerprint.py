"""Numbers that identify a weight and its singular vectors: σ_1, σ_mid, σ_k, ‖W‖_F, and 12 samples of Q.

An expert rescales the singular values of one particular base model. On another base model it has the right shape but
computes nonsense. So the numbers are saved with the adapter and compared when it is attached.

The spectrum cannot show that equal singular values have other vectors, and rounding to bf16 is enough to rotate those.
The samples show it. For random signs u_j, v_j `[k]` and d_j `[r]`, and the matrix of a random expert,

    A_j = Q diag(d_j ⊙ σ) Qᵀ / ‖σ‖        s_j = u_jᵀ A_j v_j        E (s_j - s'_j)² = ‖A_j - A'_j‖_F²

so the root mean square of the differences estimates how wrong ΔW becomes. The signs of Q's columns cancel, and columns
with σ = 0 have no effect, as in ΔW. Measured in `benchmarks/base_check.py`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from statistics import median

import numpy as np
import torch

SAMPLES = 12
# of ΔW in one weight: a cast stays below it, unless the singular values are nearly equal
LARGEST_ERROR = 0.3
# error of ΔW over √k, of the median weight: 0.0016 to 0.0034 for bf16, 0.007 to 0.02 for 1 % of noise
LARGEST_TURN = 0.005
UNCHANGED = 1e-4
# change of the norm of a weight over that of the median weight: casts that turned far by chance stay below 4
LARGEST_SHIFT = 6
# fewer have no meaningful median
FEW_WEIGHTS = 4
# with samples of Q, the spectrum only has to show another scale: rounding a dequantized weight changes it by 4e-3
SCALE_TOLERANCE = {"sigma": 1e-2, "norm": 1e-3}
# without them, the norm shows other vectors best: 1 % of noise changes it by 5e-5
NORM_TOLERANCE = 3e-5
SIGMA_TOLERANCE = 3e-3
# 6 times the relative rounding error of bf16; it averages out over the entries of a weight
ROUNDING = 6 * 2**-9

LABELS = ("σ_1", "σ_mid", "σ_k", "‖W‖_F")


def fingerprint(spectrum: torch.Tensor, vectors: torch.Tensor | None = None) -> list[float]:
    """Return `[σ_1, σ_mid, σ_k, ‖W‖_F]` of a spectrum `[k]` in descending order, and the samples of Q if it is given.

    Args:
        spectrum: All singular values of the weight.
        vectors: The leading columns of Q that the adapter uses, `[k, r]`.
    """
    s = spectrum.double()
    numbers = [s[0], s[(len(s) - 1) // 2], s[-1], s.square().sum().sqrt()]
    found = [float(f"{x:.9g}") for x in torch.stack(numbers).tolist()]
    return found if vectors is None else found + [round(x, 4) for x in _samples(s, vectors).tolist()]


def tolerances(expected: Sequence[float], shape: tuple[int, int], *, sampled: bool = False) -> list[float]:
    """Return the tolerance of each of the four numbers of a spectrum, for a weight of this shape.

    Relative to the root mean square of the singular values, because a single one may be 0 before rounding.

    Args:
        expected: The fingerprint.
        shape: The shape of the weight.
        sampled: Whether samples of Q are compared as well.
    """
    k, size = min(shape), shape[0] * shape[1]
    norm = expected[3]
    sigma, whole = (SCALE_TOLERANCE["sigma"], SCALE_TOLERANCE["norm"]) if sampled else (SIGMA_TOLERANCE, NORM_TOLERANCE)
    sigma_allowed = max(sigma, ROUNDING / k**0.5) * norm / k**0.5
    return [sigma_allowed] * 3 + [max(whole, ROUNDING / size**0.5) * norm]


def sample_difference(expected: Sequence[float], found: Sequence[float]) -> float | None:
    """Return the estimated relative error of ΔW for a random expert; `None` if a fingerprint has no samples."""
    pairs = list(zip(expected[len(LABELS) :], found[len(LABELS) :], strict=False))
    return (sum((want - have) ** 2 for want, have in pairs) / len(pairs)) ** 0.5 if pairs else None


def fingerprint_difference(
    expected: Sequence[float], found: Sequence[float], shape: tuple[int, int], *, allowed: float = LARGEST_ERROR
) -> str | None:
    """Return a description of the first difference beyond its tolerance, or `None` if there is none.

    Args:
        expected: The recorded fingerprint.
        found: That of the weight at hand.
        shape: The shape of the weight.
        allowed: The allowed error of ΔW, if both have samples of Q.
    """
    wrong = sample_difference(expected, found)
    allowances = tolerances(expected, shape, sampled=wrong is not None)
    for label, want, have, tolerance in zip(LABELS, expected, found, allowances, strict=False):
        if not abs(want - have) <= tolerance:  # nor NaN
            return f"{label} is {have:.8g}, the adapter was made for {want:.8g}"
    if wrong is not None and not wrong <= allowed:
        return f"it has other singular vectors, so that the adapter's change is wrong by about {wrong:.0%}"
    return None


def fingerprint_differences(
    pairs: Mapping[str, tuple[Sequence[float], Sequence[float], tuple[int, int]]],
) -> dict[str, str]:
    """Return how the weights of a model differ from the recorded ones, by name; empty if they agree.

    Rounding and noise turn singular vectors by their size times √k. A cast turns those of every weight a little, and in
    a few weights, by chance, two neighbours a lot. So weights are judged together: if the median weight has turned as
    by a cast, single ones may differ more. If it has not turned at all or turned further, they may not. Nor may those
    whose norm has changed much more than that of the median weight: noise adds to the norm, and rounding averages out.

    Args:
        pairs: The recorded fingerprint, the one at hand, and the shape of each weight.
    """
    errors = {name: sample_difference(expected, found) for name, (expected, found, _) in pairs.items()}
    roots = {name: min(shape) ** 0.5 for name, (_, _, shape) in pairs.items()}
    turns = [error / roots[name] for name, error in errors.items() if error is not None]
    cast = len(turns) < FEW_WEIGHTS or UNCHANGED < median(turns) <= LARGEST_TURN
    shifts = {
        name: abs(found[3] - expected[3]) / max(expected[3], 1e-30) for name, (expected, found, _) in pairs.items()
    }
    usual = median(shifts.values()) if len(turns) >= FEW_WEIGHTS else math.inf
    differences = {}
    for name, (expected, found, shape) in pairs.items():
        as_cast = cast and shifts[name] <= LARGEST_SHIFT * usual
        allowed = LARGEST_ERROR if as_cast else min(LARGEST_ERROR, LARGEST_TURN * roots[name])
        if difference := fingerprint_difference(expected, found, shape, allowed=allowed):
            differences[name] = difference
    return differences


def _samples(spectrum: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Return s `[SAMPLES]` of the leading columns of Q, `[k, r]`."""
    k, r = vectors.shape
    both, d = (signs.to(vectors.device) for signs in _signs(k))
    sigma = spectrum[:r].to(vectors.device, torch.float32)
    u, v = (both @ vectors.detach().float()).chunk(2)
    return (u * v * d[:, :r]) @ (sigma / sigma.norm().clamp(min=1e-30))


@lru_cache(maxsize=16)
def _signs(k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return u and v, `[2 · SAMPLES, k]`, and d, `[SAMPLES, k]`, of ±1.

    Of a hash and not of a random generator, so that no version of a library changes them. Entry i does not depend on k.
    """

    def signs(label: str) -> torch.Tensor:
        digests = [hashlib.shake_256(f"{label}{j}".encode()).digest(-(-k // 8)) for j in range(SAMPLES)]
        bits = np.unpackbits(np.frombuffer(b"".join(digests), np.uint8).reshape(SAMPLES, -1), axis=1)[:, :k]
        return torch.from_numpy(2 * bits.astype(np.float32) - 1)

    return torch.cat([signs("u"), signs("v")]), signs("d")
