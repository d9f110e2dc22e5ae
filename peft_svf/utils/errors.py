"""Errors that more than one part of the package knows."""

from __future__ import annotations

from safetensors import SafetensorError

# Errors that a user can cause, such as a damaged file or a value of the wrong type in a recipe. All others are bugs,
# which need their traceback.
EXPECTED = (ValueError, TypeError, ImportError, OSError, SafetensorError)


class BaseCheckError(ValueError):
    """
    An adapter was made for another base model, and `base_check` is `"error"`.

    Args:
        reason (`str`): What is wrong and what to do.
        override (`str`): How to use the adapter anyway, in Python. The command line names its option instead.
    """

    def __init__(self, reason: str, override: str) -> None:
        super().__init__(reason, override)
        self.reason = reason

    def __str__(self) -> str:
        return " ".join(self.args)
