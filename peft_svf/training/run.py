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
import functools
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, load_dataset
from huggingface_hub import upload_folder
from transformers import AutoTokenizer, EarlyStoppingCallback, PrinterCallback, ProgressCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from trl import DatasetMixtureConfig, TrlParser, get_dataset, get_quantization_config

from ..scoring.categories import readable
from ..scoring.rewards import checked, find_reward, text_of
from ..scoring.tokens import text_for_trl
from .arguments import OBJECTIVES, AdapterArguments, TrainArguments, adapter_config, check_given, defaults
from .callbacks import EqualRewards, ExactState, RewardBar
from .checkpoints import discard_incomplete, is_complete, last_complete, save_whole, steps_done
from .evaluation import GreedyEvaluation, greedy_accuracy, greedy_scores
from .report import Record, example_of, write_report
from .tasks import ClassificationTask, Task, find_task

Splits = dict[str, Dataset]

# of the options, what says nothing about the run (and might say too much about the machine) in a model card
_LEFT_OUT = ("base_model_name", "config", "disable_tqdm", "env", "output_dir", "resume_from_checkpoint")


def main(argv: Sequence[str] | None = None) -> Record:
    """Train, evaluate, save. Returns the numbers that the model card shows."""
    return prepare(sys.argv[1:] if argv is None else argv)()


def prepare(argv: Sequence[str]) -> Callable[[], Record]:
    """Everything up to the training, which the result does when it is called.

    Raises:
        ValueError: Something in the options makes no sense.
        ImportError, OSError: Something that they name is not there.
    """
    script, training, adapter, mixture, given = parse(argv)
    trainer, data, functions = build(script, training, adapter, mixture)
    return functools.partial(train, trainer, data, functions, given)


