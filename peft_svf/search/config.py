"""`SearchConfig`: every setting of a search, in one place.

This file imports nothing heavy, because the command line shows its fields as help.
"""

# ruff: noqa: RUF009  # `_option` returns a dataclass field

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, Optional, Union

METHODS = ("auto", "gradient", "cem", "cma-es")
OF_SEARCH = ("population_size", "seed", "bounds")  # arguments of optimizers that are fields of the config


def _option(default: Any, help: str, *, advanced: bool = False, least: float | None = None) -> Any:
    """Make a field with its help. The command line shows the first sentence and the default, of `advanced` fields on
    request only. `least` is the smallest value."""
    about = {"help": help, "advanced": advanced, "least": least}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=about)
    return field(default=default, metadata=about)


@dataclass
class SearchConfig:
    """
    Settings of [`AdaptiveMixture.search`] and of `peft-svf search`.

    Every field explains itself in `field.metadata["help"]`, as in TRL's configs. The cross-entropy method as in the
    paper's code is `SearchConfig(method="cem", optimizer_kwargs={"mean": 1 / number_of_experts, "std": 0.5,
    "min_std": 0.0})`.

    Raises:
        ValueError: A field has a value of another kind or out of range; the message names it.
    """

    method: str = _option(
        "auto", "auto, gradient, cem (cross-entropy method) or cma-es. auto looks at the task and says what it chose."
    )
    granularity: Optional[Union[str, dict[str, str]]] = _option(
        None,
        "One weight per expert (expert), per expert and layer, or per expert and module. In Python also a dict from "
        "module to group. Default: layer for the gradient of a reward, else expert.",
    )
    bounds: tuple[float, float] = _option(
        (0.0, 1.0), "Smallest and largest weight, with 0 between them.", advanced=True
    )
    max_new_tokens: int = _option(64, "Longest answer in tokens.", least=1)
    validation: Union[str, float, None] = _option(
        "auto",
        "Fraction of examples to hold out, number of cross-validation splits, auto or none. auto: a third from 24 "
        "examples, 3 splits from 6 examples, else none.",
    )
    max_seconds: Optional[float] = _option(
        None,
        "Start no generation that would probably exceed this time in seconds. The baselines, the collected answers and "
        "one generation per search always run.",
        least=0,
    )
    checkpoint: Optional[str] = _option(None, "A JSON file for all scores, written after each generation.")
    resume: bool = _option(False, "Continue the search of the checkpoint.")
    seed: int = _option(0, "Seed of everything that is random.", least=0)

    expected_reward: Optional[bool] = _option(
        None,
        "Optimize the expected reward over answers that are collected first. It needs no more decoding, and works with "
        "every method. Default: for the gradient, which needs it.",
        advanced=True,
    )
    num_generations: Optional[int] = _option(
        None, "Most generations of a search. Default: 6, or 12 steps of the gradient.", advanced=True, least=1
    )
    population_size: int = _option(32, "Candidates per generation of cem and cma-es.", advanced=True, least=2)
    optimizer_kwargs: dict[str, Any] = _option(
        {}, "Arguments of the optimizer, such as std of cem or learning_rate of the gradient.", advanced=True
    )
    racing: bool = _option(True, "Drop candidates that score badly on some examples: half the work.", advanced=True)
    one_standard_error: bool = _option(
        True, "Keep the best baseline unless a candidate is better by one standard error.", advanced=True
    )
    patience: Optional[int] = _option(
        None, "Stop after this many generations without a better candidate.", advanced=True, least=1
    )
    in_context: bool = _option(True, "Also score in-context prompting, if the examples have answers.", advanced=True)
    generation_kwargs: dict[str, Any] = _option({}, "More arguments of generate.", advanced=True)
    reward_weights: Optional[list[float]] = _option(None, "One weight per reward function.", advanced=True)
    num_samples: int = _option(
        4, "Answers that each baseline samples to an example, for the expected reward.", advanced=True, least=0
    )
    temperature: float = _option(
        0.5,
        "Temperature of those samples and of the expected reward. A low temperature has little gradient. At 1, a small "
        "model rarely repeats a good answer.",
        advanced=True,
        least=0,
    )
    batch_size: Optional[int] = _option(
        None,
        "Batch rows. Default: 64 on a CPU, 512 on an accelerator, halved when memory is short.",
        advanced=True,
        least=1,
    )

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"`method` must be one of {', '.join(map(repr, METHODS))}, got {self.method!r}.")
        for each in fields(self):
            value, least = getattr(self, each.name), each.metadata["least"]
            if least is None or (value is None and each.default is None):
                continue
            kind: Any = Real if each.name in ("max_seconds", "temperature") else Integral
            if not isinstance(value, kind) or isinstance(value, bool) or not least <= value < math.inf:
                noun = "a number" if kind is Real else "an integer"
                raise ValueError(f"`{each.name}` must be {noun} of at least {least}, got {value!r}.")
            setattr(self, each.name, float(value) if kind is Real else int(value))
        if self.temperature == 0:
            raise ValueError("`temperature` must be above 0, because greedy answers have no gradient.")
        for name in ("resume", "racing", "one_standard_error", "in_context", "expected_reward"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (value is None and name == "expected_reward"):
                raise ValueError(f"`{name}` must be True or False, got {value!r}.")
        for name in ("generation_kwargs", "optimizer_kwargs"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"`{name}` must be a dict, got {getattr(self, name)!r}.")
        if "max_new_tokens" in self.generation_kwargs:
            raise ValueError("Pass `max_new_tokens` itself, not in `generation_kwargs`.")
        if self.optimizer_kwargs and self.method == "auto":
            raise ValueError("`optimizer_kwargs` belong to one method. Name it, such as method='gradient'.")
        if doubled := [name for name in OF_SEARCH if name in self.optimizer_kwargs]:
            raise ValueError(f"Pass `{doubled[0]}` itself, not in `optimizer_kwargs`.")
        if self.checkpoint is not None:
            self.checkpoint = os.fspath(self.checkpoint)
        if isinstance(self.validation, Real):  # numpy's numbers, too
            self.validation = int(self.validation) if isinstance(self.validation, Integral) else float(self.validation)
        if self.reward_weights is not None:
            try:
                self.reward_weights = [float(weight) for weight in self.reward_weights]
            except (TypeError, ValueError):
                raise ValueError(f"`reward_weights` must be a list of numbers, got {self.reward_weights!r}.") from None
        try:
            self.bounds = tuple(float(bound) for bound in self.bounds)  # type: ignore[assignment]
        except (TypeError, ValueError):
            raise ValueError(f"`bounds` must be a smallest and a largest weight, got {self.bounds!r}.") from None

    def changed(self, **overrides: Any) -> SearchConfig:
        """Return a copy with other values.

        Raises:
            TypeError: There is no field of a name; the message suggests one.
        """
        names = [each.name for each in fields(self)]
        for name in overrides:
            if name not in names:
                close = difflib.get_close_matches(name, names, 1)
                hint = f"Did you mean `{close[0]}`?" if close else f"It has {', '.join(names)}."
                raise TypeError(f"A search has no setting `{name}`. {hint}")
        return replace(self, **overrides)


def as_json(value: Any) -> Any:
    """Return a value as JSON stores it: arrays as lists, and what JSON does not know as text."""

    def plain(it: Any) -> Any:
        if isinstance(it, Mapping):
            return dict(it)
        return it.tolist() if hasattr(it, "tolist") else str(it)

    return json.loads(json.dumps(value, default=plain))
