"""Which candidate of a search to keep: the one-standard-error rule."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..scoring.objectives import Objective
from .evaluator import Evaluator
from .validation import questions


def ranked(
    evaluator: Evaluator,
    defaults: Sequence[np.ndarray],
    best: Sequence[np.ndarray],
    examples: Sequence[int],
    one_standard_error: bool,
) -> list[np.ndarray]:
    """
    Rank candidates, the one to keep first.

    The best of many candidates on a few examples is mostly a lucky one. The start of the search is not, and the
    optimizer's mean less so. So each default and then the best candidate replaces the one before only if it wins by
    more than the standard error of the difference (Hastie et al., The Elements of Statistical Learning, 7.10).

    Args:
        evaluator ([`Evaluator`]): Scores all of them again if the objective samples.
        defaults: The start of the search and the optimizer's mean.
        best: The best candidates of the search.
        examples (`Sequence[int]`): Indices of the examples.
        one_standard_error (`bool`): `False` lets any margin decide.
    """
    candidates = [*defaults, *best]
    evaluator.new_round()
    scores = evaluator.scores(candidates, examples)
    means = scores.mean(axis=1)
    scores = per_question(evaluator.objective, examples, scores)
    kept = 0
    winner = [len(defaults) + int(means[len(defaults) :].argmax())] if best else []
    for challenger in [*range(1, len(defaults)), *winner]:
        difference = scores[challenger] - scores[kept]
        noisy = one_standard_error and len(difference) > 1
        error = difference.std(ddof=1) / np.sqrt(len(difference)) if noisy else 0.0
        if difference.mean() > error:
            kept = challenger
    rest = [i for i in np.argsort(-means, kind="stable").tolist() if i != kept]
    return [candidates[i] for i in (kept, *rest)]


def per_question(objective: Objective, examples: Sequence[int], scores: np.ndarray) -> np.ndarray:
    """Average the scores `[..., examples]` of equal prompts, which are no independent evidence: `[..., questions]`."""
    numbers = np.array(questions(objective, examples))
    if len(set(numbers.tolist())) == len(numbers):
        return scores
    return np.stack([scores[..., numbers == each].mean(axis=-1) for each in range(numbers.max() + 1)], axis=-1)
