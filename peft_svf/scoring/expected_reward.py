"""The expected reward of a sampled answer, estimated from collected answers. It has a gradient; the reward has none."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .examples import check_examples
from .objectives import Objective
from .prefix import Prefix, common_prefix, kept_of, last_logits, padding_may_be_inside
from .tokens import answer_logps, log_probabilities, padded, prompt_ids, with_pad_token

MAX_ANSWERS = 8  # per example


@dataclass(frozen=True)
class Prompts:
    """Keys and values of prompts, without the last token of each, and their attention mask `[rows, tokens]`."""

    kept: Prefix
    mask: torch.Tensor


class ExpectedRewardObjective(Objective):
    """
    `Σ_y r(y) p(y | x)` over the collected answers y to each example x, with p at a temperature. It needs no decoding
    and has a gradient, because it depends on the model through `p` only.

    For rewards ≥ 0 this is a lower bound of the expected reward of a sampled answer. The bound is tight when the
    likely answers are among the collected ones. Negative rewards of an example are counted from the lowest one. An
    answer that starts with another collected answer is ignored, so that no text counts twice. Long answers have
    probabilities near 0, and then the objective says nothing.

    Args:
        examples (`Sequence[dict]`): Examples with a `"prompt"` (text or messages) and `"answers"`: pairs of the tokens
            of an answer, end token included, and its reward.
        tokenizer: The model's tokenizer.
        batch_size (`int`): Examples per batch, when the objective is called for all of them.
        max_answers (`int`): Answers per example; those with the highest rewards are kept, the first among equals.
        temperature (`float`): Divides the logits. A low one makes the greedy answer dominate.

    Raises:
        ValueError: A temperature or a number out of range, or `"answers"` of another form.
    """

    name = "expected reward"
    differentiable = True
    shares_prefix = True
    reads_prompts = True

    def __init__(
        self,
        examples: Sequence[dict[str, Any]],
        tokenizer: Any,
        *,
        batch_size: int = 16,
        max_answers: int = MAX_ANSWERS,
        temperature: float = 1.0,
    ) -> None:
        if not 0 < temperature < math.inf:
            raise ValueError(f"`temperature` must be positive, got {temperature}.")
        if max_answers < 1:
            raise ValueError(f"`max_answers` must be at least 1, got {max_answers}.")
        self.tokenizer, self.batch_size = with_pad_token(tokenizer), batch_size
        self.max_answers, self.temperature = max_answers, temperature
        self._prompts_can_be_kept = True  # until a model shows that they cannot
        self.take(examples)

    def take(self, examples: Sequence[dict[str, Any]]) -> None:
        self.examples = check_examples(examples, ["prompt"])
        every = [_checked(i, row.get("answers")) for i, row in enumerate(self.examples)]
        self._prompts = [prompt_ids(row["prompt"], self.tokenizer) for row in self.examples]
        self._lowest = [min([0.0, *(reward for _, reward in answers)]) for answers in every]
        self._answers = [
            [(ids, reward - lowest) for ids, reward in _apart(answers) if reward > lowest][: self.max_answers]
            for answers, lowest in zip(every, self._lowest, strict=True)
        ]
        self.prefix_ids = common_prefix(self._prompts)

    def description(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "max_answers": self.max_answers}

    def lengths(self) -> list[int]:
        return [
            len(prompt) + sum(len(ids) for ids, _ in answers)
            for prompt, answers in zip(self._prompts, self._answers, strict=True)
        ]

    def num_answers(self, index: int) -> int:
        """Return how many answers to an example count. Each takes one batch row."""
        return len(self._answers[index])

    def batch_rows(self, index: int) -> int:
        return max(1, self.num_answers(index))

    def read(self, model: Any, indices: Sequence[int], prefix: Prefix | None = None) -> Prompts | None:
        """
        Let a model read the prompts of these examples, one batch row each, to be used by all their answers.

        Returns:
            `None` if the model cannot continue from a kept prompt, see [`read_prefix`].
        """
        start = 0 if prefix is None else len(prefix)
        begun = [self._prompts[i][:-1] for i in indices]
        if not self._prompts_can_be_kept or not padding_may_be_inside(model) or max(map(len, begun)) == start:
            return None
        batch = padded(begun, "left", prefix, self.tokenizer, model.device)
        mask = batch["attention_mask"]
        read = {"input_ids": batch["input_ids"][:, start:], "position_ids": _positions(mask)[:, start:]}
        kept = kept_of(model(**{**batch, **read}, use_cache=True, **last_logits(model)), mask.shape[1])
        self.tokens += sum(map(len, begun))
        self._prompts_can_be_kept = kept is not None
        if kept is None:
            return None
        return Prompts(kept, mask)

    @torch.no_grad()
    def score(self, model: Any, indices: Sequence[int], prompts: Prompts | None = None) -> list[float]:
        scores: list[float] = self.score_tensor(model, indices, prompts).tolist()
        return scores

    def score_tensor(self, model: Any, indices: Sequence[int], prompts: Prompts | None = None) -> torch.Tensor:
        """
        As `score`, as a tensor with a gradient: `[examples]`.

        Args:
            model: Called with one batch row per answer, in their order.
            indices: The examples.
            prompts: Their prompts as read by `read`. Without it, the prompt is read again with each answer.
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
            # the last token of the prompt is read here, because it predicts the first token of the answer
            rest = [[prompt[-1], *ids] for prompt, ids in zip(asked, answers, strict=True)]
            logps = self._logps(model, rest, prompts.kept.rows(places), prompts.mask[places])
        rewards = torch.tensor([reward for i in indices for _, reward in self._answers[i]], device=logps.device)
        return sums.index_add(0, torch.tensor(places, device=logps.device), rewards * logps.exp())

    def _logps(self, model: Any, rows: list[list[int]], kept: Prefix, before: torch.Tensor) -> torch.Tensor:
        """Return the log-probability of each row after the kept prompt, without its first token: `[rows]`."""
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
    """Return the answers as pairs of a list of tokens and a reward.

    Raises:
        ValueError: They are no such pairs, or a reward is not finite.
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
    """Drop answers that start with another one, and sort by reward, highest first."""
    known = {tuple(ids): reward for ids, reward in answers if len(ids)}
    apart = {ids: r for ids, r in known.items() if not any(ids[:length] in known for length in range(1, len(ids)))}
    return [(list(ids), reward) for ids, reward in sorted(apart.items(), key=lambda pair: -pair[1])]


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(dim=1) - 1).clamp(min=0)
