"""Claim: what SVF needs beyond LoRA's memory is its singular bases, and one more copy of the weights where it folds.

    python benchmarks/memory.py [--methods NAME ...]

The peak of one training step on 8 rows of 256 tokens, each method in a process of its own: what it needs beyond the
loaded base model, its weights beside the base model's included. On a GPU that is allocated memory, on the CPU the
resident set of the process. SVF does one step before, by which it decides whether to fold. The parts, counted: frozen
tensors beside the base model, folded weights, gradients, and what autograd keeps for backward, parameters and folded
weights not counted. AdamW adds 8 bytes for each trained number in fp32.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from common import (
    LORA,
    METHODS,
    Record,
    adapt,
    argument_parser,
    is_ours,
    language_loss,
    load_base,
    parse,
    random_ids,
    reasons,
    training_step,
)
from torch import nn

from peft_svf import SVFLayer


def status(key: str) -> int:
    """Bytes, from `/proc/self/status`."""
    found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def tidy(device: str) -> None:
    """Give freed memory back to the system, where it no longer counts."""
    gc.collect()
    if device == "cpu":
        ctypes.CDLL(None).malloc_trim(0)


def used_now(device: str) -> int:
    tidy(device)
    return torch.cuda.memory_allocated() if device == "cuda" else status("VmRSS")


def reset_peak(device: str) -> None:
    tidy(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to the present size


def peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else status("VmHWM")


def storages(tensors: Iterable[torch.Tensor | None]) -> dict[int, int]:
    """Address and bytes of every different storage."""
    present = (tensor.untyped_storage() for tensor in tensors if tensor is not None)
    return {storage.data_ptr(): storage.nbytes() for storage in present}


def folded_weights(model: nn.Module) -> list[torch.Tensor | None]:
    return [module.fold.weight for module in model.modules() if isinstance(module, SVFLayer)]


def measure(arguments: argparse.Namespace, method: str, tokens: int) -> dict[str, int]:
    """The memory of one training step in this process, in bytes."""
    base = load_base(arguments)
    loss, device = language_loss(random_ids(base, 8, tokens // 8)), arguments.device
    with torch.no_grad():
        loss(base.model)  # or pages of the weights' file are counted when they are first read
    before = used_now(device)
    weights = storages([*base.model.parameters(), *base.model.buffers()])

    adapted = adapt(base, method, base.model)
    model = adapted.model
    if is_ours(method):
        training_step(adapted, [loss])

    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.update(storages([tensor]))
        return tensor

    reset_peak(device)
    adapted.before_forward()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = adapted.loss(loss)
    folded = storages(folded_weights(model))
    value.backward()
    gradients = sum(storages(parameter.grad for parameter in model.parameters()).values())
    adapted.after_backward()
    adapted.update()

    trained = storages(adapted.trainable)
    tensors = storages([*model.parameters(), *model.buffers()])
    frozen = {address: size for address, size in tensors.items() if address not in weights and address not in trained}
    return {
        "peak": peak(device) - before,
        "frozen": sum(frozen.values()),
        "folded": sum(folded.values()),
        "gradients": gradients,
        "kept": sum(size for address, size in kept.items() if address not in tensors and address not in folded),
        "trainable": sum(parameter.numel() for parameter in adapted.trainable),
    }


def main() -> None:
    parser = argument_parser(__doc__, rounds=1)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="NAME", help="default: all")
    parser.add_argument("--here", choices=METHODS, help=argparse.SUPPRESS)  # the process of one method
    arguments = parse(parser)
    tokens = 256 if arguments.quick else 2048
    if arguments.here:
        print(json.dumps(measure(arguments, arguments.here, tokens)))
        return

    record = Record(arguments, __doc__)
    results: dict[str, Any] = {}
    errors: dict[str, str] = {}
    options = [word for word in sys.argv[1:] if word not in ("--methods", *METHODS)]
    for method in arguments.methods:
        command = [sys.executable, sys.argv[0], *options, "--here", method]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode == 0:
            results[method] = json.loads(process.stdout.splitlines()[-1])
        elif is_ours(method):
            sys.exit(process.stderr)
        else:
            errors[method] = process.stderr.strip().splitlines()[-1] if process.stderr.strip() else "killed"
        print(f"  {method}", file=sys.stderr, flush=True)

    columns = ("frozen", "folded", "gradients", "kept")
    rows = []
    for method in arguments.methods:
        if method in errors:
            rows.append([method, "does not run"])
            continue
        found = results[method]
        relative = found["peak"] / results[LORA]["peak"] if LORA in results else float("nan")
        cells = [f"{found[key] / 2**20:,.0f}" for key in ("peak", *columns)]
        rows.append([method, f"{relative:.2f}", *cells, f"{found['trainable']:,}"])
    base = load_base(arguments)
    header = ["", f"peak, times {LORA}", "peak", "frozen tensors", "folded weights", "gradients", "kept for backward"]
    title = f"Memory of a training step in MiB, {base.label}, 8 rows of {tokens // 8} tokens"
    record.table(title, [*header, "trained numbers"], rows, reasons(errors))
    record.raw(bytes=results, errors=errors)
    record.write()


if __name__ == "__main__":
    main()
