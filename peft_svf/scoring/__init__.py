"""How answers are scored: reward functions, and objectives that apply them to a model. Knows models and tokenizers, no
adapters."""

from .categories import classification_prompt, named_category, readable, right_category
from .datasets import load_examples
from .expected_reward import ExpectedRewardObjective
from .objectives import LogLikelihoodObjective, Objective, RewardObjective, WeightedObjective
from .prefix import Prefix, read_prefix
from .rewards import (
    ANSWERS,
    REWARDS,
    RewardFunc,
    check_rewards,
    checked,
    content_text,
    find_reward,
    reward_name,
    text_of,
)

__all__ = [
    "ANSWERS",
    "REWARDS",
    "ExpectedRewardObjective",
    "LogLikelihoodObjective",
    "Objective",
    "Prefix",
    "RewardFunc",
    "RewardObjective",
    "WeightedObjective",
    "check_rewards",
    "checked",
    "classification_prompt",
    "content_text",
    "find_reward",
    "load_examples",
    "named_category",
    "read_prefix",
    "readable",
    "reward_name",
    "right_category",
    "text_of",
]
