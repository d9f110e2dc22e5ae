"""The one-sided singular basis of a weight matrix.

For `W = U diag(σ) Vᵀ` with shape `[out, in]`, SVF needs only one orthogonal matrix `Q` of the smaller side, and σ to
order its columns: `Q = U` if `out <= in` (side "output"), else `Q = V` (side "input").

`Q` is computed by `eigh` of the fp64 Gram matrix of the smaller side. For weights of 32 bits or fewer this is as
accurate as an fp64 SVD and several times faster. Two machines agree on it, unlike on the fp32 SVD, which rotates
near-degenerate singular vectors by 1e-4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Side = Literal["output", "input"]


@dataclass(frozen=True)
class SingularBasis:
    """Singular vectors of the smaller side of a weight, and its spectrum.

    Attributes:
        vectors (`torch.Tensor`): `Q`, `[k, r]` with `k = min(out, in)`, contiguous, columns by descending σ, in the
            weight's dtype. The largest entry by magnitude of each column is positive, so signs do not depend on the
            machine.
        spectrum (`torch.Tensor`): σ, `[k]`, fp64, on the CPU, descending.
    """

    vectors: torch.Tensor
    spectrum: torch.Tensor

    def leading(self, r: int) -> SingularBasis:
        """Return the basis with the `r` columns of largest σ, and the whole spectrum."""
        return SingularBasis(self.vectors[:, :r].contiguous(), self.spectrum)


def gate_side(out_features: int, in_features: int) -> Side:
    """Return the side of the gate: the output of the layer if it is not larger than the input, else the input."""
    return "output" if out_features <= in_features else "input"


def _fp64_device(device: torch.device) -> torch.device:
    """Return the device if it computes `eigh` in fp64, else the CPU. Adapters are portable only at this accuracy."""
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


@torch.no_grad()
def singular_basis(weight: torch.Tensor, r: int | None = None, *, name: str = "weight") -> SingularBasis:
    """Decompose a weight.

    Args:
        weight (`torch.Tensor`): `[out, in]`, floating point, any memory layout, on any device but meta.
        r (`int`, *optional*): Keep the `r` leading columns; `None` or `r > k` keeps all `k`.
        name (`str`): Name of the weight in errors.

    Returns:
        [`SingularBasis`]: `vectors` on the weight's device and in its dtype.

    Raises:
        ValueError: `weight` is not a floating point matrix, is on the meta device, or holds NaN or Inf.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            f"{name}: expected a floating point matrix, found shape {tuple(weight.shape)} of {weight.dtype}."
        )
    if weight.is_meta:
        raise ValueError(f"{name} is on the meta device and has no values. Load the weights first.")

    # contiguous, because BLAS rounds a transposed view differently
    W = weight.to(device=_fp64_device(weight.device), dtype=torch.float64).contiguous()
    gram = _lower_gram(W if gate_side(*weight.shape) == "output" else W.mT)
    if not torch.isfinite(gram.diagonal()).all():  # NaN and Inf always show in a sum of squares
        bad = int((~torch.isfinite(weight)).sum())
        raise ValueError(f"{name} holds {bad} NaN or Inf values out of {weight.numel()}. Load it again or repair it.")

    eigenvalues, eigenvectors = torch.linalg.eigh(gram, UPLO="L")  # ascending
    spectrum = eigenvalues.flip(0).clamp_(min=0).sqrt_()
    rows = eigenvectors.mT.flip(0)[:r]  # as rows, which are contiguous because eigh returns column-major vectors
    positive = rows.amax(dim=1, keepdim=True) >= -rows.amin(dim=1, keepdim=True)
    rows = torch.where(positive, rows, -rows)
    return SingularBasis(
        # FSDP2 requires it to be contiguous
        vectors=rows.to(device=weight.device, dtype=weight.dtype).mT.contiguous(),
        spectrum=spectrum.cpu(),
    )


def _lower_gram(A: torch.Tensor, block: int = 128) -> torch.Tensor:
    """Return the lower triangle of `A Aᵀ`, with 0 above the diagonal blocks, in little more than half the work."""
    k = A.shape[0]
    gram = A.new_zeros(k, k)
    for start in range(0, k, block):
        stop = start + block
        gram[start:stop, :stop] = A[start:stop] @ A[:stop].mT
    return gram
