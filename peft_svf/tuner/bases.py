"""Build the singular bases of many layers: in parallel, from one cache, and identical on every rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from peft.utils.integrations import check_deepspeed_zero3_enabled
from torch import distributed

from ..spectral.cache import BasisCache
from ..spectral.pack import BasisPack
from ..utils.processes import processes
from ..utils.progress import progress_bar
from ..utils.threads import can_limit_threads, limit_this_thread
from .protocol import AdaptedLayer

# Each worker holds a few fp64 matrices of the size of Q (0.13 GB for k = 4096).
MAX_WORKERS = 4


def build_bases(layers: Sequence[AdaptedLayer]) -> None:
    """Build the basis of each layer, with a progress bar.

    Raises:
        ValueError: A weight holds NaN or Inf, is not a floating point matrix, or does not match the basis pack. The
            message names the module.
    """
    if not layers:
        return
    runtime = next(reversed(layers[0].svf_config.values())).runtime_config  # of the newest adapter
    pack = None if runtime.basis is None else BasisPack(runtime.basis)
    pack_of_quantized = pack
    if pack is None and any(layer.quantization_backend is not None for layer in layers):
        path = os.environ.get("PEFT_SVF_BASIS")
        pack_of_quantized = BasisPack(path) if path else None
    cache = BasisCache(runtime.cache_dir, model=layers[0].whole_model.name) if runtime.use_cache else None
    share = pack is None and _must_share(layers, cache)  # all ranks read the same pack

    def build(layer: AdaptedLayer) -> None:
        _build(layer, (pack if layer.quantization_backend is None else pack_of_quantized) or cache, share)

    if all(layer.base_device.type == "cpu" for layer in layers) and not _in_lockstep():
        _for_each(build, layers)
    else:
        for layer in progress_bar(layers, desc="Decomposing weights", unit="layer"):
            build(layer)


def _build(layer: AdaptedLayer, source: BasisCache | BasisPack | None, share: bool) -> None:
    layer.build_basis(source)
    if share:
        assert layer.basis is not None
        buffer = layer.basis.detach().to(processes().device)
        distributed.broadcast(buffer, src=0)
        layer.basis.data.copy_(buffer)


def _in_lockstep() -> bool:
    """Whether building a basis may communicate with other ranks, so that all must build in the same order."""
    return _world_size() > 1 or check_deepspeed_zero3_enabled()


def _must_share(layers: Sequence[AdaptedLayer], cache: BasisCache | None) -> bool:
    """Whether rank 0 sends its bases to the other ranks.

    FSDP2 shards what each rank holds without comparing. A rank with other bits would train δ wrongly and silently.
    The ranks of one machine read the same cache. That needs no communication, so it also works when only some of
    them attach. Otherwise all ranks must attach, in the same order.
    """
    ranks = _world_size()
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(ranks)
    if ranks == 1 or (one_machine and cache is not None and cache.is_writable()):
        return False
    has_weights = [all(not layer.is_on_meta for layer in layers)] * ranks
    distributed.all_gather_object(has_weights, has_weights[0])
    return all(has_weights)  # otherwise the bases arrive later, together with the missing weights


def _world_size() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _for_each(build: Callable[[AdaptedLayer], None], layers: Sequence[AdaptedLayer]) -> None:
    """Call `build(layer)` for each layer in several threads: half of `eigh` uses only one core."""
    threads = torch.get_num_threads()
    workers = min(MAX_WORKERS, threads, len(layers)) if can_limit_threads() else 1
    pool = ThreadPoolExecutor(workers, initializer=limit_this_thread, initargs=(threads // workers,))
    try:
        for _ in progress_bar(pool.map(build, layers), desc="Decomposing weights", unit="layer", total=len(layers)):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
