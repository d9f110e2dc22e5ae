"""The files of a model, to be read one tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# weights in other formats, which are never read
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.ckpt", "*.tflite")


def model_folder(base: str | os.PathLike[str] | None, revision: str | None) -> Path:
    """The folder of a model; of one on the Hub, all but weights in other formats is downloaded.

    Raises:
        ValueError: No model is named.
    """
    if base is None:
        raise ValueError("Which base model? The adapter does not say; pass it.")
    if Path(base).is_dir():
        return Path(base)
    return Path(snapshot_download(str(base), revision=revision, ignore_patterns=[*OTHER_WEIGHTS, "original/*"]))


def full_precision_config(source: Path) -> Any:
    """The config of the model in a folder.

    Raises:
        ValueError: Its weights are quantized.
    """
    config = AutoConfig.from_pretrained(source)
    if quantization := getattr(config, "quantization_config", None):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ValueError(
            f"The model in {source} is quantized ({method}): the numbers in its files are not its weights. Use the "
            "full-precision model that it was made from."
        )
    return config


def linear_modules(source: Path) -> dict[str, bool]:
    """The linear modules of the model in a folder, and whether each stores its weight as `[in, out]`."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(full_precision_config(source))
    return {
        name: isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }


def model_files(source: Path) -> dict[str, list[str]]:
    """The names of the tensors in each file of weights; of a single file if there is one, as transformers reads it.

    Raises:
        ValueError: There are no safetensors files, or the index is damaged or names one elsewhere.
    """
    if (source / _SINGLE).exists():
        with opened(source / _SINGLE) as file:
            return {_SINGLE: list(file.keys())}
    if not (source / _INDEX).exists():
        raise ValueError(f"{source} has neither {_SINGLE} nor an index of several such files.")
    try:
        places = dict(json.loads((source / _INDEX).read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source / _INDEX} is damaged: {error!r}.") from error
    files: dict[str, list[str]] = {}
    for key, name in places.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{source / _INDEX} names {name!r}, which is no file beside it.")
        files.setdefault(name, []).append(key)
    return files


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[Any]:
    """A safetensors file.

    Raises:
        ValueError: It is not there, damaged, or lacks a tensor that is asked for.
    """
    try:
        with safe_open(path, framework="pt", **options) as file:
            yield file
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from error
