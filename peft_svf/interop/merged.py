"""Merge an expert into the weight files of its base model.

The result is that of `merge_and_unload` and `save_pretrained`, but only one file of weights is in memory at a time.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from ..reporting.cards import merged_card
from ..spectral.arithmetic import effective_weight
from ..spectral.cache import BasisCache
from ..spectral.fingerprint import fingerprint
from ..spectral.rounding import surviving_fraction
from ..tuner.base_check import base_difference, refuse_base
from ..tuner.checkpoint import Checkpoint
from ..tuner.config import SVFConfig, load_svf_config
from ..tuner.fold import SMALLEST_FRACTION
from ..utils.files import write_whole
from ..utils.progress import progress_bar
from .sources import OTHER_WEIGHTS, meta_model, model_files, model_folder, opened

_PREFIX, _SUFFIX = "base_model.model.", ".svf_delta.weight"


@dataclass(frozen=True)
class Merged:
    """
    A merged model on disk.

    Attributes:
        folder (`Path`): The folder of the model.
        shares (`dict[str, float]`): The fraction of ΔW in each merged weight; below 1 for 16-bit weights.
    """

    folder: Path
    shares: dict[str, float]


@torch.no_grad()
def merge_to_folder(
    adapter: str | os.PathLike[str],
    save_directory: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    base_check: Literal["error", "warn", "ignore"] = "error",
    cache_dir: str | os.PathLike[str] | None = None,
) -> Merged:
    """
    Save the base model with an expert merged into its weights.

    Bit for bit what `merge_and_unload` computes, in the dtype of the files. The config is written last, so an
    incomplete folder does not load.

    Args:
        adapter: Folder or Hub id of an SVF adapter.
        save_directory: A folder that does not exist or is empty.
        base (*optional*): Folder or Hub id of the base model; that of the adapter's config if `None`.
        revision (`str`, *optional*): Revision of the base model on the Hub; that of the adapter's config if both are
            `None`.
        base_check (`str`): What to do if the adapter was made for another base model, see [`SVFRuntimeConfig`].
        cache_dir (*optional*): Folder of the cached singular bases.

    Raises:
        ValueError: The adapter is not an SVF adapter, is incomplete or damaged, has more than δ, or was made for
            another base model. The base model has no safetensors files or lacks a weight. Or the folder is not empty.
    """
    config = load_svf_config(adapter)
    deltas = _deltas(adapter, config)
    target = Path(save_directory).resolve()
    made = not target.exists()
    if not made and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder. Merge into a new folder.")
    source = model_folder(base or config.base_model_name_or_path, revision or (None if base else config.revision))
    transposed = _transposed(source, adapter, config, deltas)
    files = model_files(source)
    lacking = [name for name in deltas if f"{name}.weight" not in {key for keys in files.values() for key in keys}]
    if lacking:
        raise ValueError(
            f"{source} has no tensor {lacking[0]}.weight, which the adapter changes. Pass the adapter's base model. If "
            "its files name the modules differently, load it and use `merge_and_unload`."
        )
    shares: dict[str, float] = {}
    unfinished = target / ".unfinished"
    unfinished.mkdir(parents=True)
    try:
        differences = _write_weights(
            source, unfinished, files, transposed, deltas, config, BasisCache(cache_dir), shares
        )
        if differences:
            refuse_base(
                str(adapter),
                differences,
                len(deltas),
                base_model=config.base_model_name_or_path,
                policy=base_check,
                override='pass `base_check="warn"`',
            )
        _copy_rest(source, unfinished)
        name = str(base or config.base_model_name_or_path)
        write_whole(unfinished / "README.md", merged_card(str(adapter), name, len(shares)))
        # the config last: without it nothing loads
        for path in sorted(unfinished.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, target / path.name)
        unfinished.rmdir()
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        if made:
            target.rmdir()
        raise
    if coarse := [name for name, share in shares.items() if share < SMALLEST_FRACTION]:
        least = min(shares.values())
        warnings.warn(
            f"{len(coarse)} of {len(shares)} merged weights are too coarse for the change: as little as {least:.0%} of "
            "ΔW is left. Merge into an fp32 copy of the base model, or serve the adapter unmerged.",
            stacklevel=2,
        )
    return Merged(target, shares)


def _write_weights(
    source: Path,
    target: Path,
    files: Mapping[str, list[str]],
    transposed: Mapping[str, bool],
    deltas: Mapping[str, torch.Tensor],
    config: SVFConfig,
    cache: BasisCache,
    shares: dict[str, float],
) -> list[str]:
    """Write each file with the merged weights. Return the differences to the base model of the adapter."""
    differences = []
    with progress_bar(desc="Merging", total=len(deltas), unit="layer") as bar:
        for file, keys in files.items():
            tensors = {}
            with opened(source / file) as content:
                for key in keys:
                    tensor, name = content.get_tensor(key), key.removesuffix(".weight")
                    if key.endswith(".weight") and name in deltas:
                        weight = tensor.mT if transposed[name] else tensor
                        merged, shares[name], difference = _merged(weight, deltas[name], name, config, cache)
                        differences += [f"{name}: {difference}"] if difference else []
                        tensor = (merged.mT if transposed[name] else merged).contiguous()
                        bar.update()
                    tensors[key] = tensor
            save_file(tensors, target / file, metadata={"format": "pt"})
    return differences


def _deltas(adapter: str | os.PathLike[str], config: SVFConfig) -> dict[str, torch.Tensor]:
    tensors = load_peft_weights(str(adapter), device="cpu")
    config.check_checkpoint(adapter, Checkpoint.of_tensors(tensors))
    deltas = {}
    for key, value in tensors.items():
        if key.endswith(".base_layer.weight"):
            continue  # PEFT saves the weight of an adapted output layer with the adapter
        if not (key.startswith(_PREFIX) and key.endswith(_SUFFIX)):
            raise ValueError(
                f"{adapter} has more than δ ({key}). Load it with its base model and use `merge_and_unload`."
            )
        deltas[key[len(_PREFIX) : -len(_SUFFIX)]] = value
    return deltas


def _transposed(
    source: Path, adapter: str | os.PathLike[str], config: SVFConfig, deltas: Mapping[str, torch.Tensor]
) -> dict[str, bool]:
    """Check that δ fits the model. Return whether each module stores its weight as `[in, out]`."""
    modules = dict(meta_model(source).named_modules())
    if unknown := [name for name in deltas if name not in modules]:
        raise ValueError(f"The model in {source} has no module {unknown[0]}, which the adapter changes.")
    weights: dict[str, Any] = {name: modules[name].weight for name in deltas}
    lengths = {name: config.length(weight.shape) for name, weight in weights.items()}
    Checkpoint({name: tuple(delta.shape) for name, delta in deltas.items()}).check(str(adapter), lengths)
    for name, module in modules.items():
        for adapted, weight in weights.items():
            if name != adapted and getattr(module, "weight", None) is weight:
                raise ValueError(
                    f"{adapted} shares its weight with {name}, so merging would change both. Untie them, or serve the "
                    "adapter unmerged."
                )
    return {name: isinstance(modules[name], Conv1D) for name in deltas}


def _merged(
    weight: torch.Tensor, delta: torch.Tensor, name: str, config: SVFConfig, cache: BasisCache
) -> tuple[torch.Tensor, float, str | None]:
    """Return `W(z)`, the fraction of ΔW in it, and the difference to the weight that the adapter was made for."""
    basis = cache.load_or_compute(weight, name=name)
    shape, found = (weight.shape[0], weight.shape[1]), fingerprint(basis.spectrum)
    difference = base_difference(config.expected_fingerprint, name, found, shape)
    vectors = basis.leading(len(delta)).vectors
    fraction = surviving_fraction(weight, vectors, delta, weight.dtype) if weight.dtype.itemsize <= 2 else 1.0
    return effective_weight(weight, vectors, delta), fraction, difference


def _copy_rest(source: Path, target: Path) -> None:
    """Copy config, tokenizer and code, but not the card of the base model nor other weights."""
    left_out = shutil.ignore_patterns(
        "*.safetensors", *OTHER_WEIGHTS, "*.bin.index.json", "README.md", ".*", "original"
    )
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=left_out)
    if (target / "model.safetensors").exists():
        (target / "model.safetensors.index.json").unlink(missing_ok=True)  # stale
