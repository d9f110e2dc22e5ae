"""Continue the training of a saved adapter: `--adapter_name_or_path`, or `--model_name_or_path` in place of a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers.utils import find_adapter_config_file
from trl import get_quantization_config
from trl.trainer.utils import create_model_from_path

from .arguments import AdapterArguments

_OF_A_NEW_ADAPTER = ("peft_type", "r", "target_modules", "peft_kwargs", "use_rslora", "use_dora")


def saved_config(name: str | None, revision: str | None = None) -> PeftConfig | None:
    """
    Return the config of the adapter of this name; `None` if it is a model.

    Args:
        name: Folder or Hub id. A folder that also holds a whole model is a model.
        revision: Revision on the Hub.

    Raises:
        ValueError: The adapter does not name its base model.
        FileNotFoundError: There is no such folder.
    """
    if name is not None and name.startswith(("/", "./", "../")) and not Path(name).exists():
        raise FileNotFoundError(f"There is no folder {name}. Pass a folder or a Hub id.")
    if name is None or Path(name, "config.json").is_file():
        return None
    if find_adapter_config_file(name, revision=revision) is None:
        return None
    config = PeftConfig.from_pretrained(name, revision=revision)
    if not config.base_model_name_or_path:
        raise ValueError(
            f"{name} is an adapter that does not name its base model. Add `base_model_name_or_path` to its "
            "adapter_config.json."
        )
    return config


def continue_from(arguments: AdapterArguments, config: PeftConfig, given: Mapping[str, Any]) -> None:
    """
    Let the options name the base model of a saved adapter, and the adapter as the one to continue.

    Raises:
        ValueError: An option describes a new adapter.
    """
    kind = str(config.peft_type.value).lower()
    expert = arguments.adapter_name_or_path or arguments.model_name_or_path
    for name in given:
        same = name == "peft_type" and given[name].lower() == kind
        if (name in _OF_A_NEW_ADAPTER or name.startswith("lora_")) and not same:
            raise ValueError(
                f"--{name} would have no effect: {expert} is a trained {kind} adapter, and the "
                "training continues it as it is. Remove the option, or name a base model."
            )
    arguments.peft_type = kind
    arguments.expert = expert
    if arguments.adapter_name_or_path is None:
        arguments.expert_revision = arguments.model_revision
        arguments.model_name_or_path = arguments.model_revision = None
    if arguments.model_name_or_path is None:
        arguments.model_name_or_path, arguments.model_revision = config.base_model_name_or_path, config.revision


def continued_model(arguments: AdapterArguments, training: Any) -> PeftModel:
    """Return the base model with the trainable adapter to continue. TRL loads base models in the same way."""
    options = {"trust_remote_code": training.trust_remote_code, **training.model_init_kwargs}
    if (quantization := get_quantization_config(arguments)) is not None:
        options["quantization_config"] = quantization
    if training.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    base = create_model_from_path(arguments.model_name_or_path, **options)
    model: PeftModel = PeftModel.from_pretrained(
        base, arguments.expert, revision=arguments.expert_revision, is_trainable=True
    )
    return model
