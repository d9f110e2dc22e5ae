"""Experts on disk or on the Hub."""

from __future__ import annotations

import copy
import os
from typing import Any

from ..tuner.config import SVFConfig, SVFRuntimeConfig


def expert_config(
    name: str, path: str | os.PathLike[str], base_check: Any, runtime_config: SVFRuntimeConfig | None = None
) -> SVFConfig:
    """Read the config of an expert on disk or on the Hub.

    Raises:
        ValueError: It cannot be read or belongs to another method; the message names the expert.
    """
    try:
        config = SVFConfig.from_pretrained(path)
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"Expert {name!r} cannot be read from {str(path)!r}: {error}") from error
    if not isinstance(config, SVFConfig):
        raise ValueError(f"Expert {name!r} ({path}) is a {config.peft_type} adapter; only SVF adapters can be mixed.")
    config.runtime_config = (
        SVFRuntimeConfig(base_check=base_check) if runtime_config is None else copy.copy(runtime_config)
    )
    config.inference_mode = True
    return config
