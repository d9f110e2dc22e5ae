"""What the vectors of a search mean."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch


class SearchSpace(Protocol):
    """
    A box of vectors, each of which is a way to run the model.

    Attributes:
        dim: Number of variables.
        bounds: `[dim, 2]`, lower and upper.
        neutral: Name of the baseline to start from when no baseline is better than another.
    """

    @property
    def dim(self) -> int: ...

    @property
    def bounds(self) -> np.ndarray: ...

    @property
    def neutral(self) -> str: ...

    def baselines(self) -> dict[str, np.ndarray]:
        """Return the vectors that need no search by name, the simplest first: `"base"` is the base model."""
        ...

    def in_rows(self, model: Any, x: torch.Tensor) -> AbstractContextManager[None]:
        """Run batch row i of the model with vector `x[i]` within the context. `x` is `[rows, dim]`; gradients reach
        it."""
        ...
