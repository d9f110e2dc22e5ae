"""Compares strategies of self-adaptation on tasks: accuracy, dispatch and time."""

from .strategies import Evaluation, EvaluationTask, evaluate, make_dispatcher

__all__ = ["Evaluation", "EvaluationTask", "evaluate", "make_dispatcher"]
