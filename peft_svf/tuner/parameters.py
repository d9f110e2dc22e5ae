"""The parameters of an SVF layer: δ, which is trained, and the name of Q, which is not."""

from __future__ import annotations

import torch
from torch import nn

# The basis is a frozen Parameter, so that FSDP2 and ZeRO-3 shard it and DDP does not broadcast it in every forward. Its
# name must hold "original_module", by which TRL's weight sync to vLLM skips it, and must not hold the prefix "svf_", by
# which PEFT and transformers recognise what is trained and what belongs into the checkpoint.
BASIS_NAME = "original_module_basis"


class Delta(nn.Module):
    """δ of one adapter on one layer: `[r]`, fp32.

    A module with a `weight`, because that is the pattern by which TRL copies the reference adapter and PEFT's FSDP
    policy finds trainable leaves. Call it, do not read its weight: only a call runs the hooks with which FSDP and CPU
    offload bring the values in, and only a fresh tensor outlives their return.
    """

    def __init__(self, r: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(r, dtype=torch.float32))

    def forward(self) -> torch.Tensor:
        """δ as a new tensor `[r]`, fp32 (fp64 if the model is)."""
        return self.weight.to(torch.promote_types(self.weight.dtype, torch.float32), copy=True)

    def extra_repr(self) -> str:
        return f"r={self.weight.shape[0]}"
