"""The options of a training run that TRL's trainers do not have, and the adapter that they describe."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from trl import (
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    ModelConfig,
    RLOOConfig,
    RLOOTrainer,
    ScriptArguments,
    SFTTrainer,
)

from ..scoring.datasets import Columns
from ..scoring.rewards import ANSWERS, REWARDS
from ..tuner.config import SVFConfig
from .reinforce import ReinforceConfig, ReinforceTrainer
from .supervised import SUPERVISED, EvaluatedDPOConfig, EvaluatedSFTConfig

OBJECTIVES: dict[str, tuple[type, type]] = {
    "sft": (EvaluatedSFTConfig, SFTTrainer),
    "dpo": (EvaluatedDPOConfig, DPOTrainer),
    "grpo": (GRPOConfig, GRPOTrainer),
    "rloo": (RLOOConfig, RLOOTrainer),
    "reinforce": (ReinforceConfig, ReinforceTrainer),
}
# Of SVF, and of other methods. REINFORCE has the paper's rate.
RATES = {"sft": (1e-2, 2e-4), "dpo": (3e-3, 1e-5), "grpo": (3e-3, 1e-4), "rloo": (3e-3, 1e-4)}
_LEAST_RATE = 1e-3  # of SVF, below which AdamW hardly changes δ within a usual training


@dataclass
class TrainArguments(ScriptArguments):
    """
    The data and the rewards: a file, folder or dataset, or a task with a verifier. Other fields are those of TRL's
    `ScriptArguments`. The `help` of each field describes it.

    Raises:
        ValueError: The objective is unknown, `categories` is no mapping, or a `task` is given with `categories`.
    """

    dataset_name: Optional[str] = field(
        default=None,
        metadata={
            "help": "A .jsonl, .json, .csv or .parquet file, a folder or a Hub id[:SPLIT]. Without a test split, one "
            "example in five is held out, by a hash of its question; FILE:all holds out none.",
            "aliases": ["--data"],
        },
    )
    objective: str = field(
        default="grpo",
        metadata={"help": "The objective, which also decides the trainer's options.", "choices": [*OBJECTIVES]},
    )
    task: Optional[str] = field(
        default=None,
        metadata={
            "help": "A task instead of a dataset: MODULE:NAME?setting=value&..., such as "
            "reasoning_gym:chain_sum?max_terms=2. A custom module registers its datasets with reasoning_gym."
        },
    )
    # `Union[dict, str]` may come back as `Union[str, dict]` from the cache of `typing`; the parser needs this order.
    categories: dict[str, str] | str | None = field(
        default=None,
        metadata={"help": "Tasks by name (JSON), to train a classification expert that names the task of a prompt."},
    )
    system_prompt: Optional[str] = field(default=None, metadata={"help": "System message of every prompt."})
    answer_format: str = field(
        default="text",
        metadata={"help": "How to extract the answer to a task from a completion.", "choices": list(ANSWERS)},
    )
    chat: bool = field(
        default=False, metadata={"help": "Ask text prompts as messages of a chat; a system prompt implies it."}
    )
    prompt_column: str = field(default="prompt", metadata={"help": "The dataset's column with the prompt."})
    completion_column: Optional[str] = field(
        default=None,
        metadata={"help": "The column with the answer to learn (sft). Default: completion, answer or solution."},
    )
    answer_column: Optional[str] = field(
        default=None,
        metadata={"help": "The dataset's column with the reference answer, which rewards get as `answer`."},
    )
    messages_column: str = field(
        default="messages", metadata={"help": "The column with conversations, if there are no prompts."}
    )
    chosen_column: str = field(default="chosen", metadata={"help": "The column with the better answer (dpo)."})
    rejected_column: str = field(default="rejected", metadata={"help": "The column with the worse answer (dpo)."})
    reward_funcs: Optional[list[str]] = field(
        default=None,
        metadata={
            "help": f"{', '.join(REWARDS)}, dotted paths of functions, or rewards.py:function. Default: the "
            "verifier of the task; exact for sft."
        },
    )
    reward_model_name_or_path: Optional[str] = field(default=None, metadata={"help": "A reward model, as in TRL."})
    reward_timeout: Optional[float] = field(
        default=None,
        metadata={"help": "Seconds after which a call of a reward function is an error. Default: no limit."},
    )
    train_size: int = field(default=2000, metadata={"help": "Training examples of a task."})
    validation_size: int = field(
        default=64,
        metadata={"help": "Examples that choose the best model; held out of the training split if there is no other."},
    )
    test_size: int = field(default=128, metadata={"help": "Examples for the accuracy in the model card."})
    early_stopping_patience: Optional[int] = field(
        default=None, metadata={"help": "Evaluations without a better accuracy before the training stops."}
    )
    base_model_name: Optional[str] = field(
        default=None,
        metadata={"help": "Name of the base model in the saved adapter, if model_name_or_path is a local folder."},
    )

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"`objective` must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}.")
        self.categories = _mapping(self.categories, "categories")
        if self.task and self.categories:
            raise ValueError("Both `task` and `categories` are given. Pass one of them.")

    def columns(self) -> Columns:
        """Return the columns of the data."""
        names = (self.prompt_column, self.completion_column, self.answer_column, self.messages_column)
        return Columns(*names, system_prompt=self.system_prompt, chat=self.chat)


@dataclass
class AdapterArguments(ModelConfig):
    """
    The model and the adapter: TRL's `ModelConfig`, and any PEFT method by name.

    Raises:
        ValueError: PEFT does not know the method, or `peft_kwargs` is no mapping.
    """

    peft_type: str = field(
        default="svf",
        metadata={"help": "A PEFT method: svf, lora, ia3, vera, tinylora, ... The lora_ options are for LoRA only."},
    )
    target_modules: Optional[list[str]] = field(
        default=None, metadata={"help": "Modules to adapt. Default: all-linear."}
    )
    r: Optional[int] = field(default=None, metadata={"help": "Rank of SVF. Default: full."})
    peft_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further fields of the method's PEFT config (JSON)."}
    )
    adapter_name_or_path: Optional[str] = field(
        default=None,
        metadata={"help": "A trained adapter to continue. `model_name_or_path` may name it, too."},
    )
    # no options: the adapter to continue, if there is one
    expert: Optional[str] = field(default=None, init=False)
    expert_revision: Optional[str] = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_kwargs = _mapping(self.peft_kwargs, "peft_kwargs") or {}
        if self.peft_type.upper() not in PEFT_TYPE_TO_CONFIG_MAPPING:
            known = sorted(str(getattr(name, "value", name)).lower() for name in PEFT_TYPE_TO_CONFIG_MAPPING)
            raise ValueError(f"PEFT has no method {self.peft_type!r}; it has {', '.join(known)}.")


_OF_DATA = ("chat", "prompt_column", "completion_column", "answer_column", "messages_column")


def adapter_config(arguments: AdapterArguments) -> PeftConfig:
    """
    Return the PEFT config that the options describe.

    Raises:
        ValueError: The method's config has no field of a given name.
    """
    modules: Any = arguments.target_modules or "all-linear"
    if isinstance(modules, list) and len(modules) == 1:
        modules = modules[0]  # "all-linear", or a regular expression
    extra: Any = arguments.peft_kwargs
    kind = arguments.peft_type.upper()
    config_class: Any = SVFConfig if kind == "SVF" else PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    options: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if "target_modules" in config_class.__dataclass_fields__:
        options["target_modules"] = modules
    if kind == "SVF":
        options["r"] = arguments.r
    if kind == "IA3" and modules == "all-linear":
        options["feedforward_modules"] = []  # otherwise IA3 needs to know which modules are feed-forward
    if kind == "LORA":
        options |= {
            "r": arguments.lora_r,
            "lora_alpha": arguments.lora_alpha,
            "lora_dropout": arguments.lora_dropout,
            "target_modules": arguments.lora_target_modules or modules,
            "modules_to_save": arguments.lora_modules_to_save,
            "use_rslora": arguments.use_rslora,
            "use_dora": arguments.use_dora,
        }
        if arguments.lora_target_parameters:
            options["target_parameters"] = arguments.lora_target_parameters
    options |= extra
    for name in options:
        _check_field(config_class, name)
    return config_class(**options)


def check_given(given: Mapping[str, Any], script: TrainArguments, adapter: AdapterArguments, training: Any) -> None:
    """
    Refuse options that would have no effect.

    Raises:
        ValueError: Such an option was given.
    """
    kind, verified = adapter.peft_type.lower(), script.task is not None
    objective, of_data = script.objective, verified or script.categories
    lora = [name for name in given if name.startswith("lora_") or name in ("use_rslora", "use_dora")]
    unused = {
        **(dict.fromkeys(lora, f"--peft_type lora, not {kind}") if kind != "lora" else {}),
        **({"r": f"--peft_type svf, not {kind} (which has --lora_r or --peft_kwargs)"} if kind != "svf" else {}),
        **({} if verified else {"answer_format": "--task"}),
        **({} if not script.categories else {"system_prompt": "a task or a dataset, not --categories"}),
        **(dict.fromkeys(_OF_DATA, "a dataset") if of_data else {}),
        **({} if objective == "sft" else {"completion_column": "--objective sft"}),
        **({} if objective == "dpo" else dict.fromkeys(("chosen_column", "rejected_column"), "--objective dpo")),
        **({"reward_model_name_or_path": "--objective grpo, rloo or reinforce"} if objective in SUPERVISED else {}),
        **({"early_stopping_patience": "--eval_strategy steps"} if training.eval_strategy == "no" else {}),
    }
    for name, wanted in unused.items():
        if given.get(name) is not None:
            raise ValueError(f"--{name} would have no effect: it is for {wanted}. Remove it.")


def defaults(objective: str, peft_type: str) -> dict[str, Any]:
    """Return the defaults that differ from TRL's, for SVF and for CPUs. A recipe and the command line override them."""
    chosen: dict[str, Any] = {
        "output_dir": f"outputs/{peft_type.lower()}-{objective}",
        "logging_steps": 1,
        "metric_for_best_model": "eval_accuracy",
        "per_device_eval_batch_size": 32,
        "num_generations_eval": 1,
        "save_total_limit": 2,  # the newest and the best
        "logging_nan_inf_filter": False,  # it would show the mean of earlier losses in place of NaN
    }
    if objective in SUPERVISED:
        chosen["metric_for_best_model"] = "eval_loss"
    if objective in RATES:
        chosen["learning_rate"] = RATES[objective][peft_type.upper() != "SVF"]
    if not torch.accelerator.is_available():
        # On most CPUs bf16 autocast is three times slower than fp32.
        chosen |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "activation_checkpointing": False}
    return chosen


def warn_of_low_rate(training: Any, peft_type: str) -> None:
    """Warn about a learning rate that is right for LoRA, with which SVF learns nothing."""
    optimizer = str(getattr(training.optim, "value", training.optim))
    if peft_type.upper() == "SVF" and "adam" in optimizer and training.learning_rate < _LEAST_RATE:
        warnings.warn(
            f"--learning_rate {training.learning_rate:g} is too low for SVF, which needs 10 to 30 times the rate of "
            "LoRA. Use 0.001 to 0.03.",
            stacklevel=2,
        )


def _mapping(value: Any, name: str) -> Any:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"`{name}` must be JSON, got {value!r}: {error}.") from error
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"`{name}` must be a mapping, got {value!r}.")
    return value


def _check_field(config_class: Any, name: str) -> None:
    fields = config_class.__dataclass_fields__
    if name not in fields:
        raise ValueError(f"{config_class.__name__} has no field {name!r}; it has {', '.join(sorted(fields))}.")
