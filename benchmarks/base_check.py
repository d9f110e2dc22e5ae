"""Claim: the base check accepts a base model in another precision and refuses other weights.

    python benchmarks/base_check.py [--model NAME] [--quick]

The weights of a model, and of random models of several kinds, are compared with changed copies: casts, simulated
quantization, and small noise as after further training. Reported: how wrong ΔW becomes for a random expert when the
changed copy's basis is used, the estimate of that from the recorded samples, and how many weights the check refuses. A
model is refused if one of its weights is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from common import Record, argument_parser, linear_layers, load_base, median, parse

from peft_svf.spectral import delta_weight, fingerprint, singular_basis
from peft_svf.spectral.fingerprint import fingerprint_differences, sample_difference


def round_to_bits(bits: int, group: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Symmetric round-to-nearest with one scale per group of `group` weights along the input."""

    def quantize(weight: torch.Tensor) -> torch.Tensor:
        grouped = weight.reshape(weight.shape[0], -1, group)
        scale = grouped.abs().amax(-1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
        return ((grouped / scale).round() * scale).reshape(weight.shape)

    return quantize


def noise(relative: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Independent noise of this root mean square relative to the weight's."""
    return lambda weight: weight + torch.randn_like(weight) * weight.square().mean().sqrt() * relative


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "fp16": lambda weight: weight.half(),
    "bf16": lambda weight: weight.bfloat16(),
    "int8, groups of 32": round_to_bits(8, 32),
    "int4, groups of 32": round_to_bits(4, 32),
    "noise 0.1 %": noise(0.001),
    "noise 1 %": noise(0.01),
    "noise 1 %, one weight": noise(0.01),
    "noise 10 %": noise(0.1),
}


def orthogonal(out_features: int, in_features: int) -> torch.Tensor:
    return torch.nn.init.orthogonal_(torch.empty(out_features, in_features))


def decaying(out_features: int, in_features: int) -> torch.Tensor:
    """Singular values i^-1/2."""
    k = min(out_features, in_features)
    left, right = orthogonal(out_features, k), orthogonal(k, in_features)
    return left * torch.arange(1.0, k + 1).rsqrt() @ right


KINDS: dict[str, Callable[[int, int], torch.Tensor]] = {
    "gaussian": lambda m, n: torch.randn(m, n) / n**0.5,
    "heavy-tailed": lambda m, n: torch.randn(m, n) / torch.randn(m, n).abs().clamp(min=0.05),
    "low rank and noise": lambda m, n: torch.randn(m, 8) @ torch.randn(8, n) / n + 0.01 * torch.randn(m, n) / n**0.5,
    "decaying": decaying,
    "pruned": lambda m, n: torch.randn(m, n) * (torch.rand(m, n) > 0.6) * (torch.rand(m, 1) > 0.3),
    "orthogonal": orthogonal,
    "orthogonal + 0.1 %": lambda m, n: orthogonal(m, n) + 1e-3 * torch.randn(m, n) / max(m, n) ** 0.5,
}
SHAPES = ((64, 64), (64, 192), (256, 128), (256, 256))


def measure(weights: Mapping[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Return, for each change, the medians of the error of ΔW and of its estimate, and the refused fraction."""
    bases = {name: singular_basis(weight) for name, weight in weights.items()}
    measured = {}
    for change, changed in CHANGES.items():
        pairs, errors, estimates = {}, [], []
        for number, (name, weight) in enumerate(weights.items()):
            original = bases[name]
            copy = weight if "one weight" in change and number != len(weights) // 2 else changed(weight)
            basis = original if copy is weight else singular_basis(copy)
            recorded = fingerprint(original.spectrum, original.vectors)
            found = fingerprint(basis.spectrum, basis.vectors)
            pairs[name] = (recorded, found, (weight.shape[0], weight.shape[1]))
            if basis is original:
                continue
            delta = torch.randn(len(original.spectrum), device=weight.device)
            right = delta_weight(weight, original.vectors, delta)
            wrong = delta_weight(copy.float(), basis.vectors.float(), delta)
            errors.append(float((wrong - right).norm() / right.norm()))
            estimates.append(sample_difference(recorded, found) or 0.0)
        refused = len(fingerprint_differences(pairs)) / len(errors)
        measured[change] = {"error": median(errors), "estimate": median(estimates), "refused": refused}
    return measured


def main() -> None:
    arguments = parse(argument_parser(__doc__, rounds=1))
    record = Record(arguments, __doc__)
    base = load_base(arguments)
    layers = linear_layers(base.model)[:: 10 if arguments.quick else 2]
    models = {base.label: {str(number): layer.weight.detach().float() for number, layer in enumerate(layers)}}
    for kind, draw in KINDS.items():
        for shape in SHAPES[: 1 if arguments.quick else None]:
            label = f"{kind}, {shape[0]} × {shape[1]}"
            models[label] = {str(number): draw(*shape) for number in range(24)}
    measured = {label: measure(weights) for label, weights in models.items()}
    rows = [
        [label, change, f"{found['error']:.1%}", f"{found['estimate']:.1%}", f"{found['refused']:.0%}"]
        for label, changes in measured.items()
        for change, found in changes.items()
    ]
    header = ["weights", "change", "ΔW wrong by (median)", "estimated (median)", "weights refused"]
    record.table("The base check", header, rows, text_columns=2)
    record.raw(models=measured)
    record.write()


if __name__ == "__main__":
    main()
