"""Comparison of self-adaptation strategies on tasks: accuracy, dispatch and time."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..mixture import WeightSpace
from ..routing.dispatch import Dispatcher
from ..routing.self_adaptive import SelfAdaptiveModel
from ..scoring.names import BASE
from ..scoring.objectives import RewardObjective
from ..scoring.rewards import RewardFunc
from ..search.evaluator import Evaluator
from ..search.identity import description_of, digest_of_experts, digest_of_rows
from ..search.statistics import interval_of_accuracy
from ..utils.progress import progress_bar
from .store import ScoreFile

ORACLE = "oracle"


@dataclass(frozen=True)
class EvaluationTask:
    """
    Questions of one kind.

    Attributes:
        name: Name of the task.
        examples: Examples with `"prompt"` (messages or text) and the columns that the reward needs.
        reward: A reward function of TRL's protocol: 1 for right, 0 for wrong.
        expert: The right expert; `None` for a task without an expert, for which the base model is right.
        max_new_tokens: Longest answer in tokens; that of `generation_kwargs` if `None`.
    """

    name: str
    examples: Sequence[dict[str, Any]]
    reward: RewardFunc
    expert: str | None = None
    max_new_tokens: int | None = None

    def generation(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return arguments of `generate` with the answer length of this task."""
        return {**options, **({} if self.max_new_tokens is None else {"max_new_tokens": self.max_new_tokens})}

    @property
    def right(self) -> str:
        """The label that dispatch should choose."""
        return self.expert or BASE


@dataclass
class Evaluation:
    """
    The result of [`evaluate`].

    Attributes:
        tasks: Names of the tasks.
        accuracy: Strategy → task → mean reward; `"all"` is the mean over all questions.
        intervals: Strategy → task → 95 % interval: Wilson's if all rewards are 0 or 1, else by bootstrap.
        dispatch_accuracy: Strategy → task → fraction of the questions with the right label; also for `"all"`.
        confusion: Strategy → right label → chosen label → number of questions.
        seconds: Strategy → seconds of the `"first"` and the `"second"` pass for one batch, and its number of
            `"prompts"`.
    """

    tasks: list[str]
    accuracy: dict[str, dict[str, float]] = field(default_factory=dict)
    intervals: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    dispatch_accuracy: dict[str, dict[str, float]] = field(default_factory=dict)
    confusion: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return all values in a form that JSON can hold."""
        return asdict(self)

    def plot(self, path: str | Path) -> None:
        """Draw accuracies by task and strategy, and the confusion of each dispatcher.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from ..reporting.plots import plot_evaluation

        plot_evaluation(self, path)


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[EvaluationTask],
    strategies: Mapping[str, Dispatcher],
    *,
    generation_kwargs: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    timed_prompts: int = 32,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    seed: int = 0,
) -> Evaluation:
    """
    Score strategies, the base model (`"base"`) and the right expert of each task (`"oracle"`) on the same questions.

    Each adapter answers a question once, however many strategies choose it. A strategy that can choose none of the
    right labels, such as one mixture for all questions, has no dispatch accuracy.

    Args:
        model (`PeftModel`): The model with the experts.
        tokenizer: Its tokenizer.
        tasks (`Sequence[EvaluationTask]`): The questions.
        strategies (`dict[str, Dispatcher]`): Dispatchers by name. An [`AdaptiveMixture`] is one.
        generation_kwargs (`dict`, *optional*): For `generate`. Default: greedy, 256 tokens.
        batch_size (`int`, *optional*): Batch rows, see [`Evaluator`].
        timed_prompts (`int`): Number of questions in the batch that times both passes; 0 skips the timing.
        output (path, *optional*): A JSON file for all scores, written after each task and strategy.
        resume (`bool`): Continue with the scores of this file.
        seed (`int`): Seed for the choice of the timed questions.

    Raises:
        ValueError: There are no tasks, two share a name, an expert is not loaded, or `output` belongs to another
            evaluation.
    """
    names = [task.name for task in tasks]
    if not tasks or len(set(names)) < len(names):
        raise ValueError(f"Expected tasks with different names, got {names}.")
    labels = {name: dispatcher([]).experts for name, dispatcher in strategies.items()}
    adapters = _adapters(model, tasks, labels)
    space = WeightSpace(adapters, [])
    options = dict(generation_kwargs or {})
    objectives = {
        t.name: RewardObjective(t.examples, t.reward, tokenizer, generation_kwargs=t.generation(options)) for t in tasks
    }
    evaluators = {name: Evaluator(model, space, its, batch_size=batch_size) for name, its in objectives.items()}
    identity = {
        "base model": str(getattr(model.config, "_name_or_path", "")),
        "experts": adapters,
        "values of the experts": digest_of_experts(model, adapters),
        "tasks": {name: [digest_of_rows(its.examples), description_of(its)] for name, its in objectives.items()},
    }
    store = ScoreFile(output, resume, identity, evaluators)
    result = Evaluation([*names])
    columns = (BASE, ORACLE, *strategies)
    with progress_bar(desc="Evaluating", total=len(columns) * sum(len(task.examples) for task in tasks)) as bar:
        for name in columns:
            choices, scores = {}, {}
            for task in tasks:
                prompts = [example["prompt"] for example in task.examples]
                if name in strategies:
                    choices[task.name] = store.choices(name, task.name, strategies[name], prompts)
                else:
                    choices[task.name] = [BASE if name == BASE else task.right] * len(prompts)
                scores[task.name] = _scores(evaluators[task.name], space, choices[task.name])
                bar.update(len(prompts))
                store.save()
            together = {**scores, "all": np.concatenate([*scores.values()])}
            result.accuracy[name] = {task: float(its.mean()) for task, its in together.items()}
            result.intervals[name] = {task: interval_of_accuracy(its) for task, its in together.items()}
            if {task.right for task in tasks} & {*labels.get(name, [])}:
                result.confusion[name], result.dispatch_accuracy[name] = _count(tasks, choices)
    if timed_prompts:
        prompts = [example["prompt"] for task in tasks for example in task.examples]
        timed = random.Random(seed).sample(prompts, min(timed_prompts, len(prompts)))
        longest = max(tasks, key=lambda task: task.max_new_tokens or 0).generation(options)
        for name, dispatcher in strategies.items():
            result.seconds[name] = _timed(SelfAdaptiveModel(model, tokenizer, dispatcher), timed, longest)
    return result


