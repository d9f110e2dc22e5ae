"""The dtype in which a base model is loaded by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig

_WHERE = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "trust_remote_code")
_OTHERWISE_DECIDED = ("config", "quantization_config", "gguf_file")


def loading_dtype(model_name_or_path: str | os.PathLike[str], dtype: Any = "auto", **kwargs: Any) -> Any:
    """
    Return the dtype to load a model in: fp32 for files in 16 bit on a CPU, otherwise that of the files.

    In 16 bit, results on a CPU are less accurate, and many CPUs compute several times slower. Quantized models keep
    their own dtype.

    Args:
        model_name_or_path (`str`): Hub id or folder of the model.
        dtype (`str` or `torch.dtype`): A dtype that was asked for. It is returned.
        kwargs: The other arguments of `AutoModelForCausalLM.from_pretrained`.

    Raises:
        OSError: The model has no config.
    """
    placed = kwargs.get("device_map")
    places = placed.values() if isinstance(placed, Mapping) else [placed]
    anywhere = placed in (None, "auto")
    on_cpu = not torch.accelerator.is_available() if anywhere else all(str(place) == "cpu" for place in places)
    if dtype != "auto" or not on_cpu or any(kwargs.get(name) is not None for name in _OTHERWISE_DECIDED):
        return dtype
    config = AutoConfig.from_pretrained(
        model_name_or_path, **{name: value for name, value in kwargs.items() if name in _WHERE}
    )
    if getattr(config, "quantization_config", None) is not None:
        return dtype
    return torch.float32 if config.dtype in (torch.float16, torch.bfloat16) else dtype
