"""Two processes: every rank has the same basis, and DDP and FSDP compute what one process does."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_worker import BATCH, SCENARIOS, attach, bases, deltas, search, train, weights
from helpers import save_expert

from peft_svf import SVFConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed"),
]

RANKS = 2
Run = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes left what they found in each scenario of `distributed_worker.py`, and what they printed."""
    folder = tmp_path_factory.mktemp("ranks")
    for scenario in SCENARIOS:
        (folder / scenario.__name__).mkdir()
    for seed, name in enumerate(("one", "two")):
        save_expert(folder / "experts" / name, SVFConfig(target_modules="all-linear"), seed)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    command = [sys.executable, str(Path(__file__).with_name("distributed_worker.py")), str(folder)]
    processes = []
    for rank in range(RANKS):
        environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        environment["PEFT_SVF_CACHE"] = str(folder / "bases")
        with (folder / f"{rank}.txt").open("w") as output:
            processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    try:
        deadline = time.monotonic() + 900
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            if any(process.poll() for process in processes):
                break  # the other one would wait for it
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return folder


@pytest.fixture
def run(folder: Path) -> Run:
    def run(scenario: str) -> list[dict[str, Any]]:
        """What each rank of a scenario found."""
        paths = [folder / scenario / f"{rank}.pt" for rank in range(RANKS)]
        printed = [(folder / f"{rank}.txt").read_text()[-4000:] for rank in range(RANKS)]
        assert all(path.exists() for path in paths), "\n\n".join(printed)
        return [torch.load(path, weights_only=False) for path in paths]

    return run


def test_scores_come_back_in_the_order_of_the_examples(run: Run) -> None:
    for rank in run("greedy_scores_of_five"):
        assert rank["scores"] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_a_search_is_shared_and_finds_the_same(run: Run, folder: Path) -> None:
    first, second = run("search")
    assert "error" not in first, first["error"]
    assert first["result"] == second["result"]
    assert first["unseeded"] == second["unseeded"]
    assert (folder / "search" / "search.json").exists()
    alone = search(folder / "alone")
    assert first["result"] == alone["result"]
    assert first["by_gradient"] == second["by_gradient"]
    assert first["by_gradient"].keys() == alone["by_gradient"].keys()
    for name, alpha in alone["by_gradient"].items():
        assert first["by_gradient"][name] == pytest.approx(alpha, abs=1e-5)
    assert abs(first["calls"] - second["calls"]) <= 0.2 * alone["calls"]
    assert first["calls"] + second["calls"] == alone["calls"]


def test_the_first_process_alone_has_the_checkpoint(run: Run) -> None:
    first, second = run("search_with_files_of_one_process")
    assert first["resumed"] == second["resumed"] == first["whole"] == second["whole"]
    assert (first["there"], second["there"]) == (True, False)
    assert first["error"] == second["error"]
    assert re.match(r"OSError: The checkpoint .*/file/search\.json cannot be written: ", first["error"])


def test_a_reward_that_fails_in_one_process_stops_all(run: Run) -> None:
    first, second = run("search_that_fails")
    raised = "raised ZeroDivisionError: in one process"
    assert first["error"].startswith("RuntimeError: The evaluation failed in process 1: RewardError: Reward function")
    assert raised in first["error"]
    assert second["error"].startswith("RewardError: Reward function")
    assert raised in second["error"]


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 0) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def mean_losses(ranks: list[dict[str, Any]]) -> list[float]:
    return torch.tensor([rank["losses"] for rank in ranks]).mean(0).tolist()


@pytest.mark.parametrize(
    "scenario",
    [
        "attach_without_cache",
        "attach_with_cache",
        "attach_with_a_cache_on_each_node",
        "attach_with_a_broken_cache",
    ],
)
def test_all_ranks_have_the_same_basis(scenario: str, run: Run) -> None:
    """Although rank 1 computes another one."""
    first, second = run(scenario)
    assert len(first["bases"]) == 14
    assert_close(second["bases"], first["bases"])
    if scenario != "attach_with_cache":  # there the first to come writes it
        assert_close(first["bases"], bases(attach()), 1e-6)
    assert first.get("frozen", True)
    assert second.get("frozen", True)


def test_ddp(run: Run) -> None:
    first, second = run("ddp")
    reference = attach()
    expected = bases(reference)
    assert_close(second["bases"], first["bases"])
    assert_close(first["bases"], expected, 1e-6)
    # the basis is sent when the model is wrapped, and not in every forward, as buffers are
    assert first["at_start"] > sum(basis.numel() for basis in expected.values())
    assert all(elements <= first["buffers"] for elements in first["forwards"])

    assert first["folded"] == 14  # every rank holds whole weights

    assert len(first["gradients"]) == 14
    assert_close(second["gradients"], first["gradients"])
    reference(input_ids=BATCH, labels=BATCH).loss.backward()
    assert_close(first["gradients"], {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}, 1e-6)

    reference.zero_grad()
    assert mean_losses([first, second]) == pytest.approx(train(reference, BATCH), abs=1e-5)
    assert_close(second["deltas"], first["deltas"])
    assert_close(first["deltas"], deltas(reference), 1e-5)


def test_fsdp2(run: Run) -> None:
    first, second = run("fsdp2")
    reference = attach()
    base = weights(reference)
    assert len(first["sharded"]) == 14
    assert all(first["sharded"].values())
    assert first["folded"] == second["folded"] == 0  # nothing that undoes the sharding or is out of date

    assert mean_losses([first, second]) == pytest.approx(train(reference, BATCH), abs=1e-5)
    assert_close(first["deltas"], deltas(reference), 1e-5)
    assert set(first["state"]) == {name.replace(".default.", ".") for name in first["deltas"]}
    assert_close(first["state"], {n.replace(".default.", "."): d for n, d in first["deltas"].items()})

    reference.merge_adapter()
    assert_close(first["before"], base)
    assert_close(first["merged"], weights(reference), 1e-5)
    assert all(not torch.equal(merged, base[name]) for name, merged in first["merged"].items())
    assert_close(first["after"], base)
    torch.testing.assert_close(first["merged_logits"], first["gate"], rtol=0, atol=1e-5)
    torch.testing.assert_close(first["again"], first["gate"], rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(first["gate"], reference(input_ids=BATCH).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scenario", ["fsdp1", "fsdp1_flat"])
def test_fsdp1(scenario: str, run: Run) -> None:
    first, second = run(scenario)
    reference = attach()
    assert first["units"] == 1 + 2 + 14  # root, decoder layers, and each δ by itself
    assert first["folded"] == second["folded"] == 0
    assert mean_losses([first, second]) == pytest.approx(train(reference, BATCH), abs=1e-5)
    assert_close(first["deltas"], deltas(reference), 1e-5)
