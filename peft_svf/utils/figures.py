"""Figures of the optional matplotlib."""

from __future__ import annotations

from typing import Any

from .extras import needs


def figure(width: float, height: float) -> Any:
    """Return a figure of this size in inches, without pyplot, which would choose a backend for the whole process.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise needs("plot", "A plot", "matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")
