"""Checks at the start of a training that δ is trained."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import TrainerCallback

from ..tuner.frozen import adapters_of, frozen_message
from ..tuner.layer import svf_layers
from ..utils.processes import is_sharded

PATIENCE = 10  # optimizer steps in which a module must have got a gradient


class DeltaIsTrained(TrainerCallback):
    """
    Stop a training that would leave δ unchanged, before its first step.

    Checked are that an adapter is trainable, that the optimizer holds its δ, and that δ gets a gradient. Modules that
    get none in the first 10 steps give a warning. The optimizers of FSDP and DeepSpeed hold other tensors, so they are
    not checked.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, torch.Tensor] = {}
        self._steps = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """
        Check the model and the optimizer.

        Raises:
            ValueError: No parameter of a model with SVF layers is trainable, or the optimizer lacks a trainable δ.
        """
        layers = svf_layers(model)
        if layers and not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(frozen_message(layers))
        self._waiting, self._steps = {}, 0
        if is_sharded(model) or getattr(args, "deepspeed_plugin", None) is not None:
            return
        deltas = [(layer.module_name, delta) for layer in layers for delta in layer.delta_weights(layer.svf_delta)]
        self._waiting = {name: delta for name, delta in deltas if delta.requires_grad}
        held = {id(parameter) for group in kwargs["optimizer"].param_groups for parameter in group["params"]}
        if missing := [name for name, delta in self._waiting.items() if id(delta) not in held]:
            raise ValueError(
                f"{adapters_of(layers)} would not be trained: the optimizer lacks {len(missing)} of "
                f"{len(self._waiting)} vectors δ, the first is that of {missing[0]}. Create the optimizer from "
                "`model.parameters()` after the adapter was attached with `is_trainable=True`."
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """
        Check that δ got a gradient.

        Raises:
            ValueError: In the first step, no δ has a gradient.
        """
        if not self._waiting:
            return
        idle = {name: delta for name, delta in self._waiting.items() if delta.grad is None}
        if self._steps == 0 and len(idle) == len(self._waiting):
            raise ValueError(
                f"{adapters_of(svf_layers(model))} would not be trained: no δ got a gradient in the first step. Check "
                "that the adapter is active, and that the loss depends on the adapted modules."
            )
        self._waiting, self._steps = idle, self._steps + 1
        if self._steps == PATIENCE:
            self._warn()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Warn about modules without any gradient, if the training was short."""
        self._warn()

    def _warn(self) -> None:
        if self._waiting and self._steps:
            names = ", ".join(list(self._waiting)[:5])
            warnings.warn(
                f"{len(self._waiting)} adapted modules got no gradient in {self._steps} steps, so they are not "
                f"trained: {names}. Leave out modules that the model does not use with `exclude_modules`.",
                stacklevel=3,
            )
        self._waiting = {}
