"""Dispatch by similarity to example prompts: one forward pass of the base model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..library import ExpertLibrary
from ..scoring.names import BASE
from ..scoring.prefix import last_logits
from ..scoring.tokens import padded, with_pad_token
from ..tuner.rows import BASE as PEFT_BASE
from .dispatch import Dispatch, Shortener, check_experts, choose


class NearestDispatcher:
    """
    Route a prompt to the expert with the most similar example prompts.

    A prompt is the mean of the base model's hidden states of its tokens, each normalized to length 1. The first token
    is left out: in many models it is very large and the same for all prompts. LoRAuter routes by such embeddings of
    tasks (https://huggingface.co/papers/2601.21795). Nothing is generated, so the cost hardly grows with the number of
    experts.

    A prompt goes to `"base"` if it is less similar to the nearest expert's examples than these are to each other.

    Args:
        model (`PeftModel`): The model with the experts.
        tokenizer: Its tokenizer.
        experts (`dict[str, list]` or [`ExpertLibrary`]): Example prompts of each expert, text or messages. A dozen per
            expert is enough.
        threshold (`float`, *optional*): Smallest cosine similarity to the nearest expert. Default: for each expert, the
            smallest similarity of one of its examples to the mean of the others, minus `margin`. An expert with one
            example refuses nothing.
        margin (`float`): See `threshold`.
        temperature (`float`): Temperature of the softmax over similarities.
        layer (`int`, *optional*): The block whose output is compared. Default: the middle one.
        max_prompt_tokens (`int`, *optional*): Longer prompts lose their middle. Default: what the context holds.
        batch_size (`int`): Prompts per batch.

    Raises:
        ValueError: There are no experts, one is not loaded or has no examples, or an argument is out of range.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        experts: Mapping[str, Sequence[Any]] | ExpertLibrary,
        *,
        threshold: float | None = None,
        margin: float = 0.05,
        temperature: float = 0.05,
        layer: int | None = None,
        max_prompt_tokens: int | None = None,
        batch_size: int = 64,
    ) -> None:
        experts = experts.examples if isinstance(experts, ExpertLibrary) else experts
        self.model, self.tokenizer, self.batch_size = model, with_pad_token(tokenizer), batch_size
        self.experts = check_experts(model, experts)
        self.labels = [*self.experts, BASE]
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
                raise ValueError(f"Example {i} of the expert {name!r} cannot be used: {reason}")

        embedded = [self._embedded([self.shortener(p) for p in examples]) for examples in experts.values()]
        # Subtract what the prompts of all experts have in common. A single expert has nothing to compare with.
        means = [vectors.mean(axis=0) for vectors in embedded]
        self._common = np.mean(means, axis=0) if len(means) > 1 else np.zeros_like(means[0])
        centred = [self._directions(vectors) for vectors in embedded]
        self._centres = np.array([_unit(vectors.mean(axis=0)) for vectors in centred])
        self.thresholds = np.array([_least_similarity(v) - margin if threshold is None else threshold for v in centred])

    def __repr__(self) -> str:
        nearest = ", ".join(f"{name} from {low:.2f}" for name, low in zip(self.experts, self.thresholds, strict=True))
        return f"NearestDispatcher(cosine similarity in layer {self.layer}: {nearest}; else {BASE})"

    def __call__(self, prompts: Sequence[Any]) -> Dispatch:
        """Choose an expert for each prompt, see [`Dispatcher`]."""
        start = time.perf_counter()
        texts, errors = self.shortener.each(prompts)
        if not texts:
            return Dispatch(self.labels, np.empty((0, len(self.labels))), [], time.perf_counter() - start)
        similarities = self._directions(self._embedded(texts)) @ self._centres.T
        # The base model is as similar as the nearest expert must be.
        nearest = similarities.argmax(axis=1)
        logits = np.column_stack([similarities, self.thresholds[nearest]]) / self.temperature
        probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        return choose(self.labels, probabilities, np.ones(len(texts), dtype=bool), errors, start)

    @torch.no_grad()
    def _embedded(self, texts: list[str]) -> np.ndarray:
        """Return the mean hidden state of each text, `[texts, hidden]`."""
        parts = []
        kept = last_logits(self.model)
        for start in range(0, len(texts), self.batch_size):
            ids = self.tokenizer(texts[start : start + self.batch_size])["input_ids"]
            batch = padded(ids, "right", None, self.tokenizer, self.model.device)
            output = self.model(**batch, **kept, output_hidden_states=True, adapter_names=[PEFT_BASE] * len(ids))
            hidden = torch.nn.functional.normalize(output.hidden_states[self.layer].float(), dim=-1)
            mask = batch["attention_mask"].clone()
            mask[:, 0] = mask.sum(1) == 1  # the only token of a prompt counts
            weights = mask.unsqueeze(-1)
            parts.append(((hidden * weights).sum(1) / weights.sum(1)).cpu().numpy())
        return np.concatenate(parts).astype(np.float64)

    def _directions(self, vectors: np.ndarray) -> np.ndarray:
        return _unit(vectors - self._common)


def _unit(vectors: np.ndarray) -> np.ndarray:
    unit: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return unit


def _least_similarity(vectors: np.ndarray) -> float:
    """Return the smallest similarity of one direction to the mean of the others; -1 for a single one."""
    if len(vectors) < 2:
        return -1.0
    others = _unit(vectors.sum(axis=0) - vectors)
    return float((vectors * others).sum(axis=1).min())
