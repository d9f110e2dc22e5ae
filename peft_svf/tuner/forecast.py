"""The calls that `generate` is going to make, so that layers fold before them and not after some of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, eq=False)
class Forecast:
    """Calls to come.

    Attributes:
        calls: Their number.
        tokens: Tokens of each call.
        counted: What has counted them. Each counts once, even if other δ take turns in the meantime.
    """

    calls: int
    tokens: int
    counted: set[Any] = field(default_factory=set)


_present: ContextVar[Forecast | None] = ContextVar("peft_svf_forecast", default=None)


def present_forecast() -> Forecast | None:
    """Return the forecast for the `generate` that this thread runs; `None` if it runs none."""
    return _present.get()


@contextmanager
def forecasting(rows: int | None, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Forecast the calls of a `generate` with these arguments, if they say how many tokens to generate.

    Half of `max_new_tokens`, because an answer can end at any length up to it. `rows` are the rows of each call.
    """
    new = kwargs.get("max_new_tokens") or getattr(kwargs.get("generation_config"), "max_new_tokens", None)
    if not new or not rows:
        yield
        return
    token = _present.set(Forecast(new // 2, rows))
    try:
        yield
    finally:
        _present.reset(token)
