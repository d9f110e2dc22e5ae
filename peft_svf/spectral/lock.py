"""A lock between processes that says whom it waits for, and does not wait forever."""

from __future__ import annotations

import contextlib
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

SAY_AFTER = 10.0  # seconds of waiting before a message, and between two looks at the holder
GIVE_UP_AFTER = 600.0  # seconds; longer than any decomposition of one weight
HOLDER = ".holder"  # suffix of the file that names the process which holds a lock


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`. Go on without it if its holder is dead or does not release it for 10 minutes.

    The operating system releases the lock of a dead process, but not if a fork of it lives on, and not on every network
    file system. What the lock protects must therefore be right without it, and only slower.

    Raises:
        OSError: The lock file cannot be written.
    """
    lock, holder = _acquired(path), path.with_suffix(HOLDER)
    try:
        yield
    finally:
        if lock is not None:
            with contextlib.suppress(OSError):
                holder.unlink()
            lock.release()


def _acquired(path: Path) -> FileLock | None:
    lock, holder, waited = FileLock(path), path.with_suffix(HOLDER), 0.0
    while True:
        try:
            lock.acquire(timeout=SAY_AFTER)
        except Timeout:
            waited += SAY_AFTER
        else:
            with contextlib.suppress(OSError):  # a full disk: the lock holds anyway
                holder.write_text(f"{os.getpid()} {socket.gethostname()}", encoding="utf-8")
            return lock
        pid, host = _read(holder)
        who = f"process {pid} on {host}" if pid else "another process"
        if waited >= GIVE_UP_AFTER or _is_dead(pid, host):
            warnings.warn(f"{who} has not released {path} for {waited:.0f} s. Going on without the lock.", stacklevel=4)
            return None
        if waited == SAY_AFTER:
            warnings.warn(f"Waiting for {who}, which holds {path}.", stacklevel=4)


def _read(holder: Path) -> tuple[int, str]:
    try:
        pid, host = holder.read_text(encoding="utf-8").split()
        return int(pid), host
    except (OSError, ValueError):  # not written yet
        return 0, ""


def _is_dead(pid: int, host: str) -> bool:
    if os.name != "posix" or not pid or host != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
