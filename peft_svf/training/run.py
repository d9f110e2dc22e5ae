"""Train an expert, or an adapter of another method: from pairs, from preferences, or by reinforcement learning.

    peft-svf train --config recipe.yaml [--any_option value]
    accelerate launch -m peft_svf train --config recipe.yaml
    python -m peft_svf.training.run --config recipe.yaml

Built on TRL: every option of `SFTConfig`, `DPOConfig`, `GRPOConfig`, `RLOOConfig` or `ReinforceConfig` (by
`--objective`), of `ModelConfig`, `ScriptArguments` and `DatasetMixtureConfig` works on the command line and in the YAML
file.
"""

from __future__ import annotations

import functools
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import upload_folder
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback
from trl import DatasetMixtureConfig, DPOConfig, SFTConfig, get_quantization_config

from .arguments import OBJECTIVES, AdapterArguments, TrainArguments, adapter_config
from .callbacks import EqualRewards, ExactState, RewardBar
from .checkpoints import choose_checkpoint, save_whole, train_from_checkpoint
from .continuing import continued_model
from .data import Splits, for_trl, load_data
from .evaluation import GreedyEvaluation, answer_logps, greedy_accuracy, greedy_scores
from .outcome import StopAtNaN, check_outcome
from .recipe import find_script_task, load_rewards, parse, recipe_task
from .report import Record, example_of, write_report
from .supervised import SUPERVISED, answer_length, trained_columns

__all__ = ["build", "find_script_task", "main", "parse", "prepare", "recipe_task", "train"]


def main(argv: Sequence[str] | None = None) -> Record:
    """Train, evaluate and save. Return the record that the model card shows."""
    return prepare(sys.argv[1:] if argv is None else argv)()


def prepare(argv: Sequence[str]) -> Callable[[], Record]:
    """
    Load everything, and return a function that trains.

    Raises:
        ValueError: An option is invalid.
        ImportError, OSError: Something that an option names does not exist.
    """
    script, training, adapter, mixture, given = parse(argv)
    trainer, data, functions = build(script, training, adapter, mixture)
    return functools.partial(train, trainer, data, functions, given, continues=adapter.expert)


def build(
    script: TrainArguments, training: Any, adapter: AdapterArguments, mixture: DatasetMixtureConfig
) -> tuple[Any, Splits, list[Any]]:
    """Return the trainer, the data, and the reward functions for an evaluation."""
    if adapter.model_name_or_path is None:
        raise ValueError("No base model is given. Pass --model_name_or_path with a Hub id or a folder.")
    choose_checkpoint(training)
    task = find_script_task(script)
    data = load_data(script, mixture, task, training)
    supervised = script.objective in SUPERVISED
    rewards = load_rewards(script, task, answers="answer" in _columns(data["train"]))
    functions = [reward for reward in rewards if callable(reward)]
    training.model_init_kwargs = {
        "revision": adapter.model_revision,
        "attn_implementation": adapter.attn_implementation,
        "dtype": adapter.dtype,
        **(training.model_init_kwargs or {}),
    }
    evaluates = training.eval_strategy != "no" and (functions or supervised) and "validation" in data

    def for_trainer(rows: Any) -> Any:
        rows = for_trl(rows, adapter)
        if not supervised:
            return rows
        return trained_columns(rows, script.objective, getattr(training, "dataset_text_field", "text"))

    watched = None
    if evaluates:
        # TRL samples its evaluation, so it gets few examples. `GreedyEvaluation` decodes the whole split greedily.
        few = len(data["validation"]) if supervised else 8 * training.world_size
        watched = for_trainer(data["validation"].select(range(min(len(data["validation"]), few))))
    if adapter.expert is None:
        model: dict[str, Any] = {
            "model": adapter.model_name_or_path,
            "quantization_config": get_quantization_config(adapter),
            "peft_config": adapter_config(adapter),
        }
    else:
        model = {"model": continued_model(adapter, training)}
        training.model_init_kwargs = None if not script.reward_model_name_or_path else training.model_init_kwargs
    trainer = OBJECTIVES[script.objective][1](
        **model,
        **({} if supervised else {"reward_funcs": rewards}),
        args=training,
        train_dataset=for_trainer(data["train"]),
        eval_dataset=watched,
    )
    trainer.model.peft_config["default"].base_model_name_or_path = script.base_model_name or adapter.model_name_or_path
    if not training.disable_tqdm:
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(RewardBar(f"Training {Path(training.output_dir).name}"))
    of_a_chat_model = getattr(trainer.processing_class, "chat_template", None) is not None
    if script.dataset_name and of_a_chat_model and isinstance(next(iter(data["train"])).get("prompt"), str):
        warnings.warn(
            "The prompts are text, which the model continues without its chat template. Add --chat true to ask them as "
            "messages, as `peft-svf generate` and `chat` do.",
            stacklevel=2,
        )
    trainer.add_callback(EqualRewards())
    trainer.add_callback(ExactState())
    trainer.add_callback(StopAtNaN())
    if training.max_completion_length is None:
        references = [row for split in ("validation", "test") for row in data.get(split, [])]
        training.max_completion_length = answer_length(references, trainer.processing_class)
    if evaluates and functions:
        evaluation = GreedyEvaluation(data["validation"], functions)
        evaluation.report_to(trainer)
        trainer.add_callback(evaluation)
    if evaluates and script.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(script.early_stopping_patience))
    return trainer, data, functions


