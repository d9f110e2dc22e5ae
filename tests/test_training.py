"""Training: REINFORCE, tasks, greedy evaluation, callbacks, checkpoints, the script."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, Optional, Union

import datasets
import numpy as np
import pytest
import torch
import yaml
from helpers import tiny_llama
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from test_trl import (
    ADAPTER,
    SETTINGS,
    Recorder,
    assert_same,
    dataset,
    deltas,
    logged,
    many_early_letters,
    tokenizer,
    trainer,
)
from transformers import EarlyStoppingCallback, TrainerCallback

from peft_svf import SVFConfig
from peft_svf.reporting.plots import delta_sizes, plot_curves, plot_deltas
from peft_svf.training import (
    ClassificationTask,
    EqualRewards,
    ExactState,
    GreedyEvaluation,
    ReinforceConfig,
    ReinforceTrainer,
    find_task,
    greedy_accuracy,
    split_of,
)
from peft_svf.training.arguments import AdapterArguments, TrainArguments, adapter_config
from peft_svf.training.checkpoints import discard_incomplete, is_complete, last_complete
from peft_svf.training.data import for_trl
from peft_svf.training.report import Record
from peft_svf.training.run import build, main, parse
from peft_svf.training.tasks import SPLITS
from peft_svf.tuner.deltas import adapter_deltas

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"

# ---------------------------------------------------------------------------------------------------------- REINFORCE


def reinforce(folder: Path, reward: Any, model: Any = None, **options: Any) -> Any:
    settings = {
        **SETTINGS,
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 6,
        "beta": 0.1,
        **options,
    }
    return ReinforceTrainer(
        model if model is not None else tiny_llama(),
        reward_funcs=reward,
        args=ReinforceConfig(**settings),
        train_dataset=dataset("GRPO"),
        eval_dataset=dataset("GRPO") if "eval_strategy" in options else None,
        processing_class=tokenizer(),
        peft_config=SVFConfig(target_modules="all-linear"),
    )


class Samples:
    """A reward that notes what it was asked about."""

    __name__ = "samples"

    def __init__(self, values: Any = (1.0, 0.0)) -> None:
        self.values, self.seen = values, []  # type: ignore[var-annotated]

    def __call__(self, prompts: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
        rewards = [self.values[i % len(self.values)] for i in range(len(prompts))]
        self.seen.append((prompts, completion_ids, rewards))
        return rewards


def analytic_gradient(
    model: Any, samples: tuple[list[str], list[list[int]], list[float]], beta: float, length: int
) -> dict[str, torch.Tensor]:
    """-∇J of the paper's objective for these samples, from its definition, in fp64: the score function of each token
    times reward minus λ times the log-ratio at that token, over B · max_completion_length."""
    prompts, completions, rewards = samples
    model = model.double().eval()
    for parameter in model.parameters():
        parameter.grad = None
    total = torch.zeros((), dtype=torch.float64)
    for prompt, completion, reward in zip(prompts, completions, rewards, strict=True):
        before = tokenizer()(prompt)["input_ids"]
        ids = torch.tensor([before + completion])

        def logps(ids: torch.Tensor = ids, before: list[int] = before) -> torch.Tensor:
            logits = model(input_ids=ids).logits[0, len(before) - 1 : -1]
            return logits.log_softmax(-1).gather(-1, ids[0, len(before) :, None])[:, 0]

        policy = logps()
        with torch.no_grad(), model.disable_adapter():
            reference = logps()
        signal_ = (2 * reward - 1) - beta * (policy.detach() - reference)
        total = total - (signal_ * policy).sum()
    (total / (len(prompts) * length)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_gradient_of_reinforce_is_the_paper_s(beta: float, tmp_path: Path) -> None:
    """Plain SGD with rate 20 moves δ by 20 times the gradient. In the second step the KL is not 0 any more."""
    reward, record = Samples(), Recorder()
    run = reinforce(
        tmp_path,
        reward,
        beta=beta,
        optim="sgd",
        learning_rate=20.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )
    run.add_callback(record)
    run.train()
    if beta:
        assert logged(run, "kl")[0] == 0
        assert logged(run, "kl")[1] != 0
    for step in (0, 1):
        at = get_peft_model(tiny_llama(), SVFConfig(target_modules="all-linear"))
        for name, delta in deltas(at).items():
            delta.copy_(record.seen[step][name])
        expected = analytic_gradient(at, reward.seen[step], beta, length=6)
        moved = {name: (record.seen[step][name] - record.seen[step + 1][name]) / 20 for name in record.seen[step]}
        assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3
        for name, gradient in expected.items():
            found = moved[name.replace(".default.", ".")]
            assert (found - gradient).abs().max() <= 1e-6, name


def test_reinforce_draws_one_completion_for_each_prompt(tmp_path: Path) -> None:
    reward = Samples()
    run = reinforce(tmp_path, reward)
    run.train()
    assert len(reward.seen) == 2
    for prompts, _, _ in reward.seen:
        assert len(prompts) == len(set(prompts)) == 8
    assert logged(run, "reward") == [0.5, 0.5]


def test_a_completion_that_nothing_scores_teaches_nothing(tmp_path: Path) -> None:
    run = reinforce(tmp_path, Samples([None]), beta=0.0, max_steps=1)
    run.train()
    assert all(delta.abs().max() == 0 for delta in deltas(run.model).values())
    unsigned = reinforce(tmp_path, Samples([0.0]), beta=0.0, max_steps=1, signed_rewards=False)
    unsigned.train()
    assert all(delta.abs().max() == 0 for delta in deltas(unsigned.model).values())
    signed = reinforce(tmp_path, Samples([0.0]), beta=0.0, max_steps=1)
    signed.train()
    assert all(delta.abs().max() > 0 for delta in deltas(signed.model).values())


def test_reinforce_shows_its_signal_in_the_table_of_completions(tmp_path: Path) -> None:
    run = reinforce(tmp_path, Samples(), max_steps=1)
    run.train()
    assert sorted(run._logs["advantages"]) == [-1.0] * 4 + [1.0] * 4


def test_reinforce_with_a_batch_of_one(tmp_path: Path) -> None:
    run = reinforce(tmp_path, Samples(), max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=3)
    run.train()
    assert run.state.global_step == 1


def test_reinforce_evaluates_on_more_rows_than_it_trains_on(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 16}
    run = reinforce(tmp_path, Samples(), max_steps=1, **options)
    run.train()
    assert logged(run, "eval_reward") == [0.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 4}, "`num_generations` must be 1"),
        ({"num_iterations": 2}, "`num_iterations` must be 1"),
        ({"steps_per_generation": 2}, "`steps_per_generation` .2. must not be greater"),
        ({"per_device_train_batch_size": 1}, "two or more completions per step"),
    ],
)
def test_reinforce_refuses_what_it_is_not(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        ReinforceConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)


# -------------------------------------------------------------------------------------------------------------- tasks

SUMS = "reasoning_gym:chain_sum?min_digits=1&max_digits=1&min_terms=2&max_terms=2"
PRODUCTS = "reasoning_gym:products?min_digits=1&max_digits=1&min_terms=2&max_terms=2"


def questions(rows: Any) -> list[str]:
    return [next(m["content"] for m in reversed(prompt) if m["role"] == "user") for prompt in rows["prompt"]]


def test_the_splits_of_tasks_share_no_question() -> None:
    asked: dict[str, set[str]] = {split: set() for split in SPLITS}
    for spec in (SUMS, PRODUCTS):
        task = find_task(spec)
        for split in SPLITS:
            rows = task.examples(split, 100)
            found = questions(rows)
            assert len(found) > 5
            if split != "train":
                assert len(set(found)) == len(found)
            asked[split] |= {" ".join(sorted(question.split())) for question in found}
    assert not asked["train"] & asked["test"]
    assert not asked["train"] & asked["validation"]
    assert not asked["validation"] & asked["test"]


def test_a_question_and_its_mirror_are_on_one_side() -> None:
    for a in range(10):
        for b in range(10):
            assert split_of(f"Calculate {a} * {b}.") == split_of(f"What is {b} * {a}?")
    sides = [split_of(f"Calculate {a} * {b}.") for a in range(40) for b in range(a)]
    shares = {split: sides.count(split) / len(sides) for split in SPLITS}
    assert shares == pytest.approx({"train": 8 / 15, "validation": 2 / 15, "test": 1 / 3}, abs=0.05)


@pytest.mark.parametrize("name", ["syllogism", "letter_counting", "count_primes", "needle_haystack"])
def test_every_split_has_questions(name: str) -> None:
    task = find_task(f"reasoning_gym:{name}")
    assert all(len(task.examples(split, 8)) == 8 for split in SPLITS)


def test_a_task_and_its_verifier() -> None:
    task = find_task(SUMS, system_prompt="Reply with the answer only.", answer_format="number")
    rows = task.examples("test", 8)
    assert rows[0]["prompt"][0] == {"role": "system", "content": "Reply with the answer only."}
    columns = {name: rows[name] for name in rows.column_names if name not in ("prompt", "completion")}
    right = [f"It is {answer}." for answer in rows["answer"]]
    wrong = [str(int(answer) + 1) for answer in rows["answer"]]
    assert task.reward(prompts=rows["prompt"], completions=right, **columns) == [1.0] * 8
    assert task.reward(prompts=rows["prompt"], completions=wrong, **columns) == [0.0] * 8
    assert task.reward(prompts=rows["prompt"], completions=[""] * 8, **columns) == [0.0] * 8
    assert task.examples("test", 8)[:] == rows[:]


@pytest.mark.parametrize(("name", "how"), [("lists", "last_word"), ("letters", "last_word")])
def test_a_task_of_one_s_own(name: str, how: str) -> None:
    task = find_task(f"examples.word_tasks:{name}", answer_format=how)
    parts = [task.examples(split, 300) for split in SPLITS]
    assert not set(questions(parts[0])) & set(questions(parts[2]))
    answers = parts[2]["answer"][:]
    columns = {column: parts[2][column] for column in parts[2].column_names if column not in ("prompt", "completion")}
    assert task.reward(completions=[f'"{answer}".' for answer in answers], **columns) == [1.0] * len(answers)
    for answer in set(answers):  # none is right for many
        assert sum(task.reward(completions=[answer] * len(answers), **columns)) < 0.25 * len(answers)


def test_rows_of_one_s_own_task_are_scored_where_nothing_was_imported(tmp_path: Path) -> None:
    find_task("examples.word_tasks:lists", answer_format="last_word").examples("test", 4).save_to_disk(tmp_path)
    code = f"""
