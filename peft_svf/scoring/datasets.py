"""Examples from a file or a dataset of the Hub, in the columns that a search expects.

Files are not read by `datasets.load_dataset`, which changes values silently: a CSV answer `007` becomes 7.0 and
`NA` becomes None, a JSON answer "7" becomes 7 and "2024-01-01" a datetime.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..utils.extras import needs
from ..utils.files import read_text
from .examples import are_messages
from .rewards import REFERENCE_COLUMNS, text_of

FILES = (".jsonl", ".json", ".csv")


def load_examples(
    source: str,
    *,
    split: str | None = None,
    config: str | None = None,
    prompt_column: str = "prompt",
    answer_column: str | None = None,
    system_prompt: str | None = None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """
    Load examples with a `"prompt"`. Examples with answers get an `"answer"` (text, for rewards) and a `"completion"`
    (for the log-likelihood; messages if the prompt is).

    Args:
        source (`str`): A file (`.jsonl`, `.json` with a list, `.csv`), or the name of a dataset.
        split, config (`str`, *optional*): Split and configuration of a dataset; `"train"` by default.
        prompt_column (`str`): The column with the prompt, text or messages.
        answer_column (`str`, *optional*): The column with the answer. By default `"completion"`, `"answer"` or
            `"solution"`, if there is one.
        system_prompt (`str`, *optional*): A system message before every prompt that has none. Text prompts become
            messages.
        limit (`int`, *optional*): Keep only the first examples.

    Raises:
        ValueError: A malformed or empty file, or a missing column; the message names file and line.
        OSError: The file cannot be read, or there is no such dataset.
        ImportError: `datasets` is not installed.
    """
    if Path(source).suffix in FILES:
        if config is not None or split not in (None, "train"):
            raise ValueError(f"{source} is a file, which has no splits and no configurations. Leave them out.")
        rows = list(_read(Path(source)))
    elif Path(source).is_file():
        raise ValueError(f"{source} must be a {', '.join(FILES)} file, or a dataset of the Hub.")
    else:
        rows = _dataset(source, config, split or "train")
    if not rows:
        raise ValueError(f"{source} holds no examples.")
    return [
        _as_expected(row, f"{source}, row {i}", prompt_column, answer_column, system_prompt)
        for i, row in enumerate(rows[:limit], start=1)
    ]


def _read(path: Path) -> Iterable[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    text = read_text(path)
    if path.suffix == ".csv":
        yield from _csv(text, path)
    elif path.suffix == ".json":
        content = _parsed(text, str(path))
        if not isinstance(content, list):
            raise ValueError(f"{path} must hold a list of examples, got {type(content).__name__}.")
        yield from content
    else:
        # not by splitlines, which also splits at separators that JSON allows within its strings
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield _parsed(line, f"{path}, line {number}")


def _csv(text: str, path: Path) -> Iterator[dict[str, Any]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        for fields in reader:
            if fields and len(fields) != len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num} has {len(fields)} fields, its header {len(header)}: {fields}."
                )
            if fields:
                yield dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} is no CSV: {error}.") from error


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is no JSON: {error}.") from error


def _dataset(name: str, config: str | None, split: str) -> list[Any]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise needs("train", f"{name!r} is no {', '.join(FILES)} file. Loading it", "datasets") from error
    return list(load_dataset(name, config, split=split))


def _as_expected(
    row: Any, place: str, prompt_column: str, answer_column: str | None, system_prompt: str | None
) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{place} must be a mapping with a column {prompt_column!r}, got {row!r}.")
    wanted = [prompt_column, *([answer_column] if answer_column else [])]
    for column in wanted:
        if column not in row or row[column] is None:
            raise ValueError(f"{place} has no {column!r}; it has {', '.join(map(repr, row))}.")
    columns = (answer_column,) if answer_column else ("completion", *REFERENCE_COLUMNS)
    answer = next((row[name] for name in columns if row.get(name) is not None), None)
    prompt = row[prompt_column]
    if not isinstance(prompt, str) and not are_messages(prompt):
        raise ValueError(f"{place} has the {prompt_column!r} {prompt!r}; expected text, or messages with a 'role'.")
    if system_prompt is not None:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not any(message["role"] == "system" for message in messages):
            messages = [{"role": "system", "content": system_prompt}, *messages]
        prompt = messages
    found = {name: value for name, value in row.items() if name not in (prompt_column, "completion")}
    found["prompt"] = prompt
    if isinstance(answer, list) and not isinstance(prompt, str):  # messages, of which a tool may have some
        found["completion"] = answer
        if answer and isinstance(answer[-1], dict) and answer[-1].get("content"):
            found["answer"] = text_of(answer)
    elif answer is not None:
        try:
            found["answer"] = text_of(answer)
        except ValueError as error:
            raise ValueError(f"{place} has no answer that can be read: {error}") from None
        found["completion"] = (
            found["answer"] if isinstance(prompt, str) else [{"role": "assistant", "content": found["answer"]}]
        )
    return found
