"""The cross-entropy method, the search of the paper's few-shot adaptation (Transformer², section 3.2).

A Gaussian with a diagonal covariance proposes candidates. It is refitted to the best of them, the elites, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .optimizer import Optimizer, Solutions

MAX_RESAMPLES = 100


class CrossEntropyMethod(Optimizer):
    """
    Minimize a function by the cross-entropy method.

    From the second generation on, the first candidate is the incumbent: the best of the generation before. It is
    evaluated again, so that a lucky score under a noisy objective does not last.

    Args:
        mean (`np.ndarray`): `[dim]`, where to start.
        std (`float` or `np.ndarray`): Standard deviation to start with, one for all or `[dim]`.
        bounds (`np.ndarray`, *optional*): `[dim, 2]`, lower and upper. Variables outside are drawn again, and clipped
            after 100 tries.
        population_size (`int`): Candidates per generation.
        elite_ratio (`float`): Fraction of the population that the Gaussian is refitted to, at least two candidates.
        smoothing (`float`): How much of the old mean and std remains at each refit, in [0, 1). The paper: 0.
        min_std (`float`): Lower bound of the standard deviation, so that the search does not stall. The paper: 0.
        seed (`int`, *optional*): Seed of the random numbers.

    Raises:
        ValueError: An argument is out of range; the message names it.
    """

    def __init__(
        self,
        mean: np.ndarray,
        std: float | np.ndarray,
        *,
        bounds: np.ndarray | None = None,
        population_size: int = 32,
        elite_ratio: float = 0.2,
        smoothing: float = 0.0,
        min_std: float = 0.0,
        seed: int | None = None,
    ) -> None:
        self.mean: np.ndarray = np.array(mean, dtype=np.float64)
        if self.mean.ndim != 1 or not self.mean.size or not np.isfinite(self.mean).all():
            raise ValueError(f"`mean` must be a non-empty vector of finite numbers, got {mean!r}.")
        self.std = np.array(std, dtype=np.float64)
        if self.std.shape not in ((), self.mean.shape):
            raise ValueError(f"`std` must be a number or have shape {self.mean.shape}, got {self.std.shape}.")
        self.std = np.broadcast_to(self.std, self.mean.shape).copy()
        if not (np.isfinite(self.std) & (self.std > 0)).all():
            raise ValueError(f"`std` must be positive and finite, got {std!r}.")
        if not isinstance(population_size, int) or population_size < 2:
            raise ValueError(f"`population_size` must be an integer of at least 2, got {population_size}.")
        if not 0 < elite_ratio <= 1:
            raise ValueError(f"`elite_ratio` must be in (0, 1], got {elite_ratio}.")
        if not 0 <= smoothing < 1:
            raise ValueError(f"`smoothing` must be in [0, 1), got {smoothing}.")
        if not 0 <= min_std < np.inf:
            raise ValueError(f"`min_std` must be finite and not negative, got {min_std}.")
        self.bounds = None if bounds is None else np.array(bounds, dtype=np.float64)
        if self.bounds is not None:
            if self.bounds.shape != (self.dim, 2):
                raise ValueError(f"`bounds` must have shape {(self.dim, 2)}, got {self.bounds.shape}.")
            if not (self.bounds[:, 0] < self.bounds[:, 1]).all():
                raise ValueError(f"Each lower bound must be below its upper bound, got {self.bounds.tolist()}.")
            self.mean = self._clip(self.mean)

        self.population_size = population_size
        self._num_elites = min(population_size, max(2, int(elite_ratio * population_size)))
        self.smoothing = smoothing
        self.min_std = min_std
        self.generation = 0
        self.incumbent: np.ndarray | None = None
        self.incumbent_value = np.inf
        self._asked = 0
        self._rng = np.random.default_rng(seed)

    @property
    def dim(self) -> int:
        """Number of variables."""
        return len(self.mean)

    @property
    def num_elites(self) -> int:
        """How many candidates the Gaussian is refitted to."""
        return self._num_elites

    def ask(self) -> np.ndarray:
        """Return the next candidate, `[dim]`."""
        first_of_generation = self._asked % self.population_size == 0
        self._asked += 1
        if first_of_generation and self.incumbent is not None:
            return self.incumbent.copy()
        candidate = self.mean + self.std * self._rng.standard_normal(self.dim)
        for _ in range(MAX_RESAMPLES):
            # each variable alone, as they are independent: with hundreds of them, some are always outside
            outside = self._is_outside(candidate)
            if not outside.any():
                break
            candidate[outside] = (self.mean + self.std * self._rng.standard_normal(self.dim))[outside]
        return self._clip(candidate)

    def tell(self, solutions: Solutions, gradients: Sequence[np.ndarray] | None = None) -> None:
        """Refit to the elites of one generation.

        Args:
            solutions: `population_size` pairs of a candidate `[dim]` and its value.

        Raises:
            ValueError: Another number of pairs, or a value is NaN.
        """
        if len(solutions) != self.population_size:
            raise ValueError(f"Expected {self.population_size} solutions, got {len(solutions)}.")
        values = np.array([value for _, value in solutions], dtype=np.float64)
        if np.isnan(values).any():
            raise ValueError(f"Candidate {int(np.isnan(values).argmax())} has the value NaN.")
        order = np.argsort(values, kind="stable")
        candidates = np.array([solutions[i][0] for i in order])
        elites = candidates[: self._num_elites]

        keep = self.smoothing
        self.mean = keep * self.mean + (1 - keep) * elites.mean(axis=0)
        self.std = np.maximum(keep * self.std + (1 - keep) * elites.std(axis=0, ddof=1), self.min_std)
        self.incumbent, self.incumbent_value = candidates[0], float(values[order[0]])
        self.generation += 1
        self._asked = 0

    def should_stop(self) -> bool:
        """Whether the Gaussian has collapsed, so that all further candidates would be the same."""
        return bool((self.std <= np.finfo(np.float64).eps * np.maximum(1.0, np.abs(self.mean))).all())

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON-serializable values."""
        return {
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "generation": self.generation,
            "incumbent": None if self.incumbent is None else self.incumbent.tolist(),
            "incumbent_value": None if self.incumbent is None else self.incumbent_value,
            "asked": self._asked,
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict` of an optimizer with the same arguments.

        Raises:
            ValueError: The state has another number of variables.
        """
        if len(state["mean"]) != self.dim:
            raise ValueError(f"The state has {len(state['mean'])} variables, this optimizer has {self.dim}.")
        self.mean, self.std = np.array(state["mean"]), np.array(state["std"])
        self.generation, self._asked = state["generation"], state["asked"]
        self.incumbent = None if state["incumbent"] is None else np.array(state["incumbent"])
        self.incumbent_value = np.inf if self.incumbent is None else state["incumbent_value"]
        self._rng.bit_generator.state = state["rng"]

    def _is_outside(self, x: np.ndarray) -> np.ndarray:
        if self.bounds is None:
            return np.zeros(self.dim, dtype=bool)
        outside: np.ndarray = (x < self.bounds[:, 0]) | (x > self.bounds[:, 1])
        return outside

    def _clip(self, x: np.ndarray) -> np.ndarray:
        return x if self.bounds is None else np.clip(x, self.bounds[:, 0], self.bounds[:, 1])
