"""Dispatch of each prompt to an expert, and both passes of Transformer² in one call."""

from .dispatch import Dispatch, Dispatcher, fixed_dispatch
from .nearest import NearestDispatcher
from .prompt import PromptDispatcher
from .self_adaptive import Adapted, SelfAdaptiveModel

__all__ = [
    "Adapted",
    "Dispatch",
    "Dispatcher",
    "NearestDispatcher",
    "PromptDispatcher",
    "SelfAdaptiveModel",
    "fixed_dispatch",
]
