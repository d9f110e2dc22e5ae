"""One search: an optimizer proposes candidates, which are scored on the examples, generation by generation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list

from ..utils.processes import processes
from .config import SearchConfig
from .evaluator import Evaluator
from .optimizers import Optimizer
from .racing import race
from .selection import ranked

FINALISTS = 4  # candidates that are compared at the end
FEWEST_TO_RACE = 4  # examples
EQUAL_SCORES = "equal_scores"


@dataclass
class Outcome:
    """
    What a search ended with.

    Attributes:
        finalists: The best candidates, the one to keep first.
        history: See [`SearchResult`].
        stopped: Why it ended, see [`SearchResult`].
    """

    finalists: list[np.ndarray] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    stopped: str = "num_generations"


def run_search(
    evaluator: Evaluator,
    optimizer: Optimizer,
    examples: Sequence[int],
    config: SearchConfig,
    *,
    num_generations: int,
    start: np.ndarray | None = None,
    max_seconds: float | None = None,
    level: float | None = None,
    on_generation: Callable[[dict[str, Any]], None] = lambda entry: None,
) -> Outcome:
    """
    Search on these examples. Ctrl-C ends the search and keeps what it has.

    Args:
        evaluator ([`Evaluator`]): Scores candidates.
        optimizer ([`Optimizer`]): Proposes them.
        examples (`Sequence[int]`): Indices of the examples.
        config ([`SearchConfig`]): For `racing`, `one_standard_error`, `patience` and `seed`.
        num_generations (`int`): Most generations.
        start (`np.ndarray`, *optional*): The candidate that is kept unless another one is better.
        max_seconds (`float`, *optional*): Start no generation that would probably exceed this time.
        level (`float`, *optional*): The score of all baselines, if it is the same. The search stops after the first
            generation if all its candidates have this score, too.
        on_generation: Called with each entry of the history.
    """
    outcome, begun = Outcome(), time.perf_counter()
    complete: dict[bytes, tuple[float, np.ndarray]] = {}  # score and candidate of those scored on all examples
    highest, waiting = -np.inf, 0
    rng = np.random.default_rng(config.seed)
    try:
        for generation in range(num_generations):
            candidates, scores, seen = _generation(evaluator, optimizer, list(examples), config, rng)
            finished = [i for i in range(len(scores)) if seen[i] == len(examples)]
            complete |= {candidates[i].tobytes(): (scores[i], candidates[i]) for i in finished}
            leader = max(finished, key=lambda i: scores[i])
            entry = {
                "generation": generation,
                "best": float(scores[leader]),
                "mean": float(scores[finished].mean()),
                "elites": sorted(scores[finished].tolist(), reverse=True)[: optimizer.num_elites],
                "incumbent": candidates[leader].tolist(),
                "evaluations": evaluator.usage.evaluations,
            }
            outcome.history.append(entry)
            on_generation(entry)
            highest, waiting = (scores[leader], 0) if scores[leader] > highest else (highest, waiting + 1)
            # racing puts the scores of dropped candidates a rounding error below the others
            flat = level is not None and not optimizer.uses_gradient and np.allclose(scores, level, rtol=0, atol=1e-9)
            if generation == 0 and flat:
                outcome.stopped = EQUAL_SCORES
                break
            spent = time.perf_counter() - begun
            if stopped := _reason_to_stop(optimizer, config.patience, waiting, spent, generation + 1, max_seconds):
                outcome.stopped = stopped
                break
        defaults = [x for x in (start, optimizer.mean) if x is not None]
        outcome.finalists = ranked(evaluator, defaults, _best(complete), examples, config.one_standard_error)
    except KeyboardInterrupt:
        if processes().num_processes > 1:  # the others may be anywhere
            raise
        outcome.stopped, outcome.finalists = "interrupted", _best(complete)
    return outcome


def _best(complete: dict[bytes, tuple[float, np.ndarray]]) -> list[np.ndarray]:
    return [x for _, x in sorted(complete.values(), key=lambda pair: -pair[0])[:FINALISTS]]


def _generation(
    evaluator: Evaluator, optimizer: Optimizer, examples: list[int], config: SearchConfig, rng: np.random.Generator
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Ask, score, tell. Return the candidates, their scores, and the number of examples that each was scored on."""
    evaluator.new_round()
    candidates = [np.array(optimizer.ask(), dtype=np.float64) for _ in range(optimizer.population_size)]
    if candidates[0].shape != (evaluator.space.dim,):
        raise ValueError(
            f"The optimizer proposed candidates of shape {list(candidates[0].shape)}, but the search has "
            f"{evaluator.space.dim} variables: one per expert and group of modules. See `granularity`."
        )
    broadcast_object_list(candidates)  # an optimizer without a seed proposes others in each process
    gradients = None
    if optimizer.uses_gradient:
        score, gradient = evaluator.value_and_gradient(candidates[0], examples)
        scores, seen, gradients = np.array([score]), np.full(1, len(examples)), [-gradient]
    elif config.racing and len(examples) >= FEWEST_TO_RACE:
        scores, seen = race(evaluator, candidates, rng.permutation(examples).tolist(), 2 * optimizer.num_elites)
    else:
        scores = evaluator.scores(candidates, examples).mean(axis=1)
        seen = np.full(len(candidates), len(examples))
    optimizer.tell([(x, -float(score)) for x, score in zip(candidates, scores, strict=True)], gradients)
    return candidates, scores, seen


def _reason_to_stop(
    optimizer: Optimizer,
    patience: int | None,
    waiting: int,
    spent: float,
    generations: int,
    max_seconds: float | None,
) -> str | None:
    if optimizer.should_stop():
        return "optimizer"
    if patience is not None and waiting >= patience:
        return "patience"
    reason = [max_seconds is not None and spent + spent / generations > max_seconds]
    broadcast_object_list(reason)  # the clocks of several processes differ
    return "max_seconds" if reason[0] else None
