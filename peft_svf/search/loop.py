"""One search: an optimiser proposes candidates, which are scored on some of the examples, until it is enough."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list

from ..utils.processes import processes
from .evaluator import Evaluator, Usage

FINALISTS = 4


@dataclass(frozen=True)
class Limits:
    """When a search begins no further generation, if that would probably go beyond one of these."""

    max_rows: float | None = None
    max_tokens: float | None = None
    max_seconds: float | None = None

    def reached(self, usage: Usage, coming: Usage) -> str | None:
        """The name of the limit, if what is coming would go beyond one."""
        spent, more = asdict(usage), asdict(coming)
        for name, limit in asdict(self).items():
            what = name.removeprefix("max_")
            if limit is not None and spent[what] + more[what] > limit:
                return name
        return None

    def left(self, usage: Usage, searches: int) -> Limits:
        """What each of so many searches may spend of what this leaves."""
        spent = asdict(usage)
        left = {
            name: None if limit is None else (limit - spent[name.removeprefix("max_")]) / searches
            for name, limit in asdict(self).items()
        }
        return Limits(**left)


@dataclass(frozen=True)
class Plan:
    """
    How to search.

    Attributes:
        num_generations: At most so many.
        racing: Whether to drop candidates early, by successive halving: all are scored on a quarter of the examples,
            the better half of them on another quarter, the better half of these on the rest, but never fewer than twice
            the elites.
        patience: Generations without a better candidate after which to stop.
        l1, l2: Penalties on the mean over groups of `Σ_k |α_k|` and `Σ_k α_k²`, in units of the score.
        one_standard_error: Whether what is simple stays unless another candidate is better beyond the noise, see
            [`chosen_first`].
        limits: What it may cost.
        seed: Of the order of the examples in a race.
    """

    num_generations: int
    racing: bool = True
    patience: int | None = None
    l1: float = 0.0
    l2: float = 0.0
    one_standard_error: bool = True
    limits: Limits = field(default_factory=Limits)
    seed: int = 0


@dataclass
class Outcome:
    """
    What a search ended with.

    Attributes:
        finalists: The few best candidates, the one that was chosen first, see [`chosen_first`].
        history: See [`MixtureResult`].
        stopped: Why it ended.
    """

    finalists: list[np.ndarray] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    stopped: str = "num_generations"


def run_search(
    evaluator: Evaluator,
    optimizer: Any,
    examples: Sequence[int],
    plan: Plan,
    on_generation: Callable[[dict[str, Any]], None] = lambda entry: None,
    start: np.ndarray | None = None,
) -> Outcome:
    """
    Search on these examples.

    Ctrl-C ends it as a limit does.

    Args:
        evaluator ([`Evaluator`]): Scores candidates.
        optimizer ([`Optimizer`]): Proposes them.
        examples (`Sequence[int]`): Indices of the examples.
        plan ([`Plan`]): How to go about it.
        on_generation: Called with each entry of the history.
        start (`np.ndarray`, *optional*): A candidate that stays unless the search finds one that is surely better.
    """
    outcome, usage, begun = Outcome(), evaluator.usage, Usage(**asdict(evaluator.usage))
    full: dict[bytes, tuple[float, np.ndarray]] = {}  # value and candidate of those scored on all examples
    lowest, waiting = np.inf, 0
    rng = np.random.default_rng(plan.seed)
    try:
        for generation in range(plan.num_generations):
            candidates, values, seen = _generation(evaluator, optimizer, list(examples), plan, rng)
            complete = [i for i in range(len(values)) if seen[i] == len(examples)]
            full |= {candidates[i].tobytes(): (values[i], candidates[i]) for i in complete}
            leader = min(complete, key=lambda i: values[i])
            entry = {
                "generation": generation,
                "best": float(-values[leader]),
                "mean": float(-values[complete].mean()),
                "elites": sorted((-values[complete]).tolist(), reverse=True)[: _elites(optimizer)],
                "incumbent": candidates[leader].tolist(),
                "rows": usage.rows,
            }
            outcome.history.append(entry)
            on_generation(entry)
            lowest, waiting = (values[leader], 0) if values[leader] < lowest else (lowest, waiting + 1)
            if stopped := _reason_to_stop(optimizer, plan, waiting, usage, begun, generation + 1):
                outcome.stopped = stopped
                break
        center = getattr(optimizer, "mean", None)
        simple = [start] if start is not None else []
        simple += [np.array(center, dtype=np.float64)] if center is not None and not callable(center) else []
        best = [x for _, x in sorted(full.values(), key=lambda pair: pair[0])[:FINALISTS]]
        outcome.finalists = chosen_first(evaluator, simple, best, examples, plan)
    except KeyboardInterrupt:
        if processes().num_processes > 1:  # the others may be anywhere
            raise
        outcome.stopped = "interrupted"
        ranked = sorted(full.values(), key=lambda pair: pair[0])
        outcome.finalists = [x for _, x in ranked[:FINALISTS]]
    return outcome


def chosen_first(
    evaluator: Evaluator,
    simple: Sequence[np.ndarray],
    best: Sequence[np.ndarray],
    examples: Sequence[int],
    plan: Plan,
) -> list[np.ndarray]:
    """
    The candidates, the chosen one first: each of the simple ones in turn and then the best of the rest takes the place
    of the one before only if it is better by more than the standard error of the difference (the one-standard-error
    rule, Hastie et al., The Elements of Statistical Learning, 7.10), or at all if the plan does not want that. For the
    best of many candidates on a few examples is mostly a lucky one, where the start of a search is none, and its mean
    less so. All are scored anew if the objective samples.
    """
    candidates = [*simple, *best]
    evaluator.new_round()
    scores = evaluator.scores(candidates, examples)
    gains = scores - np.array([[_penalty(evaluator, x, plan)] for x in candidates])
    means = gains.mean(axis=1)
    gains = per_question(evaluator.objective, examples, gains)
    chosen = 0
    for challenger in [*range(1, len(simple)), *([len(simple) + int(means[len(simple) :].argmax())] if best else [])]:
        difference = gains[challenger] - gains[chosen]
        noisy = plan.one_standard_error and len(difference) > 1
        error = difference.std(ddof=1) / np.sqrt(len(difference)) if noisy else 0.0
        if difference.mean() > error:
            chosen = challenger
    rest = [i for i in np.argsort(-means, kind="stable").tolist() if i != chosen]
    return [candidates[i] for i in (chosen, *rest)]


def per_question(objective: Any, examples: Sequence[int], scores: np.ndarray) -> np.ndarray:
    """`[..., examples]` → `[..., questions]`: examples with the same prompt are no independent evidence, so their mean
    is taken."""
    rows = [objective.examples[i] for i in examples]
    prompts = [json.dumps(row.get("prompt"), default=str) if isinstance(row, Mapping) else repr(row) for row in rows]
    _, question = np.unique(prompts, return_inverse=True)
    order = list(dict.fromkeys(question.tolist()))
    if len(order) == len(rows):
        return scores
    return np.stack([scores[..., question == number].mean(axis=-1) for number in order], axis=-1)


def _generation(
    evaluator: Evaluator, optimizer: Any, examples: list[int], plan: Plan, rng: np.random.Generator
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Ask, score, tell. Returns the candidates, their values, and on how many examples each was scored."""
    evaluator.new_round()
    candidates = [np.array(optimizer.ask(), dtype=np.float64) for _ in range(optimizer.population_size)]
    broadcast_object_list(candidates)  # an optimiser without a seed proposes others in each process
    penalties = np.array([_penalty(evaluator, x, plan) for x in candidates])
    if getattr(optimizer, "uses_gradient", False):
        score, gradient = evaluator.value_and_gradient(candidates[0], examples)
        values, seen = penalties - score, np.full(1, len(examples))
        slope = _penalty_gradient(evaluator, candidates[0], plan) - gradient
        optimizer.tell([(candidates[0], float(values[0]))], [slope])
        return candidates, values, seen
    if not plan.racing or len(examples) < 4:
        values = penalties - evaluator.scores(candidates, examples).mean(axis=1)
        seen = np.full(len(candidates), len(examples))
    else:
        values, seen = _race(
            evaluator, candidates, penalties, rng.permutation(examples).tolist(), 2 * _elites(optimizer)
        )
    optimizer.tell([(x, float(value)) for x, value in zip(candidates, values, strict=True)])
    return candidates, values, seen


