"""In-context prompting, the rival that needs no adapters: the examples themselves before the question."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

from ..scoring import text_of
from ..scoring.objectives import prompt_ids
from ..scoring.rewards import REFERENCE_COLUMNS


def answer_of(row: dict[str, Any]) -> str | None:
    """The reference answer of a row as text: its `"completion"`, `"answer"` or `"solution"`; `None` without one, or
    where it is neither text, a number nor messages."""
    for name in ("completion", *REFERENCE_COLUMNS):
        value = row.get(name)
        if isinstance(value, (str, int, float)) and value != "":
            return str(value)
        if isinstance(value, list) and value and isinstance(value[-1], dict) and "content" in value[-1]:
            return text_of(value)
    return None


def with_demonstrations(
    row: dict[str, Any], demonstrations: Sequence[dict[str, Any]], tokenizer: Any, max_tokens: int
) -> dict[str, Any]:
    """
    A row whose prompt is led by other rows with their answers: as turns of a chat after the system message, or as text
    with empty lines between. As many as fit, the first ones first.

    Args:
        row: A row with a `"prompt"`.
        demonstrations: Rows with a `"prompt"` and an answer.
        tokenizer: The model's tokenizer.
        max_tokens (`int`): How long the prompt may become.
    """

    def too_long(count: int) -> bool:
        return len(prompt_ids(_led(row["prompt"], demonstrations[:count]), tokenizer)) > max_tokens

    count = bisect.bisect_left(range(1, len(demonstrations) + 1), True, key=too_long)
    return {**row, "prompt": _led(row["prompt"], demonstrations[:count])} if count else row


def _led(prompt: Any, demonstrations: Sequence[dict[str, Any]]) -> Any:
    if isinstance(prompt, str):
        return "".join(f"{row['prompt']}{answer_of(row)}\n\n" for row in demonstrations) + prompt
    system = [message for message in prompt[:1] if message["role"] == "system"]
    turns = [
        message
        for row in demonstrations
        for message in (
            *(message for message in row["prompt"] if message["role"] != "system"),
            {"role": "assistant", "content": answer_of(row)},
        )
    ]
    return [*system, *turns, *prompt[len(system) :]]
