"""Two ways to compute the same thing: the gate on activations, and the effective weight `W(z)`.

With `z = 1 + δ`, `W(z) = U diag(σ ⊙ z) Vᵀ` (Transformer², eq. 1) is, exactly,

    out <= in:  W(z) = W + Q diag(δ) Qᵀ W,   y = g(W x)        g(h) = h + Q (δ ⊙ Qᵀ h)
    out >  in:  W(z) = W + W Q diag(δ) Qᵀ,   y = W g(x)

so neither σ nor the second factor is needed, and δ = 0 leaves every bit as it was.
"""

from __future__ import annotations

import torch

from .basis import gate_side


def gate_correction(h: torch.Tensor, basis: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """What the gate adds: `g(h) - h = Q (δ ⊙ Qᵀ h)`.

    Args:
        h (`torch.Tensor`): `[..., k]`, in the dtype of `basis`.
        basis (`torch.Tensor`): `Q`, `[k, r]`.
        delta (`torch.Tensor`): δ, `[r]`, fp32 (fp64 for an fp64 model); the product with it is taken in its precision.

    Returns:
        `torch.Tensor`: `[..., k]`, all zeros where δ = 0.
    """
    coefficients = (h @ basis) * delta
    return coefficients.to(basis.dtype) @ basis.mT


def gate(h: torch.Tensor, basis: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """The spectral gate `g(h) = h + Q (δ ⊙ Qᵀ h)`. Arguments as in [`gate_correction`]."""
    return h + gate_correction(h, basis, delta)


def delta_weight(weight: torch.Tensor, basis: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """`ΔW = W(z) - W`.

    Args:
        weight (`torch.Tensor`): `W`, `[out, in]`.
        basis (`torch.Tensor`): `Q`, `[min(out, in), r]`.
        delta (`torch.Tensor`): δ, `[r]`.

    Returns:
        `torch.Tensor`: `[out, in]` in fp32, or fp64 if `weight` or `delta` is.
    """
    dtype = torch.promote_types(torch.promote_types(weight.dtype, delta.dtype), torch.float32)
    W, Q, d = weight.to(dtype), basis.to(dtype), delta.to(dtype)
    if gate_side(*weight.shape) == "output":
        return Q @ (d.unsqueeze(1) * (Q.mT @ W))
    return ((W @ Q) * d) @ Q.mT


def effective_weight(weight: torch.Tensor, basis: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """`W(z)` in `weight`'s dtype, rounded once. Arguments as in [`delta_weight`]."""
    change = delta_weight(weight, basis, delta)
    return (weight.to(change.dtype) + change).to(weight.dtype)
