"""From names and folders to a model that adapts itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftModel

from ..tuner import SVFRuntimeConfig
from .dispatch import Dispatcher, PromptDispatcher
from .mixture import AdaptiveMixture, expert_config
from .nearest import NearestDispatcher

DISPATCHERS = ("prompt", "classifier", "nearest", "mixture")
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


def make_dispatcher(
    name: str,
    mixture: AdaptiveMixture,
    *,
    descriptions: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    examples: Mapping[str, Sequence[Any]] | None = None,
    weights: Mapping[str, float] | None = None,
    other: bool | None = None,
    **options: Any,
) -> Dispatcher | AdaptiveMixture:
    """
    A dispatcher for the experts of a mixture.

    Args:
        name (`str`): `"prompt"`, `"classifier"`, `"nearest"`, or `"mixture"`, which is the mixture itself.
        mixture ([`AdaptiveMixture`]): Of [`load_experts`].
        descriptions (`dict[str, str]`, *optional*): Of experts, for `"prompt"`.
        labels (`dict[str, str]`, *optional*): What the classifier calls the experts.
        examples (`dict[str, list]`, *optional*): Prompts of each expert, for `"nearest"`.
        weights (`dict[str, float]`, *optional*): Of the mixture; uniform if `None`.
        other (`bool`, *optional*): Whether "other" is offered as an answer; by default for `"prompt"` only.
        options: For the dispatcher.

    Raises:
        ValueError: Another name, or something that the dispatcher needs is missing.
    """
    model, tokenizer = mixture.model, mixture.tokenizer
    about = {expert: (descriptions or {}).get(expert, "") for expert in mixture.experts}
    if unknown := sorted({*(descriptions or {}), *(examples or {}), *(labels or {})} - {*mixture.experts}):
        raise ValueError(f"{unknown[0]!r} is none of the experts {', '.join(mixture.experts)}.")
    if name == "prompt":
        return PromptDispatcher(model, tokenizer, about, labels=labels, other=other is not False, **options)
    if name == "classifier":
        if CLASSIFIER not in model.peft_config:
            raise ValueError("Dispatch by a classification expert needs one: say where it is.")
        return PromptDispatcher(
            model, tokenizer, about, adapter_name=CLASSIFIER, labels=labels, other=bool(other), **options
        )
    if name == "nearest":
        if missing := [expert for expert in mixture.experts if not (examples or {}).get(expert)]:
            raise ValueError(f"Dispatch to the nearest examples needs some of each expert; {missing[0]!r} has none.")
        return NearestDispatcher(model, tokenizer, dict(examples or {}), **options)
    if name == "mixture":
        if weights is not None:
            mixture.set_weights(weights)
        return mixture
    raise ValueError(f"There is no dispatch {name!r}; expected one of {', '.join(DISPATCHERS)}.")
