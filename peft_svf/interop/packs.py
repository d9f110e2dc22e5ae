"""Make a basis pack from the files of a model, one weight at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from ..spectral.basis import SingularBasis, singular_basis
from ..spectral.cache import checksum, weight_key
from ..spectral.pack import FORMAT, INDEX, BasisPack
from ..tuner.config import SVFConfig
from ..utils.files import write_whole
from ..utils.progress import progress_bar
from .sources import ModelTensors, linear_modules, meta_model, model_folder


@torch.no_grad()
def decompose(
    model: str | os.PathLike[str],
    save_directory: str | os.PathLike[str],
    *,
    target_modules: Sequence[str] | str = "all-linear",
    r: int | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
) -> BasisPack:
    """
    Write the singular bases of a model, for `SVFRuntimeConfig(basis=...)`.

    At most one weight and its basis are in memory. Existing files of the same weights and settings are kept, so an
    interrupted call can be repeated.

    Args:
        model: Folder or Hub id of the full-precision model, with safetensors files.
        save_directory: The output folder.
        target_modules: The modules to decompose, as in [`SVFConfig`].
        r (`int`, *optional*): Number of columns to keep, largest σ first; all if `None`.
        dtype (`torch.dtype`, *optional*): Dtype of the vectors; that of the weights if `None`.
        device (`str`): Device of the computation.
        revision (`str`, *optional*): Revision of the model on the Hub.

    Raises:
        ValueError: No module matches, the model is quantized, has no safetensors files or lacks a weight, or a weight
            cannot be decomposed.
    """
    if r is not None and r < 1:
        raise ValueError(f"`r` must be at least 1, got {r}.")
    source, target = model_folder(model, revision), Path(save_directory)
    base = meta_model(source)
    modules = _targets(base, source, target_modules)
    tensors = ModelTensors(source, base)
    if lacking := [name for name in modules if f"{name}.weight" not in tensors]:
        raise ValueError(f"{source} has no tensor {lacking[0]}.weight.")
    target.mkdir(parents=True, exist_ok=True)
    (target / INDEX).unlink(missing_ok=True)  # written again when the pack is complete
    files, size = {}, 0
    for number, (name, transposed) in enumerate(
        progress_bar(modules.items(), desc="Decomposing", unit="weight", total=len(modules))
    ):
        path = target / f"basis-{number + 1:05d}-of-{len(modules):05d}.safetensors"
        weight = tensors.read(f"{name}.weight", transposed=transposed, device=device)
        about = {"module": name, "key": weight_key(weight), "r": str(r), "dtype": str(dtype or weight.dtype)}
        if not _is_done(path, about):
            basis = singular_basis(weight, r, name=name)
            basis = SingularBasis(basis.vectors.to(device="cpu", dtype=dtype or weight.dtype), basis.spectrum)
            sha256 = checksum(about["key"], basis)
            content = {"vectors": basis.vectors, "spectrum": basis.spectrum}
            write_whole(path, save(content, metadata={**about, "sha256": sha256}))
        files[name], size = path.name, size + path.stat().st_size
    about = {"format": FORMAT, "base_model": str(model), "revision": revision, "r": r, "total_size": size}
    write_whole(target / INDEX, json.dumps({"metadata": about, "weight_map": files}, indent=1) + "\n")
    return BasisPack(target)


def _targets(model: nn.Module, source: Path, target_modules: Sequence[str] | str) -> dict[str, bool]:
    """Return the modules to decompose, and whether each stores its weight as `[in, out]`."""
    chosen: Any = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = _maybe_include_all_linear_layers(SVFConfig(target_modules=chosen), model)
    found = {
        name: transposed
        for name, transposed in linear_modules(model).items()
        if check_target_module_exists(config, name)
    }
    if not found:
        raise ValueError(f"The model in {source} has no linear modules that match {target_modules!r}.")
    return found


def _is_done(path: Path, about: dict[str, str]) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            known = file.metadata() or {}
            if not about.items() <= known.items():
                return False
            basis = SingularBasis(file.get_tensor("vectors"), file.get_tensor("spectrum"))
            return known.get("sha256") == checksum(about["key"], basis)
    except (OSError, SafetensorError):
        return False
