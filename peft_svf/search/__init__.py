"""Search of a vector by ask and tell: optimizers, evaluation, validation and result."""

from .evaluator import Evaluator
from .in_context import in_context_scores
from .optimizers.cem import CrossEntropyMethod
from .optimizers.gradient import GradientDescent
from .optimizers.optimizer import Optimizer
from .result import MixtureResult

__all__ = ["CrossEntropyMethod", "Evaluator", "GradientDescent", "MixtureResult", "Optimizer", "in_context_scores"]
