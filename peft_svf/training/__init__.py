"""Training of experts by reinforcement learning with TRL's trainers."""

from ..utils.extras import needs

try:
    from .callbacks import EqualRewards, ExactState, RewardBar
    from .checks import DeltaIsTrained
    from .evaluation import GreedyEvaluation, greedy_accuracy, greedy_scores
    from .reinforce import ReinforceConfig, ReinforceTrainer
    from .report import Record, machine
    from .tasks import ClassificationTask, ReasoningGymTask, Task, find_task, split_of
except ModuleNotFoundError as error:
    if error.name in ("trl", "datasets", "yaml"):
        raise needs("train", "Training", error.name) from error
    raise

__all__ = [
    "ClassificationTask",
    "DeltaIsTrained",
    "EqualRewards",
    "ExactState",
    "GreedyEvaluation",
    "ReasoningGymTask",
    "Record",
    "ReinforceConfig",
    "ReinforceTrainer",
    "RewardBar",
    "Task",
    "find_task",
    "greedy_accuracy",
    "greedy_scores",
    "machine",
    "split_of",
]
