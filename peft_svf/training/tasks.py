"""Tasks with answers that can be verified: reasoning-gym's procedural ones by name, your own ones written like those,
and naming a prompt's category.

    find_task("reasoning_gym:products?min_digits=1&max_digits=1").examples("train", 2000)

The splits of a task share no question. Procedural generators repeat themselves when their space is small (there are 55
one-digit products up to order), so a question goes to a split by a hash of its content and not by the seed alone: of
the numbers and operators of its arithmetic in any order, or of its words if it has none. That holds across tasks: the
sum that is asked in the test of one task is not in the training data of another, not even in other words.
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

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
SEEDS: dict[Split, int] = {"train": 1, "test": 2, "validation": 3}
_FEW_WORDS = 30  # in a longer question arithmetic is not all there is


class Task(Protocol):
    """Examples for each split and how to score an answer."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def reward(self) -> RewardFunc:
        """TRL's reward protocol: 1 for right, 0 for wrong."""
        ...

    def examples(self, split: Split, size: int) -> Dataset:
        """At most `size` rows: `prompt` and `completion` (messages), `answer`, and what the reward needs besides.
        The rows of validation and test are all different."""
        ...


def split_of(question: str) -> Split:
    """The split that a question belongs to: a third goes to the test, a fifth of the rest to validation; `3 * 4` goes
    where `4 * 3` goes, whatever is said around it."""
    arithmetic = re.search(r"\d\s*[-+*/]\s*\d", question) and len(question.split()) <= _FEW_WORDS
    parts = re.findall(r"\d+|[-+*/]", question) if arithmetic else question.split()
    number = int(hashlib.sha256(" ".join(sorted(parts)).encode()).hexdigest(), 16)
    if number % 3 == 0:
        return "test"
    return "validation" if number // 3 % 5 == 0 else "train"


def find_task(spec: str, *, system_prompt: str | None = None, answer_format: str = "text") -> Task:
    """
    A task by name.

    Args:
        spec (`str`): `MODULE:NAME`, where the module is `reasoning_gym` or one of yours that registers datasets with
            it, and the settings of that dataset as in a URL: `reasoning_gym:chain_sum?min_terms=2&max_terms=2`. Values
            are JSON, or text where they are no JSON.
        system_prompt (`str`, *optional*): The system message; it should say in what form to answer.
        answer_format (`str`): How to take the answer out of a completion, one of [`ANSWERS`].

    Raises:
        ValueError: There is no such module, task, setting or answer format, or its verifier refuses its own answer.
        ImportError: reasoning-gym is not installed.
    """
    if answer_format not in ANSWERS:
        raise ValueError(f"There is no answer format {answer_format!r}; expected one of {', '.join(ANSWERS)}.")
    name, _, query = spec.partition("?")
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", name):
        raise ValueError(
            f"There is no task {spec!r}; expected MODULE:NAME, such as reasoning_gym:chain_sum?max_terms=2."
        )
    settings = {key: _value(text) for key, text in parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))}
    if settings.keys() & {"seed", "size"}:
        raise ValueError(f"The task {spec!r} must not set seed or size, which the splits decide.")
    entry = create_dataset(name, seed=0, size=1, **settings)[0]  # complains about what does not exist
    # what is verified later went through JSON
    if not _verify(str(entry["answer"]), name, json.dumps(settings), json.loads(json.dumps(entry, default=str))):
        raise ValueError(
            f"The verifier of {spec!r} refuses its own reference answer, {entry['answer']!r}, given as text. The task "
            "cannot be used in this way; write a reward function for it."
        )
    return ReasoningGymTask(name, settings, system_prompt, answer_format)


@dataclass(frozen=True)
class ReasoningGymTask:
    """
    A dataset of [reasoning-gym](https://github.com/open-thought/reasoning-gym) with its verifier.

    Attributes:
        name: `MODULE:NAME`, with the module that registers it.
        settings: Its settings, such as those of difficulty.
        system_prompt: The system message.
        answer_format: How to take the answer out of a completion, one of [`ANSWERS`].
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
                    # as text, for arrow would merge the fields of all rows
                    "entry": json.dumps(entry, default=str),
                }
            )
        if not rows:
            raise ValueError(
                f"The task {self.name!r} with {self.settings} has too few different questions: none falls to {split}."
            )
        return Dataset.from_list(rows)

    def _entries(self, split: Split, bound: int) -> Iterator[dict[str, Any]]:
        """Those of a bounded walk, for a small task has fewer different questions than asked for."""
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
    """1 for each completion that its task's verifier accepts, else 0. The other arguments are columns of the data."""
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
    except Exception:  # some verifiers of reasoning-gym fail on answers that are not even of the right form
        return 0.0


@dataclass(frozen=True)
class ClassificationTask:
    """
    Naming the category of a prompt, which the paper's classification expert learns.

    The prompts of a split are those of the same split of the categories' own tasks: what is asked there in a test is
    never seen in training here. (The code released with the paper trains this expert on the test questions of the
    benchmarks it is evaluated with.)

    The rows take the categories in turn, until the first of them has no more prompts. A trainer that does not shuffle
    them (TRL's `shuffle_dataset=False`) sees as many of each in every step; with an uneven draw, the first thing
    learned is to always name its most frequent one.

    Attributes:
        categories: The task that each category's prompts come from.
    """

    categories: Mapping[str, Task]
    name: str = "classification"

    def __post_init__(self) -> None:
        labels = list(self.categories)
        words = [label.strip().casefold() for label in labels if isinstance(label, str)]
        if len(labels) < 2 or len(words) < len(labels) or not all(words) or len(set(words)) < len(words):
            raise ValueError(
                f"`categories` must have two or more names, texts that differ by more than their case, got {labels}."
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
    """reasoning-gym's `create_dataset` for `MODULE:NAME`, with errors that say what there is.

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: There is no such module, it registers no dataset of that name, or that has no such setting.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ImportError("This task comes from reasoning-gym, which is not installed: `pip install peft-svf[tasks]`.")
    # Its zebra puzzles import pycosat, which exists only as C source. Where that was left out, an empty module stands
    # in, and everything else works.
    if "pycosat" not in sys.modules and importlib.util.find_spec("pycosat") is None:
        sys.modules["pycosat"] = types.ModuleType("pycosat")
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    module, _, name = name.partition(":")
    if module not in sys.modules and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as for rewards
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"The module {module!r} of a task could not be imported: {error}.") from error

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
