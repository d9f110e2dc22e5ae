"""Tokens to text while they arrive, up to a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "�"  # what a tokenizer returns for a part of a character


class TextStream:
    """
    The text of an answer, piece by piece.

    A piece is held back while it can be the beginning of a stop text, or while a character is incomplete.

    Args:
        tokenizer: The tokenizer.
        stop (`list[str]`): Texts at which the answer ends. They do not belong to it.

    Attributes:
        stopped: Whether a stop text was found.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        # The text of a token depends on those before it, so the last piece is decoded together with the new one.
        self._begin = self._end = 0
        self._held = ""

    def push(self, tokens: Sequence[int]) -> str:
        """Return the text that these tokens complete."""
        self._ids += tokens
        text = self._decoded()
        if text.endswith(_UNFINISHED):
            return ""
        self._begin, self._end = self._end, len(self._ids)
        return self._released(text)

    def flush(self) -> str:
        """Return what was held back, at the end of the answer."""
        return "" if self.stopped else self._released(self._decoded(), last=True)

    def _decoded(self) -> str:
        ids = self._ids[self._begin :]
        known, text = (self._text(part) for part in (ids[: self._end - self._begin], ids))
        return text[len(known) :]

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _released(self, text: str, last: bool = False) -> str:
        self._held += text
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        keep = 0 if last else max((_overlap(self._held, stop) for stop in self._stop), default=0)
        released, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return released


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text that is a beginning of a stop text."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
