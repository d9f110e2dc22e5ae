"""Experts of an offline engine, `vllm.LLM`: load them, replace their δ, fold one."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save

from .mixtures import SCHEME, mixture_name

_NUMBERS = itertools.count(1)


def add_experts(llm: Any, experts: Mapping[str, str | Mapping[str, float] | None]) -> dict[str, Any]:
    """
    Load experts into an engine, and return the `LoRARequest` of each, for `llm.generate(..., lora_request=[...])`.

    A `LoRARequest` that was not loaded before is loaded in the middle of a step. If it cannot be, vLLM's engine dies.
    Here it is refused, and the engine lives on.

    Args:
        llm: A `vllm.LLM`, started with [`engine_options`].
        experts: By name: the folder or Hub id of an expert, or the weights of a mixture of experts that are loaded or
            come before it. `None` for zeros, to be replaced by [`update_expert`].

    Raises:
        Exception: An expert cannot be served. vLLM wraps the message in another exception.
    """
    from vllm.lora.request import LoRARequest

    requests = {}
    for name, source in experts.items():
        path = source if isinstance(source, str) else SCHEME + mixture_name(source or {})
        requests[name] = LoRARequest(name, next(_NUMBERS), path)
        llm.llm_engine.add_lora(requests[name])
    return requests


def update_expert(llm: Any, name: str, deltas: Mapping[str, torch.Tensor]) -> None:
    """
    Replace δ of a loaded expert, for its next requests, and reset the prefix cache.

    Args:
        llm: The engine.
        name: The expert.
        deltas: δ by module name, or the tensors of an adapter's file.

    Raises:
        RuntimeError: Requests are running, so that the prefix cache cannot be reset. δ is not replaced.
        Exception: The expert is not loaded, or δ cannot be served. vLLM passes on the message.
    """
    if not llm.reset_prefix_cache():
        raise RuntimeError(f"The engine is running requests. Replace δ of {name!r} when they are done.")
    llm.collective_rpc("peft_svf_update", args=(name, adapter_bytes(deltas)))


def fold_expert(llm: Any, name: str | None) -> None:
    """
    Compute the weights of one expert, so that steps with this expert alone cost as much as those of the base model.

    Steps with other experts or base rows use the gate, as before. Folding needs memory for a second copy of the weights
    and takes seconds.

    Args:
        llm: The engine.
        name: The expert or mixture. `None` drops the weights; the model is then the same as before, bit for bit.

    Raises:
        Exception: The expert is not loaded or cannot be folded. vLLM passes on the message.
    """
    llm.collective_rpc("peft_svf_fold", args=(name,))


def adapter_bytes(deltas: Mapping[str, torch.Tensor]) -> bytes:
    """Return δ as the content of an adapter's file, which `peft_svf_update` takes.

    Args:
        deltas: δ by module name, or by the keys of an adapter's file.
    """
    suffix = ".svf_delta.weight"
    return save(
        {
            name if name.endswith(suffix) else f"{name}{suffix}": delta.detach().float().cpu().contiguous()
            for name, delta in deltas.items()
        }
    )
