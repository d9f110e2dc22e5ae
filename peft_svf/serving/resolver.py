"""Requests to a server may name a mixture as their model: `math=0.7,logic=0.3`."""

from __future__ import annotations

import logging
from typing import Any

from .mixtures import SCHEME, parse_mixture, unknown_experts
from .options import ServingOptions

_log = logging.getLogger(__name__)


def mixture_resolver(models: Any, vllm_config: Any) -> Any:
    """Return the resolver of a server.

    Args:
        models: Its `OpenAIServingModels`, which knows the loaded experts.
        vllm_config: Configuration of its engine.

    Raises:
        ValueError: The engine was not started for adapters, or its settings are not valid.
    """
    if vllm_config.lora_config is None:
        raise ValueError(
            "An engine that serves experts needs `--enable-lora`, because they take the place of LoRA adapters."
        )
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    options = ServingOptions.of_engine(vllm_config)
    seen: set[str] = set()

    class MixtureResolver(LoRAResolver):
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            path = mixture_path(lora_name, models.lora_requests)
            if path is None:
                return None
            if lora_name not in seen and len(seen) >= options.max_mixtures:
                _log.warning("%r is refused: clients have named %d mixtures.", lora_name, len(seen))
                return None
            seen.add(lora_name)
            return LoRARequest(lora_name, 1, path)  # vLLM replaces the number

    return MixtureResolver()


def mixture_path(name: str, experts: dict[str, Any]) -> str | None:
    """Return the path of a mixture, `None` if the name is not one of served experts.

    Args:
        name: The model of a request.
        experts: The loaded experts by name.
    """
    if "=" not in name:
        return None
    try:
        message = unknown_experts(parse_mixture(name), experts)
    except ValueError as error:
        message = str(error)
    if message:
        _log.warning("%s", message)
        return None
    return SCHEME + name
