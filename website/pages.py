"""The pages that are written when the site is built: the Python API, the commands, and the notebooks.

They come from the package itself, so no page can say what the code does not. Nothing here needs MkDocs.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "examples" / "notebooks"
WIDTH = 80  # columns of the help texts


def public_names() -> dict[str, list[str]]:
    """Return the names that `peft_svf` exports, by room; `utils` is left out, which exports the version only."""
    rooms: dict[str, list[str]] = {}
    for line in (ROOT / "peft_svf" / "__init__.pyi").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"from \.(\w+)[\w.]* import (\w+) as \2$", line):
            rooms.setdefault(match[1], []).append(match[2])
    rooms.pop("utils", None)
    return rooms


def api_page(room: str, names: list[str]) -> str:
    """Return the page of a room: what mkdocstrings makes of each of its public names."""
    about = (ROOT / "peft_svf" / room / "__init__.py").read_text(encoding="utf-8").split('"""')[1].strip()
    entries = "\n\n".join(f"::: peft_svf.{name}" for name in names)
    return f"# `peft_svf.{room}`\n\n{about}\n\nImport these names from `peft_svf`.\n\n{entries}\n"


def help_texts() -> Iterator[tuple[str, str]]:
    """Yield each command of `peft-svf` and what its `--help` prints."""
    os.environ |= {"COLUMNS": str(WIDTH), "TERMINAL_WIDTH": str(WIDTH), "NO_COLOR": "1"}  # read when typer is imported
    import typer
    from typer.testing import CliRunner

    from peft_svf.cli.app import app

    def walk(command: Any, words: list[str]) -> Iterator[list[str]]:
        yield words
        for name, below in getattr(command, "commands", {}).items():
            yield from walk(below, [*words, name])

    for words in walk(typer.main.get_command(app), []):
        result = CliRunner().invoke(app, [*words, "--help"], prog_name="peft-svf", terminal_width=WIDTH)
        if result.exit_code:
            raise RuntimeError(f"`peft-svf {' '.join(words)} --help` failed: {result.output or result.exception!r}")
        yield " ".join(["peft-svf", *words]), result.output.strip()


def commands_page() -> str:
    """Return the page of all commands."""
    parts = ["# All commands", "This is what `peft-svf COMMAND --help` prints."]
    parts += [f"## `{command}`\n\n```text\n{text}\n```" for command, text in help_texts()]
    return "\n\n".join(parts) + "\n"


def _text(value: str | list[str]) -> str:
    return value if isinstance(value, str) else "".join(value)


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """Return a notebook with its stored outputs as Markdown, and its pictures by file name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = _text(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{len(pictures)}.png"
                pictures[name] = base64.b64decode(_text(data["image/png"]))
                parts.append(f"![output of the cell above]({name})")
            elif text := _text(output.get("text") or data.get("text/plain") or ""):
                parts.append(f"``` {{.text .output}}\n{text.rstrip()}\n```")
    parts.append(f"*This page is the notebook `examples/notebooks/{path.name}` with its stored outputs.*")
    return "\n\n".join(parts) + "\n", pictures
