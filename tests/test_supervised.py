"""`peft-svf train --objective sft` and `dpo`: pairs, conversations, text and preferences, on TRL's trainers."""

from __future__ import annotations

import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_llama
from peft import PeftModel
from safetensors.torch import load_file
from test_training import base as base
from test_training import script, write_data
from test_trl import ADAPTER, assert_same, tokenizer

from peft_svf.scoring.holdout import is_held_out
from peft_svf.training.run import build, main, parse

NOT_FOR_PAIRS = dict.fromkeys(("num_generations", "reward_funcs", "prompt_column", "answer_column"))
USER, SAID = "user", "assistant"


def pair(n: int) -> dict[str, Any]:
    return {"prompt": f"{n}+1=", "completion": str(n + 1)}


def preference(n: int) -> dict[str, Any]:
    return {"prompt": f"{n}+1=", "chosen": str(n + 1), "rejected": "no idea"}


def conversation(n: int) -> dict[str, Any]:
    turns = [(USER, f"{n}"), (SAID, "and"), (USER, "one"), (SAID, str(n + 1))]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(base: Path, data: Path, output: Path, objective: str = "sft", **more: Any) -> list[str]:
    return script(base, data, output, **{**NOT_FOR_PAIRS, "objective": objective, "learning_rate": 0.03, **more})


def with_chat_template(base: Path) -> None:
    chat = tokenizer()
    chat.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + ';' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    chat.save_pretrained(base)


@pytest.mark.parametrize("method", ["svf", "lora"])
def test_sft_learns_pairs_and_leaves_what_other_objectives_leave(method: str, base: Path, tmp_path: Path) -> None:
    data, output = write(tmp_path / "pairs.jsonl", [pair(n) for n in range(60)]), tmp_path / "expert"
    record = main(options(base, data, output, peft_type=method, max_steps=20, load_best_model_at_end=True))
    assert {"adapter_config.json", ADAPTER, "README.md", "training.json", "curve.png"} <= set(os.listdir(output))
    PeftModel.from_pretrained(tiny_llama(), output)
    before, after = record.measures["loss"]
    assert after < before - 0.01
    assert record.accuracy_before is not None
    held_out = sum(is_held_out(pair(n)) for n in range(60))
    assert (record.test_size, len([e for e in record.history if "eval_accuracy" in e])) == (held_out, 20)
    card = (output / "README.md").read_text()
    assert "trained by SFT" in card
    assert f"Loss on {held_out} held-out questions: {before:.3f} before, **{after:.3f}** after." in card


def test_the_loss_is_that_of_the_completion_only(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "pairs.jsonl", [pair(n) for n in range(40)])
    arguments = options(base, data, tmp_path / "expert", max_completion_length=None)
    trainer, splits, functions = build(*parse(arguments)[:4])
    row = next(iter(trainer.get_train_dataloader()))
    shown = ["".join(trainer.processing_class.convert_ids_to_tokens(ids[ids >= 0])) for ids in row["labels"]]
    assert {text.removesuffix("</s>") for text in shown} <= set(splits["train"]["completion"])
    assert trainer.args.max_completion_length == 3  # the longest answer, such as 39, and its end
    assert [function.__name__ for function in functions] == ["exact"]


