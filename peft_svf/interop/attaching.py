"""Attach an expert that is computed afterwards, or leave the base model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel, get_peft_model
from torch import nn

from ..tuner.config import SVFConfig


@contextmanager
def attached(base: nn.Module, config: SVFConfig, adapter_name: str) -> Iterator[PeftModel]:
    """Attach an SVF adapter to a model; if the block raises, take it off again.

    The base model then has its old modules, and its parameters require gradients as before.
    """
    trainable = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    training = [(module, module.training) for module in base.modules()]
    model: PeftModel | None = None
    try:
        model = get_peft_model(base, config, adapter_name=adapter_name)
        yield model
    except BaseException:
        if model is not None:
            model.unload()
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        for module, mode in training:
            module.training = mode
        raise
