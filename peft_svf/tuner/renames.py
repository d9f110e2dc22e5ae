"""Module names of older transformers versions.

Between versions, transformers moves modules: `language_model.model.layers.0` of a vision language model became
`model.language_model.layers.0`. It renames the weights of older checkpoints when it loads them, and PEFT does the same
for LoRA. The same rules are applied to the names in an adapter here.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel


def current_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return the current name of each module that has moved, by its old name.

    Names that the model has, and those that stay unknown, are left out.

    Raises:
        ValueError: Two names belong to one module.
    """
    modules = {name.replace(".base_layer", "") for name, _ in model.named_modules()}
    names = set(names)
    unknown = sorted(names - modules)
    if not unknown or not isinstance(model, PreTrainedModel):
        return {}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    weights = {f"{name}.weight": name for name in modules}
    renamed: dict[str, str] = {}
    for name in unknown:
        key, _ = rename_source_key(f"{name}.weight", rules, [], model.base_model_prefix, weights)
        if key not in weights:
            continue
        new = weights[key]
        if new in names or new in renamed.values():
            other = new if new in names else next(old for old, found in renamed.items() if found == new)
            raise ValueError(
                f"The adapter has {name} and {other}, and both are {new} of this model. Save it again with the "
                "transformers version that it was trained with."
            )
        renamed[name] = new
    return renamed
