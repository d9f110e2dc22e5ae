"""Plots of what an adapter changes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._figures import figure
from .layer import SVFLayer

Deltas = Mapping[str, NDArray[np.float32]]


def plot_deltas(deltas: Deltas, path: str | Path, *, title: str = "") -> None:
    """
    Draw the size of δ by layer and module, and its entries sorted by size.

    Args:
        deltas: δ by name of the module, as [`adapter_deltas`] gives them.
        path: The image file to write.
        title (`str`): What to write above.

    Raises:
        ImportError: matplotlib is not installed.
    """
    layers, kinds, sizes = delta_sizes(deltas)
    picture = figure(11, 1.8 + 0.1 * max(len(layers), 20))
    left, right = picture.subplots(1, 2, width_ratios=(1, 1.2))
    image = left.imshow(sizes, aspect="auto", cmap="viridis")
    left.set_xticks(range(len(kinds)), kinds, rotation=60, ha="right", fontsize="small")
    step = max(1, len(layers) // 15)
    left.set_yticks(range(0, len(layers), step), layers[::step])
    left.set(ylabel="layer", title="rms of δ")
    picture.colorbar(image, ax=left)
    for kind in kinds:
        values = np.sort(np.abs(np.concatenate([d for name, d in deltas.items() if _place(name)[1] == kind])))[::-1]
        right.plot(np.linspace(0, 1, len(values)), values, label=kind)
    right.set(xlabel="share of the singular values, by size of δ", title="|δ|, sorted", yscale="log")
    right.set_ylim(bottom=max(1e-6, right.get_ylim()[0]))
    right.legend(fontsize="small")
    if title:
        picture.suptitle(title)
    picture.savefig(path, dpi=110)


def adapter_deltas(model: Any, adapter_name: str = "default") -> dict[str, NDArray[np.float32]]:
    """δ of an adapter by the name of its module."""
    return {
        name: module.delta_weights([adapter_name])[0].detach().float().cpu().numpy()
        for name, module in model.named_modules()
        if isinstance(module, SVFLayer) and adapter_name in module.svf_delta
    }


def delta_sizes(deltas: Deltas) -> tuple[list[int], list[str], NDArray[np.float64]]:
    """Layers, kinds of modules, and the rms of δ `[layers, kinds]` (NaN where there is none)."""
    places = {name: _place(name) for name in deltas}
    layers = sorted({layer for layer, _ in places.values()})
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    sizes = np.full((len(layers), len(kinds)), np.nan)
    for name, (layer, kind) in places.items():
        sizes[layers.index(layer), kinds.index(kind)] = np.sqrt(np.mean(np.square(deltas[name])))
    return layers, kinds, sizes


def _place(name: str) -> tuple[int, str]:
    """Number of the layer and the rest of the module's name: `model.layers.3.mlp.up_proj` → 3, `mlp.up_proj`."""
    found = re.search(r"\.(\d+)\.", f".{name}.")
    return (int(found[1]), f".{name}."[found.end() :].strip(".")) if found else (0, name)
