"""The number of threads that torch uses in one thread of Python.

`torch.set_num_threads` also changes the number of all threads that use torch for the first time later. Setting it back
afterwards is too late for those that began in between, so the libraries below torch are asked instead.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch


def limit_this_thread(count: int) -> None:
    """Let torch use `count` threads in the calling thread, and nowhere else. Nothing happens without OpenMP."""
    torch.get_num_threads()  # sets torch's own number at its first call in a thread, so it must be called before
    for set_number in _functions():
        set_number(count)


def can_limit_threads() -> bool:
    """Whether `limit_this_thread` has an effect: torch is built with OpenMP, and its library is found."""
    return bool(_functions())


@cache
def _functions() -> tuple[Any, ...]:
    """Return the functions of OpenMP and MKL that set the number of threads of the calling thread."""
    folder = Path(torch.__file__).parent / "lib"
    path = next((path for name in ("libtorch_cpu.so", "libtorch_cpu.dylib") if (path := folder / name).exists()), None)
    if path is None:
        return ()
    library = ctypes.CDLL(str(path))
    if not hasattr(library, "omp_set_num_threads"):
        return ()
    names = ("omp_set_num_threads", "MKL_Set_Num_Threads_Local")  # in lower case it is the one of Fortran
    return tuple(getattr(library, name) for name in names if hasattr(library, name))
