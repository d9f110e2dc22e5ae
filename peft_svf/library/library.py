"""`ExpertLibrary`: the experts of one base model, with what dispatch needs to know about them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..scoring.names import CLASSIFIER
from ..spectral.lock import locked
from ..tuner.config import SVFConfig, load_svf_config
from ..utils.files import write_whole
from .facts import recorded_examples, recorded_scores
from .format import (
    FILE,
    Content,
    LibraryDispatch,
    LibraryExpert,
    check_dispatch,
    check_expert_name,
    check_prompts,
    check_scores,
    read_library,
    written,
)
from .same_base import base_difference
from .sources import CONFIG, WEIGHTS, Source, downloaded, is_hub_id

# What is copied into a library and downloaded with one. Pickles are not.
_OF_AN_EXPERT = (CONFIG, WEIGHTS, "README.md", "training.json", "mixture.json", "curve.png", "delta.png", "search.png")


class ExpertLibrary(Mapping[str, LibraryExpert]):
    """
    The experts of one base model by name, and the dispatcher to use.

    A library is a folder, or a repository on the Hub, with a file `library.json`. Each expert is a folder in
    it, a repository on the Hub, or a linked folder. Adding an expert changes no file of the others, so their answers
    stay the same, bit for bit.

    A library goes where a mapping of experts goes: [`AdaptiveMixture.from_pretrained`] and [`load_experts`] load its
    experts, [`PromptDispatcher`] takes its descriptions, [`NearestDispatcher`] its examples, and [`SelfAdaptiveModel`]
    its dispatcher.

    Args:
        base_model (`str`, *optional*): Hub id or folder of the base model. Default: that of the first expert.
        base_revision (`str`, *optional*): Its revision on the Hub.

    Attributes:
        base_model: See above. The fingerprint of the model is in the experts, so it is not stored again.
        base_revision: See above.
        dispatch ([`LibraryDispatch`]): The dispatcher; change it by `set_dispatch`.

    Example:

        ```py
        >>> with ExpertLibrary.edit("my-library") as library:
        ...     library.add("math", "experts/math", description="sums and equations")
        >>> library = ExpertLibrary.from_pretrained("my-library")
        >>> mixture = load_experts(library.base_model, library)
        >>> adaptive = SelfAdaptiveModel(mixture.model, mixture.tokenizer, library)
        ```
    """

    def __init__(self, base_model: str | None = None, *, base_revision: str | None = None) -> None:
        self.base_model, self.base_revision = base_model, base_revision
        self.dispatch = LibraryDispatch()
        self._experts: dict[str, LibraryExpert] = {}
        self._replaced: set[Path] = set()  # folders of adapters in place of which others were added

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], *, revision: str | None = None) -> ExpertLibrary:
        """
        Load a library. The adapters are read when they are used.

        Args:
            name_or_path: Folder or Hub id.
            revision (`str`, *optional*): Revision on the Hub.

        Raises:
            ValueError: `library.json` is damaged, of a newer version, or a field is wrong.
            FileNotFoundError: There is no library.
        """
        folder, from_hub = Path(name_or_path), False
        if not folder.is_dir():
            if not is_hub_id(str(name_or_path)):
                raise FileNotFoundError(f"There is no folder {name_or_path}. Pass the folder or Hub id of a library.")
            folder, from_hub = (
                downloaded(str(name_or_path), revision, [f"*{name}" for name in (FILE, *_OF_AN_EXPERT)]),
                True,
            )
        content = read_library(folder, from_hub=from_hub)
        library = cls(content.base_model, base_revision=content.base_revision)
        library._experts, library.dispatch = content.experts, content.dispatch
        return library

    @classmethod
    @contextmanager
    def edit(cls, folder: str | os.PathLike[str], *, create: bool = True) -> Iterator[ExpertLibrary]:
        """
        Load the library of a folder, and save what is changed in the `with` block.

        A lock makes others wait that edit it at the same time. After an error nothing is saved.

        Args:
            folder: The folder.
            create (`bool`): Begin an empty library if there is none.

        Raises:
            ValueError, OSError: As `from_pretrained` and `save_pretrained`.
        """
        if not create and not Path(folder, FILE).is_file():
            raise FileNotFoundError(f"There is no library in {folder}. Make one with `peft-svf library add`.")
        Path(folder).mkdir(parents=True, exist_ok=True)
        with locked(Path(folder, ".library.lock")):
            library = cls.from_pretrained(folder) if Path(folder, FILE).exists() else cls()
            yield library
            library.save_pretrained(folder)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """
        Write the library to a folder. `library.json` is replaced at once, when all adapters are there.

        Adapters from other folders are copied to folders of the experts' names, unless they are linked. Adapters that
        are in the folder are not touched.

        Raises:
            ValueError: A folder for a copy exists and holds another adapter.
            OSError: The folder cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, expert in self._experts.items():
            self._experts[name] = replace(expert, source=self._kept(expert.source, folder / name))
        if self.dispatch.classifier is not None:
            self.dispatch = replace(self.dispatch, classifier=self._kept(self.dispatch.classifier, folder / CLASSIFIER))
        self._replaced = set()
        content = Content(self.base_model, self.base_revision, self._experts, self.dispatch)
        write_whole(folder / FILE, written(content, folder))

    # ------------------------------------------------------------------------------------------------ experts

    def __getitem__(self, name: str) -> LibraryExpert:
        return self._experts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._experts)

    def __len__(self) -> int:
        return len(self._experts)

    def __repr__(self) -> str:
        return f"ExpertLibrary({', '.join(self) or 'empty'} on {self.base_model}; dispatch: {self.dispatch.method})"

    @property
    def sources(self) -> dict[str, str]:
        """Folder or Hub id of each expert, with the revision as `id@revision`."""
        return {name: str(expert.source) for name, expert in self.items()}

    @property
    def descriptions(self) -> dict[str, str]:
        """Description of each expert, as [`PromptDispatcher`] takes them."""
        return {name: expert.description for name, expert in self.items()}

    @property
    def examples(self) -> dict[str, list[Any]]:
        """Example prompts of each expert, as [`NearestDispatcher`] takes them."""
        return {name: list(expert.examples) for name, expert in self.items()}

    def paths(self) -> dict[str, str]:
        """Return the folder of each expert. Adapters on the Hub are downloaded.

        Raises:
            ValueError: A folder or repository is missing.
        """
        return {name: str(self._folder(name, expert.source)) for name, expert in self.items()}

    def classifier_path(self) -> str | None:
        """Return the folder of the classification expert, `None` without one.

        Raises:
            ValueError: Its folder or repository is missing.
        """
        source = self.dispatch.classifier
        return None if source is None else str(self._folder(CLASSIFIER, source))

    def add(
        self,
        name: str,
        place: str | os.PathLike[str],
        *,
        revision: str | None = None,
        description: str | None = None,
        examples: Sequence[Any] | None = None,
        scores: Mapping[str, float] | None = None,
        link: bool = False,
        overwrite: bool = False,
    ) -> None:
        """
        Add an expert.

        Args:
            name (`str`): Its name.
            place: Folder or Hub id of the adapter.
            revision (`str`, *optional*): Revision on the Hub. The library records its present commit.
            description (`str`, *optional*): What the expert is for. Default: that of the expert it replaces.
            examples (`list`, *optional*): Prompts that it is for. Default: those of the expert it replaces, or the
                question in the model card.
            scores (`dict[str, float]`, *optional*): Results of its evaluation. Default: those in `training.json`.
            link (`bool`): Refer to the folder by its absolute path. Otherwise `save_pretrained` copies it.
            overwrite (`bool`): Replace an expert of this name.

        Raises:
            ValueError: The name is taken or not allowed, there is no whole adapter, or it was made for another base
                model than an expert of the library.
            FileNotFoundError: There is no such folder or repository.
        """
        check_expert_name(name)
        old = self.get(name)
        if old is not None and not overwrite:
            raise ValueError(f"The library has an expert {name!r} already ({old.source}). Replace it by `overwrite`.")
        source = Source.of(place, revision, linked=link).pinned()
        config = self._checked(name, source)
        others = ((other, self._config(other, expert.source)) for other, expert in self.items() if other != name)
        if difference := _difference(config, others):
            raise ValueError(f"{place} was made for {difference}")
        if examples is None:
            examples = (old.examples if old else ()) or recorded_examples(source.folder())
        scores = recorded_scores(source.folder()) if scores is None else scores
        check_prompts(examples, "`examples`")
        check_scores(scores, "`scores`")
        if self.base_model is None:
            self.base_model, self.base_revision = config.base_model_name_or_path, config.revision
        if description is None:
            description = old.description if old else ""
        if old is not None and old.source.path not in (None, source.path):
            self._replaced.add(old.source.path)
        self._experts[name] = LibraryExpert(source, description, list(examples), dict(scores))

    def include(self, name: str, place: str | os.PathLike[str]) -> None:
        """
        Add an expert for the present use, without a look at its files. Loading checks them.

        Args:
            name (`str`): Its name.
            place: Folder or Hub id of the adapter.

        Raises:
            ValueError: The name is taken or not allowed.
            FileNotFoundError: There is no such folder.
        """
        check_expert_name(name)
        if name in self:
            raise ValueError(f"The library has an expert {name!r} already ({self[name].source}). Use another name.")
        self._experts[name] = LibraryExpert(Source.of(place, linked=Path(place).is_dir()))

    def remove(self, name: str) -> None:
        """
        Remove an expert. Its files stay.

        Raises:
            ValueError: There is no expert of this name.
        """
        if name not in self:
            raise ValueError(f"The library has no expert {name!r}; it has {', '.join(self) or 'none'}.")
        del self._experts[name]
        labels = {each: label for each, label in self.dispatch.settings.get("labels", {}).items() if each != name}
        settings = {key: value for key, value in self.dispatch.settings.items() if key != "labels"}
        self.dispatch = replace(self.dispatch, settings=settings | ({"labels": labels} if labels else {}))

    def set_dispatch(self, method: str, *, classifier: str | os.PathLike[str] | None = None, **settings: Any) -> None:
        """
        Set the dispatcher.

        Args:
            method (`str`): `"prompt"`, `"classifier"` or `"nearest"`.
            classifier (*optional*): Folder or Hub id of the adapter that classifies, for `"classifier"`.
            settings: Arguments of [`PromptDispatcher`] or [`NearestDispatcher`], such as `threshold`.

        Raises:
            ValueError: The method, its adapter or a setting is wrong.
            FileNotFoundError: There is no such adapter.
        """
        source = None if classifier is None else Source.of(classifier).pinned()
        dispatch = LibraryDispatch(method, source, settings)
        check_dispatch(dispatch, list(self))
        if source is not None:
            self._checked(CLASSIFIER, source)
            old = self.dispatch.classifier
            if old is not None and old.path not in (None, source.path):
                self._replaced.add(old.path)
        self.dispatch = dispatch

    def check(self) -> dict[str, str]:
        """
        Return what is wrong with each adapter, by name; empty if all are whole and made for one base model.

        The base model is not needed: what the adapters record of its weights is compared. The classification expert
        counts as an expert `"svf-classifier"`.
        """
        problems: dict[str, str] = {}
        configs: dict[str, SVFConfig] = {}
        sources = {name: expert.source for name, expert in self.items()}
        if self.dispatch.classifier is not None:
            sources[CLASSIFIER] = self.dispatch.classifier
        for name, source in sources.items():
            try:
                configs[name] = self._checked(name, source)
            except (ValueError, TypeError, OSError) as error:
                problems[name] = str(error)
        for i, (name, config) in enumerate(configs.items()):
            if difference := _difference(config, list(configs.items())[:i]):
                problems[name] = f"It was made for {difference}"
        if self.dispatch.method == "nearest":
            for name, expert in self.items():
                if not expert.examples:
                    problems.setdefault(name, "It has no example prompts. Dispatch to the nearest examples needs them.")
        return problems

    def _kept(self, source: Source, target: Path) -> Source:
        """Return where an adapter is after the library was saved. It is copied to `target` if it is elsewhere.

        Raises:
            ValueError: Another adapter is there.
        """
        if source.path is None or source.linked or source.path.is_relative_to(target.parent.resolve()):
            return source
        if target.exists() and (target.resolve() not in self._replaced or target.resolve() in self._used()):
            raise ValueError(f"{target} exists already. Remove it, or add {source.path} under another name.")
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
            new = Path(scratch, "new")
            new.mkdir()
            for name in _OF_AN_EXPERT:
                if (source.path / name).is_file():
                    shutil.copyfile(source.path / name, new / name)
            if target.exists():
                os.replace(target, Path(scratch, "old"))
            os.replace(new, target)
        return Source(path=target.resolve())

    def _used(self) -> set[Path | None]:
        """Return the folders of all adapters. One can have been added again under another name."""
        every = {expert.source.path for expert in self._experts.values()}
        return every if self.dispatch.classifier is None else {*every, self.dispatch.classifier.path}

    @staticmethod
    def _folder(name: str, source: Source) -> Path:
        try:
            return source.folder()
        except FileNotFoundError as error:
            raise ValueError(f"Expert {name!r} of the library is missing: {error}") from error

    def _config(self, name: str, source: Source) -> SVFConfig:
        try:
            return load_svf_config(self._folder(name, source))
        except (TypeError, OSError) as error:
            raise ValueError(f"Expert {name!r} cannot be read from {source}: {error}") from error

    def _checked(self, name: str, source: Source) -> SVFConfig:
        """Return the config of an adapter that is whole.

        Raises:
            ValueError: It is not.
        """
        config, folder = self._config(name, source), self._folder(name, source)
        if config.checkpoint is None or not (folder / WEIGHTS).is_file():
            raise ValueError(f"{source} holds no {WEIGHTS}. Save or download the adapter again.")
        config.check_checkpoint(folder, config.checkpoint)
        return config


def _difference(config: SVFConfig, others: Iterable[tuple[str, SVFConfig]]) -> str | None:
    """Return how the base model of an expert differs from that of others, `None` if it does not.

    All others were made for one base model, so one comparison of weights is enough.
    """
    for name, other in others:
        if difference := base_difference(config, other):
            return f"another base model than {name!r}: {difference}."
        if config.expected_fingerprint.keys() & other.expected_fingerprint.keys():
            return None
    return None
