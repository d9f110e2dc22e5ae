"""Question: which settings of the cross-entropy method suit a search over a few experts' weights?

    python benchmarks/cem_settings.py [--candidates N] [--rounds N]

No model is run. α moves in [0, 1]^5 from the uniform mixture. The loss around the right α is a random quadratic form as
overlapping experts of different strength make it. It is searched as it is, which is what a log-likelihood looks
like; and as the reward of 12 examples, each of which is answered rightly within a distance of its own from a place of
its own near the right α, and is then scored on 400 other examples. Every setting gets the same problems and as many
candidates. Seconds on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
from common import Record, argument_parser, parse

from peft_svf import CrossEntropyMethod

EXPERTS, SHOTS, OTHERS = 5, 12, 400


class Problem:
    """A task, with its right α."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(1000 + seed)
        parts = rng.normal(size=(EXPERTS, 3 * EXPERTS)) * np.exp(0.7 * rng.normal(size=(EXPERTS, 1)))
        form = parts @ parts.T
        self.form, self.right = form * EXPERTS / np.trace(form), rng.uniform(size=EXPERTS)
        count = SHOTS + OTHERS
        self.places = self.right + 0.25 * rng.normal(size=(count, EXPERTS))
        self.reach = rng.uniform(0, 0.6, size=count)

    def loss(self, x: np.ndarray) -> float:
        away = x - self.right
        return float(away @ self.form @ away)

    def cost(self, x: np.ndarray) -> float:
        """What a search by reward minimises."""
        return -self.accuracy(x, slice(SHOTS))

    def accuracy(self, x: np.ndarray, which: slice) -> float:
        away = x - self.places[which]
        return float(((away @ self.form * away).sum(-1) < self.reach[which]).mean())


def search(
    objective: Callable[[np.ndarray], float], candidates: int, seed: int, population: int, **settings: Any
) -> Any:
    """The mean, or the best candidate if that is better, as in `run_search`."""
    optimizer = CrossEntropyMethod(
        np.full(EXPERTS, 1 / EXPERTS),
        0.5,
        bounds=np.tile([0.0, 1.0], (EXPERTS, 1)),
        population_size=population,
        seed=seed,
        **settings,
    )
    seen: list[tuple[np.ndarray, float]] = []
    for _ in range(candidates // population):
        generation = [(x, objective(x)) for x in (optimizer.ask() for _ in range(population))]
        optimizer.tell(generation)
        seen += generation
    best, value = min(seen, key=lambda pair: pair[1])
    return optimizer.mean if objective(optimizer.mean) <= value else best


def main() -> None:
    parser: argparse.ArgumentParser = argument_parser(__doc__, rounds=60)
    parser.add_argument("--candidates", type=int, nargs="+", default=[96, 192, 320])
    arguments = parse(parser)
    record, results = Record(arguments, __doc__), {}
    problems = [Problem(seed) for seed in range(arguments.rounds)]
    for candidates in arguments.candidates:
        found = []
        for population, ratio, smoothing, floor in product(
            (8, 16, 32), (0.125, 0.2, 0.3), (0.0, 0.2), (0.0, 0.05, 0.1)
        ):
            settings = {"elite_ratio": ratio, "smoothing": smoothing, "min_std": floor}
            rewards, losses = [], []
            for seed, problem in enumerate(problems):
                x = search(problem.cost, candidates, seed, population, **settings)
                rewards.append(problem.accuracy(x, slice(SHOTS, None)))
                losses.append(problem.loss(search(problem.loss, candidates, seed, population, **settings)))
            found.append((population, ratio, smoothing, floor, float(np.mean(rewards)), float(np.mean(losses))))
        results[str(candidates)] = found
        found.sort(key=lambda row: -row[4])
        chosen = [row for row in found if row[:4] in ((32, 0.2, 0.0, 0.05), (16, 0.2, 0.2, 0.05), (16, 0.2, 0.0, 0.0))]
        record.table(
            f"{candidates} candidates: the best five and the worst by reward, then some by name",
            ["population", "elites", "smoothing", "floor", "accuracy on other examples", "loss of the smooth search"],
            [
                [f"{p}", f"{e:g}", f"{s:g}", f"{m:g}", f"{reward:.3f}", f"{loss:.4f}"]
                for p, e, s, m, reward, loss in [*found[:5], found[-1], *chosen]
            ],
        )
    record.raw(**results)
    record.write()


if __name__ == "__main__":
    main()
