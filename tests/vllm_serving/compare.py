"""Tokens of an engine beside those of transformers and PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

TIE, BASE = 1e-4, "__base__"


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
    """Compares answers with transformers, each only once: engines repeat each other's requests.

    The answers of one expert are compared in one batch, with its merged weights, which is several times faster.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._known: dict[Any, tuple[int, float | None]] = {}

    def count(self, names: Sequence[str], prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> Count:
        keys = [(n, tuple(p), tuple(a)) for n, p, a in zip(names, prompts, answers, strict=True)]
        for name in dict.fromkeys(names):
            if new := [key for key in keys if key[0] == name and key not in self._known]:
                self._known.update(zip(new, self._compare(name, new), strict=True))
        found = Count()
        for key in keys:
            equal, gap = self._known[key]
            tied = gap is not None and gap <= TIE
            found.equal, found.ties = found.equal + equal, found.ties + tied
            found.compared += equal if tied else len(key[2])
            if gap is not None and not tied:
                found.different.append(f"{key[0]}: the token of transformers is better by {gap:.1e}")
        return found

    @torch.no_grad()
    def _compare(self, name: str, keys: Sequence[Any]) -> list[tuple[int, float | None]]:
        model = self.model
        model.base_model.disable_adapter_layers() if name == BASE else model.base_model.merge_adapter([name])
        texts = [[*prompt, *answer] for _, prompt, answer in keys]
        longest = max(map(len, texts))
        ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
        mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
        llama = model.base_model.model
        hidden = llama.model(input_ids=ids, attention_mask=mask).last_hidden_state
        found = []
        for row, (_, prompt, answer) in zip(hidden, keys, strict=True):
            logits = llama.lm_head(row[len(prompt) - 1 : len(prompt) + len(answer) - 1])
            gaps = logits.max(dim=-1).values - logits[torch.arange(len(answer)), torch.tensor(answer)]
            wrong = (logits.argmax(dim=-1) != torch.tensor(answer)).nonzero().flatten().tolist()
            found.append((wrong[0], float(gaps[wrong[0]])) if wrong else (len(answer), None))
        model.base_model.enable_adapter_layers() if name == BASE else model.base_model.unmerge_adapter()
        return found
