"""EleutherAI's lm-evaluation-harness on adapted models, with a task of its own from a local file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import base_model, make_tokenizer, save_expert

from peft_svf import NearestDispatcher, SelfAdaptiveModel, SVFConfig, load_experts

lm_eval = pytest.importorskip("lm_eval")

ROWS = [
    {"question": "1+1=", "answer": "2", "choices": ["2", "3"]},
    {"question": "a b", "answer": "c", "choices": ["x", "c"]},
]
COMMON: dict[str, Any] = {
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "{{question}}",
}
TASKS: list[dict[str, Any]] = [
    {
        "task": "ours_generated",
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"max_gen_toks": 3, "until": ["\n"]},
        "metric_list": [{"metric": "exact_match"}],
    },
    {
        "task": "ours_chosen",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{choices.index(answer)}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, two experts, and two tasks for lm-eval."""
    folder = tmp_path_factory.mktemp("world")
    base_model().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    for seed, name in enumerate(("sums", "words")):
        save_expert(folder / name, SVFConfig(target_modules="all-linear"), seed)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "tasks").mkdir()
    for task in TASKS:
        data = {"dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
        (folder / "tasks" / f"{task['task']}.yaml").write_text(yaml.safe_dump({**COMMON, **data, **task}))
    return folder


def test_the_documented_command(world: Path, tmp_path: Path) -> None:
    documented = (Path(__file__).parents[1] / "docs" / "how-to" / "evaluate.md").read_text()
    start = 'python -c "import peft_svf; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"'
    assert start in documented
    arguments = ["--model", "hf", "--model_args", f"pretrained={world / 'base'},peft={world / 'sums'}"]
    arguments += ["--include_path", str(world / "tasks"), "--tasks", "ours_generated,ours_chosen"]
    arguments += ["--device", "cpu", "--output_path", str(tmp_path)]
    code = "import peft_svf; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = tmp_path.rglob("results_*.json")
    found = json.loads(results.read_text())["results"]
    assert {"ours_generated", "ours_chosen"} <= found.keys()


def test_a_self_adaptive_model(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    mixture = load_experts(str(world / "base"), {name: str(world / name) for name in ("sums", "words")})
    model, tokenizer = mixture.model, mixture.tokenizer
    dispatcher = NearestDispatcher(model, tokenizer, {"sums": ["2+2=", "3+1="], "words": ["c d", "x y"]})
    adaptive = SelfAdaptiveModel(model, tokenizer, dispatcher)
    harness = HFLM(pretrained=adaptive, tokenizer=tokenizer, batch_size=2)
    manager = TaskManager(include_path=str(world / "tasks"), include_defaults=False)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    found = lm_eval.simple_evaluate(
        model=harness, tasks=[task["task"] for task in TASKS], task_manager=manager, log_samples=True, bootstrap_iters=0
    )
    for sample in found["samples"]["ours_generated"]:
        question = sample["doc"]["question"]
        ids = tokenizer(question, return_tensors="pt")
        expert = dispatcher([question]).adapter_names
        output = model.generate(**ids, adapter_names=expert, max_new_tokens=3, do_sample=False)
        expected = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert sample["resps"][0][0] == expected.split("\n")[0]
    assert found["results"]["ours_chosen"]["acc,none"] in (0.0, 0.5, 1.0)
