"""Errors of the command line: one line that says what is wrong, and the way there only on request."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from rich.console import Console

# what a user can cause; anything else is a mistake of ours, and its traceback is wanted
EXPECTED = (ValueError, TypeError, ImportError, OSError)

_debug = False


def show_tracebacks(wanted: bool) -> None:
    """For `--debug`."""
    global _debug
    _debug = wanted


def fail(error: Exception) -> NoReturn:
    """Say what a user did wrong, without the way it took through our code, and exit with 1."""
    if _debug:
        raise error
    Console(stderr=True).print(f"[bold red]Error:[/] {type(error).__name__}: ", end="")
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(str(error))
    sys.exit(1)


@contextmanager
def in_a_line() -> Iterator[None]:
    """What is wrong within, in one line."""
    try:
        yield
    except EXPECTED as error:
        fail(error)
