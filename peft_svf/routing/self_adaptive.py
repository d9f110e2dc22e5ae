"""`SelfAdaptiveModel`: both passes of Transformer² in one call (section 3.2)."""

from __future__ import annotations

import functools
import inspect
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..mixture.mixture import AdaptiveMixture
from ..scoring.rewards import content_text
from ..scoring.tokens import padded, prompt_ids, with_pad_token
from .dispatch import Dispatch, Dispatcher, text_of_prompt


@dataclass
class Adapted:
    """
    Answers, and how they came about.

    Attributes:
        texts: The answer to each prompt; `None` for one that failed.
        experts: The expert of each prompt, `"other"` for the base model, or the name of a mixture.
        dispatch ([`Dispatch`], *optional*): With the probabilities; `None` if one mixture answers everything.
        seconds: Of the `"first"` and the `"second"` pass.
        errors: Index of each prompt that failed, with the reason.
    """

    texts: list[str | None]
    experts: list[str]
    dispatch: Dispatch | None
    seconds: dict[str, float]
    errors: dict[int, str] = field(default_factory=dict)


class SelfAdaptiveModel:
    """
    A model that looks at each prompt, takes the expert for it, and answers all of them in one batch.

    It has what the model has; `generate` and a call take and return what the model's do, so that it can stand where a
    model is expected, such as in `pipeline("text-generation", model=..., tokenizer=...)` or lm-eval's `HFLM`.

    Args:
        model (`PeftModel`): The model with the experts.
        tokenizer: Its tokenizer.
        dispatcher ([`Dispatcher`] or [`AdaptiveMixture`]): Chooses the experts, or is the mixture for all prompts.
        soft (`bool`): Mix the experts of each prompt by their probabilities, instead of the most probable one. Prompts
            below the dispatcher's threshold get the base model all the same.

    Example:

        ```py
        >>> dispatcher = PromptDispatcher(model, tokenizer, {"math": "numbers and sums", "logic": "puzzles"})
        >>> adaptive = SelfAdaptiveModel(model, tokenizer, dispatcher)
        >>> adaptive.chat(["What is 3 + 4?", "Who is the liar?"], max_new_tokens=64)
        ```
    """

    def __init__(
        self, model: Any, tokenizer: Any, dispatcher: Dispatcher | AdaptiveMixture, *, soft: bool = False
    ) -> None:
        self.model, self.tokenizer = model, with_pad_token(tokenizer)
        self.dispatcher, self.soft = dispatcher, soft
        if getattr(dispatcher, "model", model) is not model:
            raise ValueError("The dispatcher is for another model.")

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # not there yet, in a copy or a pickle
            raise AttributeError(name)
        found = getattr(self.model, name)
        if not inspect.ismethod(found):
            return found

        @functools.wraps(found)
        def method(*args: Any, **kwargs: Any) -> Any:
            result = found(*args, **kwargs)
            return self if result is self.model else result  # `to`, `eval` and their like

        return method

    # ------------------------------------------------------------------------------------------------ use

    def chat(
        self, prompts: Any, *, system_prompt: str | None = None, return_details: bool = False, **generation_kwargs: Any
    ) -> Any:
        """
        Answer prompts.

        A prompt that fails, such as an empty one or one that is too long for the model, does not take the others along.

        Args:
            prompts: A text, a list of messages, or a list of such. Texts become messages if the tokenizer has a chat
                template.
            system_prompt (`str`, *optional*): Before prompts that have none.
            return_details (`bool`): Return [`Adapted`].
            generation_kwargs: For `generate`, such as `max_new_tokens` and, for a single prompt, a `streamer`.

        Returns:
            The answer, or a list of answers, where `None` stands for one that failed; a warning says why.
        """
        if (generation_kwargs.get("num_return_sequences") or 1) > 1:
            raise ValueError("`num_return_sequences` must be 1: a prompt has one answer here; see `generate`.")
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Mapping))
        conversations = [prompts] if single else list(prompts)
        dispatch, names = self._first_pass(conversations)
        begun = time.perf_counter()
        texts, errors = self._answers(conversations, dispatch, system_prompt, generation_kwargs)
        seconds = {"first": 0.0 if dispatch is None else dispatch.seconds, "second": time.perf_counter() - begun}
        for i, reason in errors.items():
            warnings.warn(f"Prompt {i} was not answered: {reason}", stacklevel=2)
        if return_details:
            return Adapted(texts, names, dispatch, seconds, errors)
        return texts[0] if single else texts

    @torch.no_grad()
    def generate(self, input_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """As the model's `generate`; the first pass reads the decoded `input_ids`."""
        input_ids = kwargs.pop("inputs", None) if input_ids is None else input_ids
        with self._adapted_to(input_ids, kwargs.get("attention_mask")) as options:
            return self.model.generate(input_ids=input_ids, **options, **kwargs)

    def forward(
        self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        """As the model's; the first pass reads the decoded `input_ids`. Not for decoding by hand, where later calls
        see one token: `generate` looks once."""
        with self._adapted_to(input_ids, attention_mask) as options:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **options, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    # ------------------------------------------------------------------------------------------------ passes

    @contextmanager
    def _adapted_to(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> Iterator[dict[str, Any]]:
        """As `_adapted`, for tokens that nobody has looked at."""
        if input_ids is None:
            raise ValueError("A self-adaptive model needs `input_ids`, which the first pass reads.")
        if attention_mask is None or attention_mask.shape != input_ids.shape:
            rows = list(input_ids)
        else:
            rows = [row[mask.bool()] for row, mask in zip(input_ids, attention_mask, strict=True)]
        prompts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        dispatch, _ = self._first_pass(prompts)
        with self._adapted(dispatch, range(len(prompts))) as options:
            yield options

    def _first_pass(self, prompts: Sequence[Any]) -> tuple[Dispatch | None, list[str]]:
        if isinstance(self.dispatcher, AdaptiveMixture):
            return None, [self.dispatcher.adapter_name] * len(prompts)
        dispatch = self.dispatcher(prompts)
        return dispatch, list(dispatch.choices)

    @torch.no_grad()
    def _answers(
        self,
        conversations: list[Any],
        dispatch: Dispatch | None,
        system_prompt: str | None,
        generation_kwargs: Mapping[str, Any],
    ) -> tuple[list[str | None], dict[int, str]]:
        errors, ids = {} if dispatch is None else dict(dispatch.errors), {}
        room = self._context() - int(generation_kwargs.get("max_new_tokens") or 1)
        for i, prompt in enumerate(conversations):
            if i in errors:
                continue
            try:
                text_of_prompt(prompt)
                tokens = prompt_ids(self._rendered(prompt, system_prompt), self.tokenizer)
            except Exception as error:  # whatever a chat template finds wrong
                errors[i] = f"{type(error).__name__}: {error}"
                continue
            if len(tokens) > room:
                errors[i] = f"it has {len(tokens)} tokens, and the model's context has room for {room}."
            else:
                ids[i] = tokens
        texts: list[str | None] = [None] * len(conversations)
        if ids:
            batch = padded([*ids.values()], "left", None, self.tokenizer, self.model.device)
            with self._adapted(dispatch, list(ids)) as options:
                output = self.model.generate(
                    **batch, **options, pad_token_id=self.tokenizer.pad_token_id, **generation_kwargs
                )
            answers = self.tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for i, answer in zip(ids, answers, strict=True):
                texts[i] = answer
        return texts, errors

    @contextmanager
    def _adapted(self, dispatch: Dispatch | None, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The experts of these rows in place; yields what `generate` has to be told."""
        if dispatch is None:
            assert isinstance(self.dispatcher, AdaptiveMixture)
            self.dispatcher.activate()
            yield {}
        elif self.soft:
            with self.model.base_model.row_mixture(dispatch.soft_weights[list(rows)], dispatch.experts):
                yield {}
        else:
            yield {"adapter_names": [dispatch.adapter_names[i] for i in rows]}

    def _rendered(self, prompt: Any, system_prompt: str | None) -> Any:
        if not getattr(self.tokenizer, "chat_template", None):
            text = prompt if isinstance(prompt, str) else "\n".join(content_text(m["content"]) for m in prompt)
            return text if system_prompt is None else f"{system_prompt}\n\n{text}"
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if system_prompt is not None and not any(message["role"] == "system" for message in messages):
            messages = [{"role": "system", "content": system_prompt}, *messages]
        return messages

    def _context(self) -> int:
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**31)
