"""Greedy accuracy on held-out examples, during training and after it.

TRL's evaluation samples at the training temperature and averages over batches of different size. That is too noisy to
choose the best model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from ..scoring.objectives import LogLikelihoodObjective, Objective, RewardObjective
from ..scoring.rewards import RewardFunc
from ..utils.processes import is_sharded, processes


def greedy_accuracy(*args: Any, **kwargs: Any) -> float:
    """Return the mean of [`greedy_scores`], which has the same arguments: the accuracy, for rewards of 0 and 1."""
    scores = greedy_scores(*args, **kwargs)
    return sum(scores) / len(scores)


def greedy_scores(
    model: Any,
    tokenizer: Any,
    examples: Sequence[dict[str, Any]],
    reward_funcs: RewardFunc | Sequence[RewardFunc],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 256,
    generation_kwargs: Mapping[str, Any] | None = None,
) -> list[float]:
    """
    Return the rewards of greedily decoded answers, one per example.

    With several processes, each answers a part of the examples, and all return all rewards.

    Args:
        model: A causal language model on its device. Its training mode is restored.
        tokenizer: Its tokenizer.
        examples: Examples with a `"prompt"` and the columns that the rewards need, such as a `datasets.Dataset`.
        reward_funcs: One reward function of TRL's protocol, or several, whose rewards are added.
        batch_size (`int`): Prompts per `generate` call.
        max_new_tokens (`int`): Longest answer, in tokens.
        generation_kwargs (`dict`, *optional*): Further arguments of `generate`.

    Raises:
        ValueError: There are no examples.
    """
    generation = {"max_new_tokens": max_new_tokens, **(generation_kwargs or {})}

    def objective(rows: Sequence[dict[str, Any]]) -> Objective:
        return RewardObjective(rows, reward_funcs, tokenizer, batch_size=batch_size, generation_kwargs=generation)

    return _scores(model, examples, objective)


def answer_logps(
    model: Any, tokenizer: Any, examples: Sequence[dict[str, Any]], column: str, *, batch_size: int = 8
) -> list[float]:
    """Return the mean log-probability per token of the answers in a column, one per example, as [`greedy_scores`]."""
    rows = [{"prompt": row["prompt"], "completion": row[column]} for row in examples]
    return _scores(model, rows, lambda part: LogLikelihoodObjective(part, tokenizer, batch_size=batch_size))


def _scores(
    model: Any, examples: Sequence[dict[str, Any]], make: Callable[[Sequence[dict[str, Any]]], Objective]
) -> list[float]:
    """Return the score of each example by the objective that is made for them."""
    rows, state = list(examples), processes()
    if not rows:
        raise ValueError("There are no examples to evaluate on; expected at least one.")
    # Every call of a sharded model needs all ranks, because each rank holds a part of every layer.
    together = state.num_processes == 1 or is_sharded(model)
    part = rows if together else rows[state.process_index :: state.num_processes]
    scores: list[float] = []
    if part:
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                scores = make(part)(model)
        finally:
            model.train(was_training)
    if together:
        return scores
    parts = gather_object([scores])  # one list of each process
    return [parts[i % state.num_processes][i // state.num_processes] for i in range(len(rows))]


class GreedyEvaluation(TrainerCallback):
    """
    Compute the greedy accuracy at every evaluation of a trainer, as the metric `eval_accuracy`.

    The trainer can choose the best model and stop early by this metric. The callback runs whenever the trainer
    evaluates, so the trainer needs an `eval_dataset`; a few examples are enough.

    ```python
    trainer = GRPOTrainer(
        ...,
        args=GRPOConfig(
            eval_strategy="steps", eval_steps=5, load_best_model_at_end=True, metric_for_best_model="eval_accuracy"
        ),
        eval_dataset=validation.select(range(8)),
        callbacks=[GreedyEvaluation(validation, reward), EarlyStoppingCallback(early_stopping_patience=3)],
    )
    ```

    Args:
        examples: Examples with a `"prompt"` and the columns that the rewards need.
        reward_funcs: One or several reward functions of TRL's protocol.
        name (`str`): The metric is called `eval_<name>`.
        batch_size (`int`, *optional*): Prompts per `generate` call. Default: the trainer's
            `per_device_eval_batch_size`.
        max_new_tokens (`int`, *optional*): Longest answer, in tokens. Default: the trainer's `max_completion_length`.
    """

    def __init__(
        self,
        examples: Sequence[dict[str, Any]],
        reward_funcs: RewardFunc | Sequence[RewardFunc],
        *,
        name: str = "accuracy",
        batch_size: int | None = None,
        max_new_tokens: int | None = None,
    ) -> None:
        self.examples, self.reward_funcs, self.metric = examples, reward_funcs, f"eval_{name}"
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.trainer: Any = None

    def report_to(self, trainer: Any) -> None:
        """Also send the metric to the trainer's trackers."""
        self.trainer = trainer

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        value = greedy_accuracy(
            kwargs["model"],
            kwargs["processing_class"],
            self.examples,
            self.reward_funcs,
            batch_size=self.batch_size or args.per_device_eval_batch_size,
            max_new_tokens=self.max_new_tokens or getattr(args, "max_completion_length", None) or 256,
        )
        if metrics is not None:  # the trainer chooses the best model by this dict
            metrics[self.metric] = value
        if self.trainer is not None:
            self.trainer.log({self.metric: value})
        else:
            state.log_history.append({"epoch": state.epoch or 0.0, "step": state.global_step, self.metric: value})
