"""Checks examples before anything is computed with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def check_examples(examples: Sequence[dict[str, Any]], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return the examples as a list of dicts that all have these columns and the columns of each other.

    Raises:
        ValueError: No examples, a missing column, an empty prompt, or a prompt that is neither text nor messages.
    """
    rows = list(examples)
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(
                f"Example {i} is {row!r}; expected rows with a column {columns[0]!r}, such as a list of dicts, "
                'or of a DataFrame, `.to_dict("records")`.'
            )
    rows = [{name: _plain(value, name) for name, value in row.items()} for row in rows]
    if not rows:
        raise ValueError("The examples are empty; expected at least one.")
    wanted = dict.fromkeys([*columns, *(column for row in rows for column in row if column != "completion")])
    for i, row in enumerate(rows):
        for column in wanted:
            if column not in row:
                named = f"Example {i} has no {column!r}; it has {', '.join(map(repr, row))}."
                raise ValueError(named if column in columns else f"{named} Others have it; give all the same columns.")
            if column == "prompt" and isinstance(row[column], (str, list, tuple)) and not row[column]:
                raise ValueError(f"Example {i} has an empty {column!r}: {row}.")
        for column in columns:
            if not isinstance(row[column], str) and not are_messages(row[column]):
                raise ValueError(
                    f"Example {i} has the {column} {row[column]!r}; expected text, or messages with a 'role'."
                )
            if isinstance(row[column], str) != isinstance(row["prompt"], str):
                kinds = {True: "text", False: "messages"}
                raise ValueError(
                    f"Example {i} has {kinds[isinstance(row['prompt'], str)]} as its prompt and "
                    f"{kinds[isinstance(row[column], str)]} as its {column}; both must be of one kind."
                )
    return rows


def are_messages(value: Any) -> bool:
    """Whether a value is a list of messages, each with a role."""
    return isinstance(value, (list, tuple)) and all(
        isinstance(turn, Mapping) and isinstance(turn.get("role"), str) for turn in value
    )


def _plain(value: Any, column: str) -> Any:
    """Return scalars of numpy and torch as Python numbers, and messages as lists."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    return _as_lists(value) if column in ("prompt", "completion") else value


def _as_lists(value: Any) -> Any:
    """Return messages and the parts of their contents without arrays."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {name: _as_lists(inner) for name, inner in value.items()}
    return [_as_lists(inner) for inner in value] if isinstance(value, (list, tuple)) else value
