"""The one-sided singular basis of a weight matrix.

For `W = U diag(σ) Vᵀ` with shape `[out, in]`, everything SVF needs is one orthogonal matrix `Q` of the smaller side,
and σ to order its columns: `Q = U` if `out <= in` (side "output"), else `Q = V` (side "input").

`Q` comes from `eigh` of the Gram matrix of the smaller side in fp64. In fp64 that is as good as an fp64 SVD for every
singular value that a weight in 32 bits or fewer can resolve, it is several times faster, and two machines agree on it,
which the fp32 SVD does not give: near-degenerate singular vectors rotate at 1e-4 there.
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
            weight's dtype. The entry of largest magnitude of each column is positive, so that signs do not depend on
            the machine.
        spectrum (`torch.Tensor`): σ, `[k]`, fp64, on the CPU, descending.
    """

    vectors: torch.Tensor
    spectrum: torch.Tensor

    def leading(self, r: int) -> SingularBasis:
        """The same basis with the `r` columns of largest σ (the spectrum stays whole)."""
        return SingularBasis(self.vectors[:, :r].contiguous(), self.spectrum)


def gate_side(out_features: int, in_features: int) -> Side:
    """Where the gate stands: on the output of the layer if that is the smaller side (or as large), else on its
    input."""
    return "output" if out_features <= in_features else "input"


def _fp64_device(device: torch.device) -> torch.device:
    """The device itself if it computes `eigh` in fp64, else the CPU. The accuracy is what makes adapters portable."""
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


@torch.no_grad()
def singular_basis(weight: torch.Tensor, r: int | None = None, *, name: str = "weight") -> SingularBasis:
    """Decompose a weight.

    Args:
        weight (`torch.Tensor`): `[out, in]`, floating point, any memory layout, on any device but meta.
        r (`int`, *optional*): Keep the `r` leading columns; `None` or `r > k` keeps all `k`.
        name (`str`): What to call the weight in an error.

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
        raise ValueError(f"{name} is on the meta device and has no values yet; load the weights first.")

    # contiguous: BLAS rounds a transposed view in another way
    W = weight.to(device=_fp64_device(weight.device), dtype=torch.float64).contiguous()
    gram = _lower_gram(W if gate_side(*weight.shape) == "output" else W.mT)
    if not torch.isfinite(gram.diagonal()).all():  # a sum of squares hides neither NaN nor Inf
        bad = int((~torch.isfinite(weight)).sum())
        raise ValueError(f"{name} holds {bad} NaN or Inf values out of {weight.numel()} and has no singular basis.")

    eigenvalues, eigenvectors = torch.linalg.eigh(gram, UPLO="L")  # ascending
    spectrum = eigenvalues.flip(0).clamp_(min=0).sqrt_()
    rows = eigenvectors.mT.flip(0)[:r]  # by rows, which are contiguous: eigh returns columns
    positive = rows.amax(dim=1, keepdim=True) >= -rows.amin(dim=1, keepdim=True)
    rows = torch.where(positive, rows, -rows)
    return SingularBasis(
        # contiguous, or FSDP2 refuses it
        vectors=rows.to(device=weight.device, dtype=weight.dtype).mT.contiguous(),
        spectrum=spectrum.cpu(),
    )


def _lower_gram(A: torch.Tensor, block: int = 128) -> torch.Tensor:
    """The lower triangle of `A Aᵀ` (what lies above the diagonal blocks is 0), in little more than half the work."""
    k = A.shape[0]
    gram = A.new_zeros(k, k)
    for start in range(0, k, block):
        stop = start + block
        gram[start:stop, :stop] = A[start:stop] @ A[:stop].mT
    return gram
