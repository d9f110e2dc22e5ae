"""A Griffe extension for docstrings of Hugging Face's style.

They write "name ([`Kind`] or `str`, *optional*): text". Griffe would show that type as raw Markdown.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_TYPED = re.compile(r"^( +[\w*, ]+ )\(([^\n]+?)\):(?=\s)", flags=re.MULTILINE)


def plain_types(docstring: str) -> str:
    """Return the docstring with the types of its arguments as plain text."""

    def plain(match: re.Match[str]) -> str:
        kind = re.sub(r"\[(`[^`]+`)\]", r"\1", match[2])
        return f"{match[1]}({kind.replace('`', '').replace('*', '')}):"

    return _TYPED.sub(plain, docstring)


class PlainTypes(griffe.Extension):
    """Show the types of arguments as plain text."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the docstring of an object before it is parsed."""
        if obj.docstring:
            obj.docstring.value = plain_types(obj.docstring.value)
