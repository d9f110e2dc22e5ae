"""Scores of many candidates on many examples: each batch row is one example, answered by one candidate."""

from __future__ import annotations

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

from ..scoring.objectives import Objective
from ..scoring.prefix import Prefix, read_prefix
from ..utils.processes import processes
from .space import SearchSpace

# Batch rows to start with: enough to be bound by arithmetic, and halved when memory is short.
ROWS_ON_CPU, ROWS_ON_ACCELERATOR = 64, 512

T = TypeVar("T")


@dataclass
class Usage:
    """
    What a search has spent.

    Attributes:
        evaluations: Number of pairs of a candidate and an example that were scored.
        tokens: Number of tokens that the model read and wrote. A shared prefix counts for every prompt.
        seconds: Wall time.
    """

    evaluations: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, other: Usage) -> None:
        """Add what another evaluator has spent."""
        self.evaluations += other.evaluations
        self.tokens += other.tokens
        self.seconds += other.seconds


class Evaluator:
    """
    Score candidates on the examples of an objective.

    Nothing is merged, copied or reloaded: every batch row carries its candidate. No pair is scored twice, and the
    common prefix of all prompts is read once per candidate.

    With several processes, each scores a part of the batches, and all get all scores. Neither the batches nor the
    random numbers depend on the number of processes, so the scores do not either, up to rounding.

    Args:
        model (`PeftModel`): The model.
        space ([`SearchSpace`]): What a candidate means.
        objective ([`Objective`]): What it is scored by.
        batch_size (`int`, *optional*): Batch rows. By default 64 on a CPU and 512 on an accelerator. Halved whenever
            memory is short.
        seed (`int`): Seed of objectives that sample.
    """

    def __init__(
        self, model: Any, space: SearchSpace, objective: Objective, *, batch_size: int | None = None, seed: int = 0
    ) -> None:
        self.model, self.space, self.objective, self.seed = model, space, objective, seed
        self.batch_size = batch_size or (ROWS_ON_CPU if model.device.type == "cpu" else ROWS_ON_ACCELERATOR)
        self.usage = Usage()
        self.on_evaluations: Callable[[int], None] = _ignore
        self._lengths = objective.lengths()
        # round and candidate as bytes → score and tokens by example; round 0 if the objective is deterministic
        self._known: dict[tuple[int, bytes], dict[int, tuple[float, int]]] = {}
        self._stored: dict[tuple[int, bytes], dict[int, tuple[float, int]]] = {}  # the same, from a checkpoint
        self._with_gradient: set[tuple[int, bytes]] = set()
        self._round = self._call = self._dealt = 0
        self._prefix_ids = list(objective.prefix_ids) if objective.shares_prefix else []
        self._prefix: Prefix | None = None  # one row per recent candidate
        self._prefix_rows: dict[bytes, int] = {}
        self._share = False  # whether the present call has several examples per candidate

    @property
    def candidates(self) -> int:
        """Number of different candidates that were scored, per round if the objective samples."""
        return len({key for key, scores in self._known.items() if scores} | self._with_gradient)

    def new_round(self) -> None:
        """From here on, objectives that sample are asked again about candidates that were scored before."""
        self._round, self._call = self._round + 1, 0
        self._forget_prefixes()

    def scores(self, candidates: Sequence[np.ndarray], examples: Sequence[int]) -> np.ndarray:
        """
        Score every candidate on every one of these examples: `[candidates, examples]`.

        Raises:
            RuntimeError: Another process failed; the message is its error.
            ValueError: The objective returned another number of scores, or one that is not finite.
        """
        self._share = len(examples) > 1
        self._call += 1
        known = [self._recall(x, examples) for x in candidates]
        distinct = {id(scores): (scores, x) for scores, x in zip(known, candidates, strict=True)}
        pairs = [(scores, x, i) for scores, x in distinct.values() for i in examples if i not in scores]
        # longest first, so that a lack of memory shows at once
        pairs.sort(key=lambda pair: -self._lengths[pair[2]])
        if processes().num_processes > 1:  # a gradient may have halved it in one of them
            self.batch_size = min(gather_object([self.batch_size]))
        while pairs:
            batches = self._batches(pairs, [self.objective.batch_rows(i) for *_, i in pairs])
            with self._timed():
                for i, found, tokens in self._of_all_processes(batches):
                    shares = np.diff(np.linspace(0, tokens, len(found) + 1).astype(int)).tolist()  # whole ones
                    for (scores, _, example), score, share in zip(batches[i], found, shares, strict=True):
                        scores[example] = score, share
            pairs = [pair for pair in pairs if pair[2] not in pair[0]]  # of batches that were too large
        return np.array([[scores[i][0] for i in examples] for scores in known])

    def value_and_gradient(self, x: np.ndarray, examples: Sequence[int]) -> tuple[float, np.ndarray]:
        """Return the mean score of a candidate on these examples, and its gradient `[dim]`.

        Raises:
            ValueError: The objective has no gradient.
        """
        if not self.objective.differentiable:
            raise ValueError(f"The objective {self.objective.name!r} has no gradient.")
        self._with_gradient.add(self._key(x))
        left = sorted(examples, key=lambda i: -self._lengths[i])
        total, gradient, before = 0.0, np.zeros_like(x), self.objective.tokens
        with self._timed():
            while left:
                batch = self._batches(left, [self.objective.batch_rows(i) for i in left])[0]
                try:
                    score, found = self._sum_and_gradient(x, batch)
                except Exception as error:
                    if not should_reduce_batch_size(error) or len(batch) == 1:
                        raise
                    self.batch_size = sum(map(self.objective.batch_rows, batch)) // 2
                    clear_device_cache()
                    continue
                total, gradient, left = total + score, gradient + found, left[len(batch) :]
                self.usage.evaluations += len(batch)
                self.on_evaluations(len(batch))
        self.usage.tokens += self.objective.tokens - before
        return total / len(examples), gradient / len(examples)

    def for_objective(self, objective: Objective) -> Evaluator:
        """Return an evaluator of another objective, which shares the usage of this one."""
        return self._other(self.space, objective)

    def for_space(self, space: SearchSpace) -> Evaluator:
        """Return an evaluator of another space, which shares the usage of this one and knows the scores of the
        baselines."""
        other, theirs = self._other(space, self.objective), space.baselines()
        for name, x in self.space.baselines().items():
            other._known[other._key(theirs[name])] = dict(self._known.get(self._key(x), {}))
        return other

    def _other(self, space: SearchSpace, objective: Objective) -> Evaluator:
        other = Evaluator(self.model, space, objective, batch_size=self.batch_size, seed=self.seed)
        other.usage, other.on_evaluations = self.usage, self.on_evaluations
        return other

    # ------------------------------------------------------------------------------------------------ batches

    def _of_all_processes(self, batches: list[Any]) -> list[tuple[int, list[float], int]]:
        """Return number, scores and tokens of the batches that fitted into memory."""
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
                    self.batch_size = sum(self.objective.batch_rows(example) for *_, example in batches[i]) // 2
                    self._forget_prefixes()
                    break
                self.on_evaluations(len(batches[i]) * state.num_processes)
        except Exception as caught:
            error = caught
        self._dealt += len(batches)  # so that the first process does not always get the odd batch
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
        self.usage.evaluations += sum(len(scores) for _, scores, _ in results)
        return results

    def _run(self, batch: list[Any], number: int) -> list[float]:
        vectors = [x for _, x, _ in batch]
        indices = [example for _, _, example in batch]
        prefix = self._read_prefixes(vectors)
        with self._seeded(number):
            found = self._apply(self.objective.score, self._tensor(vectors), indices, prefix)
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
    def _sum_and_gradient(self, x: np.ndarray, batch: list[int]) -> tuple[float, np.ndarray]:
        """Return the sum of the scores of these examples, and its gradient."""
        variables = torch.tensor(x, dtype=torch.float32, requires_grad=True)
        vector = variables.to(self.model.device)
        prefix = None
        if self._prefix_ids and len(batch) > 1:
            with self.space.in_rows(self.model, vector[None]):
                prefix = read_prefix(self.model, self._prefix_ids, 1)
            if prefix is None:
                self._prefix_ids = []  # this model cannot continue from them
        score_tensor = cast(Any, self.objective).score_tensor
        prefix = None if prefix is None else prefix.rows([0] * len(batch))
        score = self._apply(score_tensor, vector.expand(len(batch), -1), batch, prefix).sum()
        if not score.requires_grad:  # no answer of the batch counts
            return score.item(), np.zeros_like(x)
        (found,) = torch.autograd.grad(score, variables)
        return score.item(), found.double().numpy()

    def _apply(self, method: Callable[..., Any], x: torch.Tensor, indices: list[int], prefix: Prefix | None) -> Any:
        """Call a method of the objective for these examples, example i with candidate `x[i]`."""
        objective, given = cast(Any, self.objective), {} if prefix is None else {"prefix": prefix}
        if not objective.reads_prompts:
            with self.space.in_rows(self.model, x):
                return method(self.model, indices, **given)
        rows = torch.tensor([objective.num_answers(i) for i in indices], device=x.device)
        if not rows.any():
            return method(self.model, indices)
        with self.space.in_rows(self.model, x), torch.set_grad_enabled(x.requires_grad):
            prompts = objective.read(self.model, indices, **given)
        with self.space.in_rows(self.model, x.repeat_interleave(rows, dim=0)):
            return method(self.model, indices, prompts)

    def _batches(self, items: list[T], rows: Sequence[int]) -> list[list[T]]:
        """Put items into batches of at most `batch_size` rows, in order, at least one item in each."""
        batches: list[list[T]] = []
        room = 0
        for item, count in zip(items, rows, strict=True):
            if not batches or count > room:
                batches.append([])
                room = self.batch_size
            batches[-1].append(item)
            room -= count
        return batches

    def _read_prefixes(self, vectors: list[np.ndarray]) -> Prefix | None:
        """Return the common prefix as read by the candidate of each row; `None` if the prompts have none."""
        if not self._prefix_ids or not self._share:
            return None
        keys = [x.tobytes() for x in vectors]
        distinct = dict(zip(keys, vectors, strict=True))
        if len(self._prefix_rows.keys() | distinct.keys()) > self.batch_size:
            self._forget_prefixes()
        if new := [key for key in distinct if key not in self._prefix_rows]:
            with torch.no_grad(), self.space.in_rows(self.model, self._tensor([distinct[key] for key in new])):
                found = read_prefix(self.model, self._prefix_ids, len(new))
            if found is None:
                self._prefix_ids = []  # this model cannot continue from them
                return None
            self._prefix_rows |= {key: len(self._prefix_rows) + i for i, key in enumerate(new)}
            self._prefix = found if self._prefix is None else self._prefix + found
        assert self._prefix is not None
        return self._prefix.rows([self._prefix_rows[key] for key in keys])

    def _forget_prefixes(self) -> None:
        self._prefix, self._prefix_rows = None, {}

    def _tensor(self, vectors: list[np.ndarray]) -> torch.Tensor:
        return torch.tensor(np.array(vectors), dtype=torch.float32, device=self.model.device)

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
        return 0 if self.objective.deterministic else self._round, np.asarray(x, dtype=np.float64).tobytes()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.usage.seconds += time.perf_counter() - start

    # ------------------------------------------------------------------------------------------------ memory

    def _recall(self, x: np.ndarray, examples: Sequence[int]) -> dict[int, tuple[float, int]]:
        """Return the known scores of a candidate. Those of a checkpoint count as spent, as if they were made now."""
        key = self._key(x)
        known, stored = self._known.setdefault(key, {}), self._stored.get(key, {})
        taken = {i: stored[i] for i in examples if i in stored and i not in known}
        known |= taken
        self.usage.evaluations += len(taken)
        self.usage.tokens += sum(tokens for _, tokens in taken.values())
        if taken:
            self.on_evaluations(len(taken))
        return known

    def state_dict(self) -> list[dict[str, Any]]:
        """Return all scores as JSON-serializable values."""
        keys = {**self._stored, **self._known}
        everything = {key: {**self._stored.get(key, {}), **self._known.get(key, {})} for key in keys}
        return [
            {
                "round": number,
                "candidate": np.frombuffer(x).tolist(),
                "examples": list(its),
                "scores": [score for score, _ in its.values()],
                "tokens": [tokens for _, tokens in its.values()],
            }
            for (number, x), its in everything.items()
            if its
        ]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """Take the scores of a `state_dict`, which are used when they are asked for.

        Raises:
            ValueError: A score is not finite, a candidate has another number of variables, or the lengths differ.
        """
        if not all(math.isfinite(score) for entry in state for score in entry["scores"]):
            raise ValueError("some scores are not finite")
        if not all(len(entry["candidate"]) == self.space.dim for entry in state):
            raise ValueError(f"some candidates do not have {self.space.dim} variables")
        self._stored = {
            (entry["round"], np.array(entry["candidate"], dtype=np.float64).tobytes()): dict(
                zip(entry["examples"], zip(entry["scores"], entry["tokens"], strict=True), strict=True)
            )
            for entry in state
        }


def _ignore(count: int) -> None:
    """No progress callback."""
