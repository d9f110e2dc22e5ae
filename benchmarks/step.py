"""Question: how long does a training step take, beside LoRA, other methods and the code released with the paper?

    python benchmarks/step.py [--part model | block] [--accumulate N] [--tokens T] [--methods NAME ...]

A step is forward and backward to everything that is trained, and an update of it, after which folded weights have to be
made anew: where SVF folds, its time holds one fold per step. `--part model` is a whole language model on 8 rows.
`--part block` is the seven linear layers of one transformer block (Llama-3-8B's, or that of the shape `--model` names)
with neither attention nor output layer. `--accumulate N` does N micro-batches of T tokens per update.

`svf` chooses by itself between gate and fold, `svf gate` never folds, `svf r=k/8` adapts an eighth of the hidden size.
`full` trains the same linear layers in full. `released` is the way of the code released with the paper. The block has
random weights, and orthonormal matrices in the place of their singular vectors, which take the same time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import (
    LORA,
    METHODS,
    SHAPES,
    Base,
    Loss,
    Record,
    adapt,
    argument_parser,
    folded,
    folding,
    interleaved,
    is_ours,
    language_loss,
    load_base,
    parse,
    random_ids,
    ratios,
    reasons,
    spread,
    training_step,
    typical,
)
from torch import nn
from torch.nn.functional import silu

# timed in every round; the others once, or twice from four rounds on
MAIN = ("svf", "svf gate", LORA)


class Block(nn.Module):
    """The linear layers of a Llama block with something cheap in the place of attention: `[..., h]` → `[..., h]`."""

    def __init__(self, hidden: int, intermediate: int, key_value: int) -> None:
        super().__init__()
        self.hidden_size = hidden
        shapes = {
            "q_proj": (hidden, hidden),
            "k_proj": (hidden, key_value),
            "v_proj": (hidden, key_value),
            "o_proj": (hidden, hidden),
            "gate_proj": (hidden, intermediate),
            "up_proj": (hidden, intermediate),
            "down_proj": (intermediate, hidden),
        }
        for name, (inputs, outputs) in shapes.items():
            layer = nn.Linear(inputs, outputs, bias=False)
            nn.init.normal_(layer.weight, std=0.02)
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        key_value = self.k_proj(x) + self.v_proj(x)
        x = x + self.o_proj(self.q_proj(x) + key_value.repeat(1, 1, self.hidden_size // key_value.shape[-1]))
        return x + self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


def block_base(arguments: argparse.Namespace) -> Base:
    name = arguments.model if arguments.model in SHAPES else "llama-3-8b"
    config: Any = SHAPES[name]
    part = 4 if arguments.quick else 1
    key_value = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    with torch.device(arguments.device):
        block = Block(config.hidden_size // part, config.intermediate_size // part, key_value // part)
    block.to(arguments.dtype).requires_grad_(False)
    label = f"block of {name}" + (", a quarter of its size" if part > 1 else "")
    return Base(block, f"{label}, {str(arguments.dtype).removeprefix('torch.')}", random=True)


def block_loss(base: Base, tokens: int) -> Loss:
    """A scalar whose gradient at the block's output is a given one, and that reaches the block's input, too."""
    x, upstream = torch.randn(2, 1, tokens, base.hidden_size, device=base.device).to(next(base.model.parameters()))
    x.requires_grad_(True)

    def loss(model: nn.Module) -> torch.Tensor:
        x.grad = None
        return (model(x) * upstream).sum()

    return loss


def measure(
    record: Record, arguments: argparse.Namespace, base: Base, loss: Loss, warm_up: Loss, title: str, key: str
) -> None:
    trainable: dict[str, int] = {}
    counts: dict[str, tuple[int, int]] = {}

    def make(method: str) -> Callable[[], None]:
        adapted = adapt(base, method)
        trainable[method] = sum(parameter.numel() for parameter in adapted.trainable)
        # SVF decides whether to fold by what the step before was like
        decides = is_ours(method) and method != "svf gate"
        training_step(adapted, [loss] * arguments.accumulate if decides else [warm_up])

        def step() -> None:
            training_step(adapted, [loss] * arguments.accumulate)
            counts[method] = folded(adapted.model)

        return step

    few = 1 + (arguments.rounds > 3)
    times, errors = interleaved(
        {method: partial(make, method) for method in arguments.methods},
        {method: arguments.rounds if method in MAIN else min(few, arguments.rounds) for method in arguments.methods},
        keep=arguments.device == "cpu",
        may_fail=lambda method: not is_ours(method),
    )
    relative = ratios(times, LORA)
    rows = []
    for method, values in times.items():
        if method in errors:
            rows.append([method, "does not run"])
            continue
        rows.append(
            [
                method,
                f"{relative.get(method, float('nan')):.2f}",
                typical(values),
                spread(values),
                str(len(values)),
                f"{trainable[method]:,}",
            ]
        )
    header = ["", f"times {LORA}", "median", "range", "timed", "trained numbers"]
    record.table(title, header, rows, " ".join(filter(None, [folding(counts), reasons(errors)])))
    found = {"seconds": times, "ratios": relative, "errors": errors, "trainable": trainable, "folded": counts}
    record.raw(**{key: found})


def main() -> None:
    parser = argument_parser(__doc__, rounds=3)
    parser.add_argument("--part", choices=["model", "block"], help="default: both")
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="micro-batches per update (default: 1)")
    parser.add_argument("--tokens", type=int, metavar="T", help="tokens per (micro-)batch (default: 2048; quick: 256)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="NAME", help="default: all")
    arguments = parse(parser)
    tokens = arguments.tokens or (256 if arguments.quick else 2048)
    times = f"{arguments.accumulate} × " if arguments.accumulate > 1 else ""
    record = Record(arguments, __doc__)

    if arguments.part != "block":
        base = load_base(arguments)
        batch, first = random_ids(base, 8, tokens // 8), random_ids(base, 1, tokens // 8)
        title = f"Training step, {base.label}, {times}8 rows of {tokens // 8} tokens"
        measure(record, arguments, base, language_loss(batch), language_loss(first), title, "model")
    if arguments.part != "model":
        base = block_base(arguments)
        title = f"Training step, {base.label}, {times}{tokens} tokens"
        measure(record, arguments, base, block_loss(base, tokens), block_loss(base, tokens // 8), title, "block")
    record.write()


if __name__ == "__main__":
    main()
