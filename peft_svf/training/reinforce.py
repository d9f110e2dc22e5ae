"""The paper's objective: REINFORCE with a KL term, one completion per prompt and no baseline.

    J(θ) = E[ r(ŷ, y) log π(ŷ|x) ] - λ KL(π ‖ π_base)      (Transformer², eq. 2; r = ±1)

TRL has no plain policy gradient; GRPO with one completion per prompt and the reward itself as its advantage is one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from trl import GRPOConfig, GRPOTrainer


@dataclass
class ReinforceConfig(GRPOConfig):
    """
    Configuration of a [`ReinforceTrainer`]: TRL's `GRPOConfig` with the paper's settings (Table 6) as defaults.

    `beta` is the paper's λ, which it chose among 0, 0.1, 0.2 and 0.3 on validation data. The loss of a sequence is the
    sum over its tokens, divided by `max_completion_length` (`loss_type="dr_grpo"`): a constant, which matters for
    `max_grad_norm` and `beta` only. Rewards are not normalized, so that `scale_rewards` and
    `multi_objective_aggregation` are without effect.

    Args:
        signed_rewards (`bool`):
            Rewards are 1 for right and 0 for wrong, and count 1 and −1: without a baseline, a reward of 0 teaches
            nothing. It is the weighted sum of several that is mapped so. `False` takes rewards as they are.
    """

    signed_rewards: bool = field(
        default=True, metadata={"help": "Rewards are 1 and 0, and count 1 and -1. False takes them as they are."}
    )

    num_generations: Optional[int] = field(
        default=1, metadata={"help": "Completions per prompt. REINFORCE has no baseline, so more bring nothing but 1."}
    )
    learning_rate: float = field(default=2e-3, metadata={"help": "The initial learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The scheduler type to use."})
    max_grad_norm: float = field(default=1e-3, metadata={"help": "Max gradient norm."})
    loss_type: str = field(default="dr_grpo", metadata={"help": "Sum over tokens over a constant: unbiased."})
    scale_rewards: str = field(default="none", metadata={"help": "Without effect: rewards are used as they are."})

    def __post_init__(self) -> None:
        if self.num_generations not in (None, 1):
            raise ValueError(
                f"`num_generations` must be 1 for REINFORCE, got {self.num_generations}: a prompt's completions are "
                "not compared with each other. For that, use GRPO or RLOO."
            )
        if self.num_iterations != 1:
            raise ValueError(f"`num_iterations` must be 1 for REINFORCE, got {self.num_iterations}: it is on-policy.")
        if self.steps_per_generation is not None and self.steps_per_generation > self.gradient_accumulation_steps:
            raise ValueError(
                f"`steps_per_generation` ({self.steps_per_generation}) must not be greater than "
                f"`gradient_accumulation_steps` ({self.gradient_accumulation_steps}) for REINFORCE: it is on-policy."
            )
        # TRL refuses one generation, as GRPO would learn nothing from it. All that follows from this number is that it
        # must divide the completions of a step, which are a multiple of each of these.
        parts = (self.per_device_train_batch_size, self.steps_per_generation or self.gradient_accumulation_steps)
        if max(parts) < 2:
            raise ValueError("REINFORCE needs more than one completion per step: raise `per_device_train_batch_size`.")
        self.num_generations = max(parts)
        self.num_generations_eval: Optional[int] = self.num_generations_eval or 1
        super().__post_init__()
        self.num_generations = 1


class ReinforceTrainer(GRPOTrainer):
    """
    TRL's `GRPOTrainer` with the rewards themselves in the place of group-relative advantages.

    Takes the arguments of `GRPOTrainer`, with a [`ReinforceConfig`]. Several reward functions are added up by
    `reward_weights`. A completion that none of them scores (all `None`) has no part in the gradient.
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
