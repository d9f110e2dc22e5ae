"""Adam on the candidate itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class GradientDescent:
    """
    Adam on α itself, for objectives that can be differentiated: one candidate per generation, whose gradient comes
    with its value.

    Args:
        mean (`np.ndarray`): `[dim]`, where to start.
        bounds (`np.ndarray`, *optional*): `[dim, 2]`; each step ends inside.
        learning_rate (`float`): Length of the first steps, in units of α.
        betas (`tuple[float, float]`): Of Adam (Kingma and Ba, https://huggingface.co/papers/1412.6980).
    """

    population_size = 1
    uses_gradient = True

    def __init__(
        self,
        mean: np.ndarray,
        *,
        bounds: np.ndarray | None = None,
        learning_rate: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        self.mean = np.array(mean, dtype=np.float64)
        self.bounds, self.learning_rate, self.betas = bounds, learning_rate, betas
        self.generation = 0
        self._first, self._second = np.zeros_like(self.mean), np.zeros_like(self.mean)

    def ask(self) -> np.ndarray:
        return self.mean.copy()

    def tell(self, solutions: list[tuple[np.ndarray, float]], gradients: Sequence[np.ndarray] | None = None) -> None:
        """One step.

        Args:
            solutions: The candidate and its value.
            gradients: The gradient of the value with respect to the candidate, `[dim]`.
        """
        if gradients is None:
            raise ValueError("Gradient descent needs gradients, one for each solution; `tell` got none.")
        self.generation += 1
        (gradient,), (beta1, beta2) = gradients, self.betas
        self._first = beta1 * self._first + (1 - beta1) * gradient
        self._second = beta2 * self._second + (1 - beta2) * gradient**2
        first = self._first / (1 - beta1**self.generation)
        second = self._second / (1 - beta2**self.generation)
        self.mean = self.mean - self.learning_rate * first / (np.sqrt(second) + 1e-8)
        if self.bounds is not None:
            self.mean = np.clip(self.mean, self.bounds[:, 0], self.bounds[:, 1])
