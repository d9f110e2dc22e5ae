"""Tasks with verifiable answers: reasoning-gym's procedural tasks, custom tasks registered with it, and classification.

    find_task("reasoning_gym:products?min_digits=1&max_digits=1").examples("train", 2000)

The splits of a task share no question. Different seeds are not enough, because small generators repeat themselves:
there are only 55 one-digit products up to order. A hash of the content decides the split of a question: of the numbers
and operators in any order, or of the words of a question without arithmetic. This holds across tasks: a sum in the test
split of one task is not in the training split of another, in any words.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, Protocol
from urllib.parse import parse_qsl

from datasets import Dataset

from ..scoring.categories import classification_prompt, right_category
from ..scoring.rewards import ANSWERS, RewardFunc, text_of
from ..utils.extras import install_command

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
SEEDS: dict[Split, int] = {"train": 1, "test": 2, "validation": 3}
_FEW_WORDS = 30  # a longer question has more content than its arithmetic


class Task(Protocol):
    """Examples of each split, and the reward of an answer."""

    @property
    def name(self) -> str:
        """Name of the task."""
        ...

    @property
    def reward(self) -> RewardFunc:
        """TRL's reward protocol: 1 for right, 0 for wrong."""
        ...

    def examples(self, split: Split, size: int) -> Dataset:
        """Return at most `size` examples: `prompt` and `completion` (messages), `answer`, and further columns for the
        reward. All examples of validation and test are different."""
        ...


def split_of(question: str) -> Split:
    """Return the split of a question: a third is test, a fifth of the rest validation.

    `3 * 4` and `4 * 3` have the same split, whatever words surround them.
    """
    arithmetic = re.search(r"\d\s*[-+*/]\s*\d", question) and len(question.split()) <= _FEW_WORDS
    parts = re.findall(r"\d+|[-+*/]", question) if arithmetic else question.split()
    number = int(hashlib.sha256(" ".join(sorted(parts)).encode()).hexdigest(), 16)
    if number % 3 == 0:
        return "test"
    return "validation" if number // 3 % 5 == 0 else "train"


def find_task(spec: str, *, system_prompt: str | None = None, answer_format: str = "text") -> Task:
    """
    Return a task by name.

    Args:
        spec (`str`): `MODULE:NAME` with the settings of the dataset as in a URL, such as
            `reasoning_gym:chain_sum?min_terms=2&max_terms=2`. The module is `reasoning_gym`, or a custom module that
            registers datasets with it. Values are JSON, otherwise text.
        system_prompt (`str`, *optional*): The system message. It should say in which form to answer.
        answer_format (`str`): How to extract the answer from a completion, one of [`ANSWERS`].

    Raises:
        ValueError: The module, task, setting or answer format is unknown, or the verifier refuses the reference answer.
        ImportError: reasoning-gym is not installed.
    """
    if answer_format not in ANSWERS:
        raise ValueError(f"There is no answer format {answer_format!r}; expected one of {', '.join(ANSWERS)}.")
    name, _, query = spec.partition("?")
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", name):
        raise ValueError(
            f"There is no task {spec!r}; expected MODULE:NAME, such as reasoning_gym:chain_sum?max_terms=2."
        )
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise ValueError(f"The settings of the task {spec!r} must be NAME=VALUE&NAME=VALUE: {error}.") from error
    settings = {key: _value(text) for key, text in pairs}
    if settings.keys() & {"seed", "size"}:
        raise ValueError(f"The task {spec!r} must not set seed or size; the splits set them.")
    entry = create_dataset(name, seed=0, size=1, **settings)[0]
    # Columns of a dataset have gone through JSON.
    if not _verify(str(entry["answer"]), name, json.dumps(settings), json.loads(json.dumps(entry, default=str))):
        raise ValueError(
            f"The verifier of {spec!r} refuses its own reference answer {entry['answer']!r} as text. Use the task as a "
            "dataset with a custom reward function."
        )
    return ReasoningGymTask(name, settings, system_prompt, answer_format)


