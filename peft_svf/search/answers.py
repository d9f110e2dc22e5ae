"""Answers to the examples with their rewards, from which the expected reward is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from accelerate.utils import gather_object

from ..utils.processes import processes
from .evaluator import Evaluator, Usage


@dataclass
class Answers:
    """
    Collected answers.

    Attributes:
        rewards: For each example, the tokens of an answer → all rewards that it got; the most frequent answers first.
        usage: What sampling them cost.
        decoded: The scores of the answers decoded as the objective says, a state of an [`Evaluator`].
    """

    rewards: list[dict[tuple[int, ...], list[float]]]
    usage: Usage = field(default_factory=Usage)
    decoded: list[dict[str, Any]] = field(default_factory=list)

    def means(self) -> list[list[tuple[list[int], float]]]:
        """Return the answers to each example with the mean of their rewards."""
        return [[(list(ids), float(np.mean(each))) for ids, each in answers.items()] for answers in self.rewards]

    def state_dict(self) -> dict[str, Any]:
        """Return everything as JSON-serializable values."""
        rewards = [[[list(ids), each] for ids, each in answers.items()] for answers in self.rewards]
        usage = {"evaluations": self.usage.evaluations, "tokens": self.usage.tokens}
        return {"rewards": rewards, "decoded": self.decoded, **usage}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], examples: int, vocabulary: int) -> Answers:
        """Return the answers of a `state_dict`.

        Args:
            state: The state.
            examples (`int`): Number of examples.
            vocabulary (`int`): Number of tokens that the model knows.

        Raises:
            ValueError: Another number of examples, a reward that is not finite, or an unknown token.
        """
        rewards = [
            {tuple(map(int, ids)): [float(reward) for reward in each] for ids, each in answers}
            for answers in state["rewards"]
        ]
        if len(rewards) != examples:
            raise ValueError(f"it has answers to {len(rewards)} examples, not {examples}")
        if not all(each and all(map(math.isfinite, each)) for answers in rewards for each in answers.values()):
            raise ValueError("some answers have no finite rewards")
        if not all(0 <= token < vocabulary for answers in rewards for ids in answers for token in ids):
            raise ValueError(f"some answers have tokens beyond the {vocabulary} of the model")
        return cls(rewards, Usage(int(state["evaluations"]), int(state["tokens"])), list(state["decoded"]))


def collect_answers(
    evaluator: Evaluator, candidates: Sequence[np.ndarray], samples: int, temperature: float
) -> Answers:
    """
    Let candidates answer all examples, once as the objective decodes and then by sampling, and reward the answers.

    With several processes, each gets the answers of all.

    Args:
        evaluator ([`Evaluator`]): Has an objective with `rewards_answers`, and has scored nothing yet. It knows the
            scores of the decoded answers afterwards, and its usage includes the samples.
        candidates (`Sequence[np.ndarray]`): Who answers.
        samples (`int`): Samples per candidate and example.
        temperature (`float`): Temperature of the samples.
    """
    objective: Any = evaluator.objective
    examples = range(len(objective.examples))
    collected: list[tuple[int, tuple[int, ...], float]] = []

    def collect(indices: Sequence[int], answers: list[list[int]], rewards: list[float]) -> None:
        collected.extend(zip(indices, map(tuple, answers), rewards, strict=True))

    evaluator.objective = objective.with_callback(collect)
    evaluator.scores(candidates, examples)
    evaluator.objective = objective
    sampling = Evaluator(
        evaluator.model,
        evaluator.space,
        objective.sampling(temperature).with_callback(collect),
        batch_size=evaluator.batch_size,
        seed=evaluator.seed + (not objective.deterministic),  # or the same answers would be drawn twice
    )
    sampling.on_evaluations = evaluator.on_evaluations
    for _ in range(samples):
        sampling.new_round()
        sampling.scores(candidates, examples)
    evaluator.batch_size = sampling.batch_size
    evaluator.usage.add(sampling.usage)

    everything = gather_object(collected) if processes().num_processes > 1 else collected
    rewards: list[dict[tuple[int, ...], list[float]]] = [{} for _ in examples]
    for i, ids, reward in sorted(everything):
        if ids:  # an answer of padding only has no tokens
            rewards[i].setdefault(ids, []).append(reward)
    frequent = [dict(sorted(answers.items(), key=lambda pair: -len(pair[1]))) for answers in rewards]
    return Answers(frequent, sampling.usage, evaluator.state_dict())
