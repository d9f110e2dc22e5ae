"""Self-adaptation at inference: mixtures of experts, searched from a few examples."""

from ..scoring import LogLikelihoodObjective, Objective, RewardObjective, WeightedObjective
from .cem import CrossEntropyMethod
from .evaluator import Evaluator
from .in_context import in_context_scores
from .mixture import AdaptiveMixture
from .optimizers import OPTIMIZERS, GradientDescent, Optimizer, RandomShooting, make_optimizer
from .result import MixtureResult
from .space import WeightSpace

__all__ = [
    "OPTIMIZERS",
    "AdaptiveMixture",
    "CrossEntropyMethod",
    "Evaluator",
    "GradientDescent",
    "LogLikelihoodObjective",
    "MixtureResult",
    "Objective",
    "Optimizer",
    "RandomShooting",
    "RewardObjective",
    "WeightSpace",
    "WeightedObjective",
    "in_context_scores",
    "make_optimizer",
]
