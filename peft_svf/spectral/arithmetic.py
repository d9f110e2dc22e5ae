"""Two equivalent forms of SVF: the gate on activations, and the effective weight `W(z)`.

With `z = 1 + δ`, `W(z) = U diag(σ ⊙ z) Vᵀ` (Transformer², eq. 1) is, exactly,

    out <= in:  W(z) = W + Q diag(δ) Qᵀ W,   y = g(W x)        g(h) = h + Q (δ ⊙ Qᵀ h)
    out >  in:  W(z) = W + W Q diag(δ) Qᵀ,   y = W g(x)

so neither σ nor the second factor is needed, and δ = 0 leaves every bit unchanged.
"""

from __future__ import annotations

import torch

from .basis import gate_side

# A call with fewer tokens costs as much as one with this many, because reading Q then takes longer than multiplying.
# Measured: a call with 1 token costs as much as 8 to 10 tokens of a long call, a call with 8 tokens as much as 17.
MIN_TOKENS = 16


def gate_correction(h: torch.Tensor, basis: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Return the change made by the gate: `g(h) - h = Q (δ ⊙ Qᵀ h)`.

    Args:
        h (`torch.Tensor`): `[..., k]`, in the dtype of `basis`.
        basis (`torch.Tensor`): `Q`, `[k, r]`.
        delta (`torch.Tensor`): δ, `[r]`, or one per batch row, `[b, 1, ..., r]`; fp32 (fp64 for an fp64 model). The
            product with it is computed in its precision.

    Returns:
        `torch.Tensor`: `[..., k]`, all zeros where δ = 0.
    """
    coefficients = (h @ basis) * delta
    return coefficients.to(basis.dtype) @ basis.mT


def gate(h: torch.Tensor, basis: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Return the spectral gate `g(h) = h + Q (δ ⊙ Qᵀ h)`. Arguments as in [`gate_correction`]."""
    return h + gate_correction(h, basis, delta)


def delta_weight(weight: torch.Tensor, basis: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Return `ΔW = W(z) - W`.

    Args:
        weight (`torch.Tensor`): `W`, `[out, in]`.
        basis (`torch.Tensor`): `Q`, `[min(out, in), r]`.
        delta (`torch.Tensor`): δ, `[r]`.

    Returns:
        `torch.Tensor`: `[out, in]` in fp32, or fp64 if `weight` or `delta` is.
    """
    dtype = torch.promote_types(torch.promote_types(weight.dtype, delta.dtype), torch.float32)
    W, Q, d = weight.to(dtype), basis.to(dtype), delta.to(dtype)
    output_side, (k, r), m = gate_side(*weight.shape) == "output", Q.shape, max(weight.shape)
    with torch.autocast(weight.device.type, enabled=False):
        if 2 * r * m < k * (r + m):  # through the r coefficients: cheaper for a narrow basis
            return Q @ (d.unsqueeze(1) * (Q.mT @ W)) if output_side else ((W @ Q) * d) @ Q.mT
        change = (Q * d) @ Q.mT
        return change @ W if output_side else W @ change


def effective_weight(weight: torch.Tensor, basis: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Return `W(z)` in the dtype of `weight`, rounded once. Arguments as in [`delta_weight`]."""
    return delta_weight(weight, basis, delta).add_(weight).to(weight.dtype)


# Costs, in multiplications. Only their ratios matter.


def fold_cost(out_features: int, in_features: int, r: int) -> int:
    """Return the cost of one [`effective_weight`]."""
    k, m = sorted((out_features, in_features))
    return min(2 * k * r * m, k * k * (r + m))


def gate_cost(k: int, r: int, tokens: int) -> int:
    """Return the cost of one [`gate_correction`] for this many tokens."""
    return 2 * k * r * max(tokens, MIN_TOKENS)


def products_cost(k: int, r: int, tokens: int, dtype: torch.dtype) -> int:
    """Return the cost of one [`projected_products`]."""
    over_tokens, over_gram = 2 * k * r * tokens, k * k * (tokens + r)
    return over_tokens if dtype.itemsize == 2 else min(over_tokens, over_gram)


def projected_products(a: torch.Tensor, b: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Return `Σ_t (Qᵀ a_t) ⊙ (Qᵀ b_t)`, the diagonal of `Qᵀ (aᵀ b) Q`. For suitable a and b it is the gradient of δ.

    Computed token by token, or from the k × k matrix `aᵀ b` if that is cheaper, as it is for many tokens. In 16 bit
    always token by token, because rounding the whole matrix would lose accuracy.

    Args:
        a, b (`torch.Tensor`): `[t, k]`.
        basis (`torch.Tensor`): `Q`, `[k, r]`.

    Returns:
        `torch.Tensor`: `[r]`, in fp32 or fp64.
    """
    k, r = basis.shape
    if products_cost(k, r, len(a), a.dtype) < 2 * k * r * len(a):
        return ((a.mT @ b) @ basis).mul_(basis).sum(0)
    work = torch.promote_types(a.dtype, torch.float32)
    return ((a @ basis).to(work) * (b @ basis).to(work)).sum(0)
