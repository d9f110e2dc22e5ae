"""Means with their intervals, and comparisons of paired scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np

SEARCHED = "searched"
IN_CONTEXT = "in-context"
RESAMPLES = 2000


CONFIDENCE = 0.95


def interval(scores: Sequence[float] | np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % confidence interval of the mean of some scores, by bootstrap. The resamples of n scores spread by
    √((n - 1) / n) of what they should, and few scores do not know their own spread: it is widened for both, as
    Student's t is beside the normal distribution."""
    values = np.asarray(scores, dtype=np.float64)
    count, mean = len(values), values.mean()
    drawn = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    bounds = np.quantile(values[drawn].mean(axis=1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    low, high = mean + (bounds - mean) * _widening(count)
    return float(low), float(high)


def _widening(count: int) -> float:
    """Of an interval by bootstrap; Student's quantile by Cornish and Fisher's expansion, to 1 % from 6 scores on."""
    free = max(1, count - 1)
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    student = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return float(student / z * np.sqrt(count / free))


def compared(
    scores: Mapping[str, np.ndarray], simple: Sequence[str], ties: Mapping[str, np.ndarray] | None = None
) -> tuple[str, bool, tuple[float, float, float]]:
    """The best simple choice, whether what was searched beats it, and mean and interval of the difference.

    Args:
        scores: Name → score of each example, the simplest first.
        simple: The names that need no search.
        ties: The same of what decides between equal means, if anything does; then the earlier one is the choice.
    """

    def worth(name: str) -> tuple[float, float]:
        equal = round(float(scores[name].mean()), 9)  # means of the same numbers in another order
        return equal, float(ties[name].mean()) if ties else 0.0

    best = max(simple, key=worth)
    paired = np.round(scores[SEARCHED] - scores[best], 9)
    return best, worth(SEARCHED) > worth(best), (round(float(paired.mean()), 9), *interval(paired))