@dataclass(frozen=True)
class ReasoningGymTask:
    """
    A dataset of [reasoning-gym](https://github.com/open-thought/reasoning-gym) with its verifier.

    Attributes:
        name: `MODULE:NAME`, with the module that registers the dataset.
        settings: Settings of the dataset, such as its difficulty.
        system_prompt: The system message.
        answer_format: How to extract the answer from a completion, one of [`ANSWERS`].
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    system_prompt: str | None = None
    answer_format: str = "text"

    @property
    def reward(self) -> RewardFunc:
        return reasoning_gym_score

    def examples(self, split: Split, size: int) -> Dataset:
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        rows = []
        for entry in islice(self._entries(split, 4000 + 8 * size), size):
            question = {"role": "user", "content": entry["question"].strip()}
            rows.append(
                {
                    "prompt": [*system, question],
                    "completion": [{"role": "assistant", "content": str(entry["answer"])}],
                    "answer": str(entry["answer"]),
                    "task": self.name,
                    "settings": json.dumps(self.settings),
                    "answer_format": self.answer_format,
                    # as JSON text, because arrow would merge the fields of all rows
                    "entry": json.dumps(entry, default=str),
                }
            )
        if not rows:
            raise ValueError(
                f"The task {self.name!r} with {self.settings} has too few different questions: none is in {split}. "
                "Choose settings with more questions."
            )
        return Dataset.from_list(rows)

    def _entries(self, split: Split, bound: int) -> Iterator[dict[str, Any]]:
        """Yield questions of a split. The tries are bounded, because a small task may have too few questions."""
        seen: set[str] = set()
        for entry in create_dataset(self.name, seed=SEEDS[split], size=bound, **self.settings):
            question = entry["question"]
            if split_of(question) == split and (split == "train" or question not in seen):
                seen.add(question)
                yield entry


def reasoning_gym_score(
    completions: list[Any],
    entry: list[str],
    task: list[str],
    settings: list[str],
    answer_format: list[str],
    **kwargs: Any,
) -> list[float]:
    """Return 1 for each completion that the verifier accepts, else 0. The other arguments are columns of the data."""
    return [
        _verify(ANSWERS[how](text_of(completion)), name, its, json.loads(one))
        for completion, one, name, its, how in zip(completions, entry, task, settings, answer_format, strict=True)
    ]


@functools.lru_cache(maxsize=64)
def _verifier(name: str, settings: str) -> Callable[[str, dict[str, Any]], float]:
    score: Callable[[str, dict[str, Any]], float] = create_dataset(
        name, seed=0, size=1, **json.loads(settings)
    ).score_answer
    return score


def _verify(answer: str, name: str, settings: str, entry: dict[str, Any]) -> float:
    if not answer:
        return 0.0
    verifier = _verifier(name, settings)
    try:
        return float(verifier(answer, entry) >= 1.0)
    except Exception:  # some verifiers of reasoning-gym fail on answers of a wrong form
        return 0.0


@dataclass(frozen=True)
class ClassificationTask:
    """
    The task of the paper's classification expert: name the category of a prompt.

    The prompts of a split come from the same split of the categories' tasks, so no test question is seen in training.
    (The code released with the paper trains this expert on the test questions of its benchmarks.)

    The examples take the categories in turn, until one has no more prompts. Without shuffling (TRL's
    `shuffle_dataset=False`) each step then has as many examples of each category. In uneven steps a model first learns
    to always name the most frequent category.

    Attributes:
        categories: The task of each category.

    Raises:
        ValueError: There are fewer than two categories, or two names differ by case only.
    """

    categories: Mapping[str, Task]
    name: str = "classification"

    def __post_init__(self) -> None:
        labels = list(self.categories)
        words = [label.strip().casefold() for label in labels if isinstance(label, str)]
        if len(labels) < 2 or len(words) < len(labels) or not all(words) or len(set(words)) < len(words):
            raise ValueError(
                f"`categories` must have two or more names that differ by more than case and spaces, got {labels}."
            )

    @property
    def reward(self) -> RewardFunc:
        return right_category

    def examples(self, split: Split, size: int) -> Dataset:
        labels = list(self.categories)
        each = -(-size // len(labels))
        labelled = [
            [(label, prompt) for prompt in task.examples(split, each)["prompt"]]
            for label, task in self.categories.items()
        ]
        in_turn = (pair for turn in zip(*labelled, strict=False) for pair in turn)
        return Dataset.from_list(
            [
                {
                    "prompt": classification_prompt(prompt, labels),
                    "completion": [{"role": "assistant", "content": f" {label}"}],
                    "answer": label,
                    "categories": labels,
                }
                for label, prompt in islice(in_turn, size)
            ]
        )


def create_dataset(name: str, **settings: Any) -> Any:
    """
    Call reasoning-gym's `create_dataset` for `MODULE:NAME`.

    Raises:
        ImportError: reasoning-gym, or a package that the dataset needs, is not installed.
        ValueError: The module, the dataset or a setting is unknown; the message lists what exists.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ImportError(
            f"Tasks need reasoning-gym, which is not installed. Run `{install_command('tasks')}`, then "
            "`pip install --no-deps reasoning-gym`. With its dependencies it would need a C compiler."
        )
    # Its zebra puzzles import pycosat, which needs a C compiler to install. All other tasks work with an empty module.
    if "pycosat" not in sys.modules and importlib.util.find_spec("pycosat") is None:
        sys.modules["pycosat"] = types.ModuleType("pycosat")
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    module, _, name = name.partition(":")
    if module not in sys.modules and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # custom modules, as for rewards
    try:
        importlib.import_module(module)
    except Exception as error:  # a custom module may raise anything
        raise ValueError(f"The module {module!r} of a task cannot be imported: {error}.") from error

    package = module.partition(".")[0]
    registered = [key for key, (kind, _) in DATASETS.items() if kind.__module__.partition(".")[0] == package]
    if name not in registered:
        raise ValueError(f"{package!r} has no dataset {name!r}; it has {', '.join(sorted(registered)) or 'none'}.")
    try:
        return reasoning_gym.create_dataset(name, **settings)
    except AttributeError as error:
        raise ImportError(
            f"The reasoning-gym dataset {name!r} needs more packages ({error}), such as pycosat."
        ) from error
    except (TypeError, AssertionError) as error:
        known = ", ".join(sorted(set(DATASETS[name][1].__dataclass_fields__) - {"seed", "size"}))
        raise ValueError(
            f"The reasoning-gym dataset {name!r} refuses {settings}: {error or 'a value out of range'}. Its settings "
            f"are {known}."
        ) from error


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
