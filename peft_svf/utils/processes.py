"""The processes that a program was launched as, and what they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

T = TypeVar("T")


def processes() -> PartialState:
    """Return accelerate's state. Without an accelerator it must be told that the processes are on CPUs."""
    return PartialState(cpu=not torch.accelerator.is_available())


def by_main_process(function: Callable[[], T]) -> T:
    """What it returns in the main process, or raises there, in all processes."""
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
    """A program's last exchange with the other processes: wait for all of them, and end the group.

    gloo may still hold Python's tensors of the exchange before, and aborts when it frees them while Python exits
    (pytorch/pytorch#190489); a barrier has none, and comes after it.
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
