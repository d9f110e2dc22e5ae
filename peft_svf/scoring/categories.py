"""The prompt that asks a model for the category of another prompt, and the answer to it, in training and dispatch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .rewards import content_text, text_of


def classification_prompt(
    prompt: Any, categories: Sequence[str], descriptions: Mapping[str, str] | None = None
) -> list[dict[str, str]]:
    """
    Return messages that ask for the category of a prompt. The last one begins the answer.

    The prompt is in quotes, because small models answer it otherwise. The labels come first, where all questions are
    equal, so that a batch reads them once. The answer is begun, because small models say something else first, and then
    the probability of a label as the first word means nothing.

    Args:
        prompt: Text, or messages; only those of the user are shown.
        categories (`Sequence[str]`): The labels. Words with a meaning (`math`, not `task_1`) are much easier to learn.
        descriptions (`dict[str, str]`, *optional*): A few words about some or all categories.

    Raises:
        ValueError: There are no categories.
    """
    if not categories:
        raise ValueError("There are no categories to choose from.")
    if not isinstance(prompt, str):
        prompt = "\n".join(content_text(message["content"]) for message in prompt if message["role"] == "user")
    about = {label: f" ({text})" for label, text in (descriptions or {}).items() if text}
    *others, last = [label + about.get(label, "") for label in categories]
    labels = f"{', '.join(others)} or {last}" if others else last
    return [
        {"role": "system", "content": f"Name the category of each text: {labels}."},
        {"role": "user", "content": f'Text: "{prompt}"'},
        {"role": "assistant", "content": "Category:"},
    ]


def readable(messages: Sequence[dict[str, str]], tokenizer: Any) -> Any:
    """
    Return messages in a form that the tokenizer takes. Without a chat template, their contents become one text. If the
    template has no system message, its content is put before the user's.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        text = "\n\n".join(message["content"] for message in messages)
        return text if messages[-1]["role"] == "assistant" else f"{text}\nAnswer:"
    try:
        tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:
        if "TemplateError" not in {kind.__name__ for kind in type(error).__mro__}:
            raise
        asked = [message["content"] for message in messages if message["role"] != "assistant"]
        rest = [message for message in messages if message["role"] == "assistant"]
        return [{"role": "user", "content": "\n\n".join(asked)}, *rest]
    return list(messages)


def named_category(text: str, categories: Sequence[str]) -> str | None:
    """
    Return the category that a text begins with, as whole words in any case; the longest of several; `None` without one.

    A name that comes later does not count, for two reasons. Dispatch compares labels as the beginning of the answer.
    And a category whose name occurs in its prompts would be named by repeating the prompt.
    """
    begins = text.lstrip().casefold()
    named = [label for label in categories if re.match(rf"{re.escape(label.casefold())}(?![^\W_])", begins)]
    return max(named, key=len, default=None)


def right_category(
    completions: list[Any], answer: list[str], categories: list[Sequence[str]], **kwargs: Any
) -> list[float]:
    """Reward function: 1 for each completion that begins with the right category, else 0."""
    return [
        float(named_category(text_of(completion), labels) == right)
        for completion, right, labels in zip(completions, answer, categories, strict=True)
    ]
