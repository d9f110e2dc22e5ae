"""The gate of a linear layer whose weight is cut by tensor parallelism. Arithmetic only, without communication.

For one weight `W [out, in]` with basis `Q [k, r]` there are three places for the gate:

    "output"    y += Q (δ ⊙ Qᵀ y)      `out <= in`, and this process has all rows of W
    "input"     x += Q (δ ⊙ Qᵀ x)      `out > in`, and this process has all columns of W
    "beside"    y += B (δ ⊙ Aᵀ x)      the gated side is cut

A layer that is cut along its inputs adds up the outputs of all processes. "output" therefore gates each partial sum.
"beside" takes products of W and Q, which are computed once, when the model is loaded:

    out <= in, rows i of W:       y_i = W_i x + Q_i (δ ⊙ Qᵀ W x)           A = Wᵀ Q, B = Q_i
    out >  in, columns i of W:    y_i = W_i x_i + W Q (δ ⊙ Q_iᵀ x_i)       A = Q_i,  B = W Q

Both products are sums over the processes: `Wᵀ Q = Σ W_iᵀ Q_i` and `W Q = Σ W_i Q_i`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..spectral.basis import gate_side

Place = Literal["output", "input", "beside"]


@dataclass(frozen=True)
class Shard:
    """The part of a weight that a process holds, as some of the output columns of a layer.

    Attributes:
        start, size (`int`): The columns of the layer's local output.
        shape (`tuple[int, int]`): `[out, in]` of the whole weight.
        rows, columns (`slice`, *optional*): Of the whole weight; `None` for all.
        replicas (`int`): How many processes hold the same part.
    """

    start: int
    size: int
    shape: tuple[int, int]
    rows: slice | None = None
    columns: slice | None = None
    replicas: int = 1

    @property
    def stop(self) -> int:
        """The column after the last one."""
        return self.start + self.size


@dataclass(frozen=True)
class GateFactors:
    """What a process needs for the gate of one weight: `place`, and the factors `down [·, r]` and `up [·, r]`."""

    place: Place
    down: torch.Tensor
    up: torch.Tensor

    def change(self, weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """Return the change of the local weight that has the effect of the gate, in fp32 or fp64.

        Args:
            weight: The local part of the weight, `[out, in]`.
            delta: δ, `[r]`.
        """
        dtype = torch.promote_types(torch.promote_types(weight.dtype, delta.dtype), torch.float32)
        W, down, up = weight.to(dtype), self.down.to(dtype), self.up.to(dtype)
        if self.place == "output":
            return (up * delta) @ (down.mT @ W)
        if self.place == "input":
            return ((W @ up) * delta) @ down.mT
        return (up * delta) @ down.mT


def gate_factors(Q: torch.Tensor, shard: Shard, product: Callable[[], torch.Tensor]) -> GateFactors:
    """Return the factors of a process.

    Args:
        Q: The basis of the whole weight, `[k, r]`.
        shard: Which part of the weight is here.
        product: Returns `Wᵀ Q` (out <= in) or `W Q` of the whole weight. Called only if the gated side is cut.
    """
    side = gate_side(*shard.shape)
    if side == "output" and shard.rows is not None:
        return GateFactors("beside", product().contiguous(), Q[shard.rows].contiguous())
    if side == "input" and shard.columns is not None:
        return GateFactors("beside", Q[shard.columns].contiguous(), product().contiguous())
    return GateFactors(side, Q, Q)


def local_product(weight: torch.Tensor, Q: torch.Tensor, shard: Shard) -> torch.Tensor:
    """Return the contribution of a process to the product. The sum over all processes is the product.

    Args:
        weight: The local part of the weight.
        Q: The basis of the whole weight.
        shard: Which part it is.
    """
    if gate_side(*shard.shape) == "output":
        found = weight.mT @ Q[shard.rows or slice(None)]
    else:
        found = weight @ Q[shard.columns or slice(None)]
    return found / shard.replicas


def shards_of_layer(layer: Any) -> list[Shard]:
    """Return the weights of which a linear layer of vLLM is made, in the order of its output.

    Args:
        layer: A `LinearBase`. Layers that are cut along the outputs have `gather_output`, along the inputs
            `input_is_parallel`.
    """
    sizes = list(getattr(layer, "output_partition_sizes", None) or [layer.output_size])
    cut_rows, cut_columns = hasattr(layer, "gather_output"), hasattr(layer, "input_is_parallel")
    processes, rank = (layer.tp_size, layer.tp_rank) if cut_rows or cut_columns else (1, 0)
    found, start = [], 0
    for number, size in enumerate(sizes):
        # With more processes than key and value heads, some hold the same head.
        replicas = getattr(layer, "num_kv_head_replicas", 1) if number > 0 else 1
        rows = columns = None
        out = size
        if cut_rows and processes > replicas:
            out, place = size * processes // replicas, rank // replicas
            rows = slice(place * size, (place + 1) * size)
        if cut_columns and processes > 1:
            here = layer.input_size // processes
            columns = slice(rank * here, (rank + 1) * here)
        found.append(Shard(start, size, (out, layer.input_size), rows, columns, replicas))
        start += size
    return found
