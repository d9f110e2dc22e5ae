"""Claim: a folded expert runs at the speed of the base model, in small batches and in mixed batches of one expert, too.

    python benchmarks/small_batches.py

SmolLM2's shape with random weights, one thread, processor time. The candidates take turns call by call.
`by name` passes the expert of each row (`adapter_names`), as dispatched prompts do. `svf gate` never folds.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from common import Record, adapt, argument_parser, load_base, parse, random_ids, ratios

SIZES = ((8, 32), (1, 32), (8, 1), (1, 1))


@torch.no_grad()
def main() -> None:
    parser = argument_parser(__doc__, rounds=9)
    parser.set_defaults(model="smollm2-135m")
    arguments = parse(parser)
    torch.set_num_threads(1)
    record = Record(arguments, __doc__)
    base = load_base(arguments)
    folding: Any = adapt(base, "svf").model.eval()
    for config in folding.peft_config.values():
        config.runtime_config.fold = "always"
    gate: Any = adapt(base, "svf gate").model.eval()
    candidates: dict[str, tuple[Any, bool]] = {
        "base": (base.model.eval(), False),
        "svf folded": (folding, False),
        "svf folded, by name": (folding, True),
        "svf gate": (gate, False),
    }
    found: dict[str, dict[str, list[float]]] = {}
    for rows, length in SIZES:
        ids = random_ids(base, rows, length)
        times: dict[str, list[float]] = {name: [] for name in candidates}
        for round_number in range(-1, arguments.rounds):
            for name in candidates if round_number % 2 else reversed(candidates):
                model, by_name = candidates[name]
                options = {"adapter_names": ["default"] * rows} if by_name else {}
                start = time.process_time()
                model(input_ids=ids, logits_to_keep=1, use_cache=False, **options)
                if round_number >= 0:
                    times[name].append(time.process_time() - start)
        found[f"{rows} × {length}"] = times
    slower = {size: ratios(times, "base") for size, times in found.items()}
    rows_of_table = [[name, *(f"{1 / slower[size][name]:.2f}" for size in found)] for name in candidates]
    base_ms = ", ".join(f"{size}: {median(times['base']) * 1000:.0f} ms" for size, times in found.items())
    title = f"Speed of a forward relative to the base model, {base.label}, one thread, rows × tokens"
    record.table(title, ["", *found], rows_of_table, f"The base model takes {base_ms}.")
    record.raw(seconds=found)
    record.write()


if __name__ == "__main__":
    main()
