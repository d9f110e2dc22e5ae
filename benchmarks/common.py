"""What the benchmarks share: arguments, models, the methods that SVF is compared with, timing, tables, records."""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import peft
import torch
import transformers
from huggingface_hub.utils import disable_progress_bars
from peft import IA3Config, LoraConfig, OSFConfig, PeftConfig, PsoftConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

import peft_svf
from peft_svf import SVFConfig, SVFLayer, SVFRuntimeConfig
from peft_svf.spectral import SingularBasis

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from smollm2 import load_model

RESULTS = Path("outputs/benchmarks")

# ---------------------------------------------------------------------------------------------------- arguments


def argument_parser(doc: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark takes; `doc` is its docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    name = Path(sys.argv[0]).stem
    parser.add_argument(
        "--model",
        help=f"Hub id, folder, or one of {', '.join(SHAPES)} with random weights (default: SmolLM2-135M-Instruct)",
    )
    parser.add_argument("--layers", type=int, help="only the first so many blocks of the model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32, bfloat16 on GPU")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"timings of each candidate (default: {rounds})")
    parser.add_argument("--quick", action="store_true", help="small sizes and one round, to see that it runs")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with the device and dtype chosen, and one round if `--quick`."""
    arguments = parser.parse_args()
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments.dtype = getattr(torch, arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32"))
    if arguments.quick:
        arguments.rounds = 1
    disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    return arguments


# ---------------------------------------------------------------------------------------------------- models

SHAPES: dict[str, PreTrainedConfig] = {
    "llama-3-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
    "qwen2.5-7b": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    "mistral-7b": MistralConfig(
        vocab_size=32768,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        sliding_window=None,
    ),
    "qwen2.5-0.5b": Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
}


@dataclass
class Base:
    """A base model to adapt.

    Attributes:
        model: The model, on its device and in its dtype.
        label: What to call it in a table.
        random: Whether its weights are random. Their singular vectors are then not computed, as no time depends on
            their values.
    """

    model: nn.Module
    label: str
    random: bool

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def hidden_size(self) -> int:
        return int(getattr(self.model, "hidden_size", None) or self.model.config.hidden_size)

    def copy(self, own_weights: bool = False) -> nn.Module:
        """A copy to put an adapter into, which shares the weights unless told otherwise."""
        shared = {} if own_weights else {id(parameter): parameter for parameter in self.model.parameters()}
        return copy.deepcopy(self.model, shared)


def load_base(arguments: argparse.Namespace) -> Base:
    """The model that `--model`, `--layers`, `--dtype` and `--device` describe."""
    name, dtype = arguments.model, arguments.dtype
    if name in SHAPES:
        with torch.device(arguments.device):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(SHAPES[name]), dtype=dtype)
    else:
        model = load_model(name)[0].to(arguments.device, dtype)
    model.requires_grad_(False)
    label = Path(name).name if name else "SmolLM2-135M-Instruct"
    if arguments.layers:
        model.model.layers = model.model.layers[: arguments.layers]
        model.config.num_hidden_layers = arguments.layers
        label += f", {arguments.layers} blocks"
    return Base(model, f"{label}, {str(dtype).removeprefix('torch.')}", random=name in SHAPES)


def load_tokenizer(arguments: argparse.Namespace) -> Any:
    """The tokenizer of the model; SmolLM2's for one with random weights."""
    return load_model(None if arguments.model in SHAPES else arguments.model)[1]


def random_ids(base: Base, rows: int, length: int) -> torch.Tensor:
    """Token ids `[rows, length]`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, base.model.config.vocab_size, (rows, length), generator=generator).to(base.device)


def orthonormal(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns: those of a random reflection."""
    v = torch.randn(rows, device=like.device, dtype=torch.float32)
    matrix = torch.outer(v, v[:columns]).mul_(-2 / v.square().sum())
    matrix.diagonal().add_(1)
    return matrix.to(like.dtype)


