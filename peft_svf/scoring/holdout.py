"""A test split for data without one: which examples are held out depends on nothing but their question.

All commands hold out the same examples of a file, whatever their order and number. An example that occurs twice is on
one side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from .rewards import content_text

ONE_IN = 5  # examples are held out


def is_held_out(row: Mapping[str, Any]) -> bool:
    """Return whether an example is in the test split: one in five, by a hash of its question.

    Case, spaces and system messages do not count. An example without a `"prompt"` is hashed by its `"messages"`,
    `"text"` or `"chosen"`.
    """
    words = " ".join(_question(row).casefold().split())
    return int(hashlib.sha256(words.encode()).hexdigest(), 16) % ONE_IN == 0


def _question(row: Mapping[str, Any]) -> str:
    asked = next((row[name] for name in ("prompt", "messages", "text", "chosen") if row.get(name) is not None), "")
    if isinstance(asked, str):
        return asked
    return "\n".join(content_text(turn.get("content")) for turn in asked if turn["role"] == "user")
