"""The space that a search moves in: how a vector of variables becomes mixture weights α."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union

import numpy as np

from ..tuner.rows import group_of_each

Granularity = Union[Literal["expert", "layer", "module"], Mapping[str, str]]


class WeightSpace:
    """
    Mixture weights `α [experts, groups]`, one for each expert and group of modules, as a vector `[experts * groups]`.

    Args:
        experts (`Sequence[str]`): The experts.
        modules (`Sequence[str]`): The adapted modules.
        granularity (`str` or `dict[str, str]`): `"expert"` for one α per expert, `"layer"` for one per expert and block
            of the model, `"module"` for one per expert and weight matrix (as in the paper's code), or the name of a
            group for each module.
        bounds (`tuple[float, float]`): Smallest and largest α. They must hold 0, which is the base model.
        normalize (`bool`): Scale α down where `Σ_k |α_k|` of a group is above 1, so that no mixture is larger than the
            experts are.

    Attributes:
        groups: Name of each group, one if there are none.
        group_of: Index of the group of each module; `None` if there is one group.

    Raises:
        ValueError: Bounds without 0, or a granularity that leaves out a module.
    """

    def __init__(
        self,
        experts: Sequence[str],
        modules: Sequence[str],
        granularity: Granularity = "expert",
        bounds: tuple[float, float] = (0.0, 1.0),
        normalize: bool = False,
    ) -> None:
        if len(bounds) != 2:
            raise ValueError(f"`bounds` must be a smallest and a largest weight, got {bounds}.")
        low, high = bounds
        if not (np.isfinite(low) and np.isfinite(high) and low <= 0 <= high and low < high):
            raise ValueError(f"`bounds` must be a smallest and a largest weight, with 0 between them, got {bounds}.")
        self.experts, self.low, self.high, self.normalize = list(experts), float(low), float(high), normalize
        self.group_of, self.groups = _groups(granularity, modules)

    @property
    def dim(self) -> int:
        """Number of variables."""
        return len(self.experts) * len(self.groups)

    @property
    def bounds(self) -> np.ndarray:
        """`[dim, 2]`."""
        return np.tile([self.low, self.high], (self.dim, 1))

    def weights(self, x: np.ndarray) -> np.ndarray:
        """α `[experts, groups]` of a vector `[dim]`.

        Raises:
            ValueError: Another shape, or values that are not finite.
        """
        x = np.asarray(x, dtype=np.float64)
        if x.shape != (self.dim,) or not np.isfinite(x).all():
            raise ValueError(f"Expected {self.dim} finite weights, got {x.tolist()}.")
        alpha: np.ndarray = x.reshape(len(self.experts), len(self.groups))
        return alpha / np.maximum(1.0, np.abs(alpha).sum(axis=0)) if self.normalize else alpha

    def vector(self, per_expert: Sequence[float] | np.ndarray) -> np.ndarray:
        """The vector of a mixture `[experts]` that is the same in all groups."""
        return np.repeat(np.asarray(per_expert, dtype=np.float64), len(self.groups))

    def simple(self) -> dict[str, np.ndarray]:
        """The mixtures that need no search, simplest first: the base model, each expert alone, all in equal parts."""
        count = len(self.experts)
        alone = dict(zip(self.experts, np.eye(count), strict=True))
        plain = {BASE: np.zeros(count), **alone, UNIFORM: np.full(count, 1 / count)}
        return {name: self.vector(alpha) for name, alpha in plain.items()}


BASE = "base"
UNIFORM = "uniform"


def _groups(granularity: Any, modules: Sequence[str]) -> tuple[dict[str, int] | None, list[str]]:
    """Index of the group of each module, and the groups' names."""
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
            f"`granularity` must be 'expert', 'layer', 'module' or a group for each module, got {granularity!r}."
        )
    if missing := [module for module in modules if module not in granularity]:
        raise ValueError(f"`granularity` has no group for {len(missing)} modules, the first is {missing[0]!r}.")
    if unknown := [name for name in granularity if name not in modules]:
        raise ValueError(f"`granularity` names {unknown[0]!r}, which is no adapted module, such as {modules[0]!r}.")
    labels = list(dict.fromkeys(str(granularity[module]) for module in modules))
    return {module: labels.index(str(granularity[module])) for module in modules}, labels


def _block(module: str) -> str:
    """`model.layers.3.mlp.up_proj` → `model.layers.3`."""
    parts = module.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: number + 1])
