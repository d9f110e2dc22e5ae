"""What the folder of a trained expert says about it."""

from __future__ import annotations

import json
from pathlib import Path

from ..reporting.cards import question_of_card
from ..utils.files import read_text

_CARD, _RECORD = "README.md", "training.json"


def recorded_examples(folder: Path) -> list[str]:
    """Return the example question of the model card, if there is one."""
    question = question_of_card(folder / _CARD) if (folder / _CARD).is_file() else None
    return [] if question is None else [question]


def recorded_scores(folder: Path) -> dict[str, float]:
    """Return the results before and after the training, from `training.json`.

    Raises:
        ValueError: The file is damaged.
    """
    file = folder / _RECORD
    if not file.is_file():
        return {}
    try:
        record = json.loads(read_text(file))
        measures = {"accuracy": (record["accuracy_before"], record["accuracy_after"]), **record.get("measures", {})}
        every = {name: value for each, (a, b) in measures.items() for name, value in ((each, b), (f"{each}_before", a))}
        return {name: float(value) for name, value in every.items() if value is not None}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is not the record of a training: {error!r}. Remove it, or pass the scores."
        ) from error
