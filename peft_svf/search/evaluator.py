"""Scores of many mixtures on many examples: each row of a batch is one example, answered by one candidate."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from ..scoring.expected_reward import ExpectedRewardObjective
from ..scoring.objectives import Objective, RewardObjective
from ..scoring.prefix import Prefix, read_prefix
from ..utils.processes import processes
from .space import WeightSpace

# Rows that a batch starts with: enough to be bound by arithmetic, and lowered where memory does not last.
ROWS_ON_CPU, ROWS_ON_ACCELERATOR = 64, 512

T = TypeVar("T")


@dataclass
class Usage:
    """What a search has spent.

    Attributes:
        rows: Pairs of a candidate and an example that were evaluated.
        tokens: Tokens that the model read and wrote for them; a prompt counts whole, even if its beginning was read
            for several at once.
        seconds: Wall time.
    """

    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, other: Usage) -> None:
        """Count in what another search has spent."""
        self.rows += other.rows
        self.tokens += other.tokens
        self.seconds += other.seconds


class Evaluator:
    """
    Scores candidates on the examples of an objective. Nothing is merged, copied or reloaded: the rows of a batch carry
    their mixtures, no pair is evaluated twice, and what all prompts begin with is read once for each candidate.

    With several processes, batches are dealt out to them, and all get all scores. Batches do not depend on the number
    of processes, nor do the random numbers of an objective that samples, so neither do the scores, up to rounding.

    Args:
        model: The `PeftModel` with the experts.
        space ([`WeightSpace`]): What a candidate means.
        objective ([`Objective`]): What it is scored by.
        batch_size (`int`, *optional*): Rows per batch. By default 64 on a CPU and 512 on an accelerator; halved
            whenever memory does not last.
        seed (`int`): Seed of objectives that sample.
    """

    def __init__(
        self, model: Any, space: WeightSpace, objective: Objective, *, batch_size: int | None = None, seed: int = 0
    ) -> None:
        self.model, self.space, self.objective, self.seed = model, space, objective, seed
        self.batch_size = batch_size or (ROWS_ON_CPU if model.device.type == "cpu" else ROWS_ON_ACCELERATOR)
        self.usage = Usage()
        self.on_rows: Callable[[int], None] = _nothing
        self._lengths = objective.lengths()
        # α as bytes → score and tokens by example; of an objective that samples, for one round only
        self._known: dict[tuple[int, bytes], dict[int, tuple[float, int]]] = {}
        self._stored: dict[tuple[int, bytes], dict[int, tuple[float, int]]] = {}  # the same, from a checkpoint
        self._climbed: set[tuple[int, bytes]] = set()  # those whose gradient was asked for
        self._round = self._call = self._dealt = 0
        reader = objective.read if isinstance(objective, ExpectedRewardObjective) else objective.score
        takes_prefix = "prefix" in inspect.signature(reader).parameters
        self._prefix_ids: list[int] = getattr(objective, "prefix_ids", []) if takes_prefix else []
        self._prefix: Prefix | None = None  # a row for each candidate that was met lately
        self._prefix_rows: dict[bytes, int] = {}
        self._share = False  # whether candidates have several examples now

    @property
    def evaluations(self) -> int:
        """Number of different mixtures that were scored, anew in each round if the objective samples."""
        return len({key for key, scores in self._known.items() if scores} | self._climbed)

    def new_round(self) -> None:
        """From here on, objectives that sample are asked anew about candidates that they know."""
        self._round, self._call = self._round + 1, 0
        self._forget_prefixes()

    def scores(self, candidates: Sequence[np.ndarray], examples: Sequence[int]) -> np.ndarray:
        """
        Score of every candidate on every one of these examples, `[candidates, examples]`.

        Raises:
            RuntimeError: It failed in another process; the message is that of the process.
            Exception: Whatever a reward function raises.
        """
        self._share = len(examples) > 1
        self._call += 1
        known = [self._recall(x, examples) for x in candidates]
        distinct = {id(scores): (scores, x) for scores, x in zip(known, candidates, strict=True)}
        pairs = [(scores, x, i) for scores, x in distinct.values() for i in examples if i not in scores]
        # longest first: if memory does not last, that shows at once
        pairs.sort(key=lambda pair: -self._lengths[pair[2]])
        if processes().num_processes > 1:  # a gradient may have lowered it in one of them
            self.batch_size = min(gather_object([self.batch_size]))
        while pairs:
            batches = self._batches(pairs, [self._rows_of(example) for *_, example in pairs])
            with self._timed():
                for i, found, tokens in self._of_all_processes(batches):
                    shares = np.diff(np.linspace(0, tokens, len(found) + 1).astype(int)).tolist()  # whole ones
                    for (scores, _, example), score, share in zip(batches[i], found, shares, strict=True):
                        scores[example] = score, share
            pairs = [pair for pair in pairs if pair[2] not in pair[0]]  # of batches that were too large
        return np.array([[scores[i][0] for i in examples] for scores in known])

    def value_and_gradient(self, x: np.ndarray, examples: Sequence[int]) -> tuple[float, np.ndarray]:
        """Mean score of a candidate on these examples, and its gradient with respect to the candidate, `[dim]`.

        Raises:
            ValueError: The objective cannot be differentiated.
        """
        check_differentiable(self.objective, self.space)
        self._climbed.add(self._key(x))
        left = sorted(examples, key=lambda i: -self._lengths[i])
        total, gradient, before = 0.0, np.zeros_like(x), self.objective.tokens
        with self._timed():
            while left:
                batch = self._batches(left, [self._rows_of(i) for i in left])[0]
                try:
                    score, found = self._slope(x, batch)
                except Exception as error:
                    if not should_reduce_batch_size(error) or len(batch) == 1:
                        raise
                    self.batch_size = sum(map(self._rows_of, batch)) // 2
                    clear_device_cache()
                    continue
                total, gradient, left = total + score, gradient + found, left[len(batch) :]
                self.usage.rows += len(batch)
                self.on_rows(len(batch))
        self.usage.tokens += self.objective.tokens - before
        return total / len(examples), gradient / len(examples)

    def asking(self, objective: Objective) -> Evaluator:
        """The same of another objective, which counts to the same usage."""
        other = Evaluator(self.model, self.space, objective, batch_size=self.batch_size, seed=self.seed)
        other.usage, other.on_rows, other._stored = self.usage, self.on_rows, self._stored
        return other

    # ------------------------------------------------------------------------------------------------ batches

    def _of_all_processes(self, batches: list[Any]) -> list[tuple[int, list[float], int]]:
        """Number, scores and tokens of the batches that fitted into memory."""
        state = processes()
        found: list[tuple[int, list[float], int]] = []
        error: Exception | None = None
        try:
            first = (state.process_index - self._dealt) % state.num_processes
            for i in range(first, len(batches), state.num_processes):
                before = self.objective.tokens
                try:
                    scores = self._run(batches[i], i)
                    found.append((i, scores, self.objective.tokens - before))
                except Exception as caught:
                    if not should_reduce_batch_size(caught) or len(batches[i]) == 1:
                        raise
                    self.batch_size = sum(self._rows_of(example) for *_, example in batches[i]) // 2
                    self._forget_prefixes()
                    break
                self.on_rows(len(batches[i]) * state.num_processes)
        except Exception as caught:
            error = caught
        self._dealt += len(batches)  # so that it is not always the first process that has one batch more
        clear_device_cache()
        message = None if error is None else f"{type(error).__name__}: {error}"
        mine = (found, self.batch_size, message)
        every = gather_object([mine]) if state.num_processes > 1 else [mine]
        if error is not None:
            raise error
        for rank, (*_, message) in enumerate(every):
            if message is not None:
                raise RuntimeError(f"The evaluation failed in process {rank}: {message}")
        self.batch_size = min(size for _, size, _ in every)
        results = [batch for its, *_ in every for batch in its]
        self.usage.tokens += sum(tokens for *_, tokens in results)
        self.usage.rows += sum(len(scores) for _, scores, _ in results)
        return results

    def _run(self, batch: list[Any], number: int) -> list[float]:
        alphas = [self.space.weights(x) for _, x, _ in batch]
        indices = [example for _, _, example in batch]
        prefix = self._read_prefixes(alphas)
        with self._seeded(number):
            found = self._apply(self.objective.score, self._tensor(alphas), indices, prefix)
        scores = [float(score) for score in found]
        if len(scores) != len(indices):
            raise ValueError(
                f"The objective {self.objective.name!r} returned {len(scores)} scores for {len(indices)} examples."
            )
        for example, score in zip(indices, scores, strict=True):
            if not math.isfinite(score):
                raise ValueError(
                    f"The objective {self.objective.name!r} returned {score} for example {example}; expected a finite "
                    f"number.\n{self.objective.examples[example]}"
                )
        return scores

    @torch.enable_grad()
    def _slope(self, x: np.ndarray, batch: list[int]) -> tuple[float, np.ndarray]:
        """Sum of the scores of these examples, and its gradient."""
        variables = torch.tensor(self.space.weights(x), dtype=torch.float32, requires_grad=True)
        alpha = variables.to(self.model.device)
        prefix = None
        if self._prefix_ids and len(batch) > 1:
            with self._mixtures(alpha[None]):
                prefix = read_prefix(self.model, self._prefix_ids, 1)
            if prefix is None:
                self._prefix_ids = []  # this model cannot share them
        differentiable = cast(Any, self.objective).differentiable
        prefix = None if prefix is None else prefix.rows([0] * len(batch))
        score = self._apply(differentiable, alpha.expand(len(batch), -1, -1), batch, prefix).sum()
        if not score.requires_grad:  # the mixture has no part in it
            return score.item(), np.zeros_like(x)
        (found,) = torch.autograd.grad(score, variables)
        return score.item(), found.flatten().double().numpy()

    def _apply(
        self, method: Callable[..., Any], alphas: torch.Tensor, indices: list[int], prefix: Prefix | None
    ) -> Any:
        """A method of the objective for these examples, each with a mixture of its own."""
        objective, given = self.objective, {} if prefix is None else {"prefix": prefix}
        if not isinstance(objective, ExpectedRewardObjective):
            with self._mixtures(alphas):
                return method(self.model, indices, **given)
        rows = torch.tensor([objective.count(i) for i in indices], device=alphas.device)
        if not rows.any():
            return method(self.model, indices)
        with self._mixtures(alphas), torch.set_grad_enabled(alphas.requires_grad):
            prompts = objective.read(self.model, indices, **given)
        with self._mixtures(alphas.repeat_interleave(rows, dim=0)):
            return method(self.model, indices, prompts)

    def _rows_of(self, example: int) -> int:
        objective = self.objective
        return max(1, objective.count(example)) if isinstance(objective, ExpectedRewardObjective) else 1

    def _batches(self, items: list[T], rows: Sequence[int]) -> list[list[T]]:
        """Items in turn, in batches of as many rows as fit, at least one item in each."""
        batches: list[list[T]] = []
        room = 0
        for item, count in zip(items, rows, strict=True):
            if not batches or count > room:
                batches.append([])
                room = self.batch_size
            batches[-1].append(item)
            room -= count
        return batches

    def _read_prefixes(self, alphas: list[np.ndarray]) -> Prefix | None:
        """What the prompts begin with, as read with the mixture of each row; `None` if they have nothing in common."""
        if not self._prefix_ids or not self._share:
            return None
        keys = [alpha.tobytes() for alpha in alphas]
        distinct = dict(zip(keys, alphas, strict=True))
        if len(self._prefix_rows.keys() | distinct.keys()) > self.batch_size:
            self._forget_prefixes()
        if new := [key for key in distinct if key not in self._prefix_rows]:
            with torch.no_grad(), self._mixtures(self._tensor([distinct[key] for key in new])):
                found = read_prefix(self.model, self._prefix_ids, len(new))
            if found is None:
                self._prefix_ids = []  # this model cannot share them
                return None
            self._prefix_rows |= {key: len(self._prefix_rows) + i for i, key in enumerate(new)}
            self._prefix = found if self._prefix is None else self._prefix + found
        assert self._prefix is not None
        return self._prefix.rows([self._prefix_rows[key] for key in keys])

    def _forget_prefixes(self) -> None:
        self._prefix, self._prefix_rows = None, {}

    @contextmanager
    def _mixtures(self, alphas: torch.Tensor) -> Iterator[None]:
        """Rows with these α, `[rows, experts, groups]`."""
        weights = alphas if self.space.group_of is not None else alphas[..., 0]
        with self.model.base_model.row_mixture(weights, self.space.experts, self.space.group_of):
            yield

    def _tensor(self, alphas: list[np.ndarray]) -> torch.Tensor:
        return torch.tensor(np.array(alphas), dtype=torch.float32, device=self.model.device)

    @contextmanager
    def _seeded(self, number: int) -> Iterator[None]:
        if self.objective.deterministic:
            yield
            return
        devices = [] if self.model.device.type == "cpu" else [self.model.device]
        with torch.random.fork_rng(devices, device_type=self.model.device.type if devices else "cuda"):
            seed = np.random.SeedSequence([self.seed, self._round, self._call, number]).generate_state(1)[0]
            torch.manual_seed(int(seed))
            yield

    def _key(self, x: np.ndarray) -> tuple[int, bytes]:
        return 0 if self.objective.deterministic else self._round, self.space.weights(x).tobytes()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.usage.seconds += time.perf_counter() - start

    # ------------------------------------------------------------------------------------------------ memory

    def _recall(self, x: np.ndarray, examples: Sequence[int]) -> dict[int, tuple[float, int]]:
        """What is known of a candidate. What a checkpoint knew counts as spent, or a limit would be another one."""
        key = self._key(x)
        known, stored = self._known.setdefault(key, {}), self._stored.get(key, {})
        taken = {i: stored[i] for i in examples if i in stored and i not in known}
        known |= taken
        self.usage.rows += len(taken)
        self.usage.tokens += sum(tokens for _, tokens in taken.values())
        if taken:
            self.on_rows(len(taken))
        return known

    def state_dict(self) -> list[dict[str, Any]]:
        """All scores, as JSON-serialisable values."""
        keys = {**self._stored, **self._known}
        everything = {key: {**self._stored.get(key, {}), **self._known.get(key, {})} for key in keys}
        return [
            {
                "round": number,
                "weights": np.frombuffer(alpha).tolist(),
                "examples": list(its),
                "scores": [score for score, _ in its.values()],
                "tokens": [tokens for _, tokens in its.values()],
            }
            for (number, alpha), its in everything.items()
            if its
        ]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """Know the scores of a `state_dict` when they are asked for.

        Raises:
            ValueError: See `parsed`.
        """
        self._stored = self.parsed(state)

    def parsed(self, state: Sequence[dict[str, Any]]) -> dict[tuple[int, bytes], dict[int, tuple[float, int]]]:
        """What is in a `state_dict`.

        Raises:
            ValueError: A score that is not finite, or other than as many of everything.
        """
        if not all(math.isfinite(score) for entry in state for score in entry["scores"]):
            raise ValueError("some scores are not finite")
        if not all(len(entry["weights"]) == self.space.dim for entry in state):
            raise ValueError(f"some candidates have other than {self.space.dim} weights")
        return {
            (entry["round"], np.array(entry["weights"], dtype=np.float64).tobytes()): dict(
                zip(entry["examples"], zip(entry["scores"], entry["tokens"], strict=True), strict=True)
            )
            for entry in state
        }


def check_differentiable(objective: Objective, space: WeightSpace) -> None:
    """
    Raises:
        ValueError: There is no gradient.
    """
    if not hasattr(objective, "differentiable"):
        if isinstance(objective, RewardObjective):
            raise ValueError(
                f"{type(objective).__name__} has a `score` of its own, of which no gradient is known. Take another "
                "optimizer, such as 'cem', or a plain `RewardObjective`."
            )
        raise ValueError(
            f"The objective {objective.name!r} has no gradient, which rewards and the log-likelihood have, each alone. "
            "Take another optimizer, such as 'cem'."
        )
    if space.normalize:
        raise ValueError("`normalize` cannot be differentiated; take another optimizer, such as 'cem'.")


def _nothing(rows: int) -> None:
    """Nobody wants to know."""
