"""What a training run leaves behind beside the adapter: its record, its plots, and a model card."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from ..reporting.cards import loading_code
from ..reporting.plots import plot_curves, plot_deltas
from ..scoring.rewards import text_of
from ..tuner.deltas import adapter_deltas
from ..utils.files import write_whole


@dataclass
class Record:
    """
    The numbers of a training run.

    Attributes:
        name: What the expert is called.
        recipe: The options that were given, by file or command line.
        base_model: Name of the base model.
        trainable: How many numbers were trained.
        accuracy_before, accuracy_after: Greedy, on the test examples; `None` if there are none.
        accuracy_by_category: Of a classification expert, after the training.
        test_size: How many test examples.
        example: One of them, as question and reference answer.
        seconds: Wall time of the training.
        history: The trainer's `log_history`.
        best_step: The step of the model that was kept, if it was chosen by an evaluation.
    """

    name: str
    recipe: Mapping[str, Any]
    base_model: str
    trainable: int
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    accuracy_by_category: Mapping[str, float] | None = None
    test_size: int = 0
    example: tuple[str, str] | None = None
    seconds: float = 0.0
    history: Sequence[Mapping[str, Any]] = ()
    best_step: int | None = None
    machine: Mapping[str, Any] = field(default_factory=lambda: machine())

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON, which knows no NaN: `None` stands for it in the history."""
        return {
            "name": self.name,
            "recipe": dict(self.recipe),
            "base_model": self.base_model,
            "trainable": self.trainable,
            "test_questions": self.test_size,
            "accuracy_before": self.accuracy_before,
            "accuracy_after": self.accuracy_after,
            **({"accuracy_by_category": dict(self.accuracy_by_category)} if self.accuracy_by_category else {}),
            "best_step": self.best_step,
            "seconds": round(self.seconds, 1),
            "machine": dict(self.machine),
            "history": [{name: _finite(value) for name, value in entry.items()} for entry in self.history],
        }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def machine() -> dict[str, Any]:
    """What a run ran on."""
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "trl", "peft-svf")}
    return {"cores": os.cpu_count(), "platform": platform.machine(), **packages}


def write_report(model: Any, record: Record, folder: str | Path) -> None:
    """Write `training.json`, `curve.png`, for SVF `delta.png`, and `README.md` beside a saved adapter. Without
    matplotlib there are no plots."""
    folder = Path(folder)
    write_whole(folder / "training.json", json.dumps(record.to_dict(), indent=2, default=str) + "\n")
    images = []
    deltas = adapter_deltas(model)
    try:
        plot_curves(record.history, folder / "curve.png", title=record.name)
        images.append("![reward and accuracy per step](curve.png)")
        if deltas:
            plot_deltas(deltas, folder / "delta.png", title=record.name)
            images.append("![δ by layer and module, and sorted by size](delta.png)")
    except ImportError:
        pass
    write_whole(folder / "README.md", _card(record, folder, images, svf=bool(deltas)))


def _card(record: Record, folder: Path, images: Sequence[str], *, svf: bool) -> str:
    header = {
        "library_name": "peft",
        "base_model": record.base_model,
        "tags": ["peft", *(["svf", "transformer-squared"] if svf else []), record.recipe.get("objective", "grpo")],
    }
    parts = ["---", yaml.safe_dump(header, sort_keys=False).strip(), "---", f"# {record.name}", ""]
    kind = "An SVF expert vector" if svf else f"A {str(record.recipe.get('peft_type', 'PEFT')).upper()} adapter"
    parts += [f"{kind} for `{record.base_model}`, trained by {record.recipe.get('objective', 'grpo').upper()}.", ""]
    if record.example:
        question, answer = record.example
        parts += [*(f"> {line}" for line in question.splitlines()), ">", f"> **{answer}**", ""]
    if record.accuracy_after is not None:
        before = f"{record.accuracy_before:.3f} before, " if record.accuracy_before is not None else ""
        after = f"**{record.accuracy_after:.3f}** after"
        parts += [f"Greedy accuracy on {record.test_size} held-out questions: {before}{after}."]
    if record.accuracy_by_category:
        parts += ["By category: " + ", ".join(f"{k} {v:.3f}" for k, v in record.accuracy_by_category.items()) + "."]
    parts += [
        f"{record.trainable:,} trained numbers, {record.seconds:.0f} s"
        + (f", the model of step {record.best_step}" if record.best_step is not None else "")
        + ". Everything that was logged is in `training.json`.",
        "",
        *images,
        "",
        "```python",
        *_loading(record.base_model, str(folder), svf),
        "```",
        "",
        "Recipe (`peft-svf train --config recipe.yaml`):",
        "",
        "```yaml",
        yaml.safe_dump(dict(record.recipe), sort_keys=False, allow_unicode=True).strip(),
        "```",
        "",
    ]
    return "\n".join(parts)


def _loading(base_model: str, adapter: str, svf: bool) -> list[str]:
    lines = loading_code(base_model, adapter).splitlines()
    return lines if svf else [line for line in lines if "peft_svf" not in line]


def example_of(row: Mapping[str, Any]) -> tuple[str, str]:
    """Question and reference answer of a row, for a model card."""
    prompt = row["prompt"]
    if not isinstance(prompt, str):  # the last may be the beginning of an answer
        prompt = next(message["content"] for message in reversed(prompt) if message["role"] != "assistant")
    answer = next((row[name] for name in ("answer", "completion", "solution") if name in row), "")
    return prompt, text_of(answer) if isinstance(answer, (str, list)) else str(answer)
