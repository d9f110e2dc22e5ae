"""Claim: the fingerprint accepts a base model in another precision and refuses other weights.

    python benchmarks/base_check.py [--model NAME] [--output FILE]

For every adapted weight, the fingerprint of a changed copy is compared with that of the original: casts, simulated
quantization, and small noise as after further training. Reported: the largest difference in any of the four numbers, in
units of the tolerance (above 1 is a mismatch), the share of weights that mismatch, and how wrong ΔW becomes for a
random expert when the changed copy's basis is used, which is what a mismatch costs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from peft_svf.spectral import delta_weight, fingerprint, singular_basis
from peft_svf.spectral.fingerprint import tolerances

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))


def round_to_bits(bits: int, group: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Symmetric round-to-nearest with one scale per group of `group` weights along the input."""

    def quantize(weight: torch.Tensor) -> torch.Tensor:
        grouped = weight.reshape(weight.shape[0], -1, group)
        scale = grouped.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        return ((grouped / scale).round() * scale).reshape(weight.shape)

    return quantize


def noise(relative: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Independent noise of this root mean square relative to the weight's."""
    return lambda weight: weight + torch.randn_like(weight) * weight.square().mean().sqrt() * relative


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "fp16": lambda weight: weight.half().float(),
    "bf16": lambda weight: weight.bfloat16().float(),
    "int8, groups of 64": round_to_bits(8, 64),
    "int4, groups of 32": round_to_bits(4, 32),
    "noise 1 %": noise(0.01),
    "noise 3 %": noise(0.03),
    "noise 10 %": noise(0.1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder (default: SmolLM2-135M-Instruct from the wheel)")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/base_check.json"))
    parser.add_argument("--quick", action="store_true", help="every tenth weight")
    arguments = parser.parse_args()

    from smollm2 import load_model

    model, _ = load_model(arguments.model)
    torch.manual_seed(0)
    linears = [
        m.weight.detach() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "head" not in n
    ]
    linears = linears[:: 10 if arguments.quick else 1]
    record = {}
    print(f"{len(linears)} weights{'':12s}difference/tolerance: median    max   mismatch   ΔW wrong by (median)")
    for name, change in CHANGES.items():
        differences, errors = [], []
        for weight in linears:
            original, changed = singular_basis(weight), singular_basis(change(weight))
            want, have = fingerprint(original.spectrum), fingerprint(changed.spectrum)
            allowed = tolerances(want, tuple(weight.shape))
            differences.append(max(abs(a - b) / t for a, b, t in zip(want, have, allowed, strict=True)))
            delta = torch.randn(len(original.spectrum)) * 0.1
            right = delta_weight(weight, original.vectors, delta)
            errors.append(float((delta_weight(weight, changed.vectors, delta) - right).norm() / right.norm()))
        mismatch = sum(difference > 1 for difference in differences) / len(differences)
        record[name] = {
            "median": median(differences),
            "max": max(differences),
            "mismatch": mismatch,
            "dW": median(errors),
        }
        print(
            f"{name:24s}{median(differences):25.3f}{max(differences):8.2f}{mismatch:10.0%}{median(errors):16.1%}",
            flush=True,
        )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
