"""A linear layer with a precomputed `W(z)` that still computes the gradient of δ."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from .arithmetic import projected_products
from .basis import gate_side

# The gradient of δ is divided by 1 + δ. Closer to 0 than this, it would lose more than one digit.
SMALLEST_Z = 0.1


class FoldedLinear(torch.autograd.Function):
    """
    `y = W(z) x + b` and its gradients, for little more than the cost of the plain layer.

    The input gradient is the plain one, `W(z)ᵀ dy`. The gradient of δ on the output side (out <= in) is

        dδ = Σ_t (Qᵀ dy_t) ⊙ (Qᵀ W x_t)       with  Qᵀ y_t = (1 + δ) ⊙ Qᵀ W x_t

    so the layer's own output replaces `W x`. On the input side

        dδ = Σ_t (Qᵀ Wᵀ dy_t) ⊙ (Qᵀ x_t)      with  Qᵀ dx_t = (1 + δ) ⊙ Qᵀ Wᵀ dy_t

    the input gradient replaces `Wᵀ dy`. Backward needs only the layer's own output or input. The division fails if
    1 + δ is near 0, see [`invertible`].

    Call it through [`folded_linear`].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        delta: torch.Tensor,
        bias: torch.Tensor | None,
        folded: torch.Tensor,
        basis: torch.Tensor,
    ) -> torch.Tensor:
        y = linear(x, folded, bias)
        ctx.output_side = gate_side(*folded.shape) == "output"
        ctx.save_for_backward(y if ctx.output_side else x, delta, bias, folded, basis)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kept, delta, bias, folded, basis = ctx.saved_tensors
        dx = ddelta = dbias = None
        flat_dy, kept = _tokens(dy), _tokens(kept)
        if ctx.needs_input_grad[0] or (ctx.needs_input_grad[1] and not ctx.output_side):
            flat_dx = flat_dy @ folded
            dx = flat_dx.view(*dy.shape[:-1], folded.shape[1])
        if ctx.needs_input_grad[1]:
            if ctx.output_side:
                products = projected_products(flat_dy, kept if bias is None else kept - bias, basis.to(dy.dtype))
            else:
                products = projected_products(flat_dx, kept, basis.to(dy.dtype))
            ddelta = (products / (1 + delta)).to(delta.dtype)
        if ctx.needs_input_grad[2]:
            dbias = flat_dy.sum(0)
        return dx if ctx.needs_input_grad[0] else None, ddelta, dbias, None, None


def _tokens(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(x.numel() // x.shape[-1], x.shape[-1])


def folded_linear(
    x: torch.Tensor, delta: torch.Tensor, bias: torch.Tensor | None, folded: torch.Tensor, basis: torch.Tensor
) -> torch.Tensor:
    """
    Return `W(z) x + b`, with gradients for x, δ and b. All arguments except δ and Q have the same dtype.

    Args:
        x (`torch.Tensor`): `[..., in]`.
        delta (`torch.Tensor`): The δ of `folded`, `[r]`, fp32 or fp64, [`invertible`].
        bias (`torch.Tensor`, *optional*): `[out]`.
        folded (`torch.Tensor`): `W(z)`, `[out, in]`.
        basis (`torch.Tensor`): `Q`, `[min(out, in), r]`.

    Returns:
        `torch.Tensor`: `[..., out]`. If out <= in, backward needs it, so it must not be changed in place.
    """
    result: torch.Tensor = FoldedLinear.apply(x, delta, bias, folded, basis)
    return result


def invertible(delta: torch.Tensor) -> bool:
    """Whether all 1 + δ are far enough from 0 for [`folded_linear`]."""
    return bool(((1 + delta.detach()).abs() >= SMALLEST_Z).all())
