"""What two runs must have in common for one to go on with the scores of the other."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Sequence
from types import CodeType
from typing import Any

import torch

from ..scoring.rewards import reward_name
from ..tuner.layer import SVFLayer


def digest_of_experts(model: Any, names: Sequence[str]) -> str:
    """Of the values of δ."""
    found = hashlib.sha256()
    for layer in (module for module in model.modules() if isinstance(module, SVFLayer)):
        for delta in layer.delta_weights(name for name in names if name in layer.svf_delta):
            found.update(delta.detach().float().cpu().numpy().tobytes())
    return found.hexdigest()


def digest_of_base(model: Any) -> str:
    """Of the beginnings of the weights under the adapters, as far as they are plain tensors."""
    found = hashlib.sha256()
    for layer in (module for module in model.modules() if isinstance(module, SVFLayer)):
        weight = layer.get_base_layer().weight
        found.update(f"{layer.module_name} {weight.dtype}".encode())
        if type(weight) in (torch.Tensor, torch.nn.Parameter) and weight.is_floating_point():
            found.update(weight.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return found.hexdigest()


def digest_of_rows(rows: Any) -> str:
    """Of examples, whatever is in them."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()


def description_of(objective: Any) -> list[Any]:
    """What an objective computes, as far as names, numbers, the code of reward functions and the chat template tell."""
    names = [[reward_name(function), _code_of(function)] for function in getattr(objective, "reward_funcs", [])]
    parts = [description_of(part) for part in getattr(objective, "objectives", [])]
    weights = getattr(objective, "reward_weights", getattr(objective, "weights", None))
    weights = None if weights is None else [float(weight) for weight in weights]
    template = digest_of_rows(getattr(getattr(objective, "tokenizer", None), "chat_template", None))
    numbers = [getattr(objective, name, None) for name in ("temperature", "most")]  # of an expected reward
    generation = repr(getattr(objective, "generation_kwargs", None))
    return [objective.name, names, weights, generation, template, numbers, parts]


def _code_of(function: Any) -> str | None:
    """Digest of what a function of Python does, without what it calls or holds."""
    function = inspect.unwrap(function)
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(function, "__code__", None)
    return None if code is None else hashlib.sha256(_parts(code).encode()).hexdigest()


def _parts(code: CodeType) -> str:
    inner = [_parts(value) if isinstance(value, CodeType) else repr(value) for value in code.co_consts]
    return repr([code.co_code, code.co_names, inner])