def _adapters(model: Any, tasks: Sequence[EvaluationTask], labels: Mapping[str, Sequence[str]]) -> list[str]:
    """All adapters that answer questions."""
    wanted = [task.expert for task in tasks if task.expert is not None]
    wanted += [label for its in labels.values() for label in its]
    if not wanted:
        raise ValueError("Neither the tasks nor the strategies have an expert; at least one is needed.")
    for name in wanted:
        if name in (BASE, ORACLE):
            raise ValueError(f"An expert cannot be called {name!r}, a name in results. Load it under another name.")
        if name not in model.peft_config:
            raise ValueError(f"The expert {name!r} is not loaded; the model has {', '.join(model.peft_config)}.")
    for name in labels:
        if name in (BASE, ORACLE):
            raise ValueError(f"A strategy cannot be called {name!r}, a name in results. Use another name.")
    return list(dict.fromkeys(wanted))


def _scores(evaluator: Evaluator, space: WeightSpace, choices: Sequence[str]) -> np.ndarray:
    """The score of each question, answered by the adapter that was chosen for it."""
    scores = np.empty(len(choices))
    for label in dict.fromkeys(choices):
        chosen = [i for i, choice in enumerate(choices) if choice == label]
        alone = np.array([float(name == label) for name in space.experts])  # all 0 is the base model
        scores[chosen] = evaluator.scores([alone], chosen)[0]
    return scores


def _count(
    tasks: Sequence[EvaluationTask], choices: Mapping[str, Sequence[str]]
) -> tuple[dict[str, dict[str, int]], dict[str, float]]:
    """Confusion and accuracy of a dispatcher, see [`Evaluation`]."""
    confusion: dict[str, dict[str, int]] = {}
    hits: dict[str, list[bool]] = {"all": []}
    for task in tasks:
        counts = confusion.setdefault(task.right, {})
        for choice in choices[task.name]:
            counts[choice] = counts.get(choice, 0) + 1
        hits[task.name] = [choice == task.right for choice in choices[task.name]]
        hits["all"] += hits[task.name]
    return confusion, {task: float(np.mean(its)) for task, its in hits.items()}


def _timed(adaptive: SelfAdaptiveModel, prompts: list[Any], options: Mapping[str, Any]) -> dict[str, float]:
    options = {"max_new_tokens": 256, "do_sample": False, **options}
    adaptive.chat(prompts[:1], **options)  # the first call also folds and allocates
    return {**adaptive.chat(prompts, return_details=True, **options).seconds, "prompts": len(prompts)}
