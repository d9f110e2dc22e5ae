"""Check an adapter's tensors against the model that loads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from .checkpoint import Checkpoint
from .layer import svf_layers
from .renames import current_names

_DELTA = ".svf_delta."


def check_checkpoint(model: nn.Module, adapter_name: str, checkpoint: Checkpoint) -> dict[str, str]:
    """Check that a checkpoint holds one healthy δ for each adapted module, and nothing that the model has no place for.

    Returns:
        `dict[str, str]`: The current names of modules that the checkpoint names as an older transformers does.

    Raises:
        ValueError: It does not, or two of its names belong to one module.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()
    wanted = {layer.module_name: layer.rank(adapter_name) for layer in svf_layers(base, adapter_name)}
    names = current_names(base, checkpoint.deltas) if wanted.keys() != checkpoint.deltas.keys() else {}
    where = f" ({checkpoint.where})" if checkpoint.where else ""
    subject = f"The checkpoint of adapter {adapter_name!r}{where}"
    strangers = _without_place(base, subject, checkpoint.others) if checkpoint.others else []
    checkpoint.renamed(names).check(subject, wanted, strangers=strangers)
    return names


def _without_place(base: nn.Module, subject: str, others: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the keys of tensors that the model does not have."""
    modules, strangers = dict(base.named_modules()), []
    embeddings = (
        [base.get_input_embeddings(), base.get_output_embeddings()] if isinstance(base, PreTrainedModel) else []
    )
    for key, shape in others.items():
        path, _, name = key.rpartition(".")
        parent = modules.get(path)
        saved = any(
            isinstance(modules.get(path.rsplit(".", n)[0]), AuxiliaryTrainingWrapper)
            for n in range(path.count(".") + 1)
        )
        tensor = getattr(parent, name, None)
        if not isinstance(tensor, torch.Tensor):
            strangers += [] if saved else [key]  # copies of `modules_to_save` have other keys than the file
        elif (parent in embeddings or not saved) and tensor.shape != shape and tensor.ndim == len(shape) == 2:
            raise ValueError(
                f"{subject} has {key} of shape {list(shape)}, and that of the model is {list(tensor.shape)}. If "
                f"tokens were added, call `model.resize_token_embeddings({shape[0]})` before you load the adapter."
            )
    return strangers


def current_key(key: str, names: Mapping[str, str], adapter_name: str) -> str:
    """Return the key of a δ under the current name of its module, and without the adapter's name."""
    head, found, tail = key.partition(_DELTA)
    if not found:
        return key
    prefix = "base_model.model." if head.startswith("base_model.model.") else ""
    name = head.removeprefix(prefix)
    return f"{prefix}{names.get(name, name)}{found}{tail.removeprefix(f'{adapter_name}.')}"
