"""Which way of searching suits a task: what `method="auto"` decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

import numpy as np

from ..scoring.expected_reward import ExpectedRewardObjective
from ..scoring.objectives import Objective
from ..utils.processes import is_sharded
from .config import SearchConfig

FEW = 6  # examples; below that a weight per layer cannot be cross-validated
SMALLEST_DIFFERENCE = 1e-4  # of expected rewards, as a fraction of the largest reward


@dataclass(frozen=True)
class Method:
    """
    A way of searching.

    Attributes:
        name: `"gradient"`, `"cem"`, `"cma-es"`, or the class of a custom optimizer.
        granularity: See [`SearchConfig`].
        expected_reward: Whether the expected reward of collected answers is optimized, not the reward of new ones.
        reason: Why, for the user.
    """

    name: str
    granularity: Union[str, Mapping[str, str]]
    expected_reward: bool
    reason: str

    def __str__(self) -> str:
        what = "expected reward" if self.expected_reward else "objective"
        names = {"gradient": "gradient of the", "cem": "cross-entropy method on the", "cma-es": "CMA-ES on the"}
        groups = {"expert": "", "layer": " and layer", "module": " and module"}
        shared = groups.get(self.granularity, " and group") if isinstance(self.granularity, str) else " and group"
        return f"{names.get(self.name, f'{self.name} on the')} {what}, one weight per expert{shared}: {self.reason}"


def choose_method(
    config: SearchConfig, objective: Objective, examples: int, model: Any, optimizer: Any = None
) -> Method:
    """
    Return the way of searching that the settings ask for, or that suits the task.

    Args:
        config ([`SearchConfig`]): With `method="auto"`, the objective and the model decide.
        objective ([`Objective`]): What is optimized.
        examples (`int`): Number of different prompts in the examples of the search.
        model: The model; a gradient needs a backward pass through it.
        optimizer ([`Optimizer`], *optional*): A custom optimizer.

    Raises:
        ValueError: The objective has no gradient, or no answers to collect.
    """
    reward = objective.rewards_answers
    if optimizer is not None:
        by_gradient, name, reason = optimizer.uses_gradient, optimizer.name, "a custom optimizer"
    elif config.method != "auto":
        by_gradient, name, reason = config.method == "gradient", config.method, "as asked"
    elif not (reward or objective.differentiable):
        by_gradient, name, reason = False, "cem", f"the objective {objective.name!r} has no gradient"
    elif reward and config.expected_reward is False:
        by_gradient, name, reason = False, "cem", "a reward has no gradient, and `expected_reward` is off"
    elif (obstacle := obstacle_to_gradient(model)) is not None:
        by_gradient, name, reason = False, "cem", obstacle
    else:
        by_gradient, name, reason = (
            True,
            "gradient",
            f"{examples} example{'s' * (examples > 1)}, and a backward pass is possible",
        )
    if by_gradient and not (reward or objective.differentiable):
        raise ValueError(
            f"The objective {objective.name!r} has no gradient. Use method='cem', or an objective that declares "
            "`differentiable` or `rewards_answers`."
        )
    collects = by_gradient and reward if config.expected_reward is None else config.expected_reward
    if collects and not reward:
        raise ValueError(
            f"`expected_reward` needs rewards of generated answers, and the objective is {objective.name!r}. "
            "Leave it out."
        )
    if by_gradient and reward and not collects:
        raise ValueError("The gradient of a reward needs `expected_reward`. Leave it out, or use method='cem'.")
    granularity = config.granularity
    if granularity is None:
        # a custom optimizer was made for a number of variables, which must not depend on the examples
        by_layer = by_gradient and reward and examples >= FEW and optimizer is None
        granularity = "layer" if by_layer else "expert"
    return Method(name, granularity, collects, reason)


def obstacle_to_gradient(model: Any) -> str | None:
    """Return why no gradient reaches the mixture weights; `None` if it does."""
    quantizer = getattr(model.get_base_model(), "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_trainable:
        return "the quantized weights pass no gradient"
    if is_sharded(model):
        return "the model is sharded"
    if any(parameter.is_meta or parameter.is_inference() for parameter in model.parameters()):
        return "some weights are offloaded or were made in inference mode"
    return None


def lack_of_signal(objective: ExpectedRewardObjective, scores: np.ndarray, examples: Sequence[int]) -> str | None:
    """
    Return why collected answers cannot guide a search; `None` if they can.

    Args:
        objective ([`ExpectedRewardObjective`]): Has the collected answers.
        scores (`np.ndarray`): Expected rewards of the baselines, `[baselines, examples]`.
        examples (`Sequence[int]`): Indices of the examples of the search.
    """
    if not any(objective.num_answers(i) for i in examples):
        return "no answer got a reward above the lowest one"
    rewards = [{reward for _, reward in row["answers"]} for row in (objective.examples[i] for i in examples)]
    if all(len(different) < 2 for different in rewards):
        return "all answers to an example got the same reward"
    largest = max(abs(reward) for different in rewards for reward in different)
    if np.ptp(scores, axis=0).max() < SMALLEST_DIFFERENCE * largest:
        return "the rewarded answers have next to no probability"
    return None
