"""Callbacks that make a training run say what is wrong, and go on from a checkpoint as if it had never stopped."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from transformers import TrainerCallback

from ..tuner.layer import SVFLayer
from ..utils.progress import progress_disabled


class ExactState(TrainerCallback):
    """
    Keeps δ in fp32, and makes a resumed run equal to one that was never interrupted.

    TRL casts everything trainable to bf16 for some base models (quantized ones, ZeRO-3), in which small updates of δ
    are lost. And when a layer starts to fold depends on what it was used for before, which no checkpoint holds: so
    folded weights are dropped at every checkpoint, and both runs go on from the same state.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        cast = left = 0
        for layer in _layers(model):
            layer.fold.forget()
            for delta in layer.delta_weights(layer.svf_delta):
                if delta.dtype.itemsize == 2:
                    if hasattr(delta, "ds_id"):  # ZeRO-3 keeps its own record of the dtype
                        left += 1
                    else:
                        delta.data = delta.data.to(torch.float32)
                        cast += 1
        if cast:
            warnings.warn(
                f"{cast} vectors δ had been cast to 16 bit, in which small updates are lost; they are in fp32 again.",
                stacklevel=2,
            )
        if left:
            warnings.warn(
                f"ZeRO-3 keeps {left} vectors δ in 16 bit, in which small updates are lost in every forward, if not in "
                "the optimizer. FSDP2 and ZeRO-2 keep them in fp32.",
                stacklevel=2,
            )

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for layer in _layers(model):
            layer.fold.forget()


class EqualRewards(TrainerCallback):
    """
    Warns when all completions of every prompt got the same reward, for then GRPO and RLOO have no gradient.

    Args:
        patience (`int`): Number of logged steps in a row before the warning.
    """

    def __init__(self, patience: int = 3) -> None:
        self.patience = patience
        self.count = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not logs or "frac_reward_zero_std" not in logs or getattr(args, "num_generations", 2) == 1:
            return
        self.count = self.count + 1 if logs["frac_reward_zero_std"] >= 1.0 else 0
        if self.count == self.patience and state.is_world_process_zero:
            warnings.warn(
                f"In the last {self.patience} logged steps (up to step {state.global_step}, mean reward "
                f"{logs.get('reward', float('nan')):.3g}) all completions of a prompt got the same reward, for every "
                "prompt: there is no gradient, and nothing is learned. If all are right, take harder questions. If all "
                "are wrong, take easier ones or a reward that gives part of the points, sample more completions "
                "(num_generations), at a higher temperature, or longer ones (max_completion_length), and look at some "
                "with log_completions=True: they may be right, but in a form that the reward does not accept.",
                stacklevel=2,
            )


class RewardBar(TrainerCallback):
    """One progress bar with reward, KL and accuracy, in the place of the Trainer's bar and its printed dicts."""

    SHOWN = ("reward", "kl", "eval_accuracy")

    def __init__(self, description: str = "Training") -> None:
        self.description = description
        self.bar: Any = None
        self.latest: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        off = not state.is_world_process_zero or args.disable_tqdm or progress_disabled()
        self.bar = tqdm(
            desc=self.description, total=state.max_steps, initial=state.global_step, unit="step", disable=off
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self.bar is not None and logs:
            self.latest |= {key: logs[key] for key in self.SHOWN if key in logs}
            self.bar.set_postfix({key.removeprefix("eval_"): f"{value:.3g}" for key, value in self.latest.items()})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def _layers(model: Any) -> list[SVFLayer]:
    return [module for module in model.modules() if isinstance(module, SVFLayer)] if model is not None else []
