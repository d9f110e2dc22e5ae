"""The comparison goes on where it was stopped, chooses learning rates by the sweep alone, and reports what there is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import compare


def record(accuracy: float, task: str) -> dict[str, Any]:
    return {
        "task": task,
        "accuracy_before": 0.2,
        "accuracy_after": accuracy,
        "trainable": 10,
        "cpu_seconds": 60,
        "elsewhere": {other: 0.1 for other in compare.TASKS if other != task},
        "perplexity": 20.0,
        "history": [{"step": 3, "eval_accuracy": accuracy}],
    }


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(compare, "STORED", tmp_path / "compare")
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    (tmp_path / "compare").mkdir()
    (tmp_path / "docs").mkdir()
    base = {"elsewhere": dict.fromkeys(compare.TASKS, 0.2), "perplexity": 19.0}
    (tmp_path / "compare" / "base.json").write_text(json.dumps(base))
    return tmp_path


def sweep(best: int) -> None:
    """Store the sweep of the first method, in which the rate of this index wins."""
    method = compare.METHODS[0]
    for i, rate in enumerate(method.rates):
        run = compare.Run(compare.SWEEP_TASK, method, rate, compare.SWEEP_SEED)
        run.path.write_text(json.dumps(record(0.9 if i == best else 0.5, compare.SWEEP_TASK)))


@pytest.mark.usefixtures("stored")
def test_the_table_waits_for_the_sweep() -> None:
    method = compare.METHODS[0]
    todo = compare.runs([method], compare.TASKS)
    assert [run.task for run in todo] == [compare.SWEEP_TASK] * len(method.rates)
    assert compare.chosen_rate(method) is None
    sweep(best=2)
    table = [run for run in compare.runs([method], compare.TASKS) if run.stored() is None]
    assert [(run.task, run.seed) for run in table] == [(task, seed) for seed in compare.SEEDS for task in compare.TASKS]
    assert {run.rate for run in table} == {method.rates[2]}
    assert compare.SWEEP_TASK not in compare.TASKS
    assert compare.SWEEP_SEED not in compare.SEEDS
    assert all(len(method.rates) >= 4 for method in compare.METHODS)


def test_the_page_holds_what_there_is(stored: Path) -> None:
    pytest.importorskip("matplotlib")
    sweep(best=0)
    method = compare.METHODS[0]
    for seed, accuracy in zip(compare.SEEDS[:2], (0.4, 0.6), strict=True):
        run = compare.Run(compare.TASKS[0], method, method.rates[0], seed)
        run.path.write_text(json.dumps(record(accuracy, compare.TASKS[0])))
    compare.report()
    page = (stored / "docs" / "comparison.md").read_text()
    assert "0.500 ± 0.100 (2)" in page
    assert "**The table is not complete.**" in page
    assert "0.300 ± 0.100 (2) | -0.100 ± 0.000 (2) | 20.000 ± 0.000 (2)" in page
    assert (stored / "docs" / "comparison.png").exists()
