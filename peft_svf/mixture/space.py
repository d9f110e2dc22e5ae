"""The space of mixture weights α."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Union

import numpy as np
import torch

from ..scoring.names import BASE
from ..tuner.rows import group_of_each

UNIFORM = "uniform"  # all experts with equal weights, among the baselines

Granularity = Union[Literal["expert", "layer", "module"], Mapping[str, str]]


class WeightSpace:
    """
    Mixture weights `α [experts, groups]` as a vector `[experts * groups]`: one weight per expert and group of modules.

    Args:
        experts (`Sequence[str]`): The experts.
        modules (`Sequence[str]`): The adapted modules.
        granularity (`str` or `dict[str, str]`): `"expert"` for one α per expert. `"layer"` for one per expert and
            block. `"module"` for one per expert and weight matrix, as in the paper's code. A dict gives the group of
            each module.
        bounds (`tuple[float, float]`): Smallest and largest α. They must contain 0, which is the base model.

    Attributes:
        groups: Names of the groups; one if all modules share their weights.
        group_of: Index of the group of each module; `None` for a single group.

    Raises:
        ValueError: Bounds without 0, or a granularity that leaves out a module.
    """

    neutral = UNIFORM

    def __init__(
        self,
        experts: Sequence[str],
        modules: Sequence[str],
        granularity: Granularity = "expert",
        bounds: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        low, high = bounds if len(bounds) == 2 else (np.nan, np.nan)
        if not (np.isfinite(low) and np.isfinite(high) and low <= 0 <= high and low < high):
            raise ValueError(f"`bounds` must be a smallest and a largest weight, with 0 between them, got {bounds}.")
        self.experts, self.low, self.high = list(experts), float(low), float(high)
        self.group_of, self.groups = _groups(granularity, modules)

    @property
    def dim(self) -> int:
        """Number of variables."""
        return len(self.experts) * len(self.groups)

    @property
    def bounds(self) -> np.ndarray:
        """Lower and upper bound of each variable, `[dim, 2]`."""
        return np.tile([self.low, self.high], (self.dim, 1))

    def weights(self, x: np.ndarray) -> np.ndarray:
        """Return α `[experts, groups]` of a vector `[dim]`.

        Raises:
            ValueError: Another shape, or values that are not finite.
        """
        x = np.asarray(x, dtype=np.float64)
        if x.shape != (self.dim,) or not np.isfinite(x).all():
            raise ValueError(f"Expected {self.dim} finite weights, got {x.tolist()}.")
        return x.reshape(len(self.experts), len(self.groups))

    def vector(self, per_expert: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return the vector of a mixture `[experts]` with the same weights in all groups."""
        return np.repeat(np.asarray(per_expert, dtype=np.float64), len(self.groups))

    def baselines(self) -> dict[str, np.ndarray]:
        """Return the mixtures that need no search, simplest first: the base model, each expert alone, the uniform
        mixture."""
        count = len(self.experts)
        alone = dict(zip(self.experts, np.eye(count), strict=True))
        plain = {BASE: np.zeros(count), **alone, UNIFORM: np.full(count, 1 / count)}
        return {name: self.vector(alpha) for name, alpha in plain.items()}

    def in_rows(self, model: Any, x: torch.Tensor) -> AbstractContextManager[None]:
        """Run each batch row with its own mixture, see [`SVFModel.row_mixture`]."""
        weights = x.reshape(len(x), len(self.experts), len(self.groups))
        mixture: AbstractContextManager[None] = model.base_model.row_mixture(
            weights if self.group_of is not None else weights[..., 0], self.experts, self.group_of
        )
        return mixture


def _groups(granularity: Any, modules: Sequence[str]) -> tuple[dict[str, int] | None, list[str]]:
    """Return the index of the group of each module, and the names of the groups."""
    if granularity == "expert":
        return None, ["all"]
    if granularity in ("layer", "module"):
        indices = group_of_each(granularity, modules)
        names: dict[int, str] = {}
        for module, index in indices.items():
            names.setdefault(index, module if granularity == "module" else _block(module))
        return indices, [names[i] for i in range(len(names))]
    if not isinstance(granularity, Mapping):
        raise ValueError(
            f"`granularity` must be 'expert', 'layer', 'module' or a dict from module to group, got {granularity!r}."
        )
    if missing := [module for module in modules if module not in granularity]:
        raise ValueError(f"`granularity` has no group for {len(missing)} modules, the first is {missing[0]!r}.")
    if unknown := [name for name in granularity if name not in modules]:
        raise ValueError(f"`granularity` names {unknown[0]!r}, which is not an adapted module, such as {modules[0]!r}.")
    labels = list(dict.fromkeys(str(granularity[module]) for module in modules))
    return {module: labels.index(str(granularity[module])) for module in modules}, labels


def _block(module: str) -> str:
    """`model.layers.3.mlp.up_proj` → `model.layers.3`."""
    parts = module.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: number + 1])
