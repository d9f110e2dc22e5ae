"""Transformer² (https://huggingface.co/papers/2501.06252) for PEFT. Importing this package registers SVF with PEFT.

All other names are imported on first use, so `import peft_svf` takes little longer than `import peft`.
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path
from typing import Any

from .utils.version import __version__  # noqa: F401

# The stub is what type checkers and editors read. It is also the only list of our names.
_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_ROOM_OF = {name.name: node.module for node in _STUB.body if isinstance(node, ast.ImportFrom) for name in node.names}

__all__ = sorted(_ROOM_OF)


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_ROOM_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_command_line() -> bool:
    """Whether this process runs `peft-svf` or `python -m peft_svf`. Those import PEFT when a command begins its work,
    so that help is fast."""
    words = getattr(sys, "orig_argv", [])
    module = words[words.index("-m") + 1 :][:1] if "-m" in words else []
    return Path(sys.argv[0]).stem == "peft-svf" or module == [__name__]


if not _is_command_line():
    from . import tuner  # noqa: F401  # registers SVF