@contextmanager
def stand_in_vectors() -> Iterator[None]:
    """Orthonormal matrices in place of singular vectors, for SVF and for every method that calls `torch.linalg.svd`."""

    def singular_basis(weight: torch.Tensor, *_: Any, **__: Any) -> SingularBasis:
        k = min(weight.shape)
        return SingularBasis(orthonormal(k, k, weight), torch.linspace(2, 1, k, dtype=torch.float64))

    def svd(weight: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        (rows, columns), k = weight.shape, min(weight.shape)
        spectrum = torch.linspace(2, 1, k, device=weight.device, dtype=weight.dtype)
        return orthonormal(rows, k, weight), spectrum, orthonormal(columns, k, weight).mT

    with mock.patch("peft_svf.tuner.layer.singular_basis", singular_basis), mock.patch("torch.linalg.svd", svd):
        yield


# ---------------------------------------------------------------------------------------------------- methods

LORA = "lora r=16"
METHODS = (
    "svf",
    "svf gate",
    "svf r=k/8",
    LORA,
    "dora r=16",
    "ia3",
    "osf",
    "psoft r=32",
    "full",
    "released",
)
CHANGES_BASE_WEIGHTS = ("full", "released")


def is_ours(method: str) -> bool:
    return method.startswith("svf")


Loss = Callable[[nn.Module], torch.Tensor]


class Adapted:
    """A model with something to train, and how one optimizer step on it goes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def before_forward(self) -> None:
        pass

    def loss(self, loss: Loss) -> torch.Tensor:
        """The loss, under autocast if the base model is in 16 bit, as in a trainer."""
        base = next(self.model.parameters())
        with torch.autocast(base.device.type, base.dtype) if base.dtype.itemsize == 2 else nullcontext():
            return loss(self.model)

    def after_backward(self) -> None:
        pass

    def update(self) -> None:
        """Write to every trained parameter, as an optimizer does, so that nothing computed from it stays valid. The
        change is negligible; the time of a real optimizer is left out for all methods alike."""
        with torch.no_grad():
            torch._foreach_add_(self.trainable, [parameter.grad for parameter in self.trainable], alpha=-1e-9)
        for parameter in self.model.parameters():
            parameter.grad = None


class Released(Adapted):
    """The way of the code released with the paper, for all linear layers instead of the MLP only.

    U, σ and V of each weight are kept in the dtype of the model. Before the forward pass each weight is composed as
    `U diag(σ m) Vᵀ Σσ / Σ(σ m)` with the mask m = sigmoid(p) and written into the model. Backward computes the full
    gradient of each weight, then composes again with a graph and sends that gradient through it to p. One thing is
    cheaper here than there: the columns of U are scaled, where the released code multiplies by a diagonal matrix.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = linear_layers(model)
        for layer in self.layers:
            U, S, Vh = torch.linalg.svd(layer.weight.detach().float(), full_matrices=False)
            factors = {"released_U": U, "released_S": S, "released_V": Vh.mT.contiguous()}
            for name, factor in factors.items():
                layer.register_buffer(name, factor.to(layer.weight.dtype), persistent=False)
            layer.released_p = nn.Parameter(0.1 + 0.01 * torch.randn_like(layer.released_S))
        super().__init__(model)
        for layer in self.layers:
            layer.weight.requires_grad_(True)  # for its gradient; it is not trained

    @staticmethod
    def compose(layer: Any) -> torch.Tensor:
        masked = layer.released_S * torch.sigmoid(layer.released_p)
        return (layer.released_U * masked) @ layer.released_V.mT * (layer.released_S.sum() / masked.sum())

    @torch.no_grad()
    def before_forward(self) -> None:
        for layer in self.layers:
            layer.weight.copy_(self.compose(layer))

    def after_backward(self) -> None:
        for layer in self.layers:
            self.compose(layer).backward(layer.weight.grad)


def linear_layers(model: nn.Module) -> list[nn.Module]:
    """All linear layers but the output layer, which is what "all-linear" means."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]


def peft_config(method: str, base: Base, **runtime: Any) -> PeftConfig:
    """The PEFT config of a method, for all linear layers."""
    common: Any = {
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM" if hasattr(base.model, "generate") else None,
    }
    if is_ours(method):
        return SVFConfig(
            r=base.hidden_size // 8 if method == "svf r=k/8" else None,
            runtime_config=SVFRuntimeConfig(
                fold="never" if method == "svf gate" else "auto", use_cache=not base.random, **runtime
            ),
            **common,
        )
    if method == LORA or method == "dora r=16":
        return LoraConfig(r=16, lora_alpha=32, use_dora=method != LORA, **common)
    if method == "ia3":
        return IA3Config(feedforward_modules=["down_proj"], **common)
    if method == "osf":
        return OSFConfig(**common)
    if method == "psoft r=32":
        return PsoftConfig(r=32, **common)
    raise ValueError(f"There is no PEFT method {method!r}.")


def adapt(base: Base, method: str, model: nn.Module | None = None) -> Adapted:
    """Make a copy of a base model trainable by a method, or `model` itself if given. The copy shares the weights of the
    base model if the method leaves them as they are."""
    model = model or base.copy(own_weights=method in CHANGES_BASE_WEIGHTS)
    with stand_in_vectors() if base.random else nullcontext():
        if method == "released":
            return Released(model)
        if method == "full":
            for layer in linear_layers(model):
                layer.requires_grad_(True)
            return Adapted(model)
        adapted = Adapted(get_peft_model(model, peft_config(method, base)))
    as_trained(adapted.model)
    return adapted


def as_trained(model: nn.Module) -> None:
    """Give every δ the size that training gives it. A folded weight in 16 bit cannot hold a δ near 0, in which case SVF
    does not fold."""
    for module in model.modules():
        if isinstance(module, SVFLayer):
            for delta in module.svf_delta.values():
                nn.init.normal_(delta.weight, std=0.02)


def folded(model: nn.Module) -> tuple[int, int]:
    """How many SVF layers hold a folded weight, and how many there are."""
    layers = [module for module in model.modules() if isinstance(module, SVFLayer)]
    return sum(layer.fold.weight is not None for layer in layers), len(layers)


def training_step(adapted: Adapted, losses: Sequence[Loss]) -> None:
    """One optimizer step: forward and backward for each micro-batch, then an update of what is trained."""
    adapted.before_forward()
    for loss in losses:
        adapted.loss(loss).backward()
    adapted.after_backward()
    adapted.update()


def language_loss(ids: torch.Tensor) -> Loss:
    """Mean cross-entropy of the next token."""
    return lambda model: model(input_ids=ids, labels=ids, use_cache=False).loss


# ---------------------------------------------------------------------------------------------------- timing


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds(function: Callable[[], object]) -> float:
    """How long a call takes, to the end of its work on the GPU."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def interleaved(
    makers: Mapping[str, Callable[[], Callable[[], object]]],
    rounds: int | Mapping[str, int],
    *,
    keep: bool = True,
    may_fail: Callable[[str], bool] = lambda name: False,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """
    Time several candidates in turn, in an order that reverses every round.

    Args:
        makers: For each candidate a function that sets it up, warms it up, and returns what is to be timed.
        rounds: How often to time each.
        keep: Set up once. Otherwise anew in each round, for when not all fit into memory at the same time.
        may_fail: Which candidates may raise an error, to be reported in the place of a time.

    Returns:
        All times by candidate, and the errors.
    """
    wanted = dict.fromkeys(makers, rounds) if isinstance(rounds, int) else rounds
    times: dict[str, list[float]] = {name: [] for name in makers}
    errors: dict[str, str] = {}
    ready: dict[str, Callable[[], object]] = {}
    for number in range(max(wanted.values())):
        for name in list(makers) if number % 2 == 0 else reversed(list(makers)):
            if number >= wanted[name] or name in errors:
                continue
            try:
                function = ready.pop(name, None) or makers[name]()
                times[name].append(seconds(function))
            except Exception as error:
                if not may_fail(name):
                    raise
                errors[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            else:
                print(f"  {name}: {times[name][-1]:.2f} s", file=sys.stderr, flush=True)
                if keep:
                    ready[name] = function
            function = None
            gc.collect()
            if torch.cuda.is_initialized() and not keep:
                torch.cuda.empty_cache()
    return times, errors


def ratios(times: Mapping[str, Sequence[float]], reference: str) -> dict[str, float]:
    """The median of each candidate over that of the reference; empty if there is no reference."""
    if not times.get(reference):
        return {}
    return {name: median(values) / median(times[reference]) for name, values in times.items() if values}


def reasons(errors: Mapping[str, str]) -> str:
    """A note for a table in which some candidates have no numbers."""
    return " ".join(f"{name} does not run: {error}." for name, error in errors.items())


def folding(counts: Mapping[str, tuple[int, int]]) -> str:
    """A note on which candidates folded how many of their layers."""
    return " ".join(f"{name} folded {some} of {total} weights." for name, (some, total) in counts.items() if total)


def typical(times: Sequence[float]) -> str:
    return f"{median(times):.3g} s"


def spread(times: Sequence[float]) -> str:
    return f"{min(times):.3g} to {max(times):.3g}"


# ---------------------------------------------------------------------------------------------------- results


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
        "peft_svf": peft_svf.__version__,
    }


class Record:
    """Prints tables and keeps them, with everything that was measured, in a JSON file."""

    def __init__(self, arguments: argparse.Namespace, doc: str | None) -> None:
        self.path = arguments.output
        words = [Path(sys.argv[0]).name, *sys.argv[1:]]
        if "--output" in words:
            del words[words.index("--output") : words.index("--output") + 2]
        claim = (doc or "").split("\n\n")[0].removeprefix("Claim: ").removeprefix("Question: ").replace("\n", " ")
        claim = claim[:1].upper() + claim[1:]
        self.content: dict[str, Any] = {
            "claim": claim,
            "command": "python benchmarks/" + " ".join(f'"{word}"' if " " in word else word for word in words),
            "machine": machine(arguments.device),
            "load_before": os.getloadavg()[0],
            "tables": [],
            "raw": {},
        }

    def table(
        self,
        title: str,
        header: Sequence[str],
        rows: Sequence[Sequence[str]],
        note: str = "",
        *,
        text_columns: int = 1,
    ) -> None:
        """Print a table, and keep it. The first `text_columns` columns are aligned to the left, the others to the
        right."""
        widths = [max(len(row[i]) for row in (header, *rows) if i < len(row)) for i in range(len(header))]
        print(f"\n{title}")
        for row in (header, *rows):
            cells = [
                cell.ljust(w) if i < text_columns else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=False))
            ]
            print("  ".join(cells).rstrip())
        if note:
            print(note)
        sys.stdout.flush()
        self.content["tables"].append({"title": title, "header": header, "rows": rows, "note": note})

    def raw(self, **values: Any) -> None:
        """Keep what was measured, by name."""
        self.content["raw"].update(values)

    def write(self) -> None:
        self.content["load_after"] = os.getloadavg()[0]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.content, indent=2, ensure_ascii=False) + "\n")
