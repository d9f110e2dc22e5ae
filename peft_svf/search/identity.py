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
    """Return what an objective computes, as far as its declared numbers, its reward functions and the chat template
    tell."""
    about = objective.description()
    names = [[reward_name(function), _behaviour_of(function)] for function in about.pop("reward_funcs", [])]
    parts = [description_of(part) for part in about.pop("objectives", [])]
    template = digest_of_rows(getattr(objective.tokenizer, "chat_template", None))
    return [objective.name, names, repr(dict(objective.generation_kwargs)), template, about, parts]


def _behaviour_of(function: Any) -> str:
    """Return a digest of what a function does: its code, defaults and closure, the arguments of a `partial`, the class
    and the attributes of a callable object.

    Of closures and attributes only plain values count, because a list that a function logs to would change the digest.
    Functions that it calls are not included either.
    """
    return hashlib.sha256(repr(_described(function)).encode()).hexdigest()


def _described(value: Any) -> Any:
    """Return a function, a code object or a plain value as nested plain values, and the class of anything else."""
    if isinstance(value, (str, int, float, bool, bytes, type(None))):
        return value
    if isinstance(value, (tuple, frozenset)):
        return sorted(map(repr, map(_described, value))) if isinstance(value, frozenset) else [*map(_described, value)]
    if isinstance(value, CodeType):
        return [value.co_code, value.co_names, [_described(each) for each in value.co_consts]]
    if isinstance(value, functools.partial):
        return [_described(value.func), repr((value.args, sorted(value.keywords.items())))]
    if inspect.ismethod(value):
        return [_described(value.__func__), _attributes(value.__self__)]
    if inspect.isfunction(value):
        inner = inspect.unwrap(value)
        cells = [cell.cell_contents for cell in inner.__closure__ or () if cell.cell_contents is not value]
        return [_described(inner.__code__), repr((inner.__defaults__, inner.__kwdefaults__)), [*map(_described, cells)]]
    if callable(value) and not isinstance(value, type):
        return [_described(inspect.unwrap(type(value).__call__)), _attributes(value)]
    return type(value).__qualname__


def _attributes(value: Any) -> list[Any]:
    """Return the class of an object and its attributes that are plain values."""
    plain = (str, int, float, bool, type(None), tuple)
    return [type(value).__qualname__, [pair for pair in sorted(vars(value).items()) if isinstance(pair[1], plain)]]
