"""The result of a search of mixture weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..search.result import SearchResult


@dataclass
class MixtureResult(SearchResult):
    """
    The result of [`AdaptiveMixture.search`], next to the base model, every single expert and the uniform mixture.

    It has the attributes of [`SearchResult`], and these:

    Attributes:
        weights: The weights that are now in place, per expert; with several groups, their means.
        searched_weights: The weights that the search found, per expert, whether they were chosen or not.
        groups: The groups of modules, each with different weights; `["all"]` if there is one.
        alpha: The weights in place, per expert and group.
    """

    weights: dict[str, float] = field(default_factory=dict)
    searched_weights: dict[str, float] = field(default_factory=dict)
    groups: list[str] = field(default_factory=lambda: ["all"])
    alpha: dict[str, list[float]] = field(default_factory=dict)

    def _what(self) -> str:
        return " with " + ", ".join(f"{name} {weight:.2f}" for name, weight in self.weights.items())
