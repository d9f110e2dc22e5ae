"""The files of a model, to be read one tensor at a time."""

from __future__ import annotations

import json
import os
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import safe_open

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def model_folder(base: str | os.PathLike[str] | None, revision: str | None) -> Path:
    """The folder of a model; of one on the Hub, the weights and what describes them are downloaded.

    Raises:
        ValueError: No model is named.
    """
    if base is None:
        raise ValueError("Which base model? The adapter does not say; pass it.")
    if Path(base).is_dir():
        return Path(base)
    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    return Path(snapshot_download(str(base), revision=revision, allow_patterns=wanted))


def model_files(source: Path) -> dict[str, list[str]]:
    """The names of the tensors in each file of weights.

    Raises:
        ValueError: There are no safetensors files, or the index names one elsewhere.
    """
    if (source / _INDEX).exists():
        files: dict[str, list[str]] = {}
        for key, file in json.loads((source / _INDEX).read_text())["weight_map"].items():
            if Path(file).name != file:
                raise ValueError(f"{source / _INDEX} names {file!r}, which is no file beside it.")
            files.setdefault(file, []).append(key)
        return files
    if not (source / _SINGLE).exists():
        raise ValueError(f"{source} has neither {_SINGLE} nor an index of several such files.")
    with safe_open(source / _SINGLE, framework="pt") as opened:
        return {_SINGLE: list(opened.keys())}
