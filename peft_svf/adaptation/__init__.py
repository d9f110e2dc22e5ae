"""Self-adaptation at inference: mixtures of experts, searched from a few examples."""

from .cem import CrossEntropyMethod
from .mixture import AdaptiveMixture, MixtureResult
from .objectives import LogLikelihoodObjective, Objective, RewardObjective

__all__ = [
    "AdaptiveMixture",
    "CrossEntropyMethod",
    "LogLikelihoodObjective",
    "MixtureResult",
    "Objective",
    "RewardObjective",
]