from datasets import load_from_disk
from peft_svf.training.tasks import reasoning_gym_score
rows = load_from_disk({str(tmp_path)!r})
columns = {{name: rows[name] for name in rows.column_names}}
print(reasoning_gym_score(completions=rows["answer"], **columns))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=RECIPES.parents[1])
    assert done.stdout.strip() == "[1.0, 1.0, 1.0, 1.0]", done.stderr


@pytest.mark.parametrize("labels", [[], ["math"], ["math", "Math "], ["math", ""], [True, False]])
def test_categories_that_cannot_be_told_apart(labels: list[Any]) -> None:
    with pytest.raises(ValueError, match="`categories` must have two or more names"):
        ClassificationTask(dict.fromkeys(labels, find_task(SUMS)))


def test_a_verifier_that_fails_on_an_answer_has_refused_it() -> None:
    task = find_task("reasoning_gym:prime_factorization", answer_format="line")
    rows = task.examples("test", 2)
    columns = {name: rows[name] for name in rows.column_names if name not in ("prompt", "completion")}
    completions = ["The prime factorization of it can be found", rows["answer"][1]]
    assert task.reward(prompts=rows["prompt"], completions=completions, **columns) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("reasoning_gym:chian_sum", "'reasoning_gym' has no dataset 'chian_sum'; it has (.*)chain_sum"),
        ("reasoning_gym:chain_sum?max_digit=1", "'chain_sum' refuses .*max_digits"),
        ("reasoning_gym:chain_sum?min_digits=3&max_digits=1", "'chain_sum' refuses"),
        ("reasoning_gym:rearc", "refuses its own reference answer"),
        ("chain_sum", "no task 'chain_sum'; expected MODULE:NAME"),
        ("reasoning_gym:", "no task 'reasoning_gym:'; expected MODULE:NAME"),
        ("os:chain_sum", "'os' has no dataset 'chain_sum'; it has none"),
        ("reasoning_gym:lists", "'reasoning_gym' has no dataset 'lists'"),
        ("reasoning_gym:chain_sum?size=5", "must not set seed or size"),
        ("no_such_module:chain_sum", "'no_such_module' of a task cannot be imported: No module named"),
    ],
)
def test_a_task_that_does_not_exist(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_task(spec)


def test_an_answer_format_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="no answer format 'numbr'; expected one of number, word"):
        find_task(SUMS, answer_format="numbr")


