"""The demo's tasks: right answers, and nothing of the test in training."""

from __future__ import annotations

import json
import re
import string
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_svf.training.recipe import recipe_task
from peft_svf.training.tasks import SPLITS, Split

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = EXAMPLES / "recipes"
ALPHABET = "\n?" + string.ascii_letters + string.digits + " .,:;=*+-/()'\""

TASKS = {path.stem: recipe_task(path) for path in sorted(RECIPES.glob("*.yaml")) if not path.stem.startswith("paper-")}
ARITHMETIC = ("arithmetic", "products", "sums")


def asked(name: str, split: Split) -> list[str]:
    rows = TASKS[name].examples(split, 2000)
    return [next(m["content"] for m in reversed(row["prompt"]) if m["role"] == "user") for row in rows]


def sum_of(question: str) -> tuple[str, ...]:
    """Numbers and operator of an arithmetic question, in any order."""
    return tuple(sorted(re.findall(r"\d+|[-+*/]", question)))


def test_no_test_question_is_in_training_in_any_words() -> None:
    for other in ("test", "validation"):
        trained = {sum_of(question) for name in ARITHMETIC for question in asked(name, "train")}
        tested = {sum_of(question) for name in ARITHMETIC for question in asked(name, other)}  # type: ignore[arg-type]
        assert len(trained) > 50
        assert len(tested) > 10
        assert not trained & tested
    trained_anywhere = {question for name in TASKS for question in asked(name, "train")}
    tested_anywhere = {question for name in TASKS for question in asked(name, "test")}
    assert not trained_anywhere & tested_anywhere


@pytest.mark.parametrize("name", ARITHMETIC)
@pytest.mark.parametrize("split", SPLITS)
def test_the_answers_are_right(name: str, split: Split) -> None:
    for row in TASKS[name].examples(split, 300):
        (expression,) = re.findall(r"-?\d+ [-+*] -?\d+", row["prompt"][-1]["content"])
        assert row["completion"][0]["content"] == str(eval(expression))


@pytest.mark.parametrize("name", TASKS)
def test_the_reward_is_the_verifier_s(name: str) -> None:
    rows = TASKS[name].examples("test", 8)
    columns = {name: rows[name] for name in rows.column_names if name not in ("prompt", "completion")}
    wrong = [[{"role": "assistant", "content": "no idea"}]] * len(rows)
    assert TASKS[name].reward(prompts=rows["prompt"], completions=rows["completion"], **columns) == [1.0] * len(rows)
    assert TASKS[name].reward(prompts=rows["prompt"], completions=wrong, **columns) == [0.0] * len(rows)


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
    # a random model earns no reward, which otherwise ends the training
    demo = f"""
import runpy, sys
import peft_svf.training.run
peft_svf.training.run.check_outcome = lambda trainer: None
sys.path.insert(0, {str(EXAMPLES)!r})
sys.argv = ["quickstart.py", "--quick", "--model", "tiny", "--output", "out"]
runpy.run_path({str(EXAMPLES / "quickstart.py")!r}, run_name="__main__")
"""
    run = subprocess.run([sys.executable, "-c", demo], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    tested = set(json.loads((tmp_path / "out" / "results.json").read_text())["accuracy"])
    assert tested == {"products", "arithmetic", "retrieval", "sums"}
    config = json.loads((tmp_path / "out" / "sums" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
