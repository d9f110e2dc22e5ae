"""What a search found, how sure it is, and what it cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .evaluator import Usage
from .statistics import IN_CONTEXT, SEARCHED

FEWEST = 6


@dataclass
class MixtureResult:
    """
    What a search found, next to what needs no search.

    `scores`, `intervals` and `difference` are about the examples that `judged_on` names:

    - `"validation"`: held-out examples, which the search did not see.
    - `"cross-validation"`: all examples; those of a fold are scored by a mixture that was searched on the others. The
      simple choices have no such handicap, but the best of several has some luck of its own.
    - `"search"`: the examples of the search itself, of which `"searched"` is the best of many; measure on others before
      you believe it.

    Attributes:
        weights: The weights that are now in place, per expert; with several groups, their means.
        score: The mean score of the choice, of `scores`.
        choice: Where they come from: `"searched"`, or the name of the best simple choice:
            `"base"`, an expert, or `"uniform"`. What was searched is chosen if its score is higher, or if it is equal
            and the expected reward is higher, and if it is not itself a simple choice.
        scores: Mean score of the base model, every expert alone, the uniform mixture, the searched one, and where the
            examples have answers, of in-context prompting: the base model with the other examples before the question.
        expected: Where the expected reward was climbed in the place of the reward, what all of these but in-context
            prompting have of it on the same examples; else empty. It decides between equal scores. If it was
            interrupted before the rewards of the searched mixture were known, `scores` are expected rewards.
        intervals: Their 95 % confidence intervals, by bootstrap over the examples.
        difference: Mean score of the searched mixture less that of the best simple choice, and its interval, as
            (mean, low, high).
        judged_on: See above.
        judged: How many examples that are.
        searched_weights: The weights that the search found, whether chosen or not.
        groups: The groups of modules that have weights of their own, `["all"]` if there is one.
        alpha: The weights in place, per expert and group.
        history: Per generation: `best` and `mean` score of the candidates, `elites`, the scores of the best,
            `incumbent`, the weights of the best `[experts * groups]`, and `rows`, what was spent until then. The scores
            are expected rewards if `expected` is not empty.
        objective: Name of the objective.
        evaluations: Number of mixtures that were scored, simple choices included.
        usage: What it cost: `rows` (pairs of a mixture and an example), `tokens`, `seconds`.
        stopped: Why the search ended: `"num_generations"`, `"patience"`, `"optimizer"`, `"max_rows"`, `"max_tokens"`,
            `"max_seconds"` or `"interrupted"`.
        settings: What the search was called with, seed included.
    """

    weights: dict[str, float]
    score: float
    choice: str
    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    difference: tuple[float, float, float]
    judged_on: str
    judged: int
    searched_weights: dict[str, float]
    groups: list[str]
    alpha: dict[str, list[float]]
    objective: str
    evaluations: int
    usage: Usage
    stopped: str
    history: list[dict[str, Any]] = field(default_factory=list)
    expected: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def improved(self) -> bool:
        """Whether the searched mixture was chosen, see `choice`."""
        return self.choice == SEARCHED

    @property
    def certain(self) -> bool:
        """Whether that, or the opposite, is more than the luck of the examples: 0 is not in the interval of the
        difference. Never on the examples of the search itself, of which the searched mixture is the best of many, nor
        on fewer than 6, for which such intervals are too narrow."""
        _, low, high = self.difference
        return self.judged_on != "search" and self.judged >= FEWEST and (low > 0 or high < 0)

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.usage.seconds

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return asdict(self)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the progress of the search, the scores with their intervals, and α.

        Returns:
            The figure (`matplotlib.figure.Figure`), which notebooks show; it is also saved if there is a path.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from ..reporting.plots import plot_result

        return plot_result(self, path)

    def __str__(self) -> str:
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in self.weights.items())
        others = ", ".join(f"{name} {score:.3f}" for name, score in self.scores.items())
        mean, low, high = self.difference
        verdict = "the searched mixture beat every simple choice"
        if self.improved and mean <= 0:
            verdict = "the searched mixture is as good as the best simple choice, and has the higher expected reward"
        elif not self.improved and mean > 0:
            verdict = f"on all examples the search found nothing new, and {self.choice!r} was kept"
        elif not self.improved:
            verdict = f"nothing beat {self.choice!r}, which was kept"
        sure = "" if self.certain else ", which may be luck"
        text = (
            f"{verdict}: {self.objective} {self.score:.3f} with {weights} ({self.judged_on} on {self.judged} examples: "
            f"{others}; searched less "
            f"the best simple choice {mean:+.3f} [{low:+.3f}, {high:+.3f}]{sure})"
        )
        if self.expected:
            text += ". Expected reward, as far as known answers tell: " + ", ".join(
                f"{name} {mean:.3f}" for name, mean in self.expected.items()
            )
        if self.scores.get(IN_CONTEXT, -np.inf) > self.scores[self.choice]:
            text += f". Prompting the base model with the examples themselves scored {self.scores[IN_CONTEXT]:.3f}"
        return text
