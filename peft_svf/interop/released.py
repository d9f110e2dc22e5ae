"""Experts that were trained with the paper's released code, and the vector of TRINITY, as SVF adapters.

The released code (https://github.com/SakanaAI/self-adaptive-llms) composes

    W' = U diag(σ ⊙ m) Vᵀ · Σσ / Σ(σ ⊙ m)

where the mask m is the sigmoid of what was trained, and in its mixtures what was trained itself. TRINITY
(https://huggingface.co/papers/2512.04695) trains offsets, m = 1 + v, with the same normalisation. An adapter has no
such factor, so it goes into z, which is exact: z = m · Σσ / Σ(σ ⊙ m).
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from ..spectral.cache import BasisCache
from ..tuner.config import SVFConfig
from ..tuner.layer import SVFLayer

Parametrization = Literal["sigmoid", "raw", "offset"]

_POSITION = re.compile(r"learnable_params_module_list\.(\d+)$")
_PART = re.compile(r"weights_(\d+)_k_(.+)$")
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


@torch.no_grad()
def import_expert(
    path: str | os.PathLike[str],
    base: nn.Module,
    *,
    parametrization: Parametrization | None = None,
    normalize: bool = True,
    max_mult: float = 1.0,
    layers: Sequence[int] = (26,),
    skip: Sequence[str] = (),
    adapter_name: str = "default",
) -> PeftModel:
    """
    Load an expert of the released code, or of TRINITY, onto its base model; save it with `save_pretrained`.

    The kind of file is told by what is in it:

    - a vector for each parameter name (`learnable_params*.pt`),
    - a vector for each place among the model's MLP weights (`policy_params*.pt`),
    - the same of a mixture, with its weights (`policy_params*.pt` of a few-shot search),
    - one long vector (TRINITY's `model_iter_*.npy`, or a safetensors file with one): the offsets of all matrices of
      `layers` and of those outside of any layer, in the order of the state dict. What follows them is left out.

    Args:
        path: The file. Nothing but tensors is ever loaded from it.
        base (`torch.nn.Module`): The model that the expert was trained on, which gets adapted.
        parametrization (`str`, *optional*): What the numbers are: `"sigmoid"` (m is `max_mult` times their sigmoid),
            `"raw"` (m itself) or `"offset"` (m - 1). The file does not say it. By default what the code that writes
            such a file means: sigmoid, raw for a mixture, offset for one long vector.
        normalize (`bool`): Whether the sum of the singular values was kept, as all of the released code does.
        max_mult (`float`): The largest mask of the sigmoid.
        layers (`Sequence[int]`): For one long vector, the layers that it is for.
        skip (`Sequence[str]`): Modules to leave out, such as embeddings, which SVF cannot adapt.
        adapter_name (`str`): What to call the adapter.

    Raises:
        ValueError: The file holds something else than tensors, is damaged, or does not fit the model; the message names
            the parameter.
        FileNotFoundError: There is no such file.
    """
    if parametrization is not None and parametrization not in get_args(Parametrization):
        raise ValueError(f"`parametrization` must be 'sigmoid', 'raw' or 'offset', got {parametrization!r}.")
    path = Path(path)
    found = _read(path)
    weights = dict(_matrices(base))
    if isinstance(found, torch.Tensor):
        vectors, kind = _of_one_vector(found, weights, layers, path), "offset"
    elif "adaptive_weights" in found:
        vectors, kind = _of_mixture(found, weights, path), "raw"
    elif any(_POSITION.fullmatch(key) for key in found):
        vectors, kind = _of_positions(found, weights, path), "sigmoid"
    else:
        vectors, kind = _of_names(found, weights, path), "sigmoid"
    return _adapted(base, vectors, weights, parametrization or kind, normalize, max_mult, set(skip), adapter_name, path)


# ---------------------------------------------------------------------------------------------------- files


def _read(path: Path) -> dict[str, torch.Tensor] | torch.Tensor:
    """All tensors of a file by name, or its one vector."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False)).flatten()
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds Python objects, not only tensors, and loading those can run any code: refused. Where you "
            "trust it, load it yourself and save its tensors."
        ) from error
    except Exception as error:  # a damaged pickle can end in any
        raise ValueError(f"{path} is damaged or no file of tensors: {error}") from error
    if isinstance(content, torch.Tensor):
        return content.flatten()
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} holds {type(content).__name__}; expected tensors by name.")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{path} holds {key!r}: {type(value).__name__}; expected tensors by name.")
    if len(content) == 1 and not any(mark in next(iter(content)) for mark in ("weight", "learnable_params")):
        return next(iter(content.values())).flatten()
    return dict(content)


def _matrices(base: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """All weight matrices in the order of the state dict, tied ones under each of their names."""
    return [(name, value) for name, value in base.state_dict().items() if value.ndim == 2 and min(value.shape) > 1]


def _of_names(found: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], path: Path) -> dict[str, Any]:
    if unknown := [name for name in found if name not in weights]:
        raise ValueError(f"{path} has a vector for {unknown[0]!r}, and the model has no such weight: another model?")
    return dict(found)


