"""Fit an expert to a fine-tuned model or to another adapter.

The best approximation of ΔW in the least squares sense is `δ_i = u_iᵀ ΔW v_i / σ_i`: the terms `σ_i u_i v_iᵀ` are
orthogonal, so each δ_i is a separate projection.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME
from torch import nn

from ..tuner.config import SVFConfig
from ..tuner.layer import SVFLayer, svf_layers
from ..utils.progress import progress_bar
from .adapters import Changes, changes_of_folder, changes_of_model
from .attaching import attached
from .sources import ModelTensors


@dataclass(frozen=True)
class Explained:
    """
    The fraction of a change that an expert can express.

    Attributes:
        modules: Explained fraction of `‖ΔW‖²` of each adapted module, 1 if ΔW is 0. Also 0 for each other module or
            parameter that the fine-tuning changes, such as a bias, a norm or the embeddings.
        overall: Explained fraction over all of these.
    """

    modules: dict[str, float]
    overall: float


@torch.no_grad()
def from_weights(
    finetuned: nn.Module | str | os.PathLike[str],
    base: nn.Module,
    config: SVFConfig | None = None,
    *,
    adapter_name: str = "default",
) -> tuple[PeftModel, Explained]:
    """
    Return the expert that explains a fine-tuning best, and the fraction of the change that it explains.

    Args:
        finetuned (`torch.nn.Module` or path): The fine-tuned model, or its folder of safetensors files, read one matrix
            at a time. Or a `PeftModel` of LoRA, VeRA, LoHa, LoKr, FourierFT or RandLora, or the folder of one.
        base (`torch.nn.Module`): The base model of the fine-tuning, which gets the adapter. Its weights stay as they
            are.
        config ([`SVFConfig`], *optional*): The modules to adapt; all linear layers in full by default.
        adapter_name (`str`): Name of the expert.

    Raises:
        ValueError: The fine-tuned model lacks a weight, or has a quantized one, one of another shape, or one with NaN
            or Inf. Its adapter may change more than the weights of linear layers, or is incomplete. Or the base model
            has adapters.
    """
    if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise ValueError("The base model has adapters. Load it again, or `unload()` them first.")
    config = config or SVFConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    changes = _changes(finetuned, base)
    with attached(base, config, adapter_name) as model:
        explained, whole = _fitted(model, changes, adapter_name)
    total = sum(whole.values())
    fractions = {name: min(1.0, explained[name] / whole[name]) if whole[name] else 1.0 for name in whole}
    return model.eval(), Explained(fractions, min(1.0, sum(explained.values()) / total) if total else 1.0)


def _fitted(model: PeftModel, changes: Changes, adapter_name: str) -> tuple[dict[str, float], dict[str, float]]:
    """Set δ. Return the squared norms of the explained and of the whole change of each module."""
    explained: dict[str, float] = {}
    whole: dict[str, float] = {}
    for layer in progress_bar(svf_layers(model), desc="Projecting", unit="layer"):
        weight = layer.weight_out_in()
        changed = changes.of(layer.module_name, layer.as_out_in(weight))
        if changed is None:
            explained[layer.module_name] = whole[layer.module_name] = 0.0
            continue
        delta, found = _projection(layer, weight, layer.as_out_in(changed.to(weight.device)), adapter_name)
        layer.svf_delta[adapter_name].weight.copy_(delta)
        explained[layer.module_name], whole[layer.module_name] = found
    for name, square in changes.left_out(list(whole)).items():
        explained[name], whole[name] = 0.0, square
    if broken := [name for name, square in whole.items() if not math.isfinite(square)]:
        raise ValueError(
            f"The change of {broken[0]} holds NaN or Inf. The fine-tuning is damaged or diverged: use an earlier "
            "checkpoint."
        )
    return explained, whole


def _projection(
    layer: SVFLayer, weight: torch.Tensor, change: torch.Tensor, name: str
) -> tuple[torch.Tensor, tuple[float, float]]:
    """Return δ `[r]` for the change `[out, in]`, and the squared norms of the explained and of the whole change."""
    W, Q, D = weight.double(), layer.basis_columns(layer.rank(name)).double(), change.double()
    if layer.side == "output":
        terms, projected = Q.mT @ W, Q.mT @ D  # σ_i v_iᵀ
    else:
        terms, projected = (W @ Q).mT, (D @ Q).mT  # σ_i u_iᵀ
    squares = terms.square().sum(dim=1)
    products = (terms * projected).sum(dim=1)
    known = squares > squares.max() * 1e-14  # a smaller σ is rounding error, and δ would be arbitrary
    delta = torch.where(known, products / squares.where(known, torch.ones_like(squares)), torch.zeros_like(products))
    return delta, (float((delta * products).sum()), float(D.square().sum()))


# ---------------------------------------------------------------------------------------------------- changes


def _changes(finetuned: Any, base: nn.Module) -> Changes:
    if isinstance(finetuned, (str, os.PathLike)):
        folder = Path(finetuned)
        if (folder / CONFIG_NAME).exists():
            if model_weights := [file.name for file in folder.glob("model*.safetensors")]:
                raise ValueError(
                    f"{folder} holds both an adapter and {model_weights[0]}. Pass a folder that holds one of them."
                )
            return changes_of_folder(folder, base)
        tensors = ModelTensors(folder, base)
        return _of_tensors(lambda name: tensors.read(name) if name in tensors else None, str(folder), base)
    if isinstance(finetuned, PeftModel):
        return changes_of_model(finetuned, base)
    if any(isinstance(module, BaseTunerLayer) for module in finetuned.modules()):
        raise ValueError(
            "The fine-tuned model has adapters, but is not a `PeftModel`. Save them and pass their folder."
        )
    return _of_tensors(finetuned.state_dict().get, "the fine-tuned model", base)


def _of_tensors(read: Callable[[str], torch.Tensor | None], where: str, base: nn.Module) -> Changes:
    before = dict(base.named_parameters())

    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        found = read(f"{name}.weight")
        if found is None:
            raise ValueError(
                f"There is no {name}.weight in {where}. Pass a fine-tuning of this base model. If its files name the "
                "modules differently, load it with transformers and pass the model."
            )
        if found.shape != weight.shape:
            raise ValueError(
                f"{name}.weight has shape {tuple(found.shape)} in {where} and {tuple(weight.shape)} in the base model."
            )
        if not found.is_floating_point() or found.dtype.itemsize < 2:
            raise ValueError(
                f"{name}.weight is quantized ({found.dtype}) in {where}, so it is not the weight itself. Pass the "
                "full-precision model."
            )
        return found.to(device=weight.device, dtype=torch.float64) - weight.double()

    def left_out(adapted: Collection[str]) -> dict[str, float]:
        weights = {f"{name}.weight" for name in adapted}
        squares, unknown = {}, []
        for name, parameter in before.items():
            if name in weights:
                continue
            square = _squared_distance(read(name), parameter)
            if square is None:
                unknown.append(name)
            elif square != 0:
                squares[name.removesuffix(".weight")] = square
        if unknown:
            warnings.warn(
                f"{len(unknown)} parameters of the base model are missing, quantized or of another shape in {where}, "
                f"the first is {unknown[0]}. The expert cannot hold their changes, and the explained fraction does not "
                "count them.",
                stacklevel=5,
            )
        return squares

    return Changes(change, left_out)


def _squared_distance(found: torch.Tensor | None, parameter: torch.Tensor) -> float | None:
    """Return the squared norm of a change, `None` if the tensors cannot be compared."""
    if found is None or found.shape != parameter.shape or parameter.is_meta:
        return None
    if any(not each.is_floating_point() or each.dtype.itemsize < 2 for each in (found, parameter)):
        return None
    total = 0.0
    for a, b in zip(found.flatten().split(2**24), parameter.flatten().split(2**24), strict=True):  # bounds the memory
        there, here = a.to(b.device).float(), b.float()
        total += float((there - here).masked_fill(there == here, 0).double().square().sum())  # Inf - Inf is NaN
    return total
