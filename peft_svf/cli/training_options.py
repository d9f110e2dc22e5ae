"""The options of `peft-svf train` that most people need, and checks of the command line before TRL is imported.

The options are read by TRL's parser. So this table is a copy, which a test compares with the parser.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from ..utils.recipes import read_recipe
from .choices import OBJECTIVES, check_choice
from .output import ADAPTER, check_output

# Option, placeholder, default, and its help; short enough for a line of 80 columns.
OPTIONS = (
    ("config", "FILE", "", "A YAML file with any of the options."),
    ("model_name_or_path", "NAME", "", "Base model, or an adapter to continue."),
    ("output_dir", "DIR", "outputs/svf-grpo", "Its folder."),
    ("objective", "NAME", "grpo", f"{', '.join(OBJECTIVES[:-1])} or {OBJECTIVES[-1]}."),
    ("data", "PLACE", "", "A file, a folder, or a Hub id."),
    ("task", "SPEC", "", "Such as reasoning_gym:NAME?SETTING=VALUE."),
    ("chat", "BOOL", "False", "Ask texts as messages."),
    ("system_prompt", "TEXT", "", "System message of every prompt."),
    ("reward_funcs", "NAME", "", "Default: the verifier of the task."),
    ("max_steps", "N", "", "Training steps, instead of epochs."),
    ("num_train_epochs", "N", "3.0", "Passes over the data."),
    ("learning_rate", "X", "", "Default: by objective, high for SVF."),
    ("per_device_train_batch_size", "N", "8", "Completions per step."),
    ("num_generations", "N", "8", "Completions per prompt."),
    ("max_completion_length", "N", "512", "Tokens per answer."),
    ("target_modules", "NAME", "all linear", "Modules to adapt."),
    ("r", "N", "all", "Singular values per weight."),
    ("eval_strategy", "NAME", "no", "Or steps: every eval_steps."),
    ("seed", "N", "42", "Seed."),
    ("resume_from_checkpoint", "PATH", "", "true continues the run in output_dir."),
)
_OURS = (
    ("--overwrite", "Replace the adapter in output_dir."),
    ("--json", "Print training.json, and nothing else."),
    ("--help_all", "Show all options, with TRL's."),
)


class TrainCommand(TyperCommand):
    """The command `train`, whose help and completion show the table above."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        rows = [
            (f"--{name} {metavar}", f"{text}{f'  [default: {default}]' if default else ''}")
            for name, metavar, default, text in OPTIONS
        ]
        with formatter.section("Options"):
            formatter.write_dl([*rows, *_OURS, ("--help", "Show this message and exit.")], col_max=34)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        found = super().shell_complete(ctx, incomplete)
        if incomplete.startswith("-"):
            item = type(super().shell_complete(ctx, "--help")[0])  # typer copies click, whose class it does not export
            names = [*(f"--{name}" for name, *_ in OPTIONS), *(name for name, _ in _OURS)]
            found += [item(name) for name in names if name.startswith(incomplete)]
        return found


def check_words(words: Sequence[str], overwrite: bool) -> None:
    """
    Check the objective, the recipe and the output folder of a command line. With `overwrite`, delete the checkpoints in
    the folder, which would stop the new run.

    Raises:
        ValueError: The objective is unknown, the recipe is no YAML mapping, or the folder holds an adapter.
        ImportError: PyYAML is not installed.
        OSError: The recipe cannot be read, or the folder cannot be written.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("config", "objective", "output_dir", "peft_type", "resume_from_checkpoint"):
        parser.add_argument(f"--{name}")
    try:
        given = vars(parser.parse_known_args(list(words))[0])
    except argparse.ArgumentError as error:
        raise ValueError(f"{error}. `peft-svf train --help` lists the options.") from error
    recipe = read_recipe(given["config"]) if given["config"] else {}
    chosen = {**recipe, **{name: value for name, value in given.items() if value is not None}}
    objective = str(chosen.get("objective", "grpo"))
    check_choice("--objective", objective, OBJECTIVES)
    folder = chosen.get("output_dir") or f"outputs/{str(chosen.get('peft_type') or 'svf').lower()}-{objective}"
    resume = str(chosen.get("resume_from_checkpoint") or "false").lower() != "false"
    check_output(Path(str(folder)), ADAPTER, overwrite or resume)
    if overwrite and not resume:
        for checkpoint in Path(str(folder)).glob("checkpoint-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)  # another process of the same run may delete it, too