def _of_positions(found: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], path: Path) -> dict[str, Any]:
    names = [name for name in weights if "mlp" in name]
    if unknown := [key for key in found if not _POSITION.fullmatch(key)]:
        raise ValueError(f"{path} has {unknown[0]!r} beside vectors by place, which nothing is known of.")
    places = {int(match[1]): value for key, value in found.items() if (match := _POSITION.fullmatch(key))}
    if sorted(places) != list(range(len(names))):
        raise ValueError(
            f"{path} has {len(places)} vectors, up to place {max(places)}, and the model has {len(names)} MLP weights: "
            "another model?"
        )
    return {names[place]: value for place, value in sorted(places.items())}


def _of_mixture(found: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], path: Path) -> dict[str, Any]:
    alpha = found["adaptive_weights"].float()
    names = {name.replace(".", "_"): name for name in weights}
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for key, value in found.items():
        if match := _PART.fullmatch(key):
            if match[2] not in names:
                raise ValueError(f"{path} has {key!r}, which is for no weight of the model: another model?")
            parts.setdefault(names[match[2]], {})[int(match[1])] = value.float()
        elif key != "adaptive_weights":
            raise ValueError(f"{path} has {key!r} beside the parts of a mixture, which nothing is known of.")
    ordered = [name for name in weights if name in parts]
    if alpha.ndim != 2 or alpha.shape[1] not in (1, len(ordered)):
        raise ValueError(
            f"{path} has mixture weights of shape {tuple(alpha.shape)} for {len(ordered)} matrices; expected one "
            "column, or one for each matrix."
        )
    mixed = {}
    for place, name in enumerate(ordered):
        if sorted(parts[name]) != list(range(len(alpha))):
            raise ValueError(f"{path} has parts {sorted(parts[name])} for {name}; expected {len(alpha)} of them.")
        column = alpha[:, place if alpha.shape[1] > 1 else 0]
        lengths = {len(part) for part in parts[name].values()}
        if len(lengths) > 1:
            raise ValueError(f"{path} has parts of different lengths {sorted(lengths)} for {name}.")
        mixed[name] = sum(float(a) * parts[name][k] for k, a in enumerate(column))
    return mixed


def _of_one_vector(
    found: torch.Tensor, weights: Mapping[str, torch.Tensor], layers: Sequence[int], path: Path
) -> dict[str, Any]:
    chosen = [name for name in weights if (match := _LAYER.search(f".{name}")) is None or int(match[1]) in layers]
    lengths = [min(weights[name].shape) for name in chosen]
    if len(found) < sum(lengths):
        raise ValueError(
            f"{path} has {len(found)} numbers, and the {len(chosen)} matrices of the layers {list(layers)} and outside "
            f"of layers have {sum(lengths)} singular values: another model, or other `layers`?"
        )
    if len(found) > sum(lengths):
        warnings.warn(
            f"{path} has {len(found) - sum(lengths)} numbers after those for singular values, such as TRINITY's head, "
            "which are left out.",
            stacklevel=3,
        )
    return dict(zip(chosen, found[: sum(lengths)].split(lengths), strict=True))


# ---------------------------------------------------------------------------------------------------- vectors


def _adapted(
    base: nn.Module,
    vectors: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    parametrization: str,
    normalize: bool,
    max_mult: float,
    skip: set[str],
    adapter_name: str,
    path: Path,
) -> PeftModel:
    chosen = {}
    for name, vector in vectors.items():
        module = name.removesuffix(".weight")
        if module in skip:
            continue
        k = min(weights[name].shape)
        if vector.shape != (k,):
            raise ValueError(
                f"{path} has {tuple(vector.shape)} numbers for {name}, which has {k} singular values: another model?"
            )
        if not torch.isfinite(vector).all():
            raise ValueError(f"{path} has NaN or Inf for {name}.")
        layer = base.get_submodule(module)
        if isinstance(layer, nn.Embedding):
            raise ValueError(
                f"{path} changes {module}, an embedding, which SVF cannot adapt. Pass `skip=[{module!r}]` to do "
                "without it."
            )
        values = vector.double()
        ways = {"sigmoid": values.sigmoid() * max_mult, "raw": values, "offset": 1 + values}
        chosen[module] = ways[parametrization]
    if not chosen:
        raise ValueError(f"Nothing is left of {path} to import.")
    config = SVFConfig(target_modules=list(chosen), task_type="CAUSAL_LM")
    model: PeftModel = get_peft_model(base, config, adapter_name=adapter_name)
    cache = BasisCache()
    try:
        for layer in [module for module in model.modules() if isinstance(module, SVFLayer)]:
            mask = chosen[layer.module_name]
            scale = _scale(layer, mask, cache) if normalize else 1.0
            layer.svf_delta[adapter_name].weight.copy_(mask * scale - 1)  # type: ignore[operator]
    except BaseException:
        model.unload()  # the base model as it was
        raise
    return model.eval()


def _scale(layer: SVFLayer, mask: torch.Tensor, cache: BasisCache) -> float:
    """Σσ / Σ(σ ⊙ m)."""
    weight = layer._as_out_in(layer._unmerged_weight())
    sigma = cache.load_or_compute(weight, name=layer.module_name).spectrum  # kept as the basis was made
    total = (sigma * mask).sum()
    if not total.abs() > 1e-12 * sigma.sum():
        raise ValueError(f"The mask of {layer.module_name} sums to 0, so that its scale is not defined.")
    return float(sigma.sum() / total)
