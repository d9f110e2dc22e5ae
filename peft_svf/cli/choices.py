"""Options with a few possible values. A wrong value is refused before anything heavy is imported."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import typer

from .errors import fail

# Copies of names that live in modules which import torch. A test compares them.
DISPATCHERS = ("prompt", "classifier", "nearest", "mixture")
ENGINES = ("transformers", "vllm")
CHOOSERS = ("prompt", "nearest", "classifier")
OBJECTIVES = ("sft", "dpo", "grpo", "rloo", "reinforce")
REWARDS = ("number", "exact", "choice", "contains", "regex", "math_verify")
BASE_CHECKS = ("error", "warn", "ignore")
PARAMETRIZATIONS = ("sigmoid", "raw", "offset")


def check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    """
    Check the value of an option.

    Raises:
        ValueError: It is none of the choices; the message suggests a similar one.
    """
    if value not in choices:
        close = difflib.get_close_matches(value, choices, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(f"{option} must be {', '.join(choices[:-1])} or {choices[-1]}, got {value!r}.{hint}")


def one_of(choices: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of `typer.Option` that check its values while they are read, and complete them."""

    def check(context: typer.Context, parameter: typer.CallbackParam, value: Any) -> Any:
        if context.resilient_parsing:  # the shell completes a command
            return value
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if each is not None:
                try:
                    check_choice(parameter.opts[0], each, choices)
                except ValueError as error:
                    fail(error)
        return value

    return {"callback": check, "autocompletion": lambda: list(choices)}


def check_reward(value: str) -> None:
    """
    Check the name of a reward function. A name with a dot or a colon is the place of a custom one.

    Raises:
        ValueError: It is none of the names.
    """
    known = (*REWARDS, "loglik")
    if value not in known and not any(mark in value for mark in ".:"):
        close = difflib.get_close_matches(value, known, 1)
        hint = f"Did you mean {close[0]}?" if close else f"Expected {', '.join(known)}, or a dotted path."
        raise ValueError(f"There is no reward function {value!r}. {hint}")
