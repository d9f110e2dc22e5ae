"""The file `library.json`: its fields, read with checks and written.

A library may come from others, so nothing in the file is trusted: every field has a type, unknown fields are refused,
and every error names the field.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..scoring.examples import are_messages
from ..scoring.names import BASE, CLASSIFIER
from ..tuner.names import check_adapter_name
from ..utils.files import read_text
from .sources import Source, is_hub_id, is_outside

FILE = "library.json"
VERSION = 1
# The settings of each dispatcher that a library may hold, with their types.
_SHARED = {"threshold": float, "max_prompt_tokens": int, "batch_size": int}
SETTINGS: dict[str, dict[str, type]] = {
    "prompt": {**_SHARED, "labels": dict, "other": bool, "calibrate": bool},
    "classifier": {**_SHARED, "labels": dict, "other": bool, "calibrate": bool},
    "nearest": {**_SHARED, "margin": float, "temperature": float, "layer": int},
}
_NAMES = {str: "text", float: "a finite number", int: "a whole number", bool: "true or false", dict: "an object"}


@dataclass(frozen=True)
class LibraryExpert:
    """
    What a library knows about an expert.

    Attributes:
        source ([`Source`]): Its folder or repository.
        description (`str`): What it is for, in a few words.
        examples (`list`): Prompts that it is for, text or messages.
        scores (`dict[str, float]`): Results of its evaluation, by name.
    """

    source: Source
    description: str = ""
    examples: Sequence[Any] = ()
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LibraryDispatch:
    """
    How the prompts of a library are dispatched.

    Attributes:
        method (`str`): `"prompt"`, `"classifier"` or `"nearest"`.
        classifier ([`Source`], *optional*): The adapter that classifies.
        settings (`dict`): Arguments of the dispatcher, such as `threshold`.
    """

    method: str = "prompt"
    classifier: Source | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Content:
    """The content of a `library.json`."""

    base_model: str | None = None
    base_revision: str | None = None
    experts: dict[str, LibraryExpert] = field(default_factory=dict)
    dispatch: LibraryDispatch = field(default_factory=LibraryDispatch)


def check_expert_name(name: object) -> None:
    """Check the name of an expert: an adapter name that has no other meaning.

    Raises:
        ValueError: The name cannot be one of these.
    """
    check_adapter_name(name, "An expert")
    taken = {BASE: "the base model", CLASSIFIER: "the adapter that classifies", "auto": "a choice for each prompt"}
    if name in taken:
        raise ValueError(f"An expert cannot be called {name!r}, the name of {taken[str(name)]}. Choose another name.")


def check_dispatch(dispatch: LibraryDispatch, names: Sequence[str], where: str = "") -> None:
    """Check the method, that it has its classification expert, and the names and types of its settings.

    Args:
        dispatch: The dispatch.
        names: The experts.
        where: The place in a file, for messages.

    Raises:
        ValueError: One of them is wrong.
    """
    settings = SETTINGS.get(dispatch.method)
    if settings is None:
        raise ValueError(f"{where}`method` must be {', '.join(SETTINGS)}, got {dispatch.method!r}.")
    if (dispatch.method == "classifier") != (dispatch.classifier is not None):
        raise ValueError(f"{where}`classifier` is needed for the method 'classifier', and for no other.")
    for name, value in dispatch.settings.items():
        if name not in settings:
            raise ValueError(
                f"{where}`settings` has {name!r}, which the method {dispatch.method!r} does not take. "
                f"It takes {', '.join(settings)}."
            )
        if not _is(value, settings[name]):
            raise ValueError(f"{where}`settings.{name}` must be {_NAMES[settings[name]]}, got {value!r}.")
    for name, label in dispatch.settings.get("labels", {}).items():
        if name not in names or not isinstance(label, str):
            raise ValueError(
                f"{where}`settings.labels` must give experts a text, got {name!r}: {label!r}. "
                f"The experts are {', '.join(names)}."
            )


def check_prompts(prompts: Any, where: str) -> None:
    """Check example prompts.

    Raises:
        ValueError: They are no list of texts or messages.
    """
    if not isinstance(prompts, (list, tuple)):
        raise ValueError(f"{where} must be a list of prompts, got {prompts!r}.")
    for i, prompt in enumerate(prompts):
        if not prompt or not (isinstance(prompt, str) or are_messages(prompt)):
            raise ValueError(f"{where}[{i}] must be text, or messages with a 'role', got {prompt!r}.")


def check_scores(scores: Any, where: str) -> None:
    """Check the scores of an expert.

    Raises:
        ValueError: They do not give names finite numbers.
    """
    if not isinstance(scores, Mapping):
        raise ValueError(f"{where} must be an object of numbers, got {scores!r}.")
    for name, value in scores.items():
        if not _is(value, float):
            raise ValueError(f"{where}.{name} must be a finite number, got {value!r}.")


def read_library(folder: Path, *, from_hub: bool) -> Content:
    """Read the `library.json` in a folder.

    Args:
        folder: The folder of the library.
        from_hub: Whether others wrote it. It may then name no path outside of the folder.

    Raises:
        ValueError: The file is damaged, of a newer version, or a field is wrong.
        FileNotFoundError: There is no such file.
    """
    file = folder / FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no {FILE}. Make a library with `peft-svf library add`.")
    try:
        content = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise ValueError(f"{file} is damaged: {error}.") from error
    whole = _Object(content, f"{file}: ", "")
    version = whole.take("format_version", int)
    if version > VERSION:
        raise ValueError(
            f"{file} has format_version {version}, and this version of peft-svf reads up to {VERSION}. Update peft-svf."
        )
    if version < 1:
        raise ValueError(f"{file}: `format_version` must be a positive number, got {version}.")
    place = _Place(folder, from_hub)
    base, revision = whole.take("base_model", str, None), whole.take("base_revision", str, None)
    if from_hub and base is not None and is_outside(base):
        base = revision = None  # a folder of another machine; the experts' fingerprints still name the model
    experts = {}
    for name, value in whole.take("experts", dict).items():
        where = f"experts.{name}"
        try:
            check_expert_name(name)
        except ValueError as error:
            raise ValueError(f"{file}: `experts` has a wrong name. {error}") from error
        entry = _Object(value, f"{file}: ", where)
        expert = LibraryExpert(
            place.source(entry),
            entry.take("description", str, ""),
            entry.take("examples", list, []),
            entry.take("scores", dict, {}),
        )
        check_prompts(expert.examples, f"{file}: `{where}.examples`")
        check_scores(expert.scores, f"{file}: `{where}.scores`")
        entry.end()
        experts[name] = expert
    entry = _Object(whole.take("dispatch", dict, {}), f"{file}: ", "dispatch")
    classifier = entry.take("classifier", dict, None)
    if classifier is not None:
        its = _Object(classifier, f"{file}: ", "dispatch.classifier")
        classifier = place.source(its)
        its.end()
    dispatch = LibraryDispatch(entry.take("method", str, "prompt"), classifier, entry.take("settings", dict, {}))
    entry.end()
    whole.end()
    check_dispatch(dispatch, list(experts), f"{file}: dispatch: ")
    return Content(base, revision, experts, dispatch)


def written(content: Content, folder: Path) -> str:
    """Return the text of a `library.json` in this folder."""
    dispatch = content.dispatch
    about: dict[str, Any] = {"format_version": VERSION, "base_model": content.base_model}
    if content.base_revision is not None:
        about["base_revision"] = content.base_revision
    about["experts"] = {
        name: {
            **expert.source.to_dict(folder),
            "description": expert.description,
            "examples": list(expert.examples),
            "scores": dict(expert.scores),
        }
        for name, expert in content.experts.items()
    }
    about["dispatch"] = {"method": dispatch.method, "settings": dict(dispatch.settings)}
    if dispatch.classifier is not None:
        about["dispatch"]["classifier"] = dispatch.classifier.to_dict(folder)
    return json.dumps(about, indent=1, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class _Place:
    """Reads where an adapter is, as seen from the folder of a library."""

    folder: Path
    from_hub: bool

    def source(self, entry: _Object) -> Source:
        path, hub_id = entry.take("path", str, None), entry.take("hub_id", str, None)
        revision = entry.take("revision", str, None)
        if (path is None) == (hub_id is None):
            raise entry.error("path", "or `hub_id` must be given, and not both")
        if hub_id is not None:
            if not is_hub_id(hub_id):
                raise entry.error("hub_id", f"must be a Hub id, such as 'me/math', got {hub_id!r}")
            return Source(hub_id=hub_id, revision=revision)
        if revision is not None:
            raise entry.error("revision", "belongs to a `hub_id`, not to a `path`")
        assert path is not None
        if Path(path).is_absolute() and not self.from_hub:
            return Source(path=Path(path), linked=True)
        root = self.folder.resolve()
        inside = (root / path).resolve()  # a link may lead out of the folder
        if not path or "\\" in path or is_outside(path) or not inside.is_relative_to(root):
            raise entry.error("path", f"must be a folder in the folder of the library, got {path!r}")
        return Source(path=inside)


class _Object:
    """An object of the file; fields are taken one by one, and none may be left."""

    def __init__(self, value: Any, file: str, where: str) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{file}{f'`{where}`' if where else 'the content'} must be an object, got {value!r}.")
        self._left, self._file, self._where = dict(value), file, where

    def error(self, name: str, text: str) -> ValueError:
        return ValueError(f"{self._file}`{f'{self._where}.' if self._where else ''}{name}` {text}.")

    def take(self, name: str, kind: type, *default: Any) -> Any:
        """Return a field of this type and remove it. `null` counts as missing."""
        value = self._left.pop(name, None)
        if value is None and default:
            return default[0]
        if value is None:
            raise self.error(name, f"is missing; expected {_NAMES.get(kind, 'a list')}")
        if not _is(value, kind):
            raise self.error(name, f"must be {_NAMES.get(kind, 'a list')}, got {value!r}")
        return value

    def end(self) -> None:
        if self._left:
            raise self.error(next(iter(self._left)), "is no field of this version of the file. Remove it")


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))
