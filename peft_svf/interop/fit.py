"""The expert that comes closest to a fine-tuned model, or to another adapter.

Among all `W(z)`, ΔW is approached best, in the least squares sense, by `δ_i = u_iᵀ ΔW v_i / σ_i`: the terms
`σ_i u_i v_iᵀ` are orthogonal, so that each δ_i is a projection of its own.
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
from ..tuner.layer import SVFLayer
from ..utils.progress import progress_bar
from .sources import model_files, opened

# methods that add to the weight what their layers give as ΔW
ADDITIVE = ("LORA", "VERA", "LOHA", "LOKR", "FOURIERFT", "RANDLORA")

Change = Callable[[str, torch.Tensor], "torch.Tensor | None"]


@dataclass(frozen=True)
class Explained:
    """
    How much of a change an expert can express.

    Attributes:
        modules: Share of `‖ΔW‖²` of each adapted module, 1 where ΔW is 0.
        overall: The same of all adapted modules together.
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
    The expert that explains a fine-tuning best, and how much of it that is.

    Args:
        finetuned (`torch.nn.Module` or path): The fine-tuned model, or its folder of safetensors files, read one matrix
            at a time; or a `PeftModel` with LoRA adapters (or of another method of `ADDITIVE`), or the folder of one.
        base (`torch.nn.Module`): The model that was fine-tuned, which gets adapted.
        config ([`SVFConfig`], *optional*): What to adapt; all linear layers in full by default.
        adapter_name (`str`): What to call the expert.

    Raises:
        ValueError: The fine-tuned model lacks a weight, or has one of another shape; the message names it. Or its
            adapter has more than a ΔW, or the base model has adapters.
    """
    if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise ValueError("The base model has adapters. Load it anew, or `unload()` them first.")
    config = config or SVFConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    change = _changes(finetuned, base)
    model: PeftModel = get_peft_model(base, config, adapter_name=adapter_name)
    try:
        explained, whole = _fitted(model, change, adapter_name)
    except BaseException:
        model.unload()  # the base model as it was
        raise
    total = sum(whole.values())
    shares = {name: min(1.0, explained[name] / whole[name]) if whole[name] else 1.0 for name in whole}
    return model.eval(), Explained(shares, min(1.0, sum(explained.values()) / total) if total else 1.0)


def _fitted(model: PeftModel, change: Change, adapter_name: str) -> tuple[dict[str, float], dict[str, float]]:
    """Put δ in place; the squares of what it explains of each module, and of the whole change."""
    layers = [module for module in model.modules() if isinstance(module, SVFLayer)]
    explained: dict[str, float] = {}
    whole: dict[str, float] = {}
    for layer in progress_bar(layers, desc="Projecting", unit="layer"):
        weight = layer._unmerged_weight()
        changed = change(layer.module_name, weight)
        if changed is None:
            explained[layer.module_name] = whole[layer.module_name] = 0.0
            continue
        delta, found = _projection(layer, layer._as_out_in(changed.to(weight.device)), adapter_name)
        layer.svf_delta[adapter_name].weight.copy_(delta)
        explained[layer.module_name], whole[layer.module_name] = found
    return explained, whole


def _projection(layer: SVFLayer, change: torch.Tensor, name: str) -> tuple[torch.Tensor, tuple[float, float]]:
    """δ `[r]` of the change `[out, in]`, and the squares of what it explains and of the whole."""
    W = layer._as_out_in(layer._unmerged_weight()).double()
    Q, D = layer._ready_basis()[:, : layer.rank(name)].double(), change.double()
    if layer.side == "output":
        terms, projected = Q.mT @ W, Q.mT @ D  # σ_i v_iᵀ
    else:
        terms, projected = (W @ Q).mT, (D @ Q).mT  # σ_i u_iᵀ
    squares = terms.square().sum(dim=1)
    products = (terms * projected).sum(dim=1)
    known = squares > squares.max() * 1e-14  # below, σ is rounding, and δ would be anything
    delta = torch.where(known, products / squares.where(known, torch.ones_like(squares)), torch.zeros_like(products))
    return delta, (float((delta * products).sum()), float(D.square().sum()))


# ---------------------------------------------------------------------------------------------------- changes


def _changes(finetuned: Any, base: nn.Module) -> Change:
    """ΔW of a module, by its name and base weight; `None` if it was not touched."""
    if isinstance(finetuned, (str, os.PathLike)):
        folder = Path(finetuned)
        if (folder / "adapter_config.json").exists():
            return _of_adapter_folder(folder, base)
        return _of_tensors(_reader(folder), str(folder))
    if isinstance(finetuned, PeftModel):
        for name in finetuned.active_adapters:
            _check_method(finetuned.peft_config[name], f"The adapter {name!r}")
        return _of_layers(finetuned.base_model.model)
    tensors = finetuned.state_dict()
    return _of_tensors(tensors.get, "the fine-tuned model")


def _of_tensors(read: Callable[[str], torch.Tensor | None], where: str) -> Change:
    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        found = read(f"{name}.weight")
        if found is None:
            raise ValueError(f"There is no {name}.weight in {where}.")
        if found.shape != weight.shape:
            raise ValueError(
                f"{name}.weight has shape {tuple(found.shape)} in {where} and {tuple(weight.shape)} in the base model."
            )
        return found.to(device=weight.device, dtype=torch.float64) - weight.double()

    return change


def _reader(folder: Path) -> Callable[[str], torch.Tensor | None]:
    """Reads a tensor of a model folder."""
    files = {key: file for file, keys in model_files(folder).items() for key in keys}

    def read(name: str) -> torch.Tensor | None:
        if name not in files:
            return None
        with opened(folder / files[name]) as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    return read


def _of_adapter_folder(folder: Path, base: nn.Module) -> Change:
    config = PeftConfig.from_pretrained(str(folder))
    _check_method(config, str(folder))
    loaded = PeftModel.from_pretrained(base, str(folder))
    change = _of_layers(loaded.base_model.model)
    loaded.unload()  # the layers live on in `change`
    return change


def _check_method(config: Any, where: str) -> None:
    """Whether the whole change of an adapter is what its layers say of their ΔW.

    Raises:
        ValueError: It is not.
    """
    if config.peft_type == "SVF":
        raise ValueError(f"{where} is an SVF adapter already.")
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    more = [name for name in ("modules_to_save", "use_dora") if getattr(config, name, None)]
    more += ["bias"] if getattr(config, "bias", "none") not in ("none", None) else []
    if kind not in ADDITIVE or more:
        what = f"`{more[0]}`" if more else f"the method {kind}"
        raise ValueError(
            f"{where} has {what}, whose change is not known layer by layer. Merge it first, and pass the merged model: "
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
