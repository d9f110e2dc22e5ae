"""Claim: one `generate` serves rows of different experts, and of different mixtures of them, at the price of one batch.

    python benchmarks/mixed_rows.py [--experts N] [--new-tokens N]

Eight experts, one prompt of 40 random tokens for each, 64 new tokens, interleaved: all in one `generate` with
`adapter_names`, with mixture weights per row (`row_mixture`), and in eight calls with `set_adapter`. The same with LoRA
r=16, which has no mixtures per row. The base model on the same batch is the floor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import (
    LORA,
    Record,
    adapt,
    argument_parser,
    as_trained,
    interleaved,
    load_base,
    parse,
    peft_config,
    random_ids,
    ratios,
    spread,
    typical,
)
from rollout import PROMPT_TOKENS

BASE = "base, one batch"


def main() -> None:
    parser = argument_parser(__doc__, rounds=3)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, help="default: 64; quick: 8")
    arguments = parse(parser)
    new_tokens = arguments.new_tokens or (8 if arguments.quick else 64)
    record = Record(arguments, __doc__)
    base = load_base(arguments)
    ids = random_ids(base, arguments.experts, PROMPT_TOKENS)
    names = ["default", *(f"expert{i}" for i in range(1, arguments.experts))]

    def generate(model: Any, rows: torch.Tensor, length: int = new_tokens, **kwargs: Any) -> None:
        model.generate(
            input_ids=rows,
            attention_mask=torch.ones_like(rows),
            do_sample=False,
            min_new_tokens=length,
            max_new_tokens=length,
            pad_token_id=0,
            **kwargs,
        )

    def with_experts(method: str) -> Any:
        model: Any = adapt(base, method).model
        for name in names[1:]:
            model.add_adapter(name, peft_config(method, base))
        as_trained(model)
        return model.eval()

    svf, lora = with_experts("svf"), with_experts(LORA)
    weights = torch.rand(arguments.experts, len(names), device=base.device).softmax(-1)

    def one_by_one(model: Any, length: int = new_tokens) -> None:
        for name, row in zip(names, ids.split(1), strict=True):
            model.set_adapter(name)
            generate(model, row, length)

    def mixtures(length: int = new_tokens) -> None:
        with svf.base_model.row_mixture(weights):
            generate(svf, ids, length)

    candidates: dict[str, Callable[..., None]] = {
        BASE: partial(generate, base.model, ids),
        "svf, one batch": partial(generate, svf, ids, adapter_names=names),
        "svf, a mixture per row": mixtures,
        "svf, one by one": partial(one_by_one, svf),
        "lora, one batch": partial(generate, lora, ids, adapter_names=names),
        "lora, one by one": partial(one_by_one, lora),
    }

    def make(name: str) -> Callable[[], None]:
        candidates[name](length=2)
        return candidates[name]

    times, _ = interleaved({name: partial(make, name) for name in candidates}, arguments.rounds)
    alone = ratios(times, "svf, one by one"), ratios(times, "lora, one by one")
    floor = ratios(times, BASE)
    rows = [
        [
            name,
            f"{floor[name]:.2f}",
            "" if name == BASE else f"{1 / alone[name.startswith('lora')][name]:.1f}",
            typical(times[name]),
            spread(times[name]),
        ]
        for name in candidates
    ]
    title = f"{len(names)} experts, {base.label}, {new_tokens} new tokens each, {arguments.rounds} rounds"
    record.table(title, ["", "times base", "times faster than one by one", "median", "range"], rows)
    record.raw(seconds=times, ratios=floor)
    record.write()


if __name__ == "__main__":
    main()
