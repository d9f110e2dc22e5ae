"""Optimizers, one a file, and their construction by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..space import SearchSpace
from .cem import CrossEntropyMethod
from .cma_es import CMAES
from .gradient import GradientDescent
from .optimizer import Optimizer, as_optimizer

__all__ = [
    "CMAES",
    "CrossEntropyMethod",
    "GradientDescent",
    "Optimizer",
    "as_optimizer",
    "make_optimizer",
]


def make_optimizer(
    name: str,
    space: SearchSpace,
    *,
    start: np.ndarray,
    population_size: int,
    seed: int,
    **kwargs: Any,
) -> Optimizer:
    """
    Make an optimizer for a space. Sampling starts with a quarter of the width of the box as standard deviation.

    Args:
        name (`str`): `"gradient"`; `"cem"`, whose standard deviation stays above 0.05 of the width; or `"cma-es"`.
        space ([`SearchSpace`]): The space.
        start (`np.ndarray`): `[dim]`, where to start.
        population_size (`int`): Candidates per generation; the gradient has one.
        seed (`int`): Seed of the random numbers.
        kwargs: Arguments of the optimizer that replace these; `mean` may be a number for all variables.

    Raises:
        ValueError: An unknown name.
        TypeError: An argument that the optimizer does not have.
        ImportError: `cmaes` is not installed.
    """
    bounds, width = space.bounds, float(np.ptp(space.bounds[0]))
    mean = np.broadcast_to(kwargs.pop("mean", start), (space.dim,)).astype(np.float64)
    common: Mapping[str, Any] = {"bounds": bounds, "population_size": population_size, "seed": seed}
    if name not in ("gradient", "cem", "cma-es"):
        raise ValueError(f"There is no optimizer {name!r}. Use 'gradient', 'cem' or 'cma-es'.")
    try:
        if name == "gradient":
            return GradientDescent(mean, **{"bounds": bounds, **kwargs})
        if name == "cem":
            return CrossEntropyMethod(mean, **{"std": width / 4, "min_std": 0.05 * width, **common, **kwargs})
        return CMAES(mean, **{"std": width / 4, **common, **kwargs})
    except TypeError as error:
        raise TypeError(f"`optimizer_kwargs` do not fit the method {name!r}: {error}") from error
