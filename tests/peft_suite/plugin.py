"""
The pytest plugin that puts SVF into PEFT's test suite.

PEFT keeps its matrices in lists that it hands to `pytest.mark.parametrize`. SVF gets in by exchanging the list before
pytest multiplies the test. What is in our lists is in `rows.py`.
"""

from __future__ import annotations

from functools import partialmethod
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version

from peft_svf import SVFRuntimeConfig

from .rows import MATRICES, NEEDS_HUB, ONE_TEST_MATRICES, RUN_WITH, WRITTEN_FOR
from .tiny_models import save_tiny_models

_unused = {name for matrices in MATRICES.values() for name in matrices} | set(ONE_TEST_MATRICES)
_notes: list[str] = []


def pytest_sessionstart(session: pytest.Session) -> None:
    """Make the models in the working directory, where they go before those of the hub. Workers of xdist find them."""
    if not hasattr(session.config, "workerinput"):
        save_tiny_models(Path.cwd())


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Every worker of xdist collects everything, and its process ends with its notes."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["notes"] = _notes


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _notes[:] = getattr(node, "workeroutput", {}).get("notes", _notes)


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Exchange PEFT's rows for ours. Tried first, as pytest's own implementation of this hook reads the rows."""
    module, test = metafunc.module, metafunc.definition
    matrices = MATRICES[module.__name__.rpartition(".")[-1]]
    names = {id(getattr(module, name)): name for name in matrices if hasattr(module, name)}
    for i, marker in enumerate(test.own_markers):
        if marker.name != "parametrize":
            continue
        parameters, rows = marker.args[:2]
        if (name := names.get(id(rows))) is not None:
            ours = matrices[name]
        elif (name := test.name) in ONE_TEST_MATRICES and parameters == ONE_TEST_MATRICES[name][0]:
            ours = ONE_TEST_MATRICES[name][1]
        else:
            continue
        test.own_markers[i] = pytest.mark.parametrize(parameters, ours, **marker.kwargs).mark
        _unused.discard(name)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    """Leave out what needs the hub, and refuse to go on if rows of ours reached no test: PEFT renamed something."""
    if _unused and Version(peft.__version__) >= Version(WRITTEN_FOR):
        raise pytest.UsageError(f"PEFT's suite has no use for these rows any more: {', '.join(sorted(_unused))}")
    _notes.extend(f"NOT IN PEFT {peft.__version__}: {name}" for name in sorted(_unused))
    left_out = [item for item in items if item.originalname in NEEDS_HUB]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item.originalname not in NEEDS_HUB]
    _notes.extend(f"LEFT OUT {item.name}: {NEEDS_HUB[item.originalname]}" for item in left_out)
    _notes.extend(f"RUN WITH {RUN_WITH[i.originalname]} {i.name}" for i in items if i.originalname in RUN_WITH)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Some tests draw unseeded numbers. With this, a failure comes back, alone as well as in the whole suite."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _settings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests make their configs themselves, so the defaults have to change."""
    if settings := RUN_WITH.get(request.node.originalname):
        monkeypatch.setattr(SVFRuntimeConfig, "__init__", partialmethod(SVFRuntimeConfig.__init__, **settings))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was left out or treated differently."""
    for note in _notes:
        terminalreporter.write_line(note)
