"""What two runs must have in common for one to go on with the scores of the other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from ..scoring.rewards import reward_name
from ..tuner import SVFLayer


def digest_of_experts(model: Any, names: Sequence[str]) -> str:
    """Of the values of δ."""
    found = hashlib.sha256()
    for layer in (module for module in model.modules() if isinstance(module, SVFLayer)):
        for delta in layer.delta_weights(name for name in names if name in layer.svf_delta):
            found.update(delta.detach().float().cpu().numpy().tobytes())
    return found.hexdigest()


def digest_of_rows(rows: Any) -> str:
    """Of examples, whatever is in them."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()


def description_of(objective: Any) -> list[Any]:
    """What an objective computes, as far as names and numbers tell."""
    names = [reward_name(function) for function in getattr(objective, "reward_funcs", [])]
    parts = [description_of(part) for part in getattr(objective, "objectives", [])]
    weights = getattr(objective, "reward_weights", getattr(objective, "weights", None))
    return [objective.name, names, weights, repr(getattr(objective, "generation_kwargs", None)), parts]
