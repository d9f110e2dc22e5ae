"""Gradient descent by Adam, for objectives with a gradient."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .optimizer import Optimizer, Solutions


class GradientDescent(Optimizer):
    """
    Adam on the candidate itself (Kingma and Ba, https://huggingface.co/papers/1412.6980). One candidate per generation.

    Args:
        mean (`np.ndarray`): `[dim]`, where to start.
        bounds (`np.ndarray`, *optional*): `[dim, 2]`; each step is clipped to them.
        learning_rate (`float`): Length of the first steps, in units of the variables.
        betas (`tuple[float, float]`): Decay of the moments.
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
        self._x = torch.tensor(np.asarray(mean), dtype=torch.float64)
        self._bounds = None if bounds is None else torch.tensor(np.asarray(bounds), dtype=torch.float64)
        self._adam = torch.optim.Adam([self._x], lr=learning_rate, betas=betas)

    @property
    def mean(self) -> np.ndarray:  # type: ignore[override]
        """The present candidate, `[dim]`."""
        return self._x.numpy().copy()

    def ask(self) -> np.ndarray:
        return self.mean

    def tell(self, solutions: Solutions, gradients: Sequence[np.ndarray] | None = None) -> None:
        """Take one step.

        Args:
            solutions: The candidate and its value.
            gradients: The gradient of the value with respect to the candidate, `[dim]`.
        """
        if gradients is None:
            raise ValueError("Gradient descent needs `gradients`, one per solution, but `tell` got none.")
        (gradient,) = gradients
        self._x.grad = torch.tensor(gradient, dtype=torch.float64)
        self._adam.step()
        if self._bounds is not None:
            self._x.clamp_(self._bounds[:, 0], self._bounds[:, 1])
