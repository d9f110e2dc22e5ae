"""Claim: attaching SVF costs a fraction of one SVD per weight the first time, and almost nothing afterwards.

    python benchmarks/attach.py [--model NAME]

In one process, interleaved: `get_peft_model` with an empty cache, with a warm cache, without a cache, and one
`torch.linalg.svd` per adapted weight.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from common import Record, argument_parser, load_base, parse, ratios, seconds, spread, typical
from peft import get_peft_model

from peft_svf import SVFConfig, SVFLayer, SVFRuntimeConfig
from peft_svf.spectral import clear_cache

SVDS = "one torch.linalg.svd per weight"


def main() -> None:
    arguments = parse(argument_parser(__doc__, rounds=3))
    record = Record(arguments, __doc__)
    base = load_base(arguments)
    model: Any = base.model
    weights: list[torch.Tensor] = []

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
            torch.linalg.svd(weight.float(), full_matrices=False)

    times: dict[str, list[float]] = {"empty cache": [], "warm cache": [], "without a cache": [], SVDS: []}
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(arguments.rounds):
            clear_cache(cache)
            times["empty cache"].append(attach(cache_dir=cache))
            times["warm cache"].append(attach(cache_dir=cache))
            times["without a cache"].append(attach(use_cache=False))
            times[SVDS].append(seconds(svd_of_each))

    relative = ratios(times, SVDS)
    rows = [[name, f"{1 / relative[name]:.1f}", typical(values), spread(values)] for name, values in times.items()]
    title = f"Attaching to {base.label}, {len(weights)} weights, {arguments.rounds} rounds"
    record.table(title, ["", "times faster than the SVDs", "median", "range"], rows)
    record.raw(seconds=times, ratios=relative, weights=len(weights))
    record.write()


if __name__ == "__main__":
    main()
