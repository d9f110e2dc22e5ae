"""Mixtures of experts, with weights found from a few examples."""

from .loading import load_experts
from .mixture import AdaptiveMixture
from .result import MixtureResult
from .space import WeightSpace

__all__ = ["AdaptiveMixture", "MixtureResult", "WeightSpace", "load_experts"]
