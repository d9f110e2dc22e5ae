"""The dispatcher of an expert library."""

from __future__ import annotations

from typing import Any

from ..library import ExpertLibrary
from ..scoring.names import CLASSIFIER
from .dispatch import Dispatcher
from .nearest import NearestDispatcher
from .prompt import PromptDispatcher


def library_dispatcher(library: ExpertLibrary, model: Any, tokenizer: Any) -> Dispatcher:
    """
    Return the dispatcher that a library names.

    Args:
        library ([`ExpertLibrary`]): The library.
        model (`PeftModel`): The model with its experts, loaded by [`load_experts`].
        tokenizer: Its tokenizer.

    Raises:
        ValueError: An expert is not loaded, or lacks what the dispatcher needs.
    """
    method, settings = library.dispatch.method, dict(library.dispatch.settings)
    if method == "nearest":
        return NearestDispatcher(model, tokenizer, library, **settings)
    if method == "classifier":
        settings = {"adapter_name": CLASSIFIER, "other": False, **settings}
    return PromptDispatcher(model, tokenizer, library, **settings)
