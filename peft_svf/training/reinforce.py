"""The paper's objective: REINFORCE with a KL term, one completion per prompt and no baseline.

    J(θ) = E[ r(ŷ, y) log π(ŷ|x) ] - λ KL(π ‖ π_base)      (Transformer², eq. 2; r = ±1)

TRL has no plain policy gradient. GRPO is one if it takes one completion per prompt and the reward as the advantage.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from trl import GRPOConfig, GRPOTrainer

from .checks import DeltaIsTrained


@dataclass
class ReinforceConfig(GRPOConfig):
    """
    Configuration of a [`ReinforceTrainer`]: TRL's `GRPOConfig` with the paper's settings (Table 6) as defaults.

    `beta` is the paper's λ, chosen among 0, 0.1, 0.2 and 0.3 on validation data. The loss of a sequence is the sum over
    its tokens, divided by the constant `max_completion_length` (`loss_type="dr_grpo"`). This constant affects only
    `max_grad_norm` and `beta`. Rewards are not normalized: `scale_rewards` and `multi_objective_aggregation` have no
    effect.

    Args:
        signed_rewards (`bool`): Map rewards of 1 and 0 to 1 and −1, because a reward of 0 has no gradient without a
            baseline. Of several reward functions, the weighted sum is mapped. `False` uses rewards unchanged.

    Raises:
        ValueError: `num_generations` is not 1, the settings are not on-policy, or a step has one completion.
    """

    signed_rewards: bool = field(
        default=True, metadata={"help": "Map rewards of 1 and 0 to 1 and -1. False uses rewards unchanged."}
    )

    num_generations: Optional[int] = field(
        default=1,
        metadata={"help": "Completions per prompt. Must be 1: without a baseline, more do not reduce variance."},
    )
    learning_rate: float = field(default=2e-3, metadata={"help": "The initial learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The scheduler type to use."})
    max_grad_norm: float = field(default=1e-3, metadata={"help": "Max gradient norm."})
    loss_type: str = field(
        default="dr_grpo", metadata={"help": "Sum over tokens divided by a constant, which is unbiased."}
    )
    scale_rewards: str = field(default="none", metadata={"help": "No effect: rewards are not normalized."})

    def __post_init__(self) -> None:
        if self.num_generations not in (None, 1):
            raise ValueError(
                f"`num_generations` must be 1 for REINFORCE, got {self.num_generations}. Use GRPO or RLOO to compare "
                "completions of a prompt with each other."
            )
        if self.num_iterations != 1:
            raise ValueError(
                f"`num_iterations` must be 1 for REINFORCE, got {self.num_iterations}: REINFORCE is on-policy."
            )
        if self.steps_per_generation is not None and self.steps_per_generation > self.gradient_accumulation_steps:
            raise ValueError(
                f"`steps_per_generation` ({self.steps_per_generation}) must not be greater than "
                f"`gradient_accumulation_steps` ({self.gradient_accumulation_steps}) for REINFORCE, which is on-policy."
            )
        # TRL refuses one generation, because GRPO learns nothing from it. It uses this number only to check that it
        # divides the completions of a step, which are a multiple of both parts.
        parts = (self.per_device_train_batch_size, self.steps_per_generation or self.gradient_accumulation_steps)
        if max(parts) < 2:
            raise ValueError("REINFORCE needs two or more completions per step. Raise `per_device_train_batch_size`.")
        self.num_generations = max(parts)
        self.num_generations_eval: Optional[int] = self.num_generations_eval or 1
        super().__post_init__()
        self.num_generations = 1


class ReinforceTrainer(GRPOTrainer):
    """
    TRL's `GRPOTrainer` with rewards instead of group-relative advantages.

    It takes the arguments of `GRPOTrainer`, with a [`ReinforceConfig`]. Several reward functions are added with
    `reward_weights`. A completion without any reward (all `None`) has no gradient. A training that would leave δ
    unchanged is an error, see [`DeltaIsTrained`].
    """

    _tag_names = ["trl", "reinforce", "transformer-squared"]  # noqa: RUF012 (as in TRL)
    _name = "REINFORCE"
    _paper = {  # noqa: RUF012
        "title": "Transformer²: Self-adaptive LLMs",
        "id": "2501.06252",
        "citation": (
            "@inproceedings{sun2025transformer2,\n"
            "    title     = {{Transformer²: Self-adaptive LLMs}},\n"
            "    author    = {Qi Sun and Edoardo Cetin and Yujin Tang},\n"
            "    booktitle = {International Conference on Learning Representations},\n"
            "    year      = 2025\n"
            "}"
        ),
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(DeltaIsTrained())

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        rewards: torch.Tensor = super()._calculate_rewards(*args, **kwargs)  # [completions of all ranks, functions]
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        if self.args.signed_rewards:
            total = 2 * total - 1
        self._signals = total.masked_fill(rewards.isnan().all(dim=1), 0.0)
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        start = self.accelerator.process_index * len(inputs)
        output["advantages"] = self._signals[start : start + len(inputs)]
        shown = self._logs["advantages"]  # the table of completions
        for _ in range(min(len(shown), len(self._signals))):
            shown.pop()
        shown.extend(self._signals.tolist())
        return output
