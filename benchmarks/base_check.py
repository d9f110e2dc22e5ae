"""Claim: the fingerprint accepts a base model in another precision and refuses other weights.

    python benchmarks/base_check.py [--model NAME] [--quick]

For every adapted weight, the fingerprint of a changed copy is compared with that of the original: casts, simulated
quantization, and small noise as after further training. Reported: the largest difference in any of the four numbers, in
units of the tolerance (above 1 is a mismatch), the share of weights that mismatch, and how wrong ΔW becomes for a
random expert when the changed copy's basis is used, which is what a mismatch costs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import Record, argument_parser, linear_layers, load_base, median, parse

from peft_svf.spectral import delta_weight, fingerprint, singular_basis
from peft_svf.spectral.fingerprint import tolerances


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
    arguments = parse(argument_parser(__doc__, rounds=1))
    record = Record(arguments, __doc__)
    base = load_base(arguments)
    weights = [layer.weight.detach() for layer in linear_layers(base.model)][:: 10 if arguments.quick else 1]
    measured = {}
    for name, change in CHANGES.items():
        differences, errors = [], []
        for weight in weights:
            original, changed = singular_basis(weight), singular_basis(change(weight))
            want, have = fingerprint(original.spectrum), fingerprint(changed.spectrum)
            allowed = tolerances(want, tuple(weight.shape))
            differences.append(max(abs(a - b) / t for a, b, t in zip(want, have, allowed, strict=True)))
            delta = torch.randn(len(original.spectrum), device=weight.device) * 0.1
            right = delta_weight(weight, original.vectors, delta)
            errors.append(float((delta_weight(weight, changed.vectors, delta) - right).norm() / right.norm()))
        measured[name] = {
            "median": median(differences),
            "max": max(differences),
            "mismatch": sum(difference > 1 for difference in differences) / len(differences),
            "dW": median(errors),
        }
    rows = [
        [name, f"{found['median']:.2f}", f"{found['max']:.2f}", f"{found['mismatch']:.0%}", f"{found['dW']:.1%}"]
        for name, found in measured.items()
    ]
    header = ["", "difference / tolerance, median", "largest", "weights that mismatch", "ΔW wrong by (median)"]
    record.table(f"Fingerprints of {len(weights)} weights of {base.label}", header, rows)
    record.raw(changes=measured)
    record.write()


if __name__ == "__main__":
    main()
