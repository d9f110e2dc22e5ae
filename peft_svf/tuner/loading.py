"""Check an adapter's tensors against the model that loads them, also when transformers loads them itself.

PEFT passes every state dict to `SVFModel`. Transformers (`model.load_adapter`, `AutoModel.from_pretrained` on an
adapter's folder) only lets PEFT attach the layers, then loads the values without asking it. It logs missing values and
keeps δ = 0 for them, so its `load_adapter` is extended by a check.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import delete_adapter
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from .checkpoint import Checkpoint, read_checkpoint
from .config import SVFConfig
from .layer import SVFLayer, svf_layers
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
    checkpoint.renamed(names).check(
        f"The checkpoint of adapter {adapter_name!r}{where}",
        wanted,
        strangers=_without_place(base, checkpoint.others),
    )
    return names


def _without_place(base: nn.Module, keys: Collection[str]) -> list[str]:
    modules = dict(base.named_modules()) if keys else {}

    def has_place(key: str) -> bool:
        path, _, name = key.rpartition(".")
        parents = [modules.get(path.rsplit(".", count)[0]) for count in range(path.count(".") + 1)]
        return hasattr(parents[0], name) or any(isinstance(parent, AuxiliaryTrainingWrapper) for parent in parents)

    return [key for key in keys if not has_place(key)]


def current_key(key: str, names: Mapping[str, str], adapter_name: str) -> str:
    """Return the key of a δ under the current name of its module, and without the adapter's name."""
    head, found, tail = key.partition(_DELTA)
    if not found:
        return key
    prefix = "base_model.model." if head.startswith("base_model.model.") else ""
    name = head.removeprefix(prefix)
    return f"{prefix}{names.get(name, name)}{found}{tail.removeprefix(f'{adapter_name}.')}"


# ---------------------------------------------------------------------------------------------------- transformers


def check_what_transformers_loads() -> None:
    """Extend `load_adapter` of all transformers models by the check, once. Other PEFT methods are not affected."""
    if not hasattr(PeftAdapterMixin.load_adapter, "checks_svf"):
        PeftAdapterMixin.load_adapter = _checked(PeftAdapterMixin.load_adapter)


def _checked(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        with _unchanged_on_error(self) as new_adapters:
            try:
                info = original(self, *args, **kwargs)
            except Exception:  # such as another shape, which transformers does not name
                for name in new_adapters():
                    _check_source(self, name, given)
                raise
            for name in new_adapters():
                _check_source(self, name, given)
                check_checkpoint(self, name, _loaded(self, name, info))
        return info

    load_adapter.checks_svf = True  # type: ignore[attr-defined]
    return load_adapter


def _check_source(model: nn.Module, adapter_name: str, given: Mapping[str, Any]) -> None:
    """Check what `load_adapter` was given, unless it is on the Hub."""
    state_dict, folder = given.get("adapter_state_dict"), given.get("peft_model_id")
    if state_dict is not None:
        checkpoint: Checkpoint | None = Checkpoint.of_tensors(state_dict)
    else:
        subfolder = (given.get("adapter_kwargs") or given.get("kwargs") or {}).get("subfolder")
        checkpoint = read_checkpoint(Path(folder or "", subfolder or ""))
    if checkpoint is not None:
        check_checkpoint(model, adapter_name, checkpoint)


def _loaded(model: nn.Module, adapter_name: str, info: Any) -> Checkpoint:
    """Describe what transformers has loaded, given its report."""
    weights = {
        layer.module_name: weight
        for layer in svf_layers(model, adapter_name)
        for weight in layer.delta_weights([adapter_name])
        if f"{layer.module_name}{_DELTA}{adapter_name}.weight" not in info.missing_keys
    }
    saved = {name: value for name, value in model.named_parameters() if f".modules_to_save.{adapter_name}." in name}
    tensors = {**{f"{name}{_DELTA}weight": weight for name, weight in weights.items()}, **saved}
    left_over = {current_key(key, {}, adapter_name): torch.empty(0) for key in info.unexpected_keys}
    return Checkpoint.of_tensors({**left_over, **tensors})


@contextmanager
def _unchanged_on_error(model: Any) -> Iterator[Callable[[], list[str]]]:
    """Take new SVF adapters out again after an error. Yields a function that returns their names."""
    known = set(getattr(model, "peft_config", {}))
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = [(module, module.training) for module in model.modules()]
    active = [(layer, layer.active_adapters) for layer in svf_layers(model)]

    def new_adapters() -> list[str]:
        configs = getattr(model, "peft_config", {})
        return [name for name, config in configs.items() if name not in known and isinstance(config, SVFConfig)]

    try:
        yield new_adapters
    except BaseException:
        if names := new_adapters():
            for layer, before in active:
                layer.set_adapter(before)
            for name in names:
                _take_out(model, name)
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)
            for module, mode in training:
                module.training = mode
        raise


def _take_out(model: Any, adapter_name: str) -> None:
    delete_adapter(model, adapter_name=adapter_name, prefix="svf_", layer_cls=SVFLayer)
    for name, module in list(model.named_modules()):
        if isinstance(module, SVFLayer) and not module.svf_delta:
            model.set_submodule(name, module.base_layer)
        elif isinstance(module, AuxiliaryTrainingWrapper) and not module._adapters:
            model.set_submodule(name, module.original_module)
    del model.peft_config[adapter_name]
    if not model.peft_config:
        del model.peft_config
        model._hf_peft_config_loaded = False
