"""The next token of each request, with the request's own temperature, limits and seed.

transformers' continuous batching samples all requests alike, or with a few settings each and without seeds. So it runs
greedy, and this module chooses the tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

# what `generate` would do besides, with the values that do nothing
NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "min_p": (None, 0.0),
    "typical_p": (None, 1.0),
    "num_beams": (None, 1),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "min_new_tokens": (None, 0),
}
LOWEST_TEMPERATURE = 1e-5  # below, dividing by it overflows; vLLM draws the line here, too


def warn_of_unsupported(generation_config: Any) -> None:
    """Warn about settings of a model's generation config that `generate` follows and the endpoint does not."""
    values = {name: getattr(generation_config, name, None) for name in NOT_SUPPORTED}
    if found := [f"{name}={value}" for name, value in values.items() if value not in NOT_SUPPORTED[name]]:
        warnings.warn(
            f"The generation config of the model has {', '.join(found)}, which the server does not apply. Its answers "
            "differ from those of `generate`.",
            stacklevel=2,
        )


@dataclass
class Sampling:
    """
    How one request chooses its tokens.

    Args:
        temperature (`float`): 0, or less than 1e-5, takes the most probable token.
        top_p (`float`): Sample from the most probable tokens that together have this probability.
        top_k (`int`): Sample from so many tokens. 0 is no limit.
        seed (`int`, *optional*): Same seed, same answer. It does not depend on other requests.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    _random: Random = field(init=False, repr=False)
    _filters: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._random, self._filters = Random(self.seed), LogitsProcessorList()
        if self.temperature not in (0, 1):
            self._filters.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            self._filters.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            self._filters.append(TopPLogitsWarper(float(self.top_p)))

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """Return a token `[1]` for logits `[1, vocabulary]`.

        The uniform number comes from Python's generator: it is the same on each device.
        """
        scores = self._filters(None, logits)
        cumulated = scores.double().softmax(-1).cumsum(-1)
        drawn = torch.full_like(cumulated[:, :1], self._random.random()) * cumulated[:, -1:]
        return torch.searchsorted(cumulated, drawn, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def choose(logits: torch.Tensor, each: Sequence[Sampling]) -> tuple[torch.Tensor, list[bool]]:
    """
    Choose the next token of each request.

    Args:
        logits (`torch.Tensor`): `[requests, vocabulary]`, in fp32.
        each (`list[Sampling]`): How each request chooses.

    Returns:
        Tokens `[requests]`, and for each request whether its largest logit is a finite number.
    """
    largest, tokens = logits.max(-1)
    sane: list[bool] = largest.isfinite().tolist()
    for i, sampling in enumerate(each):
        if sampling.temperature >= LOWEST_TEMPERATURE and sane[i]:
            tokens[i] = sampling.draw(logits[i : i + 1])[0]
    return tokens, sane
