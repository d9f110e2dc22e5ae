"""How far a search is, for programs that show it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class SearchProgress:
    """
    How far a search is. The callback of a search gets it after each batch and after each generation.

    Attributes:
        done: Evaluations so far. An evaluation is one candidate on one example.
        total: The most evaluations that the search can take; `None` until the search knows it.
        history: The generations so far, as in the history of [`SearchResult`], those of cross-validation included.
    """

    done: int = 0
    total: int | None = None
    history: list[dict[str, Any]] = field(default_factory=list)


def ignore(progress: SearchProgress) -> None:
    """No callback."""
