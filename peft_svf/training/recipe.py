"""The options of a training run: from a YAML recipe and the command line, with the task and rewards that they name."""

from __future__ import annotations

import argparse
import copy
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl import DatasetMixtureConfig, TrlParser

from ..scoring.rewards import REWARDS, checked, find_reward
from ..scoring.sources import place_and_split
from ..utils.recipes import read_recipe
from .arguments import OBJECTIVES, AdapterArguments, TrainArguments, check_given, defaults, warn_of_low_rate
from .continuing import continue_from, saved_config
from .supervised import SUPERVISED
from .tasks import ClassificationTask, Task, find_task

# Options without meaning for the run, or private to the machine. They are left out of the model card.
_OF_THE_MODEL = ("model_name_or_path", "model_revision", "adapter_name_or_path")
_LEFT_OUT = ("base_model_name", "config", "disable_tqdm", "env", "output_dir", "resume_from_checkpoint")


def parse(argv: Sequence[str]) -> tuple[TrainArguments, Any, AdapterArguments, DatasetMixtureConfig, dict[str, Any]]:
    """
    Return the options of the recipe and the command line, which overrides the recipe. The fifth value holds the options
    that were given, for the model card.

    Raises:
        ValueError: An option is invalid, or would have no effect.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", "objective", "peft_type", "categories", *_OF_THE_MODEL):
        first.add_argument(f"--{name}")
    known, _ = first.parse_known_args(argv)
    recipe = read_recipe(known.config) if known.config else {}
    objective = known.objective or recipe.get("objective", "grpo")
    model, revision, expert = (getattr(known, key) or recipe.get(key) for key in _OF_THE_MODEL)
    if objective not in OBJECTIVES:
        raise ValueError(f"`objective` must be one of {', '.join(OBJECTIVES)}, got {objective!r}.")

    config_class: Any = OBJECTIVES[objective][0]
    kinds = (TrainArguments, config_class, AdapterArguments, DatasetMixtureConfig)
    usage = "peft-svf train [--config RECIPE.yaml] [--OPTION VALUE]..."  # in an error, all options would fill screens
    parser = TrlParser(kinds, prog="peft-svf train", usage=usage, allow_abbrev=False)
    _check_options(parser, [*(word.partition("=")[0] for word in argv), *(f"--{name}" for name in recipe)])
    saved = saved_config(model, revision) if expert is None else saved_config(expert)
    if expert is not None and saved is None:
        raise ValueError(f"--adapter_name_or_path {expert} is not an adapter: it has no adapter_config.json.")
    peft_type = known.peft_type or recipe.get("peft_type") or (saved.peft_type.value if saved else "svf")
    chosen = defaults(objective, peft_type)
    if known.categories or recipe.get("categories"):
        chosen["shuffle_dataset"] = False  # each step then has as many prompts of each category
    given = {**recipe, **_given_on_command_line(parser, argv)}
    if "gradient_checkpointing" in given:
        # transformers ignores the old name where the new one is set, and warns where only the old one is.
        chosen.pop("activation_checkpointing", None)
    chosen = {name: value for name, value in chosen.items() if name in config_class.__dataclass_fields__}
    parser.set_defaults_with_config(**chosen)
    script, training, adapter, mixture = parser.parse_args_and_config(list(argv))
    if saved is not None:
        continue_from(adapter, saved, given)
    check_given(given, script, adapter, training)
    warn_of_low_rate(training, peft_type)
    given = {name: value for name, value in given.items() if name not in _LEFT_OUT and not name.endswith("_token")}
    place, split = place_and_split(script.dataset_name or "")
    if "dataset_name" in given and Path(place).is_absolute():  # the rest of the path is private
        given["dataset_name"] = Path(place).name + (f":{split}" if split else "")
    if script.base_model_name and saved is None:
        given["model_name_or_path"] = script.base_model_name
    return script, training, adapter, mixture, given


def find_script_task(script: TrainArguments) -> Task | None:
    """Return the task that the options name; `None` for a dataset."""
    options: dict[str, Any] = {"system_prompt": script.system_prompt, "answer_format": script.answer_format}
    if script.categories:
        assert isinstance(script.categories, dict)
        return ClassificationTask({label: find_task(spec, **options) for label, spec in script.categories.items()})
    return find_task(script.task, **options) if script.task else None


def recipe_task(recipe: str | Path) -> Task:
    """
    Return the task of a recipe.

    Raises:
        ValueError: The recipe names a dataset, not a task.
    """
    task = find_script_task(parse(["--config", str(recipe)])[0])
    if task is None:
        raise ValueError(f"The recipe {recipe} has no `task` and no `categories`; one of them is needed here.")
    return task


def recipe_answer_length(recipe: str | Path) -> int | None:
    """Return the longest answer of a recipe in tokens; `None` if its training finds it in the data."""
    length: int | None = parse(["--config", str(recipe)])[1].max_completion_length
    return length


def load_rewards(script: TrainArguments, task: Task | None, *, answers: bool) -> list[Any]:
    """
    Return the reward model and the reward functions, whose errors name the completion. SFT and DPO need none, and use
    them in the evaluation only; for SFT with `answers` it is `exact` by default.

    Raises:
        ValueError: There are none.
    """
    functions = [find_reward(name) for name in script.reward_funcs or []]
    models = [script.reward_model_name_or_path] if script.reward_model_name_or_path else []
    if not functions and not models:
        if task is None and script.objective in SUPERVISED:
            return [REWARDS["exact"]] if answers and script.objective == "sft" else []
        if task is None:
            raise ValueError("The dataset has no rewards. Pass --reward_funcs or --reward_model_name_or_path.")
        functions = [task.reward]
    return [*models, *(checked(function, script.reward_timeout) for function in functions)]


def _check_options(parser: TrlParser, words: Sequence[str]) -> None:
    """Refuse an option that does not exist, with the name of a similar one."""
    known = {*parser._option_string_actions, "--config", "--env"}
    for word in words:
        if word.startswith("--") and word not in known:
            close = difflib.get_close_matches(word, known, 1, cutoff=0.75)
            hint = f"Did you mean {close[0]}?" if close else "`peft-svf train --help_all` lists all options."
            raise ValueError(f"There is no option {word}. {hint}")


def _given_on_command_line(parser: TrlParser, argv: Sequence[str]) -> dict[str, Any]:
    """Parse the command line again without any defaults."""
    bare = argparse.ArgumentParser(parser.prog, parser.usage, add_help=False, argument_default=argparse.SUPPRESS)
    for action in parser._actions:
        if action.option_strings and action.dest != "help":
            action = copy.copy(action)
            action.default, action.required = argparse.SUPPRESS, False
            bare._add_action(action)
    return vars(bare.parse_known_args(list(argv))[0])
