"""Examples that were pasted as text: JSON, JSON Lines, or a table."""

from __future__ import annotations

from typing import Any

from ..scoring.datasets import Columns, expected_row
from ..scoring.sources import rows_of_text

_PLACE = "The examples"


def pasted_examples(text: str, *, chat: bool = False, system_prompt: str | None = None) -> list[dict[str, Any]]:
    """
    Return examples with a `"prompt"`, and an `"answer"` and a `"completion"` where they have an answer.

    Args:
        text (`str`): One JSON object per line, a JSON list, or a table with a header, separated by tabs or commas. A
            selection of a spreadsheet is separated by tabs.
        chat (`bool`): See [`load_examples`].
        system_prompt (`str`, *optional*): See [`load_examples`].

    Raises:
        ValueError: There are none, the text is malformed, or a column is missing; the message names the line or row.
    """
    text = text.strip("\n")
    if not text.strip():
        raise ValueError('There are no examples. Paste some, such as {"prompt": "3 + 4 =", "answer": "7"} per line.')
    rows = list(rows_of_text(text, _kind(text), _PLACE))
    columns = Columns(chat=chat, system_prompt=system_prompt)
    for i, row in enumerate(rows, start=1):
        if isinstance(row, dict) and not {columns.prompt, columns.messages} & {*row}:
            raise ValueError(
                f"{_PLACE}, row {i} has no 'prompt'; it has {', '.join(map(repr, row))}. "
                "The columns must be called prompt and answer."
            )
    if not rows:
        raise ValueError(f"{_PLACE} have a header and no rows. Paste the rows, too.")
    return [expected_row(row, f"{_PLACE}, row {i}", columns) for i, row in enumerate(rows, start=1)]


def _kind(text: str) -> str:
    begin = text.lstrip()[0]
    if begin in "{[":
        return ".jsonl" if begin == "{" else ".json"
    return ".tsv" if "\t" in text.split("\n", 1)[0] else ".csv"
