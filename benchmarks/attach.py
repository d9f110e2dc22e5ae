"""Claim: attaching SVF costs a fraction of one SVD per weight the first time, and almost nothing afterwards.

    python benchmarks/attach.py [--model NAME] [--quick] [--output FILE]

In one process, interleaved: `get_peft_model` with an empty cache, with a warm cache, without a cache, and one
`torch.linalg.svd` per adapted weight. Prints medians and their ratios, and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import get_peft_model

from peft_svf import SVFConfig, SVFLayer, SVFRuntimeConfig
from peft_svf.spectral import clear_cache

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder (default: SmolLM2-135M-Instruct from the wheel)")
    parser.add_argument("--quick", action="store_true", help="one round instead of five")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/attach.json"))
    arguments = parser.parse_args()

    from smollm2 import load_model

    model, _ = load_model(arguments.model)
    weights = []

    def attach(**runtime: Any) -> float:
        nonlocal model, weights
        config = SVFConfig(target_modules="all-linear", runtime_config=SVFRuntimeConfig(**runtime))
        adapted: Any = None

        def run() -> None:
            nonlocal adapted
            adapted = get_peft_model(model, config)

        duration = seconds(run)
        weights = [m.get_base_layer().weight.detach() for m in adapted.modules() if isinstance(m, SVFLayer)]
        model = adapted.unload()
        return duration

    def svd_of_each() -> None:
        for weight in weights:
            torch.linalg.svd(weight, full_matrices=False)

    timings: dict[str, list[float]] = {"cold": [], "warm": [], "no cache": [], "torch.linalg.svd": []}
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(1 if arguments.quick else 5):
            clear_cache(cache)
            timings["cold"].append(attach(cache_dir=cache))
            timings["warm"].append(attach(cache_dir=cache))
            timings["no cache"].append(attach(use_cache=False))
            timings["torch.linalg.svd"].append(seconds(svd_of_each))

    reference = median(timings["torch.linalg.svd"])
    print(f"{len(weights)} weights, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    print(f"{'':18s}{'median':>9s}{'min':>8s}{'max':>8s}   times faster than the SVDs")
    for name, values in timings.items():
        print(
            f"{name:18s}{median(values):8.2f}s{min(values):7.2f}s{max(values):7.2f}s   {reference / median(values):.1f}"
        )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    record = {"weights": len(weights), "threads": torch.get_num_threads(), "load": os.getloadavg(), "seconds": timings}
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
