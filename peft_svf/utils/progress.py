"""The progress bar of all long operations, with the same settings as those of the Hugging Face libraries."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from huggingface_hub.utils import are_progress_bars_disabled
from huggingface_hub.utils import tqdm as _hub_tqdm
from transformers.utils import logging as _transformers_logging

T = TypeVar("T")

__all__ = ["progress_bar", "progress_disabled", "progress_note"]


def progress_disabled() -> bool:
    """Whether progress bars are disabled.

    They are disabled by transformers' `disable_progress_bar()`, by its log level `ERROR` and above, and on all ranks of
    a machine but the first. huggingface_hub's tqdm also respects `HF_HUB_DISABLE_PROGRESS_BARS`.
    """
    return (
        not _transformers_logging.is_progress_bar_enabled()
        or _transformers_logging.get_verbosity() >= _transformers_logging.ERROR
        or os.environ.get("LOCAL_RANK", "0") != "0"
    )


def progress_bar(
    iterable: Iterable[T] | None = None, *, desc: str, total: int | None = None, delay: float = 1.0, **kwargs: Any
) -> Any:
    """Return a tqdm bar over `iterable`, or one to update by hand with `total`.

    It is shown only if the work takes longer than `delay` seconds.
    """
    return _hub_tqdm(iterable, desc=desc, total=total, delay=delay, disable=progress_disabled(), **kwargs)


def progress_note(text: str) -> None:
    """Print a line above the progress bar, on standard error, unless bars are off."""
    if not (progress_disabled() or are_progress_bars_disabled()):
        _hub_tqdm.write(text, file=sys.stderr)
