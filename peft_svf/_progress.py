"""One progress bar for all long work, switched off by the same settings as the Hugging Face libraries' bars."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, TypeVar

from huggingface_hub.utils import tqdm as _hub_tqdm
from transformers.utils import logging as _transformers_logging

T = TypeVar("T")

__all__ = ["progress_bar", "progress_disabled"]


def progress_disabled() -> bool:
    """Whether bars are off: `HF_HUB_DISABLE_PROGRESS_BARS`, transformers' `disable_progress_bar()` or log level
    `ERROR` and above, or a rank that is not the first one of its machine."""
    return (
        not _transformers_logging.is_progress_bar_enabled()
        or _transformers_logging.get_verbosity() >= _transformers_logging.ERROR
        or os.environ.get("LOCAL_RANK", "0") != "0"
    )


def progress_bar(
    iterable: Iterable[T] | None = None, *, desc: str, total: int | None = None, delay: float = 1.0, **kwargs: Any
) -> Any:
    """A tqdm bar over `iterable` (or driven by hand with `total`), shown only if the work takes longer than `delay`
    seconds."""
    kwargs.setdefault("disable", progress_disabled() or None)
    if kwargs["disable"] is None:  # huggingface_hub decides
        kwargs.pop("disable")
    return _hub_tqdm(iterable, desc=desc, total=total, delay=delay, **kwargs)
