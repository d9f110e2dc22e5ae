"""Successive halving: candidates that score badly on a part of the examples are dropped."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .evaluator import Evaluator

STAGES = (0.25, 0.5, 1.0)  # fraction of the examples that the remaining candidates have been scored on


def race(
    evaluator: Evaluator, candidates: Sequence[np.ndarray], examples: Sequence[int], keep: int
) -> tuple[np.ndarray, np.ndarray]:
    """
    Score all candidates on a quarter of the examples, the better half on another quarter, and the better half of these
    on the rest.

    Args:
        evaluator ([`Evaluator`]): Scores candidates.
        candidates: The candidates.
        examples (`Sequence[int]`): Indices of the examples, in random order.
        keep (`int`): How many candidates are never dropped.

    Returns:
        The scores `[candidates]`, where dropped candidates come below those that went on, and the number of examples
        that each was scored on.
    """
    alive = np.arange(len(candidates))
    scores, seen = np.empty(len(candidates)), np.empty(len(candidates), dtype=int)
    for fraction in STAGES:
        size = int(np.ceil(fraction * len(examples)))
        scores[alive] = evaluator.scores([candidates[i] for i in alive.tolist()], examples[:size]).mean(axis=1)
        seen[alive] = size
        if fraction < 1:
            survivors = max(min(keep, len(alive)), len(alive) // 2)
            alive = alive[np.argsort(-scores[alive], kind="stable")[:survivors]]
    lowest = scores[alive].min()
    for size in sorted(set(seen) - {len(examples)}, reverse=True):
        dropped = seen == size
        scores[dropped] -= max(0.0, scores[dropped].max() - np.nextafter(lowest, -np.inf))
        lowest = scores[dropped].min()
    return scores, seen
