"""The processes of a distributed program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

T = TypeVar("T")


def processes() -> PartialState:
    """Return accelerate's state. Without an accelerator it must be told that the processes run on CPUs."""
    return PartialState(cpu=not torch.accelerator.is_available())


def by_main_process(function: Callable[[], T]) -> T:
    """Call a function in the main process, and return its result or raise its error in all processes."""
    found: list[tuple[T | None, Exception | None]] = [(None, None)]
    if processes().is_main_process:
        try:
            found = [(function(), None)]
        except Exception as error:
            found = [(None, error)]
    broadcast_object_list(found)
    result, failure = found[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def leave() -> None:
    """Wait for all processes and end the process group. Call it last.

    gloo may still hold tensors of the previous exchange, and aborts if it frees them while Python exits
    (pytorch/pytorch#190489). The barrier comes after that exchange and has no tensors.
    """
    state = processes()
    state.wait_for_everyone()
    state.destroy_process_group()


def is_sharded(model: Any) -> bool:
    """Whether the weights of a model are spread over processes, by FSDP, tensor parallelism or ZeRO-3."""
    from torch.distributed.tensor import DTensor

    return any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()) or any(
        isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters()
    )
