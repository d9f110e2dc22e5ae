"""The scores of a search on disk. A resumed search asks for the same scores again and finds them there."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..utils.files import read_text, write_whole
from ..utils.processes import by_main_process
from .answers import Answers
from .config import as_json
from .evaluator import Evaluator


class Checkpoint:
    """
    A JSON file with all scores of a search.

    The optimizer is not saved. From the same seed it proposes the same candidates again, and candidates with stored
    scores cost nothing. So any optimizer can be resumed, and nothing is unpickled.

    Args:
        path: The file.
        resume (`bool`): Whether to continue from the file if it exists.
        identity (`dict`): What decides the scores. A search with another identity cannot use them.
    """

    def __init__(self, path: str | os.PathLike[str], resume: bool, identity: dict[str, Any]) -> None:
        self.path, self.resume, self.identity = Path(path), resume, as_json(identity)
        self.answers: Answers | None = None
        self._content: dict[str, Any] | None = None

    def open(self, evaluator: Evaluator, decided: dict[str, Any]) -> None:
        """Read the file, if there is one, and give the scores of its answers to an evaluator of the rewards.

        Args:
            evaluator ([`Evaluator`]): The evaluator.
            decided (`dict`): What was decided since the checkpoint was made. It belongs to the identity.

        Raises:
            ValueError: The file is no checkpoint, belongs to another search, or exists without `resume`.
            OSError: The file cannot be written.
        """
        self.identity |= as_json(decided)
        by_main_process(self._check_writable)  # before hours of work
        self._content = by_main_process(self._read)  # the file may be on the disk of one process only
        if self._content is not None and self._content["answers"]:
            vocabulary = evaluator.model.get_input_embeddings().num_embeddings
            with self._naming_the_file():
                self.answers = Answers.from_state_dict(
                    self._content["answers"], len(evaluator.objective.examples), vocabulary
                )
                evaluator.load_state_dict(self.answers.decoded)

    def load(self, evaluator: Evaluator) -> None:
        """Give the stored scores to the evaluator of the search.

        Raises:
            ValueError: The scores are damaged.
        """
        if self._content is not None:
            with self._naming_the_file():
                evaluator.load_state_dict(self._content["scores"])
                evaluator.usage.seconds += float(self._content["seconds"])

    def save(self, evaluator: Evaluator) -> None:
        """Write everything that the evaluator knows."""
        by_main_process(lambda: self._write(evaluator))

    def _check_writable(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path.parent):
                pass
        except OSError as error:
            raise OSError(f"The checkpoint {self.path} cannot be written: {error}. Pass another path.") from error

    def _read(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        if self.path.is_dir():
            raise ValueError(f"{self.path} is a folder. `checkpoint` must be the path of a JSON file.")
        if not self.resume:
            raise ValueError(
                f"{self.path} exists. Pass `resume=True` (`--resume`) to continue that search, or another path."
            )
        with self._naming_the_file():
            content = json.loads(read_text(self.path))
            identity, _, _ = {**content["identity"]}, content["scores"], content["seconds"]
        for name, value in self.identity.items():
            if identity.get(name) != value:
                raise ValueError(
                    f"{self.path} belongs to another search: {name} was {identity.get(name)!r} and is now {value!r}. "
                    "Pass another path, or delete the file."
                )
        return {name: content.get(name) for name in ("scores", "seconds", "answers")}

    def _write(self, evaluator: Evaluator) -> None:
        content = {
            "identity": self.identity,
            "seconds": evaluator.usage.seconds,
            "scores": evaluator.state_dict(),
            "answers": None if self.answers is None else self.answers.state_dict(),
        }
        write_whole(self.path, json.dumps(content) + "\n")

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path} is no checkpoint of a search ({error!r}). Pass another path, or delete the file."
            ) from error
