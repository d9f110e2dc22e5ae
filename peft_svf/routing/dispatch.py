"""Which expert a prompt is for: the first of the two passes of Transformer² (section 3.2, strategies A and B)."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ..scoring.rewards import content_text
from ..tuner.rows import BASE

OTHER = "other"
NOTHING = "N/A"  # a prompt without content


@dataclass(frozen=True)
class Dispatch:
    """
    Where some prompts go.

    Attributes:
        labels: The experts and `"other"`, which is the base model.
        probabilities: `[prompts, labels]`, each row sums to 1.
        choices: The label of each prompt.
        seconds: Duration of the first pass.
        errors: Index of each prompt that could not be dispatched, with the reason. It goes to `"other"`.
    """

    labels: list[str]
    probabilities: np.ndarray
    choices: list[str]
    seconds: float = 0.0
    errors: dict[int, str] = field(default_factory=dict)

    @property
    def experts(self) -> list[str]:
        """The labels but `"other"`."""
        return [label for label in self.labels if label != OTHER]

    @property
    def adapter_names(self) -> list[str]:
        """The adapter of each prompt, as `generate` takes them for mixed batches."""
        return [BASE if choice == OTHER else choice for choice in self.choices]

    @property
    def weights(self) -> np.ndarray:
        """The probabilities of the experts, `[prompts, experts]`; that of `"other"` is left to the base model."""
        return self.probabilities[:, [self.labels.index(expert) for expert in self.experts]]

    @property
    def soft_weights(self) -> np.ndarray:
        """`weights` as those of mixtures: 0 for prompts that were sent to `"other"` though an expert was most probable,
        as they failed or nothing was sure."""
        most = [self.labels[int(row.argmax())] for row in self.probabilities]
        refused = [choice == OTHER != best for choice, best in zip(self.choices, most, strict=True)]
        refused = [no or i in self.errors for i, no in enumerate(refused)]
        return np.where(np.array(refused, dtype=bool)[:, None], 0.0, self.weights)


class Dispatcher(Protocol):
    """What the first pass needs.

    Attributes:
        experts: Names of the adapters that it chooses from.
    """

    experts: list[str]

    def __call__(self, prompts: Sequence[Any]) -> Dispatch:
        """Look at prompts, which are text or messages."""
        ...


@dataclass
class Shortener:
    """
    Takes the middle out of prompts that are too long, with a warning for the first.

    Args:
        tokenizer: Counts and cuts.
        max_tokens (`int`, *optional*): Longest prompt; by default the model's context less `ROOM` tokens for the rest.
        model: Has that context.
    """

    tokenizer: Any
    max_tokens: int | None
    model: Any
    warned: bool = field(default=False, init=False)

    ROOM = 512

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ValueError(f"`max_prompt_tokens` must be at least 2, got {self.max_tokens}.")
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2048
        self.limit = self.max_tokens or max(context - self.ROOM, context // 2)

    def each(self, prompts: Sequence[Any]) -> tuple[list[str], dict[int, str]]:
        """Texts of all prompts, and what is wrong with which; those have a text that says nothing."""
        if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], Mapping)):
            raise TypeError(f"Expected a list of prompts, got one prompt: {prompts!r}.")
        texts, errors = [], {}
        for i, prompt in enumerate(prompts):
            try:
                texts.append(self(prompt))
            except (ValueError, TypeError, KeyError) as error:
                texts.append(NOTHING)
                errors[i] = str(error)
        return texts, errors

    def __call__(self, prompt: Any) -> str:
        """The text of a prompt, shortened if need be; of messages, those of the user."""
        text = text_of_prompt(prompt)
        if len(text.encode()) <= self.limit:  # no token is shorter than a byte
            return text
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) <= self.limit:
            return text
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"A prompt of {len(ids)} tokens is longer than the {self.limit} that dispatch reads; its middle is "
                "left out there. The second pass gets all of it.",
                stacklevel=4,
            )
        half = self.limit // 2
        decode = self.tokenizer.decode
        return f"{decode(ids[: self.limit - half])} ... {decode(ids[len(ids) - half :])}"


def check_experts(model: Any, experts: Mapping[str, Any]) -> list[str]:
    """The names, if they can be dispatched to.

    Raises:
        ValueError: None, one that is not loaded, or one that is called `"other"`.
        TypeError: No mapping.
    """
    if not isinstance(experts, Mapping):
        raise TypeError(f"`experts` must map the name of each expert to what is known of it, got {experts!r}.")
    if not experts:
        raise ValueError("No experts: dispatch needs at least one.")
    for name in experts:
        if name not in model.peft_config:
            raise ValueError(f"The expert {name!r} is not loaded; the model has {', '.join(model.peft_config)}.")
        if name == OTHER:
            raise ValueError(f"An expert cannot be called {OTHER!r}, which stands for the base model.")
    return list(experts)


def check_labels(labels: Sequence[str]) -> None:
    """Whether they can be told apart.

    Raises:
        ValueError: An empty one, or two that differ in case and spaces only.
    """
    folded = [label.strip().casefold() for label in labels]
    for label, plain in zip(labels, folded, strict=True):
        if not plain:
            raise ValueError("A label is empty.")
        if folded.count(plain) > 1:
            raise ValueError(f"The label {label!r} occurs twice.")


def choose(
    labels: list[str], probabilities: np.ndarray, sure: np.ndarray, errors: Mapping[int, str], begun: float
) -> Dispatch:
    """The most probable label of each row that is sure, else `"other"`."""
    choices = [
        labels[int(row.argmax())] if certain and i not in errors else OTHER
        for i, (row, certain) in enumerate(zip(probabilities, sure, strict=True))
    ]
    return Dispatch(labels, probabilities, choices, time.perf_counter() - begun, dict(errors))


def text_of_prompt(prompt: Any) -> str:
    """A prompt as text; of messages, those of the user.

    Raises:
        ValueError: An empty prompt.
    """
    if not isinstance(prompt, (str, list, tuple)):
        raise TypeError(f"A prompt must be text or a list of messages, got {prompt!r}.")
    text = (
        prompt
        if isinstance(prompt, str)
        else "\n".join(content_text(message["content"]) for message in prompt if message["role"] == "user")
    )
    if not text.strip():
        raise ValueError("A prompt is empty.")
    return text
