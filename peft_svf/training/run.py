"""Train an expert, or a rival, by reinforcement learning, from the command line.

    python -m peft_svf.training.run --config recipe.yaml [--any_option value]
    accelerate launch -m peft_svf.training.run --config recipe.yaml
    peft-svf train --config recipe.yaml

Built on TRL's own parts: every option of `GRPOConfig`, `RLOOConfig` or `ReinforceConfig` (by `--objective`), of
`ModelConfig`, `ScriptArguments` and `DatasetMixtureConfig` is there, on the command line and in the YAML file.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, load_dataset
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback
from trl import DatasetMixtureConfig, TrlParser, get_dataset, get_quantization_config

from ..scoring import checked, find_reward
from .arguments import OBJECTIVES, AdapterArguments, TrainArguments, adapter_config, defaults
from .callbacks import EqualRewards, ExactState, RewardBar
from .checkpoints import discard_incomplete, last_complete, save_whole
from .evaluation import GreedyEvaluation, greedy_accuracy
from .report import Record, example_of, write_report
from .tasks import ClassificationTask, Task, find_task

Splits = dict[str, Dataset]


def main(argv: Sequence[str] | None = None) -> Record:
    """Train, evaluate, save. Returns the numbers that the model card shows."""
    return train(*parse(sys.argv[1:] if argv is None else argv))


def parse(argv: Sequence[str]) -> tuple[TrainArguments, Any, AdapterArguments, DatasetMixtureConfig, dict[str, Any]]:
    """The options, from the recipe and the command line, which has the last word; the fifth are those that were given,
    for the model card."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--config", "--objective", "--peft_type"):
        first.add_argument(name)
    known, _ = first.parse_known_args(argv)
    recipe = _read_recipe(known.config) if known.config else {}
    objective = known.objective or recipe.get("objective", "grpo")
    peft_type = known.peft_type or recipe.get("peft_type", "svf")
    if objective not in OBJECTIVES:
        raise ValueError(f"`objective` must be one of {', '.join(OBJECTIVES)}, got {objective!r}.")

    config_class: Any = OBJECTIVES[objective][0]
    parser = TrlParser((TrainArguments, config_class, AdapterArguments, DatasetMixtureConfig), prog="peft-svf train")
    chosen = defaults(objective, peft_type)
    chosen = {name: value for name, value in chosen.items() if name in config_class.__dataclass_fields__}
    parser.set_defaults_with_config(**chosen)
    script, training, adapter, mixture = parser.parse_args_and_config(list(argv))
    given = {**recipe, **_given_on_command_line(parser, argv)}
    left_out = ("config", "output_dir", "base_model_name", "resume_from_checkpoint")
    given = {name: value for name, value in given.items() if name not in left_out}
    if script.base_model_name:
        given["model_name_or_path"] = script.base_model_name
    return script, training, adapter, mixture, given


