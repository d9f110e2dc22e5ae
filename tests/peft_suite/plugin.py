"""
The pytest plugin that puts SVF into PEFT's test suite.

PEFT writes its matrices as lists that `pytest.mark.parametrize` is given, so SVF gets in by handing each test function
another list before pytest multiplies it. What is in the lists is in `rows.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .rows import MATRICES, NEEDS_HUB, ONE_TEST_MATRICES
from .tiny_models import save_tiny_models

_unused_rows = {name for matrices in MATRICES.values() for name in matrices} | set(ONE_TEST_MATRICES)
_left_out: list[pytest.Item] = []


def pytest_sessionstart() -> None:
    save_tiny_models(Path.cwd())


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Replace PEFT's rows by ours, before pytest's own implementation of this hook reads them."""
    module = metafunc.module
    matrices = MATRICES.get(module.__name__.rpartition(".")[-1], {})
    names = {id(getattr(module, name)): name for name in matrices}  # a missing one is an error: PEFT renamed it
    markers = metafunc.definition.own_markers
    for i, marker in enumerate(markers):
        if marker.name != "parametrize":
            continue
        name = names.get(id(marker.args[1]))
        rows = matrices.get(name)
        if name is None and (ours := ONE_TEST_MATRICES.get(metafunc.definition.name)) and ours[0] == marker.args[0]:
            name, rows = metafunc.definition.name, ours[1]
        if rows is not None:
            markers[i] = pytest.mark.parametrize(marker.args[0], rows, **marker.kwargs).mark
            _unused_rows.discard(name)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take out what cannot run without the hub, by name, and refuse to go on if rows of ours reached no test."""
    if _unused_rows:
        raise pytest.UsageError(f"PEFT's suite has no use for these rows (any more): {', '.join(sorted(_unused_rows))}")
    kept = []
    for item in items:
        (_left_out if getattr(item, "originalname", item.name) in NEEDS_HUB else kept).append(item)
    config.hook.pytest_deselected(items=_left_out)
    items[:] = kept


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Some tests draw unseeded numbers; this makes a failure come back, alone as well as in the whole suite."""
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was left out, and why."""
    for item in _left_out:
        reason = NEEDS_HUB[getattr(item, "originalname", item.name)]
        terminalreporter.write_line(f"LEFT OUT {item.nodeid}: {reason}")
