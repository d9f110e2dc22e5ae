"""What a search found, how certain it is, and what it cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .evaluator import Usage
from .statistics import IN_CONTEXT, SEARCHED

FEWEST = 6  # examples; for fewer the intervals are too narrow


@dataclass
class SearchResult:
    """
    The result of a search, next to the baselines.

    `scores`, `intervals` and `difference` are about the examples that `evaluated_on` names:

    - `"validation"`: held-out examples.
    - `"cross-validation"`: all examples; each part is scored by a candidate that was searched on the other parts. The
      baselines are chosen on all examples, which favours them a little.
    - `"search"`: the examples of the search itself, where `"searched"` is the best of many candidates. Evaluate it on
      other examples before you rely on it.

    Attributes:
        score: Mean score of the choice, from `scores`.
        choice: What is now in place: `"searched"` or the name of the best baseline. The searched candidate is chosen if
            its score is higher, or equal with a higher expected reward, and if it is no baseline itself.
        scores: Mean score of each baseline, of the searched candidate, and of in-context prompting (the base model with
            other examples before the question) where the examples have answers.
        expected: With `expected_reward`, the mean expected reward of the baselines and the searched candidate, which
            decides between equal scores; else empty. If the search was interrupted before the reward of the searched
            candidate was known, `scores` are expected rewards.
        intervals: 95 % confidence intervals of `scores`, by bootstrap over the examples.
        difference: Mean score of the searched candidate minus that of the best baseline, and its interval:
            (mean, low, high).
        evaluated_on: See above.
        num_evaluated: Number of different prompts in those examples.
        method: The way of searching, such as `"gradient"` or `"cem"`.
        reason: Why that way, in one line.
        objective: Name of the objective.
        candidates: Number of candidates that were scored, baselines included.
        usage: Cost: `evaluations` (pairs of a candidate and an example), `tokens`, `seconds`.
        stopped: Why the search ended: `"num_generations"`, `"patience"`, `"optimizer"`, `"max_seconds"`,
            `"interrupted"`, or `"equal_scores"`: all candidates and baselines had the same score.
        history: Per generation: `best` and `mean` score of the candidates, `elites` (the best scores), `incumbent` (the
            best candidate), and `evaluations` so far. With `expected_reward`, the scores are expected rewards.
        settings: The [`SearchConfig`] and what it led to.
    """

    score: float
    choice: str
    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    difference: tuple[float, float, float]
    evaluated_on: str
    num_evaluated: int
    method: str
    reason: str
    objective: str
    candidates: int
    usage: Usage
    stopped: str
    history: list[dict[str, Any]] = field(default_factory=list)
    expected: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def improved(self) -> bool:
        """Whether the searched candidate was chosen."""
        return self.choice == SEARCHED

    @property
    def certain(self) -> bool:
        """Whether the interval of `difference` excludes 0. Never on the examples of the search itself, nor on fewer
        than 6 examples."""
        _, low, high = self.difference
        return self.evaluated_on != "search" and self.num_evaluated >= FEWEST and (low > 0 or high < 0)

    @property
    def seconds(self) -> float:
        """Wall time."""
        return self.usage.seconds

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-serializable values."""
        return asdict(self)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the progress of the search, the scores with their intervals, and the weights.

        Returns:
            `matplotlib.figure.Figure`: The figure, also saved to `path` if given.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from ..reporting.plots import plot_result

        return plot_result(self, path)

    def _what(self) -> str:
        """Return the end of the first sentence of `str`: the weights in place."""
        return ""

    def _examples(self) -> str:
        """Return which examples the scores are about."""
        count = f"{self.num_evaluated} example" + ("" if self.num_evaluated == 1 else "s")
        kinds = {"search": f"the {count} of the search", "validation": f"{count} held out"}
        return kinds.get(self.evaluated_on, f"{count} by cross-validation")

    def __str__(self) -> str:
        others = ", ".join(f"{name} {score:.3f}" for name, score in self.scores.items())
        mean, low, high = self.difference
        verdict = "The searched mixture beats every baseline"
        if self.improved and mean <= 0:
            verdict = "The searched mixture equals the best baseline and has a higher expected reward"
        elif not self.improved and mean > 0:
            verdict = f"The search on all examples ended at a baseline; {self.choice!r} is kept"
        elif not self.improved:
            verdict = f"No searched mixture beats {self.choice!r}, which is kept"
        lines = [
            f"{verdict}: {self.objective} {self.score:.3f}{self._what()}.",
            f"Mean on {self._examples()}: {others}.",
            f"Searched minus best baseline: {mean:+.3f} [{low:+.3f}, {high:+.3f}]"
            + ("." if self.certain else ", which may be chance."),
        ]
        if self.expected:
            lines.append("Expected reward: " + ", ".join(f"{name} {v:.3f}" for name, v in self.expected.items()) + ".")
        if self.scores.get(IN_CONTEXT, -np.inf) > self.scores[self.choice]:
            lines.append(f"In-context prompting scores higher: {self.scores[IN_CONTEXT]:.3f}.")
        lines.append(f"Method: {self.reason}.")
        return "\n".join(lines)
