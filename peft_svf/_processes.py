"""The processes that a program was launched as."""

from __future__ import annotations

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """accelerate's state; without an accelerator it counts several processes only when told that they are on CPUs."""
    return PartialState(cpu=not torch.accelerator.is_available())
