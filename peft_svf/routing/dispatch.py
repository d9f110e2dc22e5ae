"""Dispatch: which expert each prompt goes to, the first of the two passes of Transformer² (section 3.2)."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ..scoring.names import BASE
from ..scoring.rewards import content_text
from ..scoring.tokens import context_length
from ..tuner.rows import BASE as PEFT_BASE

CONTENT_FREE = "N/A"  # the text in place of a prompt without content


@dataclass(frozen=True)
class Dispatch:
    """
    The expert of each prompt.

    Attributes:
        labels: The adapters to choose from, and `"base"` if the base model is among the choices.
        probabilities: `[prompts, labels]`; each row sums to 1.
        choices: The label of each prompt; `"base"` also for a prompt that no expert is sure enough for.
        seconds: Duration of the first pass.
        errors: Index of each prompt that could not be dispatched, with the reason. It goes to `"base"`.
    """

    labels: list[str]
    probabilities: np.ndarray
    choices: list[str]
    seconds: float = 0.0
    errors: dict[int, str] = field(default_factory=dict)

    @property
    def experts(self) -> list[str]:
        """The labels without `"base"`."""
        return [label for label in self.labels if label != BASE]

    @property
    def adapter_names(self) -> list[str]:
        """The adapter of each prompt, in the form that PEFT's `generate` takes for mixed batches."""
        return [PEFT_BASE if choice == BASE else choice for choice in self.choices]

    @property
    def weights(self) -> np.ndarray:
        """Probabilities of the experts, `[prompts, experts]`. The rest to 1 is that of the base model."""
        return self.probabilities[:, [label != BASE for label in self.labels]]

    @property
    def soft_weights(self) -> np.ndarray:
        """`weights` for mixtures: 0 for a prompt that failed, or that went to `"base"` because of a threshold."""
        best = self.probabilities.argmax(axis=1)
        refused = [
            i in self.errors or (choice == BASE != self.labels[best[i]]) for i, choice in enumerate(self.choices)
        ]
        return np.where(np.array(refused, dtype=bool)[:, None], 0.0, self.weights)


class Dispatcher(Protocol):
    """A function that chooses an expert for each prompt: [`PromptDispatcher`], [`NearestDispatcher`], an
    [`AdaptiveMixture`], or a custom one."""

    def __call__(self, prompts: Sequence[Any]) -> Dispatch:
        """
        Choose an expert for each prompt.

        Args:
            prompts: Texts, or lists of messages. Without prompts, the result names the labels only.
        """
        ...


def fixed_dispatch(adapter_name: str, prompts: Sequence[Any]) -> Dispatch:
    """Return a [`Dispatch`] of every prompt to one adapter, with probability 1."""
    return Dispatch([adapter_name], np.ones((len(prompts), 1)), [adapter_name] * len(prompts))


@dataclass
class Shortener:
    """
    Texts of prompts, where a long one loses its middle. The first long prompt gives a warning.

    Args:
        tokenizer: The tokenizer that counts and cuts.
        max_tokens (`int`, *optional*): Longest prompt. Default: the model's context without `ROOM` tokens for the
            question around the prompt.
        model: The model with this context.

    Raises:
        ValueError: `max_tokens` is below 2.
    """

    tokenizer: Any
    max_tokens: int | None
    model: Any
    warned: bool = field(default=False, init=False)

    ROOM = 512

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ValueError(f"`max_prompt_tokens` must be at least 2, got {self.max_tokens}.")
        context = context_length(self.model.config)
        self.limit = self.max_tokens or max(context - self.ROOM, context // 2)

    def each(self, prompts: Sequence[Any]) -> tuple[list[str], dict[int, str]]:
        """Return the text of each prompt, and the error of each invalid one, whose text is `CONTENT_FREE`."""
        if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], Mapping)):
            raise TypeError(f"Expected a list of prompts, got one prompt: {prompts!r}.")
        texts, errors = [], {}
        for i, prompt in enumerate(prompts):
            try:
                texts.append(self(prompt))
            except (ValueError, TypeError, KeyError) as error:
                texts.append(CONTENT_FREE)
                errors[i] = str(error)
        return texts, errors

    def __call__(self, prompt: Any) -> str:
        """Return the text of a prompt, shortened if it is too long. Of messages, those of the user count."""
        text = text_of_prompt(prompt)
        if len(text.encode()) <= self.limit:  # a token has at least one byte
            return text
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) <= self.limit:
            return text
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"A prompt of {len(ids)} tokens is longer than the {self.limit} that dispatch reads. Its middle is "
                "left out of the first pass; the second pass reads all of it.",
                stacklevel=4,
            )
        half = self.limit // 2
        decode = self.tokenizer.decode
        return f"{decode(ids[: self.limit - half])} ... {decode(ids[len(ids) - half :])}"


def check_experts(model: Any, experts: Mapping[str, Any]) -> list[str]:
    """
    Return the names of the experts after checking them.

    Raises:
        ValueError: There are none, one is not loaded, or one is called `"base"`.
        TypeError: `experts` is not a mapping.
    """
    if not isinstance(experts, Mapping):
        raise TypeError(f"`experts` must map the name of each expert to its description or examples, got {experts!r}.")
    if not experts:
        raise ValueError("No experts: dispatch needs at least one.")
    for name in experts:
        if name not in model.peft_config:
            raise ValueError(f"The expert {name!r} is not loaded; the model has {', '.join(model.peft_config)}.")
        if name == BASE:
            raise ValueError(f"An expert cannot be called {BASE!r}, the name of the base model. Load it by another.")
    return list(experts)


def check_labels(labels: Sequence[str]) -> None:
    """
    Check that the labels differ by more than case and spaces.

    Raises:
        ValueError: A label is empty, or occurs twice.
    """
    folded = [label.strip().casefold() for label in labels]
    for label, plain in zip(labels, folded, strict=True):
        if not plain:
            raise ValueError("A label is empty. Give each expert a label that says what it is for.")
        if folded.count(plain) > 1:
            raise ValueError(f"The label {label!r} occurs twice; labels must differ by more than case and spaces.")


def choose(
    labels: list[str], probabilities: np.ndarray, sure: np.ndarray, errors: Mapping[int, str], start: float
) -> Dispatch:
    """Return the most probable label of each prompt that is sure and has no error, otherwise `"base"`."""
    choices = [
        labels[int(row.argmax())] if certain and i not in errors else BASE
        for i, (row, certain) in enumerate(zip(probabilities, sure, strict=True))
    ]
    return Dispatch(labels, probabilities, choices, time.perf_counter() - start, dict(errors))


def text_of_prompt(prompt: Any) -> str:
    """
    Return a prompt as text without outer whitespace, which many chat templates remove. Of messages, those of the user
    count, joined by newlines.

    Raises:
        ValueError: The prompt is empty.
        TypeError: The prompt is neither text nor messages.
    """
    if not isinstance(prompt, (str, list, tuple)):
        raise TypeError(f"A prompt must be text or a list of messages, got {prompt!r}.")
    turns = (
        [prompt]
        if isinstance(prompt, str)
        else [content_text(message["content"]) for message in prompt if message["role"] == "user"]
    )
    text = "\n".join(turn.strip() for turn in turns)
    if not text.strip():
        raise ValueError("A prompt is empty.")
    return text
