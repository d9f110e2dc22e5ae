"""How answers are scored: reward functions, and objectives that apply them to a model. Knows models and tokenizers, no
adapters; training and adaptation stand on it."""

from .categories import classification_prompt
from .objectives import LogLikelihoodObjective, Objective, RewardObjective
from .rewards import ANSWERS, REWARDS, RewardFunc, check_rewards, checked, choice, find_reward, reward_name, text_of

__all__ = [
    "ANSWERS",
    "REWARDS",
    "LogLikelihoodObjective",
    "Objective",
    "RewardFunc",
    "RewardObjective",
    "check_rewards",
    "checked",
    "choice",
    "classification_prompt",
    "find_reward",
    "reward_name",
    "text_of",
]
