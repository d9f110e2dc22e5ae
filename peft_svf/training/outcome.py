"""Whether a training taught anything: rewards that differed, and finite numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback


class NothingLearnedError(RuntimeError):
    """A training ended with an adapter that is not worth saving."""


class StopAtNaN(TrainerCallback):
    """Stop a training when its loss is not a finite number, before anything is saved."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            control.should_training_stop = True
            control.should_save = control.should_evaluate = False


def check_outcome(trainer: Any) -> None:
    """
    Refuse an adapter of a training that failed.

    Raises:
        NothingLearnedError: A loss or a trained parameter is not finite, or all rewards were equal through the run.
    """
    history, rate = trainer.state.log_history, trainer.args.learning_rate
    for entry in history:
        if not math.isfinite(entry.get("loss", 0.0)):
            raise NothingLearnedError(
                f"The loss is {entry['loss']} at step {entry['step']}, so nothing is saved. Use a smaller "
                f"--learning_rate than {rate:g}, or a smaller --max_grad_norm. Check the data for empty answers."
            )
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise NothingLearnedError(
                f"The trained parameter {name} is not finite, so nothing is saved. Use a smaller --learning_rate than "
                f"{rate:g}."
            )
    reward = equal_reward(history, getattr(trainer.args, "num_generations", 1))
    if reward is not None:
        raise NothingLearnedError(
            f"All completions of each prompt got the same reward in all steps (mean {reward:.3g}), so nothing was "
            "learned and nothing is saved. Look at the answers with --log_completions true: does the reward accept "
            f"their form, and are they whole? Otherwise use {'harder' if reward >= 1 else 'easier'} questions, or "
            "train on pairs first (--objective sft)."
        )


def equal_reward(history: Sequence[Mapping[str, Any]], num_generations: int) -> float | None:
    """Return the mean reward if no step had a signal to learn from; `None` if there was one, or no rewards.

    There is none if all completions of each prompt got the same reward, or all completions of the run.
    """
    steps = [entry for entry in history if "reward" in entry]
    if not steps:
        return None
    # TRL logs `None` if no reward function applies to any completion
    rewards = [entry["reward"] for entry in steps if entry["reward"] is not None]
    if not rewards:
        return math.nan
    # with one completion per prompt, as in REINFORCE, the fraction is always 1
    grouped = num_generations > 1 and all((entry.get("frac_reward_zero_std") or 0.0) >= 1.0 for entry in steps)
    close = math.isclose(max(rewards), min(rewards), rel_tol=1e-6) and not any(e.get("reward_std") for e in steps)
    return sum(rewards) / len(rewards) if grouped or close else None
