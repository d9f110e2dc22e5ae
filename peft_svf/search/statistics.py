"""Means with their intervals, and comparisons of paired scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np

SEARCHED = "searched"  # name of the searched candidate; the other names are those of baselines
IN_CONTEXT = "in-context"  # the base model with demonstrations in its prompt

RESAMPLES = 2000
CONFIDENCE = 0.95


def interval(scores: Sequence[float] | np.ndarray, seed: int = 0) -> tuple[float, float]:
    """
    Return the 95 % confidence interval of the mean of some scores, by percentile bootstrap.

    A bootstrap of n scores is too narrow: its spread lacks a factor √(n / (n - 1)), and few scores underestimate their
    own spread. So the interval is widened by that factor and by Student's t relative to the normal distribution.
    """
    values = np.asarray(scores, dtype=np.float64)
    count, mean = len(values), values.mean()
    drawn = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    bounds = np.quantile(values[drawn].mean(axis=1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    low, high = mean + (bounds - mean) * _widening(count)
    return float(low), float(high)


def interval_of_accuracy(scores: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """
    Return the 95 % confidence interval of an accuracy, by Wilson's score: scores of 0 and 1.

    Unlike a bootstrap, it has a width where all answers are right, or none. Other scores fall back to [`interval`].
    """
    values = np.asarray(scores, dtype=np.float64)
    if not np.isin(values, (0.0, 1.0)).all():
        return interval(values)
    count, mean, z = len(values), values.mean(), NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    centre = (mean + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(mean * (1 - mean) / count + z**2 / (4 * count**2))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def _widening(count: int) -> float:
    """Return the factor for n scores. Student's quantile by the expansion of Cornish and Fisher, to 1 % from n = 6."""
    free = max(1, count - 1)
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    student = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return float(student / z * np.sqrt(count / free))


def compared(
    scores: Mapping[str, np.ndarray], baselines: Sequence[str], ties: Mapping[str, np.ndarray] | None = None
) -> tuple[str, bool, tuple[float, float, float]]:
    """
    Compare the searched candidate with the best baseline.

    Args:
        scores: Name → score of each example, the simplest first.
        baselines: The names of the baselines.
        ties: Name → another score of each example, which decides between equal means. Otherwise the first one wins.

    Returns:
        The best baseline, whether the searched candidate beats it, and the mean and interval of the difference.
    """

    def worth(name: str) -> tuple[float, float]:
        equal = round(float(scores[name].mean()), 9)  # means of the same numbers in another order
        return equal, float(ties[name].mean()) if ties else 0.0

    best = max(baselines, key=worth)
    paired = np.round(scores[SEARCHED] - scores[best], 9)
    return best, worth(SEARCHED) > worth(best), (round(float(paired.mean()), 9), *interval(paired))
