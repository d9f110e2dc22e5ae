"""What a search needs of an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

Solutions = Sequence[tuple[np.ndarray, float]]  # candidates `[dim]` with their values; smaller is better


class Optimizer:
    """
    Base class of optimizers, with the two calls of the `cmaes` package: `ask` for a candidate, `tell` a generation.

    Attributes:
        population_size: Candidates per generation.
        uses_gradient: Whether it has one candidate per generation, and `tell` takes its gradient.
        mean: The best guess after the last generation, `[dim]`, which is scored with the best candidates.
    """

    population_size: int
    uses_gradient: ClassVar[bool] = False
    mean: np.ndarray | None = None

    @property
    def name(self) -> str:
        """What results and checkpoints call it."""
        return type(self).__name__

    @property
    def num_elites(self) -> int:
        """How many candidates the next generation depends on. A race never drops as many."""
        return max(1, self.population_size // 4)

    def ask(self) -> np.ndarray:
        """Return the next candidate, `[dim]`."""
        raise NotImplementedError

    def tell(self, solutions: Solutions, gradients: Sequence[np.ndarray] | None = None) -> None:
        """Learn from the candidates of one generation, their values, and with `uses_gradient` their gradients."""
        raise NotImplementedError

    def should_stop(self) -> bool:
        """Whether another generation would bring nothing new."""
        return False


class ExternalOptimizer(Optimizer):
    """
    An optimizer of another library: any object with `ask()`, `tell(solutions)` and `population_size`. Its
    `should_stop()` and `mean` are used if it has them, as the optimizers of `cmaes` do.

    Raises:
        TypeError: It is a class, or lacks one of the three.
    """

    def __init__(self, inner: Any) -> None:
        if isinstance(inner, type):
            raise TypeError(
                f"`optimizer` is the class {inner.__name__}. Pass an object, such as `{inner.__name__}(...)`."
            )
        for name in ("ask", "tell", "population_size"):
            if getattr(inner, name, None) is None:
                raise TypeError(f"The optimizer {type(inner).__name__} has no `{name}`. See `peft_svf.Optimizer`.")
        self.inner, self.population_size = inner, int(inner.population_size)

    @property
    def name(self) -> str:
        return type(self.inner).__name__

    def ask(self) -> np.ndarray:
        return np.asarray(self.inner.ask(), dtype=np.float64)

    def tell(self, solutions: Solutions, gradients: Sequence[np.ndarray] | None = None) -> None:
        self.inner.tell(list(solutions))

    @property
    def mean(self) -> np.ndarray | None:  # type: ignore[override]
        mean = getattr(self.inner, "mean", None)
        return None if mean is None or callable(mean) else np.asarray(mean, dtype=np.float64)

    def should_stop(self) -> bool:
        return bool(getattr(self.inner, "should_stop", bool)())


def as_optimizer(optimizer: Any) -> Optimizer:
    """Return an optimizer as an [`Optimizer`]."""
    return optimizer if isinstance(optimizer, Optimizer) else ExternalOptimizer(optimizer)
