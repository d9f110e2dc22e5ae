"""One rank of `test_distributed.py`: `python distributed_worker.py FOLDER`, with torchrun's environment.

It runs all scenarios one after the other, as every start of a process costs seconds. Each returns what its test looks
at; it is left in `FOLDER/SCENARIO/RANK.pt`. An error ends the process, since the other rank would wait for this one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import base_model, make_tokenizer, svf_layers, tiny_llama
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import distributed, nn

from peft_svf import SVFConfig, SVFRuntimeConfig
from peft_svf.tuner import layer as layer_module

BATCH = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(3))
STEPS = 3
patch = pytest.MonkeyPatch()  # undone after each scenario


def attach(**runtime: Any) -> PeftModel:
    config = SVFConfig(
        target_modules="all-linear",
        runtime_config=SVFRuntimeConfig(**{"use_cache": False, "fold": "always", **runtime}),
    )
    model = get_peft_model(tiny_llama(), config).train()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".svf_delta." in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def folded(model: nn.Module) -> int:
    return sum(layer.fold.weight is not None for layer in svf_layers(model).values())


def full(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()  # type: ignore[operator]


def clean(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")


def deltas(model: nn.Module) -> dict[str, torch.Tensor]:
    return {clean(name): full(p) for name, p in model.named_parameters() if ".svf_delta." in name}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {clean(name): full(layer.get_base_layer().weight) for name, layer in svf_layers(model).items()}


def bases(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: full(layer.basis) for name, layer in svf_layers(model).items() if layer.basis is not None}


def train(model: nn.Module, batch: torch.Tensor) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def my_rows() -> torch.Tensor:
    return BATCH.chunk(distributed.get_world_size())[distributed.get_rank()]


def deviate() -> None:
    """Make rank 1 decompose as another driver might: some columns of the other sign."""
    if distributed.get_rank() != 1:
        return
    import peft_svf.spectral.cache as cache_module

    honest: Callable[..., Any] = layer_module.singular_basis

    def flipped(*args: Any, **kwargs: Any) -> Any:
        found = honest(*args, **kwargs)
        signs = torch.ones(found.vectors.shape[1]).index_fill_(0, torch.arange(0, found.vectors.shape[1], 2), -1)
        return replace(found, vectors=found.vectors * signs)

    for module in (layer_module, cache_module):
        patch.setattr(module, "singular_basis", flipped)


# ----------------------------------------------------------------------------------------------------------- scenarios


def attach_without_cache(folder: Path) -> dict[str, Any]:
    deviate()
    model = attach()
    return {"bases": bases(model), "frozen": not any(layer.basis.requires_grad for layer in svf_layers(model).values())}


def attach_with_cache(folder: Path) -> dict[str, Any]:
    deviate()
    return {"bases": bases(attach(use_cache=True, cache_dir=str(folder / "cache")))}


def attach_with_a_cache_on_each_node(folder: Path) -> dict[str, Any]:
    patch.setenv("LOCAL_WORLD_SIZE", "1")
    deviate()
    return {"bases": bases(attach(use_cache=True, cache_dir=str(folder / f"cache{distributed.get_rank()}")))}


def attach_with_a_broken_cache(folder: Path) -> dict[str, Any]:
    (folder / "file").touch()
    deviate()
    return {"bases": bases(attach(use_cache=True, cache_dir=str(folder / "file" / "cache")))}


def ddp(folder: Path) -> dict[str, Any]:
    model = attach()
    sent: list[int] = []
    broadcast = distributed._broadcast_coalesced  # type: ignore[attr-defined]

    def counted(group: Any, tensors: list[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        sent.append(sum(tensor.numel() for tensor in tensors))
        return broadcast(group, tensors, *args, **kwargs)

    patch.setattr(distributed, "_broadcast_coalesced", counted)
    if distributed.get_rank() == 1:  # DDP takes over rank 0's
        for layer in svf_layers(model).values():
            layer.basis.data.zero_()
    parallel = nn.parallel.DistributedDataParallel(model)
    at_start, forwards = sum(sent), []
    for _ in range(2):
        sent.clear()
        loss = parallel(input_ids=my_rows(), labels=my_rows()).loss
        forwards.append(sum(sent))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    parallel.zero_grad()
    losses = train(parallel, my_rows())
    return {
        "at_start": at_start,
        "forwards": forwards,
        "buffers": sum(buffer.numel() for buffer in tiny_llama().buffers()),
        "bases": bases(model),
        "folded": folded(model),
        "gradients": gradients,
        "losses": losses,
        "deltas": deltas(model),
    }


def fsdp2(folder: Path) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    deviate()
    model = attach()
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for block in model.base_model.model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    before = weights(model)
    sharded = {
        name: isinstance(layer.basis, DTensor)
        and isinstance(layer.get_base_layer().weight, DTensor)
        and layer.basis.to_local().shape[0] * 2 == layer.basis.shape[0]
        for name, layer in svf_layers(model).items()
    }
    losses = train(model, my_rows())
    state = get_peft_model_state_dict(model)
    with torch.no_grad():
        gate = model(input_ids=BATCH).logits
        model.merge_adapter()
        merged, logits = weights(model), model(input_ids=BATCH).logits
        model.unmerge_adapter()
        again = model(input_ids=BATCH).logits
    return {
        "folded": folded(model),
        "sharded": sharded,
        "losses": losses,
        "deltas": deltas(model),
        "state": {name: full(value) for name, value in state.items()},
        "before": before,
        "merged": merged,
        "after": weights(model),
        "gate": gate,
        "merged_logits": logits,
        "again": again,
    }


def fsdp1(folder: Path, use_orig_params: bool = True) -> dict[str, Any]:
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import FullyShardedDataParallel

    deviate()
    model = attach()
    parallel = FullyShardedDataParallel(
        model,
        auto_wrap_policy=fsdp_auto_wrap_policy(model),
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )
    units = sum(isinstance(module, FullyShardedDataParallel) for module in parallel.modules())
    losses = train(parallel, my_rows())
    with FullyShardedDataParallel.summon_full_params(parallel, writeback=False):
        return {"units": units, "folded": folded(parallel), "losses": losses, "deltas": deltas(parallel)}


def fsdp1_flat(folder: Path) -> dict[str, Any]:
    return fsdp1(folder, use_orig_params=False)


def greedy_scores_of_five(folder: Path) -> dict[str, Any]:
    from test_trl import tokenizer

    from peft_svf.training import greedy_scores

    def number(prompts: list[str], **columns: Any) -> list[float]:
        return [float(prompt[0]) for prompt in prompts]

    rows = [{"prompt": f"{n}+1="} for n in range(5)]
    return {"scores": greedy_scores(tiny_llama(), tokenizer(), rows, number, max_new_tokens=2)}


def search(folder: Path, only: int | None = None) -> dict[str, Any]:
    """A search whose reward fails in process `only`."""
    from test_adaptation import EXAMPLES, count_letters

    from peft_svf import AdaptiveMixture, CrossEntropyMethod

    experts = {path.name: str(path) for path in sorted((folder.parent / "experts").iterdir())}
    mixture = AdaptiveMixture.from_pretrained(base_model(), experts, tokenizer=make_tokenizer())
    calls = 0

    def reward(completions: list[str], **columns: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if distributed.is_initialized() and distributed.get_rank() == only:
            raise ZeroDivisionError("in one process")
        return count_letters(completions)

    sampled: dict[str, Any] = {"max_new_tokens": 5, "generation_kwargs": {"do_sample": True}}
    options: dict[str, Any] = {"num_generations": 2, "population_size": 6, "batch_size": 8, "max_seconds": 1e4}
    try:
        result = mixture.search(
            EXAMPLES[:4],
            reward,
            method="cem",
            validation=2,
            **sampled,
            checkpoint=folder / "search.json",
            **options,
        ).to_dict()
        unseeded = CrossEntropyMethod(np.full(2, 0.5), 0.5, population_size=4)
        by_gradient = mixture.search(EXAMPLES[:4], reward, method="gradient", **sampled, validation=None, batch_size=8)
        loose = mixture.search(EXAMPLES[:4], optimizer=unseeded, num_generations=3, validation=None)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    del result["usage"]["seconds"], result["settings"]["checkpoint"]
    return {"result": result, "calls": calls, "unseeded": loose.alpha, "by_gradient": by_gradient.alpha}


def search_with_files_of_one_process(folder: Path) -> dict[str, Any]:
    """A checkpoint that only the first process sees, gone on from; and one that cannot be written."""
    from test_adaptation import EXAMPLES

    from peft_svf import AdaptiveMixture

    experts = {path.name: str(path) for path in sorted((folder.parent / "experts").iterdir())}
    mixture = AdaptiveMixture.from_pretrained(base_model(), experts, tokenizer=make_tokenizer())
    mine = folder / f"disk-of-{distributed.get_rank()}" / "search.json"
    options: dict[str, Any] = {"method": "cem", "population_size": 4, "validation": None, "in_context": False}
    mixture.search(EXAMPLES[:4], num_generations=1, checkpoint=mine, **options)
    resumed = mixture.search(EXAMPLES[:4], num_generations=3, checkpoint=mine, resume=True, **options)
    whole = mixture.search(EXAMPLES[:4], num_generations=3, **options)
    (folder / "file").write_text("in the way")
    try:
        mixture.search(EXAMPLES[:4], num_generations=1, checkpoint=folder / "file" / "search.json", **options)
        error = "none"
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    return {"resumed": resumed.alpha, "whole": whole.alpha, "error": error, "there": mine.exists()}


def search_that_fails(folder: Path) -> dict[str, Any]:
    return search(folder, only=1)


SCENARIOS: tuple[Callable[[Path], dict[str, Any]], ...] = (
    attach_without_cache,
    attach_with_cache,
    attach_with_a_cache_on_each_node,
    attach_with_a_broken_cache,
    greedy_scores_of_five,
    search,
    search_with_files_of_one_process,
    search_that_fails,
    ddp,
    fsdp2,
    fsdp1,
    fsdp1_flat,
)

if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    try:
        for scenario in SCENARIOS:
            print(scenario.__name__, flush=True)
            folder = Path(sys.argv[1]) / scenario.__name__
            torch.manual_seed(0)
            torch.save(scenario(folder), folder / f"{distributed.get_rank()}.pt")
            patch.undo()
            distributed.barrier()
    finally:
        distributed.destroy_process_group()
