"""Mixtures of experts, with weights found from a few examples."""

from ..search.result import MixtureResult
from ..search.space import WeightSpace
from .loading import load_experts
from .mixture import AdaptiveMixture

__all__ = ["AdaptiveMixture", "MixtureResult", "WeightSpace", "load_experts"]
