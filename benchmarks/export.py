"""Claim: exporting an expert as LoRA costs a twentieth of PEFT's conversion, and loses no more.

    python benchmarks/export.py [--rank N]

`to_lora` takes the largest terms of a change that is its own decomposition; PEFT's `convert_to_lora` decomposes it. In
one process, interleaved, on a shipped expert; and the error of both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common import Record, argument_parser, load_base, parse, ratios, seconds, spread, typical
from peft import PeftModel
from peft.tuners.lora.conversion import convert_to_lora

from peft_svf import SVFLayer
from peft_svf.interop import to_lora

EXPERT = Path(__file__).parents[1] / "examples" / "experts" / "sums"
OURS, THEIRS = "to_lora", "convert_to_lora of PEFT"


def main() -> None:
    parser = argument_parser(__doc__, rounds=3)
    parser.add_argument("--rank", type=int, default=16)
    arguments = parse(parser)
    record = Record(arguments, __doc__)
    model: Any = PeftModel.from_pretrained(load_base(arguments).model, str(EXPERT)).eval()
    made: dict[str, dict[str, torch.Tensor]] = {}

    def ours() -> None:
        made[OURS] = to_lora(model, rank=arguments.rank).state_dict

    def theirs() -> None:
        made[THEIRS] = convert_to_lora(model, rank=arguments.rank)[1]

    times: dict[str, list[float]] = {OURS: [], THEIRS: []}
    for _ in range(arguments.rounds):
        times[OURS].append(seconds(ours))
        times[THEIRS].append(seconds(theirs))
    relative = ratios(times, OURS)
    record.table(
        f"a shipped expert as LoRA of rank {arguments.rank}, {arguments.rounds} rounds",
        ["", "s", "spread", "times as long", "error of ΔW, relative"],
        [
            [name, typical(each), spread(each), f"{relative[name]:.1f}", f"{error(model, made[name]):.6f}"]
            for name, each in times.items()
        ],
    )
    record.raw(seconds=times)
    record.write()


@torch.no_grad()
def error(model: Any, tensors: dict[str, torch.Tensor]) -> float:
    """`‖ΔW - BA‖ / ‖ΔW‖`, over all modules."""
    lost = whole = 0.0
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, SVFLayer):
            change = layer.get_delta_weight("default").double()
            parts = {key.rpartition("lora_")[2][0]: value for key, value in tensors.items() if f".{name}.lora_" in key}
            lost += float((change - parts["B"].double() @ parts["A"].double()).square().sum())
            whole += float(change.square().sum())
    return (lost / whole) ** 0.5


if __name__ == "__main__":
    main()
