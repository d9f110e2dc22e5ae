"""The prompt by which a model names the category of another prompt, and its answer, for training and for dispatch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .rewards import content_text, text_of


def classification_prompt(
    prompt: Any, categories: Sequence[str], descriptions: Mapping[str, str] | None = None
) -> list[dict[str, str]]:
    """
    Messages that ask for the category of a prompt, the last of which begins the answer.

    The prompt is in quotes, or small models answer it; the labels come before it, where all questions are alike, so
    that a batch reads them once; and the answer is begun, or they say so many other things first that the probabilities
    of the labels as the first word mean nothing (docs/design-notes.md).

    Args:
        prompt: Text, or messages, of which those of the user count.
        categories (`Sequence[str]`): The labels to choose from. Plain words that say what they mean
            (`math`, not `task_1`) are much easier to learn.
        descriptions (`dict[str, str]`, *optional*): What a category is about, in a few words, for some or all of them.
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
    Messages as [`prompt_ids`] and [`prompt_text`] take them: themselves; with a system message put before the user's
    where the chat template has no place for it; or their contents as one text where there is no template.
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
    The category that a text begins with, as whole words in any case; of several, the longest. `None` if it begins with
    none.

    A name that comes later does not count. Dispatch compares the labels as the beginning of the answer; and a category
    whose name occurs in its prompts would be named by repeating those.
    """
    begins = text.lstrip().casefold()
    named = [label for label in categories if re.match(rf"{re.escape(label.casefold())}(?![^\W_])", begins)]
    return max(named, key=len, default=None)


def right_category(
    completions: list[Any], answer: list[str], categories: list[Sequence[str]], **kwargs: Any
) -> list[float]:
    """1 for each completion that begins with the right category, else 0. The other arguments are columns of data."""
    return [
        float(named_category(text_of(completion), labels) == right)
        for completion, right, labels in zip(completions, answer, categories, strict=True)
    ]