def _race(
    evaluator: Evaluator, candidates: list[np.ndarray], penalties: np.ndarray, examples: list[int], keep: int
) -> tuple[np.ndarray, np.ndarray]:
    """Values of all candidates, those that were dropped behind those that were not; and on how many examples."""
    alive = np.arange(len(candidates))
    values, seen = np.empty(len(candidates)), np.empty(len(candidates), dtype=int)
    for share in (0.25, 0.5, 1.0):
        size = int(np.ceil(share * len(examples)))
        scores = evaluator.scores([candidates[i] for i in alive], examples[:size])
        values[alive], seen[alive] = penalties[alive] - scores.mean(axis=1), size
        if share < 1:
            survivors = max(min(keep, len(alive)), len(alive) // 2)
            alive = alive[np.argsort(values[alive], kind="stable")[:survivors]]
    last = values[alive].max()
    for size in sorted(set(seen) - {len(examples)}, reverse=True):
        dropped = seen == size
        values[dropped] += max(0.0, np.nextafter(last, np.inf) - values[dropped].min())
        last = values[dropped].max()
    return values, seen


def _elites(optimizer: Any) -> int:
    """How many candidates of a generation the next one mostly depends on; for CMA-ES, half of those with a weight."""
    return int(getattr(optimizer, "num_elites", max(1, optimizer.population_size // 4)))


def _penalty(evaluator: Evaluator, x: np.ndarray, plan: Plan) -> float:
    alpha = evaluator.space.weights(x)
    return float(plan.l1 * np.abs(alpha).sum(axis=0).mean() + plan.l2 * np.square(alpha).sum(axis=0).mean())


def _penalty_gradient(evaluator: Evaluator, x: np.ndarray, plan: Plan) -> np.ndarray:
    alpha = evaluator.space.weights(x)
    slope: np.ndarray = (plan.l1 * np.sign(alpha) + 2 * plan.l2 * alpha) / alpha.shape[1]
    return slope.ravel()


def _reason_to_stop(
    optimizer: Any, plan: Plan, waiting: int, usage: Usage, start: Usage, generations: int
) -> str | None:
    if hasattr(optimizer, "should_stop") and optimizer.should_stop():
        return "optimizer"
    if plan.patience is not None and waiting >= plan.patience:
        return "patience"
    spent = {name: value - getattr(start, name) for name, value in asdict(usage).items()}
    each = Usage(**{name: value / generations for name, value in spent.items()})
    reason: list[str | None] = [plan.limits.reached(Usage(**spent), each)]
    broadcast_object_list(reason)  # the clocks of several processes differ
    return reason[0]
