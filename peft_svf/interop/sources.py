"""The files of a model, read one tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from ..tuner.renames import current_names
from ..utils.files import read_text

_SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# weights in other formats, which are never read
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.ckpt", "*.tflite")


def model_folder(base: str | os.PathLike[str] | None, revision: str | None) -> Path:
    """Return the folder of a model. A model on the Hub is downloaded, without weights in other formats.

    Raises:
        ValueError: No model is named.
        FileNotFoundError: There is no such model.
    """
    if base is None:
        raise ValueError("The adapter does not name its base model. Pass `base=`.")
    if Path(base).is_dir():
        return Path(base)
    try:
        return Path(snapshot_download(str(base), revision=revision, ignore_patterns=[*OTHER_WEIGHTS, "original/*"]))
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"There is no folder {base}, nor can the Hub's {base} be loaded: {reason}") from error


def meta_model(source: Path) -> nn.Module:
    """Return the full-precision model in a folder, without weights (on the meta device).

    Raises:
        ValueError: Its weights are quantized.
    """
    config = AutoConfig.from_pretrained(source)
    if quantization := getattr(config, "quantization_config", None):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ValueError(
            f"The model in {source} is quantized ({method}), so its files do not hold its weights. Use the "
            "full-precision model that it was made from."
        )
    kinds = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or []]
    with torch.device("meta"):
        if kinds and isinstance(kinds[0], type) and getattr(kinds[0], "config_class", None) is type(config):
            model: nn.Module = kinds[0]._from_config(config)  # type: ignore[attr-defined]
        else:  # the code of the model is in its folder, or no architecture is recorded
            model = AutoModelForCausalLM.from_config(config)
    return model


def linear_modules(model: nn.Module) -> dict[str, bool]:
    """Return the linear modules of a model, and whether each stores its weight as `[in, out]`."""
    return {
        name: isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }


def model_files(source: Path) -> dict[str, list[str]]:
    """Return the names of the tensors in each file of weights. A single file takes precedence, as in transformers.

    Raises:
        ValueError: There are no safetensors files, or the index is damaged or names a file in another folder.
    """
    if (source / _SINGLE).exists():
        with opened(source / _SINGLE) as file:
            return {_SINGLE: list(file.keys())}
    if not (source / INDEX).exists():
        raise ValueError(f"{source} has neither {_SINGLE} nor {INDEX}. Save the model as safetensors first.")
    try:
        places = dict(json.loads(read_text(source / INDEX))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source / INDEX} is damaged: {error!r}.") from error
    files: dict[str, list[str]] = {}
    for key, name in places.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{source / INDEX} names {name!r}, which is not a file next to it.")
        files.setdefault(name, []).append(key)
    return files


def names_in_model(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """Return the name that each tensor of a file has in a model. Files keep the names of older transformers versions.

    Raises:
        ValueError: Two names belong to one module.
    """
    parts = {key: key.rpartition(".") for key in keys}
    names = current_names(model, {module for module, *_ in parts.values()})
    return {key: f"{names.get(module, module)}{dot}{name}" for key, (module, dot, name) in parts.items()}


class ModelTensors:
    """The tensors of a model folder, each read when it is asked for by its name in `model`.

    Raises:
        ValueError: As `model_files` and `names_in_model`.
    """

    def __init__(self, source: Path, model: nn.Module) -> None:
        self.source = source
        files = {key: file for file, keys in model_files(source).items() for key in keys}
        self._places = {name: (files[key], key) for key, name in names_in_model(model, files).items()}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def read(self, name: str, *, transposed: bool = False, device: str | torch.device = "cpu") -> torch.Tensor:
        """Return a tensor.

        Raises:
            ValueError: It is missing, or its file is damaged.
        """
        if name not in self._places:
            raise ValueError(f"{self.source} has no tensor {name}.")
        file_name, key = self._places[name]
        with opened(self.source / file_name, device=str(device)) as file:
            tensor: torch.Tensor = file.get_tensor(key)
        return tensor.mT if transposed else tensor


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[Any]:
    """Open a safetensors file.

    Raises:
        ValueError: The file is missing, damaged, or lacks a requested tensor.
    """
    try:
        with safe_open(path, framework="pt", **options) as file:
            yield file
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from error
