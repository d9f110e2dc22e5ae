"""Save and load the embeddings of added tokens with an adapter.

If the output layer is a target, PEFT saves its base weight with the adapter, and loads that into the base model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from transformers import AutoConfig, PreTrainedModel

from .checkpoint import Checkpoint
from .config import SVFConfig
from .layer import SVFLayer


def with_resized_embeddings(
    model: Any, config: SVFConfig, state_dict: Mapping[str, torch.Tensor], selected: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Add the input embeddings to the tensors of an adapter if tokens were added and the output layer is adapted.

    PEFT saves resized embeddings. But if the output layer is a target, it saves only that one, and the rows of the new
    tokens would be lost.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()
    if not isinstance(base, PreTrainedModel) or not isinstance(base.get_output_embeddings(), SVFLayer):
        return selected
    embeddings = base.get_input_embeddings()
    before = _vocabulary_size(config)
    if before in (None, embeddings.weight.shape[0]) or isinstance(embeddings, AuxiliaryTrainingWrapper):
        return selected
    prefix = next(name for name, module in model.named_modules() if module is embeddings)
    return {**selected, **{key: value for key, value in state_dict.items() if key.startswith(f"{prefix}.")}}


def _vocabulary_size(config: SVFConfig) -> int | None:
    """Return the number of tokens of the saved base model; `None` if it cannot be read."""
    if not config.base_model_name_or_path:
        return None
    try:
        saved = AutoConfig.from_pretrained(config.base_model_name_or_path, revision=config.revision)
    except (OSError, ValueError):  # there is none, or the Hub cannot be reached: PEFT then saves no embeddings, either
        return None
    size: int | None = getattr(saved.get_text_config(), "vocab_size", None)
    return size


def check_embedding_sizes(base: Any, subject: str, checkpoint: Checkpoint) -> None:
    """Check that the model has as many tokens as the embeddings that were saved with an adapter.

    Raises:
        ValueError: It has more or fewer.
    """
    if not checkpoint.others or not isinstance(base, PreTrainedModel):
        return
    embeddings = [base.get_input_embeddings(), base.get_output_embeddings()]
    for name, module in base.named_modules():
        for key in (f"{name}.weight", f"{name}.base_layer.weight"):
            saved = checkpoint.others.get(key)
            if saved is None or not any(module is each for each in embeddings):
                continue
            found = tuple(module.weight.shape)
            if len(saved) == len(found) == 2 and saved[0] != found[0] and saved[1] == found[1]:
                raise ValueError(
                    f"{subject} has {key} of shape {list(saved)}, and that of the model is {list(found)}. If tokens "
                    f"were added, call `model.resize_token_embeddings({saved[0]})` before you load the adapter."
                )


def forget_replaced_bases(layers: Iterable[SVFLayer], checkpoint: Checkpoint) -> None:
    """Drop the basis of each layer whose base weight is about to be replaced by that of an adapter's file.

    The new rows of added tokens are in the file only. A file whose other rows differ as well belongs to another base
    model: it is left to the base check.
    """
    for layer in layers:
        key = f"{layer.module_name}.base_layer.weight"
        if key not in checkpoint.others or checkpoint.read is None or layer.quantization_backend is not None:
            continue
        weight, saved = layer.get_base_layer().weight.detach(), checkpoint.read(key)
        if weight.is_meta or weight.shape != saved.shape or torch.equal(weight, saved.to(weight)):
            continue
        distance = (weight.float() - saved.to(weight).float()).norm(dim=1)
        if (distance <= 0.02 * weight.float().norm(dim=1)).float().mean() > 0.5:  # above the rounding of bf16
            layer.forget_basis()
