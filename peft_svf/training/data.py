"""The data of a training run, in the columns and prompts that TRL and the rewards expect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from pyarrow import ArrowException
from transformers import AutoTokenizer
from trl import DatasetMixtureConfig, extract_prompt, get_dataset

from ..scoring.categories import readable
from ..scoring.datasets import Columns, answered, asked, expected_row, from_conversation
from ..scoring.examples import are_messages
from ..scoring.holdout import is_held_out
from ..scoring.rewards import REFERENCE_COLUMNS, text_of
from ..scoring.sources import ALL, place_and_split, read_splits
from ..scoring.tokens import text_for_trl
from .arguments import AdapterArguments, TrainArguments
from .tasks import Task

Splits = dict[str, Dataset]
_ANSWERS = ("completion", "chosen", "rejected")


def load_data(script: TrainArguments, mixture: DatasetMixtureConfig, task: Task | None, training: Any) -> Splits:
    """
    Return the splits `"train"`, `"validation"` and `"test"`, as far as they exist, in the columns of the objective.

    Raises:
        ValueError: There is no task or dataset, or more than one, or the dataset lacks a split or column.
    """
    sources = {"task": task, "dataset_name": script.dataset_name, "datasets": mixture.datasets}
    given = [name for name, value in sources.items() if value]
    if len(given) != 1:
        found = f"both {' and '.join(given)} are given" if given else "none is given"
        raise ValueError(f"Expected one of --task, --categories, --data or `datasets` in the recipe; {found}.")
    sizes = {"validation": script.validation_size, "test": script.test_size}
    if task is not None:
        if script.objective == "dpo":
            raise ValueError("A task has no worse answers for --objective dpo. Use --objective sft, grpo or rloo.")
        of_task = {"train": script.train_size, **sizes}
        return {split: task.examples(split, size) for split, size in of_task.items() if size > 0}  # type: ignore[arg-type]
    if mixture.datasets:
        place, named, loaded = "the data", None, get_dataset(mixture)
    else:
        assert script.dataset_name is not None
        place, named = place_and_split(script.dataset_name)
        loaded = read_splits(place, config=script.dataset_config, streaming=script.dataset_streaming)
        loaded = {split: _as_dataset(rows, place) for split, rows in loaded.items()}
    train = script.dataset_train_split if named in (None, ALL) else named
    names = {"train": train, "test": script.dataset_test_split, "validation": "validation"}
    if train not in loaded:
        raise ValueError(f"The dataset has no split {train!r}; it has {', '.join(loaded)}.")
    text_column = getattr(training, "dataset_text_field", "text")
    splits = {
        split: _as_wanted(loaded[name], place, script, text_column) for split, name in names.items() if name in loaded
    }
    if script.dataset_streaming:
        splits |= {
            split: Dataset.from_list(list(splits[split].take(size))) for split, size in sizes.items() if split in splits
        }
    else:
        splits |= _held_out(splits, script, training, everything=named == ALL)
    for split, size in sizes.items():
        if split in splits:
            splits[split] = splits[split].select(range(min(size, len(splits[split]))))
    return {split: rows for split, rows in splits.items() if split == "train" or len(rows)}


def _held_out(splits: Splits, script: TrainArguments, training: Any, *, everything: bool) -> Splits:
    """Return the training split, and those that are taken off it because the data lacks them."""
    train, found = splits["train"], {}
    if "test" not in splits and script.test_size > 0 and not everything and "prompt" in train.column_names:
        sides = [is_held_out(row) for row in train]
        if any(sides) and not all(sides):
            found["test"] = train.select([i for i, held_out in enumerate(sides) if held_out])
            train = train.select([i for i, held_out in enumerate(sides) if not held_out])
    if "validation" not in splits and script.validation_size > 0 and training.eval_strategy != "no":
        if len(train) <= script.validation_size:
            raise ValueError(
                f"The training split has {len(train)} examples, too few to hold out validation_size="
                f"{script.validation_size}. Pass a smaller --validation_size, or 0."
            )
        parts = train.train_test_split(test_size=script.validation_size, seed=training.seed)
        train, found["validation"] = parts["train"], parts["test"]
    return {"train": train, **found}


def _as_dataset(rows: Any, place: str) -> Any:
    """Return the rows of a file as a dataset. A column with text and numbers, which arrow refuses, becomes text."""
    if not isinstance(rows, list):
        return rows
    for i, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise ValueError(f"{place}, row {i} must be a mapping of columns to values, got {row!r}.")
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    for name, values in columns.items():
        kinds = {type(value) for value in values} - {type(None)}
        if str in kinds and len(kinds) > 1 and kinds <= {str, int, float, bool}:
            columns[name] = [None if value is None else str(value) for value in values]
    try:
        return Dataset.from_dict(columns)
    except (ArrowException, TypeError) as error:
        raise ValueError(f"A column of {place} holds values of different types: {error}.") from error


def _as_wanted(rows: Any, place: str, script: TrainArguments, text_column: str) -> Any:
    """Return the rows in the columns of the objective: pairs, conversations or text for SFT, preferences for DPO,
    otherwise prompts with whatever a reward needs."""
    names = rows.column_names or list(next(iter(rows)))
    columns = script.columns()
    if script.objective == "dpo":
        return _preferences(rows, place, names, script)
    if script.objective == "sft":
        if columns.prompt in names or columns.messages in names:
            return _pairs(rows, place, names, columns)
        if text_column in names:
            return rows
    return _prompts(rows, place, names, columns)


def _pairs(rows: Any, place: str, names: list[str], columns: Columns) -> Any:
    """Return rows with prompt and completion. Whole conversations are kept next to that, for the loss of all turns."""
    whole = columns.prompt not in names

    def convert(row: dict[str, Any], i: int) -> dict[str, Any]:
        where = f"{place}, row {i + 1}"
        found = expected_row(row, where, columns)
        if found.get("completion") is None:
            raise ValueError(
                f"{where} has no answer to learn; it has {', '.join(map(repr, row))}. Name its column with "
                "completion_column."
            )
        kept = {name: found.get(name) for name in ("prompt", "completion", "answer")}
        return {**kept, "messages": asked(row[columns.messages], columns)} if whole else kept

    replaced = [
        name for name in (columns.prompt, columns.completion, columns.answer, columns.messages) if name in names
    ]
    return rows.map(convert, with_indices=True, remove_columns=replaced)


def _preferences(rows: Any, place: str, names: list[str], script: TrainArguments) -> Any:
    columns = script.columns()
    wanted = {"chosen": script.chosen_column, "rejected": script.rejected_column}
    for option, column in wanted.items():
        _check_column(column, names, option)
    prompted = columns.prompt in names

    def convert(row: dict[str, Any], i: int) -> dict[str, Any]:
        answers = {name: row[column] for name, column in wanted.items()}
        for name, answer in answers.items():
            if not isinstance(answer, str) and not are_messages(answer):
                raise ValueError(f"{place}, row {i + 1} has the {name} answer {answer!r}; expected text or messages.")
        if not prompted:  # both answers begin with it
            return dict(extract_prompt(answers))
        prompt = asked(row[columns.prompt], columns)
        return {
            "prompt": prompt,
            **{name: answered(text, prompt) if isinstance(text, str) else text for name, text in answers.items()},
        }

    replaced = {*wanted.values(), *([columns.prompt] if prompted else [])}
    return rows.map(convert, with_indices=True, remove_columns=[*replaced])


def _prompts(rows: Any, place: str, names: list[str], columns: Columns) -> Any:
    """Rename the columns as TRL and the rewards expect, and ask the prompts as the options say."""
    if columns.prompt not in names and columns.messages in names:
        rows = rows.map(lambda row: from_conversation(row, columns), remove_columns=[columns.messages])
        names = rows.column_names or list(next(iter(rows)))
    wanted = {columns.prompt: "prompt"} | ({columns.answer: "answer"} if columns.answer else {})
    for old, new in wanted.items():
        _check_column(old, names, new)
        if old != new:
            rows = rows.rename_column(old, new)
    if "completion" in names and not {*REFERENCE_COLUMNS} & {*names, *wanted.values()}:
        # TRL does not pass this column to rewards.
        rows = rows.map(lambda row: {"answer": text_of(row["completion"])})
    if columns.system_prompt or columns.chat:
        rows = rows.map(lambda row: {"prompt": asked(row["prompt"], columns)})
    return rows


def _check_column(name: str, names: list[str], option: str) -> None:
    if name not in names:
        raise ValueError(
            f"The dataset has no column {name!r}; it has {', '.join(names)}. Name the right one with --{option}_column."
        )


def for_trl(rows: Any, adapter: AdapterArguments) -> Any:
    """
    Return examples whose prompts TRL reads correctly. TRL would start a new turn after messages that end with the
    beginning of an answer, so these become text.

    Raises:
        ValueError: Only some prompts end with the beginning of an answer.
    """
    first = next(iter(rows))
    if "prompt" not in first:
        return rows
    begun = _is_begun(first["prompt"])
    if isinstance(rows, Dataset) and {begun} != {_is_begun(prompt) for prompt in rows["prompt"]}:
        raise ValueError("Some prompts end with the beginning of an answer and others do not. Use one form for all.")
    if not begun:
        return rows
    tokenizer = AutoTokenizer.from_pretrained(adapter.model_name_or_path, revision=adapter.model_revision)

    def as_text(row: dict[str, Any]) -> dict[str, Any]:
        answers = {name: text_of(row[name]) for name in _ANSWERS if row.get(name) is not None}
        return {"prompt": text_for_trl(readable(row["prompt"], tokenizer), tokenizer), **answers}

    return rows.map(as_text)


def _is_begun(prompt: Any) -> bool:
    return not isinstance(prompt, str) and bool(prompt) and prompt[-1]["role"] == "assistant"