def test_settings_of_a_task_are_json_or_text() -> None:
    task = find_task('reasoning_gym:basic_arithmetic?operators=["%2B","-"]&allow_parentheses=false&max_terms=2')
    assert task.settings == {"operators": ["+", "-"], "allow_parentheses": False, "max_terms": 2}  # type: ignore[attr-defined]


class Few:
    """A task with seven examples."""

    name = "few"

    def __init__(self, task: Any) -> None:
        self.reward, self.task = task.reward, task

    def examples(self, split: Any, size: int) -> Any:
        return self.task.examples(split, min(size, 7))


def test_the_classification_expert_never_sees_a_test_question() -> None:
    tasks = {"sums": find_task(SUMS), "products": find_task(PRODUCTS)}
    task = ClassificationTask(tasks)
    tested = {question for one in tasks.values() for question in questions(one.examples("test", 1000))}
    rows = task.examples("train", 400)
    assert rows["answer"][:] == ["sums", "products"] * 200  # as many of each in every step, if not shuffled
    few = ClassificationTask({"sums": tasks["sums"], "products": Few(tasks["products"])}).examples("train", 400)
    assert few["answer"][:] == ["sums", "products"] * 7  # also where one has fewer prompts
    asked = {question.removeprefix('Text: "').removesuffix('"') for question in questions(rows)}
    assert len(asked) > 50
    assert not asked & tested
    assert {split_of(question) for question in asked} == {"train"}
    columns = {name: rows[name][:3] for name in ("answer", "categories")}
    named = [" sums", "This is about products, not sums.", "sumsum"]
    assert task.reward(completions=named, **columns) == [1.0, 0.0, 0.0]


# ------------------------------------------------------------------------------------------ evaluation, callbacks


def validation(count: int = 4) -> Any:
    return datasets.Dataset.from_dict({"prompt": [f"{a}+1=" for a in range(count)], "answer": list(range(count))})


