"""From names and folders to a model that adapts itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftModel

from ..tuner.config import SVFRuntimeConfig
from .experts import expert_config
from .mixture import AdaptiveMixture

CLASSIFIER = "svf-classifier"  # the adapter that classifies, beside the experts


def load_experts(
    model_name_or_path: str,
    experts: Mapping[str, str],
    *,
    classifier: str | None = None,
    base_check: Any = "error",
    runtime_config: SVFRuntimeConfig | None = None,
    **kwargs: Any,
) -> AdaptiveMixture:
    """
    A base model with its tokenizer, experts, and a classification expert if there is one. The mixture that they are
    loaded as is uniform and need not be used.

    Args:
        model_name_or_path (`str`): Hub id or folder of the base model.
        experts (`dict[str, str]`): Name of each expert with its Hub id or folder.
        classifier (`str`, *optional*): Hub id or folder of an SVF adapter that classifies prompts.
        base_check (`str`): If an expert is for another base model: `"error"`, `"warn"` or `"ignore"`.
        runtime_config ([`SVFRuntimeConfig`], *optional*): In the place of `base_check`.
        kwargs: For `AutoModelForCausalLM.from_pretrained`.
    """
    mixture = AdaptiveMixture.from_pretrained(
        model_name_or_path, experts, base_check=base_check, runtime_config=runtime_config, **kwargs
    )
    if classifier is not None:
        if CLASSIFIER in experts:
            raise ValueError(f"An expert cannot be called {CLASSIFIER!r}.")
        model: PeftModel = mixture.model
        config = expert_config(CLASSIFIER, classifier, base_check, runtime_config)
        model.add_adapter(CLASSIFIER, config)
        model.load_adapter(classifier, adapter_name=CLASSIFIER, is_trainable=False)
        mixture.activate()
    return mixture
