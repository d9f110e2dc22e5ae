"""Question: does the probability of right answers, whose gradient is known, find better mixtures than their count?

    python benchmarks/expected_reward.py [--tasks NAME ...] [--seeds N] [--granularity expert|layer] [--only-report]

The tasks, examples and held-out questions of `benchmarks/mixture_quality.py`. For each of 12 examples the base model,
every expert and the uniform mixture answer once greedily and four times at temperature 1; the answers that the reward
takes, with the reference, are kept. The sum of reward times probability, `Σ_y r(y) p_α(y|x)`, is what they give to the
expected reward of a sampled answer, and differentiable where the reward itself is not. (Not exactly: the reference ends
as in the chat template, with a newline behind the end, so that a sampled answer of the same words counts beside it.)
Adam climbs it from the simple choice where it is highest, 16 answers a step, and what it finds is scored on 200 other
questions by greedy decoding.

Ten minutes and more for each task and seed on one core; what is known is kept in `benchmarks/mixture_runs/expected/`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mixture_quality import GENERATE, SHOTS, STORED, Bench, stored
from unseen_tasks import TASKS

from peft_svf import SVFLayer
from peft_svf._files import write_whole
from peft_svf.adaptation import Evaluator, LogLikelihoodObjective, RewardObjective, WeightSpace
from peft_svf.adaptation.optimizers import GradientDescent
from peft_svf.scoring import Prefix

FOLDER = STORED / "expected"
SAMPLES, STEPS, BATCH, LEARNING_RATE = 4, 40, 16, 0.05
SETTINGS = {"shots": SHOTS, "samples": SAMPLES, "steps": STEPS, "batch": BATCH, "learning_rate": LEARNING_RATE}

Pool = list[dict[tuple[int, ...], float]]  # for each example, the tokens of answers with their rewards


class Listening(RewardObjective):
    """Keeps the answers that end in time and have a reward."""

    def __init__(self, *args: Any, pool: Pool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        (self.inner,) = self.reward_funcs
        self.pool, self.reward_funcs, self.now = pool, [self.heard], list[int]()

    def score(self, model: Any, indices: Sequence[int], prefix: Prefix | None = None) -> list[float]:
        self.now = list(indices)
        return super().score(model, indices, prefix)

    def heard(self, completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
        rewards = list(self.inner(completion_ids=completion_ids, **columns))
        for i, ids, reward in zip(self.now, completion_ids, rewards, strict=True):
            if reward and len(ids) < GENERATE["max_new_tokens"]:
                self.pool[i][tuple(ids)] = reward
        return rewards


class ExpectedReward(LogLikelihoodObjective):
    """Reward times probability of each answer of a pool, scaled so that the mean over answers is the mean over
    questions of the sum over their answers. Adds the references to the pool."""

    name = "expected reward"

    def __init__(self, examples: Sequence[dict[str, Any]], pool: Pool, tokenizer: Any) -> None:
        super().__init__(examples, tokenizer)
        prompts = [ids[:length] for ids, length in self._rows]
        for (ids, length), answers in zip(self._rows, pool, strict=True):
            answers.setdefault(tuple(ids[length:]), 1.0)
        rows = [(i, ids, reward) for i, answers in enumerate(pool) for ids, reward in answers.items()]
        self.examples = [examples[i] for i, *_ in rows]
        self._rows = [(prompts[i] + list(ids), len(prompts[i])) for i, ids, _ in rows]
        self.factors = torch.tensor([reward * len(rows) / len(pool) for *_, reward in rows])

    def differentiable(self, model: Any, indices: Sequence[int], prefix: Prefix | None = None) -> torch.Tensor:
        lengths = torch.tensor([len(self._rows[i][0]) - self._rows[i][1] for i in indices])
        logps = super().differentiable(model, indices, prefix) * lengths.to(model.device)
        return self.factors[list(indices)].to(model.device) * logps.exp()


def searched(bench: Bench, seed: int, granularity: Any) -> dict[str, Any]:
    begun, shots = time.perf_counter(), random.Random(seed).sample(bench.pool, SHOTS)
    model, tokenizer, experts = bench.mixture.model, bench.mixture.tokenizer, bench.mixture.experts
    simple, pool = [*bench.simple.values()], [dict[tuple[int, ...], float]() for _ in shots]
    for kwargs, rounds in (({}, 1), ({"do_sample": True, "top_k": 0}, SAMPLES)):
        heard = Listening(shots, bench.reward, tokenizer, generation_kwargs={**GENERATE, **kwargs}, pool=pool)
        answering = Evaluator(model, WeightSpace(experts, []), heard, seed=seed)
        for _ in range(rounds):
            answering.new_round()
            answering.scores(simple, range(SHOTS))
    objective = ExpectedReward(shots, pool, tokenizer)
    modules = [layer.module_name for layer in model.modules() if isinstance(layer, SVFLayer)]
    space = WeightSpace(experts, modules, granularity)
    evaluator = Evaluator(model, space, objective)
    everything = range(len(objective.examples))
    choices = space.simple()
    before = dict(zip(choices, evaluator.scores([*choices.values()], everything).mean(axis=1).tolist(), strict=True))
    start = max(before, key=lambda name: before[name])
    optimizer = GradientDescent(choices[start], bounds=space.bounds, learning_rate=LEARNING_RATE)
    rng = np.random.default_rng(seed)
    for step in range(STEPS):
        some = rng.choice(len(everything), min(BATCH, len(everything)), replace=False).tolist()
        value, gradient = evaluator.value_and_gradient(optimizer.mean, some)
        optimizer.tell([(optimizer.mean, -value)], [-gradient])
        if step % 10 == 0:
            print(f"{bench.task} {seed} step {step}: {value:.3f}, {time.perf_counter() - begun:.0f} s", flush=True)
    return {
        "answers": len(objective.examples),
        "start": start,
        "before": before,
        "after": float(evaluator.scores([optimizer.mean], everything).mean()),
        "weights": dict(zip(experts, space.weights(optimizer.mean).mean(axis=1).round(3).tolist(), strict=True)),
        "held_out": bench.on_held_out([optimizer.mean], granularity)[0],
        "seconds": round(time.perf_counter() - begun),
        "load": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[task for task in TASKS if stored(task)])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--granularity", choices=("expert", "layer"), default="layer")
    parser.add_argument("--only-report", action="store_true")
    arguments = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    print("| task, seed | sum at the start, found | accuracy: best expert by reward, start, found | s |")
    print("|---|---|---|---|")
    for task in arguments.tasks:
        quality = stored(task)
        if quality is None:
            raise SystemExit(f"{task} has no runs of mixture_quality.py to compare with; run those first.")
        path = FOLDER / f"{task}-{arguments.granularity}.json"
        record = json.loads(path.read_text()) if path.exists() else {"settings": SETTINGS, "seeds": {}}
        if record["settings"] != SETTINGS:
            raise SystemExit(f"{path} was run with {record['settings']}, not {SETTINGS}; move it away first.")
        known: dict[str, Any] = record["seeds"]
        if not arguments.only_report:
            bench = Bench(task)
            for seed in map(str, range(arguments.seeds)):
                if seed not in known:
                    torch.manual_seed(0)
                    known[seed] = searched(bench, int(seed), arguments.granularity)
                    write_whole(path, json.dumps(record) + "\n")
        simple = {name: np.mean(values) for name, values in quality["simple"].items()}
        for seed, run in known.items():
            shots = quality["seeds"].get(seed, {}).get("reward", {}).get("on_shots", {})
            rivals = [name for name in simple if name in shots and name not in ("base", "uniform")]
            best = f"{simple[max(rivals, key=lambda name: shots[name])]:.3f}" if rivals else "-"
            print(
                f"| {task}, {seed} | {run['before'][run['start']]:.3f} ({run['start']}), {run['after']:.3f} "
                f"| {best}, {simple[run['start']]:.3f}, {np.mean(run['held_out']):.3f} | {run['seconds']} |"
            )


if __name__ == "__main__":
    main()
