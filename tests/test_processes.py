"""The process of the user: its settings stay as they are, locks between processes end, and text files have no marks."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import base_model, tiny_llama
from peft import get_peft_model
from test_adaptation import EXAMPLES
from test_adaptation import experts as experts
from test_adaptation import tokenizer as tokenizer
from test_trl import trainer

from peft_svf import AdaptiveMixture, EvaluationTask, SVFConfig, SVFRuntimeConfig, evaluate, load_examples
from peft_svf.interop.sources import model_files
from peft_svf.scoring.datasets import load_prompts
from peft_svf.spectral import BasisCache, lock
from peft_svf.training import EqualRewards, ExactState, RewardBar
from peft_svf.training.recipe import parse
from peft_svf.tuner import bases
from peft_svf.utils.files import read_text

# ------------------------------------------------------------------------------------------------------------ settings


def in_a_new_thread(function: Callable[[], Any]) -> Any:
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def settings(model: Any, tokenizer: Any) -> dict[str, Any]:
    """What another part of the process could notice."""
    loggers = [logging.root, *(logging.getLogger(name) for name in ("transformers", "peft", "trl", "torch"))]
    return {
        "threads": (torch.get_num_threads(), in_a_new_thread(torch.get_num_threads), torch.get_num_interop_threads()),
        "dtype": torch.get_default_dtype(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "determinism": (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()),
        "random": (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
        "warnings": list(warnings.filters),
        "logging": [(logger.level, logger.disabled, list(logger.handlers)) for logger in loggers],
        "environment": dict(os.environ),
        "hooks": (sys.excepthook, sys.stdout, sys.stderr, threading.excepthook),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "folder": (os.getcwd(), list(sys.path)),
        "tokenizer": (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.pad_token, len(tokenizer)),
        "generation": model.generation_config.to_dict(),
        "modules": "matplotlib.pyplot" in sys.modules,
    }


def attach(model: Any, tokenizer: Any, experts: dict[str, str], folder: Path) -> None:
    get_peft_model(model, SVFConfig(target_modules="all-linear", runtime_config=SVFRuntimeConfig(use_cache=False)))


def search(model: Any, tokenizer: Any, experts: dict[str, str], folder: Path) -> None:
    mixture = AdaptiveMixture.from_pretrained(model, experts, tokenizer=tokenizer)
    rewards = {"reward_funcs": lambda completions, **_: [float(len(text)) for text in completions]}
    mixture.search(EXAMPLES, **rewards, num_generations=1, population_size=3, max_new_tokens=3)


def evaluated(model: Any, tokenizer: Any, experts: dict[str, str], folder: Path) -> None:
    mixture = AdaptiveMixture.from_pretrained(model, experts, tokenizer=tokenizer)
    task = EvaluationTask("all", [{"prompt": "1+1=", "answer": "2"}], lambda completions, **_: [0.0] * len(completions))
    evaluate(mixture.model, tokenizer, [task], {"mine": mixture}, generation_kwargs={"max_new_tokens": 2})


@pytest.mark.parametrize("act", [attach, search, evaluated])
def test_the_settings_of_the_process_stay(
    act: Callable[..., None], experts: dict[str, str], tokenizer: Any, tmp_path: Path
) -> None:
    threads, model = torch.get_num_threads(), base_model()
    torch.set_num_threads(4)
    try:
        before = settings(model, tokenizer)
        act(model, tokenizer, experts, tmp_path)
        after = settings(model, tokenizer)
    finally:
        torch.set_num_threads(threads)
    assert {name for name in before if before[name] != after[name]} == set()


def test_a_training_step_changes_no_more_than_trl_does(tmp_path: Path) -> None:
    """The Trainer seeds the random states, and gives the model's generation config the tokens of the tokenizer."""
    trainer("GRPO", tmp_path, max_steps=1).train()  # the first training of a process sets up accelerate
    run = trainer("GRPO", tmp_path, max_steps=1)
    for callback in (ExactState(), EqualRewards(), RewardBar()):
        run.add_callback(callback)
    before = settings(run.model, run.processing_class)
    run.train()
    after = settings(run.model, run.processing_class)
    assert {name for name in before if before[name] != after[name]} <= {"random", "generation"}


