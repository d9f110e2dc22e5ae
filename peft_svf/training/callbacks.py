"""Trainer callbacks: fp32 δ and exact resumption, a warning about equal rewards, and a progress bar."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from transformers import TrainerCallback

from ..tuner.layer import svf_layers
from ..utils.progress import progress_disabled
from .checks import DeltaIsTrained


class ExactState(DeltaIsTrained):
    """
    Keep δ in fp32, and make a resumed run equal to an uninterrupted one. A training that would leave δ unchanged is an
    error, see [`DeltaIsTrained`].

    TRL casts trainable parameters to bf16 for some base models (quantized, ZeRO-3). Small updates of δ are lost in
    bf16. The moment at which a layer folds depends on its earlier use, which a checkpoint does not hold. Therefore
    folded weights are dropped at every checkpoint: both runs then continue from the same state.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, model=model, **kwargs)
        cast = left = 0
        for layer in svf_layers(model):
            layer.fold.forget()
            for delta in layer.delta_weights(layer.svf_delta):
                if delta.dtype.itemsize == 2:
                    if hasattr(delta, "ds_id"):  # ZeRO-3 records the dtype itself
                        left += 1
                    else:
                        delta.data = delta.data.to(torch.float32)
                        cast += 1
        if cast:
            warnings.warn(
                f"{cast} vectors δ were cast to 16 bit, which loses small updates. They are in fp32 again.",
                stacklevel=2,
            )
        if left:
            warnings.warn(
                f"ZeRO-3 keeps {left} vectors δ in 16 bit, so the forward pass does not see small updates. "
                "Use FSDP2 or ZeRO-2, which keep them in fp32.",
                stacklevel=2,
            )

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for layer in svf_layers(model):
            layer.fold.forget()


class EqualRewards(TrainerCallback):
    """
    Warn when all completions of every prompt get the same reward: GRPO and RLOO then have no gradient.

    Args:
        patience (`int`): Consecutive logged steps before the warning.
    """

    def __init__(self, patience: int = 3) -> None:
        self.patience = patience
        self.count = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not logs or "frac_reward_zero_std" not in logs or getattr(args, "num_generations", 2) == 1:
            return
        self.count = self.count + 1 if (logs["frac_reward_zero_std"] or 0.0) >= 1.0 else 0
        if self.count == self.patience and state.is_world_process_zero:
            warnings.warn(
                f"In the last {self.patience} logged steps (up to step {state.global_step}, mean reward "
                f"{logs.get('reward', float('nan')):.3g}) all completions of each prompt got the same reward: there is "
                "no gradient. If all are right, use harder questions. If all are wrong, use easier ones or partial "
                "credit, raise num_generations, temperature or max_completion_length, and check with "
                "log_completions=True that the reward accepts the form of the answers.",
                stacklevel=2,
            )


class RewardBar(TrainerCallback):
    """One progress bar with reward, KL and accuracy, or the loss without rewards, instead of the Trainer's bar and
    printed dicts."""

    SHOWN = ("reward", "kl", "eval_accuracy")
    WITHOUT_REWARD = ("loss", "eval_loss", "eval_accuracy")

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
            shown = self.SHOWN if "reward" in {*self.latest, *logs} else self.WITHOUT_REWARD
            self.latest |= {key: logs[key] for key in shown if logs.get(key) is not None}
            self.bar.set_postfix({key.removeprefix("eval_"): f"{value:.3g}" for key, value in self.latest.items()})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
