"""Size of experts and of singular bases for models of different size, from the shapes of their weights.

    python benchmarks/sizes.py    # writes docs/results/sizes.md

Nothing is measured or downloaded: a weight of k = min(out, in) has k numbers in an expert, and a basis of k × k.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "results" / "sizes.md"
RANK = 16  # of the LoRA adapter beside it


@dataclass(frozen=True)
class Decoder:
    """Sizes of a model with the layers of Llama and Qwen2, as in the `config.json` of its checkpoint."""

    hidden: int
    intermediate: int
    layers: int
    key_value: int  # num_key_value_heads × head_dim

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """`[out, in]` of all linear layers but the output layer."""
        h, i, kv = self.hidden, self.intermediate, self.key_value
        return [(h, h), (kv, h), (kv, h), (h, h), (i, h), (i, h), (h, i)] * self.layers


MODELS = {
    "SmolLM2-135M": Decoder(576, 1536, 30, 192),
    "Qwen2.5-0.5B": Decoder(896, 4864, 24, 128),
    "Llama-3.2-1B": Decoder(2048, 8192, 16, 512),
    "Qwen2.5-7B": Decoder(3584, 18944, 28, 512),
    "Llama-3-8B": Decoder(4096, 14336, 32, 1024),
    "Llama-3-70B": Decoder(8192, 28672, 80, 1024),
}


def parameters(shapes: list[tuple[int, int]]) -> int:
    """Return the trainable parameters of an expert."""
    return sum(min(shape) for shape in shapes)


def basis_numbers(shapes: list[tuple[int, int]]) -> int:
    """Return how many numbers the singular bases hold."""
    return sum(min(shape) ** 2 for shape in shapes)


def _size(count: float) -> str:
    for unit in ("kB", "MB"):
        count /= 1000
        if count < 1000:
            return f"{count:.1f} {unit}" if count < 10 else f"{count:.0f} {unit}"
    return f"{count / 1000:.1f} GB"


def page() -> str:
    """Return the page."""
    smallest = sum(min(shape) ** 3 for shape in MODELS["SmolLM2-135M"].shapes)
    rows = []
    for name, model in MODELS.items():
        shapes = model.shapes
        lora = sum(RANK * sum(shape) for shape in shapes)
        work = sum(min(shape) ** 3 for shape in shapes) / smallest
        cells = [
            name,
            f"{parameters(shapes):,}",
            _size(4 * parameters(shapes)),
            _size(4 * lora),
            _size(2 * basis_numbers(shapes)),
            _size(2 * sum(out * inside for out, inside in shapes)),
            f"{work:,.0f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [
            "# Sizes of experts and singular bases",
            "",
            "Written by `benchmarks/sizes.py` from the shapes of the weights; do not edit. Nothing here is measured.",
            "All linear layers except the output layer, full `r`. 1 MB is a million bytes.",
            "",
            f"| model | parameters of an expert | expert in fp32 | LoRA r={RANK} in fp32 | singular bases in bf16 "
            "| folded weights in bf16 | work of the decomposition |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            "- *Singular bases* are in memory once, for all experts of a model. In fp32 they take twice as much.",
            '- *Folded weights* are in memory while layers are folded. `fold="never"` needs none.',
            "- *Work* is the sum of k³ over the weights, relative to SmolLM2-135M.",
            "",
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(page())
