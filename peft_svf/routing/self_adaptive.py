"""`SelfAdaptiveModel`: both passes of Transformer² in one call (section 3.2)."""

from __future__ import annotations

import functools
import inspect
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..library import ExpertLibrary
from ..scoring.prefix import last_logits_of_generate
from ..scoring.rewards import content_text
from ..scoring.tokens import context_length, padded, prompt_ids, user_turns, with_pad_token
from .dispatch import Dispatch, Dispatcher, text_of_prompt
from .library import library_dispatcher


@dataclass
class Adapted:
    """
    Answers, with the expert and the time of each pass.

    Attributes:
        texts: The answer to each prompt; `None` for a prompt that failed.
        dispatch ([`Dispatch`]): The expert of each prompt, with the probabilities.
        seconds: Seconds of the `"first"` and the `"second"` pass.
        errors: Index of each prompt that failed, with the reason.
    """

    texts: list[str | None]
    dispatch: Dispatch
    seconds: dict[str, float]
    errors: dict[int, str] = field(default_factory=dict)

    @property
    def experts(self) -> list[str]:
        """The expert of each prompt; `"base"` for the base model."""
        return self.dispatch.choices


class SelfAdaptiveModel:
    """
    A model that dispatches each prompt to an expert, then answers all prompts in one batch.

    It has the attributes of the model. `generate` and a call take and return the same as the model's. So it works where
    a model is expected, as in `pipeline("text-generation", model=..., tokenizer=...)` or lm-eval's `HFLM`.

    Args:
        model (`PeftModel`): The model with the experts.
        tokenizer: Its tokenizer.
        dispatcher ([`Dispatcher`] or [`ExpertLibrary`]): Chooses the expert of each prompt. An [`AdaptiveMixture`]
            answers all prompts. A library brings the dispatcher that it names.
        soft (`bool`): Mix the experts of each prompt by their probabilities, instead of the most probable expert only.
            Prompts below the dispatcher's threshold still get the base model.

    Raises:
        ValueError: The dispatcher belongs to another model.

    Example:

        ```py
        >>> dispatcher = PromptDispatcher(model, tokenizer, {"math": "numbers and sums", "logic": "puzzles"})
        >>> adaptive = SelfAdaptiveModel(model, tokenizer, dispatcher)
        >>> adaptive.chat(["What is 3 + 4?", "Who is the liar?"], max_new_tokens=64)
        ```
    """

    def __init__(
        self, model: Any, tokenizer: Any, dispatcher: Dispatcher | ExpertLibrary, *, soft: bool = False
    ) -> None:
        if isinstance(dispatcher, ExpertLibrary):
            dispatcher = library_dispatcher(dispatcher, model, tokenizer)
        self.model, self.tokenizer = model, with_pad_token(tokenizer)
        self.dispatcher, self.soft = dispatcher, soft
        self._user_turns = user_turns(self.tokenizer)
        if getattr(dispatcher, "model", model) is not model:
            raise ValueError("The dispatcher belongs to another model. Make one for the model that is passed here.")

    def __repr__(self) -> str:
        return f"SelfAdaptiveModel({self.dispatcher!r}{', soft=True' if self.soft else ''})"

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # not set yet while this object is copied or unpickled
            raise AttributeError(name)
        value = getattr(self.model, name)
        if not inspect.ismethod(value):
            return value

        @functools.wraps(value)
        def method(*args: Any, **kwargs: Any) -> Any:
            result = value(*args, **kwargs)
            return self if result is self.model else result  # `to`, `eval` and others return the model

        return method

    def chat(
        self, prompts: Any, *, system_prompt: str | None = None, return_details: bool = False, **generation_kwargs: Any
    ) -> Any:
        """
        Answer prompts.

        A prompt that fails, because it is empty or longer than the model's context, does not affect the others.

        Args:
            prompts: A text, a list of messages, or a list of these. Texts become messages if the tokenizer has a chat
                template.
            system_prompt (`str`, *optional*): System message for prompts without one.
            return_details (`bool`): Return [`Adapted`].
            generation_kwargs: For `generate`, such as `max_new_tokens`, or a `streamer` for a single prompt.

        Returns:
            The answer, or a list of answers. The answer to a prompt that failed is `None`, with a warning.

        Raises:
            ValueError: `num_return_sequences` is above 1.
        """
        if (generation_kwargs.get("num_return_sequences") or 1) > 1:
            raise ValueError("`num_return_sequences` must be 1 in `chat`. Use `generate` for several answers.")
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Mapping))
        conversations = [prompts] if single else list(prompts)
        dispatch = self.dispatcher(conversations)
        start = time.perf_counter()
        texts, errors = self._answers(conversations, dispatch, system_prompt, generation_kwargs)
        seconds = {"first": dispatch.seconds, "second": time.perf_counter() - start}
        for i, reason in errors.items():
            warnings.warn(f"Prompt {i} was not answered: {reason}", stacklevel=2)
        if return_details:
            return Adapted(texts, dispatch, seconds, errors)
        return texts[0] if single else texts

    @torch.no_grad()
    def generate(self, input_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Generate like the model. The first pass reads the user's turns in `input_ids`, as in `chat`; without a chat
        template it reads the whole text."""
        input_ids = kwargs.pop("inputs", None) if input_ids is None else input_ids
        with self._dispatched(input_ids, kwargs.get("attention_mask")) as options:
            options |= last_logits_of_generate(self.model, kwargs)
            return self.model.generate(input_ids=input_ids, **options, **kwargs)

    def forward(
        self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Call the model; the first pass reads the same as in `generate`. Do not decode with it token by token: later
        calls see one token only. `generate` dispatches once."""
        with self._dispatched(input_ids, attention_mask) as options:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **options, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    @contextmanager
    def _dispatched(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> Iterator[dict[str, Any]]:
        """Run the first pass on token ids; see `_adapted`."""
        if input_ids is None:
            raise ValueError("A self-adaptive model needs `input_ids`: the first pass reads them.")
        if attention_mask is None or attention_mask.shape != input_ids.shape:
            rows = list(input_ids)
        else:
            rows = [row[mask.bool()] for row, mask in zip(input_ids, attention_mask, strict=True)]
        with self._adapted(self.dispatcher([self._user_turns(row) for row in rows]), range(len(rows))) as options:
            yield options

    @contextmanager
    def _adapted(self, dispatch: Dispatch, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Apply the experts of these rows; yields the arguments that the model needs for it."""
        if self.soft:
            with self.model.base_model.row_mixture(dispatch.soft_weights[list(rows)], dispatch.experts):
                yield {}
        else:
            yield {"adapter_names": [dispatch.adapter_names[i] for i in rows]}

    @torch.no_grad()
    def _answers(
        self,
        conversations: list[Any],
        dispatch: Dispatch,
        system_prompt: str | None,
        generation_kwargs: Mapping[str, Any],
    ) -> tuple[list[str | None], dict[int, str]]:
        errors: dict[int, str] = dict(dispatch.errors)
        ids: dict[int, list[int]] = {}
        room = context_length(self.model.config, default=sys.maxsize) - int(
            generation_kwargs.get("max_new_tokens") or 1
        )
        for i, prompt in enumerate(conversations):
            if i in errors:
                continue
            try:
                text_of_prompt(prompt)
                tokens = prompt_ids(self._rendered(prompt, system_prompt), self.tokenizer)
            except Exception as error:  # a chat template may raise anything
                errors[i] = f"{type(error).__name__}: {error}"
                continue
            if len(tokens) > room:
                errors[i] = (
                    f"it has {len(tokens)} tokens, and beside the answer the context has room for {max(room, 0)}."
                )
            else:
                ids[i] = tokens
        texts: list[str | None] = [None] * len(conversations)
        if ids:
            batch = padded([*ids.values()], "left", None, self.tokenizer, self.model.device)
            with self._adapted(dispatch, list(ids)) as options:
                options |= last_logits_of_generate(self.model, generation_kwargs)
                output = self.model.generate(
                    **batch, **options, pad_token_id=self.tokenizer.pad_token_id, **generation_kwargs
                )
            answers = self.tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for i, answer in zip(ids, answers, strict=True):
                texts[i] = answer
        return texts, errors

    def _rendered(self, prompt: Any, system_prompt: str | None) -> Any:
        """The prompt in the form that `prompt_ids` takes: messages, or text without a chat template."""
        if not getattr(self.tokenizer, "chat_template", None):
            text = prompt if isinstance(prompt, str) else "\n".join(content_text(m["content"]) for m in prompt)
            return text if system_prompt is None else f"{system_prompt}\n\n{text}"
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if system_prompt is not None and not any(message["role"] == "system" for message in messages):
            messages = [{"role": "system", "content": system_prompt}, *messages]
        return messages
