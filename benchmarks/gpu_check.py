"""Question: does SVF work on a GPU as it does on the CPU, and how fast is it there?

    python benchmarks/gpu_check.py [--device cpu] [--max_seconds N] [--only WORD]     (or `make gpu-check`)

Run what a CPU cannot show, in at most 8 minutes on one GPU with 141 GB. Print one table:

- the outputs of a fresh adapter, and the weights after merge and unmerge, are those of the base model bit for bit;
- gate, fold, mixed rows, mixtures per row and merge agree with U diag(σz) Vᵀ from an fp64 SVD, in fp32 and bf16;
- `torch.compile` and CUDA graphs work;
- how often the CPU waits for the GPU in a training step and for a generated token;
- the time and accuracy of the singular bases of an 8B model;
- training step, rollout, mixed rows and search, in time relative to LoRA r=16 or to one expert at a time;
- the memory of attaching, a training step and a rollout.

Each check runs on its own. One that fails leaves a row with its error. One that does not fit into `--max_seconds`
leaves a row that says so. The exit code is 1 if a check fails. `--only` runs the checks with this word in their name.

The models have random weights in the shapes of SmolLM2-135M and Llama-3-8B. Where only time and memory are measured,
random orthonormal matrices stand in for singular vectors. Without a GPU (`--device cpu`, chosen by itself) both shapes
are tiny, the run takes a quarter of a minute on one core, and its times mean nothing. Where this project is not
installed: `PYTHONPATH=. python3 benchmarks/gpu_check.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from common import (
    LORA,
    RESULTS,
    SHAPES,
    Adapted,
    Base,
    Record,
    adapt,
    as_trained,
    folded,
    interleaved,
    language_loss,
    linear_layers,
    peft_config,
    random_ids,
    seconds,
)
from huggingface_hub.utils import disable_progress_bars
from peft import get_peft_model
from torch import nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from peft_svf import SVFConfig, SVFLayer, SVFRuntimeConfig
from peft_svf.spectral import BasisCache, delta_weight, singular_basis

# ---------------------------------------------------------------------------------------------------- sizes

SMALL, LARGE = "SmolLM2-135M", "Llama-3-8B"


@dataclass(frozen=True)
class Sizes:
    """How much the checks do.

    Attributes:
        shapes: The models.
        dtype: Of the models whose time and memory are measured.
        few: Blocks of a model where the number of blocks does not matter.
        step: Rows and tokens per row of a training step.
        prompts, prompt_tokens, new_tokens: Of a rollout.
        experts, mixed_tokens: In mixed rows, one prompt for each expert, and how many tokens it gets.
        mixtures, shots, search_tokens: A search scores each mixture on each example by so many new tokens.
        one_at_a_time: For how many mixtures the search by one mixture at a time is timed.
        step_rounds, generate_rounds: Timings of each candidate.
        compiler: Backend of `torch.compile`.
    """

    shapes: Mapping[str, PreTrainedConfig]
    dtype: torch.dtype
    few: int
    step: tuple[int, int]
    prompts: int
    prompt_tokens: int
    new_tokens: int
    experts: int
    mixed_tokens: int
    mixtures: int
    shots: int
    search_tokens: int
    one_at_a_time: int
    step_rounds: int
    generate_rounds: int
    compiler: str


ON_GPU = Sizes(
    shapes={SMALL: SHAPES["smollm2-135m"], LARGE: SHAPES["llama-3-8b"]},
    dtype=torch.bfloat16,
    few=2,
    step=(8, 256),
    prompts=64,
    prompt_tokens=40,
    new_tokens=32,
    experts=8,
    mixed_tokens=16,
    mixtures=32,
    shots=8,
    search_tokens=8,
    one_at_a_time=3,
    step_rounds=9,
    generate_rounds=3,
    compiler="inductor",
)


def tiny(hidden: int, intermediate: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )


ON_CPU = Sizes(
    shapes={SMALL: tiny(48, 128), LARGE: tiny(64, 224)},
    dtype=torch.float32,
    few=1,
    step=(2, 64),
    prompts=2,
    prompt_tokens=8,
    new_tokens=4,
    experts=3,
    mixed_tokens=3,
    mixtures=4,
    shots=2,
    search_tokens=2,
    one_at_a_time=2,
    step_rounds=1,
    generate_rounds=1,
    compiler="aot_eager",
)

MAX_SECONDS = 480
LONGEST = 120  # seconds after which one check is stopped, so that the others get their turn
WARM_UP = 3  # training steps: SVF decides whether to fold by what the steps before were like
LEARNING_RATE = 1e-5  # enough to change δ in every step, too little to change its size
DELTA = 0.1  # standard deviation of δ where outputs are compared
MERGES = 3

# Relative errors, in the Frobenius norm: two to three times those on a CPU in bf16, ten times and more in fp32. Without
# δ the logits would be off by what the table calls the change by the expert, 0.3 in the shape of SmolLM2.
LOGITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
GRADIENT = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
CHANGE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2}
COMPILED = 1e-4  # in fp32
REPLAYED = 1e-2  # in bf16; a captured product may use another kernel

# ---------------------------------------------------------------------------------------------------- rows and models

PASS, FAIL, MEASURED = "pass", "fail", "–"


@dataclass
class Row:
    """One line of the table: what was looked at, what came out, and whether that is right. `values` go into the JSON
    file only."""

    what: str
    result: str
    status: str = MEASURED
    values: dict[str, Any] = field(default_factory=dict)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def verdict(right: bool) -> str:
    return PASS if right else FAIL


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def within(what: str, error: float, tolerance: float, note: str = "") -> Row:
    """A row for an error that has a limit. NaN is beyond every limit."""
    values = {"error": error, "tolerance": tolerance}
    return Row(what, f"{error:.1e}, at most {tolerance:.0e}{note}", verdict(error <= tolerance), values)


def all_equal(what: str, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Row:
    """A row for tensors that must be the same bit for bit."""
    equal = sum(torch.equal(a, b) for a, b in pairs)
    values = {"equal": equal, "of": len(pairs)}
    return Row(what, f"{equal} of {len(pairs)} identical", verdict(equal == len(pairs)), values)


class Setting:
    """The device, the sizes, and the base model of the check that runs. One base model is kept at a time."""

    def __init__(self, device: str, sizes: Sizes) -> None:
        self.device, self.sizes = device, sizes
        self._key: tuple[object, ...] = ()
        self._base: Base | None = None

    def base(self, shape: str, dtype: torch.dtype | None = None, layers: int | None = None) -> Base:
        """A base model with random weights, with only the first so many blocks if told so."""
        dtype = dtype or self.sizes.dtype
        if self._base is None or self._key != (shape, dtype, layers):
            self._base = None
            release_memory()
            config: Any = copy.deepcopy(self.sizes.shapes[shape])
            config.num_hidden_layers = layers or config.num_hidden_layers
            with torch.device(self.device):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            label = f"{shape}, {config.num_hidden_layers} blocks"
            self._base = Base(model.requires_grad_(False).eval(), label, random=True)
            self._key = shape, dtype, layers
        return self._base


def release_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # a check that broke the device must not stop the script
            torch.cuda.empty_cache()


def decomposed(model: nn.Module, experts: Sequence[str] = ("default",)) -> Any:
    """Attach SVF adapters with the singular bases of the weights, without a cache, to be used through the gate."""
    for name in experts:
        config = SVFConfig(
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            runtime_config=SVFRuntimeConfig(fold="never", use_cache=False),
        )
        model = get_peft_model(model, config, name) if name == experts[0] else model
        if name != experts[0]:
            model.add_adapter(name, config)
    return model.eval()


def fold_if(model: Any, policy: str) -> None:
    """Set `SVFRuntimeConfig.fold` of all adapters."""
    for config in model.peft_config.values():
        config.runtime_config.fold = policy


def svf_layers(model: nn.Module) -> list[SVFLayer]:
    return [module for module in model.modules() if isinstance(module, SVFLayer)]


def check_folded(model: nn.Module) -> None:
    """Raise an error unless all layers fold. Otherwise the gate would be taken for the fold."""
    some, total = folded(model)
    if some < total:
        raise RuntimeError(f"Only {some} of {total} weights are folded.")


@torch.no_grad()
def set_deltas(model: nn.Module, experts: Sequence[str], std: float) -> None:
    """Random δ, the same in every call, which still counts as a change of δ."""
    generator = torch.Generator().manual_seed(0)
    for layer in svf_layers(model):
        for name in experts:
            delta = layer.svf_delta[name].weight
            delta.copy_(std * torch.randn(delta.shape, generator=generator))


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False, **kwargs).logits


def generate(model: Any, ids: torch.Tensor, new_tokens: int, **kwargs: Any) -> None:
    """Greedy, and exactly so many new tokens."""
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=0,
        **kwargs,
    )


def optimizer_step(base: Base, method: str, rows: int, tokens: int) -> tuple[Adapted, Callable[[], None]]:
    """A model to train, and one step of it with the optimizer of transformers' trainer. A few steps are done."""
    adapted, loss = adapt(base, method), language_loss(random_ids(base, rows, tokens))
    optimizer = torch.optim.AdamW(adapted.trainable, lr=LEARNING_RATE, weight_decay=0, fused=True)

    def step() -> None:
        adapted.loss(loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(WARM_UP):
        step()
    return adapted, step


def several_experts(base: Base, method: str, count: int) -> tuple[Any, list[str]]:
    """A model with so many trained-looking adapters, and their names."""
    model: Any = adapt(base, method).model
    names = ["default", *(f"expert{i}" for i in range(1, count))]
    for name in names[1:]:
        model.add_adapter(name, peft_config(method, base))
    as_trained(model)
    return model.eval(), names


# ---------------------------------------------------------------------------------------------------- bit identity


def fresh_adapter(setting: Setting, shape: str) -> Iterator[Row]:
    """A new adapter has δ = 0 and leaves the logits of a prompt, and of the token after it, as they are."""
    base = setting.base(shape, torch.bfloat16, setting.sizes.few)
    model: Any = adapt(base, "svf").model.eval()
    ids = random_ids(base, 4, 33)

    @torch.no_grad()
    def logits(model: Any, **kwargs: Any) -> list[torch.Tensor]:
        prompt = model(input_ids=ids[:, :-1], use_cache=True, **kwargs)
        token = model(input_ids=ids[:, -1:], past_key_values=prompt.past_key_values, use_cache=True, **kwargs)
        return [prompt.logits, token.logits]

    expected = logits(base.model)
    set_deltas(model, ["default"], 0)
    for policy, name in (("never", "gate"), ("always", "fold")):
        fold_if(model, policy)
        found = logits(model)
        if policy == "always":
            check_folded(model)
        yield all_equal(f"logits of a fresh adapter, {name}", list(zip(found, expected, strict=True)))
    set_deltas(model, ["default"], DELTA)
    found = logits(model, adapter_names=["default", "__base__", "default", "__base__"])
    base_rows = [(a[1::2], b[1::2]) for a, b in zip(found, expected, strict=True)]
    yield all_equal("logits of base rows in a mixed batch", base_rows)


def merge_and_unmerge(setting: Setting, shape: str) -> Iterator[Row]:
    base = setting.base(shape, torch.bfloat16, setting.sizes.few)
    model: Any = adapt(base, "svf", base.copy(own_weights=True)).model
    weights = [layer.get_base_layer().weight for layer in svf_layers(model)]
    before = [weight.detach().clone() for weight in weights]
    for _ in range(MERGES):
        model.merge_adapter()
        merged = [weight.detach().clone() for weight in weights]
        model.unmerge_adapter()
    changed = sum(not torch.equal(a, b) for a, b in zip(before, merged, strict=True))
    yield Row("weights that merging changes", f"{changed} of {len(weights)}", verdict(changed == len(weights)))
    yield all_equal(f"weights after {MERGES} merges and unmerges", list(zip(before, weights, strict=True)))


# ---------------------------------------------------------------------------------------------------- agreement


class Reference:
    """The model in fp64, with every adapted weight composed as U diag(σz) Vᵀ from an fp64 SVD on the CPU.

    transformers computes norms and rotary embeddings in fp32 in it, too, which leaves an error near 1e-7.
    """

    def __init__(self, base_model: nn.Module, adapted: nn.Module) -> None:
        self.model = copy.deepcopy(base_model).double()
        self.layers = {layer.module_name: layer for layer in svf_layers(adapted)}
        self.factors = {}
        for name, layer in self.layers.items():
            weight = layer.get_base_layer().weight.detach()
            factors = torch.linalg.svd(weight.cpu().double(), full_matrices=False)
            self.factors[name] = [factor.to(weight.device) for factor in factors]

    def deltas(self, mixture: Mapping[str, float]) -> dict[str, torch.Tensor]:
        return {
            name: sum(alpha * layer.svf_delta[expert]().detach().double() for expert, alpha in mixture.items())
            for name, layer in self.layers.items()
        }

    def __call__(self, deltas: Mapping[str, torch.Tensor], **kwargs: Any) -> Any:
        weights = {f"{name}.weight": (U * (S * (1 + deltas[name]))) @ Vh for name, (U, S, Vh) in self.factors.items()}
        return functional_call(self.model, weights, kwargs=kwargs)

    @torch.no_grad()
    def logits(self, ids: torch.Tensor, mixture: Mapping[str, float]) -> torch.Tensor:
        return self(self.deltas(mixture), input_ids=ids, use_cache=False).logits

    def gradient(self, ids: torch.Tensor, mixture: Mapping[str, float]) -> torch.Tensor:
        """Of the loss to δ of every layer."""
        deltas = {name: delta.requires_grad_(True) for name, delta in self.deltas(mixture).items()}
        self(deltas, input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return torch.cat([delta.grad for delta in deltas.values()])


def agreement(setting: Setting, dtype: torch.dtype) -> Iterator[Row]:
    """Five paths to the same logits, and two to the gradient of δ."""
    base, experts = setting.base(SMALL, dtype, setting.sizes.few), ("default", "second")
    model = decomposed(base.copy(own_weights=True), experts)
    set_deltas(model, experts, DELTA)
    reference = Reference(base.model, model)
    ids, tolerance = random_ids(base, 4, setting.sizes.step[1]), LOGITS[dtype]
    mixtures = [{"default": 1.0}, {"second": 1.0}, {"default": 0.0}, {"default": 0.3, "second": 0.7}]
    expected = [reference.logits(ids, mixture) for mixture in mixtures]

    def of_rows(*rows: int) -> torch.Tensor:
        """Each row from the mixture of this index."""
        return torch.stack([expected[mixture][row] for row, mixture in enumerate(rows)])

    def through_fold() -> torch.Tensor:
        fold_if(model, "always")
        logits = logits_of(model, ids)
        check_folded(model)
        fold_if(model, "never")
        return logits

    def through_merge() -> torch.Tensor:
        model.merge_adapter(["default"])
        logits = logits_of(model, ids)
        model.unmerge_adapter()
        return logits

    def through_row_mixture() -> torch.Tensor:
        weights = [[mixture.get(name, 0.0) for name in experts] for mixture in mixtures]
        with model.base_model.row_mixture(weights, experts):
            return logits_of(model, ids)

    of_base = relative_error(logits_of(base.model, ids), expected[2])
    yield Row("base model, for comparison", f"{of_base:.1e}", values={"error": of_base})
    change = relative_error(expected[0], expected[2])
    yield Row("change of the logits by the expert", f"{change:.1e}", values={"change": change})
    paths: dict[str, tuple[Callable[[], torch.Tensor], torch.Tensor]] = {
        "gate": (lambda: logits_of(model, ids), of_rows(0, 0, 0, 0)),
        "fold": (through_fold, of_rows(0, 0, 0, 0)),
        "adapter_names": (
            lambda: logits_of(model, ids, adapter_names=["default", "second", "__base__", "default"]),
            of_rows(0, 1, 2, 0),
        ),
        "row_mixture": (through_row_mixture, of_rows(0, 1, 2, 3)),
        "merge": (through_merge, of_rows(0, 0, 0, 0)),
    }
    found = {}
    for name, (path, wanted) in paths.items():
        logits = path()
        found[name] = logits[0]  # all paths use the first expert there
        yield within(f"error of {name}", relative_error(logits, wanted), tolerance)
    differences = {f"{a} and {b}": relative_error(found[a], found[b]) for a, b in combinations(found, 2)}
    worst = max(differences, key=lambda pair: differences[pair])
    row = within("largest difference of two paths", differences[worst], tolerance, f" ({worst})")
    row.values["differences"] = differences
    yield row

    wanted = reference.gradient(ids, mixtures[0])
    for policy, name in (("never", "gate"), ("always", "fold")):
        fold_if(model, policy)
        error = relative_error(gradient(model, ids, check=check_folded if policy == "always" else None), wanted)
        yield within(f"error of the gradient of δ, {name}", error, GRADIENT[dtype])


def gradient(model: Any, ids: torch.Tensor, check: Callable[[nn.Module], None] | None) -> torch.Tensor:
    """Of the loss to δ of every layer, as in a trainer. Two steps, as no layer folds before its first backward pass."""
    model.train()
    for step in range(2):
        set_deltas(model, list(model.peft_config), DELTA)
        model.zero_grad()
        loss = Adapted(model).loss(language_loss(ids))
        if step == 1 and check is not None:
            check(model)
        loss.backward()
    return torch.cat([layer.svf_delta["default"].weight.grad for layer in svf_layers(model)])


# ---------------------------------------------------------------------------------------------------- torch.compile


def compiled(setting: Setting, path: str) -> Iterator[Row]:
    """A forward through `torch.compile`, in fp32: does it equal the eager one, and how many graph breaks has it? What
    is compiled goes through the gate, also where the eager forward is folded."""
    base = setting.base(SMALL, torch.float32, setting.sizes.few)
    model: Any = base.copy() if path == "base" else adapt(base, "svf").model
    if path != "base":
        fold_if(model, "always" if path == "fold" else "never")
    ids = random_ids(base, 2, 16)
    expected = logits_of(model.eval(), ids)
    if path == "fold":
        check_folded(model)
    torch._dynamo.reset()
    with torch.no_grad():
        explained = torch._dynamo.explain(model)(input_ids=ids, use_cache=False)
    reasons = Counter(str(each.reason).splitlines()[0] for each in explained.break_reasons)
    first = f": {next(iter(reasons))}" if reasons else ""
    yield Row(
        "graph breaks",
        f"{explained.graph_break_count} in {explained.graph_count} graphs{first}",
        values={"graph_breaks": explained.graph_break_count, "graphs": explained.graph_count, "reasons": dict(reasons)},
    )
    torch._dynamo.reset()
    try:
        function = torch.compile(model, backend=setting.sizes.compiler)
        duration = seconds(lambda: logits_of(function, ids))
        error = relative_error(logits_of(function, ids), expected)
    finally:
        torch._dynamo.reset()
    yield within("difference from eager", error, COMPILED)
    yield Row(f"first call, {setting.sizes.compiler}", f"{duration:.1f} s", values={"seconds": duration})


# ---------------------------------------------------------------------------------------------------- synchronisations


def synchronizations(function: Callable[[], object]) -> Counter[str]:
    """How often the CPU waits for the GPU in a call, by the line of Python that makes it wait."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [each for each in caught if "synchronizing CUDA operation" in str(each.message)]
    return Counter(f"{Path(each.filename).name}:{each.lineno}" for each in found)


def waits(what: str, count: float, model: nn.Module, places: Counter[str]) -> Row:
    layers = len(svf_layers(model))
    per_layer = f", {count / layers:.2f} per layer" if layers else ""
    top = ", ".join(f"{place} {times}" for place, times in places.most_common(3))
    values = {"count": count, "layers": layers, "places": dict(places)}
    return Row(what, f"{count:g}{per_layer}" + (f" ({top})" if top else ""), values=values)


def waits_of_a_step(setting: Setting) -> Iterator[Row]:
    base = setting.base(SMALL)
    for method in ("svf", "svf gate", LORA):
        adapted, step = optimizer_step(base, method, *setting.sizes.step)
        places = synchronizations(step)
        some, total = folded(adapted.model)
        note = f", {some} of {total} folded" if total else ""
        yield waits(f"training step, {method}{note}", places.total(), adapted.model, places)


def waits_of_a_token(setting: Setting) -> Iterator[Row]:
    """What `generate` does for each token beyond the first few; the base model has some, too."""
    base, tokens = setting.base(SMALL), 8
    ids = random_ids(base, setting.sizes.experts, setting.sizes.prompt_tokens)
    model, names = several_experts(base, "svf", setting.sizes.experts)
    candidates: dict[str, tuple[Any, str, dict[str, Any]]] = {
        "base": (base.model, "", {}),
        "svf fold": (model, "always", {}),
        "svf gate": (model, "never", {}),
        "svf adapter_names": (model, "auto", {"adapter_names": names}),
        LORA: (adapt(base, LORA).model.eval(), "", {}),
    }
    for name, (candidate, policy, kwargs) in candidates.items():
        if policy:
            fold_if(candidate, policy)
        call = partial(generate, candidate, ids, **kwargs)
        call(2)
        some, many = (synchronizations(partial(call, count)) for count in (2, 2 + tokens))
        per_token = Counter({place: (many[place] - some[place]) / tokens for place in many})
        yield waits(f"generated token, {name}", sum(per_token.values()), candidate, +per_token)


# ---------------------------------------------------------------------------------------------------- decomposition


def decomposition(setting: Setting) -> Iterator[Row]:
    """One weight of each shape of the large model, through the cache: empty, then filled."""
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(copy.deepcopy(setting.sizes.shapes[LARGE]))
    counts = Counter(tuple(layer.weight.shape) for layer in linear_layers(whole))
    singular_basis(random_weight(setting, (64, 64)))  # the first call loads libraries
    total: dict[str, float] = dict.fromkeys(("decomposed", "cached"), 0.0)
    with tempfile.TemporaryDirectory() as folder:
        cache = BasisCache(folder)
        for shape, count in counts.items():
            weight = random_weight(setting, shape)
            times = {key: seconds(partial(cache.load_or_compute, weight)) for key in total}
            yield Row(
                f"{shape[0]} x {shape[1]}, {count} weights",
                f"{times['decomposed']:.2f} s each, {times['cached']:.2f} s from the cache",
                values={"shape": shape, "count": count, **times},
            )
            for key in total:
                total[key] += count * times[key]
    yield Row(
        f"extrapolated to {counts.total()} weights",
        f"{total['decomposed']:.0f} s, {total['cached']:.0f} s from the cache",
        values={"extrapolated": True, **total},
    )
    if setting.device == "cuda":
        one_of_each_k = {min(shape): shape for shape in counts}
        for shape in one_of_each_k.values():
            weight = random_weight(setting, shape).cpu()
            duration = seconds(partial(singular_basis, weight))
            yield Row(f"{shape[0]} x {shape[1]} on the CPU", f"{duration:.2f} s", values={"seconds": duration})


def random_weight(setting: Setting, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
    generator = torch.Generator(setting.device).manual_seed(0)
    weight = 0.02 * torch.randn(shape, generator=generator, device=setting.device)
    return weight.to(dtype or setting.sizes.dtype)


def accuracy_of_change(setting: Setting) -> Iterator[Row]:
    """ΔW of a random δ through Q of the device, against an fp64 SVD of the same weight on the CPU. The shape is that of
    the key projection, as the SVD of a larger one takes minutes."""
    config: Any = setting.sizes.shapes[LARGE]
    shape = (config.hidden_size // config.num_attention_heads * config.num_key_value_heads, config.hidden_size)
    for dtype, tolerance in CHANGE.items():
        weight = random_weight(setting, shape, dtype)
        delta = torch.randn(min(shape), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        U, S, Vh = torch.linalg.svd(weight.cpu().double(), full_matrices=False)
        work = torch.promote_types(dtype, torch.float32)
        found = delta_weight(weight, singular_basis(weight).vectors, delta.to(weight.device, work))
        error = relative_error(found.cpu(), (U * (S * delta)) @ Vh)
        yield within(f"error of ΔW, {shape[0]} x {shape[1]}, {name_of(dtype)}", error, tolerance)


# ---------------------------------------------------------------------------------------------------- time


def compared(
    times: Mapping[str, Sequence[float]], reference: str, notes: Mapping[str, str] | None = None
) -> Iterator[Row]:
    """A row for each candidate: its median, and that relative to the reference's."""
    for name, values in times.items():
        ratio = median(values) / median(times[reference])
        relative = "" if name == reference else f"{ratio:.2f} times {reference}, "
        note = (notes or {}).get(name, "")
        raw = {"seconds": values, "ratio": ratio, "reference": reference}
        yield Row(name, f"{relative}{median(values) * 1000:.1f} ms{note}", values=raw)


def folding_of(model: nn.Module) -> str:
    some, total = folded(model)
    return f", {some} of {total} folded" if total else ""


def training_step(setting: Setting, shape: str) -> Iterator[Row]:
    """Forward, backward and optimizer."""
    base, (rows, tokens) = setting.base(shape), setting.sizes.step
    models: dict[str, nn.Module] = {}

    def make(method: str) -> Callable[[], None]:
        adapted, step = optimizer_step(base, method, rows, tokens)
        models[method] = adapted.model
        return step

    methods = ("svf", "svf gate", LORA)
    times, _ = interleaved({method: partial(make, method) for method in methods}, setting.sizes.step_rounds)
    yield from compared(times, LORA, {method: folding_of(model) for method, model in models.items()})


def rollout(setting: Setting, shape: str) -> Iterator[Row]:
    """`generate` with an expert whose δ was just changed, as after an optimizer step."""
    sizes, base = setting.sizes, setting.base(shape)
    ids = random_ids(base, sizes.prompts, sizes.prompt_tokens)
    models: dict[str, Any] = {}

    def make(name: str) -> Callable[[], None]:
        model = models[name] = base.model if name == "base" else adapt(base, name).model.eval()
        generate(model, ids, 2)

        def run() -> None:
            as_trained(model)
            generate(model, ids, sizes.new_tokens)

        return run

    names = ("base", "svf", "svf gate", LORA)
    times, _ = interleaved({name: partial(make, name) for name in names}, sizes.generate_rounds)
    yield from compared(times, LORA, {name: folding_of(model) for name, model in models.items()})


def mixed_rows(setting: Setting, shape: str) -> Iterator[Row]:
    """One prompt for each expert: all in one `generate`, and one after the other."""
    sizes, base = setting.sizes, setting.base(shape)
    ids = random_ids(base, sizes.experts, sizes.prompt_tokens)
    (svf, names), (lora, _) = (several_experts(base, method, sizes.experts) for method in ("svf", LORA))

    def one_by_one(model: Any, new_tokens: int) -> None:
        for name, row in zip(names, ids.split(1), strict=True):
            model.set_adapter(name)
            generate(model, row, new_tokens)

    candidates: dict[str, Callable[[int], None]] = {
        "base, one batch": partial(generate, base.model, ids),
        "svf, one batch": partial(generate, svf, ids, adapter_names=names),
        "svf, one by one": partial(one_by_one, svf),
        "lora, one batch": partial(generate, lora, ids, adapter_names=names),
        "lora, one by one": partial(one_by_one, lora),
    }
    yield from compared(warm_and_timed(candidates, sizes.mixed_tokens, sizes.generate_rounds), "lora, one batch")


def warm_and_timed(
    candidates: Mapping[str, Callable[[int], None]], new_tokens: int, rounds: int
) -> dict[str, list[float]]:
    def make(name: str) -> Callable[[], None]:
        candidates[name](2)
        return partial(candidates[name], new_tokens)

    return interleaved({name: partial(make, name) for name in candidates}, rounds)[0]


def search(setting: Setting, shape: str) -> Iterator[Row]:
    """Every mixture on every example: all pairs in one batch, or one mixture after the other as an adapter."""
    sizes, base = setting.sizes, setting.base(shape)
    model, names = several_experts(base, "svf", sizes.experts)
    examples = random_ids(base, sizes.shots, sizes.prompt_tokens)
    weights = torch.rand(sizes.mixtures, len(names), device=base.device)
    pairs, pair_weights = examples.repeat(sizes.mixtures, 1), weights.repeat_interleave(sizes.shots, 0)

    def in_one_batch(new_tokens: int) -> None:
        with model.base_model.row_mixture(pair_weights, names):
            generate(model, pairs, new_tokens)

    def one_at_a_time(new_tokens: int) -> None:
        for alpha in weights[: sizes.one_at_a_time].tolist():
            model.base_model.add_weighted_adapter(names, alpha, "mixture")
            model.set_adapter("mixture")
            generate(model, examples, new_tokens)
            model.set_adapter(names[0])
            model.delete_adapter("mixture")

    batch, single = "all pairs in one batch", "one mixture at a time"
    candidates = {batch: in_one_batch, single: one_at_a_time}
    times = warm_and_timed(candidates, sizes.search_tokens, sizes.generate_rounds)
    count = {batch: sizes.mixtures * sizes.shots, single: sizes.one_at_a_time * sizes.shots}
    per_pair = {name: [value / count[name] for value in values] for name, values in times.items()}
    yield from compared(per_pair, single, {name: f" per pair, {pairs} pairs" for name, pairs in count.items()})


# ---------------------------------------------------------------------------------------------------- memory


def mebibytes(what: str, count: int, reference: int | None = None) -> Row:
    relative = f"{count / reference:.2f} times {LORA}, " if reference else ""
    return Row(what, f"{relative}{count / 2**20:,.0f} MiB", values={"bytes": count})


def memory_of_attaching(setting: Setting) -> Iterator[Row]:
    """One block of the large model, with its weights decomposed. Blocks come one after the other, so that the whole
    model needs no more beyond its bases."""
    base = setting.base(LARGE, layers=1)
    singular_basis(random_weight(setting, (64, 64)))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model = decomposed(base.copy())
    torch.cuda.synchronize()
    duration = time.perf_counter() - start
    kept, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    yield mebibytes("bases and δ of one block", kept)
    yield mebibytes("working memory of the decomposition", peak - kept)
    yield Row(f"attaching to {len(svf_layers(model))} weights", f"{duration:.1f} s", values={"seconds": duration})


def memory(setting: Setting) -> Iterator[Row]:
    """Allocated memory beyond the base model: after attaching, and the peaks of a training step and of a rollout."""
    base = setting.base(LARGE)
    found = {}
    for method in (LORA, "svf", "svf gate"):
        found[method] = memory_of(base, method, setting.sizes)
        release_memory()
        for what, count in found[method].items():
            yield mebibytes(f"{method}, {what}", count, None if method == LORA else found[LORA][what])


def memory_of(base: Base, method: str, sizes: Sizes) -> dict[str, int]:
    before = torch.cuda.memory_allocated()
    adapted, step = optimizer_step(base, method, *sizes.step)
    ids = random_ids(base, sizes.prompts, sizes.prompt_tokens)

    def peak(function: Callable[[], object]) -> int:
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before

    tensors = {id(tensor): tensor for tensor in [*base.model.parameters(), *base.model.buffers()]}
    attached = sum(p.nbytes for p in adapted.model.parameters() if id(p) not in tensors)
    of_step = peak(step)
    adapted.model.eval()
    generate(adapted.model, ids, 2)
    of_rollout = peak(partial(generate, adapted.model, ids, sizes.new_tokens))
    return {"attached": attached, "training step": of_step, "rollout": of_rollout}


# ---------------------------------------------------------------------------------------------------- CUDA graphs


def cuda_graph(setting: Setting, path: str) -> Iterator[Row]:
    """Capture a forward of one token per row, then replay it with other tokens and, through the gate, another δ."""
    base, experts = setting.base(SMALL, torch.bfloat16, setting.sizes.few), setting.sizes.experts
    svf, names = several_experts(base, "svf", experts)
    fold_if(svf, "always" if path == "fold" else "never")
    model = base.model if path == "base" else svf
    before, after = random_ids(base, experts, 2).split(1, dim=1)
    ids = before.clone()
    # 4D, as transformers looks at the values of another one, which waits for the GPU
    mask = torch.ones(experts, 1, 1, 1, dtype=torch.bool, device=base.device)
    forward = partial(logits_of, model, ids, attention_mask=mask)
    weights = torch.rand(experts, experts, device=base.device)
    with svf.base_model.row_mixture(weights, names) if path == "row_mixture" else contextlib.nullcontext():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                forward()
        torch.cuda.current_stream().wait_stream(stream)
        if path == "fold":
            check_folded(model)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = forward()

        def difference() -> float:
            graph.replay()
            return relative_error(captured, forward())

        ids.copy_(after)
        yield within("difference of a replay from eager", difference(), REPLAYED)
        if path == "gate":
            set_deltas(model, names, DELTA)
            yield within("the same after a change of δ", difference(), REPLAYED)


# ---------------------------------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class Check:
    name: str
    rows: Callable[[Setting], Iterator[Row]]
    needs_cuda: bool = False


CHECKS = [
    Check(f"bit identity, {SMALL}", partial(fresh_adapter, shape=SMALL)),
    Check(f"bit identity, {LARGE}", partial(fresh_adapter, shape=LARGE)),
    Check(f"merge, {SMALL}", partial(merge_and_unmerge, shape=SMALL)),
    Check("agreement, fp32", partial(agreement, dtype=torch.float32)),
    Check("agreement, bf16", partial(agreement, dtype=torch.bfloat16)),
    *(Check(f"torch.compile, {path}", partial(compiled, path=path)) for path in ("base", "gate", "fold")),
    Check(f"synchronisations, step, {SMALL}", waits_of_a_step, needs_cuda=True),
    Check(f"synchronisations, token, {SMALL}", waits_of_a_token, needs_cuda=True),
    Check("accuracy of ΔW", accuracy_of_change),
    Check(f"decomposition, {LARGE}", decomposition),
    Check(f"memory of attaching, {LARGE}", memory_of_attaching, needs_cuda=True),
    *(
        Check(f"{name}, {shape}", partial(function, shape=shape))
        for shape in (SMALL, LARGE)
        for name, function in (
            ("training step", training_step),
            ("rollout", rollout),
            ("mixed rows", mixed_rows),
            ("search", search),
        )
    ),
    Check(f"memory, {LARGE}", memory, needs_cuda=True),
    # at the end, as a capture that fails may leave the random generator of the device unusable
    *(
        Check(f"CUDA graph, {path}", partial(cuda_graph, path=path), needs_cuda=True)
        for path in ("base", "fold", "gate", "row_mixture")
    ),
]


class OutOfTime(BaseException):
    """Not an `Exception`, so that nothing on the way catches it."""


@contextlib.contextmanager
def time_limit(limit: float) -> Iterator[None]:
    """Raise `OutOfTime` in the block after so many seconds."""

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(check: Check, setting: Setting, time_left: float) -> list[Row]:
    """All rows of a check, with one more if it does not come to its end."""
    if check.needs_cuda and setting.device != "cuda":
        return [Row("", "skipped: needs CUDA")]
    if time_left <= 0:
        return [Row("", "skipped: out of time")]
    rows: list[Row] = []
    try:
        with time_limit(min(time_left, LONGEST)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows.extend(check.rows(setting))
    except OutOfTime:
        rows.append(Row("", "stopped: out of time"))
    except Exception as error:
        first, *_ = [*str(error).splitlines(), ""]
        rows.append(Row("", f"{type(error).__name__}: {first}", FAIL))
    release_memory()
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--max_seconds", type=float, default=MAX_SECONDS, help=f"default: {MAX_SECONDS}")
    parser.add_argument("--only", metavar="WORD", default="", help="only the checks with this word in their name")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu_check.json")
    arguments = parser.parse_args(argv)
    start = time.perf_counter()
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)

    gc.collect()
    gc.freeze()  # or each collection between two timings goes through all that was imported

    setting = Setting(arguments.device, ON_GPU if arguments.device == "cuda" else ON_CPU)
    record = Record(arguments, __doc__)
    table: list[list[str]] = []
    raw: dict[str, Any] = {"rows": [], "seconds": {}}
    for check in CHECKS:
        if arguments.only not in check.name:
            continue
        began = time.perf_counter()
        print(f"[{began - start:3.0f} s] {check.name}", file=sys.stderr, flush=True)
        for row in run(check, setting, arguments.max_seconds - (began - start)):
            table.append([check.name, row.what, row.result, row.status])
            raw["rows"].append({"check": check.name, **vars(row)})
        raw["seconds"][check.name] = time.perf_counter() - began
        record.raw(**raw)
        record.write()  # after each check, for when the machine goes away
    gc.unfreeze()

    tiny_shapes = ", with tiny shapes in place of the two models" if arguments.device == "cpu" else ""
    title = f"GPU check on {record.content['machine']['device']}{tiny_shapes}"
    counts = Counter(row[-1] for row in table)
    note = f"{counts[PASS]} passed, {counts[FAIL]} failed, {time.perf_counter() - start:.0f} s."
    record.table(title, ["check", "what", "result", "status"], table, note, text_columns=3)
    record.write()
    return 1 if counts[FAIL] else 0


if __name__ == "__main__":
    sys.exit(main())
