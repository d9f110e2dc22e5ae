"""How much of a change survives when it is added to a weight that is stored in few bits."""

from __future__ import annotations

import torch

from .basis import gate_side

SAMPLED_ROWS = 64


@torch.no_grad()
def surviving_fraction(
    weight: torch.Tensor, basis: torch.Tensor, delta: torch.Tensor, dtype: torch.dtype, rows: int | None = SAMPLED_ROWS
) -> float:
    """
    Share of ΔW that is left in `round(W + ΔW) - round(W)`, in the direction of ΔW.

    A change below half a unit in the last place is rounded away: in bf16 half of ΔW is gone at δ ~ 1e-3. It can also be
    rounded up as a whole, when ΔW is nearly proportional to W; what is too much counts as lost in the same way.

    Estimated from evenly spaced rows of the weight, computed exactly, so that it costs as much as sending that many
    tokens through the gate.

    Args:
        weight (`torch.Tensor`): `W`, `[out, in]`.
        basis (`torch.Tensor`): `Q`, `[min(out, in), r]`.
        delta (`torch.Tensor`): δ, `[r]`.
        dtype (`torch.dtype`): What W(z) would be kept in.
        rows (`int`, *optional*): How many rows to look at; all if `None`.

    Returns:
        `float`: At most 1; 1 if δ = 0, and near 1 for dtypes of 32 and 64 bits.
    """
    out_features = weight.shape[0]
    count = min(rows or out_features, out_features)
    index = torch.linspace(0, out_features - 1, count, device=weight.device).round().long()
    work = torch.promote_types(delta.dtype, torch.float32)
    d, some = delta.to(work), weight[index].to(work)
    with torch.autocast(weight.device.type, enabled=False):
        if gate_side(*weight.shape) == "output":
            gated = (basis[index].to(work) * d).to(basis.dtype) @ basis.mT
            change = gated.to(weight.dtype) @ weight
        else:
            change = ((weight[index].to(basis.dtype) @ basis).to(work) * d).to(basis.dtype) @ basis.mT
    change = change.to(work)
    kept = (some + change).to(dtype).to(work) - some.to(dtype).to(work)
    total = change.double().pow(2).sum()
    share = float((kept.double() * change.double()).sum() / total) if total > 0 else 1.0
    return min(share, 2.0 - share)
