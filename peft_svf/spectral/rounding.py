"""The fraction of a change that survives in a weight of low precision."""

from __future__ import annotations

import torch

from .basis import gate_side

SAMPLED_ROWS = 64


@torch.no_grad()
def surviving_fraction(
    weight: torch.Tensor, basis: torch.Tensor, delta: torch.Tensor, dtype: torch.dtype, rows: int | None = SAMPLED_ROWS
) -> float:
    """
    Return the fraction of ΔW in `round(W + ΔW) - round(W)`, in the direction of ΔW.

    A change below half a unit in the last place is rounded away: in bf16, half of ΔW is lost at δ ~ 1e-3. If ΔW is
    nearly proportional to W, all of it may be rounded up; the excess counts as lost, too.

    Estimated from evenly spaced rows of the weight, for the cost of the gate on that many tokens.

    Args:
        weight (`torch.Tensor`): `W`, `[out, in]`.
        basis (`torch.Tensor`): `Q`, `[min(out, in), r]`.
        delta (`torch.Tensor`): δ, `[r]`.
        dtype (`torch.dtype`): The dtype of the stored W(z).
        rows (`int`, *optional*): Number of rows to use; all if `None`.

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
    fraction = float((kept.double() * change.double()).sum() / total) if total > 0 else 1.0
    return min(fraction, 2.0 - fraction)
