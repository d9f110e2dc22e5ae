"""Tokens of an engine beside those of transformers and PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

TIE = 1e-4


@torch.no_grad()
def compare(model: Any, name: str, prompt: list[int], answer: list[int]) -> tuple[int, float | None]:
    """How many tokens of an answer are what transformers would say there, and at the first that is not, by how much the
    best logit is above that one's.

    Each token is compared after the answer before it, which is the same as decoding as long as all are equal.
    """
    ids = torch.tensor([prompt + answer])
    logits = model(ids, adapter_names=[name], logits_to_keep=len(answer) + 1).logits[0, :-1]
    best = logits.max(dim=-1)
    for place, token in enumerate(answer):
        gap = float(best.values[place] - logits[place, token])
        if token != int(best.indices[place]):
            return place, gap
    return len(answer), None


@dataclass
class Count:
    """Equal and compared tokens. What follows a tie is not compared."""

    equal: int = 0
    compared: int = 0
    ties: int = 0
    different: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.equal} of {self.compared} tokens are those of transformers, {self.ties} ties"


class Comparison:
    """Compares answers with transformers, each only once: engines repeat each other's requests."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._known: dict[Any, tuple[int, float | None]] = {}

    def count(self, names: Sequence[str], prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> Count:
        found = Count()
        for name, prompt, answer in zip(names, prompts, answers, strict=True):
            key = (name, *prompt, None, *answer)
            if key not in self._known:
                self._known[key] = compare(self.model, name, prompt, answer)
            equal, gap = self._known[key]
            tied = gap is not None and gap <= TIE
            found.equal, found.ties = found.equal + equal, found.ties + tied
            found.compared += equal if tied else len(answer)
            if gap is not None and not tied:
                found.different.append(f"{name}: the token of transformers is better by {gap:.1e}")
        return found
