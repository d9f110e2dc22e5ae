"""Tasks by strategies: how well prompts are dispatched, what is gained by it, and what it costs."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..mixture.loading import CLASSIFIER
from ..mixture.mixture import AdaptiveMixture
from ..mixture.space import UNIFORM, WeightSpace
from ..routing.dispatch import OTHER, Dispatcher
from ..routing.nearest import NearestDispatcher
from ..routing.prompt import PromptDispatcher
from ..routing.self_adaptive import SelfAdaptiveModel
from ..scoring.objectives import RewardObjective
from ..scoring.rewards import RewardFunc
from ..search.evaluator import Evaluator
from ..search.identity import description_of, digest_of_experts, digest_of_rows
from ..search.space import BASE
from ..search.statistics import interval
from ..utils.files import write_whole
from ..utils.processes import by_main_process
from ..utils.progress import progress_bar

ORACLE = "oracle"


@dataclass(frozen=True)
class EvaluationTask:
    """
    Questions of one kind.

    Attributes:
        name: What it is called.
        examples: Rows with `"prompt"` (messages or text) and what the reward needs.
        reward: A reward function of TRL's protocol: 1 for right, 0 for wrong.
        expert: The expert that is right for it; `None` for a foreign task, which belongs to the base model.
    """

    name: str
    examples: Sequence[dict[str, Any]]
    reward: RewardFunc
    expert: str | None = None


@dataclass
class Evaluation:
    """
    What came out.

    Attributes:
        tasks: Names of the tasks.
        accuracy: Strategy → task → mean reward, and over all questions as `"all"`.
        intervals: Strategy → task → 95 % interval, by bootstrap over the questions.
        dispatch_accuracy: Dispatcher → task → share of the questions that went where they belong, and `"all"`.
        confusion: Dispatcher → right label → chosen label → number of questions.
        seconds: Dispatcher → seconds of the `"first"` and the `"second"` pass for one batch, and its number of
            `"prompts"`.
    """

    tasks: list[str]
    accuracy: dict[str, dict[str, float]] = field(default_factory=dict)
    intervals: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    dispatch_accuracy: dict[str, dict[str, float]] = field(default_factory=dict)
    confusion: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
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
    strategies: Mapping[str, Dispatcher | AdaptiveMixture],
    *,
    generation_kwargs: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    timed_prompts: int = 32,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    seed: int = 0,
) -> Evaluation:
    """
    Score the base model, the right expert for each question (`"oracle"`), and each strategy, on the same questions.

    An answer of an expert to a question is generated once, whoever asks for it.

    Args:
        model (`PeftModel`): The model with the experts.
        tokenizer: Its tokenizer.
        tasks (`Sequence[EvaluationTask]`): The questions.
        strategies: By name, dispatchers, or mixtures that answer everything.
        generation_kwargs (`dict`, *optional*): For `generate`; greedy, 256 tokens by default.
        batch_size (`int`, *optional*): Rows per batch, see [`Evaluator`].
        timed_prompts (`int`): Questions of all tasks in one batch on which the two passes are timed; 0 for none.
        output (path, *optional*): A JSON file for all scores, written after each task and strategy.
        resume (`bool`): Go on from that file, if it is there.
        seed (`int`): Of the questions that are timed.

    Raises:
        ValueError: No tasks, two of one name, an expert that is not loaded, or a file of another evaluation.
    """
    names = [task.name for task in tasks]
    if not tasks or len(set(names)) < len(names):
        raise ValueError(f"Expected tasks with different names, got {names}.")
    experts = _experts(model, tasks, strategies)
    space = WeightSpace(experts, [])
    evaluators = {
        task.name: Evaluator(
            model,
            space,
            RewardObjective(task.examples, task.reward, tokenizer, generation_kwargs=dict(generation_kwargs or {})),
            batch_size=batch_size,
        )
        for task in tasks
    }
    identity = {
        "base model": str(getattr(model.config, "_name_or_path", "")),
        "experts": experts,
        "values of the experts": digest_of_experts(model, experts),
        "tasks": {
            name: [digest_of_rows(its.objective.examples), description_of(its.objective)]
            for name, its in evaluators.items()
        },
    }
    store = _Store(output, resume, json.loads(json.dumps(identity, default=str)), evaluators)
    found = Evaluation([*names])
    columns: dict[str, dict[str, np.ndarray]] = {BASE: {}, ORACLE: {}, **{name: {} for name in strategies}}
    simple = space.baselines()
    right = {task.name: task.expert or BASE for task in tasks}
    with progress_bar(desc="Evaluating", total=len(columns) * sum(len(task.examples) for task in tasks)) as bar:
        for name in columns:
            for task in tasks:
                evaluator, every = evaluators[task.name], range(len(task.examples))
                strategy = strategies.get(name)
                if isinstance(strategy, AdaptiveMixture):
                    columns[name][task.name] = _of_mixture(evaluator, strategy, space)
                else:
                    choices = (
                        [BASE if name == BASE else right[task.name]] * len(every)
                        if strategy is None
                        else store.choices(name, task, strategy)
                    )
                    chosen = [BASE if choice == OTHER else choice for choice in choices]
                    scores = np.empty(len(every))
                    for label in dict.fromkeys(chosen):
                        rows = [i for i, choice in enumerate(chosen) if choice == label]
                        scores[rows] = evaluator.scores([simple[label]], rows)[0]
                    columns[name][task.name] = scores
                bar.update(len(every))
                store.save()
    for name, by_task in columns.items():
        together = {**by_task, "all": np.concatenate([*by_task.values()])}
        found.accuracy[name] = {task: float(scores.mean()) for task, scores in together.items()}
        found.intervals[name] = {task: interval(scores) for task, scores in together.items()}
    for name, strategy in strategies.items():
        if not isinstance(strategy, AdaptiveMixture):
            _count(found, name, tasks, {task.name: store.choices(name, task, strategy) for task in tasks})
        if timed_prompts:
            found.seconds[name] = _timed(model, tokenizer, strategy, tasks, timed_prompts, generation_kwargs, seed)
    return found


def _experts(model: Any, tasks: Sequence[EvaluationTask], strategies: Mapping[str, Any]) -> list[str]:
    wanted = [task.expert for task in tasks if task.expert is not None]
    wanted += [name for strategy in strategies.values() for name in strategy.experts]
    experts = list(dict.fromkeys(wanted))
    if not experts:
        raise ValueError("Neither the tasks nor the strategies have an expert.")
    for name in experts:
        if name in (BASE, UNIFORM, ORACLE, OTHER):
            raise ValueError(f"An expert cannot be called {name!r} here, which stands for something else.")
        if name not in model.peft_config:
            raise ValueError(f"The expert {name!r} is not loaded; the model has {', '.join(model.peft_config)}.")
    for name in strategies:
        if name in (BASE, ORACLE):
            raise ValueError(f"A strategy cannot be called {name!r}.")
    return experts


def _of_mixture(evaluator: Evaluator, mixture: AdaptiveMixture, space: WeightSpace) -> np.ndarray:
    if mixture._group_of is not None:
        raise ValueError("A mixture with weights of their own for groups of modules cannot be evaluated here.")
    weights = mixture.weights
    x = space.vector([weights.get(name, 0.0) for name in space.experts])
    scores: np.ndarray = evaluator.scores([x], range(len(evaluator.objective.examples)))[0]
    return scores


def _count(found: Evaluation, name: str, tasks: Sequence[EvaluationTask], choices: Mapping[str, list[str]]) -> None:
    confusion: dict[str, dict[str, int]] = {}
    hits: dict[str, list[bool]] = {}
    for task in tasks:
        right = task.expert or OTHER
        row = confusion.setdefault(right, {})
        for choice in choices[task.name]:
            row[choice] = row.get(choice, 0) + 1
        hits[task.name] = [choice == right for choice in choices[task.name]]
    hits["all"] = [hit for its in hits.values() for hit in its]
    found.confusion[name] = confusion
    found.dispatch_accuracy[name] = {task: float(np.mean(its)) for task, its in hits.items()}


def _timed(
    model: Any,
    tokenizer: Any,
    strategy: Any,
    tasks: Sequence[EvaluationTask],
    count: int,
    generation_kwargs: Mapping[str, Any] | None,
    seed: int,
) -> dict[str, float]:
    prompts = [row["prompt"] for task in tasks for row in task.examples]
    chosen = random.Random(seed).sample(prompts, min(count, len(prompts)))
    adaptive = SelfAdaptiveModel(model, tokenizer, strategy)
    options = {"max_new_tokens": 256, "do_sample": False, **(generation_kwargs or {})}
    adaptive.chat(chosen[:1], **options)  # what the first call alone has to do
    details = adaptive.chat(chosen, return_details=True, **options)
    return {**details.seconds, "prompts": len(chosen)}


class _Store:
    """Scores and choices in a JSON file."""

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        resume: bool,
        identity: dict[str, Any],
        evaluators: dict[str, Evaluator],
    ) -> None:
        self.path, self.identity, self.evaluators = None if path is None else Path(path), identity, evaluators
        self._choices: dict[str, dict[str, list[str]]] = {}
        content = by_main_process(lambda: self._read(resume))  # the file may be there in one process only
        if content is not None:
            self._choices = content["choices"]
            for name, evaluator in evaluators.items():
                evaluator.load_state_dict(content["scores"].get(name, []))

    def _read(self, resume: bool) -> dict[str, Any] | None:
        if self.path is None or not self.path.exists():
            return None
        if not resume:
            raise ValueError(f"{self.path} exists. Pass `resume=True` to go on with that evaluation, or another path.")
        try:
            content = json.loads(self.path.read_text())
            known, _, _ = content["identity"], content["scores"], content["choices"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is no file of an evaluation: {error!r}.") from error
        for name, value in self.identity.items():
            if known.get(name) != value:
                raise ValueError(f"{self.path} is of another evaluation: its {name} are others.")
        return {"scores": content["scores"], "choices": content["choices"]}

    def choices(self, strategy: str, task: EvaluationTask, dispatcher: Dispatcher) -> list[str]:
        """Where the questions of a task go."""
        known = self._choices.setdefault(f"{strategy}: {_description(dispatcher)}", {})
        if task.name not in known:
            known[task.name] = list(dispatcher([row["prompt"] for row in task.examples]).choices)
        return known[task.name]

    def save(self) -> None:
        by_main_process(self._write)

    def _write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scores = {name: evaluator.state_dict() for name, evaluator in self.evaluators.items()}
        content = {"identity": self.identity, "choices": self._choices, "scores": scores}
        write_whole(self.path, json.dumps(content) + "\n")


def _description(dispatcher: Any) -> str:
    """Its settings, as far as they are plain values."""
    plain = (str, int, float, bool, type(None), list, dict, tuple)
    settings = {name: value for name, value in sorted(vars(dispatcher).items()) if isinstance(value, plain)}
    arrays = {name: value.tolist() for name, value in sorted(vars(dispatcher).items()) if isinstance(value, np.ndarray)}
    return f"{type(dispatcher).__name__} {digest_of_rows([settings, arrays])}"


def make_dispatcher(
    name: str,
    mixture: AdaptiveMixture,
    *,
    descriptions: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    examples: Mapping[str, Sequence[Any]] | None = None,
    weights: Mapping[str, float] | None = None,
    other: bool | None = None,
    **options: Any,
) -> Dispatcher | AdaptiveMixture:
    """
    A dispatcher for the experts of a mixture.

    Args:
        name (`str`): `"prompt"`, `"classifier"`, `"nearest"`, or `"mixture"`, which is the mixture itself.
        mixture ([`AdaptiveMixture`]): Of [`load_experts`].
        descriptions (`dict[str, str]`, *optional*): Of experts, for `"prompt"`.
        labels (`dict[str, str]`, *optional*): What the classifier calls the experts.
        examples (`dict[str, list]`, *optional*): Prompts of each expert, for `"nearest"`.
        weights (`dict[str, float]`, *optional*): Of the mixture; uniform if `None`.
        other (`bool`, *optional*): Whether "other" is offered as an answer; by default for `"prompt"` only.
        options: For the dispatcher.

    Raises:
        ValueError: Another name, or something that the dispatcher needs is missing.
    """
    model, tokenizer = mixture.model, mixture.tokenizer
    about = {expert: (descriptions or {}).get(expert, "") for expert in mixture.experts}
    if unknown := sorted({*(descriptions or {}), *(examples or {}), *(labels or {})} - {*mixture.experts}):
        raise ValueError(f"{unknown[0]!r} is none of the experts {', '.join(mixture.experts)}.")
    if name == "prompt":
        return PromptDispatcher(model, tokenizer, about, labels=labels, other=other is not False, **options)
    if name == "classifier":
        if CLASSIFIER not in model.peft_config:
            raise ValueError("Dispatch by a classification expert needs one: say where it is.")
        return PromptDispatcher(
            model, tokenizer, about, adapter_name=CLASSIFIER, labels=labels, other=bool(other), **options
        )
    if name == "nearest":
        if missing := [expert for expert in mixture.experts if not (examples or {}).get(expert)]:
            raise ValueError(f"Dispatch to the nearest examples needs some of each expert; {missing[0]!r} has none.")
        return NearestDispatcher(model, tokenizer, dict(examples or {}), **options)
    if name == "mixture":
        if weights is not None:
            mixture.set_weights(weights)
        return mixture
    raise ValueError(f"There is no dispatch {name!r}; expected one of {', '.join(DISPATCHERS)}.")


DISPATCHERS = ("prompt", "classifier", "nearest", "mixture")
