"""Merge an expert into the weight files of its base model.

The result is that of `merge_and_unload` and `save_pretrained`, but only one file of weights is in memory at a time.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import CONFIG_NAME
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..reporting.cards import merged_card
from ..spectral.arithmetic import effective_weight
from ..spectral.cache import BasisCache
from ..spectral.fingerprint import fingerprint
from ..spectral.rounding import surviving_fraction
from ..tuner.base_check import base_differences, refuse_base
from ..tuner.checkpoint import Checkpoint, adapter_tensors
from ..tuner.config import SVFConfig, load_svf_config
from ..tuner.fold import SMALLEST_FRACTION
from ..tuner.renames import current_names
from ..utils.files import read_text, write_whole
from ..utils.progress import progress_bar
from .sources import (
    INDEX,
    OTHER_WEIGHTS,
    linear_modules,
    meta_model,
    model_files,
    model_folder,
    names_in_model,
    opened,
)

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
            another base model. The base model has no safetensors files, lacks a weight, or holds an adapter of another
            method. Or the folder is not empty.
    """
    config = load_svf_config(adapter)
    checkpoint = adapter_tensors(adapter)
    config.check_checkpoint(adapter, Checkpoint.of_tensors(checkpoint))
    target = Path(save_directory).resolve()
    made = not target.exists()
    if not made and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder. Merge into a new folder.")
    source = model_folder(base or config.base_model_name_or_path, revision or (None if base else config.revision))
    _check_no_other_adapter(source)
    model, files = meta_model(source), model_files(source)
    names = names_in_model(model, (key for keys in files.values() for key in keys))
    deltas, stored = _content(adapter, config, model, checkpoint)
    transposed = _transposed(source, adapter, config, model, deltas)
    if lacking := [name for name in deltas if f"{name}.weight" not in names.values()]:
        raise ValueError(
            f"{source} has no tensor {lacking[0]}.weight, which the adapter changes. Pass the adapter's base model. If "
            "its files name the modules differently, load it and use `merge_and_unload`."
        )
    shares: dict[str, float] = {}
    unfinished = target / ".unfinished"
    unfinished.mkdir(parents=True)
    moved: list[Path] = []
    try:
        name = str(base or config.base_model_name_or_path)
        cache = BasisCache(cache_dir, model=name)
        found = _write_weights(source, unfinished, files, names, transposed, deltas, stored, cache, shares)
        differences, count = base_differences(config.expected_fingerprint, found)
        if differences:
            refuse_base(
                str(adapter),
                differences,
                count,
                config,
                policy=base_check,
                override='pass `base_check="warn"`',
            )
        _copy_rest(source, unfinished)
        write_whole(unfinished / "README.md", merged_card(str(adapter), name, len(shares)))
        # the config last: without it nothing loads
        for path in sorted(unfinished.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, target / path.name)
            moved.append(target / path.name)
        unfinished.rmdir()
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        for path in moved:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
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
    names: Mapping[str, str],
    transposed: Mapping[str, bool],
    deltas: Mapping[str, torch.Tensor],
    stored: Mapping[str, torch.Tensor],
    cache: BasisCache,
    shares: dict[str, float],
) -> dict[str, tuple[list[float], tuple[int, int]]]:
    """Write each file with the merged weights. Return the fingerprint and the shape of each weight before."""
    found = {}
    with progress_bar(desc="Merging", total=len(deltas), unit="layer") as bar:
        for file, keys in files.items():
            tensors = {}
            with opened(source / file) as content:
                for key in keys:
                    tensor, name = content.get_tensor(key), names[key].removesuffix(".weight")
                    if names[key] in stored and not _same(stored[names[key]], tensor):
                        raise ValueError(
                            f"The adapter holds another {key} than {source}, such as one with new tokens. Load it with "
                            "its base model and use `merge_and_unload`."
                        )
                    if names[key].endswith(".weight") and name in deltas:
                        weight = tensor.mT if transposed[name] else tensor
                        merged, shares[name], numbers = _merged(weight, deltas[name], name, cache)
                        found[name] = (numbers, (weight.shape[0], weight.shape[1]))
                        tensor = (merged.mT if transposed[name] else merged).contiguous()
                        bar.update()
                    tensors[key] = tensor
            save_file(tensors, target / file, metadata={"format": "pt"})
    return found


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.to(b.dtype), b)


