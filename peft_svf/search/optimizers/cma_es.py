"""CMA-ES, from the package `cmaes`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...utils.extras import needs
from .optimizer import Optimizer, Solutions


class CMAES(Optimizer):
    """
    Covariance matrix adaptation (Hansen, https://huggingface.co/papers/1604.00772), by `cmaes.CMA`.

    Args:
        mean (`np.ndarray`): `[dim]`, where to start.
        std (`float`): Standard deviation to start with.
        kwargs: More arguments of `cmaes.CMA`, such as `bounds`, `population_size` and `seed`.

    Raises:
        ImportError: `cmaes` is not installed.
    """

    def __init__(self, mean: np.ndarray, std: float, **kwargs: Any) -> None:
        try:
            from cmaes import CMA
        except ImportError as error:
            raise needs("search", "CMA-ES", "cmaes") from error
        self._cma = CMA(np.array(mean, dtype=np.float64), std, **kwargs)
        self.population_size = int(self._cma.population_size)

    @property
    def mean(self) -> np.ndarray:  # type: ignore[override]
        """Mean of the distribution, `[dim]`."""
        return np.array(self._cma.mean, dtype=np.float64)

    def ask(self) -> np.ndarray:
        return np.asarray(self._cma.ask(), dtype=np.float64)

    def tell(self, solutions: Solutions, gradients: Sequence[np.ndarray] | None = None) -> None:
        self._cma.tell(list(solutions))

    def should_stop(self) -> bool:
        return bool(self._cma.should_stop())
