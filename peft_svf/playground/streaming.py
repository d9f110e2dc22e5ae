"""Answers of several rows while they are generated; the streamers of transformers take one row."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Event
from typing import Any

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

INTERVAL = 0.1  # seconds between two texts


class RowStreamer(BaseStreamer):
    """
    Decodes the rows of `generate` as they grow.

    Args:
        tokenizer: The tokenizer.
        emit: Called with the text of each row, at most every `INTERVAL` seconds.
    """

    def __init__(self, tokenizer: Any, emit: Callable[[list[str]], None]) -> None:
        self.tokenizer, self.emit = tokenizer, emit
        self._rows: list[list[int]] | None = None  # `None` until the prompts have come
        self._last = 0.0

    def put(self, value: torch.Tensor) -> None:
        """Take the prompts `[rows, tokens]` at first, then the next token of each row `[rows]`."""
        if self._rows is None:
            self._rows = [[] for _ in value]
            return
        for row, token in zip(self._rows, value.tolist(), strict=True):
            row.append(token)
        if time.perf_counter() - self._last >= INTERVAL:
            self._last = time.perf_counter()
            self.emit(self.tokenizer.batch_decode(self._rows, skip_special_tokens=True))

    def end(self) -> None:
        """Nothing is left to do: the caller of `generate` has the whole answers."""


class Stopped(StoppingCriteria):
    """Ends all rows once an event is set."""

    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)
