"""Folders that a command writes: nothing that exists is replaced without `--overwrite`."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ..utils.files import read_text

ADAPTER, MODEL, PACK, EVALUATION = "an adapter", "a model", "a basis pack", "an evaluation"
LIBRARY = "a library of experts"
# The files by which libraries recognize what is in a folder.
_MARKS = {
    ADAPTER: "adapter_config.json",
    MODEL: "config.json",
    PACK: "basis.safetensors.index.json",
    EVALUATION: "scores.json",
    LIBRARY: "library.json",
}

OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output folder.")]


def check_output(folder: Path, kind: str, overwrite: bool, *, resume: bool | None = None) -> None:
    """
    Check that a result can be written to a folder, before any long work.

    Args:
        folder: The output folder, which may not exist yet.
        kind: What will be written.
        overwrite: Whether to replace a result of the same kind.
        resume (*optional*): Whether to continue a result of the same kind. `None` if the command cannot.

    Raises:
        ValueError: The folder holds such a result without `overwrite`, or something of another kind.
        OSError: The folder is a file, or cannot be written.
    """
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise NotADirectoryError(f"--output_dir {folder}: {place} is a file. Pass a folder.")
    if not os.access(place, os.W_OK):
        raise PermissionError(f"--output_dir {folder}: no permission to write to {place}. Pass another folder.")
    held = [name for name, mark in _MARKS.items() if (folder / mark).exists()]
    if kind in held and not (overwrite or resume):
        about = _about(folder) if kind == ADAPTER else kind
        ways = "--overwrite to replace it" if resume is None else "--resume to continue it, --overwrite to replace it"
        raise ValueError(f"{folder} exists and holds {about}. Pass {ways}, or another --output_dir.")
    if others := [name for name in held if name not in (kind, EVALUATION)]:
        raise ValueError(f"{folder} holds {others[0]}, which is not replaced by {kind}. Pass another --output_dir.")


def _about(folder: Path) -> str:
    try:
        return f"an adapter of type {json.loads(read_text(folder / _MARKS[ADAPTER]))['peft_type']}"
    except (ValueError, KeyError, TypeError):  # a damaged config
        return ADAPTER


@contextmanager
def emptied(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Yield the folder to write a model to. With `overwrite`, the new model replaces the old one when it is complete;
    other files in the folder stay."""
    if not (overwrite and folder.exists()):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.absolute().parent) as scratch:
        new = Path(scratch) / "model"
        yield new
        for pattern in ("*.safetensors", "*.safetensors.index.json"):
            for old in folder.glob(pattern):
                old.unlink()
        for path in sorted(new.iterdir(), key=lambda path: path.name == "config.json"):  # last: it makes a model
            if path.is_dir():
                shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
            else:
                os.replace(path, folder / path.name)