def train(
    script: TrainArguments,
    training: Any,
    adapter: AdapterArguments,
    mixture: DatasetMixtureConfig,
    given: dict[str, Any],
) -> Record:
    """Train, evaluate and save, as the arguments say."""
    if adapter.model_name_or_path is None:
        raise ValueError("Which model? Pass --model_name_or_path, a Hub id or a folder.")
    task = find_script_task(script)
    data = load_data(script, mixture, task, seed=training.seed)
    rewards = load_rewards(script, task)
    functions = [reward for reward in rewards if callable(reward)]
    training.model_init_kwargs = {
        "revision": adapter.model_revision,
        "attn_implementation": adapter.attn_implementation,
        "dtype": adapter.dtype,
        **(training.model_init_kwargs or {}),
    }

    _, trainer_class = OBJECTIVES[script.objective]
    evaluates = training.eval_strategy != "no" and functions and "validation" in data
    trainer = trainer_class(
        model=adapter.model_name_or_path,
        reward_funcs=rewards,
        args=training,
        train_dataset=data["train"],
        # TRL's own evaluation samples; ours below decodes greedily and sees the whole split
        eval_dataset=data["validation"].select(range(_few(training, data["validation"]))) if evaluates else None,
        quantization_config=get_quantization_config(adapter),
        peft_config=adapter_config(adapter),
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    name = Path(training.output_dir).name
    trainer.add_callback(RewardBar(f"Training {name}"))
    trainer.add_callback(EqualRewards())
    trainer.add_callback(ExactState())
    if evaluates:
        evaluation = GreedyEvaluation(data["validation"], functions)
        evaluation.report_to(trainer)
        trainer.add_callback(evaluation)
        if script.early_stopping_patience is not None:
            trainer.add_callback(EarlyStoppingCallback(script.early_stopping_patience))

    start = time.perf_counter()
    _train_through_trouble(trainer, training)
    seconds = time.perf_counter() - start

    record = Record(
        name=name,
        recipe=given,
        base_model=script.base_model_name or adapter.model_name_or_path,
        trainable=sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad),
        seconds=seconds,
        history=trainer.state.log_history,
        best_step=trainer.state.best_global_step if training.load_best_model_at_end else None,
    )
    if "test" in data and functions:
        record.test_size, record.example = len(data["test"]), example_of(data["test"][0])
        options: dict[str, Any] = {
            "batch_size": training.per_device_eval_batch_size,
            "max_new_tokens": training.max_completion_length,
        }
        model, tokenizer = trainer.model, trainer.processing_class
        record.accuracy_after = greedy_accuracy(model, tokenizer, data["test"], functions, **options)
        with model.disable_adapter():
            record.accuracy_before = greedy_accuracy(model, tokenizer, data["test"], functions, **options)
        trainer.accelerator.print(
            f"{name}: greedy accuracy on {record.test_size} test questions {record.accuracy_before:.3f} -> "
            f"{record.accuracy_after:.3f}"
        )
    trainer.model.peft_config["default"].base_model_name_or_path = record.base_model
    save_whole(trainer, training.output_dir)
    if trainer.accelerator.is_main_process:
        write_report(trainer.model, record, training.output_dir)
    trainer.accelerator.print(f"saved in {training.output_dir}")
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name or script.task)
    trainer.end()
    return record


def find_script_task(script: TrainArguments) -> Task | None:
    """The task that the options name, if they name one."""
    options: dict[str, Any] = {"system_prompt": script.system_prompt, "answer_format": script.answer_format}
    if script.categories:
        assert isinstance(script.categories, dict)
        return ClassificationTask({label: find_task(spec, **options) for label, spec in script.categories.items()})
    return find_task(script.task, **options) if script.task else None


def recipe_task(recipe: str | Path) -> Task:
    """The task that a recipe trains for.

    Raises:
        ValueError: It names a dataset, not a task.
    """
    task = find_script_task(parse(["--config", str(recipe)])[0])
    if task is None:
        raise ValueError(f"The recipe {recipe} has no `task` and no `categories`.")
    return task


def load_data(script: TrainArguments, mixture: DatasetMixtureConfig, task: Task | None, *, seed: int) -> Splits:
    """The splits `train`, and where there are any, `validation` and `test`, with a column `prompt`.

    Raises:
        ValueError: Neither a task nor a dataset is given, or it lacks a split or column.
    """
    sources = {"task": task, "dataset_name": script.dataset_name, "datasets": mixture.datasets}
    given = [name for name, value in sources.items() if value]
    if len(given) != 1:
        found = f"both {' and '.join(given)} are given" if given else "none is given"
        raise ValueError(f"What to learn? Pass one of --task, --categories, --dataset_name or `datasets`; {found}.")
    if task is not None:
        sizes = {"train": script.train_size, "validation": script.validation_size, "test": script.test_size}
        return {split: task.examples(split, size) for split, size in sizes.items() if size > 0}  # type: ignore[arg-type]
    if mixture.datasets:
        loaded = get_dataset(mixture)
    else:
        loaded = load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
    names = {"train": script.dataset_train_split, "test": script.dataset_test_split, "validation": "validation"}
    if names["train"] not in loaded:
        raise ValueError(f"The dataset has no split {names['train']!r}; it has {', '.join(loaded)}.")
    splits = {split: loaded[name] for split, name in names.items() if name in loaded}
    if "validation" not in splits and script.validation_size > 0 and not script.dataset_streaming:
        if len(splits["train"]) <= script.validation_size:
            raise ValueError(
                f"The training split has {len(splits['train'])} rows, of which validation_size="
                f"{script.validation_size} would be taken off. Pass a smaller --validation_size, or 0."
            )
        parts = splits["train"].train_test_split(test_size=script.validation_size, seed=seed)
        splits |= {"train": parts["train"], "validation": parts["test"]}
    for split, size in (("validation", script.validation_size), ("test", script.test_size)):
        if split in splits and not script.dataset_streaming:
            splits[split] = splits[split].select(range(min(size, len(splits[split]))))
    return {split: _with_prompts(rows, script) for split, rows in splits.items() if split == "train" or len(rows)}


