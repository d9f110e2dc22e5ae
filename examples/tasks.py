"""Small verifiable tasks from reasoning-gym, in the shape that TRL's trainers and `AdaptiveMixture.search` take.

A question that may be asked in the test never occurs in training, not even in another task's words. Procedural
generators repeat themselves when their space is small (there are 55 one-digit products up to order), so a question goes
to one side by a hash of its numbers and operators in any order, or of its words if it has no numbers, not by the seed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from datasets import Dataset

Split = Literal["train", "test"]
BRIEF = "Reply with the answer only."
SEEDS: dict[Split, int] = {"train": 1, "test": 2}


def last_number(completion: str) -> str:
    """The last number of a text, `""` if there is none."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", completion)
    return numbers[-1] if numbers else ""


def first_word(completion: str) -> str:
    """The first word of a text without punctuation around it."""
    words = completion.split()
    return words[0].strip(".,:;!?\"'*`") if words else ""


def held_out(question: str) -> bool:
    """Whether a question belongs to the test side: a third do, `3 * 4` with `4 * 3`."""
    parts = re.findall(r"\d+|[-+*/]", question) if re.search(r"\d", question) else question.split()
    return int(hashlib.sha256(" ".join(sorted(parts)).encode()).hexdigest(), 16) % 3 == 0


@dataclass(frozen=True)
class Task:
    """A reasoning-gym dataset with the settings under which a model of 135M parameters can learn it.

    Attributes:
        name: What this task is called here.
        dataset: Its name in reasoning-gym.
        system: The system message; it says in what form to answer.
        extract: Takes the answer out of a completion.
        settings: Arguments of the reasoning-gym dataset.
    """

    name: str
    dataset: str
    system: str
    extract: Callable[[str], str]
    settings: dict[str, Any] = field(default_factory=dict)

    def examples(self, split: Split, size: int) -> Dataset:
        """`size` rows of one side: `prompt` (messages), `completion` (messages, the reference answer), `task`, and
        `entry` (reasoning-gym's own record as JSON, from which the reward is computed). Test rows are all different."""
        rows: list[dict[str, Any]] = []
        seen: set[str] = set()
        for entry in self._entries(split):
            if split == "test" and entry["question"] in seen:
                continue
            seen.add(entry["question"])
            rows.append(
                {
                    "prompt": [
                        {"role": "system", "content": self.system},
                        {"role": "user", "content": entry["question"].strip()},
                    ],
                    "completion": [{"role": "assistant", "content": str(entry["answer"])}],
                    "task": self.name,
                    "entry": json.dumps(entry, default=str),
                }
            )
            if len(rows) == size:
                break
        return Dataset.from_list(rows)

    def _entries(self, split: Split) -> Iterator[dict[str, Any]]:
        # a bounded walk: the test side of a small task may hold fewer different questions than asked for
        for entry in _create_dataset(self.dataset, seed=SEEDS[split], size=4000, **self.settings):
            if held_out(entry["question"]) == (split == "test"):
                yield entry

    def score(self, completion: str, entry: dict[str, Any]) -> float:
        """1 if reasoning-gym's verifier accepts the answer in `completion`, else 0."""
        answer = self.extract(completion)
        return float(bool(answer) and _create_dataset(self.dataset, seed=0, size=1).score_answer(answer, entry) >= 1.0)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "products",
            "products",
            BRIEF,
            last_number,
            {"min_digits": 1, "max_digits": 1, "min_terms": 2, "max_terms": 2},
        ),
        Task(
            "sums",
            "chain_sum",
            BRIEF,
            last_number,
            {"min_digits": 1, "max_digits": 1, "min_terms": 2, "max_terms": 2},
        ),
        Task(
            "retrieval",
            "needle_haystack",
            BRIEF,
            first_word,
            {"min_num_statements": 3, "max_num_statements": 4},
        ),
        Task(
            "arithmetic",
            "basic_arithmetic",
            BRIEF,
            last_number,
            {
                "min_digits": 1,
                "max_digits": 1,
                "min_terms": 2,
                "max_terms": 2,
                "allow_parentheses": False,
                # its divisions come with wrong answers
                "operators": ("+", "-", "*"),
            },
        ),
    )
}


def reward(completions: list[Any], entry: list[str], task: list[str], **kwargs: Any) -> list[float]:
    """TRL's reward protocol: 1 for each completion that its task's verifier accepts, else 0. `entry` and `task` are
    columns of the dataset."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [TASKS[t].score(text, json.loads(e)) for text, e, t in zip(texts, entry, task, strict=True)]


def _create_dataset(name: str, **settings: Any) -> Any:
    # reasoning-gym imports pycosat, which exists only as C source, for its zebra puzzles. None of the tasks here needs
    # it, so where it is missing an empty module stands in.
    if "pycosat" not in sys.modules and importlib.util.find_spec("pycosat") is None:
        sys.modules["pycosat"] = types.ModuleType("pycosat")
    import reasoning_gym

    return reasoning_gym.create_dataset(name, **settings)
