"""Examples of a file, a folder or a dataset of the Hub, in the columns that training, search and evaluation expect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..utils.files import read_text
from .examples import are_messages
from .holdout import is_held_out
from .rewards import REFERENCE_COLUMNS, text_of
from .sources import ALL, is_file, place_and_split, read_splits


@dataclass(frozen=True)
class Columns:
    """
    The columns of the data, and how their prompts are asked.

    Attributes:
        prompt: The column with the prompt, text or messages.
        completion: The column with the answer to learn. Default: `"completion"`, otherwise the answer.
        answer: The column with the answer to compare with. Default: `"answer"` or `"solution"`, otherwise the
            completion.
        messages: The column with whole conversations, for rows without a prompt. The last answer is the completion.
        system_prompt: A system message before every prompt that has none. Text prompts become messages.
        chat: Text prompts become messages of the user.
    """

    prompt: str = "prompt"
    completion: str | None = None
    answer: str | None = None
    messages: str = "messages"
    system_prompt: str | None = None
    chat: bool = False


def load_examples(
    source: str,
    *,
    split: str | None = None,
    config: str | None = None,
    prompt_column: str = "prompt",
    completion_column: str | None = None,
    answer_column: str | None = None,
    messages_column: str = "messages",
    system_prompt: str | None = None,
    chat: bool = False,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """
    Load examples with a `"prompt"`. Examples with answers get an `"answer"` (text, for rewards) and a `"completion"`
    (for the log-likelihood; messages if the prompt is).

    Args:
        source (`str`): A file (`.jsonl`, `.json` with a list, `.csv`, `.parquet`), a folder of such files, or the name
            of a dataset on the Hub. `:SPLIT` at its end names the split.
        split (`str`, *optional*): Split of the data. Default: all rows of a file, otherwise `"train"`. If there is no
            `"test"` split, it is one row in five of `"train"`, by a hash of the question; see `is_held_out`. `"all"`
            is all rows.
        config (`str`, *optional*): Configuration of a dataset.
        prompt_column (`str`): See [`Columns`], like the next five.
        completion_column (`str`, *optional*): See [`Columns`].
        answer_column (`str`, *optional*): See [`Columns`].
        messages_column (`str`): See [`Columns`].
        system_prompt (`str`, *optional*): See [`Columns`].
        chat (`bool`): See [`Columns`].
        limit (`int`, *optional*): Keep only the first examples.

    Raises:
        ValueError: A malformed or empty file, an unknown split, or a missing column; the message names file and line.
        OSError: The file cannot be read, or there is no such dataset.
        ImportError: A package that reads the data is not installed.
    """
    place, named = place_and_split(source)
    columns = Columns(prompt_column, completion_column, answer_column, messages_column, system_prompt, chat)
    found = read_splits(place, config=config)
    split = split or named
    halves = split in ("train", "test") and "train" in found and "test" not in found
    if split == ALL or (split is None and is_file(place)):
        rows = [row for part in found.values() for row in part]
    elif halves:
        rows = list(found["train"])
    elif (split or "train") in found:
        rows = list(found[split or "train"])
    else:
        raise ValueError(f"{place} has no split {split or 'train'!r}; it has {', '.join([*found, ALL])}.")
    read = rows if halves else rows[:limit]
    examples = [expected_row(row, f"{place}, row {i}", columns) for i, row in enumerate(read, start=1)]
    if halves:
        examples = [row for row in examples if is_held_out(row) == (split == "test")]
    if not examples:
        raise ValueError(f"{source} holds no examples{f' in the split {split!r}' if rows else ''}.")
    return examples[:limit]


def load_prompts(source: str, **columns: Any) -> list[Any]:
    """
    Load prompts without their answers.

    Args:
        source (`str`): A `.txt` file with a prompt per line, or what [`load_examples`] takes.
        columns: Arguments of [`load_examples`].

    Raises:
        ValueError: As [`load_examples`], and for a text file that is not UTF-8.
        OSError: The file cannot be read, or there is no such dataset.
    """
    if Path(source).suffix == ".txt":
        return [line for line in read_text(source).split("\n") if line.strip()]
    return [example["prompt"] for example in load_examples(source, **columns)]


def expected_row(row: Any, place: str, columns: Columns) -> dict[str, Any]:
    """Return a row with `"prompt"`, and `"answer"` and `"completion"` if it has an answer, next to its other columns.

    Raises:
        ValueError: A column is missing, or its value is neither text nor messages. The message names `place`.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{place} must be a mapping with a column {columns.prompt!r}, got {row!r}.")
    row = from_conversation(row, columns)
    wanted = {"prompt": columns.prompt, "completion": columns.completion, "answer": columns.answer}
    for option, column in wanted.items():
        if column is not None and row.get(column) is None:
            raise ValueError(
                f"{place} has no {column!r}; it has {', '.join(map(repr, row))}. Name the right one with "
                f"{option}_column."
            )
    prompt = row[columns.prompt]
    if not isinstance(prompt, str) and not are_messages(prompt):
        raise ValueError(f"{place} has the {columns.prompt!r} {prompt!r}; expected text, or messages with a 'role'.")
    prompt = asked(prompt, columns)
    answer = _first(row, columns.answer, *REFERENCE_COLUMNS, columns.completion, "completion")
    completion = _first(row, columns.completion, "completion", columns.answer, *REFERENCE_COLUMNS)
    found = {name: value for name, value in row.items() if name not in (columns.prompt, "completion")}
    found["prompt"] = prompt
    if isinstance(completion, list) and not isinstance(prompt, str):  # messages, of which a tool may have some
        found["completion"] = completion
        if answer is completion and not (completion and isinstance(completion[-1], dict) and _says(completion)):
            return found
    try:
        if answer is not None:
            found["answer"] = text_of(answer)
        if completion is not None and "completion" not in found:
            found["completion"] = answered(text_of(completion), prompt)
    except ValueError as error:
        raise ValueError(f"{place} has no answer that can be read: {error}") from None
    return found


def from_conversation(row: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """Return a row of messages, without a prompt, with the prompt and completion that they consist of."""
    found = dict(row)
    turns = found.get(columns.messages)
    if columns.prompt in found or not are_messages(turns) or not turns:
        return found
    del found[columns.messages]
    ends_with_answer = turns[-1]["role"] == "assistant"
    found[columns.prompt] = list(turns[:-1] if ends_with_answer else turns)
    if ends_with_answer:
        found["completion"] = [turns[-1]]
    return found


def asked(prompt: Any, columns: Columns) -> Any:
    """Return a prompt as it is asked: as messages, and with a system message, if the columns say so."""
    if isinstance(prompt, str) and (columns.chat or columns.system_prompt is not None):
        prompt = [{"role": "user", "content": prompt}]
    if columns.system_prompt is not None and not any(turn["role"] == "system" for turn in prompt):
        prompt = [{"role": "system", "content": columns.system_prompt}, *prompt]
    return prompt


def answered(text: str, prompt: Any) -> Any:
    """Return an answer in the form of its prompt: text, or messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _first(row: Mapping[str, Any], *names: str | None) -> Any:
    return next((row[name] for name in names if name is not None and row.get(name) is not None), None)


def _says(turns: list[Any]) -> bool:
    return bool(turns[-1].get("content"))
