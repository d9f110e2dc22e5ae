"""Claim: text is generated with an SVF expert at nearly the speed of the base model, without merging it.

    python benchmarks/rollout.py [--prompts N] [--new-tokens N]

transformers' greedy `generate`, interleaved: 64 prompts of 40 random tokens, 64 new tokens each. The whole rollout is
timed with δ changed just before, so that the time holds one fold of every weight, as after an optimizer step. Decode
steps are timed afterwards, when everything is folded, the models taking turns token by token.
`svf` chooses by itself between gate and fold, `svf gate` never folds; `svf merged` was merged beforehand.
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
    folded,
    folding,
    interleaved,
    load_base,
    median,
    parse,
    random_ids,
    ratios,
    seconds,
    spread,
)

PROMPT_TOKENS = 40


DECODE_STEPS = 24


def generate(model: Any, ids: torch.Tensor, new_tokens: int) -> None:
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=0,
    )


@torch.no_grad()
def decode_seconds(models: dict[str, Any], ids: torch.Tensor) -> dict[str, list[float]]:
    """Times of single decode steps after the same prompts."""
    states = {
        name: (model(input_ids=ids, use_cache=True).past_key_values, ids[:, -1:]) for name, model in models.items()
    }

    def step(name: str) -> None:
        cache, tokens = states[name]
        output = models[name](input_ids=tokens, past_key_values=cache, use_cache=True)
        states[name] = output.past_key_values, output.logits[:, -1:].argmax(-1)

    for name in models:
        step(name)
    times: dict[str, list[float]] = {name: [] for name in models}
    for number in range(DECODE_STEPS):
        for name in list(models) if number % 2 else reversed(list(models)):
            times[name].append(seconds(partial(step, name)))
    return times


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
    models: dict[str, Any] = {}
    counts: dict[str, tuple[int, int]] = {}

    def rollout(name: str) -> None:
        as_trained(models[name])
        generate(models[name], ids, new_tokens)
        counts[name] = folded(models[name])

    def make(name: str) -> Callable[[], None]:
        if name == "base":
            models[name] = base.model
        else:
            models[name] = adapt(base, name).model
        models[name].eval()
        generate(models[name], ids, 2)
        return partial(rollout, name)

    names = ["base", "svf", "svf gate", LORA]
    times, _ = interleaved({name: partial(make, name) for name in names}, arguments.rounds)
    models["svf merged"] = adapt(base, "svf", base.copy(own_weights=True)).model.merge_and_unload().eval()
    steps = decode_seconds(models, ids)
    whole, step = ratios(times, "base"), ratios(steps, "base")
    rows = [
        [
            name,
            *(
                [
                    f"{1 / whole[name]:.2f}",
                    f"{prompts * new_tokens / median(times[name]):.0f}",
                    spread(times[name]),
                ]
                if name in times
                else [""] * 3
            ),
            f"{1 / step[name]:.3f}",
            f"{median(steps[name]) * 1000:.1f}",
        ]
        for name in models
    ]
    title = f"Generation, {base.label}, {prompts} × {new_tokens} new tokens, {arguments.rounds} rounds"
    header = ["", "speed, times base", "tokens/s", "seconds", "decoding speed, times base", "decode step, ms"]
    record.table(title, header, rows, folding(counts))
    record.raw(seconds=times, ratios=whole, decode_step_seconds=steps, decode_step_ratios=step, folded=counts)
    record.write()


if __name__ == "__main__":
    main()