def _with_prompts(rows: Any, script: TrainArguments) -> Any:
    """Give the columns the names that TRL and the rewards expect, and put the system prompt before each prompt."""
    columns = rows.column_names or list(next(iter(rows)))
    wanted = {script.prompt_column: "prompt"} | ({script.answer_column: "answer"} if script.answer_column else {})
    for old, new in wanted.items():
        if old not in columns:
            raise ValueError(f"The dataset has no column {old!r}; it has {', '.join(columns)}.")
        if old != new:
            rows = rows.rename_column(old, new)
    if script.system_prompt:

        def add(row: dict[str, Any]) -> dict[str, Any]:
            prompt = row["prompt"]
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            return {"prompt": [{"role": "system", "content": script.system_prompt}, *messages]}

        rows = rows.map(add)
    return rows


def load_rewards(script: TrainArguments, task: Task | None) -> list[Any]:
    """The reward functions, which name what went wrong, and the reward model.

    Raises:
        ValueError: There is none.
    """
    found = [find_reward(name) for name in script.reward_funcs or []]
    if not found and task is not None and not script.reward_model_name_or_path:
        found = [task.reward]
    if not found and not script.reward_model_name_or_path:
        raise ValueError("How are answers rewarded? Pass --reward_funcs or --reward_model_name_or_path.")
    models = [script.reward_model_name_or_path] if script.reward_model_name_or_path else []
    return [*models, *(checked(function, script.reward_timeout) for function in found)]


def _train_through_trouble(trainer: Any, training: Any) -> None:
    """Train from the last whole checkpoint if asked to; on an error or Ctrl-C, save one first."""
    resume = training.resume_from_checkpoint
    if isinstance(resume, str) and resume.lower() in ("true", "false"):
        resume = resume.lower() == "true"
    if resume is True:
        if trainer.accelerator.is_main_process:
            discard_incomplete(training.output_dir)
        trainer.accelerator.wait_for_everyone()
        newest = last_complete(training.output_dir)
        resume = str(newest) if newest else None
    try:
        trainer.train(resume_from_checkpoint=resume or None)
    except BaseException:
        step = trainer.state.global_step
        # with several processes the others may be anywhere
        if trainer.accelerator.num_processes == 1 and step > 0 and training.save_strategy != "no":
            saved = last_complete(training.output_dir)
            if saved is None or int(saved.name.rpartition("-")[2]) < step:
                trainer._save_checkpoint(trainer.model, None)
            trainer.accelerator.print(
                f"Stopped after step {step}, which is saved in {training.output_dir}. To go on from there, add "
                "--resume_from_checkpoint true."
            )
        raise


def _few(training: Any, rows: Dataset) -> int:
    return min(len(rows), training.per_device_eval_batch_size * training.world_size)


def _read_recipe(path: str) -> dict[str, Any]:
    content = yaml.safe_load(Path(path).read_text())
    if not isinstance(content, dict):
        raise ValueError(f"The recipe {path} must be a YAML mapping of options, got {type(content).__name__}.")
    return content


def _given_on_command_line(parser: TrlParser, argv: Sequence[str]) -> dict[str, Any]:
    """The options that are on the command line, with their values."""
    bare = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    for action in parser._actions:
        if action.option_strings and action.dest != "help":
            bare._add_action(_without_default(action))
    return vars(bare.parse_known_args(list(argv))[0])


def _without_default(action: argparse.Action) -> argparse.Action:
    action = copy.copy(action)
    action.default, action.required = argparse.SUPPRESS, False
    return action


if __name__ == "__main__":
    main()
