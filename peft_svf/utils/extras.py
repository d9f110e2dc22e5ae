"""The command that installs an extra of this package, for error messages.

It depends on how the package was installed, which pip records (PEP 610): from a clone, from a URL, or from an index.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlparse

_NAME = "peft-svf"


def install_command(extra: str) -> str:
    """Return the pip command that adds an extra to this installation: `pip install -e "/home/me/peft-svf[cli]"`."""
    root = Path(__file__).parents[2]
    if (root / "pyproject.toml").exists():  # this code runs from a clone, whatever else is installed
        return f'pip install -e "{root}[{extra}]"'
    try:
        record = distribution(_NAME).read_text("direct_url.json")
    except PackageNotFoundError:
        record = None
    if record is None:
        return f'pip install "{_NAME}[{extra}]"'
    about = json.loads(record)
    url = about["url"]
    if "vcs_info" in about:
        url = f"{about['vcs_info']['vcs']}+{url}"
    elif "dir_info" in about:  # a folder, which pip also takes without `NAME @`
        return f'pip install "{unquote(urlparse(url).path)}[{extra}]"'
    return f'pip install "{_NAME}[{extra}] @ {url}"'


def needs(extra: str, what: str, package: str) -> ImportError:
    """Return the error of something that needs a package of an extra."""
    return ImportError(f"{what} needs {package}, which is not installed. Run `{install_command(extra)}`.")