def train(
    trainer: Any, data: Splits, functions: list[Any], given: dict[str, Any], *, continues: str | None = None
) -> Record:
    """Train, save, evaluate on the test split, and write the report. `continues` names the adapter to start from."""
    training, test = trainer.args, data.get("test")
    supervised = isinstance(training, (SFTConfig, DPOConfig))
    if test is not None and ("prompt" not in test.column_names or not (functions or supervised)):
        test = None
    options: dict[str, Any] = {
        "batch_size": training.per_device_eval_batch_size,
        "max_new_tokens": training.max_completion_length,
    }
    model, tokenizer = trainer.model, trainer.processing_class

    def accuracy() -> float | None:
        return greedy_accuracy(model, tokenizer, test, functions, **options) if test and functions else None

    def measures() -> dict[str, float]:
        return _measures(model, tokenizer, test) if test and supervised else {}

    before = None
    if continues is not None:  # afterwards its δ is gone
        before = accuracy(), measures()
    start = time.perf_counter()
    train_from_checkpoint(trainer)
    check_outcome(trainer)
    record = Record(
        name=Path(training.output_dir).name,
        recipe=given,
        base_model=trainer.model.peft_config["default"].base_model_name_or_path,
        trainable=sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad),
        seconds=time.perf_counter() - start,
        history=trainer.state.log_history,
        best_step=trainer.state.best_global_step if training.load_best_model_at_end else None,
        continues=continues,
    )
    save_whole(trainer, training.output_dir)
    if test:
        record.test_size, record.example = len(test), example_of(test[0])
        after = measures()
        if functions:
            scores = greedy_scores(model, tokenizer, test, functions, **options)
            record.accuracy_after = sum(scores) / len(scores)
            if "categories" in test.column_names:
                record.accuracy_by_category = _by_category(test["answer"], scores)
        if before is None:
            with model.disable_adapter():
                before = accuracy(), measures()
        record.accuracy_before = before[0]
        record.measures = {name: (before[1][name], value) for name, value in after.items()}
        trainer.accelerator.print(record.summary())
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
    trainer.accelerator.wait_for_everyone()  # gloo needs a barrier as the last exchange, see `leave`
    trainer.end()
    return record


def _measures(model: Any, tokenizer: Any, test: Any) -> dict[str, float]:
    """Return the loss of reference answers, and how often the better of two answers is more probable."""
    if "chosen" in test.column_names:
        pairs = zip(*(answer_logps(model, tokenizer, test, name) for name in ("chosen", "rejected")), strict=True)
        return {"preference": sum(chosen > rejected for chosen, rejected in pairs) / len(test)}
    losses = answer_logps(model, tokenizer, test, "completion")
    return {"loss": -sum(losses) / len(losses)}


def _columns(rows: Any) -> list[str]:
    """Return the columns, also of a stream that has not been read."""
    return rows.column_names or list(next(iter(rows)))


def _by_category(categories: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
    grouped: dict[str, list[float]] = {}
    for category, score in zip(categories, scores, strict=True):
        grouped.setdefault(category, []).append(score)
    return {category: sum(its) / len(its) for category, its in grouped.items()}


if __name__ == "__main__":
    main()
