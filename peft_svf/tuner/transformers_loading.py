"""Check the adapters that transformers loads itself.

PEFT passes every state dict to `SVFModel`. Transformers (`model.load_adapter`, and `AutoModel.from_pretrained` on an
adapter's folder) only lets PEFT attach the layers, then loads the values without asking it. It logs missing values,
keeps δ = 0 for them, and loads NaN. So its `load_adapter` is extended: `SVFModel` learns what will be loaded, and the
loaded values are checked.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from .checkpoint import Checkpoint, read_checkpoint
from .config import SVFConfig
from .layer import svf_layers, take_out
from .loading import check_checkpoint, current_key


def check_what_transformers_loads() -> None:
    """Extend `load_adapter` of all transformers models by the check, once. Other PEFT methods are not affected."""
    if not hasattr(PeftAdapterMixin.load_adapter, "checks_svf"):
        PeftAdapterMixin.load_adapter = _checked(PeftAdapterMixin.load_adapter)


def _checked(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _being_loaded.set(_given(signature.bind(self, *args, **kwargs).arguments))
        try:
            with _unchanged_on_error(self) as new_adapters:
                info = original(self, *args, **kwargs)
                for name in new_adapters():
                    check_checkpoint(self, name, _loaded(self, name, info))
        finally:
            _being_loaded.reset(token)
        return info

    load_adapter.checks_svf = True  # type: ignore[attr-defined]
    return load_adapter


_being_loaded: ContextVar[Callable[[], Checkpoint | None]] = ContextVar("being_loaded", default=lambda: None)


def being_loaded() -> Checkpoint | None:
    """What transformers is about to load into the adapter that it attaches; `None` if it is on the Hub.

    Raises:
        ValueError: The file is damaged.
    """
    return _being_loaded.get()()


def _given(arguments: Mapping[str, Any]) -> Callable[[], Checkpoint | None]:
    """Return a function that describes what `load_adapter` was given. It is called for SVF adapters only."""
    state_dict, folder = arguments.get("adapter_state_dict"), arguments.get("peft_model_id")
    if state_dict is not None:
        return lambda: Checkpoint.of_tensors(state_dict)
    subfolder = (arguments.get("adapter_kwargs") or arguments.get("kwargs") or {}).get("subfolder")
    return lambda: read_checkpoint(Path(folder, subfolder or "")) if folder else None


def _loaded(model: nn.Module, adapter_name: str, info: Any) -> Checkpoint:
    """Describe what transformers has loaded, given its report."""
    weights = {
        layer.module_name: weight
        for layer in svf_layers(model, adapter_name)
        for weight in layer.delta_weights([adapter_name])
        if f"{layer.module_name}.svf_delta.{adapter_name}.weight" not in info.missing_keys
    }
    saved = {
        name: value
        for name, value in model.named_parameters()
        if (f".modules_to_save.{adapter_name}." in name or name.endswith(".bias")) and name not in info.missing_keys
    }
    tensors = {**{f"{name}.svf_delta.weight": weight for name, weight in weights.items()}, **saved}
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
    take_out(model, adapter_name)
    del model.peft_config[adapter_name]
    if not model.peft_config:
        del model.peft_config
        model._hf_peft_config_loaded = False
