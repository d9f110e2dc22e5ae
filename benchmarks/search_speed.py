"""Claim: a search that scores many mixtures in one batch is faster than composing weights for one mixture at a time.

    python benchmarks/search_speed.py [--candidates N] [--shots N] [--new-tokens N]

32 mixtures of the shipped experts are scored on 10 questions by the reward of greedily generated answers: all pairs in
batches, without touching a weight; and one mixture after the other, with every weight composed as `U diag(σ z) Vᵀ` from
its three factors, as in the code released with the paper, its questions in one batch or one by one. The latter two are
timed for a few mixtures only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Record, argument_parser, interleaved, linear_layers, load_base, load_tokenizer, parse, spread

from peft_svf import AdaptiveMixture, Evaluator, RewardObjective, SVFLayer, WeightSpace
from peft_svf.training.run import recipe_task

EXAMPLES = Path(__file__).parents[1] / "examples"
FEW = 3  # mixtures for the ways that take one at a time


class Composed:
    """A plain model whose weights are composed anew for each mixture."""

    def __init__(self, model: Any, mixture: AdaptiveMixture) -> None:
        self.model, self.experts = model, mixture.experts
        layers = {m.module_name: m for m in mixture.model.modules() if isinstance(m, SVFLayer)}
        names = {module: name for name, module in model.named_modules()}
        self.parts = []
        for layer in linear_layers(model):
            U, S, Vh = torch.linalg.svd(layer.weight.detach().float(), full_matrices=False)
            deltas = layers[names[layer]].svf_delta
            z = torch.stack([deltas[name]().detach() for name in self.experts])
            self.parts.append((layer, U, S, Vh, z))

    @torch.no_grad()
    def put(self, alpha: np.ndarray) -> None:
        for layer, U, S, Vh, z in self.parts:
            layer.weight.copy_((U * (S * (1 + torch.tensor(alpha, dtype=z.dtype) @ z))) @ Vh)


def main() -> None:
    parser = argument_parser(__doc__, rounds=3)
    parser.add_argument("--candidates", type=int, default=32)
    parser.add_argument("--shots", type=int, default=10)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--batch-size", type=int, help="rows per batch (default: the search's)")
    arguments = parse(parser)
    if arguments.quick:
        arguments.candidates, arguments.shots = 4, 2
    record = Record(arguments, __doc__)
    base, tokenizer = load_base(arguments), load_tokenizer(arguments)
    experts = {path.name: str(path) for path in sorted((EXAMPLES / "experts").iterdir()) if path.is_dir()}
    mixture = AdaptiveMixture.from_pretrained(base.copy(), experts, tokenizer=tokenizer)
    composed = Composed(base.copy(own_weights=True).eval(), mixture)
    task = recipe_task(EXAMPLES / "recipes" / "arithmetic.yaml")
    objective = RewardObjective(
        list(task.examples("train", arguments.shots)),
        task.reward,
        tokenizer,
        generation_kwargs={"max_new_tokens": arguments.new_tokens},
    )
    space = WeightSpace(mixture.experts, [])
    shots, scores = range(arguments.shots), {}

    def candidates(count: int) -> list[np.ndarray]:
        return [*np.random.default_rng(0).uniform(0, 1, (count, space.dim))]

    def in_batches(count: int) -> None:
        evaluator = Evaluator(mixture.model, space, objective, batch_size=arguments.batch_size)
        scores["in batches"] = evaluator.scores(candidates(count), shots)

    def one_at_a_time(prompts_at_once: int, count: int) -> None:
        found = []
        for alpha in candidates(count):
            composed.put(alpha)
            row: list[float] = []
            for start in range(0, len(shots), prompts_at_once):
                row += objective.score(composed.model, shots[start : start + prompts_at_once])
            found.append(row)
        scores["one at a time"] = np.array(found)

    def composing(count: int) -> None:
        for alpha in candidates(count):
            composed.put(alpha)

    ways: dict[str, tuple[Callable[[int], None], int]] = {
        "all pairs in batches": (in_batches, arguments.candidates),
        "one mixture at a time, its questions in a batch": (partial(one_at_a_time, len(shots)), FEW),
        "one mixture at a time, one question at a time": (partial(one_at_a_time, 1), FEW),
        "composing the weights alone": (composing, FEW),
    }

    def make(name: str) -> Callable[[], None]:
        function, count = ways[name]
        function(1)
        return partial(function, count)

    times, _ = interleaved({name: partial(make, name) for name in ways}, arguments.rounds)
    per_pair = {name: [t / ways[name][1] / len(shots) for t in values] for name, values in times.items()}
    ours = float(np.median(per_pair["all pairs in batches"]))
    rows = [
        [name, f"{1 / np.median(values):.2f}", f"{np.median(values) / ours:.1f}", spread(values)]
        for name, values in per_pair.items()
    ]
    equal = int((scores["in batches"][:FEW] != scores["one at a time"]).sum())
    size = f"{arguments.candidates} mixtures x {arguments.shots} questions, {arguments.new_tokens} new tokens"
    record.table(
        f"{size}, {base.label}",
        ["", "pairs per second", "times the batches' time", "seconds per pair"],
        rows,
        f"Of {FEW * len(shots)} scores that both ways have, {equal} differ.",
    )
    record.raw(seconds=times)
    record.write()


if __name__ == "__main__":
    main()
