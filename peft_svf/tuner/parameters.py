"""The parameters of an SVF layer: the trainable δ, and the name of the frozen Q."""

from __future__ import annotations

import torch
from torch import nn

# The basis is a frozen Parameter, so FSDP2 and ZeRO-3 shard it and DDP does not broadcast it in every forward. Its name
# must contain "original_module", which TRL's weight sync to vLLM skips. It must not contain the prefix "svf_", by which
# PEFT and transformers recognise trainable parameters and the content of a checkpoint.
BASIS_NAME = "original_module_basis"


class Delta(nn.Module):
    """δ of one adapter on one layer: `[r]`, fp32.

    A module with a `weight`, because TRL copies the reference adapter and PEFT's FSDP policy finds trainable leaves by
    this pattern. Call it instead of reading its weight: only a call runs the hooks by which FSDP and CPU offload bring
    in the values, and only a new tensor stays valid after they are taken away again.
    """

    def __init__(self, r: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(r, dtype=torch.float32))

    def forward(self) -> torch.Tensor:
        """Return δ as a new tensor `[r]`, in fp32 (fp64 if the model is in fp64)."""
        return self.weight.to(torch.promote_types(self.weight.dtype, torch.float32), copy=True)

    def extra_repr(self) -> str:
        return f"r={self.weight.shape[0]}"
