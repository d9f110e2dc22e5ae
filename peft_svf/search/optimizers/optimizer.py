"""Optimisers by name. All have the two calls of the `cmaes` package, `ask()` for a candidate and `tell(solutions)` for
the values of a generation, which are minimised; anything that has them, and `population_size`, can take their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from ..space import UNIFORM, WeightSpace
from .cem import CrossEntropyMethod
from .gradient import GradientDescent


class Optimizer(Protocol):
    """
    What a search needs. More that it makes use of, where an optimiser has it:

    - `num_elites` (`int`): how many of a generation the next one depends on; a race never drops those. A quarter of the
      population by default.
    - `mean` (`[dim]`): its best guess after the last generation, which is scored beside the best candidates.
    - `should_stop()`: whether it is of no use to go on.
    - `uses_gradient` (`bool`): it has one candidate per generation and its `tell` takes `gradients`, `[1, dim]`.

    Attributes:
        population_size: Candidates per generation.
    """

    population_size: int

    def ask(self) -> np.ndarray:
        """The next candidate, `[dim]`."""
        ...

    def tell(self, solutions: list[tuple[np.ndarray, float]]) -> None:
        """The candidates of a generation with their values, smaller is better."""
        ...


class RandomShooting:
    """
    Independent candidates, evenly spread over the box; the best is the result. One of the two searches in the paper's
    code.

    Args:
        bounds (`np.ndarray`): `[dim, 2]`, lower and upper.
        population_size (`int`): Candidates per generation.
        seed (`int`, *optional*): Seed of the random numbers.
    """

    num_elites = 1  # all that its result depends on

    def __init__(self, bounds: np.ndarray, *, population_size: int = 32, seed: int | None = None) -> None:
        self.bounds, self.population_size = np.array(bounds, dtype=np.float64), population_size
        self._rng = np.random.default_rng(seed)

    def ask(self) -> np.ndarray:
        return self._rng.uniform(self.bounds[:, 0], self.bounds[:, 1])

    def tell(self, solutions: list[tuple[np.ndarray, float]]) -> None:
        """Nothing is learned."""


def _cem(space: WeightSpace, start: np.ndarray, population_size: int, seed: int) -> Any:
    return CrossEntropyMethod(
        start,
        _spread(space) / 2,
        bounds=space.bounds,
        population_size=population_size,
        min_std=0.05 * 2 * _spread(space),
        seed=seed,
    )


def _cem_paper(space: WeightSpace, start: np.ndarray, population_size: int, seed: int) -> Any:
    start = _uniform(space)
    return CrossEntropyMethod(start, _spread(space), bounds=space.bounds, population_size=population_size, seed=seed)


def _cma_es(space: WeightSpace, start: np.ndarray, population_size: int, seed: int) -> Any:
    return _cmaes().CMA(start, _spread(space) / 2, bounds=space.bounds, population_size=population_size, seed=seed)


def _sep_cma_es(space: WeightSpace, start: np.ndarray, population_size: int, seed: int) -> Any:
    return _cmaes().SepCMA(start, _spread(space) / 2, bounds=space.bounds, population_size=population_size, seed=seed)


def _random(space: WeightSpace, start: np.ndarray, population_size: int, seed: int) -> Any:
    return RandomShooting(space.bounds, population_size=population_size, seed=seed)


def _gradient(space: WeightSpace, start: np.ndarray, population_size: int, seed: int) -> Any:
    return GradientDescent(start, bounds=space.bounds)


OPTIMIZERS: dict[str, Callable[[WeightSpace, np.ndarray, int, int], Any]] = {
    "cem": _cem,
    "cem-paper": _cem_paper,
    "cma-es": _cma_es,
    "sep-cma-es": _sep_cma_es,
    "random": _random,
    "gradient": _gradient,
}


def make_optimizer(
    name: str, space: WeightSpace, *, population_size: int, seed: int, start: np.ndarray | None = None
) -> Any:
    """
    An optimiser over a space, started with a quarter of the width of the box as standard deviation.

    Args:
        name (`str`): `"cem"`, the cross-entropy method with a floor of 0.05 of the box's width under the standard
            deviation; `"cem-paper"`, as in the paper's code: without it, and always from the uniform mixture, with half
            the width; `"cma-es"` and `"sep-cma-es"` of the
            package `cmaes`; `"random"`; `"gradient"`, for the log-likelihood and the expected reward.
        space ([`WeightSpace`]): The space.
        population_size (`int`): Candidates per generation.
        seed (`int`): Seed of the random numbers.
        start (`np.ndarray`, *optional*): `[dim]`, where to start; the uniform mixture if `None`.

    Raises:
        ValueError: There is none of that name, a population below 2, or `"sep-cma-es"` for one variable.
        ImportError: `cmaes` is not installed.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"There is no optimizer {name!r}; expected one of {', '.join(OPTIMIZERS)}.")
    if population_size < 2 and name != "gradient":
        raise ValueError(f"`population_size` must be at least 2, got {population_size}.")
    if name == "sep-cma-es" and space.dim < 2:
        raise ValueError("'sep-cma-es' needs two weights or more; for one, take 'cem'.")
    start = _uniform(space) if start is None else np.clip(start, space.low, space.high)
    return OPTIMIZERS[name](space, start, population_size, seed)


def _uniform(space: WeightSpace) -> np.ndarray:
    return np.clip(space.simple()[UNIFORM], space.low, space.high)


def _spread(space: WeightSpace) -> float:
    return (space.high - space.low) / 2


def _cmaes() -> Any:
    try:
        import cmaes
    except ImportError as error:
        raise ImportError("CMA-ES comes from the package cmaes: `pip install peft-svf[search]`.") from error
    return cmaes
