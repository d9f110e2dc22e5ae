"""A Griffe extension for docstrings of Hugging Face's style.

They write "name ([`Kind`] or `str`, *optional*): text". Griffe would show that type as raw Markdown, and
the fence of an indented example as code.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_TYPED = re.compile(r"^( +[\w*, ]+ )\(([^\n]+?)\):(?=\s)", flags=re.MULTILINE)
_EXAMPLE = re.compile(r"^Example:\n\n((?:(?: {4}.*)?(?:\n|\Z))+)", flags=re.MULTILINE)  # indented, a fence is no fence


def readable(docstring: str) -> str:
    """Return the docstring with plain types, and its example not indented."""

    def plain(match: re.Match[str]) -> str:
        kind = re.sub(r"\[(`[^`]+`)\]", r"\1", match[2])
        return f"{match[1]}({kind.replace('`', '').replace('*', '')}):"

    def example(match: re.Match[str]) -> str:
        return f"**Example:**\n\n{textwrap.dedent(match[1])}"

    return _EXAMPLE.sub(example, _TYPED.sub(plain, docstring))


class ReadableDocstrings(griffe.Extension):
    """Make the docstrings of the package readable on the site."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the docstring of an object before it is parsed."""
        if obj.docstring:
            obj.docstring.value = readable(obj.docstring.value)
