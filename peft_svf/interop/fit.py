"""Fit an expert to a fine-tuned model or to another adapter.

The best approximation of ΔW in the least squares sense is `δ_i = u_iᵀ ΔW v_i / σ_i`: the terms `σ_i u_i v_iᵀ` are
orthogonal, so each δ_i is a separate projection.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..tuner.config import SVFConfig
from ..tuner.layer import SVFLayer, svf_layers
from ..utils.progress import progress_bar
from .sources import ModelTensors

# methods whose whole change is the ΔW that their layers return
ADDITIVE = ("LORA", "VERA", "LOHA", "LOKR", "FOURIERFT", "RANDLORA")

Change = Callable[[str, torch.Tensor], "torch.Tensor | None"]


@dataclass(frozen=True)
class Explained:
    """
    The fraction of a change that an expert can express.

    Attributes:
        modules: Explained fraction of `‖ΔW‖²` of each adapted module, 1 if ΔW is 0.
        overall: Explained fraction over all adapted modules.
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
            at a time. Or a `PeftModel` of LoRA or another method in `ADDITIVE`, or the folder of one.
        base (`torch.nn.Module`): The base model of the fine-tuning, which gets the adapter.
        config ([`SVFConfig`], *optional*): The modules to adapt; all linear layers in full by default.
        adapter_name (`str`): Name of the expert.

    Raises:
        ValueError: The fine-tuned model lacks a weight, or has one of another shape. Its adapter changes more than
            weights. Or the base model has adapters.
    """
    if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise ValueError("The base model has adapters. Load it again, or `unload()` them first.")
    config = config or SVFConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    change = _changes(finetuned, base)
    model: PeftModel = get_peft_model(base, config, adapter_name=adapter_name)
    try:
        explained, whole = _fitted(model, change, adapter_name)
    except BaseException:
        model.unload()  # restore the base model
        raise
    total = sum(whole.values())
    fractions = {name: min(1.0, explained[name] / whole[name]) if whole[name] else 1.0 for name in whole}
    return model.eval(), Explained(fractions, min(1.0, sum(explained.values()) / total) if total else 1.0)


def _fitted(model: PeftModel, change: Change, adapter_name: str) -> tuple[dict[str, float], dict[str, float]]:
    """Set δ. Return the squared norms of the explained and of the whole change of each module."""
    explained: dict[str, float] = {}
    whole: dict[str, float] = {}
    for layer in progress_bar(svf_layers(model), desc="Projecting", unit="layer"):
        weight = layer.weight_out_in()
        changed = change(layer.module_name, layer.as_out_in(weight))
        if changed is None:
            explained[layer.module_name] = whole[layer.module_name] = 0.0
            continue
        delta, found = _projection(layer, weight, layer.as_out_in(changed.to(weight.device)), adapter_name)
        layer.svf_delta[adapter_name].weight.copy_(delta)
        explained[layer.module_name], whole[layer.module_name] = found
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


def _changes(finetuned: Any, base: nn.Module) -> Change:
    """Return a function from a module's name and base weight to its ΔW; `None` if it is unchanged."""
    if isinstance(finetuned, (str, os.PathLike)):
        folder = Path(finetuned)
        if (folder / "adapter_config.json").exists():
            return _of_adapter_folder(folder, base)
        tensors = ModelTensors(folder)
        return _of_tensors(lambda name: tensors.read(name) if name in tensors else None, str(folder))
    if isinstance(finetuned, PeftModel):
        for name in finetuned.active_adapters:
            _check_method(finetuned.peft_config[name], f"The adapter {name!r}")
        return _of_layers(finetuned.base_model.model)
    return _of_tensors(finetuned.state_dict().get, "the fine-tuned model")


def _of_tensors(read: Callable[[str], torch.Tensor | None], where: str) -> Change:
    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        found = read(f"{name}.weight")
        if found is None:
            raise ValueError(f"There is no {name}.weight in {where}. Pass a fine-tuning of this base model.")
        if found.shape != weight.shape:
            raise ValueError(
                f"{name}.weight has shape {tuple(found.shape)} in {where} and {tuple(weight.shape)} in the base model."
            )
        return found.to(device=weight.device, dtype=torch.float64) - weight.double()

    return change


def _of_adapter_folder(folder: Path, base: nn.Module) -> Change:
    config = PeftConfig.from_pretrained(str(folder))
    _check_method(config, str(folder))
    loaded = PeftModel.from_pretrained(base, str(folder))
    change = _of_layers(loaded.base_model.model)
    loaded.unload()  # `change` keeps the layers
    return change


def _check_method(config: Any, where: str) -> None:
    """Check that the ΔW of an adapter's layers is its whole change.

    Raises:
        ValueError: The adapter changes something else as well.
    """
    if config.peft_type == "SVF":
        raise ValueError(f"{where} is an SVF adapter already. Load it with `PeftModel.from_pretrained`.")
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    more = [name for name in ("modules_to_save", "use_dora") if getattr(config, name, None)]
    more += ["bias"] if getattr(config, "bias", "none") not in ("none", None) else []
    if kind not in ADDITIVE or more:
        what = f"`{more[0]}`" if more else f"the method {kind}"
        raise ValueError(
            f"{where} has {what}, which changes more than single weights. Merge it first and pass the merged model: "
            "`from_weights(peft_model.merge_and_unload(), base)`."
        )


def _of_layers(model: nn.Module) -> Change:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}

    def change(name: str, weight: torch.Tensor) -> torch.Tensor | None:
        layer: Any = layers.get(name)
        if layer is None:
            return None
        kept = [adapter for adapter in layer.active_adapters if adapter in getattr(layer, layer.adapter_layer_names[0])]
        parts = [layer.get_delta_weight(adapter).double() for adapter in kept]
        return sum(parts[1:], parts[0]) if parts else None

    return change
