"""Export experts as LoRA adapters, for servers that support only LoRA.

The change of an expert, `ΔW = Σ_i (σ_i δ_i) u_i v_iᵀ`, is already a singular value decomposition. The best LoRA of rank
r therefore consists of the r terms with the largest |σ_i δ_i| (Eckart and Young, 1936).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME
from safetensors.torch import save

from ..tuner.layer import SVFLayer, svf_layers
from ..utils.files import write_whole
from ..utils.progress import progress_bar


@dataclass
class LoraExport:
    """
    An expert, or its best low-rank approximation, as a LoRA adapter.

    Attributes:
        config (`LoraConfig`): Its `rank_pattern` holds the rank of each module. Every scaling is 1.
        state_dict (`dict[str, torch.Tensor]`): In PEFT's format, `lora_A [r, in]` and `lora_B [out, r]`.
        retained (`dict[str, float]`): Retained fraction of `‖ΔW‖²` of each module, 1 if ΔW is 0.
        retained_overall (`float`): Retained fraction over all modules.
    """

    config: LoraConfig
    state_dict: dict[str, torch.Tensor]
    retained: dict[str, float] = field(default_factory=dict)
    retained_overall: float = 1.0

    @property
    def rank(self) -> int:
        """The largest rank of a module, which the server must allow."""
        return int(self.config.r)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Save a PEFT LoRA adapter, which loads without peft_svf.

        Raises:
            ValueError: The folder holds another kind of adapter, such as the expert itself.
        """
        folder = Path(save_directory)
        if (folder / CONFIG_NAME).exists() and (kind := PeftConfig.from_pretrained(str(folder)).peft_type) != "LORA":
            kind = getattr(kind, "value", kind)
            raise ValueError(f"{folder} already holds an adapter of type {kind}. Save the LoRA in another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "adapter_model.safetensors", save(self.state_dict, metadata={"format": "pt"}))
        self.config.save_pretrained(str(folder))
        about = {"retained_overall": self.retained_overall, "retained": self.retained}
        write_whole(folder / "export.json", json.dumps(about, indent=1) + "\n")


@torch.no_grad()
def to_lora(
    model: PeftModel,
    adapter_name: str | Sequence[str] | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: torch.dtype | None = None,
) -> LoraExport:
    """
    Return the LoRA adapter that is closest to an expert.

    Exact up to rounding if `rank` is at least that of the expert, or if neither `rank` nor `energy` is given.

    Args:
        model ([`~peft.PeftModel`]): The model with the expert, which need not be active.
        adapter_name (`str` or `list[str]`, *optional*): The expert, or several experts to add; the active ones if
            `None`.
        rank (`int`, *optional*): Largest number of terms to keep in each module.
        energy (`float`, *optional*): Keep the fewest terms in each module that hold this fraction of `‖ΔW‖²`.
        dtype (`torch.dtype`, *optional*): Dtype of the result; fp32 (fp64 for an fp64 model) by default.

    Raises:
        ValueError: Both `rank` and `energy` are given, or one is out of range. Or an adapter is unknown, is not an SVF
            adapter, or has more than δ (`bias` or `modules_to_save`). Or the model has adapters of another method.
    """
    if rank is not None and energy is not None:
        raise ValueError("Pass `rank` or `energy`, not both.")
    if rank is not None and rank < 1:
        raise ValueError(f"`rank` must be at least 1, got {rank}.")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"`energy` must be a fraction above 0 and at most 1, got {energy}.")
    names = _names(model, adapter_name)
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, SVFLayer):
            raise ValueError(
                f"The model has another adapter ({type(module).__name__} on {name.replace('.base_layer', '')}), which "
                "the export would leave out. Merge it into the base model before training the expert."
            )
    layers = {
        layer.module_name: layer
        for layer in svf_layers(model.base_model.model)
        if any(name in layer.svf_delta for name in names)
    }
    tensors, ranks, kept, whole = {}, {}, {}, {}
    for name, layer in progress_bar(layers.items(), desc="Exporting", unit="layer"):
        delta = _delta(layer, names)
        sizes = _sizes(layer, delta)
        order = sizes.argsort(descending=True, stable=True)
        squares = sizes[order].double().square()
        ranks[name] = _rank(squares, rank, energy)
        kept[name], whole[name] = float(squares[: ranks[name]].sum()), float(squares.sum())
        up, down = _terms(layer, delta, order[: ranks[name]])
        target = dtype or up.dtype
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = down.to(target).cpu().contiguous()
        tensors[f"{prefix}.lora_B.weight"] = up.to(target).cpu().contiguous()
    total = sum(whole.values())
    return LoraExport(
        config=_config(model, names, layers, ranks),
        state_dict=tensors,
        retained={name: kept[name] / whole[name] if whole[name] else 1.0 for name in layers},
        retained_overall=sum(kept.values()) / total if total else 1.0,
    )


