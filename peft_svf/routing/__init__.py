"""The expert for each prompt, and both passes of Transformer² in one call."""

from .dispatch import Dispatch, Dispatcher
from .nearest import NearestDispatcher
from .prompt import PromptDispatcher
from .self_adaptive import Adapted, SelfAdaptiveModel

__all__ = ["Adapted", "Dispatch", "Dispatcher", "NearestDispatcher", "PromptDispatcher", "SelfAdaptiveModel"]
