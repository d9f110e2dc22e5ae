"""How answers are scored: reward functions, and objectives that apply them to a model. Knows models and tokenizers, no
adapters; training and adaptation stand on it."""

from .categories import begun_text, classification_prompt, named_category, right_category
from .objectives import LogLikelihoodObjective, Objective, RewardObjective, WeightedObjective
from .prefix import Prefix, read_prefix
from .rewards import ANSWERS, REWARDS, RewardFunc, check_rewards, checked, find_reward, reward_name, text_of

__all__ = [
    "ANSWERS",
    "REWARDS",
    "LogLikelihoodObjective",
    "Objective",
    "Prefix",
    "RewardFunc",
    "RewardObjective",
    "WeightedObjective",
    "begun_text",
    "check_rewards",
    "checked",
    "classification_prompt",
    "find_reward",
    "named_category",
    "read_prefix",
    "reward_name",
    "right_category",
    "text_of",
]
