"""The demo's tasks: right answers, and nothing of the test in training."""

from __future__ import annotations

import json
import re
import string
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parents[1] / "examples"
ALPHABET = "\n?" + string.ascii_letters + string.digits + " .,:;=*+-/()'\""
sys.path.insert(0, str(EXAMPLES))

from tasks import TASKS, reward  # noqa: E402


def asked(name: str, split: str) -> list[str]:
    return [row["prompt"][-1]["content"] for row in TASKS[name].examples(split, 2000)]


def sum_of(question: str) -> tuple[str, ...]:
    """Numbers and operator of an arithmetic question, in any order."""
    return tuple(sorted(re.findall(r"\d+|[-+*/]", question)))


def test_no_test_question_is_in_training_in_any_words() -> None:
    arithmetic = [name for name in TASKS if name != "retrieval"]
    trained = {sum_of(question) for name in arithmetic for question in asked(name, "train")}
    tested = {sum_of(question) for name in arithmetic for question in asked(name, "test")}
    assert len(trained) > 50
    assert len(tested) > 30
    assert not trained & tested
    assert not set(asked("retrieval", "train")) & set(asked("retrieval", "test"))


@pytest.mark.parametrize("name", [name for name in TASKS if name != "retrieval"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_answers_are_right(name: str, split: str) -> None:
    for row in TASKS[name].examples(split, 300):
        (expression,) = re.findall(r"-?\d+ [-+*] -?\d+", row["prompt"][-1]["content"])
        assert row["completion"][0]["content"] == str(eval(expression))


@pytest.mark.parametrize("name", TASKS)
def test_the_reward_is_the_verifier_s(name: str) -> None:
    rows = TASKS[name].examples("test", 8)
    right = [row["completion"] for row in rows]
    wrong = [[{"role": "assistant", "content": "no idea"}]] * len(rows)
    columns = {"entry": rows["entry"], "task": rows["task"]}
    assert reward(completions=right, **columns) == [1.0] * len(rows)
    assert reward(completions=wrong, **columns) == [0.0] * len(rows)
    assert all(json.loads(entry)["question"] for entry in rows["entry"])


@pytest.mark.slow
def test_quickstart_on_another_model(tmp_path: Path) -> None:
    """With `--model`, for whose weights the shipped experts are not."""
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(ALPHABET)}, merges=[], unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="?",
        eos_token="\n",
        pad_token="\n",
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    ).save_pretrained(tmp_path / "tiny")
    model = tiny_llama(vocab_size=len(ALPHABET), max_position_embeddings=512, eos_token_id=0, pad_token_id=0)
    model.save_pretrained(tmp_path / "tiny")
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / "quickstart.py"), "--quick", "--model", "tiny", "--output", "out"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert set(json.loads((tmp_path / "out" / "results.json").read_text())["accuracy"]) == set(TASKS)
    config = json.loads((tmp_path / "out" / "sums" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
