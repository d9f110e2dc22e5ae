"""The expected reward of a sampled answer, as far as known answers tell: with a gradient, where the reward has none."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .examples import check_examples
from .objectives import Batched
from .prefix import Prefix, common_prefix, kept_of, padding_may_be_inside, takes
from .tokens import answer_logps, log_probabilities, padded, prompt_ids, with_pad_token

MOST = 8  # answers to an example
# Between greedy decoding, which has no gradient, and all that a small model rambles at 1.
TEMPERATURE = 0.5


@dataclass(frozen=True)
class Prompts:
    """Keys and values of prompts that were read, all but the last token of each, and their mask, `[rows, tokens]`."""

    kept: Prefix
    mask: torch.Tensor


class ExpectedRewardObjective(Batched):
    """
    `Σ_y r(y) p(y | x)` over known answers y to each example x, with p at a temperature. Needs no decoding, is hardly
    ever tied, and can be differentiated.

    With rewards of at least 0 that is a lower bound of the expected reward of an answer sampled at that temperature,
    and the nearer to it the more of the likely answers are known. The lower the temperature, the more is it about the
    greedy answer. Where some rewards of an example are negative, all are counted from the lowest on. An answer that
    begins with another one does not count beside it. Nothing can be told of answers that are so long that none has a
    probability to speak of.

    Args:
        examples (`Sequence[dict]`): Rows with a `"prompt"` (text or messages) and `"answers"`, pairs of tokens, ends
            included, and their reward.
        tokenizer: The model's tokenizer.
        batch_size (`int`): Examples at once, when the objective is called for all of them.
        most (`int`): Of more answers to an example, those with the highest rewards count, the first ones of equals.
        temperature (`float`): What logits are divided by.
    """

    name = "expected reward"
    deterministic = True

    def __init__(
        self,
        examples: Sequence[dict[str, Any]],
        tokenizer: Any,
        *,
        batch_size: int = 16,
        most: int = MOST,
        temperature: float = TEMPERATURE,
    ) -> None:
        if not 0 < temperature < math.inf:
            raise ValueError(f"`temperature` must be positive, got {temperature}.")
        if most < 1:
            raise ValueError(f"`most` must be at least 1, got {most}.")
        self.tokenizer, self.batch_size = with_pad_token(tokenizer), batch_size
        self.most, self.temperature = most, temperature
        self._goes_on = True  # whether models could go on from prompts that they had read
        self._take(examples)

    def _take(self, examples: Sequence[dict[str, Any]]) -> None:
        self.examples = check_examples(examples, ["prompt"])
        every = [_checked(i, row.get("answers")) for i, row in enumerate(self.examples)]
        self._prompts = [prompt_ids(row["prompt"], self.tokenizer) for row in self.examples]
        self._lowest = [min([0.0, *(reward for _, reward in answers)]) for answers in every]
        self._answers = [
            [(ids, reward - lowest) for ids, reward in _apart(answers) if reward > lowest][: self.most]
            for answers, lowest in zip(every, self._lowest, strict=True)
        ]
        self.prefix_ids = common_prefix(self._prompts)

    def lengths(self) -> list[int]:
        return [
            len(prompt) + sum(len(ids) for ids, _ in answers)
            for prompt, answers in zip(self._prompts, self._answers, strict=True)
        ]

    def count(self, index: int) -> int:
        """How many answers to an example count; as many rows it takes."""
        return len(self._answers[index])

    def read(self, model: Any, indices: Sequence[int], prefix: Prefix | None = None) -> Prompts | None:
        """
        Let a model read the prompts of these examples, one row each, for all answers to them.

        Returns:
            `None` if it cannot go on from them: see [`read_prefix`].
        """
        start = 0 if prefix is None else len(prefix)
        begun = [self._prompts[i][:-1] for i in indices]
        if not self._goes_on or not padding_may_be_inside(model) or max(map(len, begun)) == start:
            return None
        batch = padded(begun, "left", prefix, self.tokenizer, model.device)
        mask = batch["attention_mask"]
        read = {"input_ids": batch["input_ids"][:, start:], "position_ids": _positions(mask)[:, start:]}
        fewer = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
        kept = kept_of(model(**{**batch, **read}, use_cache=True, **fewer), mask.shape[1])
        self.tokens += sum(map(len, begun))
        self._goes_on = kept is not None
        if kept is None:
            return None
        return Prompts(kept, mask)

    @torch.no_grad()
    def score(self, model: Any, indices: Sequence[int], prompts: Prompts | None = None) -> list[float]:
        scores: list[float] = self.differentiable(model, indices, prompts).tolist()
        return scores

    def differentiable(self, model: Any, indices: Sequence[int], prompts: Prompts | None = None) -> torch.Tensor:
        """
        As `score`, with a graph: `[examples]`.

        Args:
            model: Gets one row for each of the answers, in their order.
            indices: The examples.
            prompts: Their prompts as the model has read them; without, it reads them with each answer.
        """
        places = [place for place, i in enumerate(indices) for _ in self._answers[i]]
        sums = torch.tensor([self._lowest[i] for i in indices], device=model.device)
        if not places:
            return sums
        answers = [ids for i in indices for ids, _ in self._answers[i]]
        asked = [self._prompts[indices[place]] for place in places]
        if prompts is None:
            whole = [(prompt + ids, len(prompt)) for prompt, ids in zip(asked, answers, strict=True)]
            self.tokens += sum(len(ids) for ids, _ in whole)
            each = answer_logps(model, whole, self.tokenizer, temperature=self.temperature)
            logps = torch.stack([of_tokens.sum() for of_tokens in each])
        else:
            self.tokens += sum(map(len, answers))
            # the last token of the prompt is read here, as it is the one that the answer's first follows
            rest = [[prompt[-1], *ids] for prompt, ids in zip(asked, answers, strict=True)]
            logps = self._logps(model, rest, prompts.kept.rows(places), prompts.mask[places])
        rewards = torch.tensor([reward for i in indices for _, reward in self._answers[i]], device=logps.device)
        return sums.index_add(0, torch.tensor(places, device=logps.device), rewards * logps.exp())

    def _logps(self, model: Any, rows: list[list[int]], kept: Prefix, before: torch.Tensor) -> torch.Tensor:
        """Log-probability of each row but for its first token, `[rows]`, after what is kept."""
        batch = self.tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt").to(model.device)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        whole = torch.cat([before, mask[:, :-1]], dim=1)
        logits = model(
            input_ids=ids[:, :-1],
            attention_mask=whole,
            position_ids=_positions(whole)[:, before.shape[1] :],
            past_key_values=kept.cache(),
        ).logits
        logps = log_probabilities(logits, ids[:, 1:], self.temperature)
        return logps.where(mask[:, 1:].bool(), 0.0).sum(dim=1)


def _checked(number: int, answers: Any) -> list[tuple[list[int], float]]:
    """
    Raises:
        ValueError: They are no pairs of tokens and a finite reward.
    """
    try:
        pairs = [([operator.index(token) for token in ids], float(reward)) for ids, reward in answers]
    except (TypeError, ValueError):
        pairs = None
    if pairs is None or not all(math.isfinite(reward) for _, reward in pairs):
        raise ValueError(
            f'The "answers" of example {number} are {answers!r}; expected pairs of tokens and a finite reward.'
        )
    return pairs


def _apart(answers: Sequence[tuple[Sequence[int], float]]) -> list[tuple[list[int], float]]:
    """Answers of which none begins with another, those with the highest rewards first; the first ones of equals."""
    known = {tuple(ids): reward for ids, reward in answers if len(ids)}
    apart = {ids: r for ids, r in known.items() if not any(ids[:length] in known for length in range(1, len(ids)))}
    return [(list(ids), reward) for ids, reward in sorted(apart.items(), key=lambda pair: -pair[1])]


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(dim=1) - 1).clamp(min=0)
