"""The file of an evaluation: scores and choices, so that it can be resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..search.evaluator import Evaluator
from ..search.identity import digest_of_rows
from ..utils.files import read_text, write_whole
from ..utils.processes import by_main_process


class ScoreFile:
    """
    Scores and choices in a JSON file. Only the main process reads and writes it.

    Args:
        path (path, *optional*): The file; nothing is stored if `None`.
        resume (`bool`): Continue with the scores of a file that exists.
        identity (`dict`): What an evaluation must have in common with the file.
        evaluators (`dict[str, Evaluator]`): Per task, the evaluator that gets and has the scores.

    Raises:
        ValueError: The file exists without `resume`, is invalid, or belongs to another evaluation.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        resume: bool,
        identity: Mapping[str, Any],
        evaluators: Mapping[str, Evaluator],
    ) -> None:
        self.path, self.evaluators = None if path is None else Path(path), evaluators
        self.identity = json.loads(json.dumps(identity, default=str))
        self._choices: dict[str, dict[str, list[str]]] = {}
        content = by_main_process(lambda: self._read(resume))
        if content is not None:
            self._choices = content["choices"]
            for name, evaluator in evaluators.items():
                evaluator.load_state_dict(content["scores"].get(name, []))

    def choices(self, strategy: str, task: str, dispatcher: Any, prompts: list[Any]) -> list[str]:
        """Return the choice for each question of a task, from the file or the dispatcher."""
        known = self._choices.setdefault(f"{strategy}: {_description(dispatcher)}", {})
        if task not in known:
            known[task] = list(dispatcher(prompts).choices)
        return known[task]

    def save(self) -> None:
        """Write the file."""
        by_main_process(self._write)

    def _read(self, resume: bool) -> dict[str, Any] | None:
        if self.path is None or not self.path.exists():
            return None
        if not resume:
            raise ValueError(f"{self.path} exists. Pass `resume=True` to continue that evaluation, or another path.")
        try:
            content = json.loads(read_text(self.path))
            known, scores, choices = content["identity"], content["scores"], content["choices"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is not the file of an evaluation: {error!r}. Pass another path.") from error
        for name, value in self.identity.items():
            if known.get(name) != value:
                raise ValueError(f"{self.path} belongs to an evaluation with other {name}. Pass another path.")
        return {"scores": scores, "choices": choices}

    def _write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scores = {name: evaluator.state_dict() for name, evaluator in self.evaluators.items()}
        content = {"identity": self.identity, "choices": self._choices, "scores": scores}
        write_whole(self.path, json.dumps(content) + "\n")


def _description(dispatcher: Any) -> str:
    """The class and settings of a dispatcher, as far as they are plain values and arrays."""
    plain = (str, int, float, bool, type(None), list, dict, tuple, np.ndarray)
    settings = {name: value for name, value in sorted(vars(dispatcher).items()) if isinstance(value, plain)}
    settings = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in settings.items()}
    return f"{type(dispatcher).__name__} {digest_of_rows(settings)}"
