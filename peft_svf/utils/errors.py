"""Errors that more than one part of the package knows."""

from __future__ import annotations


class BaseCheckError(ValueError):
    """
    An adapter was made for another base model, and `base_check` is `"error"`.

    Args:
        reason (`str`): What is wrong and what to do.
        override (`str`): How to use the adapter anyway, in Python. The command line names its option instead.
    """

    def __init__(self, reason: str, override: str) -> None:
        super().__init__(f"{reason} {override}")
        self.reason = reason
