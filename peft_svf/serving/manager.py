"""The worker's manager of experts, in place of vLLM's manager of LoRA adapters.

vLLM calls twelve methods of it (`LoRAModelRunnerMixin`). With them, everything that vLLM does for LoRA adapters holds
for experts: the limit of adapters per step, the prefix cache, the server's routes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from vllm.distributed import get_pp_group, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.utils import get_packed_modules_mapping

from ..spectral.fingerprint import fingerprint
from ..spectral.rounding import surviving_fraction
from ..tuner.checkpoint import Checkpoint
from ..tuner.fold import SMALLEST_FRACTION
from ..utils.progress import progress_bar
from .bases import ServedBases, name_in
from .experts import ServedModel, checked_deltas, read_expert
from .gated import Part
from .layer import SVFLinearMethod, local_weight, packed_linear
from .loaded import LoadedExperts
from .options import ServingOptions, check_vllm, prefix_cache_ignores_paths
from .shards import Shard, gate_factors, local_product, shards_of_layer
from .slots import SlotTable

Weights = list[tuple[str | None, Shard]]  # in the output of a layer; without a name if there is no basis


class SVFWorkerManager:
    """
    The experts of one worker.

    Args:
        vllm_config: Configuration of the engine.
        device: Device of the model.
        embedding_modules: Not used. vLLM passes it.

    Raises:
        ImportError: This version of vLLM was not tested.
        ValueError: The settings are not valid.
    """

    is_enabled = True

    def __init__(self, vllm_config: Any, device: torch.device, embedding_modules: Any = None, **_: Any) -> None:
        check_vllm()
        self.options, self.device = ServingOptions.of_engine(vllm_config), device
        self.methods: list[SVFLinearMethod] = []
        self._folded: int | None = None
        self._captures = not vllm_config.model_config.enforce_eager and device.type != "cpu"

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: Any) -> torch.nn.Module:
        """Add a gate to each linear layer that has a basis, and return the model.

        Raises:
            ValueError: No layer has one, or a basis does not belong to its weight.
        """
        config, lora_config = vllm_config.model_config, vllm_config.lora_config
        bases = ServedBases(
            config.model,
            revision=config.revision,
            basis=self.options.basis,
            cache_dir=self.options.cache_dir,
            quantized=getattr(config.hf_config, "quantization_config", None) is not None,
        )
        layers = gated_layers(model, bases.names, getattr(lora_config, "target_modules", None))
        if not layers:
            raise ValueError(
                f"No linear layer of {type(model).__name__} has a basis in {bases.pack or config.model}. Name the "
                "basis pack of this model, or modules that it has."
            )
        lengths: dict[str, int] = {}
        fingerprints: dict[str, tuple[list[float], tuple[int, int]]] = {}
        parts: list[list[Part]] = []
        for layer, weights in progress_bar(layers, desc="Reading singular bases", unit="layer"):
            parts.append([])
            for name, shard in weights:
                if name is None:
                    parts[-1].append(Part("", shard))
                    continue
                basis = bases.of(name, shard.shape, layer.params_dtype).leading(self.options.r or min(shard.shape))
                fingerprints[name] = fingerprint(basis.spectrum, basis.vectors), shard.shape
                lengths[name] = basis.vectors.shape[1]
                Q = basis.vectors.to(self.device)
                factors = gate_factors(Q, shard, partial(_whole_product, layer, Q, shard))
                parts[-1].append(Part.of(name, shard, factors, packed_linear))
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.table = SlotTable(lengths, lora_config.max_loras, tokens, self.device)
        self.served = ServedModel(_of_all_stages(lengths), lengths, fingerprints, self.options.base_check)
        self.experts = LoadedExperts(
            self.table,
            lambda path: read_expert(self.options.checked_path(path), self.served),
            capacity=lora_config.max_cpu_loras or lora_config.max_loras,
            has_prefix_cache=bool(vllm_config.cache_config.enable_prefix_caching),
            by_name_only=prefix_cache_ignores_paths(),
        )
        for (layer, _), made in zip(layers, parts, strict=True):
            layer.quant_method = SVFLinearMethod(layer, made, self.table)
            layer.requires_unquantized_input = True  # a fused kernel must not quantize what the gate reads
            self.methods.append(layer.quant_method)
        return model

    # ------------------------------------------------------------------------------------------- loading and unloading

    def add_adapter(self, request: Any) -> bool:
        """Load an expert, a mixture or zeros, unless this is done already, and make it resident.

        Raises:
            ValueError: It cannot be served. Everything stays as it was.
        """
        # vLLM leaves `load_inplace` set in the requests of a server, so it counts here only
        again = getattr(request, "load_inplace", False)
        self.experts.add(request.lora_int_id, request.lora_name, request.lora_path, again=again)
        if again:
            self._fold_again()
        return True

    def remove_adapter(self, number: int) -> bool:
        """Forget an expert. Return whether it was loaded."""
        if number == self._folded:
            self.fold(None)
        return self.experts.remove(number)

    def remove_all_adapters(self) -> None:
        """Forget all experts."""
        self.fold(None)
        self.experts.clear()

    def list_adapters(self) -> set[int]:
        """Return the numbers of the loaded experts."""
        return self.experts.numbers

    def pin_adapter(self, number: int) -> bool:
        """Return whether an expert is loaded. Pinning is not necessary: a step never evicts what it uses."""
        return number in self.experts

    # --------------------------------------------------------------------------------------------------------- one step

    def set_active_adapters(self, requests: set[Any], mapping: Any | None) -> None:
        """Make the experts of the next step resident, and set the expert of each of its tokens."""
        keep = {request.lora_int_id for request in requests}
        for request in requests:
            self.experts.add(request.lora_int_id, request.lora_name, request.lora_path, keep=keep)
        if mapping is not None:
            self.table.route(mapping.index_mapping)
            self.table.folded = self.table.in_use and self.table.only == self._folded

    def add_dummy_lora(self, request: Any, rank: int) -> bool:
        """Load zeros, to warm up."""
        self.experts.add_zeros(request.lora_int_id, request.lora_name)
        return True

    @contextlib.contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        """Do nothing: dummies cost nothing."""
        yield

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        """Return the default. The rank has no meaning here."""
        return default_rank

    def supports_tower_connector_lora(self) -> bool:
        """Return false: only the language model has experts."""
        return False

    # -------------------------------------------------------------------------------------------------- for `SVFWorker`

    def update(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace δ of a loaded expert. The caller must reset the prefix cache.

        Args:
            name: Its name.
            tensors: As in the file of an adapter.

        Raises:
            ValueError: It is not loaded, or δ cannot be served.
        """
        deltas = checked_deltas(f"The new δ of {name!r}", Checkpoint.of_tensors(tensors), self.served)
        self.experts.update(name, self.table.flat(deltas))
        self._fold_again()

    def fold(self, name: str | None) -> None:
        """Compute the weights of one expert for the steps that need no other, or drop them.

        Args:
            name: The expert or mixture; `None` to drop the weights.

        Raises:
            ValueError: It is not loaded, the model is quantized or captured in graphs, or 16 bit would lose too much.
        """
        if name is None:
            self._folded = None
            for method in self.methods:
                method.unfold()
            return
        number = self.experts.number_of(name)
        if quantized := [method.key for method in self.methods if not method.is_plain]:
            raise ValueError(f"{quantized[0]} is quantized, so it cannot fold {name!r}. It is served by the gate.")
        if self._captures:
            raise ValueError("Captured graphs do not see a folded expert. Start the engine with `enforce_eager=True`.")
        self._fold(number)

    def memory(self) -> dict[str, int]:
        """Return how many experts are loaded and resident, and the bytes of one slot, of all slots, and in the host."""
        return {
            "loaded": len(self.experts.numbers),
            "resident": sum(number in self.table for number in self.experts.numbers),
            "slot_bytes": self.table.values[0].nbytes,
            "table_bytes": self.table.values.nbytes,
            "host_bytes": self.experts.host_bytes(),
        }

    def _fold_again(self) -> None:
        """Bring folded weights up to date. They may be those of a mixture of what has changed."""
        if self._folded is not None:
            self._fold(self._folded) if self._folded in self.experts else self.fold(None)

    def _fold(self, number: int) -> None:
        loaded = self.experts[number]
        row = loaded.row()
        row = torch.zeros(self.table.size) if row is None else row
        self.fold(None)
        for method in self.methods:
            if method.layer.params_dtype.itemsize == 2:
                _check_rounding(method, row, loaded.name)
        for method in self.methods:
            method.fold(row)
        self._folded = number


