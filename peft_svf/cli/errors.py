"""Errors and warnings of the command line: one line each, with a traceback on request."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from typing import Any, NoReturn

from rich.console import Console

from ..utils.errors import EXPECTED as EXPECTED
from ..utils.errors import BaseCheckError

_debug = False


def show_tracebacks(wanted: bool) -> None:
    """Set `--debug`."""
    global _debug
    _debug = wanted


def fail(error: Exception, *, has_base_check: bool = True) -> NoReturn:
    """Print an error in one line and exit with status 1; with `--debug`, raise it.

    `has_base_check` is whether the command has the option `--base_check`.
    """
    if _debug:
        raise error
    Console(stderr=True).print(f"[bold red]Error:[/] {type(error).__name__}: ", end="")
    text = str(error)
    if isinstance(error, BaseCheckError):
        text = f"{error.reason} To use it anyway, pass --base_check warn." if has_base_check else error.reason
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(text)
    sys.exit(1)


@contextmanager
def in_a_line(kinds: tuple[type[Exception], ...] = EXPECTED, *, has_base_check: bool = True) -> Iterator[None]:
    """Print an error of these kinds within the context in one line; see [`fail`]."""
    try:
        yield
    except kinds as error:
        fail(error, has_base_check=has_base_check)


def quiet_third_parties() -> None:
    """Ignore deprecation warnings of other libraries, on which a user of the command line cannot act. `python -W` and
    `PYTHONWARNINGS` take precedence."""
    if sys.warnoptions:
        return
    for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
        warnings.filterwarnings(
            "ignore", category=category, module=r"(accelerate|datasets|peft|torch|transformers|trl)\b"
        )
    # These name an option of `train`, which a user can change.
    warnings.filterwarnings("default", category=FutureWarning, module=r"transformers\.training_args")


def prints_to_stderr(as_json: bool) -> AbstractContextManager[Any]:
    """Send what others print to standard error if standard output is for JSON: reward functions may print."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()


@contextmanager
def warnings_in_a_line() -> Iterator[None]:
    """Print each `UserWarning` within the context in one line, without its place in the code."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            print(f"Warning: {warning.message}", file=sys.stderr)
