"""A content-addressed cache of singular bases on disk.

The key of an entry is a hash of the weight itself (bytes, shape, dtype). A renamed, copied or re-sharded checkpoint
hits, and any change of a weight misses. Entries are safetensors files, written under a temporary name and renamed. A
lock makes one of several processes compute a basis while the others wait and read it. A damaged entry is computed
again, and if the folder cannot be written the work goes on without it; both give a warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .basis import SingularBasis, singular_basis
from .lock import HOLDER, locked

ENVIRONMENT_VARIABLE = "PEFT_SVF_CACHE"
# part of the key, so that a new algorithm or file layout misses
FORMAT = "peft_svf.basis.v1"
HEX = "[0-9a-f]"


def default_cache_dir() -> Path:
    """Return `$PEFT_SVF_CACHE`, or `peft_svf` in the Hugging Face home."""
    return Path(os.environ.get(ENVIRONMENT_VARIABLE) or Path(HF_HOME) / "peft_svf").expanduser()


@dataclass(frozen=True)
class CacheEntry:
    """One decomposed weight on disk: `shape` is the weight's `[out, in]`, `size` is in bytes.

    `model` is the first model that the weight was decomposed for, where its name was known. Others may share it.
    """

    key: str
    path: Path
    shape: tuple[int, ...]
    dtype: str
    size: int
    model: str | None = None


class BasisCache:
    """Singular bases on disk, by the content of the weight.

    Args:
        cache_dir (`str` or `os.PathLike`, *optional*): Folder of the entries; default [`default_cache_dir`].
        model (`str`, *optional*): Name of the model whose weights are decomposed, to list the entries by.
    """

    def __init__(self, cache_dir: str | os.PathLike[str] | None = None, *, model: str | None = None) -> None:
        self.model = model
        self.directory = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
        self._writable = True
        self._giving_up = threading.Lock()

    def __repr__(self) -> str:
        return f"BasisCache({str(self.directory)!r})"

    def is_writable(self) -> bool:
        """Whether entries can be written. Creates the folder if necessary."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError:
            return False
        return os.access(self.directory, os.W_OK)

    def load_or_compute(self, weight: torch.Tensor, *, name: str = "weight") -> SingularBasis:
        """Return the full basis of `weight` (`[out, in]`), from disk if possible.

        Raises:
            ValueError: As [`singular_basis`].
        """
        key = weight_key(weight)
        if (hit := self._read(key, weight)) is not None:
            return hit
        with self._lock(key):
            # another process may have written it in the meantime
            if (hit := self._read(key, weight)) is not None:
                return hit
            basis = singular_basis(weight, name=name)
            self._write(key, weight, basis)
        return basis

    def entries(self) -> list[CacheEntry]:
        """Return the entries of the cache, without damaged files."""
        found = []
        for path in sorted(self.directory.glob(f"{HEX * 64}.safetensors")):
            # ValueError: the shape is not one
            with (
                contextlib.suppress(OSError, SafetensorError, KeyError, ValueError),
                safe_open(path, framework="pt") as file,
            ):
                about = file.metadata() or {}
                shape = tuple(int(n) for n in about["shape"].split("x"))
                size, model = path.stat().st_size, about.get("model")
                found.append(CacheEntry(path.stem, path, shape, about["dtype"], size, model))
        return found

    def clear(self) -> int:
        """Delete all entries, left-over temporary files and locks. Return the number of bytes freed."""
        freed = 0
        # match full names only, because the folder may also hold models
        locks = (f".locks/{HEX * 64}.lock", f".locks/{HEX * 64}{HOLDER}")
        for pattern in (f"{HEX * 64}.safetensors", f"{HEX * 16}-{HEX * 32}.tmp", *locks):
            for path in self.directory.glob(pattern):
                with contextlib.suppress(FileNotFoundError):
                    size = path.stat().st_size
                    path.unlink()
                    freed += size
        return freed

    def _path(self, key: str) -> Path:
        return self.directory / f"{key}.safetensors"

    def _read(self, key: str, weight: torch.Tensor) -> SingularBasis | None:
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                expected = (file.metadata() or {}).get("sha256")
                basis = SingularBasis(file.get_tensor("vectors"), file.get_tensor("spectrum"))
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            if path.exists():
                warnings.warn(f"Singular basis {path} cannot be read ({error}). It is computed again.", stacklevel=2)
            return None
        if expected != checksum(key, basis):
            warnings.warn(
                f"Singular basis {path} is damaged (its checksum differs). It is computed again.", stacklevel=2
            )
            return None
        return SingularBasis(basis.vectors.to(weight.device), basis.spectrum)

    def _write(self, key: str, weight: torch.Tensor, basis: SingularBasis) -> None:
        if not self._writable:
            return
        about = {
            "format": FORMAT,
            "shape": "x".join(map(str, weight.shape)),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "sha256": checksum(key, basis),
            **({"model": self.model} if self.model else {}),
        }
        tensors = {"vectors": basis.vectors.cpu(), "spectrum": basis.spectrum}
        temporary = self.directory / f"{key[:16]}-{uuid.uuid4().hex}.tmp"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode  # of the umask; safetensors makes its files readable by their owner only
            save_file(tensors, temporary, metadata=about)
            temporary.chmod(mode)
            os.replace(temporary, self._path(key))
        except (OSError, SafetensorError) as error:
            self._give_up_writing(error)
            with contextlib.suppress(OSError):
                temporary.unlink()

    @contextlib.contextmanager
    def _lock(self, key: str) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self._writable:
                try:
                    locks = self.directory / ".locks"
                    locks.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(locked(locks / f"{key}.lock"))
                except OSError as error:
                    self._give_up_writing(error)
            yield

    def _give_up_writing(self, error: Exception) -> None:
        # warn once: on a full disk or in a read-only folder every weight would fail
        with self._giving_up:
            first, self._writable = self._writable, False
        if first:
            warnings.warn(
                f"Singular bases cannot be written to {self.directory} ({error}), so they will be computed again. "
                f"Set {ENVIRONMENT_VARIABLE} to a writable folder.",
                stacklevel=2,
            )


def weight_key(weight: torch.Tensor) -> str:
    """Return the hash of a weight's values in row-major order, its shape and its dtype: 64 hex characters."""
    digest = hashlib.sha256(f"{FORMAT}|{tuple(weight.shape)}|{weight.dtype}|".encode())
    digest.update(_bytes(weight))
    return digest.hexdigest()


def list_cache(cache_dir: str | os.PathLike[str] | None = None) -> list[CacheEntry]:
    """Return the entries of a cache folder."""
    return BasisCache(cache_dir).entries()


def clear_cache(cache_dir: str | os.PathLike[str] | None = None) -> int:
    """Delete the entries of a cache folder. Return the number of bytes freed."""
    return BasisCache(cache_dir).clear()


def checksum(key: str, basis: SingularBasis) -> str:
    """Return the checksum of an entry and its key, so that a file under a wrong name is detected."""
    digest = hashlib.sha256(key.encode())
    for tensor in (basis.vectors, basis.spectrum):
        digest.update(f"|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    # as uint8, because numpy has no bfloat16
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
