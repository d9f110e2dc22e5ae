"""A dispatcher by its name, for the experts of a mixture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..mixture.mixture import AdaptiveMixture
from ..routing.dispatch import Dispatcher
from ..routing.nearest import NearestDispatcher
from ..routing.prompt import PromptDispatcher
from ..scoring.names import CLASSIFIER

DISPATCHERS = ("prompt", "classifier", "nearest", "mixture")


def make_dispatcher(
    name: str,
    mixture: AdaptiveMixture,
    *,
    descriptions: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    examples: Mapping[str, Sequence[Any]] | None = None,
    weights: Mapping[str, float] | None = None,
    **options: Any,
) -> Dispatcher:
    """
    Return a dispatcher for the experts of a mixture.

    Args:
        name (`str`): `"prompt"`, `"classifier"`, `"nearest"`, or `"mixture"`: the mixture itself, for all prompts.
        mixture ([`AdaptiveMixture`]): The experts, loaded by [`load_experts`].
        descriptions (`dict[str, str]`, *optional*): Descriptions of experts, for `"prompt"` and `"classifier"`.
        labels (`dict[str, str]`, *optional*): Labels of experts, for `"prompt"` and `"classifier"`.
        examples (`dict[str, list]`, *optional*): Example prompts of each expert, for `"nearest"`.
        weights (`dict[str, float]`, *optional*): Weights of the mixture; its current weights if `None`.
        options: Further arguments of the dispatcher. `"classifier"` offers "other" as an answer only with
            `other=True`.

    Raises:
        ValueError: The name or an expert is unknown, or something that the dispatcher needs is missing.
    """
    model, tokenizer, experts = mixture.model, mixture.tokenizer, mixture.experts
    if unknown := sorted({*(descriptions or {}), *(examples or {}), *(labels or {})} - {*experts}):
        raise ValueError(f"{unknown[0]!r} is none of the experts {', '.join(experts)}.")
    if name in ("prompt", "classifier"):
        if name == "classifier":
            if CLASSIFIER not in model.peft_config:
                raise ValueError("Dispatch by a classification expert needs one. Pass its folder or Hub id.")
            options = {"adapter_name": CLASSIFIER, "other": False, **options}
        described = {expert: (descriptions or {}).get(expert, "") for expert in experts}
        return PromptDispatcher(model, tokenizer, described, labels=labels, **options)
    if name == "nearest":
        if missing := [expert for expert in experts if not (examples or {}).get(expert)]:
            raise ValueError(
                f"Dispatch to the nearest examples needs examples of each expert; {missing[0]!r} has none."
            )
        return NearestDispatcher(model, tokenizer, dict(examples or {}), **options)
    if name == "mixture":
        if weights is not None:
            mixture.set_weights(weights)
        return mixture
    raise ValueError(f"There is no dispatch {name!r}; expected one of {', '.join(DISPATCHERS)}.")