def _content(
    adapter: str | os.PathLike[str], config: SVFConfig, model: nn.Module, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return δ by module, and the base weights in the file: PEFT saves that of an adapted output layer.

    Modules that an older transformers version named differently get their names in the model, also in the config.
    """
    deltas, stored = {}, {}
    for key, value in tensors.items():
        if key.endswith(".base_layer.weight"):
            stored[key.removeprefix(_PREFIX).replace(".base_layer.", ".")] = value
            continue
        if not key.endswith(_SUFFIX):
            raise ValueError(
                f"{adapter} has more than δ ({key}). Load it with its base model and use `merge_and_unload`."
            )
        deltas[key.removeprefix(_PREFIX).removesuffix(_SUFFIX)] = value.float()
    names = current_names(model, deltas)
    config.rename_modules(names)
    return {names.get(name, name): delta for name, delta in deltas.items()}, {
        name: stored[key] for key, name in names_in_model(model, stored).items()
    }


def _transposed(
    source: Path,
    adapter: str | os.PathLike[str],
    config: SVFConfig,
    model: nn.Module,
    deltas: Mapping[str, torch.Tensor],
) -> dict[str, bool]:
    """Check that δ fits the model. Return whether each module stores its weight as `[in, out]`."""
    modules = dict(model.named_modules())
    if unknown := [name for name in deltas if name not in modules]:
        raise ValueError(f"The model in {source} has no module {unknown[0]}, which the adapter changes.")
    wanted = dict.fromkeys(deltas)
    if not config.expected_fingerprint:  # then only the targets show what is missing
        wanted |= {name: None for name in linear_modules(model) if check_target_module_exists(config, name)}
    weights: dict[str, Any] = {name: modules[name].weight for name in wanted}
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
    weight: torch.Tensor, delta: torch.Tensor, name: str, cache: BasisCache
) -> tuple[torch.Tensor, float, list[float]]:
    """Return `W(z)`, the fraction of ΔW in it, and the fingerprint of W."""
    basis = cache.load_or_compute(weight, name=name)
    vectors = basis.leading(len(delta)).vectors
    fraction = surviving_fraction(weight, vectors, delta, weight.dtype) if weight.dtype.itemsize <= 2 else 1.0
    return effective_weight(weight, vectors, delta), fraction, fingerprint(basis.spectrum, vectors)


def _check_no_other_adapter(source: Path) -> None:
    """Check that the folder of a base model is not also that of a LoRA, which transformers would load with it.

    Raises:
        ValueError: It is, or the config of an adapter in it cannot be read.
    """
    if not (source / CONFIG_NAME).exists():
        return
    try:
        kind = dict(json.loads(read_text(source / CONFIG_NAME)))["peft_type"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{source / CONFIG_NAME} is damaged or names no adapter. Remove it.") from error
    if kind != "SVF":
        raise ValueError(
            f"The base model in {source} comes with an adapter of type {kind}, which the merged model would lack. "
            f"Merge that adapter first, or remove {CONFIG_NAME} and the adapter's weights."
        )


def _copy_rest(source: Path, target: Path) -> None:
    """Copy config, tokenizer and code, but not the card of the base model, adapters or other weights."""
    left_out = shutil.ignore_patterns(
        "*.safetensors", *OTHER_WEIGHTS, "*.index.json", "README.md", CONFIG_NAME, ".*", "original"
    )
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=left_out)
    for folder, *_ in os.walk(target, topdown=False):  # those of checkpoints, adapters and this merge
        if not os.listdir(folder):
            os.rmdir(folder)
    if not (target / "model.safetensors").exists():  # or the index is stale
        shutil.copy(source / INDEX, target / INDEX)
