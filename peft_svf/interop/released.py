"""Import experts of the paper's released code, and vectors of TRINITY, as SVF adapters.

The released code (https://github.com/SakanaAI/self-adaptive-llms) composes

    W' = U diag(σ ⊙ m) Vᵀ · Σσ / Σ(σ ⊙ m)

where the mask m is the sigmoid of the trained parameters, or in mixtures the parameters themselves. TRINITY
(https://huggingface.co/papers/2512.04695) trains offsets, m = 1 + v, with the same normalisation. SVF has no such
factor, so it is multiplied into z, which is exact: z = m · Σσ / Σ(σ ⊙ m).
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
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from ..tuner.config import SVFConfig
from ..tuner.layer import SVFLayer, svf_layers
from .attaching import attached

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
    Load an expert of the released code or of TRINITY onto its base model. Save it with `save_pretrained`.

    The content of the file decides how it is read:

    - one vector per parameter name (`learnable_params*.pt`),
    - one vector per MLP weight of the model, by position (`policy_params*.pt`),
    - the vectors of a mixture with its weights (`policy_params*.pt` of a few-shot search),
    - one long vector (TRINITY's `model_iter_*.npy`, or a safetensors file with one tensor): the offsets of all matrices
      of `layers` and outside of layers, in the order of the state dict. Further values are left out.

    Args:
        path: The file. Only tensors are ever loaded from it.
        base (`torch.nn.Module`): The model that the expert was trained on, which gets the adapter.
        parametrization (`str`, *optional*): Meaning of the values: `"sigmoid"` (m is `max_mult` times their sigmoid),
            `"raw"` (m itself) or `"offset"` (m - 1). The file does not record it. By default as in the released code:
            offset for one long vector, raw for a mixture, otherwise sigmoid.
        normalize (`bool`): Whether the sum of the singular values was preserved, as in all of the released code.
        max_mult (`float`): The factor of the sigmoid.
        layers (`Sequence[int]`): The layers of one long vector.
        skip (`Sequence[str]`): Modules to leave out, such as embeddings, which SVF cannot adapt.
        adapter_name (`str`): Name of the adapter.

    Raises:
        ValueError: The file holds Python objects, is damaged, or does not fit the model. The message names the
            parameter.
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
    """Return all tensors of a file by name, or its only vector."""
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
            f"{path} holds Python objects, and loading them can run arbitrary code. If you trust the file, load it "
            "yourself and save only its tensors."
        ) from error
    except Exception as error:  # a damaged pickle can raise any
        raise ValueError(f"{path} is damaged or not a file of tensors: {error}") from error
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
    """Return all weight matrices in the order of the state dict, tied ones under each of their names."""
    return [(name, value) for name, value in base.state_dict().items() if value.ndim == 2 and min(value.shape) > 1]


def _of_names(found: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], path: Path) -> dict[str, Any]:
    if unknown := [name for name in found if name not in weights]:
        raise ValueError(
            f"{path} has a vector for {unknown[0]!r}, which the model does not have. Pass the expert's base model."
        )
    kinds = {_LAYER.sub(".*.", name) for name in found}
    if missing := [name for name in weights if name not in found and _LAYER.sub(".*.", name) in kinds]:
        raise ValueError(
            f"{path} has no vector for {missing[0]}, but for the same matrix of other layers. It is incomplete: "
            "download it again."
        )
    return dict(found)


def _of_positions(found: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], path: Path) -> dict[str, Any]:
    names = [name for name in weights if "mlp" in name]
    if unknown := [key for key in found if not _POSITION.fullmatch(key)]:
        raise ValueError(f"{path} has the unknown entry {unknown[0]!r} next to its vectors.")
    places = {int(match[1]): value for key, value in found.items() if (match := _POSITION.fullmatch(key))}
    if sorted(places) != list(range(len(names))):
        raise ValueError(
            f"{path} has {len(places)} vectors, up to position {max(places)}, but the model has {len(names)} MLP "
            "weights. Pass the expert's base model."
        )
    return {names[place]: value for place, value in sorted(places.items())}


def _of_mixture(found: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], path: Path) -> dict[str, Any]:
    alpha = found["adaptive_weights"].float()
    names = {name.replace(".", "_"): name for name in weights}
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for key, value in found.items():
        if match := _PART.fullmatch(key):
            if match[2] not in names:
                raise ValueError(f"{path} has {key!r}, which fits no weight. Pass the expert's base model.")
            parts.setdefault(names[match[2]], {})[int(match[1])] = value.float()
        elif key != "adaptive_weights":
            raise ValueError(f"{path} has the unknown entry {key!r} next to the parts of a mixture.")
    ordered = [name for name in weights if name in parts]
    if alpha.ndim != 2 or alpha.shape[1] not in (1, len(ordered)):
        raise ValueError(
            f"{path} has mixture weights of shape {tuple(alpha.shape)} for {len(ordered)} matrices. Expected one "
            "column, or one per matrix."
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
            f"{path} has {len(found)} values, but the {len(chosen)} matrices of the layers {list(layers)} and outside "
            f"of layers have {sum(lengths)} singular values. Pass the expert's base model and its `layers`."
        )
    if len(found) > sum(lengths):
        warnings.warn(
            f"{path} has {len(found) - sum(lengths)} values after those for singular values, which are left out. "
            "TRINITY's head is stored there.",
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
                f"{path} has a vector of shape {tuple(vector.shape)} for {name}, which has {k} singular values. Pass "
                "the expert's base model."
            )
        if not torch.isfinite(vector).all():
            raise ValueError(f"{path} has NaN or Inf for {name}.")
        layer = base.get_submodule(module)
        if isinstance(layer, nn.Embedding):
            raise ValueError(
                f"{path} changes {module}, an embedding, which SVF cannot adapt. Pass `skip=[{module!r}]` to leave it "
                "out."
            )
        values = vector.double()
        ways = {"sigmoid": values.sigmoid() * max_mult, "raw": values, "offset": 1 + values}
        chosen[module] = ways[parametrization]
    if not chosen:
        raise ValueError(f"{path} has nothing to import besides the modules in `skip`.")
    config = SVFConfig(target_modules=list(chosen), task_type="CAUSAL_LM")
    with attached(base, config, adapter_name) as model:
        for layer in svf_layers(model):
            mask = chosen[layer.module_name]
            scale = _scale(layer, mask) if normalize else 1.0
            layer.svf_delta[adapter_name].weight.copy_(mask * scale - 1)  # type: ignore[operator]
    return model.eval()


def _scale(layer: SVFLayer, mask: torch.Tensor) -> float:
    """Σσ / Σ(σ ⊙ m)."""
    sigma = layer.base_spectrum
    assert sigma is not None  # set with the basis
    total = (sigma * mask).sum()
    if not total.abs() > 1e-12 * sigma.sum():
        raise ValueError(f"The mask of {layer.module_name} sums to 0, so it has no scale. Pass `normalize=False`.")
    return float(sigma.sum() / total)
