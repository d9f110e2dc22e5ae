"""Question: does a search find the mixture that made the data, and what does each optimizer pay for it?

    python benchmarks/search_cost.py [--plants N] [--evaluations N] [--optimizers NAME ...]

A mixture of the shipped experts with random weights is planted: it writes text, and a candidate is scored by the
log-likelihood that it is expected to give to what the planted mixture would write (the cross-entropy of the two, which
the planted weights alone maximize). So the right answer is known, and its score. The progress of a search is the
fraction of the way from the uniform mixture's score to it. No candidate is dropped early here.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Record, argument_parser, load_base, load_tokenizer, parse
from unseen_tasks import TASKS, rows

from peft_svf import AdaptiveMixture, Evaluator, Objective, SearchConfig, WeightSpace
from peft_svf.scoring.tokens import prompt_ids
from peft_svf.search.loop import run_search
from peft_svf.search.optimizers import make_optimizer

EXPERTS = Path(__file__).parents[1] / "examples" / "experts"
OPTIMIZERS = ("cem", "cem as in the paper", "cma-es", "gradient")
POPULATION = 16


class Planted(Objective):
    """Expected log-likelihood per token, under a mixture that is active when this is made."""

    name = "expected log-likelihood"
    differentiable = True

    @torch.no_grad()
    def __init__(self, mixture: AdaptiveMixture, prompts: list[list[int]], new_tokens: int) -> None:
        self.examples = [{"prompt": ids} for ids in prompts]
        self.ids, self.target = [], []
        for ids in prompts:
            given = torch.tensor([ids])
            whole = mixture.generate(
                given, attention_mask=torch.ones_like(given), do_sample=True, max_new_tokens=new_tokens, pad_token_id=0
            )
            self.ids.append((whole, len(ids)))
            self.target.append(mixture.model(whole).logits[0, len(ids) - 1 : -1].softmax(-1))

    def lengths(self) -> list[int]:
        return [ids.shape[1] for ids, _ in self.ids]

    @torch.no_grad()
    def score(self, model: Any, indices: Sequence[int]) -> list[float]:
        return self.score_tensor(model, indices).tolist()

    def score_tensor(self, model: Any, indices: Sequence[int]) -> torch.Tensor:
        longest = max(self.ids[i][0].shape[1] for i in indices)
        begin = min(self.ids[i][1] for i in indices) - 1
        batch = torch.zeros(len(indices), longest, dtype=torch.long)
        mask = torch.zeros_like(batch)
        for row, i in enumerate(indices):
            whole = self.ids[i][0][0]
            batch[row, : len(whole)], mask[row, : len(whole)] = whole, 1
        self.tokens += int(mask.sum())
        logits = model(input_ids=batch, attention_mask=mask, logits_to_keep=longest - begin).logits
        scores = []
        for row, i in enumerate(indices):
            whole, start = self.ids[i]
            logps = logits[row, start - 1 - begin : whole.shape[1] - 1 - begin].log_softmax(-1)
            scores.append((self.target[i] * logps).sum(-1).mean())
        return torch.stack(scores)


def main() -> None:
    parser = argument_parser(__doc__, rounds=1)
    parser.add_argument("--plants", type=int, default=2, help="planted mixtures")
    parser.add_argument("--first-plant", type=int, default=0)
    parser.add_argument("--evaluations", type=int, default=240, help="of candidates; a sixth for the gradient")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS)
    arguments = parse(parser)
    if arguments.quick:
        arguments.plants, arguments.evaluations, arguments.prompts, arguments.new_tokens = 1, 32, 2, 4
    record = Record(arguments, __doc__)
    base, tokenizer = load_base(arguments), load_tokenizer(arguments)
    names = {path.name: str(path) for path in sorted(EXPERTS.iterdir()) if path.is_dir()}
    mixture = AdaptiveMixture.from_pretrained(base.copy(), names, tokenizer=tokenizer)
    space = WeightSpace(mixture.experts, [])
    uniform = space.baselines()["uniform"]
    as_in_the_paper = {"mean": 1 / len(mixture.experts), "std": 0.5, "min_std": 0.0}
    config = SearchConfig(racing=False)

    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.optimizers}
    for plant in range(arguments.first_plant, arguments.first_plant + arguments.plants):
        weights = np.random.default_rng([plant, 1]).uniform(0, 1, space.dim)  # no stream that an optimizer draws from
        questions = [row for task in TASKS for row in rows(task, 20)]
        chosen = random.Random(plant).sample(questions, arguments.prompts)
        mixture.set_weights(weights)
        torch.manual_seed(plant)
        objective = Planted(mixture, [prompt_ids(row["prompt"], tokenizer) for row in chosen], arguments.new_tokens)
        examples = range(arguments.prompts)
        best, start = Evaluator(mixture.model, space, objective).scores([weights, uniform], examples).mean(axis=1)
        for name in arguments.optimizers:
            evaluator = Evaluator(mixture.model, space, objective)
            method, kwargs = ("cem", as_in_the_paper) if name == "cem as in the paper" else (name, {})
            optimizer = make_optimizer(method, space, start=uniform, population_size=POPULATION, seed=plant, **kwargs)
            generations = arguments.evaluations // (6 if name == "gradient" else POPULATION)
            outcome = run_search(evaluator, optimizer, examples, config, num_generations=generations)
            x = outcome.finalists[0]
            score = evaluator.scores([x], examples).mean()
            curve = np.maximum.accumulate([(entry["best"] - start) / (best - start) for entry in outcome.history])
            found[name].append(
                {
                    "plant": plant,
                    "planted": weights.tolist(),
                    "found": x.tolist(),
                    "error": float(np.abs(x - weights).max()),
                    "score": float(score),
                    "best": float(best),
                    "uniform": float(start),
                    "evaluations": [(i + 1) * optimizer.population_size for i in range(len(curve))],
                    "progress": curve.tolist(),
                    "seconds": evaluator.usage.seconds,
                }
            )
            print(plant, name, f"error {found[name][-1]['error']:.3f}", f"progress {curve[-1]:.4f}", flush=True)

    table = []
    for name, runs in found.items():
        to_95 = [
            next((n for n, p in zip(r["evaluations"], r["progress"], strict=True) if p >= 0.95), None) for r in runs
        ]
        gap = [(r["best"] - r["score"]) / abs(r["best"]) for r in runs]
        table.append(
            [
                name,
                ", ".join("not reached" if n is None else str(n) for n in to_95),
                ", ".join(f"{r['progress'][-1]:.3f}" for r in runs),
                ", ".join(f"{r['error']:.3f}" for r in runs),
                f"{max(gap):.2%}",
                f"{np.mean([r['seconds'] for r in runs]):.0f}",
            ]
        )
    record.table(
        f"{arguments.plants} planted mixtures of {space.dim} experts, {arguments.evaluations} candidates, "
        f"{arguments.prompts} prompts, {base.label}",
        ["", "candidates to 95 % of the way", "of the way in the end", "largest error of a weight", "score below", "s"],
        table,
        "A number for each planted mixture. A candidate of the gradient costs three others.",
    )
    record.raw(**found)
    record.write()
    plot(found, arguments.output.with_suffix(".png"))


def plot(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw the way that is left, per candidate evaluated."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, runs in found.items():
        left = np.mean([1 - np.array(run["progress"]) for run in runs], axis=0)
        axes.plot(runs[0]["evaluations"], np.maximum(left, 1e-4), ".-", label=name)
    axes.axhline(0.05, color="grey", linewidth=0.5, label="95 % reached")
    axes.set(yscale="log", xlabel="evaluated mixtures", ylabel="remaining distance to the best score")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
