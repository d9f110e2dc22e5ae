"""Claim: text is generated with an SVF expert at nearly the speed of the base model, without merging it.

    python benchmarks/rollout.py [--prompts N] [--new-tokens N]

transformers' greedy `generate`, interleaved: 64 prompts of 40 random tokens, 64 new tokens each. The whole rollout is
timed with δ changed just before, so that the time holds one fold of every weight, as after an optimizer step. A decode
step is the time between two tokens in the second half of the same rollouts, when whatever is folded has been folded.
`svf` chooses by itself between gate and fold, `svf gate` never folds; `svf merged` was merged beforehand.
"""

from __future__ import annotations

import time
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
    folded,
    folding,
    interleaved,
    load_base,
    median,
    parse,
    random_ids,
    ratios,
    spread,
    synchronize,
)
from transformers import LogitsProcessor

PROMPT_TOKENS = 40


class Clock(LogitsProcessor):
    """Notes the time of every token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        synchronize()
        self.times.append(time.perf_counter())
        return scores


def generate(model: Any, ids: torch.Tensor, new_tokens: int, clock: Clock | None = None) -> None:
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=0,
        logits_processor=[clock] if clock else None,
    )


def main() -> None:
    parser = argument_parser(__doc__, rounds=2)
    parser.add_argument("--prompts", type=int, help="default: 64; quick: 4")
    parser.add_argument("--new-tokens", type=int, help="default: 64; quick: 8")
    arguments = parse(parser)
    prompts = arguments.prompts or (4 if arguments.quick else 64)
    new_tokens = arguments.new_tokens or (8 if arguments.quick else 64)
    record = Record(arguments, __doc__)
    base = load_base(arguments)
    ids = random_ids(base, prompts, PROMPT_TOKENS)
    steps: dict[str, list[float]] = {}
    counts: dict[str, tuple[int, int]] = {}

    def rollout(name: str, model: Any) -> None:
        clock = Clock()
        as_trained(model)
        generate(model, ids, new_tokens, clock)
        between = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
        counts[name] = folded(model)
        steps.setdefault(name, []).extend(between[len(between) // 2 :])

    def make(name: str) -> Callable[[], None]:
        if name == "base":
            model: Any = base.model
        elif name == "svf merged":
            model = adapt(base, "svf", base.copy(own_weights=True)).model.merge_and_unload()
        else:
            model = adapt(base, name).model
        model.eval()
        generate(model, ids, 2)
        return partial(rollout, name, model)

    names = ["base", "svf", "svf gate", LORA, "svf merged"]
    times, _ = interleaved(
        {name: partial(make, name) for name in names}, arguments.rounds, keep=arguments.device == "cpu"
    )
    whole, step = ratios(times, "base"), ratios(steps, "base")
    rows = [
        [
            name,
            f"{1 / whole[name]:.2f}",
            f"{prompts * new_tokens / median(times[name]):.0f}",
            spread(times[name]),
            f"{step[name]:.2f}",
            f"{median(steps[name]) * 1000:.1f}",
        ]
        for name in names
    ]
    title = f"Generation, {base.label}, {prompts} × {new_tokens} new tokens, {arguments.rounds} rounds"
    header = ["", "speed, times base", "tokens/s", "seconds", "decode step, times base", "decode step, ms"]
    record.table(title, header, rows, folding(counts))
    record.raw(seconds=times, ratios=whole, decode_step_seconds=steps, decode_step_ratios=step, folded=counts)
    record.write()


if __name__ == "__main__":
    main()
