"""The part of an SVF layer that its neighbours use.

Attaching, checking, folding and mixed batches act on a layer, and the layer calls them. They depend on this protocol
instead of the layer, so no file imports another one that imports it back.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from ..spectral.basis import Side
from ..spectral.cache import BasisCache
from ..spectral.pack import BasisPack
from .config import SVFConfig
from .merge import Merge

if TYPE_CHECKING:
    from peft.utils.quantization_utils import QuantizationBackend


class AdaptedLayer(Protocol):
    """One adapted weight; `SVFLayer` in `layer.py` implements and describes these members."""

    module_name: str
    base_layer: nn.Module
    in_features: int
    out_features: int
    side: Side
    quantization_backend: QuantizationBackend | None
    svf_delta: nn.ModuleDict
    svf_config: dict[str, SVFConfig]
    base_spectrum: torch.Tensor | None
    fan_in_fan_out: bool
    merge_state: Merge
    merged_adapters: list[str]
    rows: Any
    whole_model: Any  # a WholeModel
    training: bool
    # of torch: looking an attribute up in these costs a fraction of `nn.Module.__getattr__`
    _modules: dict[str, Any]
    _parameters: dict[str, nn.Parameter | None]

    @property
    def active_adapter(self) -> str | list[str]: ...

    @property
    def active_adapters(self) -> list[str]: ...

    @property
    def basis(self) -> torch.Tensor | None: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def base_device(self) -> torch.device: ...

    @property
    def is_on_meta(self) -> bool: ...

    def get_base_layer(self) -> Any: ...

    def rank(self, adapter_name: str) -> int: ...

    def parameters(self) -> Iterable[nn.Parameter]: ...

    def build_basis(self, source: BasisCache | BasisPack | None = None) -> None: ...

    def fingerprint(self, adapter_name: str) -> list[float] | None: ...

    def delta_weights(self, adapter_names: Iterable[str]) -> list[torch.Tensor]: ...

    def summed_delta(self, adapter_names: Iterable[str]) -> torch.Tensor: ...

    def effective_weight(self, delta: torch.Tensor) -> torch.Tensor: ...

    def surviving_fraction(self, delta: torch.Tensor, dtype: torch.dtype) -> float: ...


class DeltasOfRows(Protocol):
    """δ of the rows of a mixed batch in one layer. The layer does not know where they come from.

    Attributes:
        same: The adapter if all rows use the same one, so that the layer may fold; otherwise empty.
    """

    @property
    def same(self) -> tuple[str, ...]: ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return δ for an input of the layer, `[..., r]`; `None` if it is 0."""

    def check(self, x: torch.Tensor) -> object:
        """Check an input that is computed without `__call__`.

        Raises:
            ValueError: The input has another number of rows.
        """
