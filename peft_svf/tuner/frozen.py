"""Refuse a training that would change nothing, whatever trainer or loop runs it.

An expert that was loaded without `is_trainable=True` is frozen. TRL's reference pass makes it trainable again, but only
after the trainer has made its optimizer, so the training runs to the end and changes nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import cache
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .protocol import AdaptedLayer

_in_training: weakref.WeakSet[AdaptedLayer] = weakref.WeakSet()
_checked: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def watch_training(layer: AdaptedLayer) -> None:
    """Check the next optimizers that could belong to the training of this layer, each at its first step."""
    _check_optimizers()
    _in_training.add(layer)


@cache  # once per process, and not at import, which must not affect the process
def _check_optimizers() -> None:
    register_optimizer_step_pre_hook(_check)


def _check(optimizer: Optimizer, *_: Any) -> None:
    """Raise if an optimizer has nothing to train although a layer waits for it.

    Raises:
        ValueError: All its parameters are frozen and some are weights of the layer, or it has none.
    """
    if optimizer in _checked:
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(parameter.requires_grad for parameter in parameters):
        mine = {id(parameter) for parameter in parameters}
        layers = [layer for layer in _in_training if not mine or any(id(p) in mine for p in layer.parameters())]
        if any(layer.training for layer in layers):
            raise ValueError(
                f"{adapters_of(layers)} would not be trained: the optimizer has no trainable parameter. Load the "
                "adapter with `PeftModel.from_pretrained(..., is_trainable=True)`, and create the trainer or the "
                "optimizer afterwards."
            )
    _checked.add(optimizer)


def frozen_message(layers: Iterable[AdaptedLayer]) -> str:
    """Return the text for a model without any trainable parameter in training mode."""
    return (
        f"{adapters_of(layers)} would not be trained: no parameter of the model requires a gradient. To train, load "
        "the adapter with `PeftModel.from_pretrained(..., is_trainable=True)`. For inference, call `model.eval()` or "
        "use `torch.no_grad()`."
    )


def adapters_of(layers: Iterable[AdaptedLayer]) -> str:
    """Return the active adapters of the layers, as the subject of a message."""
    names = sorted({name for layer in layers for name in layer.active_adapters if name in layer.svf_delta})
    return f"Adapter{'s' * (len(names) > 1)} {', '.join(map(repr, names))}"