def test_attaching_in_threads_leaves_the_number_of_threads() -> None:
    """Each attaching thread, each thread that starts meanwhile, and the workers themselves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    models, found, workers = [tiny_llama(seed, num_hidden_layers=3) for seed in range(4)], [], []
    real = bases._build

    def spied(*args: Any) -> None:
        workers.append(torch.get_num_threads())
        real(*args)

    def work(model: Any) -> None:
        config = SVFConfig(target_modules="all-linear", runtime_config=SVFRuntimeConfig(use_cache=False))
        get_peft_model(model, config)
        found.append(torch.get_num_threads())

    try:
        bases._build = spied
        attaching = [threading.Thread(target=work, args=(model,)) for model in models]
        for thread in attaching:
            thread.start()
        for thread in attaching:
            thread.join()
        found += [torch.get_num_threads(), in_a_new_thread(torch.get_num_threads)]
    finally:
        bases._build = real
        torch.set_num_threads(threads)
    assert found == [3] * 6
    assert set(workers) == {1}


# --------------------------------------------------------------------------------------------------------------- locks

HOLD = """
import sys, time
from pathlib import Path
from peft_svf.spectral.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "SAY_AFTER", 0.1)


def test_waiting_names_the_process_that_holds_the_lock(impatient: None, tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdin is not None
    assert other.stdout.readline() == b"held\n"
    release = threading.Timer(0.5, lambda: other.communicate(b"\n"))
    release.start()
    with pytest.warns(UserWarning, match=rf"Waiting for process {other.pid} on .*a\.lock") as said, lock.locked(path):
        assert other.poll() is not None or release.is_alive()
    release.join()
    assert len(said) == 1
    assert not path.with_suffix(lock.HOLDER).exists()


def test_the_lock_of_a_dead_process_is_not_waited_for(impatient: None, tmp_path: Path) -> None:
    """A fork of it may keep the lock. Here this process keeps it, and the holder file names one that has ended."""
    path = tmp_path / "a.lock"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with lock.locked(path):
        holder = path.with_suffix(lock.HOLDER)
        holder.write_text(holder.read_text().replace(str(os.getpid()), str(ended.pid)))
        start = time.perf_counter()
        with pytest.warns(UserWarning, match=rf"process {ended.pid} on .* has not released"), lock.locked(path):
            pass
    assert time.perf_counter() - start < 5


def test_a_lock_that_never_opens_is_given_up(impatient: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lock, "GIVE_UP_AFTER", 0.3)
    path = tmp_path / "a.lock"
    with lock.locked(path), pytest.warns(UserWarning, match="without the lock"), lock.locked(path):
        pass


def test_a_basis_is_computed_although_its_lock_is_held(
    impatient: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(lock, "GIVE_UP_AFTER", 0.2)
    cache, weight = BasisCache(tmp_path), torch.randn(4, 6)
    with cache._lock("0" * 64):
        assert list(tmp_path.glob(f".locks/*{lock.HOLDER}"))
        cache.load_or_compute(weight)
    assert len(cache.entries()) == 1
    cache.clear()
    assert not list(tmp_path.glob(".locks/*"))


# ---------------------------------------------------------------------------------------------------------- text files

MARKED = {
    "rows.csv": "prompt,answer\n1+1=,2\n",
    "rows.jsonl": '{"prompt": "1+1=", "answer": "2"}\n',
    "rows.json": '[{"prompt": "1+1=", "answer": "2"}]',
}


@pytest.mark.parametrize("name", MARKED)
def test_examples_of_a_file_with_a_byte_order_mark(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(MARKED[name], encoding="utf-8-sig")
    assert load_examples(str(tmp_path / name)) == [{"prompt": "1+1=", "answer": "2", "completion": "2"}]


def test_prompts_of_a_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\r\ntwo\r\n", encoding="utf-8-sig", newline="")
    assert load_prompts(str(tmp_path / "prompts.txt")) == ["one", "two"]


def test_a_recipe_with_a_byte_order_mark(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("objective: reinforce\ntask: reasoning_gym:chain_sum\n", encoding="utf-8-sig")
    script, training, *_ = parse(["--config", str(recipe), "--output_dir", str(tmp_path), "--use_cpu", "true"])
    assert (script.objective, script.task) == ("reinforce", "reasoning_gym:chain_sum")
    assert type(training).__name__ == "ReinforceConfig"


def test_text_that_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one", encoding="utf-16")
    with pytest.raises(ValueError, match=r"prompts\.txt is no UTF-8 text"):
        read_text(tmp_path / "prompts.txt")


def test_our_json_files_may_be_edited_on_windows(tmp_path: Path) -> None:
    index = {"weight_map": {"a.weight": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8-sig")
    assert model_files(tmp_path) == {"model-1.safetensors": ["a.weight"]}


def test_no_module_reads_text_in_another_way() -> None:
    folder = Path(bases.__file__).parents[1]
    own = (
        "files.py",
        "lock.py",
        "__init__.py",
        "cards.py",
        "extras.py",
    )  # the last reads pip's record, not users' text
    others = [
        f"{path.name}:{number}"
        for path in folder.rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if ".read_text(" in line and path.name not in own
    ]
    assert others == []
