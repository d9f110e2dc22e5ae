"""Greedy accuracy on held-out examples, while training and after it.

TRL's own evaluation samples at the training temperature and averages over batches of different size: good enough to
watch, too noisy to select by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from ..scoring.objectives import RewardObjective
from ..scoring.rewards import RewardFunc
from ..utils.processes import processes


def greedy_accuracy(*args: Any, **kwargs: Any) -> float:
    """Mean of [`greedy_scores`], whose arguments it takes: with rewards of 0 and 1, the accuracy."""
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
    Rewards of greedily decoded answers, one for each example.

    With several processes, each answers a part of the examples, and all return the same.

    Args:
        model: A causal language model on its device. Its training mode is restored.
        tokenizer: Its tokenizer.
        examples: Rows with a `"prompt"` and what the rewards need, such as a `datasets.Dataset`.
        reward_funcs: One or several reward functions of TRL's protocol, which are added up.
        batch_size (`int`): Prompts per `generate` call.
        max_new_tokens (`int`): Where an answer is cut off.
        generation_kwargs (`dict`, *optional*): More for `generate`.
    """
    rows, state = list(examples), processes()
    if not rows:
        raise ValueError("There are no examples to evaluate on.")
    # a sharded model needs all ranks in every call, for each layer's weights are with all of them
    together = state.num_processes == 1 or _is_sharded(model)
    part = rows if together else rows[state.process_index :: state.num_processes]
    scores: list[float] = []
    if part:
        objective = RewardObjective(
            part,
            reward_funcs,
            tokenizer,
            batch_size=batch_size,
            generation_kwargs={"max_new_tokens": max_new_tokens, **(generation_kwargs or {})},
        )
        was_training = model.training
        model.eval()
        try:
            scores = objective(model)
        finally:
            model.train(was_training)
    if together:
        return scores
    parts = gather_object([scores])  # one list of each process
    return [parts[i % state.num_processes][i // state.num_processes] for i in range(len(rows))]


def _is_sharded(model: Any) -> bool:
    """By FSDP1, FSDP2 or tensor parallelism, or ZeRO-3."""
    return any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()) or any(
        isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters()
    )


class GreedyEvaluation(TrainerCallback):
    """
    Greedy accuracy at every evaluation of a trainer, as the metric `eval_accuracy`.

    It is among the metrics by which the trainer chooses the best model and stops early. It takes its turn whenever the
    trainer evaluates, so the trainer needs an `eval_dataset`; a few rows will do.

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
        examples: Rows with a `"prompt"` and what the rewards need.
        reward_funcs: One or several reward functions of TRL's protocol.
        name (`str`): The metric is called `eval_<name>`.
        batch_size (`int`, *optional*): Prompts per `generate` call; the trainer's `per_device_eval_batch_size` if
            `None`.
        max_new_tokens (`int`, *optional*): The trainer's `max_completion_length` if `None`.
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
        self.examples = examples
        self.reward_funcs = reward_funcs
        self.metric = f"eval_{name}"
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.trainer: Any = None

    def report_to(self, trainer: Any) -> None:
        """Send the metric to the trainer's trackers, too."""
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
        if metrics is not None:  # the very dict by which the trainer goes on
            metrics[self.metric] = value
        if self.trainer is not None:
            self.trainer.log({self.metric: value})
        else:
            state.log_history.append({"epoch": state.epoch or 0.0, "step": state.global_step, self.metric: value})
