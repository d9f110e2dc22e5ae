"""Prompts in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def prompts_of(path: str, columns: dict[str, Any] | None = None) -> list[Any]:
    """Return the prompts of a file: one per line (`.txt`), or those of data.

    Args:
        path: The file, or data; see `load_examples`.
        columns: Arguments of `load_examples`.

    Raises:
        ValueError: The data has no prompts.
        OSError: There is no such file or dataset.
    """
    from ..scoring.datasets import load_examples
    from ..utils.files import read_text

    if Path(path).suffix == ".txt":
        return [line for line in read_text(path).split("\n") if line.strip()]
    return [example["prompt"] for example in load_examples(path, **(columns or {}))]
