"""The files that a training writes next to the adapter: its record, its plots and a model card."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..reporting.cards import training_card
from ..reporting.plots import plot_curves, plot_deltas
from ..scoring.rewards import text_of
from ..tuner.deltas import adapter_deltas
from ..utils.files import write_whole
from ..utils.version import __version__


@dataclass
class Record:
    """
    The settings and results of a training.

    Attributes:
        name: Name of the expert.
        recipe: The options given in the file or on the command line.
        base_model: Name of the base model.
        trainable: Number of trainable parameters.
        accuracy_before, accuracy_after: Greedy accuracy on the test examples; `None` if there are none.
        measures: Values before and after the training on the test examples, by name: the `loss` of the reference
            answers per token (SFT), or the `preference`, the fraction of pairs whose better answer is more probable per
            token (DPO).
        continues: The adapter that the training started from, by folder or Hub id. `accuracy_before` is then its own.
        accuracy_by_category: Accuracy of a classification expert by category, after the training.
        test_size: Number of test examples.
        example: A test example, as question and reference answer.
        seconds: Wall time of the training.
        history: The trainer's `log_history`.
        best_step: The step of the kept model, if an evaluation chose it.
        machine: Hardware and package versions, see [`machine`].
    """

    name: str
    recipe: Mapping[str, Any]
    base_model: str
    trainable: int
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    accuracy_by_category: Mapping[str, float] | None = None
    measures: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    test_size: int = 0
    example: tuple[str, str] | None = None
    seconds: float = 0.0
    history: Sequence[Mapping[str, Any]] = ()
    best_step: int | None = None
    continues: str | None = None
    machine: Mapping[str, Any] = field(default_factory=lambda: machine())

    def to_dict(self) -> dict[str, Any]:
        """Return the record as a JSON-serialisable dictionary, with NaN and Inf in the history replaced by `None`."""
        return {
            "name": self.name,
            "recipe": dict(self.recipe),
            "base_model": self.base_model,
            **({"continues": self.continues} if self.continues else {}),
            "trainable": self.trainable,
            "test_questions": self.test_size,
            "accuracy_before": self.accuracy_before,
            "accuracy_after": self.accuracy_after,
            **({"accuracy_by_category": dict(self.accuracy_by_category)} if self.accuracy_by_category else {}),
            **({"measures": {name: list(values) for name, values in self.measures.items()}} if self.measures else {}),
            "best_step": self.best_step,
            "seconds": round(self.seconds, 1),
            "machine": dict(self.machine),
            "history": [{name: _finite(value) for name, value in entry.items()} for entry in self.history],
        }

    def summary(self) -> str:
        """Return the results on the test examples before and after the training, a line each."""
        found = {**self.measures}
        if self.accuracy_before is not None and self.accuracy_after is not None:
            found["greedy accuracy"] = self.accuracy_before, self.accuracy_after
        return "\n".join(
            f"{self.name}: {name} on {self.test_size} test questions {before:.3f} -> {after:.3f}"
            for name, (before, after) in found.items()
        )


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def machine() -> dict[str, Any]:
    """Return the number of cores, the platform, and the versions of the packages."""
    packages = {name: _version(name) for name in ("torch", "transformers", "peft", "trl")}
    return {"cores": os.cpu_count(), "platform": platform.machine(), **packages, "peft-svf": __version__}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None  # a package on PYTHONPATH has no metadata; the record must not fail for it


def write_report(model: Any, record: Record, folder: str | Path) -> None:
    """Write `training.json`, `README.md`, `curve.png` and, for SVF, `delta.png` next to a saved adapter.

    The plots are left out if matplotlib is not installed.
    """
    folder, values = Path(folder), record.to_dict()
    write_whole(folder / "training.json", json.dumps(values, indent=2, default=str) + "\n")
    images = []
    deltas = adapter_deltas(model)
    try:
        before = record.accuracy_before
        plot_curves(record.history, folder / "curve.png", title=record.name, accuracy_before=before)
        images.append("![reward and accuracy per step](curve.png)")
        if deltas:
            plot_deltas(deltas, folder / "delta.png", title=record.name)
            images.append("![δ by layer and module, and along the spectrum](delta.png)")
    except ImportError:
        pass
    card = training_card(values, str(folder), example=record.example, images=images, svf=bool(deltas))
    write_whole(folder / "README.md", card)


def example_of(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the question and the reference answer of an example, for a model card."""
    prompt = row["prompt"]
    if not isinstance(prompt, str):  # the last message may be the beginning of an answer
        prompt = next(message["content"] for message in reversed(prompt) if message["role"] != "assistant")
    names = ("answer", "completion", "solution", "chosen")
    answer = next((row[name] for name in names if row.get(name) is not None), "")
    return prompt, text_of(answer) if isinstance(answer, (str, list)) else str(answer)
