"""A search together with its baselines, evaluated on examples that it did not use."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..scoring.expected_reward import ExpectedRewardObjective
from ..scoring.names import BASE
from ..scoring.objectives import Objective
from ..utils.processes import processes
from ..utils.progress import progress_bar, progress_note
from .answers import collect_answers
from .checkpoint import Checkpoint
from .config import SearchConfig, as_json
from .evaluator import Evaluator
from .in_context import in_context_scores
from .loop import EQUAL_SCORES, FINALISTS, Outcome, run_search
from .method import Method, choose_method, lack_of_signal
from .optimizers import Optimizer, make_optimizer
from .progress import SearchProgress, ignore
from .selection import per_question
from .space import SearchSpace
from .statistics import IN_CONTEXT, SEARCHED, compared, interval
from .validation import Split, questions

LONG = 600  # seconds of a search that is worth an estimate
GENERATIONS, STEPS = 6, 12  # default number of generations, and of steps of the gradient

Scored = list[tuple[np.ndarray, list[int]]]  # candidates with the examples that they are evaluated on


@dataclass
class Found:
    """
    What a search found.

    Attributes:
        space: The space that was searched.
        chosen: The vector to put in place, `[dim]`.
        searched: The vector that the search ended with, whether it was chosen or not.
        about: The fields of a [`SearchResult`].
    """

    space: SearchSpace
    chosen: np.ndarray
    searched: np.ndarray
    about: dict[str, Any]


@dataclass
class ValidatedSearch:
    """
    Score the baselines, search, and compare.

    Args:
        model (`PeftModel`): The model.
        objective ([`Objective`]): What candidates are scored by.
        split ([`Split`]): Which examples are for what.
        config ([`SearchConfig`]): The settings.
        make_space: Makes the space of a granularity.
        optimizer ([`Optimizer`], *optional*): A custom optimizer in the place of `config.method`.
        checkpoint ([`Checkpoint`], *optional*): Keeps the scores.
        on_progress: Called with the [`SearchProgress`] after each batch and each generation.
    """

    model: Any
    objective: Objective
    split: Split
    config: SearchConfig
    make_space: Callable[[Any], SearchSpace]
    optimizer: Optimizer | None = None
    checkpoint: Checkpoint | None = None
    on_progress: Callable[[SearchProgress], None] = ignore

    def run(self) -> Found:
        """Run everything. Ctrl-C ends it with what is known, once the baselines are scored.

        Raises:
            ValueError: The settings do not fit the objective, or the checkpoint does not belong to this search.
        """
        config, split = self.config, self.split
        distinct = len(set(questions(self.objective, split.search)))
        method = choose_method(config, self.objective, distinct, self.model, self.optimizer)
        space = self.make_space(method.granularity)
        rewarded = Evaluator(self.model, space, self.objective, batch_size=config.batch_size, seed=config.seed)
        self._method, self._evaluator = method, rewarded
        self._optimizer(config.seed, self._neutral())  # so that a wrong argument fails before the work
        if self.checkpoint is not None:
            decided = {"method": method.name, "granularity": method.granularity}
            self.checkpoint.open(rewarded, {**decided, "expected_reward": method.expected_reward})
        with progress_bar(desc=f"Searching ({self.objective.name})", unit="evaluation") as bar:
            progress = SearchProgress()

            def advance(count: int) -> None:
                bar.update(count)
                progress.done += count  # a bar that is disabled does not count
                progress.total = bar.total
                self.on_progress(progress)

            rewarded.on_evaluations = advance
            evaluator, collected = rewarded, 0
            if method.expected_reward:
                collected = (1 + config.num_samples) * len(space.baselines()) * len(self.objective.examples)
                bar.total = collected + len(space.baselines()) * len(split.search)
                evaluator = self._with_expected_reward(rewarded)
                method, rewarded, evaluator = self._checked(method, rewarded, evaluator)
            progress_note(f"Search: {method}.")
            self._method, self._evaluator, space = method, evaluator, evaluator.space
            if self.checkpoint is not None:
                self.checkpoint.load(evaluator)
            baselines = space.baselines()
            start = self._start(split.search)
            optimizer = self._optimizer(config.seed, start)
            bar.total = collected + self._evaluations(optimizer)
            scores = dict(zip(baselines, evaluator.scores([*baselines.values()], split.evaluated), strict=True))
            self._save()
            self._estimate(bar.total - bar.n)
            levels = {*evaluator.scores([*baselines.values()], split.search).mean(axis=1).tolist()}  # all are known
            prompted, interrupted = self._prompted(rewarded)

            def on_generation(entry: dict[str, Any]) -> None:
                bar.set_postfix(best=f"{entry['best']:.3f}", elites=f"{np.mean(entry['elites']):.3f}")
                self._save()
                progress.history.append(entry)
                self.on_progress(progress)

            self._options: dict[str, Any] = {
                "num_generations": 0 if interrupted else self._num_generations(optimizer),
                "max_seconds": self._seconds_per_search(),
                "level": levels.pop() if len(levels) == 1 else None,
                "on_generation": on_generation,
            }
            main = run_search(evaluator, optimizer, split.search, config, start=start, **self._options)
            if interrupted:
                main.stopped = "interrupted"
            if main.stopped == EQUAL_SCORES:
                warnings.warn(
                    "The search stopped: all baselines and candidates have the same score, "
                    f"{self._options['level']:.3g}. Check that the reward accepts the form of the answers, and that "
                    "max_new_tokens does not cut them off. Otherwise use easier examples.",
                    stacklevel=4,
                )
            searched, scores[SEARCHED], evaluated_on, evaluated_by = self._evaluated(main)
            self._save()
            objective, expected = evaluator.objective, dict[str, np.ndarray]()
            if method.expected_reward and (rewards := self._rewards(rewarded, evaluated_by, main)):
                objective, scores, expected = rewarded.objective, rewards, scores
            bar.total = bar.n  # racing and early stops leave some out
            bar.refresh()
        if prompted is not None and objective is rewarded.objective:
            scores[IN_CONTEXT] = prompted
        scores, expected = (
            {name: per_question(objective, split.evaluated, values) for name, values in kind.items()}
            for kind in (scores, expected)
        )
        # On the examples of the search itself, the expected reward is what was optimized, and decides nothing.
        best, beaten, difference = compared(scores, list(baselines), None if evaluated_on == "search" else expected)
        # cross-validation may find something where the search on all examples ended at a baseline
        new = not any(np.array_equal(searched, x) for x in baselines.values())
        choice, chosen = (SEARCHED, searched) if beaten and new else (best, baselines[best])
        about = {
            "score": float(scores[choice].mean()),
            "choice": choice,
            "scores": {name: float(values.mean()) for name, values in scores.items()},
            "expected": {name: float(values.mean()) for name, values in expected.items()},
            "intervals": {name: interval(values) for name, values in scores.items()},
            "difference": difference,
            "evaluated_on": evaluated_on,
            "num_evaluated": len(scores[choice]),
            "method": method.name,
            "reason": str(method),
            "objective": objective.name,
            "candidates": evaluator.candidates,
            "usage": evaluator.usage,
            "stopped": main.stopped,
            "history": main.history,
            "settings": self._settings(optimizer),
        }
        return Found(space, chosen, searched, about)

    # ------------------------------------------------------------------------------------------ expected reward

    def _with_expected_reward(self, rewarded: Evaluator) -> Evaluator:
        """Let the baselines answer the examples, or take the answers of the checkpoint. Return an evaluator of the
        expected reward, which shares the usage."""
        candidates, checkpoint = [*rewarded.space.baselines().values()], self.checkpoint
        answers = None if checkpoint is None else checkpoint.answers
        if answers is None:
            answers = collect_answers(rewarded, candidates, self.config.num_samples, self.config.temperature)
        else:
            rewarded.scores(candidates, range(len(self.objective.examples)))  # known, and counted as spent
            rewarded.on_evaluations(answers.usage.evaluations)
            rewarded.usage.add(answers.usage)
        examples = [
            {**row, "answers": pairs} for row, pairs in zip(self.objective.examples, answers.means(), strict=True)
        ]
        evaluator = rewarded.for_objective(
            ExpectedRewardObjective(examples, self.objective.tokenizer, temperature=self.config.temperature)
        )
        if checkpoint is not None and checkpoint.answers is None:
            checkpoint.answers = answers
            checkpoint.save(evaluator)
        return evaluator

    def _checked(
        self, method: Method, rewarded: Evaluator, evaluator: Evaluator
    ) -> tuple[Method, Evaluator, Evaluator]:
        """Fall back to the cross-entropy method on the reward if the answers cannot guide a search and nobody asked for
        them; warn otherwise."""
        scores = evaluator.scores([*evaluator.space.baselines().values()], self.split.search)
        lack = lack_of_signal(evaluator.objective, scores, self.split.search)  # type: ignore[arg-type]
        if lack is None:
            return method, rewarded, evaluator
        if self.config.method != "auto" or self.config.expected_reward or self.optimizer is not None:
            warnings.warn(
                f"The expected reward cannot guide the search: {lack}. Use another reward, or method='cem' without "
                "`expected_reward`.",
                stacklevel=4,
            )
            return method, rewarded, evaluator
        method = replace(
            method, name="cem", granularity=self.config.granularity or "expert", expected_reward=False, reason=lack
        )
        rewarded = rewarded.for_space(self.make_space(method.granularity))
        return method, rewarded, rewarded

    def _rewards(self, rewarded: Evaluator, evaluated_by: Scored, main: Outcome) -> dict[str, np.ndarray]:
        """Return the rewards of the baselines and of the searched candidate; none if that is interrupted."""
        baselines = rewarded.space.baselines()
        try:
            rewards = dict(zip(baselines, rewarded.scores([*baselines.values()], self.split.evaluated), strict=True))
            of_each = {
                i: reward
                for x, part in evaluated_by
                for i, reward in zip(part, rewarded.scores([x], part)[0], strict=True)
            }
            rewards[SEARCHED] = np.array([of_each[i] for i in self.split.evaluated])
        except KeyboardInterrupt:
            _interrupt(main)
            return {}
        if self.checkpoint is not None and self.checkpoint.answers is not None:
            self.checkpoint.answers.decoded = rewarded.state_dict()
            self._save()
        return rewards

    # ------------------------------------------------------------------------------------------ evaluation

    def _start(self, examples: list[int]) -> np.ndarray:
        """Return the best baseline on these examples, within the bounds: the first expert among equals, the neutral
        baseline if all are equal."""
        space = self._evaluator.space
        baselines = space.baselines()
        names = sorted(baselines, key=lambda name: (name == BASE, name == space.neutral))
        scores = self._evaluator.scores([baselines[name] for name in names], examples).mean(axis=1)
        best = baselines[space.neutral if scores.min() == scores.max() else names[int(scores.argmax())]]
        return np.clip(best, *_box(space))

    def _neutral(self) -> np.ndarray:
        """Return the neutral baseline, within the bounds."""
        space = self._evaluator.space
        return np.clip(space.baselines()[space.neutral], *_box(space))

    def _evaluated(self, main: Outcome) -> tuple[np.ndarray, np.ndarray, str, Scored]:
        """Return the searched candidate, its score of each evaluated example, what those examples are, and the
        candidates that were scored with their examples."""
        evaluator, split = self._evaluator, self.split
        # there is no finalist if the first generation was interrupted
        searched = main.finalists[0] if main.finalists else self._neutral()

        def score(examples: list[int]) -> np.ndarray:
            # once more if the objective samples: the best of several scores would be a lucky one
            evaluator.new_round()
            try:
                return evaluator.scores([searched], examples)[0]
            except KeyboardInterrupt:
                if main.stopped == "interrupted":
                    raise
                _interrupt(main)
                return evaluator.scores([searched], examples)[0]  # short, and nothing is left without it

        if split.held_out:
            return searched, score(split.held_out), "validation", [(searched, split.held_out)]
        if split.parts and main.finalists and main.stopped not in ("interrupted", EQUAL_SCORES):
            scores, by_part = np.empty(len(split.search)), []
            for number, part in enumerate(split.parts, start=1):
                rest = split.rest(part)
                try:
                    start = self._start(rest)
                    optimizer = self._optimizer(self.config.seed + number, start)
                    outcome = run_search(evaluator, optimizer, rest, self.config, start=start, **self._options)
                    if not outcome.finalists or outcome.stopped == "interrupted":
                        main.stopped = "interrupted"
                        break
                    evaluator.new_round()
                    scores[part] = evaluator.scores(outcome.finalists[:1], part)[0]
                    by_part.append((outcome.finalists[0], part))
                except KeyboardInterrupt:
                    _interrupt(main)
                    break
            else:
                return searched, scores, "cross-validation", by_part
        return searched, score(split.search), "search", [(searched, split.search)]

    def _prompted(self, rewarded: Evaluator) -> tuple[np.ndarray | None, bool]:
        """Return the scores of in-context prompting, and whether Ctrl-C was pressed."""
        try:
            return (in_context_scores(rewarded, self.split.groups()) if self.config.in_context else None), False
        except KeyboardInterrupt:
            if processes().num_processes > 1:
                raise
            return None, True

    # ------------------------------------------------------------------------------------------ settings

    def _optimizer(self, seed: int, start: np.ndarray) -> Optimizer:
        if self.optimizer is not None:
            return copy.deepcopy(self.optimizer) if self.split.parts else self.optimizer
        config = self.config
        return make_optimizer(
            self._method.name,
            self._evaluator.space,
            start=start,
            population_size=config.population_size,
            seed=seed,
            **config.optimizer_kwargs,
        )

    def _num_generations(self, optimizer: Optimizer) -> int:
        return self.config.num_generations or (STEPS if optimizer.uses_gradient else GENERATIONS)

    def _seconds_per_search(self) -> float | None:
        limit = self.config.max_seconds
        return None if limit is None else (limit - self._evaluator.usage.seconds) / (1 + len(self.split.parts))

    def _estimate(self, evaluations: int) -> None:
        """Say how long a long search will take, by the time of the baselines."""
        usage = self._evaluator.usage
        seconds = evaluations * usage.seconds / max(1, usage.evaluations)
        if self.config.max_seconds is None and seconds > LONG:
            time = f"{seconds / 3600:.1f} h" if seconds > 3600 else f"{seconds / 60:.0f} min"
            progress_note(f"The search will take up to about {time}. Shorten it with max_seconds or max_new_tokens.")

    def _settings(self, optimizer: Optimizer) -> dict[str, Any]:
        generation = self.objective.generation_kwargs
        led_to = {
            "method": self._method.name,
            "granularity": self._method.granularity,
            "expected_reward": self._method.expected_reward,
            "num_generations": self._num_generations(optimizer),
            "population_size": optimizer.population_size,
            "max_new_tokens": generation.get("max_new_tokens"),
            "generation_kwargs": generation,
            "examples": len(self.objective.examples),
        }
        settings: dict[str, Any] = as_json(vars(self.config) | led_to)
        return settings

    def _save(self) -> None:
        if self.checkpoint is not None:
            self.checkpoint.save(self._evaluator)

    def _evaluations(self, optimizer: Optimizer) -> int:
        """Return how many pairs of a candidate and an example are scored at most, without collected answers."""
        split, baselines = self.split, len(self._evaluator.space.baselines())
        searched = len(split.search) + sum(len(split.rest(part)) for part in split.parts)
        total = (baselines + 1) * (len(split.evaluated) + bool(split.held_out) * len(split.search))
        total += self._num_generations(optimizer) * optimizer.population_size * searched
        if optimizer.uses_gradient:  # a step scores no candidate, so the finalists are scored at the end
            total += (1 + FINALISTS) * searched
        if self._method.expected_reward:
            total += len(split.evaluated)
        return total


def _interrupt(main: Outcome) -> None:
    """Note Ctrl-C, or pass it on where other processes may be anywhere."""
    if processes().num_processes > 1:
        raise
    main.stopped = "interrupted"


def _box(space: SearchSpace) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and the upper bounds, each `[dim]`."""
    return space.bounds[:, 0], space.bounds[:, 1]
