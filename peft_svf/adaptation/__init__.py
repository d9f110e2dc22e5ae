"""Self-adaptation at inference: mixtures of experts, searched from a few examples."""

from ..scoring import LogLikelihoodObjective, Objective, RewardObjective
from .cem import CrossEntropyMethod
from .mixture import AdaptiveMixture, MixtureResult

__all__ = [
    "AdaptiveMixture",
    "CrossEntropyMethod",
    "LogLikelihoodObjective",
    "MixtureResult",
    "Objective",
    "RewardObjective",
]
