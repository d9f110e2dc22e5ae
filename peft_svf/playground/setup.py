"""What the page loads: a model, its experts, and how `auto` chooses among them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluation.dispatchers import make_dispatcher
from ..library import FILE as LIBRARY_FILE
from ..library import ExpertLibrary
from ..mixture.loading import load_experts
from ..mixture.mixture import AdaptiveMixture
from ..routing.dispatch import Dispatcher
from ..scoring.datasets import load_prompts

AUTO = "auto"  # the answer of the expert that a dispatcher chooses
CHOOSERS = ("prompt", "nearest", "classifier")
# The argument of `make_dispatcher` for a line NAME=TEXT about an expert.
_ABOUT = {"prompt": "descriptions", "nearest": "examples", "classifier": "labels"}


@dataclass(frozen=True)
class Setup:
    """
    The fields of the page, as a user fills them in.

    Attributes:
        model: Hub id or folder of the base model.
        experts: Lines with `NAME=PATH`, or a folder of experts.
        dispatch: How `auto` chooses an expert: `"prompt"`, `"nearest"` or `"classifier"`.
        about: Lines with `NAME=TEXT`: what an expert is for, a file of its example prompts, or its label, in the order
            of `dispatch`.
        classifier: Hub id or folder of the classification expert.
    """

    model: str = ""
    experts: str = ""
    dispatch: str = "prompt"
    about: str = ""
    classifier: str = ""

    def load(self, **options: Any) -> tuple[AdaptiveMixture, Dispatcher]:
        """
        Load the model with its experts.

        Args:
            options: More arguments of [`load_experts`].

        Raises:
            ValueError: A field is empty or malformed, the model cannot be loaded, or an expert does not fit it.
            OSError: A file of example prompts cannot be read.
        """
        if not self.model.strip():
            raise ValueError("There is no base model. Type its Hub id or its folder.")
        experts, about = experts_of(self.experts), _pairs(self.about, "NAME=TEXT")
        if self.dispatch == "classifier" and not self.classifier.strip():
            raise ValueError("A classifier must choose, and there is none. Type the folder of a classification expert.")
        described: dict[str, Any] = dict(about)
        if self.dispatch == "nearest":
            described = {name: load_prompts(path) for name, path in about.items()}
        classifier = self.classifier.strip() if self.dispatch == "classifier" else None
        model = self.model.strip()
        try:
            mixture = load_experts(model, experts, classifier=classifier, **options)
        except OSError as error:  # its message may be about the Hub only
            raise ValueError(f"{model!r} cannot be loaded: {error}") from error
        return mixture, make_dispatcher(self.dispatch, mixture, **{_ABOUT[self.dispatch]: described})


def experts_of(text: str) -> dict[str, str]:
    """
    Return name and place of each expert.

    Args:
        text (`str`): Lines with `NAME=PATH`, or with a folder that has experts in its subfolders.

    Raises:
        ValueError: There are none, a folder has none, a name occurs twice, or an expert is called `"auto"`.
    """
    found: dict[str, str] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        here = _pairs(line, "NAME=PATH") if "=" in line else library(line)
        if twice := [name for name in here if name in found]:
            raise ValueError(f"The expert {twice[0]!r} is given twice, as {found[twice[0]]!r} and {here[twice[0]]!r}.")
        found |= here
    if not found:
        raise ValueError("There are no experts. Type NAME=PATH for each, or a folder of experts.")
    if AUTO in found:
        raise ValueError(f"An expert cannot be called {AUTO!r} here. Load it by another name, as NAME=PATH.")
    return found


def library(folder: str) -> dict[str, str]:
    """
    Return the experts of a library, or the adapters in the subfolders of a folder, by the name of the subfolder.

    Raises:
        ValueError: There are none, or `library.json` is damaged.
    """
    if Path(folder, LIBRARY_FILE).is_file():
        return ExpertLibrary.from_pretrained(folder).paths()
    found = {path.parent.name: str(path.parent) for path in sorted(Path(folder).glob("*/adapter_config.json"))}
    if not found:
        raise ValueError(
            f"{folder!r} is no folder of experts: none of its subfolders has an adapter_config.json. "
            "For a single expert, type NAME=PATH."
        )
    return found


def _pairs(text: str, form: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, value = (part.strip() for part in line.partition("="))
        if not (name and value):
            raise ValueError(f"A line must be {form}, got {line!r}.")
        if name in found:
            raise ValueError(f"{name!r} is given twice, as {found[name]!r} and {value!r}.")
        found[name] = value
    return found
