"""Self-adaptation at inference: mixtures of experts, searched from a few examples, and an expert for each prompt."""

from ..scoring import LogLikelihoodObjective, Objective, RewardObjective, WeightedObjective
from .cem import CrossEntropyMethod
from .dispatch import Dispatch, Dispatcher, PromptDispatcher
from .evaluation import Evaluation, EvaluationTask, evaluate
from .evaluator import Evaluator
from .in_context import in_context_scores
from .mixture import AdaptiveMixture
from .nearest import NearestDispatcher
from .optimizers import OPTIMIZERS, GradientDescent, Optimizer, RandomShooting, make_optimizer
from .result import MixtureResult
from .self_adaptive import Adapted, SelfAdaptiveModel
from .space import WeightSpace

__all__ = [
    "OPTIMIZERS",
    "Adapted",
    "AdaptiveMixture",
    "CrossEntropyMethod",
    "Dispatch",
    "Dispatcher",
    "Evaluation",
    "EvaluationTask",
    "Evaluator",
    "GradientDescent",
    "LogLikelihoodObjective",
    "MixtureResult",
    "NearestDispatcher",
    "Objective",
    "Optimizer",
    "PromptDispatcher",
    "RandomShooting",
    "RewardObjective",
    "SelfAdaptiveModel",
    "WeightSpace",
    "WeightedObjective",
    "evaluate",
    "in_context_scores",
    "make_optimizer",
]
