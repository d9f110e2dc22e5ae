"""What two searches must have in common for one to use the scores of the other."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Sequence
from types import CodeType
from typing import Any

import torch

from ..scoring.objectives import Objective
from ..scoring.rewards import reward_name
from ..tuner.layer import svf_layers


def digest_of_experts(model: Any, names: Sequence[str]) -> str:
    """Return a digest of the values of δ."""
    found = hashlib.sha256()
    for layer in svf_layers(model):
        for delta in layer.delta_weights(name for name in names if name in layer.svf_delta):
            found.update(delta.detach().float().cpu().numpy().tobytes())
    return found.hexdigest()


def digest_of_base(model: Any) -> str:
    """Return a digest of the first values of each adapted weight that is a plain tensor."""
    found = hashlib.sha256()
    for layer in svf_layers(model):
        weight = layer.get_base_layer().weight
        found.update(f"{layer.module_name} {weight.dtype}".encode())
        if type(weight) in (torch.Tensor, torch.nn.Parameter) and weight.is_floating_point():
            found.update(weight.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return found.hexdigest()


def digest_of_rows(rows: Any) -> str:
    """Return a digest of examples, whatever they contain."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()


def description_of(objective: Objective) -> list[Any]:
    """Return what an objective computes, as far as its declared numbers, the code of its reward functions and the chat
    template tell."""
    about = objective.description()
    names = [[reward_name(function), _code_of(function)] for function in about.pop("reward_funcs", [])]
    parts = [description_of(part) for part in about.pop("objectives", [])]
    template = digest_of_rows(getattr(objective.tokenizer, "chat_template", None))
    return [objective.name, names, repr(dict(objective.generation_kwargs)), template, about, parts]


def _code_of(function: Any) -> str | None:
    """Return a digest of the code of a Python function, without what it calls or holds."""
    function = inspect.unwrap(function)
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(function, "__code__", None)
    return None if code is None else hashlib.sha256(_parts(code).encode()).hexdigest()


def _parts(code: CodeType) -> str:
    inner = [_parts(value) if isinstance(value, CodeType) else repr(value) for value in code.co_consts]
    return repr([code.co_code, code.co_names, inner])