def _names(model: Any, adapter_name: str | Sequence[str] | None) -> list[str]:
    if adapter_name is None:
        names = list(model.active_adapters)
    else:
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    if len(set(names)) < len(names):
        raise ValueError(f"An adapter is named twice: {names}. Name each one once.")
    if not names:
        raise ValueError("No adapter is active. Name the expert with `adapter_name=`.")
    for name in names:
        config = getattr(model, "peft_config", {}).get(name)
        if config is None:
            raise ValueError(f"Adapter {name!r} not found; there are {', '.join(getattr(model, 'peft_config', {}))}.")
        if config.peft_type != "SVF":
            raise ValueError(f"Adapter {name!r} is a {config.peft_type} adapter. Expected an SVF adapter.")
        if config.bias != "none" or config.modules_to_save:
            what = "`modules_to_save`" if config.modules_to_save else "`bias`"
            raise ValueError(f"Adapter {name!r} has {what}, which a LoRA cannot hold. Export a merged model instead.")
    return names


def _delta(layer: SVFLayer, names: Sequence[str]) -> torch.Tensor:
    delta = layer.summed_delta(names)
    if not torch.isfinite(delta).all():
        raise ValueError(f"δ of {layer.module_name} in {', '.join(names)} holds NaN or Inf.")
    return delta


def _sizes(layer: SVFLayer, delta: torch.Tensor) -> torch.Tensor:
    """Return the size of each term, |σ_i δ_i|, `[r]`."""
    layer.basis_columns(len(delta))  # built if necessary, with the spectrum
    assert layer.base_spectrum is not None
    return layer.base_spectrum[: len(delta)].to(delta.device) * delta.abs()


def _terms(layer: SVFLayer, delta: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the chosen terms of `ΔW = up @ down`, `[out, n]` and `[n, in]`."""
    W, Q = layer.weight_out_in(), layer.basis_columns(len(delta))
    work = torch.promote_types(W.dtype, torch.float32)
    W, Q, delta = W.to(work), Q[:, chosen.to(Q.device)].to(work), delta[chosen].to(work)
    if layer.side == "output":
        up, down = Q, (Q.mT @ W) * delta.unsqueeze(1)  # u_i, σ_i δ_i v_iᵀ
    else:
        up, down = (W @ Q) * delta, Q.mT  # σ_i δ_i u_i, v_iᵀ
    # equal norms on both sides, or one of them may overflow in 16 bit
    even = (down.norm(dim=1).clamp(min=1e-30) / up.norm(dim=0).clamp(min=1e-30)).sqrt()
    return up * even, down / even.unsqueeze(1)


def _rank(squares: torch.Tensor, rank: int | None, energy: float | None) -> int:
    """Return how many of the terms `[r]`, in descending order, to keep: at least one, as LoRA has no rank 0."""
    if rank is not None:
        return min(rank, len(squares))
    if energy is not None:
        fractions = squares.cumsum(0) / squares.sum()
        return min(int((fractions < energy * (1 - 1e-12)).sum()) + 1, len(squares))
    return max(1, int((squares > 0).sum()))


def _config(model: Any, names: Sequence[str], layers: dict[str, SVFLayer], ranks: dict[str, int]) -> LoraConfig:
    source = model.peft_config[names[0]]
    largest = max(ranks.values())
    fewer = {name: rank for name, rank in ranks.items() if rank < largest}
    modules = {name.replace(".base_layer", "") for name, _ in model.base_model.model.named_modules()}
    # the names that PEFT would also find at the end of others
    ends = {name: [other for other in modules if other.endswith(f".{name}")] for name in layers}
    pattern = {f"^{name}" if ends[name] else name: rank for name, rank in fewer.items()}
    exact = all(other in layers for others in ends.values() for other in others)
    transposed = {layer.fan_in_fan_out for layer in layers.values()}
    return LoraConfig(
        r=largest,
        lora_alpha=largest,
        target_modules=list(layers) if exact else "|".join(re.escape(name) for name in layers),
        rank_pattern=dict(pattern),
        alpha_pattern=dict(pattern),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=transposed == {True},
        task_type=source.task_type,
        base_model_name_or_path=source.base_model_name_or_path,
        revision=source.revision,
        inference_mode=True,
    )
