"""A search with all that it takes to believe it: what needs no search beside it, and examples that it did not see."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from ..scoring.expected_reward import ExpectedRewardObjective
from ..utils.processes import processes
from ..utils.progress import progress_bar
from .answers import SAMPLES, collect_answers
from .checkpoint import Checkpoint
from .evaluator import Evaluator
from .in_context import in_context_scores
from .loop import FINALISTS, Outcome, Plan, per_question, run_search
from .result import MixtureResult
from .space import BASE, UNIFORM
from .statistics import IN_CONTEXT, SEARCHED, compared, interval
from .validation import Split

TINY = 1e-6  # expected rewards


@dataclass
class Procedure:
    """
    Score what needs no search, search, and compare.

    Args:
        evaluator ([`Evaluator`]): Scores candidates.
        split ([`Split`]): Which examples are for what.
        plan ([`Plan`]): How to search.
        make_optimizer: An optimiser for a seed, and where to start: at the best simple choice for the examples of its
            search.
        in_context (`bool`): Whether to score in-context prompting.
        checkpoint ([`Checkpoint`], *optional*): Where to keep the scores.
        by_answers (`bool`): Whether the objective is a reward, in whose place the expected one is to be searched for,
            as it has a gradient.
    """

    evaluator: Evaluator
    split: Split
    plan: Plan
    make_optimizer: Callable[[int, np.ndarray], Any]
    in_context: bool = True
    checkpoint: Checkpoint | None = None
    by_answers: bool = False

    def __call__(self, settings: dict[str, Any]) -> tuple[MixtureResult, np.ndarray]:
        """The result and the candidate to put in place."""
        evaluator, space, judged = self.evaluator, self.evaluator.space, self.split.judged
        simple = space.simple()
        if self.checkpoint is not None:
            self.checkpoint.load(evaluator)
        with progress_bar(desc=f"Searching ({evaluator.objective.name})", unit="row") as bar:
            evaluator.on_rows = bar.update
            if self.by_answers:
                bar.total = self._answered()
                self._learn_answers(list(simple.values()))
            rewarded, evaluator = evaluator, self.evaluator  # the same, but for `by_answers`
            start = self._start(self.split.search)
            optimizer = self.make_optimizer(self.plan.seed, start)
            bar.total = self._rows(optimizer)
            scores = dict(zip(simple, evaluator.scores(list(simple.values()), judged), strict=True))
            if self.by_answers:
                self._warn_of_no_gradient()
            if self.checkpoint is not None:
                self.checkpoint.save(evaluator)
            prompted, interrupted = None, False
            try:
                prompted = in_context_scores(rewarded, self.split.groups()) if self.in_context else None
            except KeyboardInterrupt:
                if processes().num_processes > 1:
                    raise
                interrupted = True
            plan = replace(self.plan, limits=self.plan.limits.left(evaluator.usage, 1 + len(self.split.folds)))
            if interrupted:
                plan = replace(plan, num_generations=0)

            def on_generation(entry: dict[str, Any]) -> None:
                elites = float(np.mean(entry["elites"]))
                bar.set_postfix(best=f"{entry['best']:.3f}", elites=f"{elites:.3f}")
                if self.checkpoint is not None:
                    self.checkpoint.save(evaluator)

            main = run_search(evaluator, optimizer, self.split.search, plan, on_generation, start)
            if interrupted:
                main.stopped = "interrupted"
            found, scores[SEARCHED], judged_on, judged_by = self._judge(main, plan, on_generation)
            objective, expected = evaluator.objective, dict[str, np.ndarray]()
            if self.by_answers and (rewards := self._rewards(rewarded, judged_by, main)):
                objective, scores, expected = rewarded.objective, rewards, scores
        if prompted is not None and objective is rewarded.objective:
            scores[IN_CONTEXT] = prompted
        scores, expected = (
            {name: per_question(objective, judged, values) for name, values in kind.items()}
            for kind in (scores, expected)
        )
        best, beaten, difference = compared(scores, list(simple), expected)
        # folds may have found something where the search did not
        new = not any(np.array_equal(found, x) for x in simple.values())
        choice, chosen = (SEARCHED, found) if beaten and new else (best, simple[best])
        alpha = space.weights(chosen)
        result = MixtureResult(
            weights=_per_expert(space.experts, alpha),
            score=float(scores[choice].mean()),
            choice=choice,
            scores={name: float(values.mean()) for name, values in scores.items()},
            expected={name: float(values.mean()) for name, values in expected.items()},
            intervals={name: interval(values) for name, values in scores.items()},
            difference=difference,
            judged_on=judged_on,
            judged=len(scores[choice]),
            searched_weights=_per_expert(space.experts, space.weights(found)),
            groups=space.groups,
            alpha=dict(zip(space.experts, alpha.tolist(), strict=True)),
            objective=objective.name,
            evaluations=evaluator.evaluations,
            usage=evaluator.usage,
            stopped=main.stopped,
            history=main.history,
            settings=settings,
        )
        return result, chosen

    def _rewards(
        self, rewarded: Evaluator, judged_by: list[tuple[np.ndarray, list[int]]], main: Outcome
    ) -> dict[str, np.ndarray]:
        """The rewards of the simple choices and of what was found, on the examples that are judged on; none if that is
        interrupted."""
        simple = rewarded.space.simple()
        try:
            rewards = dict(zip(simple, rewarded.scores(list(simple.values()), self.split.judged), strict=True))
            of_each = {
                i: reward
                for x, part in judged_by
                for i, reward in zip(part, rewarded.scores([x], part)[0], strict=True)
            }
            rewards[SEARCHED] = np.array([of_each[i] for i in self.split.judged])
        except KeyboardInterrupt:
            if processes().num_processes > 1:
                raise
            main.stopped = "interrupted"
            return {}
        if self.checkpoint is not None and self.checkpoint.answers is not None:
            self.checkpoint.answers.decoded = rewarded.state_dict()
            self.checkpoint.save(self.evaluator)
        return rewards

    def _judge(
        self, main: Outcome, plan: Plan, on_generation: Callable[[dict[str, Any]], None]
    ) -> tuple[np.ndarray, np.ndarray, str, list[tuple[np.ndarray, list[int]]]]:
        """The candidate that was found, its score of each example that is judged on, and what those are; and the
        candidates that were scored, with their examples."""
        evaluator, split = self.evaluator, self.split
        space = evaluator.space
        # without any, it was stopped at once
        found = main.finalists[0] if main.finalists else np.clip(space.simple()[UNIFORM], space.low, space.high)

        def score(examples: list[int]) -> np.ndarray:
            # anew if the objective samples, and one only: the best of several would be a lucky one
            evaluator.new_round()
            try:
                return evaluator.scores([found], examples)[0]
            except KeyboardInterrupt:
                if main.stopped == "interrupted" or processes().num_processes > 1:
                    raise
                main.stopped = "interrupted"
                return evaluator.scores([found], examples)[0]  # which is not long, and nothing without

        if split.held_out:
            return found, score(split.held_out), "validation", [(found, split.held_out)]
        if split.folds and main.finalists and main.stopped != "interrupted":
            out_of_fold, by_fold = np.empty(len(split.search)), []
            for number, fold in enumerate(split.folds, start=1):
                rest = [i for i in split.search if i not in fold]
                try:
                    start = self._start(rest)
                    optimizer = self.make_optimizer(plan.seed + number, start)
                    outcome = run_search(evaluator, optimizer, rest, plan, on_generation, start)
                    if not outcome.finalists or outcome.stopped == "interrupted":
                        main.stopped = "interrupted"
                        break
                    evaluator.new_round()
                    out_of_fold[fold] = evaluator.scores(outcome.finalists[:1], fold)[0]
                    by_fold.append((outcome.finalists[0], fold))
                except KeyboardInterrupt:
                    if processes().num_processes > 1:
                        raise
                    main.stopped = "interrupted"
                    break
            else:
                return found, out_of_fold, "cross-validation", by_fold
        return found, score(split.search), "search", [(found, split.search)]

    def _learn_answers(self, candidates: list[np.ndarray]) -> None:
        """Let these candidates answer the examples, or take the answers of a checkpoint, and go on with the expected
        reward, which has a gradient, in the place of the reward."""
        rewarded, checkpoint = self.evaluator, self.checkpoint
        answers = None if checkpoint is None else checkpoint.answers
        collected = answers is None
        if answers is None:
            answers = collect_answers(rewarded, candidates)
        rows = [
            {**row, "answers": pairs} for row, pairs in zip(rewarded.objective.examples, answers.means(), strict=True)
        ]
        objective = ExpectedRewardObjective(rows, cast(Any, rewarded.objective).tokenizer)
        self.evaluator = rewarded.asking(objective)
        if collected and checkpoint is not None:
            checkpoint.answers = answers
            checkpoint.save(self.evaluator)
        elif not collected:
            rewarded.load_state_dict(answers.decoded)
            rewarded.scores(candidates, range(len(rows)))  # are known, and count as spent
            rewarded.on_rows(answers.usage.rows)
            rewarded.usage.add(answers.usage)

    def _warn_of_no_gradient(self) -> None:
        objective = cast(ExpectedRewardObjective, self.evaluator.objective)
        scores = self.evaluator.scores(list(self.evaluator.space.simple().values()), self.split.search)
        rewards = [{reward for _, reward in objective.examples[i]["answers"]} for i in self.split.search]
        if not any(objective.count(i) for i in self.split.search):
            warnings.warn(
                "No answer to the examples got a reward (above the lowest one, if that is negative), whether of the "
                "base model, an expert or the uniform mixture, so that there is no gradient and the search stays where "
                "it begins.",
                stacklevel=4,
            )
        elif all(len(different) < 2 for different in rewards):
            warnings.warn(
                "All answers to an example got the same reward, so that it tells nothing about what is to be preferred "
                "but the gradient goes to what was answered. Take another reward, or another optimizer, such as 'cem'.",
                stacklevel=4,
            )
        elif np.ptp(scores, axis=0).max() < TINY:
            warnings.warn(
                "The rewarded answers have next to no probability, or all are equally likely, so that there is no "
                "gradient to speak of. Answers may be too long for it: take another optimizer, such as 'cem'.",
                stacklevel=4,
            )

    def _start(self, examples: list[int]) -> np.ndarray:
        """The best simple choice for these examples, of equals the first expert; if none is better than another, the
        uniform mixture, from which all are as near. Within the bounds."""
        space = self.evaluator.space
        simple = space.simple()
        names = sorted(simple, key=lambda name: (name == BASE, name == UNIFORM))
        scores = self.evaluator.scores([simple[name] for name in names], examples).mean(axis=1)
        best = simple[UNIFORM if scores.min() == scores.max() else names[int(scores.argmax())]]
        return np.clip(best, space.low, space.high)

    def _rows(self, optimizer: Any) -> int:
        """At most so many pairs of a candidate and an example."""
        candidates = self.plan.num_generations * optimizer.population_size
        searched = len(self.split.search)
        folds = sum(searched - len(fold) for fold in self.split.folds)
        simple = (len(self.evaluator.space.experts) + 3) * (
            len(self.split.judged) + bool(self.split.held_out) * searched
        )
        # a step of a gradient scores no example for itself, so that what is to be chosen from is scored at the end
        last = (1 + FINALISTS) * (searched + folds) if getattr(optimizer, "uses_gradient", False) else 0
        rewards = self.by_answers * len(self.split.judged)
        return simple + self._answered() + candidates * (searched + folds) + last + rewards

    def _answered(self) -> int:
        """How many answers are collected."""
        candidates = len(self.evaluator.space.experts) + 2
        return self.by_answers * (1 + SAMPLES) * candidates * len(self.evaluator.objective.examples)


def _per_expert(experts: list[str], alpha: np.ndarray) -> dict[str, float]:
    return dict(zip(experts, alpha.mean(axis=1).tolist(), strict=True))
