"""The comparison goes on where it was stopped, chooses learning rates by the sweep alone, and reports what there is."""

from __future__ import annotations

import argparse
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
        "settings": compare.SETTINGS,
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
    (tmp_path / "docs" / "results").mkdir(parents=True)
    base = {kind: dict.fromkeys(compare.TASKS, 0.2) for kind in ("accuracy", "elsewhere")} | {"perplexity": 19.0}
    (tmp_path / "compare" / "base.json").write_text(json.dumps(base))
    return tmp_path


def sweep(*best: int) -> None:
    """Store the sweep of the first method, in which the rates of these indices win."""
    method = compare.METHODS[0]
    for i, rate in enumerate(method.rates):
        run = compare.Run(compare.SWEEP_TASK, method, rate, compare.SWEEP_SEED)
        run.path.write_text(json.dumps(record(0.9 - 0.01 * i if i in best else 0.5, compare.SWEEP_TASK)))


@pytest.mark.usefixtures("stored")
def test_the_table_waits_for_the_sweep() -> None:
    method = compare.METHODS[0]
    todo = compare.runs([method], compare.TASKS)
    assert [run.task for run in todo] == [compare.SWEEP_TASK] * len(method.rates)
    assert compare.chosen_rate(method) is None
    sweep(2)
    table = [run for run in compare.runs([method], compare.TASKS) if run.stored() is None]
    assert [(run.task, run.seed) for run in table] == [(task, seed) for seed in compare.SEEDS for task in compare.TASKS]
    assert {run.rate for run in table} == {method.rates[2]}
    assert compare.SWEEP_TASK not in compare.TASKS
    assert compare.SWEEP_SEED not in compare.SEEDS
    assert all(len(method.rates) >= 4 for method in compare.METHODS)


@pytest.mark.usefixtures("stored")
def test_rates_that_tie_are_told_apart_on_another_task() -> None:
    method = compare.METHODS[0]
    sweep(1, 2)
    assert compare.chosen_rate(method) is None
    ties = [run for run in compare.runs([method], compare.TASKS) if run.stored() is None]
    assert [(run.task, run.rate, run.seed) for run in ties] == [
        (compare.TIE_TASK, rate, compare.TIE_SEED) for rate in method.rates[1:3]
    ]
    for run, accuracy in zip(ties, (0.3, 0.4), strict=True):
        run.path.write_text(json.dumps(record(accuracy, compare.TIE_TASK)))
    assert compare.chosen_rate(method) == method.rates[2]
    assert {compare.TIE_TASK, compare.SWEEP_TASK}.isdisjoint(compare.TASKS)
    assert {compare.TIE_SEED, compare.SWEEP_SEED}.isdisjoint(compare.SEEDS)


def test_the_page_holds_what_there_is(stored: Path) -> None:
    pytest.importorskip("matplotlib")
    sweep(0)
    method = compare.METHODS[0]
    for seed, accuracy in zip(compare.SEEDS[:2], (0.4, 0.6), strict=True):
        run = compare.Run(compare.TASKS[0], method, method.rates[0], seed)
        run.path.write_text(json.dumps(record(accuracy, compare.TASKS[0])))
    compare.report()
    page = (stored / "docs" / "results" / "comparison.md").read_text()
    assert "0.500 ± 0.100 (2)" in page
    assert "**The table is not complete.**" in page
    assert "0.300 ± 0.100 (2) | -0.100 ± 0.000 (2) | 20.000 ± 0.000 (2)" in page
    assert (stored / "docs" / "results" / "comparison.png").exists()


def options(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"model": None, "tasks": compare.TASKS, "minutes": 1e9, "jobs": 3, **given})


STAND_IN = """
import json, sys, time
from pathlib import Path
record, folder, fails = json.loads({record!r}), Path({folder!r}), {fails!r}
name = sys.argv[-1]
if fails and fails in name:
    sys.exit("no such luck")
time.sleep(0.1)
(folder / (name + ".json")).write_text(json.dumps(record))
(folder / "order.txt").open("a").write(name + " ")
"""


def stand_in(stored: Path, monkeypatch: pytest.MonkeyPatch, fails: str = "") -> None:
    """A script in the place of `compare.py --one NAME`."""
    script = stored / "stand_in.py"
    text = json.dumps(record(0.5, compare.SWEEP_TASK))
    script.write_text(STAND_IN.format(record=text, folder=str(stored / "compare"), fails=fails))
    monkeypatch.setattr(compare, "__file__", str(script))


def test_all_runs_are_done_once_and_go_on_where_they_were_stopped(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = compare.METHODS[0]
    stand_in(stored, monkeypatch)
    compare.perform_all([method], options(minutes=0))
    assert not (stored / "compare" / "order.txt").exists()
    sweep(1)
    compare.perform_all([method], options())
    done = (stored / "compare" / "order.txt").read_text().split()
    assert len(done) == len(set(done)) == len(compare.TASKS) * len(compare.SEEDS)
    assert {name.split("-")[-2] for name in done} == {f"{method.rates[1]:g}"}
    compare.perform_all([method], options())
    assert (stored / "compare" / "order.txt").read_text().split() == done


def test_after_a_run_that_fails_none_is_begun(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = compare.METHODS[0]
    stand_in(stored, monkeypatch, fails=f"{method.rates[0]:g}")
    with pytest.raises(SystemExit, match=f"svf-{method.rates[0]:g}-100 failed"):
        compare.perform_all([method], options(jobs=2))
    done = (stored / "compare" / "order.txt").read_text().split()
    assert done == [compare.Run(compare.SWEEP_TASK, method, method.rates[1], compare.SWEEP_SEED).path.stem]


@pytest.mark.usefixtures("stored")
def test_runs_of_another_budget_are_not_mixed_in() -> None:
    run = compare.Run(compare.SWEEP_TASK, compare.METHODS[0], 0.1, compare.SWEEP_SEED)
    run.path.write_text(json.dumps(record(0.5, compare.SWEEP_TASK) | {"settings": {"budget": {"max_steps": 1}}}))
    with pytest.raises(SystemExit, match=r"was run with .*max_steps"):
        run.stored()