def gated_layers(
    model: torch.nn.Module, names: Collection[str], targets: Collection[str] | None
) -> list[tuple[Any, Weights]]:
    """Return the layers of which at least one weight has a basis, with the name and place of each of their weights.

    Args:
        model: A model of vLLM.
        names: The modules that have a basis, as transformers names them.
        targets: vLLM's `lora_target_modules`: last names of modules or of layers.
    """
    packed, found = get_packed_modules_mapping(model), []
    for module_name, module in model.named_modules():
        if not isinstance(module, LinearBase):
            continue
        parent, dot, last = module_name.rpartition(".")
        shards, members = shards_of_layer(module), packed.get(last, [last])
        if len(members) != len(shards):  # a fused weight that is fused in the files as well
            members, shards = [last], shards if len(shards) == 1 else []
        weights = [
            (name_in(names, f"{parent}{dot}{each}") if targets is None or {last, each} & {*targets} else None, shard)
            for each, shard in zip(members, shards, strict=False)
        ]
        if any(name for name, _ in weights):
            found.append((module, weights))
    return found


def _of_all_stages(names: Collection[str]) -> set[str]:
    """Return the names of the gated modules of all stages of a pipeline, given those of this one."""
    group = get_pp_group()
    found: list[Any] = [list(names)] * group.world_size
    if group.world_size > 1:
        torch.distributed.all_gather_object(found, list(names), group=group.cpu_group)
    return {name for stage in found for name in stage}


def _whole_product(layer: Any, Q: torch.Tensor, shard: Shard) -> torch.Tensor:
    """Return the product of the whole weight and Q, from the parts of all processes."""
    part = local_product(local_weight(layer)[shard.start : shard.stop].float(), Q.float(), shard)
    found: torch.Tensor = tensor_model_parallel_all_reduce(part)
    return found.to(Q.dtype)


def _check_rounding(method: SVFLinearMethod, row: torch.Tensor, name: str) -> None:
    """Check that 16-bit rounding keeps the change of a folded weight.

    Raises:
        ValueError: It does not.
    """
    weight = method.weight()
    for part in method.linear.parts:
        if part.place not in ("output", "input"):
            continue
        W = weight[part.columns]
        delta = row[method.linear.table.ranges[part.name]].to(W.device)
        kept = surviving_fraction(W, part.factors(W).up, delta, W.dtype)
        if kept < SMALLEST_FRACTION:
            raise ValueError(
                f"Folding {name!r} in {W.dtype} would lose {1 - kept:.0%} of its change in {part.name}. Leave it as it "
                "is: the gate loses nothing."
            )
