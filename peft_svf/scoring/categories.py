"""The prompt by which a model names the category of another prompt, for training and for dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def classification_prompt(prompt: Any, categories: Sequence[str]) -> list[dict[str, str]]:
    """
    Messages that ask for the category of a prompt, in one word.

    Args:
        prompt: Text, or messages, of which those of the user count.
        categories (`Sequence[str]`): The labels to choose from.
    """
    if not isinstance(prompt, str):
        prompt = "\n".join(message["content"] for message in prompt if message["role"] == "user")
    labels = ", ".join(categories)
    return [
        {"role": "system", "content": f"Name the category of the question: {labels}. Reply with the category only."},
        {"role": "user", "content": f"{prompt}\n\nCategory ({labels}):"},
    ]
