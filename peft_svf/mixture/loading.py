"""Load a base model with experts and a classification expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..library import ExpertLibrary
from ..scoring.names import CLASSIFIER
from ..tuner.config import SVFRuntimeConfig
from .experts import expert_config
from .mixture import AdaptiveMixture


def load_experts(
    model_name_or_path: str,
    experts: Mapping[str, str] | ExpertLibrary,
    *,
    classifier: str | None = None,
    base_check: Any = "error",
    runtime_config: SVFRuntimeConfig | None = None,
    **kwargs: Any,
) -> AdaptiveMixture:
    """
    Load a base model, its tokenizer, experts, and optionally a classification expert, as a uniform mixture.

    Args:
        model_name_or_path (`str`): Hub id or folder of the base model.
        experts (`dict[str, str]` or [`ExpertLibrary`]): Name and Hub id or folder of each expert.
        classifier (`str`, *optional*): Hub id or folder of an SVF adapter that classifies prompts. Default: that of the
            library.
        base_check (`str`): If an expert was made for another base model: `"error"`, `"warn"` or `"ignore"`.
        runtime_config ([`SVFRuntimeConfig`], *optional*): Instead of `base_check`.
        kwargs: For `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ValueError: An expert cannot be read, or has the name of the classification expert.
    """
    mixture = AdaptiveMixture.from_pretrained(
        model_name_or_path, experts, base_check=base_check, runtime_config=runtime_config, **kwargs
    )
    if classifier is None and isinstance(experts, ExpertLibrary):
        classifier = experts.classifier_path()
    if classifier is not None:
        if CLASSIFIER in experts:
            raise ValueError(f"An expert cannot be called {CLASSIFIER!r}, the name of the adapter that classifies.")
        config = expert_config(CLASSIFIER, classifier, base_check, runtime_config)
        mixture.model.add_adapter(CLASSIFIER, config)
        mixture.model.load_adapter(classifier, adapter_name=CLASSIFIER, is_trainable=False)
        mixture.activate()
    return mixture
