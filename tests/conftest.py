"""Shared by all tests: a small model, and a cache of singular bases that no other run sees."""

from __future__ import annotations

import os
from functools import partialmethod

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel


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


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    """A random Llama of two layers. Same seed, same weights."""
    settings: dict[str, object] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).to(dtype).eval()
    torch.random.set_rng_state(state)
    return model
