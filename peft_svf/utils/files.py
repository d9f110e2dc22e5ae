"""Atomic writing and reading of text files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically: at any moment it holds either the old or the new content."""
    data = content.encode() if isinstance(content, str) else content
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(data)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the content of a UTF-8 text file, without the byte order mark that Windows writes at its beginning.

    Raises:
        ValueError: The file is not UTF-8.
        OSError: It cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}. Save it as UTF-8.") from error
