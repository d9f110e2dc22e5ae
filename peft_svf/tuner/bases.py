"""Gives many layers their singular bases: in parallel, from one cache, and the same ones on every rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from peft.utils.integrations import check_deepspeed_zero3_enabled
from torch import distributed

from ..spectral.cache import BasisCache
from ..spectral.pack import BasisPack
from ..utils.processes import processes
from ..utils.progress import progress_bar

if TYPE_CHECKING:
    from .layer import SVFLayer

# Each holds a few fp64 matrices of the size of Q (0.13 GB for k = 4096).
MAX_WORKERS = 4


def build_bases(layers: Sequence[SVFLayer]) -> None:
    """Build the basis of each layer that `layers` names, with a progress bar.

    Raises:
        ValueError: A weight holds NaN or Inf, is not a floating point matrix, or is not that of the basis pack; the
            message names the module.
    """
    if not layers:
        return
    runtime = next(reversed(layers[0].svf_config.values())).runtime_config  # of the adapter that is being attached
    pack = None if runtime.basis is None else BasisPack(runtime.basis)
    pack_of_quantized = pack
    if pack is None and any(layer.quantization_backend is not None for layer in layers):
        named = os.environ.get("PEFT_SVF_BASIS")
        pack_of_quantized = BasisPack(named) if named else None
    cache = BasisCache(runtime.cache_dir) if runtime.use_cache else None
    share = pack is None and _must_share(layers, cache)  # every rank reads the same pack

    def build(layer: SVFLayer) -> None:
        _build(layer, (pack if layer.quantization_backend is None else pack_of_quantized) or cache, share)

    if all(layer.base_device.type == "cpu" for layer in layers) and not _in_lockstep():
        _for_each(build, layers)
    else:
        for layer in progress_bar(layers, desc="Decomposing weights", unit="layer"):
            build(layer)


def _build(layer: SVFLayer, source: BasisCache | BasisPack | None, share: bool) -> None:
    layer.build_basis(source)
    if share:
        assert layer.basis is not None
        buffer = layer.basis.detach().to(processes().device)
        distributed.broadcast(buffer, src=0)
        layer.basis.data.copy_(buffer)


def _in_lockstep() -> bool:
    """Whether building a basis may involve other ranks, so that all must go in the same order."""
    return _world_size() > 1 or check_deepspeed_zero3_enabled()


def _must_share(layers: Sequence[SVFLayer], cache: BasisCache | None) -> bool:
    """Whether rank 0 sends its bases to the others.

    FSDP2 shards what each rank holds without comparing, so a rank with other bits would train δ wrongly and silently.
    The ranks of one machine read the same cache, which needs no communication and so also works when only some of
    them attach. Otherwise all must attach, in the same order.
    """
    ranks = _world_size()
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(ranks)
    if ranks == 1 or (one_machine and cache is not None and cache.is_writable()):
        return False
    has_weights = [all(not layer.is_on_meta for layer in layers)] * ranks
    distributed.all_gather_object(has_weights, has_weights[0])
    return all(has_weights)  # else whoever brings the weights to the ranks without brings the bases, too


def _world_size() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _for_each(build: Callable[[SVFLayer], None], layers: Sequence[SVFLayer]) -> None:
    """`build(layer)` for each layer, several at a time: half of `eigh` does not use more than one core."""
    threads = torch.get_num_threads()
    workers = min(MAX_WORKERS, threads, len(layers))
    torch.set_num_threads(threads // workers)
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,))
    try:
        for _ in progress_bar(pool.map(build, layers), desc="Decomposing weights", unit="layer", total=len(layers)):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
