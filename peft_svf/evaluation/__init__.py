"""Comparison of self-adaptation strategies on tasks."""

from .dispatchers import make_dispatcher
from .strategies import Evaluation, EvaluationTask, evaluate

__all__ = ["Evaluation", "EvaluationTask", "evaluate", "make_dispatcher"]