def parse(argv: Sequence[str]) -> tuple[TrainArguments, Any, AdapterArguments, DatasetMixtureConfig, dict[str, Any]]:
    """The options, from the recipe and the command line, which has the last word; the fifth are those that were given,
    for the model card."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--config", "--objective", "--peft_type", "--categories"):
        first.add_argument(name)
    known, _ = first.parse_known_args(argv)
    recipe = _read_recipe(known.config) if known.config else {}
    objective = known.objective or recipe.get("objective", "grpo")
    peft_type = known.peft_type or recipe.get("peft_type", "svf")
    if objective not in OBJECTIVES:
        raise ValueError(f"`objective` must be one of {', '.join(OBJECTIVES)}, got {objective!r}.")

    config_class: Any = OBJECTIVES[objective][0]
    kinds = (TrainArguments, config_class, AdapterArguments, DatasetMixtureConfig)
    parser = TrlParser(kinds, prog="peft-svf train", allow_abbrev=False)
    chosen = defaults(objective, peft_type)
    if known.categories or recipe.get("categories"):
        chosen["shuffle_dataset"] = False  # in turn, so that each step has as many of each
    chosen = {name: value for name, value in chosen.items() if name in config_class.__dataclass_fields__}
    parser.set_defaults_with_config(**chosen)
    script, training, adapter, mixture = parser.parse_args_and_config(list(argv))
    given = {**recipe, **_given_on_command_line(parser, argv)}
    check_given(given, script, adapter, training)
    given = {name: value for name, value in given.items() if name not in _LEFT_OUT and not name.endswith("_token")}
    if script.base_model_name:
        given["model_name_or_path"] = script.base_model_name
    return script, training, adapter, mixture, given


def build(
    script: TrainArguments, training: Any, adapter: AdapterArguments, mixture: DatasetMixtureConfig
) -> tuple[Any, Splits, list[Any]]:
    """The trainer, the data, and the reward functions for an evaluation."""
    if adapter.model_name_or_path is None:
        raise ValueError("Which model? Pass --model_name_or_path, a Hub id or a folder.")
    _check_output(training)
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
        train_dataset=_for_trl(data["train"], adapter),
        # TRL's own evaluation samples; ours below decodes greedily and sees the whole split
        eval_dataset=_for_trl(data["validation"].select(range(_few(training, data["validation"]))), adapter)
        if evaluates
        else None,
        quantization_config=get_quantization_config(adapter),
        peft_config=adapter_config(adapter),
    )
    trainer.model.peft_config["default"].base_model_name_or_path = script.base_model_name or adapter.model_name_or_path
    if not training.disable_tqdm:
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(RewardBar(f"Training {Path(training.output_dir).name}"))
    trainer.add_callback(EqualRewards())
    trainer.add_callback(ExactState())
    if evaluates:
        evaluation = GreedyEvaluation(data["validation"], functions)
        evaluation.report_to(trainer)
        trainer.add_callback(evaluation)
        if script.early_stopping_patience is not None:
            trainer.add_callback(EarlyStoppingCallback(script.early_stopping_patience))
    return trainer, data, functions


def train(trainer: Any, data: Splits, functions: list[Any], given: dict[str, Any]) -> Record:
    """Train, save, evaluate on the test split, and report."""
    training, start = trainer.args, time.perf_counter()
    _train_through_trouble(trainer, training)
    record = Record(
        name=Path(training.output_dir).name,
        recipe=given,
        base_model=trainer.model.peft_config["default"].base_model_name_or_path,
        trainable=sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad),
        seconds=time.perf_counter() - start,
        history=trainer.state.log_history,
        best_step=trainer.state.best_global_step if training.load_best_model_at_end else None,
    )
    save_whole(trainer, training.output_dir)
    if "test" in data and functions:
        record.test_size, record.example = len(data["test"]), example_of(data["test"][0])
        options: dict[str, Any] = {
            "batch_size": training.per_device_eval_batch_size,
            "max_new_tokens": training.max_completion_length,
        }
        model, tokenizer = trainer.model, trainer.processing_class
        scores = greedy_scores(model, tokenizer, data["test"], functions, **options)
        record.accuracy_after = sum(scores) / len(scores)
        if "categories" in data["test"].column_names:
            record.accuracy_by_category = _by_category(data["test"]["answer"], scores)
        with model.disable_adapter():
            record.accuracy_before = greedy_accuracy(model, tokenizer, data["test"], functions, **options)
        trainer.accelerator.print(
            f"{record.name}: greedy accuracy on {record.test_size} test questions {record.accuracy_before:.3f} -> "
            f"{record.accuracy_after:.3f}"
        )
    if trainer.accelerator.is_main_process:
        write_report(trainer.model, record, training.output_dir)
        if training.push_to_hub:
            upload_folder(
                repo_id=trainer.hub_model_id,
                folder_path=training.output_dir,
                ignore_patterns=["checkpoint-*", ".*", "completions/*", "*.bin"],
                commit_message="End of training",
                token=training.hub_token,
            )
    trainer.accelerator.print(f"saved in {training.output_dir}")
    trainer.accelerator.wait_for_everyone()  # as in `leave`
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
    if script.dataset_streaming:
        sizes = {"validation": script.validation_size, "test": script.test_size}
        splits |= {
            split: Dataset.from_list(list(splits[split].take(size))) for split, size in sizes.items() if split in splits
        }
    elif "validation" not in splits and script.validation_size > 0:
        if len(splits["train"]) <= script.validation_size:
            raise ValueError(
                f"The training split has {len(splits['train'])} rows, of which validation_size="
                f"{script.validation_size} would be taken off. Pass a smaller --validation_size, or 0."
            )
        parts = splits["train"].train_test_split(test_size=script.validation_size, seed=seed)
        splits |= {"train": parts["train"], "validation": parts["test"]}
    for split, size in (("validation", script.validation_size), ("test", script.test_size)):
        if split in splits:
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
    if "completion" in columns and not {"answer", "solution"} & {*columns, *wanted.values()}:
        # TRL keeps this column to itself
        rows = rows.map(lambda row: {"answer": text_of(row["completion"])})
    if script.system_prompt:

        def add(row: dict[str, Any]) -> dict[str, Any]:
            prompt = row["prompt"]
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            return {"prompt": [{"role": "system", "content": script.system_prompt}, *messages]}

        rows = rows.map(add)
    return rows


def _for_trl(rows: Any, adapter: AdapterArguments) -> Any:
    """Text in the place of messages that end with the beginning of an answer: TRL would open another turn after it.

    Raises:
        ValueError: Some prompts do and others do not.
    """
    begun = _is_begun(next(iter(rows))["prompt"])
    if isinstance(rows, Dataset) and {begun} != {_is_begun(prompt) for prompt in rows["prompt"]}:
        raise ValueError("Some prompts end with the beginning of an answer and others do not; use one form for all.")
    if not begun:
        return rows
    tokenizer = AutoTokenizer.from_pretrained(adapter.model_name_or_path, revision=adapter.model_revision)
    return rows.map(lambda row: {"prompt": text_for_trl(readable(row["prompt"], tokenizer), tokenizer)})


def _is_begun(prompt: Any) -> bool:
    return not isinstance(prompt, str) and bool(prompt) and prompt[-1]["role"] == "assistant"


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


def _check_output(training: Any) -> None:
    """Find the checkpoint to go on from, and make sure that no other run's is in the way."""
    resume, newest = training.resume_from_checkpoint, last_complete(training.output_dir)
    if isinstance(resume, str) and resume.lower() in ("true", "false"):
        resume = resume.lower() == "true"
    if not resume and newest:
        raise ValueError(
            f"{training.output_dir} holds checkpoints of an earlier run, up to {newest.name}. Pass "
            "--resume_from_checkpoint true to go on with it, or another --output_dir, or delete them."
        )
    if isinstance(resume, str) and not is_complete(resume):
        found = f"; the newest whole one in {training.output_dir} is {newest.name}" if newest else ""
        raise ValueError(f"There is no whole checkpoint in {resume}{found}.")
    if training.process_index == 0:
        discard_incomplete(training.output_dir)
    if resume is True:
        resume = str(newest) if newest else None
    training.resume_from_checkpoint = resume or None


