"""A training or search that taught nothing says so, and leaves nothing that looks like a result."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import base as base
from test_training import data as data
from test_training import script
from test_trl import ADAPTER
from transformers import TrainerCallback

from peft_svf.training.outcome import NothingLearnedError, equal_reward
from peft_svf.training.run import build, main, parse, train

testing = pytest.importorskip("typer.testing")


def zero(completions: list[str], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def one(completions: list[str], **columns: Any) -> list[float]:
    return [1.0] * len(completions)


def by_prompt(prompts: list[str], **columns: Any) -> list[float]:
    """Different rewards for prompts, and the same for all completions of one."""
    return [float(prompt[-3] in "02468") for prompt in prompts]


def nothing(completions: list[str], **columns: Any) -> list[None]:
    return [None] * len(completions)


@pytest.mark.parametrize(
    ("objective", "reward", "advice"),
    [
        ("grpo", "zero", "easier questions"),
        ("rloo", "one", "harder questions"),
        ("grpo", "by_prompt", "easier questions"),
        ("reinforce", "zero", "easier questions"),
        ("grpo", "nothing", "easier questions"),
    ],
)
def test_rewards_without_a_signal(
    objective: str, reward: str, advice: str, base: Path, data: Path, tmp_path: Path
) -> None:
    more = {"num_generations": None} if objective == "reinforce" else {}
    options = script(
        base, data, tmp_path / "expert", objective=objective, reward_funcs=f"test_outcome.{reward}", **more
    )
    with pytest.raises(NothingLearnedError, match=f"got the same reward in all steps .*nothing is saved.*{advice}"):
        main(options)
    left = {path.name for path in (tmp_path / "expert").iterdir()}
    assert not left & {ADAPTER, "curve.png", "delta.png", "training.json"}


def test_one_prompt_with_a_signal_is_enough() -> None:
    flat = {"reward": 0.0, "reward_std": 0.0, "frac_reward_zero_std": 1.0}
    assert equal_reward([flat, flat], 4) == 0.0
    assert equal_reward([flat, {**flat, "reward": 0.5, "frac_reward_zero_std": 0.9}], 4) is None
    # of REINFORCE, whose groups have one completion
    assert equal_reward([flat, {**flat, "reward": 0.5, "reward_std": 0.4}], 1) is None
    assert equal_reward([{"loss": 1.0}], 4) is None


def test_the_command_line_says_it_in_a_line(base: Path, data: Path, tmp_path: Path) -> None:
    from peft_svf.cli.app import app

    options = script(base, data, tmp_path / "expert", reward_funcs="test_outcome.zero", max_steps=1)
    result = testing.CliRunner().invoke(app, ["train", *options])
    assert result.exit_code == 1
    assert "NothingLearnedError: All completions of each prompt" in result.stderr
    assert "saved in" not in result.output
    assert "Traceback" not in result.stderr


class Spoil(TrainerCallback):
    """Make δ not a number in the second step, as a diverging training does."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 1:
            with torch.no_grad():
                [p for p in model.parameters() if p.requires_grad][-1].fill_(math.nan)


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_a_loss_that_is_not_a_number(logging_steps: int, base: Path, data: Path, tmp_path: Path) -> None:
    """It stops at the step that logs it, or at the end, and no checkpoint has it."""
    more = dict.fromkeys(("num_generations", "reward_funcs", "prompt_column", "answer_column"))
    more |= {"prompt_column": "question", "answer_column": "solution", "logging_steps": logging_steps}
    more |= {"eval_strategy": "no", "save_strategy": "steps" if logging_steps == 1 else "no"}
    options = script(base, data, tmp_path / "expert", objective="sft", **more, max_steps=4)
    script_arguments, training, adapter, mixture, given = parse(options)
    trainer, splits, functions = build(script_arguments, training, adapter, mixture)
    trainer.add_callback(Spoil())
    with pytest.raises(NothingLearnedError, match=r"nothing is saved\. Use a smaller --learning_rate than 0\.01"):
        train(trainer, splits, functions, given)
    assert trainer.state.global_step == (2 if logging_steps == 1 else 4)
    assert not (tmp_path / "expert" / ADAPTER).exists()
    assert not (tmp_path / "expert" / "checkpoint-2").exists()


@pytest.mark.parametrize("objective", ["sft", "dpo", "grpo", "reinforce"])
def test_the_rate_of_lora_is_too_low(objective: str) -> None:
    with pytest.warns(UserWarning, match=r"--learning_rate 0\.0002 is too low for SVF, which needs 10 to 30 times"):
        parse(["--objective", objective, "--learning_rate", "2e-4"])


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        ["--objective", "sft"],
        ["--objective", "dpo"],
        ["--objective", "rloo"],
        ["--objective", "reinforce"],
        ["--learning_rate", "2e-4", "--peft_type", "lora"],
        ["--learning_rate", "2e-4", "--optim", "sgd"],
        ["--objective", "sft", "--peft_type", "ia3"],
    ],
)
def test_no_warning_where_the_rate_is_right(options: list[str]) -> None:
    assert parse(options)[1].learning_rate > 0