def test_greedy_accuracy_is_the_mean_over_all_rows_whatever_the_batches() -> None:
    model = tiny_llama()
    seen = []

    def first_only(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        seen.append(len(prompts))
        return [float(prompt == "0+1=") for prompt in prompts]

    model.train()
    assert greedy_accuracy(model, tokenizer(), validation(5), first_only, batch_size=2, max_new_tokens=3) == 0.2
    assert seen == [2, 2, 1]
    assert model.training


def test_greedy_accuracy_chooses_the_best_model_and_stops(tmp_path: Path) -> None:
    values = iter([0.5, 0.9, 0.1, 0.2, 0.3])

    def falling(prompts: list[str], **columns: Any) -> list[float]:
        return [value] * len(prompts)

    class Next(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            nonlocal value
            value = next(values)

    value = 0.0
    evaluation = GreedyEvaluation(validation(), falling, max_new_tokens=2)
    run = trainer(
        "GRPO",
        tmp_path,
        max_steps=5,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_accuracy",
        per_device_eval_batch_size=16,
        num_generations_eval=1,
    )
    record = Recorder()
    for callback in (record, Next(), evaluation, EarlyStoppingCallback(2)):
        run.add_callback(callback)
    run.train()
    assert run.state.global_step == 4  # two without improvement after the best
    assert run.state.best_global_step == 2
    assert run.state.best_metric == pytest.approx(0.9)
    assert_same(deltas(run.model), record.seen[2])
    assert logged(run, "eval_accuracy") == pytest.approx([0.5, 0.9, 0.1, 0.2])


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_equal_rewards_are_called_out_once(kind: str, tmp_path: Path) -> None:
    def same(completions: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(completions)

    run = trainer(kind, tmp_path, reward=same, max_steps=5, beta=0.0)
    run.add_callback(EqualRewards(patience=3))
    with pytest.warns(UserWarning, match=r"last 3 logged steps \(up to step 3, mean reward 0\).*no gradient") as caught:
        run.train()
    assert sum("no gradient" in str(warning.message) for warning in caught) == 1


def test_different_rewards_are_not_called_out(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    run = trainer("GRPO", tmp_path, max_steps=3)
    run.add_callback(EqualRewards(patience=1))
    run.train()
    assert not any("no gradient" in str(warning.message) for warning in recwarn)


def test_delta_that_was_cast_to_16_bit_is_called_out_and_cast_back(tmp_path: Path) -> None:
    """TRL casts everything trainable to bf16 on a quantized base model."""
    run = trainer("GRPO", tmp_path, max_steps=1)
    for delta in deltas(run.model).values():
        delta.data = delta.data.to(torch.bfloat16)
    for name, parameter in run.model.named_parameters():
        if ".svf_delta." in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    with pytest.warns(UserWarning, match=r"14 vectors δ are in 16 bit.*ExactState"):
        run.model.train()
    run.add_callback(ExactState())
    with pytest.warns(UserWarning, match="14 vectors δ were cast to 16 bit.*fp32 again"):
        run.train()
    assert all(delta.dtype == torch.float32 and delta.abs().max() > 0 for delta in deltas(run.model).values())


@pytest.mark.parametrize("kind", ["GRPO", "RLOO", "SFT"])
def test_a_resumed_run_equals_one_that_was_not_interrupted(kind: str, tmp_path: Path) -> None:
    """Bit for bit, with layers that fold."""
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    folded = []

    class Folded(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            folded.append(sum(m.fold.weight is not None for m in model.modules() if hasattr(m, "fold")))

    whole, record = trainer(kind, tmp_path / "whole", **options), Recorder()
    for callback in (record, Folded(), ExactState()):
        whole.add_callback(callback)
    whole.train()
    assert max(folded) > 0
    again, resumed = trainer(kind, tmp_path / "again", **options), Recorder()
    for callback in (resumed, ExactState()):
        again.add_callback(callback)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for step in (2, 3, 4, 5, 6):
        assert_same(resumed.seen[step], record.seen[step])


# -------------------------------------------------------------------------------------------------------- checkpoints


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    run = trainer("SFT", tmp_path, save_strategy="steps", save_steps=1, max_steps=4)
    run.train()
    assert last_complete(tmp_path) == tmp_path / "checkpoint-4"
    torch.save({}, other := tmp_path / "checkpoint-4" / "rng_state_1.pth")
    assert is_complete(tmp_path / "checkpoint-4")
    other.write_bytes(other.read_bytes()[:-10])  # the other process was killed while it wrote
    assert last_complete(tmp_path) == tmp_path / "checkpoint-3"
    state = (tmp_path / "checkpoint-3" / "trainer_state.json").read_text()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text(state[: len(state) // 2])
    assert last_complete(tmp_path) == tmp_path / "checkpoint-2"
    weights = (tmp_path / "checkpoint-2" / ADAPTER).read_bytes()
    (tmp_path / "checkpoint-2" / ADAPTER).write_bytes(weights[: len(weights) // 2])
    assert last_complete(tmp_path) == tmp_path / "checkpoint-1"
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text(state)  # but no weights
    with pytest.warns(UserWarning, match="checkpoint-10 is incomplete"):
        discard_incomplete(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1"]
    assert not is_complete(tmp_path / "nowhere")


# -------------------------------------------------------------------------------------------------------------- plots


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = get_peft_model(tiny_llama(), SVFConfig(target_modules="all-linear"))
    for i, delta in enumerate(deltas(model).values()):
        delta.fill_(0.01 * (i + 1))
    found = adapter_deltas(model)
    layers, kinds, sizes = delta_sizes(found)
    assert layers == [0, 1]
    assert len(kinds) == 7
    assert sizes == pytest.approx(0.01 * np.arange(1, 15).reshape(2, 7))
    plot_deltas(found, tmp_path / "delta.png", title="t")
    history = [{"step": 1, "reward": 0.1, "kl": 0.0}, {"step": 2, "reward": 0.4}, {"step": 2, "eval_accuracy": 0.5}]
    plot_curves(history, tmp_path / "curve.png")
    plot_curves([], tmp_path / "empty.png")
    for name in ("delta", "curve", "empty"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------------------------- script


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


def write_base(folder: Path) -> Path:
    """A folder with a tiny model and its tokenizer."""
    tiny_llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


def write_data(folder: Path) -> Path:
    """A dataset of text questions, as a folder of JSON lines."""
    folder.mkdir()
    for split, numbers in (("train", range(0, 60)), ("test", range(60, 70))):
        lines = [json.dumps({"question": f"{n}+1=", "solution": str(n + 1)}) for n in numbers]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def script(base: Path, data: Path, output: Path, **options: Any) -> list[str]:
    chosen = {
        "model_name_or_path": base,
        "dataset_name": data,
        "prompt_column": "question",
        "answer_column": "solution",
        "reward_funcs": "test_training.early_letters",
        "output_dir": output,
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "validation_size": 6,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "disable_tqdm": True,
        **options,
    }
    return [word for name, value in chosen.items() if value is not None for word in (f"--{name}", str(value))]


def early_letters(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """A reward by dotted path, which needs the column `answer`."""
    return many_early_letters(completions)


@pytest.mark.parametrize("objective", ["grpo", "rloo", "reinforce"])
@pytest.mark.parametrize("method", ["svf", "lora", "ia3"])
def test_the_script_trains_and_leaves_a_whole_adapter(
    objective: str, method: str, base: Path, data: Path, tmp_path: Path
) -> None:
    generations = None if objective == "reinforce" else 4
    options = script(
        base, data, tmp_path / "expert", objective=objective, peft_type=method, num_generations=generations
    )
    record = main(options)
    output = tmp_path / "expert"
    assert {"adapter_config.json", ADAPTER, "README.md", "training.json", "curve.png"} <= set(os.listdir(output))
    assert (output / "delta.png").exists() == (method == "svf")
    assert not list(output.glob("*.bin"))
    assert not list(output.glob(".*"))
    loaded = PeftModel.from_pretrained(tiny_llama(), output)
    assert loaded.peft_config["default"].base_model_name_or_path == str(base)
    if method == "svf":
        assert_same(deltas(loaded), load_file(output / ADAPTER))
        assert any(delta.abs().max() > 0 for delta in deltas(loaded).values())
    saved = json.loads((output / "training.json").read_text())
    assert saved["recipe"]["max_steps"] == 3
    assert saved["test_questions"] == 10
    assert [entry["step"] for entry in saved["history"] if "eval_accuracy" in entry] == [1, 2, 3]
    assert saved["accuracy_after"] == record.accuracy_after
    card = (output / "README.md").read_text()
    assert f"**{record.accuracy_after:.3f}** after" in card
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])["max_steps"] == 3


def test_a_classification_expert_is_reported_by_category(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_svf.training.run.check_outcome", lambda trainer: None)  # a random model names none
    chat = tokenizer()
    chat.chat_template = "{% for message in messages %}{{ message['content'] + ';' }}{% endfor %}"
    chat.save_pretrained(base)
    chosen = ("dataset_name", "prompt_column", "answer_column", "reward_funcs")
    options = {**dict.fromkeys(chosen), "categories": json.dumps({"sums": SUMS, "products": PRODUCTS})}
    arguments = script(base, tmp_path, tmp_path / "expert", **options, max_steps=1, test_size=5, save_strategy="no")
    assert parse(arguments)[1].shuffle_dataset is False
    assert parse([*arguments, "--shuffle_dataset", "true"])[1].shuffle_dataset is True
    assert parse(["--task", SUMS])[1].shuffle_dataset is True
    trainer, data, _ = build(*parse(arguments)[:4])
    for rows in (trainer.train_dataset, trainer.eval_dataset):
        assert rows[0]["prompt"].endswith('";Category:')  # text, for TRL would open another turn
        assert rows.column_names == data["train"].column_names
    assert data["test"][0]["prompt"][-1]["content"] == "Category:"
    begun = data["train"][0]["prompt"]
    with pytest.raises(ValueError, match="Use one form for all"):
        for_trl(datasets.Dataset.from_list([{"prompt": begun}, {"prompt": begun[:-1]}]), parse(arguments)[2])
    record = main(arguments)
    by_category = json.loads((tmp_path / "expert" / "training.json").read_text())["accuracy_by_category"]
    assert set(by_category) == {"sums", "products"}
    assert (3 * by_category["sums"] + 2 * by_category["products"]) / 5 == pytest.approx(record.accuracy_after)
    assert "By category: sums " in (tmp_path / "expert" / "README.md").read_text()


def test_a_recipe_and_the_command_line(tmp_path: Path, base: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("objective: rloo\nlearning_rate: 0.005\nmax_steps: 7\npeft_kwargs: {bias: none}\n")
    _, training, adapter, _, given = parse(["--config", str(recipe), "--max_steps", "9"])
    assert type(training).__name__ == "RLOOConfig"
    assert (training.learning_rate, training.max_steps) == (0.005, 9)
    assert adapter.peft_kwargs == {"bias": "none"}
    assert given == {"objective": "rloo", "learning_rate": 0.005, "max_steps": 9, "peft_kwargs": {"bias": "none"}}
    assert parse(["--objective", "grpo", "--peft_type", "lora"])[1].learning_rate == 1e-4
    training = parse([])[1]
    assert training.learning_rate == 3e-3
    assert training.metric_for_best_model == "eval_accuracy"
    training = parse(["--objective", "reinforce"])[1]
    assert (training.learning_rate, training.max_grad_norm, training.num_generations) == (2e-3, 1e-3, 1)


def test_every_recipe_parses_and_its_task_exists() -> None:
    recipes = sorted(RECIPES.glob("*.yaml"))
    assert len(recipes) >= 5
    from peft_svf.training.recipe import find_script_task

    for recipe in recipes:
        arguments, _, adapter, _, _ = parse(["--config", str(recipe)])
        adapter_config(adapter)
        if arguments.task or arguments.categories:
            task = find_script_task(arguments)
            assert task is not None
            assert len(task.examples("train", 4)) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_name_or_path": None}, "No base model is given"),
        ({"dataset_name": None}, "Expected one of --task, --categories"),
        ({"task": SUMS, "prompt_column": None, "answer_column": None}, "both task and dataset_name are given"),
        ({"reward_funcs": None}, "The dataset has no rewards"),
        ({"reward_funcs": "nubmer"}, "no reward function 'nubmer'"),
        ({"prompt_column": "text"}, "no column 'text'; it has question, solution"),
        ({"dataset_train_split": "training"}, "no split 'training'; it has train, test"),
        ({"validation_size": 60}, "has 60 examples, too few to hold out validation_size=60"),
        ({"peft_type": "svd"}, "PEFT has no method 'svd'; it has .*svf"),
        ({"peft_type": "svf", "peft_kwargs": '{"rank": 3}'}, "SVFConfig has no field 'rank'"),
        ({"peft_kwargs": "rank=3"}, "`peft_kwargs` must be JSON"),
        ({"r": 2, "peft_type": "lora"}, "--r would have no effect: it is for --peft_type svf, not lora"),
        ({"lora_r": 2}, "--lora_r would have no effect: it is for --peft_type lora, not svf"),
        ({"answer_format": "number"}, "--answer_format would have no effect: it is for --task"),
        ({"early_stopping_patience": 2, "eval_strategy": "no"}, "--early_stopping_patience would have no effect"),
        ({"peft_type": "lora", "peft_kwargs": '{"init_lora_weights": "nonsense"}'}, "init_lora_weights"),
        ({"resume_from_checkpoint": "nowhere"}, "no complete checkpoint in nowhere"),
        ({"objective": "ppo"}, "`objective` must be one of sft, dpo, grpo, rloo, reinforce, got 'ppo'"),
    ],
)
def test_options_that_make_no_sense(
    options: dict[str, Any], message: str, base: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        main(script(base, data, tmp_path / "expert", **options))


@pytest.mark.parametrize(("words", "on"), [((), False), (("--gradient_checkpointing", "true"), True)])
def test_a_deprecated_option_counts_and_our_defaults_use_none(words: tuple[str, ...], on: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FutureWarning)
        training = parse(["--use_cpu", "true", "--bf16", "false", *words])[1]
    assert training.gradient_checkpointing is on
    assert on or not any("deprecated" in str(warning.message) for warning in caught)


def test_options_do_not_depend_on_types_that_others_have_made() -> None:
    """`typing` gives `Union[str, dict]` for `Union[dict, str]` if somebody has asked for that shortly before."""
    assert Optional[Union[str, dict[str, str]]]
    assert Optional[Union[str, dict[str, Any]]]
    script, _, adapter, _, _ = parse(["--categories", '{"a": "x", "b": "y"}', "--peft_kwargs", '{"bias": "none"}'])
    assert script.categories == {"a": "x", "b": "y"}
    assert adapter.peft_kwargs == {"bias": "none"}


def test_an_option_is_not_abbreviated() -> None:
    with pytest.raises(ValueError, match="--obj"):
        parse(["--obj", "rloo"])


def test_no_secret_gets_into_the_card(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("env: {SOME_TOKEN: secret}\nmax_steps: 3\n")
    assert parse(["--config", str(recipe), "--hub_token", "secret"])[4] == {"max_steps": 3}


def test_another_run_s_folder_is_left_alone(base: Path, data: Path, tmp_path: Path) -> None:
    options = script(base, data, tmp_path / "expert", max_steps=1, lr_scheduler_type="constant")
    main(options)
    before = load_file(tmp_path / "expert" / ADAPTER)
    with pytest.raises(ValueError, match=r"holds checkpoints of an earlier run, up to checkpoint-1\."):
        main([*options, "--seed", "5"])
    for _ in range(2):  # a job that always resumes, although the run is done
        record = main([*options, "--resume_from_checkpoint", "true"])
        assert [entry["step"] for entry in record.history if "reward" in entry] == [1]
        assert_same(load_file(tmp_path / "expert" / ADAPTER), before)
    record = main([*options, "--resume_from_checkpoint", "true", "--max_steps", "2"])
    assert [entry["step"] for entry in record.history if "reward" in entry] == [1, 2]


async def judged(completions: list[str], trainer_state: Any, log_metric: Any, **columns: Any) -> list[float]:
    """TRL takes coroutines, and passes these arguments."""
    log_metric("judged", 1.0)
    return many_early_letters(completions)


def test_a_coroutine_that_logs(base: Path, data: Path, tmp_path: Path) -> None:
    record = main(script(base, data, tmp_path / "expert", reward_funcs="test_training.judged", max_steps=1))
    assert record.accuracy_after is not None
    assert any("judged" in entry for entry in record.history)


def test_an_adapter_is_saved_before_it_is_tested(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_svf.training.run.greedy_accuracy", fails)
    with pytest.raises(KeyboardInterrupt):
        main(script(base, data, tmp_path / "expert", max_steps=1, save_strategy="no", eval_strategy="no"))
    PeftModel.from_pretrained(tiny_llama(), tmp_path / "expert")


def test_a_dataset_with_completions(base: Path, tmp_path: Path) -> None:
    """TRL keeps the column "completion" to itself."""
    folder = tmp_path / "completions"
    folder.mkdir()
    lines = [json.dumps({"prompt": f"{n}+1=", "completion": "[a-m]"}) for n in range(20)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    options = {"prompt_column": None, "answer_column": None, "reward_funcs": "regex", "max_steps": 1}
    record = main(script(base, folder, tmp_path / "expert", **options))
    assert any("rewards/regex/mean" in entry for entry in record.history)


def test_a_streamed_dataset(base: Path, data: Path, tmp_path: Path) -> None:
    options = {"dataset_streaming": "true", "max_steps": 1, "validation_size": 0, "test_size": 4, "eval_strategy": "no"}
    record = main(script(base, data, tmp_path / "expert", **options))
    assert record.test_size == 4


def test_rivals_by_name() -> None:
    for method, kwargs in (("vera", {"r": 8}), ("tinylora", {}), ("lora", {"use_rslora": True})):
        config = adapter_config(AdapterArguments(peft_type=method, peft_kwargs=kwargs))
        assert config.peft_type.value.lower() == method
        model = get_peft_model(tiny_llama(), config)
        assert any(parameter.requires_grad for parameter in model.parameters())
    assert adapter_config(AdapterArguments(peft_type="svf", r=4)).r == 4
    assert TrainArguments(categories='{"a": "b"}').categories == {"a": "b"}


_fail_at = math.inf


def failing(completions: list[str], **columns: Any) -> list[float]:
    global _fail_at
    _fail_at -= 1
    if _fail_at < 0:
        raise OSError("the grader is gone")
    return many_early_letters(completions)


def test_an_error_in_a_reward_loses_nothing(base: Path, data: Path, tmp_path: Path) -> None:
    global _fail_at
    module = sys.modules["test_training"]
    options = script(
        base, data, tmp_path / "expert", reward_funcs="test_training.failing", save_steps=100, eval_strategy="no"
    )
    module._fail_at = 2
    with pytest.raises(RuntimeError, match=r"'failing' raised OSError: the grader is gone(.|\n)*Completion 0"):
        main(options)
    assert last_complete(tmp_path / "expert") == tmp_path / "expert" / "checkpoint-2"
    assert not (tmp_path / "expert" / ADAPTER).exists()
    module._fail_at = math.inf
    record = main([*options, "--resume_from_checkpoint", "true"])
    assert [entry["step"] for entry in record.history if "reward" in entry] == [1, 2, 3]


def test_several_datasets_in_a_recipe(base: Path, data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mixture.yaml"
    recipe.write_text(yaml.safe_dump({"datasets": [{"path": str(data)}, {"path": str(data)}], "test_split_size": 0.1}))
    record = main(["--config", str(recipe), *script(base, data, tmp_path / "expert", dataset_name=None, max_steps=1)])
    assert record.test_size == 12


# --------------------------------------------------------------------------------------------------------------- crash

# A run is a fork of one process that has imported everything: ten kills, and the seconds of one start.
RUNS = """
import os, sys, test_training
from peft_svf.training.run import main
while sys.stdin.readline():
    pid = os.fork()
    if pid == 0:
        os.dup2(2, 1)
        main(sys.argv[1:])
        sys.exit()
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_ten_times_ends_as_if_it_had_not_been(base: Path, data: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments: every resume works, and δ is that of an uninterrupted run, bit for bit."""
    options: dict[str, Any] = {"max_steps": 24, "save_steps": 1, "eval_strategy": "no", "validation_size": 0}
    main(script(base, data, tmp_path / "whole", **options))
    expected = load_file(tmp_path / "whole" / ADAPTER)

    output, rng, kills = tmp_path / "killed", random.Random(0), 0
    command = [sys.executable, "-c", RUNS, *script(base, data, output, **options), "--resume_from_checkpoint", "true"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    errors = tmp_path / "errors.txt"
    with errors.open("w") as said:
        runs = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, bufsize=0
        )
    assert runs.stdin is not None
    assert runs.stdout is not None

    def ended(seconds: float = 0) -> bool:
        return bool(select.select([runs.stdout], [], [], seconds)[0])

    try:
        while kills <= 10:
            runs.stdin.write(b"\n")
            pid, before = int(runs.stdout.readline()), last_complete(output)
            if kills < 10:
                while last_complete(output) == before and not ended(0.01):
                    pass  # until it trains
                if not ended(rng.uniform(0, 0.3)):
                    os.kill(pid, signal.SIGKILL)
            status = int(runs.stdout.readline())
            assert status in (-signal.SIGKILL, 0), errors.read_text()[-2000:]
            if status == 0:
                assert_same(load_file(output / ADAPTER), expected)
                if kills == 10:
                    break
                shutil.rmtree(output)
            kills += status != 0
    finally:
        runs.kill()
        runs.communicate()


OBJECTIVES = ("grpo", "rloo", "reinforce")
# Two processes import everything once, and fork for each run. Each run needs a port, as torchrun's store is for one.
TOGETHER = """
import json, os, runpy, sys, test_training
for port, (module, *words) in json.loads(sys.argv[1]):
    if (run := os.fork()) == 0:
        os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="False")
        sys.argv[:] = [module, *words]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        sys.exit()
    assert os.waitpid(run, 0)[1] == 0
    if os.environ["RANK"] == "0":
        print("END OF A RUN", flush=True)
"""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@pytest.fixture(scope="module")
def trained_together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    """A folder with a run of three steps and one that stopped after two, per objective; and what each run printed."""
    folder = tmp_path_factory.mktemp("together")
    base, data = write_base(folder / "base"), write_data(folder / "data")
    common: dict[str, Any] = {"lr_scheduler_type": "constant", "use_cpu": True, "save_total_limit": 3}
    lines = []
    for objective in OBJECTIVES:
        common |= {"objective": objective, "num_generations": None if objective == "reinforce" else 4}
        program = ["peft_svf.training.run"] if objective == "grpo" else ["peft_svf", "train"]
        whole, parts = folder / objective / "whole", folder / objective / "parts"
        lines.append([*program, *script(base, data, whole, **common, max_steps=3)])
        lines.append([*program, *script(base, data, parts, **common, max_steps=2)])
        lines.append([*program, *script(base, data, parts, **common, max_steps=3, resume_from_checkpoint=True)])
    together = folder / "together.py"
    together.write_text(TOGETHER)
    # what `accelerate launch --multi_gpu` calls; accelerate itself has no launcher for several CPU processes
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(together), json.dumps(list(zip(free_ports(len(lines)), lines, strict=True)))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = done.stdout.split("END OF A RUN")
    return folder, {objective: printed[3 * i : 3 * i + 3] for i, objective in enumerate(OBJECTIVES)}


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_processes(objective: str, trained_together: tuple[Path, dict[str, list[str]]]) -> None:
    """They train, evaluate and write one expert together, and go on from a checkpoint as if they had not stopped."""
    folder, printed = trained_together[0] / objective, trained_together[1][objective][0]
    assert printed.count("greedy accuracy on 10 test questions") == 1
    saved = json.loads((folder / "whole" / "training.json").read_text())
    assert [entry["step"] for entry in saved["history"] if "eval_accuracy" in entry] == [1, 2, 3]
    expected = load_file(folder / "whole" / ADAPTER)
    assert any(delta.abs().max() > 0 for delta in expected.values())

    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(os.listdir(folder / "parts" / "checkpoint-2"))
    assert_same(load_file(folder / "parts" / ADAPTER), expected)
    tested = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(60, 70)]
    model = PeftModel.from_pretrained(tiny_llama(), folder / "whole")
    alone = greedy_accuracy(model, tokenizer(), tested, early_letters, max_new_tokens=6)
    assert saved["accuracy_after"] == pytest.approx(alone)


def test_what_is_left_of_a_run_is_json_for_every_reader() -> None:
    history = [{"step": 1, "loss": float("nan"), "kl": float("inf"), "reward": 0.5}]
    record = Record("expert", recipe={}, base_model="base", trainable=1, history=history)
    assert json.loads(json.dumps(record.to_dict(), allow_nan=False))["history"] == [
        {"step": 1, "loss": None, "kl": None, "reward": 0.5}
    ]


def test_the_command_line(base: Path, data: Path, tmp_path: Path) -> None:
    testing = pytest.importorskip("typer.testing")
    from peft_svf.cli.app import app

    runner = testing.CliRunner()
    shown = runner.invoke(app, ["--help"])
    assert "train" in shown.output
    wrong = runner.invoke(app, ["train", *script(base, data, tmp_path / "expert", reward_funcs="nubmer")])
    assert wrong.exit_code == 1
    done = runner.invoke(app, ["train", *script(base, data, tmp_path / "expert", max_steps=1), "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout) == json.loads((tmp_path / "expert" / "training.json").read_text())
    assert (tmp_path / "expert" / ADAPTER).exists()


def test_without_trl_training_says_what_it_needs() -> None:
    code = """
import sys
sys.modules["trl"] = None
import peft_svf
try:
    import peft_svf.training
except ImportError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Training needs trl, which is not installed. Run `pip install " in found.stdout
