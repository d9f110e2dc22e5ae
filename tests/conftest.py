"""Fixtures of all tests: a cache of singular bases that no other run sees, and a fixed random state."""

from __future__ import annotations

import os
from functools import partialmethod
from importlib.util import find_spec

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch

# they are only on the path of `make test-quantized`
collect_ignore = [] if find_spec("bitsandbytes") and find_spec("torchao") else ["test_quantized.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the demo first, which takes minutes: at the end, one worker would run it while the others have nothing."""
    items.sort(key=lambda item: item.name != "test_quickstart")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts with an empty cache."""
    monkeypatch.setenv("PEFT_SVF_CACHE", str(tmp_path_factory.mktemp("bases")))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def never_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `fold="never"` the default, for tests that compare two calls bit for bit: folding rounds differently."""
    from peft_svf import SVFRuntimeConfig  # not earlier, as tests of the command line need no PEFT

    monkeypatch.setattr(SVFRuntimeConfig, "__init__", partialmethod(SVFRuntimeConfig.__init__, fold="never"))
