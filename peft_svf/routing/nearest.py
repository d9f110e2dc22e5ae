"""Which expert a prompt is for, by its likeness to examples: one forward pass, and nothing to ask."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..scoring.prefix import takes
from ..scoring.tokens import padded, with_pad_token
from ..tuner.rows import BASE
from .dispatch import OTHER, Dispatch, Shortener, check_experts, choose


class NearestDispatcher:
    """
    Routes a prompt to the expert whose examples it is most like, by the base model's own hidden states, each of length
    1, averaged over the prompt's tokens but the first, which is huge in many models and says nothing (LoRAuter routes
    by embeddings of tasks, https://huggingface.co/papers/2601.21795). Nothing is asked or generated, so hundreds of
    experts cost no more than a few.

    A prompt that is less like the nearest expert's examples than they are like each other goes to `"other"`.

    Args:
        model (`PeftModel`): The model with the experts.
        tokenizer: Its tokenizer.
        experts (`dict[str, list]`): A few example prompts for each expert, text or messages. A dozen is good.
        threshold (`float`, *optional*): Least cosine similarity to the nearest expert. By default, for each expert, the
            least that one of its examples has to the mean of the others, less `margin`; with a single example nothing
            is refused.
        margin (`float`): See `threshold`.
        temperature (`float`): Of the softmax that makes probabilities of similarities.
        layer (`int`, *optional*): After which block to look; the middle one if `None`.
        max_prompt_tokens (`int`, *optional*): Longer prompts lose their middle. By default what the context holds.
        batch_size (`int`): Prompts at once.

    Raises:
        ValueError: No experts, one that is not loaded or has no examples, or an argument out of range.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        experts: Mapping[str, Sequence[Any]],
        *,
        threshold: float | None = None,
        margin: float = 0.05,
        temperature: float = 0.05,
        layer: int | None = None,
        max_prompt_tokens: int | None = None,
        batch_size: int = 64,
    ) -> None:
        self.model, self.tokenizer, self.batch_size = model, with_pad_token(tokenizer), batch_size
        self.experts = check_experts(model, experts)
        self.labels = [*self.experts, OTHER]
        if temperature <= 0:
            raise ValueError(f"`temperature` must be positive, got {temperature}.")
        blocks = int(model.config.get_text_config().num_hidden_layers)
        self.layer = (blocks + 1) // 2 if layer is None else layer
        if not 0 <= self.layer <= blocks:
            raise ValueError(f"`layer` must be from 0 to {blocks}, got {layer}.")
        self.temperature, self.shortener = temperature, Shortener(tokenizer, max_prompt_tokens, model)
        for name, examples in experts.items():
            if isinstance(examples, str) or not len(examples):
                raise ValueError(f"The expert {name!r} needs a list of example prompts, got {examples!r}.")
            _, wrong = self.shortener.each(examples)
            if wrong:
                i, reason = next(iter(wrong.items()))
                raise ValueError(f"Example {i} of the expert {name!r} is of no use: {reason}")

        found = {name: self._embedded([self.shortener(p) for p in examples]) for name, examples in experts.items()}
        # what all prompts have in common says nothing; with one expert there is nothing to tell it by
        means = [vectors.mean(axis=0) for vectors in found.values()]
        self._common = np.mean(means, axis=0) if len(means) > 1 else np.zeros_like(means[0])
        centred = {name: self._directions(vectors) for name, vectors in found.items()}
        self._centres = np.array([_unit(vectors.mean(axis=0)) for vectors in centred.values()])
        self.thresholds = np.array(
            [_least_similarity(v) - margin if threshold is None else threshold for v in centred.values()]
        )

    def __call__(self, prompts: Sequence[Any]) -> Dispatch:
        """
        The expert for each prompt.

        Args:
            prompts: Texts, or lists of messages.
        """
        begun = time.perf_counter()
        texts, errors = self.shortener.each(prompts)
        if not texts:
            return Dispatch(self.labels, np.empty((0, len(self.labels))), [], time.perf_counter() - begun)
        similarities = self._directions(self._embedded(texts)) @ self._centres.T
        # "other" is as near as an expert would have to be
        nearest = similarities.argmax(axis=1)
        logits = np.column_stack([similarities, self.thresholds[nearest]]) / self.temperature
        probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        return choose(self.labels, probabilities, np.ones(len(texts), dtype=bool), errors, begun)

    @torch.no_grad()
    def _embedded(self, texts: list[str]) -> np.ndarray:
        """Mean hidden state of each text, `[texts, hidden]`."""
        parts = []
        kept = {"logits_to_keep": 1} if takes(self.model, "logits_to_keep") else {}
        for start in range(0, len(texts), self.batch_size):
            ids = self.tokenizer(texts[start : start + self.batch_size])["input_ids"]
            batch = padded(ids, "right", None, self.tokenizer, self.model.device)
            output = self.model(**batch, **kept, output_hidden_states=True, adapter_names=[BASE] * len(ids))
            hidden = torch.nn.functional.normalize(output.hidden_states[self.layer].float(), dim=-1)
            mask = batch["attention_mask"].clone()
            mask[:, 0] = mask.sum(1) == 1  # a prompt of one token has no other
            weights = mask.unsqueeze(-1)
            parts.append(((hidden * weights).sum(1) / weights.sum(1)).cpu().numpy())
        return np.concatenate(parts).astype(np.float64)

    def _directions(self, vectors: np.ndarray) -> np.ndarray:
        return _unit(vectors - self._common)


def _unit(vectors: np.ndarray) -> np.ndarray:
    found: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return found


def _least_similarity(vectors: np.ndarray) -> float:
    """The least that one of some directions has to the mean of the others; -1 of one."""
    if len(vectors) < 2:
        return -1.0
    others = _unit(vectors.sum(axis=0) - vectors)
    return float((vectors * others).sum(axis=1).min())
