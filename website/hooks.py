"""MkDocs hooks: add the generated pages, and link names in docstrings."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

# MkDocs loads this file by its path
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import pages  # noqa: E402


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the API, the commands and the notebooks, and the style sheet."""
    made: dict[str, str | bytes] = {"reference/commands.md": pages.commands_page()}
    made["site.css"] = Path(__file__).with_name("site.css").read_text(encoding="utf-8")
    for room, names in pages.public_names().items():
        made[f"reference/api/{room}.md"] = pages.api_page(room, names)
    for path in sorted(pages.NOTEBOOKS.glob("*.ipynb")):
        text, pictures = pages.notebook_page(path)
        made[f"notebooks/{path.stem}.md"] = text
        made |= {f"notebooks/{name}": content for name, content in pictures.items()}
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_content(html: str, page: Any, **kwargs: Any) -> str:
    """Link [`Name`], as docstrings of Hugging Face libraries write it; without a link where the name is not public."""
    if not page.file.src_uri.startswith("reference/api/"):
        return html
    public = {name for names in pages.public_names().values() for name in names}

    def link(match: re.Match[str]) -> str:
        name, code = match[1], f"<code>{match[1]}</code>"
        known = name.split(".")[0] in public
        return f'<autoref identifier="peft_svf.{name}" optional>{code}</autoref>' if known else code

    return re.sub(r"\[<code>([\w.]+)</code>\]", link, html)
