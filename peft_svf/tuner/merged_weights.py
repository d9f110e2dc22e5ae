"""Remember which weights `merge_and_unload` has changed, to refuse adapters of the base model before decomposing it.

Nothing is stored in the model, so nothing is saved with it. A weight that is changed again is forgotten.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import pad

from ..spectral.fingerprint import fingerprint
from .base_check import WITH_CONFIG, base_differences, refuse_base
from .merge import bit_sums
from .protocol import AdaptedLayer


@dataclass(frozen=True)
class _Merged:
    names: tuple[str, ...]
    sums: tuple[torch.Tensor, ...]  # of the merged weight
    before: dict[int, list[float]]  # fingerprints of the weight before, by r
    fingerprints: dict[int, list[float]]  # of the merged weight, but for rounding, by r


_merged: weakref.WeakKeyDictionary[nn.Module, _Merged] = weakref.WeakKeyDictionary()


@torch.no_grad()
def remember_merged(layers: Iterable[AdaptedLayer]) -> None:
    """Remember the weights of these layers if an adapter is merged into them."""
    for layer in layers:
        base_layer = layer.get_base_layer()
        sums = bit_sums(base_layer.weight) if layer.merged_adapters and layer.quantization_backend is None else None
        if sums is not None and (found := _fingerprints(layer)):
            before = {r: numbers for r, (numbers, _) in found.items()}
            after = {r: numbers for r, (_, numbers) in found.items()}
            _merged[base_layer] = _Merged(tuple(layer.merged_adapters), sums, before, after)


def _fingerprints(layer: AdaptedLayer) -> dict[int, tuple[list[float], list[float]]]:
    """Return the fingerprints of W and of `W(z)` for the r of each adapter. Its singular values are |σ (1 + δ)|."""
    Q, spectrum = layer.basis, layer.base_spectrum
    if Q is None or spectrum is None or Q.is_meta or type(Q) not in (torch.Tensor, nn.Parameter):
        return {}
    delta = layer.summed_delta(layer.merged_adapters).to(spectrum)
    values, order = (spectrum * (1 + pad(delta, (0, len(spectrum) - len(delta))))).abs().sort(descending=True)
    found = {}
    for r in {layer.rank(name) for name in layer.svf_delta}:
        leading = order[:r].to(Q.device)  # a narrow Q can lack columns that are among the first now
        after = fingerprint(values, Q[:, leading] if leading.max() < Q.shape[1] else None)
        found[r] = fingerprint(spectrum, Q[:, :r] if r <= Q.shape[1] else None), after
    return found


def refuse_merged(adapter_name: str, layers: Sequence[AdaptedLayer]) -> None:
    """Refuse an adapter that was made for the weights before they were merged. `check_base` would, but it decomposes.

    Raises:
        BaseCheckError: The weights differ, and `runtime_config.base_check` is `"error"`.
    """
    if not layers or not _merged:
        return
    config = layers[0].svf_config[adapter_name]
    if not config.expected_fingerprint or config.runtime_config.base_check != "error" or config.r != config.expected_r:
        return
    names: list[str] = []
    before: dict[str, tuple[list[float], tuple[int, int]]] = {}
    found: dict[str, tuple[list[float], tuple[int, int]]] = {}
    for layer in layers:
        merged = _merged.get(layer.get_base_layer())
        if merged is None or layer.rank(adapter_name) not in merged.fingerprints:
            continue
        sums = bit_sums(layer.get_base_layer().weight)
        if sums is None or not all(a.equal(b.to(a.device)) for a, b in zip(merged.sums, sums, strict=True)):
            del _merged[layer.get_base_layer()]
            continue
        names += merged.names
        for each, by_r in ((before, merged.before), (found, merged.fingerprints)):
            numbers = by_r[layer.rank(adapter_name)]
            unknown = config.expected_fingerprint.get(layer.module_name, [])[len(numbers) :]  # count as equal
            each[layer.module_name] = [*numbers, *unknown], layer.shape
    if base_differences(config.expected_fingerprint, before, whole_model=False)[0]:
        return  # made for another one, or for the merged weights, whose vectors rounding has turned
    differences, count = base_differences(config.expected_fingerprint, found, whole_model=False)
    if differences:
        refuse_base(
            f"Adapter {adapter_name!r}",
            differences,
            count,
            config,
            policy="error",
            override=WITH_CONFIG,
            merged=list(dict.fromkeys(names)),
        )
