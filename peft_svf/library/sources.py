"""Where an adapter of a library is: a folder, or a repository on the Hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import snapshot_download

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Source:
    """
    A folder with an adapter, or a repository on the Hub.

    Attributes:
        path (`Path`, *optional*): The folder, absolute.
        hub_id (`str`, *optional*): The repository.
        revision (`str`, *optional*): Its branch, tag or commit.
        linked (`bool`): Whether a library refers to the folder by its absolute path, instead of holding a copy.
    """

    path: Path | None = None
    hub_id: str | None = None
    revision: str | None = None
    linked: bool = False

    @classmethod
    def of(cls, place: str | os.PathLike[str], revision: str | None = None, *, linked: bool = False) -> Source:
        """Return the source of an existing folder or a Hub id.

        Raises:
            ValueError: A folder with a revision, or a Hub id that is linked.
            FileNotFoundError: It is neither an existing folder nor a Hub id.
        """
        if Path(place).is_dir():
            if revision is not None:
                raise ValueError(f"{place} is a folder, which has no revision {revision!r}. Leave the revision out.")
            return cls(path=Path(place).resolve(), linked=linked)
        if not is_hub_id(str(place)):
            raise FileNotFoundError(f"There is no folder {place}. Pass the folder of an adapter, or a Hub id.")
        if linked:
            raise ValueError(f"{place} is a Hub id. Only a folder can be linked.")
        return cls(hub_id=str(place), revision=revision)

    def folder(self) -> Path:
        """Return the folder with the adapter's files. Those on the Hub are downloaded once; no pickles are.

        Raises:
            FileNotFoundError: There is no such folder or repository.
        """
        if self.path is not None:
            if not self.path.is_dir():
                raise FileNotFoundError(f"There is no folder {self.path}.")
            return self.path
        return downloaded(str(self.hub_id), self.revision, [CONFIG, WEIGHTS, "README.md", "training.json"])

    def pinned(self) -> Source:
        """Return the source at its present commit, so that a later push changes no answers."""
        # huggingface_hub keeps the files of each commit in a folder of its name
        return self if self.hub_id is None else replace(self, revision=self.folder().name)

    def __str__(self) -> str:
        return str(self.path or self.hub_id) + (f"@{self.revision}" if self.revision else "")

    def to_dict(self, library: Path) -> dict[str, Any]:
        """Return the source as the fields of an entry in the library of this folder."""
        if self.hub_id is not None:
            return {"hub_id": self.hub_id, **({"revision": self.revision} if self.revision else {})}
        assert self.path is not None
        inside = self.path.is_relative_to(library.resolve())
        return {"path": self.path.relative_to(library.resolve()).as_posix() if inside else str(self.path)}


def is_hub_id(text: str) -> bool:
    """Whether a text has the form of a repository's name."""
    return _HUB_ID.fullmatch(text) is not None and ".." not in text


def is_outside(path: str) -> bool:
    """Whether a path is absolute or leaves its folder, on any operating system."""
    kinds = (PurePosixPath(path), PureWindowsPath(path))
    return path.startswith("~") or any(kind.anchor or ".." in kind.parts for kind in kinds)


def downloaded(hub_id: str, revision: str | None, patterns: list[str]) -> Path:
    """Return the folder with these files of a repository.

    Raises:
        FileNotFoundError: The repository cannot be downloaded.
    """
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # ValueError: no access to the network
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"There is no folder {hub_id}, nor can the Hub's {hub_id} be downloaded: {reason}"
        ) from error
