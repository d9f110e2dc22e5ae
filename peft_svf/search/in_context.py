"""In-context prompting, the rival that needs no adapters: the examples themselves before the question."""

from __future__ import annotations

import bisect
import warnings
from collections.abc import Sequence
from numbers import Number
from typing import Any

import numpy as np
from accelerate.utils.memory import should_reduce_batch_size

from ..scoring.rewards import REFERENCE_COLUMNS, text_of
from ..scoring.tokens import joined, prompt_ids
from .evaluator import Evaluator
from .space import BASE


def answer_of(row: dict[str, Any]) -> str | None:
    """The reference answer of a row as text: its `"completion"`, `"answer"` or `"solution"`; `None` without one, or
    where it is neither text, a number nor messages."""
    for name in ("completion", *REFERENCE_COLUMNS):
        value = row.get(name)
        if isinstance(value, (str, Number)) and value != "":
            return str(value)
        if isinstance(value, list) and value and isinstance(value[-1], dict) and value[-1].get("content"):
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
        for message in joined(
            [message for message in row["prompt"] if message["role"] != "system"],
            [{"role": "assistant", "content": answer_of(row)}],
        )
    ]
    return [*system, *turns, *prompt[len(system) :]]


def in_context_scores(evaluator: Evaluator, groups: Sequence[tuple[list[int], list[int]]]) -> np.ndarray | None:
    """
    Score of the base model on examples, in their order, with others and their answers before the question.

    Args:
        evaluator ([`Evaluator`]): Has the model and the objective, and the cost is counted to it.
        groups: Indices of examples to score, with those of the examples that lead them, unless they ask the same.

    Returns:
        `None` where that cannot be done: examples without an answer that is text, an objective that has no tokenizer or
        takes no other examples, or no room for a single demonstration; and with a warning, a chat template that does
        not take them, or no memory for prompts that are so long.
    """
    try:
        return _in_context_scores(evaluator, groups)
    except Exception as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if "TemplateError" in kinds:
            reason = f"the chat template does not take the examples as turns: {error}"
        elif should_reduce_batch_size(error) or "OutOfMemoryError" in str(error):  # of another process
            reason = "there is not enough memory for prompts with all examples"
        else:
            raise
        warnings.warn(f"In-context prompting was left out: {reason}.", stacklevel=2)
        return None


def _in_context_scores(evaluator: Evaluator, groups: Sequence[tuple[list[int], list[int]]]) -> np.ndarray | None:
    objective: Any = evaluator.objective
    rows = objective.examples
    parts = [objective, *getattr(objective, "objectives", [])]
    tokenizer = next((part.tokenizer for part in parts if getattr(part, "tokenizer", None) is not None), None)
    if tokenizer is None or not hasattr(objective, "with_examples"):
        return None
    if any(answer_of(rows[i]) is None for _, others in groups for i in others):
        return None
    room = _context_length(evaluator.model.config) - _new_tokens(parts)
    found: dict[int, float] = {}
    led_at_all = False
    for asked, others in groups:  # one by one, as all prompts of a group begin with the same demonstrations
        led = []
        for i in asked:
            shown = [rows[j] for j in others if rows[j]["prompt"] != rows[i]["prompt"]]
            led.append(with_demonstrations(rows[i], shown, tokenizer, room))
            led_at_all |= led[-1]["prompt"] != rows[i]["prompt"]
        base = Evaluator(
            evaluator.model,
            evaluator.space,
            objective.with_examples(led),
            batch_size=max(1, evaluator.batch_size // 8),  # of prompts that are so much longer
            seed=evaluator.seed,
        )
        base.on_rows = evaluator.on_rows
        scores = base.scores([evaluator.space.simple()[BASE]], range(len(led)))[0]
        found |= dict(zip(asked, scores.tolist(), strict=True))
        evaluator.usage.add(base.usage)
    return np.array([found[i] for i in sorted(found)]) if led_at_all else None


def _new_tokens(parts: Sequence[Any]) -> int:
    limits = [getattr(part, "generation_kwargs", {}).get("max_new_tokens") or 0 for part in parts]
    return max(limits, default=0) or max(parts[0].lengths())


def _context_length(config: Any) -> int:
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 2048)
