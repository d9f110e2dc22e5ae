"""The values of δ as arrays, for plots and summaries."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import nn

from .layer import svf_layers


def adapter_deltas(model: nn.Module, adapter_name: str = "default") -> dict[str, NDArray[np.float32]]:
    """Return δ `[r]` of an adapter by module name."""
    return {
        layer.module_name: layer.delta_weights([adapter_name])[0].detach().float().cpu().numpy()
        for layer in svf_layers(model, adapter_name)
    }
