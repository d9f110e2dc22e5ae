"""The tasks of `peft-svf evaluate`: the test split of a recipe's task, or data with a reward function."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..evaluation.strategies import EvaluationTask


def evaluation_task(
    source: str, expert: str | None, *, size: int, shots: int, reward: str, columns: Mapping[str, Any]
) -> tuple[EvaluationTask, list[Any]]:
    """
    Return a task and example prompts of its training split.

    Args:
        source (`str`): A recipe (`.yaml`), or data; see `load_examples`. Without a split, data is asked in its test
            split.
        expert (`str`, *optional*): The right expert.
        size (`int`): Most questions.
        shots (`int`): Example prompts; data may have fewer.
        reward (`str`): Reward function for data.
        columns: Arguments of `load_examples`.

    Raises:
        ValueError: The recipe has no task, or the data lacks a split or column.
        OSError: There is no such file or dataset.
        ImportError: A package that the data or the task needs is not installed.
    """
    from ..evaluation.strategies import EvaluationTask
    from ..scoring.datasets import load_examples
    from ..scoring.rewards import find_reward
    from ..scoring.sources import place_and_split
    from ..training.recipe import recipe_answer_length, recipe_task

    if Path(source).suffix in (".yaml", ".yml"):
        task = recipe_task(source)
        prompts = [row["prompt"] for row in task.examples("train", shots)] if shots else []
        questions, length = list(task.examples("test", size)), recipe_answer_length(source)
        return EvaluationTask(Path(source).stem, questions, task.reward, expert, length), prompts
    place, split = place_and_split(source)
    rows = load_examples(place, split=split or "test", limit=size, **columns)
    prompts = [row["prompt"] for row in load_examples(place, split="train", limit=shots, **columns)] if shots else []
    name = Path(place).stem + (f":{split}" if split else "")
    return EvaluationTask(name, rows, find_reward(reward), expert), prompts