@pytest.mark.parametrize("chat", [False, True])
def test_text_is_asked_as_the_options_say(chat: bool, base: Path, tmp_path: Path) -> None:
    with_chat_template(base)
    data = write(tmp_path / "pairs.jsonl", [{"q": f"{n}+1=", "a": str(n + 1)} for n in range(40)])
    more = {"prompt_column": "q", "completion_column": "a", "chat": str(chat).lower()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer, splits, _ = build(*parse(options(base, data, tmp_path / "expert", **more))[:4])
    assert any("Add --chat true" in str(warning.message) for warning in caught) != chat
    asked = splits["test"][0]["prompt"]
    assert (asked[0]["role"] == USER) if chat else asked.endswith("+1=")
    text = "".join(trainer.processing_class.convert_ids_to_tokens(trainer.train_dataset[0]["input_ids"]))
    assert text.startswith("user:") == chat
    assert splits["test"][0]["answer"].isdigit()


def test_conversations_train_on_all_turns_and_are_evaluated_on_the_last(base: Path, tmp_path: Path) -> None:
    with_chat_template(base)
    data = write(tmp_path / "chats.jsonl", [conversation(n) for n in range(40)])
    arguments = options(base, data, tmp_path / "expert", max_steps=2)
    trainer, splits, _ = build(*parse(arguments)[:4])
    assert all(label >= 0 for label in trainer.train_dataset[0]["labels"])
    row = splits["test"][0]
    assert [turn["role"] for turn in row["prompt"]] == [USER, SAID, USER]
    assert row["completion"][0]["content"] == row["answer"]
    record = main(arguments)
    assert record.measures["loss"][1] < record.measures["loss"][0]


def test_text_trains_without_questions(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "texts.jsonl", [{"text": f"{n} and one is {n + 1}"} for n in range(40)])
    record = main(options(base, data, tmp_path / "expert", metric_for_best_model="eval_loss", max_steps=2))
    assert (record.test_size, record.accuracy_after, record.measures) == (0, None, {})
    losses = [entry["eval_loss"] for entry in record.history if "eval_loss" in entry]
    assert losses[-1] < losses[0]


def test_sft_of_a_task_and_of_a_begun_answer(base: Path, tmp_path: Path) -> None:
    """The classification prompts begin the answer, which TRL would put into another turn."""
    with_chat_template(base)
    sums = "reasoning_gym:chain_sum?max_digits=1&max_terms=2"
    products = "reasoning_gym:products?min_digits=1&max_digits=1&min_terms=2&max_terms=2"
    of_a_task = {"dataset_name": None, "train_size": 20, "test_size": 6}
    arguments = options(base, tmp_path, tmp_path / "sums", **of_a_task, task=sums, max_steps=1)
    assert main(arguments).test_size == 6
    categories = json.dumps({"sums": sums, "products": products})
    arguments = options(base, tmp_path, tmp_path / "both", **of_a_task, categories=categories, max_steps=1)
    trainer, *_ = build(*parse(arguments)[:4])
    text = "".join(trainer.processing_class.convert_ids_to_tokens(trainer.train_dataset[0]["input_ids"]))
    assert text.removesuffix("</s>").endswith("assistant:Category: sums")


def test_dpo_starts_at_the_base_model_and_prefers_the_chosen_answers(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "preferences.jsonl", [preference(n) for n in range(60)])
    record = main(options(base, data, tmp_path / "expert", "dpo", max_steps=12))
    losses = [entry["loss"] for entry in record.history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1] < losses[0] - 0.001
    assert record.measures["preference"][1] >= record.measures["preference"][0]
    assert record.accuracy_after is None
    card = (tmp_path / "expert" / "README.md").read_text()
    assert f"Preference on {record.test_size} held-out pairs" in card
    delta = load_file(tmp_path / "expert" / ADAPTER)
    assert all(value.abs().max() > 0 for value in delta.values())


def test_dpo_finds_the_prompt_that_both_answers_begin_with(base: Path, tmp_path: Path) -> None:
    rows = [{"good": f"is {n} odd? yes", "bad": f"is {n} odd? hm"} for n in range(40)]
    names = {"chosen_column": "good", "rejected_column": "bad"}
    data = write(tmp_path / "preferences.jsonl", rows)
    _, splits, _ = build(*parse(options(base, data, tmp_path / "expert", "dpo", **names))[:4])
    assert splits["test"][0]["prompt"].endswith("odd?")
    assert splits["test"][0]["chosen"].strip() == "yes"


@pytest.mark.parametrize(("objective", "row"), [("sft", pair), ("dpo", preference)])
def test_a_resumed_run_equals_an_uninterrupted_one(objective: str, row: Any, base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [row(n) for n in range(40)])
    steady = {"lr_scheduler_type": "constant", "save_total_limit": 5}
    main(options(base, data, tmp_path / "whole", objective, **steady, max_steps=4))
    main(options(base, data, tmp_path / "parts", objective, **steady, max_steps=2))
    main(options(base, data, tmp_path / "parts", objective, **steady, max_steps=4, resume_from_checkpoint=True))
    assert_same(load_file(tmp_path / "parts" / ADAPTER), load_file(tmp_path / "whole" / ADAPTER))


@pytest.mark.parametrize("option", ["model_name_or_path", "adapter_name_or_path"])
def test_sft_then_rl(option: str, base: Path, tmp_path: Path) -> None:
    """The second training starts where the first ended, by either option."""
    data = write(tmp_path / "pairs.jsonl", [pair(n) for n in range(40)])
    main(options(base, data, tmp_path / "first", max_steps=3))
    model = {"model_name_or_path": None, option: tmp_path / "first"}
    arguments = script(base, write_data(tmp_path / "data"), tmp_path / "second", **model, max_steps=1)
    trainer, *_ = build(*parse(arguments)[:4])
    start = load_file(tmp_path / "first" / ADAPTER)
    name = "base_model.model.model.layers.0.mlp.up_proj.svf_delta.weight"
    now = dict(trainer.model.named_parameters())[name.replace(".weight", ".default.weight")]
    assert torch.equal(now.detach(), start[name])
    record = main(arguments)
    assert (record.continues, record.base_model) == (str(tmp_path / "first"), str(base))


def test_an_adapter_on_a_base_model_by_another_name(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "pairs.jsonl", [pair(n) for n in range(40)])
    main(options(base, data, tmp_path / "first", max_steps=1))
    moved = base.rename(tmp_path / "moved")
    more = {"adapter_name_or_path": tmp_path / "first", "max_steps": 1}
    record = main(options(moved, data, tmp_path / "second", **more))
    assert record.base_model == str(moved)
    with pytest.raises(ValueError, match=r"is not an adapter: it has no adapter_config\.json"):
        parse(options(moved, data, tmp_path / "third", adapter_name_or_path=moved))


@pytest.mark.parametrize(
    ("objective", "row", "more", "message"),
    [
        (
            "sft",
            {"question": "a", "reply": "b"},
            {},
            "no column 'prompt'; it has question, reply. Name .*--prompt_column",
        ),
        (
            "sft",
            {"prompt": "a", "reply": "b"},
            {},
            r"row 1 has no answer to learn; it has 'prompt', 'reply'.*completion_c",
        ),
        ("sft", {"prompt": "a", "reply": "b"}, {"completion_column": "rely"}, "no 'rely'; it has 'prompt', 'reply'"),
        ("dpo", {"prompt": "a", "good": "b"}, {}, "no column 'chosen'; it has prompt, good. Name .*--chosen_column"),
        ("dpo", {"prompt": "a", "chosen": "b", "rejected": 3}, {}, "row 1 has the rejected answer 3"),
        ("sft", {"prompt": "a", "completion": "b"}, {"chosen_column": "b"}, "--chosen_column would have no effect"),
        ("dpo", {"prompt": "a"}, {"completion_column": "b"}, "--completion_column would have no effect"),
        (
            "sft",
            {"prompt": "a"},
            {"reward_model_name_or_path": "m"},
            "--reward_model_name_or_path would have no effect",
        ),
        ("dpo", {"prompt": "a"}, {"dataset_name": None, "task": "reasoning_gym:chain_sum"}, "has no worse answers"),
    ],
)
def test_columns_that_are_not_there(
    objective: str, row: dict[str, Any], more: dict[str, Any], message: str, base: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "rows.jsonl", [row] * 20)
    with pytest.raises(ValueError, match=message):
        main(options(base, data, tmp_path / "expert", objective, **more))
