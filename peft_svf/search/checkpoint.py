"""The scores of a search on disk: a search that goes on asks the same again, and finds the answers there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..utils.files import write_whole
from ..utils.processes import by_main_process
from .answers import Answers
from .evaluator import Evaluator


class Checkpoint:
    """
    A JSON file with all scores of a search.

    The optimiser itself is not saved. Made anew from the same seed it proposes the same candidates, and those whose
    scores are in the file cost nothing. That holds for any optimiser, and nothing has to be unpickled.

    Args:
        path: The file.
        resume (`bool`): Whether to go on from it if it is there.
        identity (`dict`): What the search is about; another one cannot go on with its scores.
    """

    def __init__(self, path: str | os.PathLike[str], resume: bool, identity: dict[str, Any]) -> None:
        self.path, self.resume, self.identity = Path(path), resume, json.loads(json.dumps(identity))
        self.answers: Answers | None = None  # that the gradient of a reward was made of

    def load(self, evaluator: Evaluator) -> None:
        """Tell an evaluator what is known.

        Raises:
            ValueError: The file is of another search, or no checkpoint, or there is one and `resume` is False.
        """
        content = by_main_process(self._read)  # the file may be there in one process only
        if content is not None:
            try:
                evaluator.load_state_dict(content["scores"])
                evaluator.usage.seconds = float(content["seconds"])
                if content.get("answers"):
                    self.answers = Answers.from_state_dict(content["answers"], len(evaluator.objective.examples))
                    evaluator.parsed(self.answers.decoded)
                    known = evaluator.model.get_input_embeddings().num_embeddings
                    if not all(0 <= token < known for its in self.answers.rewards for ids in its for token in ids):
                        raise ValueError(f"some answers have tokens beyond the {known} of the model")
            except (ValueError, KeyError, TypeError) as error:
                raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> ValueError:
        return ValueError(f"{self.path} is no checkpoint of a search: {error!r}. Pass another path, or delete it.")

    def _read(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        if self.path.is_dir():
            raise ValueError(f"{self.path} is a folder; `checkpoint` must be the path of a JSON file.")
        if not self.resume:
            raise ValueError(
                f"{self.path} exists. Pass `resume=True` (`--resume`) to go on with that search, or another path."
            )
        try:
            content = json.loads(self.path.read_text())
            identity, _, _ = content["identity"], content["scores"], content["seconds"]
            if not isinstance(identity, dict):
                raise TypeError("its identity is no mapping")
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(error) from error
        for name, value in self.identity.items():
            if identity.get(name) != value:
                raise ValueError(
                    f"{self.path} is of another search: {name} was {identity.get(name)!r}, and is now {value!r}. "
                    "Pass another path, or delete it."
                )
        return {name: content.get(name) for name in ("scores", "seconds", "answers")}

    def save(self, evaluator: Evaluator) -> None:
        """Write all that an evaluator knows."""
        by_main_process(lambda: self._write(evaluator))

    def _write(self, evaluator: Evaluator) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "identity": self.identity,
            "seconds": evaluator.usage.seconds,
            "scores": evaluator.state_dict(),
            "answers": None if self.answers is None else self.answers.state_dict(),
        }
        write_whole(self.path, json.dumps(content) + "\n")
