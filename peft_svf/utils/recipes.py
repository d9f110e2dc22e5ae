"""Reading a recipe: a YAML file with the options of a training. Without TRL, so that mistakes are found at once."""

from __future__ import annotations

import os
from typing import Any

from .extras import needs
from .files import read_text


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """
    Return the options in a recipe.

    Raises:
        ValueError: It is not a YAML mapping.
        ImportError: PyYAML is not installed.
        OSError: It cannot be read.
    """
    try:
        import yaml
    except ImportError as error:
        raise needs("train", "A recipe", "pyyaml") from error
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"The recipe {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"The recipe {path} must be a YAML mapping of options, got {type(content).__name__}.")
    return content
