"""In-context prompting, the baseline that needs no adapters: other examples with their answers before the question."""

from __future__ import annotations

import bisect
import warnings
from collections.abc import Sequence
from numbers import Number
from typing import Any

import numpy as np
from accelerate.utils.memory import should_reduce_batch_size

from ..scoring.names import BASE
from ..scoring.objectives import Objective
from ..scoring.rewards import REFERENCE_COLUMNS, text_of
from ..scoring.tokens import context_length, joined, prompt_ids
from .evaluator import Evaluator


def answer_of(row: dict[str, Any]) -> str | None:
    """Return the reference answer of an example as text: its `"completion"`, `"answer"` or `"solution"`; `None` if it
    has none, or one that is neither text, a number nor messages."""
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
    Put demonstrations before the prompt of an example: as turns of a chat after the system message, or as text with
    empty lines between. As many as fit, in their order.

    Args:
        row: An example with a `"prompt"`.
        demonstrations: Examples with a `"prompt"` and an answer.
        tokenizer: The model's tokenizer.
        max_tokens (`int`): Longest prompt.
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
    Score the base model on examples, in their order, with demonstrations in each prompt.

    Args:
        evaluator ([`Evaluator`]): Has the model and the objective; its usage includes this.
        groups: Indices of examples to score, with those of their demonstrations. An example with the same prompt is no
            demonstration.

    Returns:
        `None` where that is not possible: an example without a text answer, an objective without a tokenizer, or no
        room for a demonstration. With a warning: a chat template that does not take the turns, or too little memory.
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
    objective = evaluator.objective
    rows = objective.examples
    if objective.tokenizer is None or any(answer_of(rows[i]) is None for _, others in groups for i in others):
        return None
    room = context_length(evaluator.model.config) - _new_tokens(objective)
    found: dict[int, float] = {}
    led_at_all = False
    for asked, others in groups:  # one by one, as all prompts of a group share their demonstrations
        led = []
        for i in asked:
            shown = [rows[j] for j in others if rows[j]["prompt"] != rows[i]["prompt"]]
            led.append(with_demonstrations(rows[i], shown, objective.tokenizer, room))
            led_at_all |= led[-1]["prompt"] != rows[i]["prompt"]
        base = Evaluator(
            evaluator.model,
            evaluator.space,
            objective.with_examples(led),
            batch_size=max(1, evaluator.batch_size // 8),  # these prompts are much longer
            seed=evaluator.seed,
        )
        base.on_evaluations = evaluator.on_evaluations
        scores = base.scores([evaluator.space.baselines()[BASE]], range(len(led)))[0]
        found |= dict(zip(asked, scores.tolist(), strict=True))
        evaluator.usage.add(base.usage)
    return np.array([found[i] for i in sorted(found)]) if led_at_all else None


def _new_tokens(objective: Objective) -> int:
    return objective.generation_kwargs.get("max_new_tokens") or max(objective.lengths())
