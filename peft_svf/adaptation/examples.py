"""Examples for a search from a file or a dataset of the Hub, in the columns that it expects."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..scoring.rewards import REFERENCE_COLUMNS, text_of

FILES = (".jsonl", ".json", ".csv")


def load_examples(
    source: str,
    *,
    split: str = "train",
    config: str | None = None,
    prompt_column: str = "prompt",
    answer_column: str | None = None,
    system_prompt: str | None = None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """
    Rows with `"prompt"`, and where there are answers, with `"answer"` (text, for rewards) and `"completion"` (for the
    log-likelihood, messages if the prompt is).

    Args:
        source (`str`): A file (`.jsonl`, `.json` with a list, `.csv`), or what `datasets.load_dataset` takes.
        split, config (`str`): Of a dataset.
        prompt_column (`str`): The column with the prompt, text or messages.
        answer_column (`str`, *optional*): The column with the answer. By default `"completion"`, `"answer"` or
            `"solution"`, if there is one.
        system_prompt (`str`, *optional*): Make messages of text prompts, with this system message before them.
        limit (`int`, *optional*): The first so many rows.

    Raises:
        ValueError: A file that is malformed or empty, or a column that is not there; the message says which.
        OSError: The file cannot be read, or there is no such dataset.
        ImportError: `datasets` is not installed.
    """
    rows = list(_read(Path(source))) if Path(source).suffix in FILES else _dataset(source, config, split)
    if not rows:
        raise ValueError(f"{source} holds no examples.")
    return [
        _as_expected(row, f"{source}, row {i}", prompt_column, answer_column, system_prompt)
        for i, row in enumerate(rows[:limit], start=1)
    ]


def _read(path: Path) -> Iterable[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".csv":
        yield from csv.DictReader(text.splitlines(keepends=True))
    elif path.suffix == ".json":
        content = _parsed(text, str(path))
        if not isinstance(content, list):
            raise ValueError(f"{path} must hold a list of examples, got {type(content).__name__}.")
        yield from content
    else:
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                yield _parsed(line, f"{path}, line {number}")


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is no JSON: {error}.") from error


def _dataset(name: str, config: str | None, split: str) -> list[Any]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"{name!r} is no {', '.join(FILES)} file, and datasets, which could load it, is not installed: "
            "`pip install peft-svf[train]`."
        ) from error
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
    if system_prompt is not None and isinstance(prompt, str):
        prompt = [{"role": "system", "content": system_prompt}, {"role": "user", "content": prompt}]
    found = {name: value for name, value in row.items() if name not in (prompt_column, "completion")}
    found["prompt"] = prompt
    if answer is not None:
        text = text_of(answer)
        found["answer"] = text
        found["completion"] = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
    return found