def _train_through_trouble(trainer: Any, training: Any) -> None:
    """Train, from a checkpoint if asked to; on an error or Ctrl-C, save one first."""
    resume = training.resume_from_checkpoint
    if resume:
        step, last = steps_done(resume)
        if step >= (training.max_steps if training.max_steps > 0 else last):
            _load_finished(trainer, training, resume)  # transformers would train one more step
            return
    try:
        trainer.train(resume_from_checkpoint=resume)
    except BaseException:
        # with several processes the others may be anywhere
        if trainer.accelerator.num_processes == 1 and training.save_strategy != "no":
            _save_what_there_is(trainer, training)
        raise


def _load_finished(trainer: Any, training: Any, checkpoint: str) -> None:
    trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    best = trainer.state.best_model_checkpoint if training.load_best_model_at_end else None
    trainer.model.load_adapter(best or checkpoint, "default", is_trainable=True)
    trainer.accelerator.print(f"{checkpoint} is of a run that is done; nothing is left to train.")


def _save_what_there_is(trainer: Any, training: Any) -> None:
    step = trainer.state.global_step
    folder = Path(training.output_dir) / f"checkpoint-{step}"
    if step == 0:
        return
    if not is_complete(folder):
        try:
            trainer._save_checkpoint(trainer.model, None)
        except Exception as error:
            warnings.warn(f"Step {step} could not be saved: {error}", stacklevel=2)
            return
    trainer.accelerator.print(
        f"Stopped after step {step}, which is saved in {folder}. To go on from there, though with other samples than "
        "if it had not stopped, add --resume_from_checkpoint true."
    )


def _by_category(categories: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
    grouped: dict[str, list[float]] = {}
    for category, score in zip(categories, scores, strict=True):
        grouped.setdefault(category, []).append(score)
    return {category: sum(its) / len(its) for category, its in grouped.items()}


def _few(training: Any, rows: Dataset) -> int:
    """Rows for TRL's own evaluation, of which only the fact that it takes place is needed."""
    return min(len(rows), 8 * training.world_size)


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
