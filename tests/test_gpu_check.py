"""The GPU check runs on a CPU with tiny shapes. A check that fails leaves a row, and the others run."""

from __future__ import annotations

import contextlib
import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu_check
from gpu_check import CHECKS, FAIL, MEASURED, PASS, Check, Row, Setting

# what these checks find has a limit
JUDGED = ("bit identity", "merge", "agreement", "torch.compile", "accuracy")


def run(folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """The exit code, and what the run left in its file."""
    output = folder / "gpu_check.json"
    code = gpu_check.main(["--device", "cpu", "--output", str(output), *options])
    return code, json.loads(output.read_text())


def rows_of(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in record["raw"]["rows"]:
        found.setdefault(row["check"], []).append(row)
    return found


def measured(_: Setting) -> Iterator[Row]:
    yield Row("one", "1.0 s")


def broken(_: Setting) -> Iterator[Row]:
    yield Row("one", "1.0 s")
    raise RuntimeError("out of memory\nand a long explanation")


def wrong(_: Setting) -> Iterator[Row]:
    yield gpu_check.within("error", 2e-3, 1e-3)


def endless(_: Setting) -> Iterator[Row]:
    yield Row("one", "1.0 s")
    time.sleep(60)


@pytest.mark.slow
def test_every_check_that_can_runs_on_a_cpu_and_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, record = run(tmp_path)
    found = rows_of(record)
    assert list(found) == [check.name for check in CHECKS]
    for check in CHECKS:
        statuses = [row["status"] for row in found[check.name]]
        results = [row["result"] for row in found[check.name]]
        if check.needs_cuda:
            assert results == ["skipped: needs CUDA"]
            assert statuses == [MEASURED]
            continue
        assert all(row["what"] for row in found[check.name]), results
        assert FAIL not in statuses, results
        assert (PASS in statuses) == check.name.startswith(JUDGED)
    assert code == 0

    machine = record["machine"]
    assert machine["device"] == "cpu"
    assert machine["torch"] == torch.__version__
    assert {"transformers", "peft", "peft_svf"} <= machine.keys()
    assert record["raw"]["seconds"].keys() == found.keys()
    table, printed = record["tables"][0], capsys.readouterr().out
    assert len(table["rows"]) == len(record["raw"]["rows"])
    assert "GPU check on cpu" in printed
    assert all(name in printed for name in found)


@pytest.mark.parametrize(("function", "result"), [(broken, "RuntimeError: out of memory"), (wrong, "2.0e-03")])
def test_a_check_that_fails_leaves_a_row_and_the_rest_goes_on(
    function: Any, result: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "CHECKS", [Check("bad", function), Check("good", measured)])
    code, record = run(tmp_path)
    *before, last = rows_of(record)["bad"]
    assert code == 1
    assert all(row["status"] == MEASURED for row in before)
    assert last["status"] == FAIL
    assert last["result"].startswith(result)
    assert "\n" not in last["result"]
    assert [row["status"] for row in rows_of(record)["good"]] == [MEASURED]


def test_a_check_beyond_the_limit_is_stopped_and_the_next_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "CHECKS", [Check("endless", endless), Check("next", measured)])
    code, record = run(tmp_path, "--max_seconds", "3")
    assert code == 0
    results = {name: [row["result"] for row in rows] for name, rows in rows_of(record).items()}
    assert results == {"endless": ["1.0 s", "stopped: out of time"], "next": ["skipped: out of time"]}


def test_a_check_is_chosen_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "CHECKS", [Check("good", measured), Check("bad", broken)])
    code, record = run(tmp_path, "--only", "goo")
    assert code == 0
    assert list(rows_of(record)) == ["good"]


def test_waits_are_counted_by_the_line_that_waits(cuda_stand_in: None) -> None:
    def step() -> None:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    (place, count), *others = gpu_check.synchronizations(step).items()
    assert place.startswith("test_gpu_check.py:")
    assert (count, others) == (3, [])


@pytest.mark.parametrize("check", [check for check in CHECKS if check.needs_cuda], ids=lambda check: check.name)
def test_checks_that_need_cuda_run_through(check: Check, cuda_stand_in: None) -> None:
    """With stand-ins for what torch does on a GPU, so that a change of the library does not break them unseen. Replays
    are out of date then, so the status says nothing."""
    rows = list(check.rows(Setting("cpu", gpu_check.ON_CPU)))
    assert rows
    assert all(row.what and row.result for row in rows)


@pytest.fixture
def cuda_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def wait_stream(self, stream: Any) -> None:
            pass

    class CUDAGraph:
        def replay(self) -> None:
            pass

    stand_ins: dict[str, Any] = {
        "synchronize": lambda: None,
        "set_sync_debug_mode": lambda mode: None,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 2**20,
        "reset_peak_memory_stats": lambda: None,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": CUDAGraph,
        "graph": lambda graph: contextlib.nullcontext(),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
