"""Answers that are known to be worth something: the gradient of an expected reward is made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from accelerate.utils import gather_object

from ..scoring.expected_reward import TEMPERATURE
from ..utils.processes import processes
from .evaluator import Evaluator, Usage

SAMPLES = 4


@dataclass
class Answers:
    """
    Answers to examples, with every reward that each of them got.

    Attributes:
        rewards: For each example, the tokens of an answer → its rewards; the most frequent answers first.
        usage: What it cost to get them by sampling, in rows and tokens.
        decoded: The scores of answers as the objective decodes, a state of an [`Evaluator`].
    """

    rewards: list[dict[tuple[int, ...], list[float]]]
    usage: Usage = field(default_factory=Usage)
    decoded: list[dict[str, Any]] = field(default_factory=list)

    def means(self) -> list[list[tuple[list[int], float]]]:
        """The answers to each example with the mean of their rewards."""
        return [[(list(ids), float(np.mean(its))) for ids, its in answers.items()] for answers in self.rewards]

    def state_dict(self) -> dict[str, Any]:
        """As JSON-serialisable values."""
        rewards = [[[list(ids), its] for ids, its in answers.items()] for answers in self.rewards]
        usage = {"rows": self.usage.rows, "tokens": self.usage.tokens}
        return {"rewards": rewards, "decoded": self.decoded, **usage}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], examples: int) -> Answers:
        """What a `state_dict` is of.

        Raises:
            ValueError: Answers to another number of examples, or rewards that are not finite.
        """
        rewards = [
            {tuple(map(int, ids)): [float(reward) for reward in its] for ids, its in answers}
            for answers in state["rewards"]
        ]
        if len(rewards) != examples:
            raise ValueError(f"it has answers to {len(rewards)} examples, not {examples}")
        if not all(its and all(map(math.isfinite, its)) for answers in rewards for its in answers.values()):
            raise ValueError("some answers have no finite rewards")
        return cls(rewards, Usage(int(state["rows"]), int(state["tokens"])), list(state["decoded"]))


def collect_answers(
    evaluator: Evaluator,
    candidates: Sequence[np.ndarray],
    samples: int = SAMPLES,
    temperature: float = TEMPERATURE,
) -> Answers:
    """
    Let candidates answer all examples, once as the objective decodes and then by sampling, and see what the
    rewards say.

    With several processes, each gets the answers of all.

    Args:
        evaluator ([`Evaluator`]): Has the model and a [`RewardObjective`], and has not been asked yet. The cost is
            counted to it, and it knows the scores as decoded afterwards.
        candidates (`Sequence[np.ndarray]`): Who answers.
        samples (`int`): How often each candidate answers by sampling.
        temperature (`float`): At which it samples.
    """
    objective: Any = evaluator.objective
    examples = range(len(objective.examples))
    heard: list[tuple[int, tuple[int, ...], float]] = []

    def hear(indices: Sequence[int], answers: list[list[int]], rewards: list[float]) -> None:
        heard.extend(zip(indices, map(tuple, answers), rewards, strict=True))

    evaluator.objective = objective.heard_by(hear)
    evaluator.scores(candidates, examples)
    evaluator.objective = objective
    sampling = Evaluator(
        evaluator.model,
        evaluator.space,
        objective.sampling(temperature).heard_by(hear),
        batch_size=evaluator.batch_size,
        seed=evaluator.seed + (not objective.deterministic),  # or the same answers would be drawn twice
    )
    sampling.on_rows = evaluator.on_rows
    for _ in range(samples):
        sampling.new_round()
        sampling.scores(candidates, examples)
    evaluator.batch_size = sampling.batch_size
    evaluator.usage.add(sampling.usage)

    everything = gather_object(heard) if processes().num_processes > 1 else heard
    rewards: list[dict[tuple[int, ...], list[float]]] = [{} for _ in examples]
    for i, ids, reward in sorted(everything):
        if ids:  # nothing but padding tells nothing
            rewards[i].setdefault(ids, []).append(reward)
    frequent = [dict(sorted(answers.items(), key=lambda pair: -len(pair[1]))) for answers in rewards]
    return Answers(frequent, sampling.usage, evaluator.state_dict())
