"""The data of a training run, in the columns and prompts that TRL and the rewards expect."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, load_dataset
from transformers import AutoTokenizer
from trl import DatasetMixtureConfig, get_dataset

from ..scoring.categories import readable
from ..scoring.rewards import text_of
from ..scoring.tokens import text_for_trl
from .arguments import AdapterArguments, TrainArguments
from .tasks import Task

Splits = dict[str, Dataset]


def load_data(script: TrainArguments, mixture: DatasetMixtureConfig, task: Task | None, *, seed: int) -> Splits:
    """
    Return the splits `"train"`, `"validation"` and `"test"`, as far as they exist, with a column `prompt`.

    Raises:
        ValueError: There is no task or dataset, or more than one, or the dataset lacks a split or column.
    """
    sources = {"task": task, "dataset_name": script.dataset_name, "datasets": mixture.datasets}
    given = [name for name, value in sources.items() if value]
    if len(given) != 1:
        found = f"both {' and '.join(given)} are given" if given else "none is given"
        raise ValueError(f"Expected one of --task, --categories, --dataset_name or `datasets` in the recipe; {found}.")
    sizes = {"validation": script.validation_size, "test": script.test_size}
    if task is not None:
        of_task = {"train": script.train_size, **sizes}
        return {split: task.examples(split, size) for split, size in of_task.items() if size > 0}  # type: ignore[arg-type]
    if mixture.datasets:
        loaded = get_dataset(mixture)
    else:
        loaded = load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
    names = {"train": script.dataset_train_split, "test": script.dataset_test_split, "validation": "validation"}
    if names["train"] not in loaded:
        raise ValueError(f"The dataset has no split {names['train']!r}; it has {', '.join(loaded)}.")
    splits = {split: loaded[name] for split, name in names.items() if name in loaded}
    if script.dataset_streaming:
        splits |= {
            split: Dataset.from_list(list(splits[split].take(size))) for split, size in sizes.items() if split in splits
        }
    elif "validation" not in splits and script.validation_size > 0:
        if len(splits["train"]) <= script.validation_size:
            raise ValueError(
                f"The training split has {len(splits['train'])} examples, too few to hold out validation_size="
                f"{script.validation_size}. Pass a smaller --validation_size, or 0."
            )
        parts = splits["train"].train_test_split(test_size=script.validation_size, seed=seed)
        splits |= {"train": parts["train"], "validation": parts["test"]}
    for split, size in sizes.items():
        if split in splits:
            splits[split] = splits[split].select(range(min(size, len(splits[split]))))
    return {split: _with_prompts(rows, script) for split, rows in splits.items() if split == "train" or len(rows)}


def _with_prompts(rows: Any, script: TrainArguments) -> Any:
    """Rename the columns as TRL and the rewards expect, and put the system prompt before each prompt."""
    columns = rows.column_names or list(next(iter(rows)))
    wanted = {script.prompt_column: "prompt"} | ({script.answer_column: "answer"} if script.answer_column else {})
    for old, new in wanted.items():
        if old not in columns:
            raise ValueError(f"The dataset has no column {old!r}; it has {', '.join(columns)}.")
        if old != new:
            rows = rows.rename_column(old, new)
    if "completion" in columns and not {"answer", "solution"} & {*columns, *wanted.values()}:
        # TRL does not pass this column to rewards.
        rows = rows.map(lambda row: {"answer": text_of(row["completion"])})
    if script.system_prompt:

        def add(row: dict[str, Any]) -> dict[str, Any]:
            prompt = row["prompt"]
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            return {"prompt": [{"role": "system", "content": script.system_prompt}, *messages]}

        rows = rows.map(add)
    return rows


def for_trl(rows: Any, adapter: AdapterArguments) -> Any:
    """
    Return examples whose prompts TRL reads correctly. TRL would start a new turn after messages that end with the
    beginning of an answer, so these become text.

    Raises:
        ValueError: Only some prompts end with the beginning of an answer.
    """
    begun = _is_begun(next(iter(rows))["prompt"])
    if isinstance(rows, Dataset) and {begun} != {_is_begun(prompt) for prompt in rows["prompt"]}:
        raise ValueError("Some prompts end with the beginning of an answer and others do not. Use one form for all.")
    if not begun:
        return rows
    tokenizer = AutoTokenizer.from_pretrained(adapter.model_name_or_path, revision=adapter.model_revision)
    return rows.map(lambda row: {"prompt": text_for_trl(readable(row["prompt"], tokenizer), tokenizer)})


def _is_begun(prompt: Any) -> bool:
    return not isinstance(prompt, str) and bool(prompt) and prompt[-1]["role"] == "assistant"
