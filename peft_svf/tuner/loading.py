"""Check an adapter's tensors against the model that loads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peft import PeftModel
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .checkpoint import Checkpoint
from .config import SVFConfig
from .embeddings import check_embedding_sizes
from .layer import SVFLayer, svf_layers
from .renames import current_names

_PREFIX, _DELTA = "base_model.model.", ".svf_delta."


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
    subject = _subject(adapter_name, checkpoint)
    strangers = _without_place(base, checkpoint.others) if checkpoint.others else []
    checkpoint.renamed(names).check(subject, wanted, strangers=strangers)
    _check_complete(base, adapter_name, subject, checkpoint)
    check_embedding_sizes(base, subject, checkpoint)
    return names


def check_before_attaching(model: nn.Module, adapter_name: str, checkpoint: Checkpoint, config: SVFConfig) -> None:
    """Check what can be checked before anything is attached: the modules that the config records, and added tokens.

    Raises:
        ValueError: δ is missing, left over, or holds NaN or Inf. Or the model has another number of tokens.
    """
    subject = _subject(adapter_name, checkpoint)
    if config.expected_fingerprint:  # otherwise it was never saved
        names = current_names(model, checkpoint.deltas)
        checkpoint.renamed(names).check(subject, dict.fromkeys(config.expected_fingerprint), at_most=config.r)
    check_embedding_sizes(model, subject, checkpoint)


def _subject(adapter_name: str, checkpoint: Checkpoint) -> str:
    return f"The checkpoint of adapter {adapter_name!r}" + (f" ({checkpoint.where})" if checkpoint.where else "")


def _without_place(base: nn.Module, keys: Iterable[str]) -> list[str]:
    """Return the keys of tensors that the model does not have."""
    modules = dict(base.named_modules())

    def has_place(key: str) -> bool:
        path, _, name = key.rpartition(".")
        parents = [modules.get(path.rsplit(".", count)[0]) for count in range(path.count(".") + 1)]
        # copies of `modules_to_save` have other keys than the file
        return hasattr(parents[0], name) or any(isinstance(parent, AuxiliaryTrainingWrapper) for parent in parents)

    return [key for key in keys if not has_place(weight_key(base, key))]


def weight_key(model: Any, key: str) -> str:
    """Return the key of a saved base weight as the model has it.

    PEFT saves the weights of resized embeddings. Their keys depend on whether any adapter adapts the output layer.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()
    path, _, name = key.replace(".base_layer.", ".").rpartition(".")
    if name != "weight" or _DELTA in key:
        return key
    try:
        module = base.get_submodule(path.removeprefix(_PREFIX))
    except AttributeError:
        return key
    if isinstance(module, SVFLayer):
        return f"{path}.base_layer.weight"
    return key if hasattr(module, "base_layer") else f"{path}.weight"


def _check_complete(base: nn.Module, adapter_name: str, subject: str, checkpoint: Checkpoint) -> None:
    """Check that the checkpoint holds `modules_to_save` and biases, which PEFT would leave at their values.

    Raises:
        ValueError: It does not.
    """
    copy = f".modules_to_save.{adapter_name}"
    wanted = [name for name, _ in base.named_parameters() if f"{copy}." in name]
    for layer in svf_layers(base, adapter_name):
        if layer.svf_config[adapter_name].bias != "none" and getattr(layer.get_base_layer(), "bias", None) is not None:
            wanted.append(f"{layer.module_name}.bias")

    def plain(key: str) -> str:
        return key.replace(f"{copy}.", ".").replace(".base_layer.", ".")

    found = {plain(key) for key in checkpoint.others}
    if missing := [name for name in map(plain, wanted) if name not in found]:
        raise ValueError(
            f"{subject} has no values for {len(missing)} of {len(wanted)} trained parameters besides δ, the first is "
            f"{missing[0]}. It is incomplete or was saved with another config: save or download the adapter again."
        )


def prefixed_key(model: nn.Module, key: str) -> str:
    """Return the key in the state dict of a `PeftModel`, given one of its base model.

    `get_peft_model_state_dict` of a model that transformers or `inject_adapter_in_model` adapted gives keys without the
    prefix. PEFT would ignore them.
    """
    return key if key.startswith(_PREFIX) or not isinstance(model, PeftModel) else f"{_PREFIX}{key}"


def current_key(key: str, names: Mapping[str, str], adapter_name: str) -> str:
    """Return the key of a δ under the current name of its module, and without the adapter's name."""
    head, found, tail = key.partition(_DELTA)
    if not found:
        return key
    prefix = _PREFIX if head.startswith(_PREFIX) else ""
    name = head.removeprefix(prefix)
    return f"{prefix}{names.get(name, name)}{found}{tail.removeprefix(f'{adapter_name}.')}"
