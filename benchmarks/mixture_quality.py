"""Question: is a mixture that was searched on 12 examples better than what needs no search?

    python benchmarks/mixture_quality.py [--tasks NAME ...] [--seeds N] [--jobs N] [--again] [--only-report]

For each task that no expert was trained on (benchmarks/unseen_tasks.py) and each seed, 12 examples are drawn, and on
them a mixture of the shipped experts is searched in one or more ways (`--searches`): with the defaults of
`AdaptiveMixture.search`, but for its folds, by the reward, by the reward and a tenth of the log-likelihood of the right
answers, by that alone, and by the gradient of that or of the expected reward with weights for every layer; the best
single expert and the best of all simple choices are chosen by the reward on the same examples. Everything is then
scored on 200 other questions, with in-context prompting beside it: the base model with the 12 examples before the
question. `--again` scores what was found on 170 more, which nobody had looked at when the ways of searching were made.

Five to twenty minutes for each task, seed and search on one core. Each task leaves a JSON in
`benchmarks/mixture_runs/`, to which a seed is added when it is done; what is there is not done again.
`docs/results/mixtures.md` is made of them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import load_model
from compare import KEEP_MEMORY
from unseen_tasks import TASKS, rows

from peft_svf import (
    AdaptiveMixture,
    Evaluator,
    LogLikelihoodObjective,
    RewardObjective,
    SVFLayer,
    WeightedObjective,
    WeightSpace,
)
from peft_svf.search.in_context import in_context_scores
from peft_svf.utils.files import write_whole

ROOT = Path(__file__).parents[1]
STORED = Path(__file__).parent / "mixture_runs"
SHOTS, HELD_OUT, POOL, FRESH = 12, 200, 60, 170
GENERATE = {"max_new_tokens": 16}
SEARCHES: dict[str, dict[str, Any]] = {
    "reward": {},
    "reward and log-likelihood": {},
    "log-likelihood": {},
    "log-likelihood by layer": {"granularity": "layer", "optimizer": "gradient", "num_generations": 40},
    "expected reward by layer": {"granularity": "layer", "optimizer": "gradient", "validation": 3},
}  # beside the defaults
SETTINGS = {"shots": SHOTS, "held_out": HELD_OUT, "generate": GENERATE}


class Bench:
    """A task with the experts, and what is known of it."""

    def __init__(self, task: str) -> None:
        self.task, self.path = task, STORED / f"{task}.json"
        base, tokenizer = load_model()
        experts = {path.name: str(path) for path in sorted((ROOT / "examples" / "experts").iterdir()) if path.is_dir()}
        experts["classification"] = str(STORED / "classification")  # the one that the first runs were made with
        self.mixture = AdaptiveMixture.from_pretrained(base.eval(), experts, tokenizer=tokenizer)
        self.simple = WeightSpace(self.mixture.experts, []).simple()
        questions = rows(task, HELD_OUT + POOL + FRESH)
        self.held_out, self.pool = questions[:HELD_OUT], questions[HELD_OUT:-FRESH]
        self.fresh = questions[-FRESH:]
        self.reward = TASKS[task][1]
        self.record: dict[str, Any] = stored(task) or {"task": task, "settings": SETTINGS, "simple": {}, "seeds": {}}

    def objective(self, examples: list[dict[str, Any]], name: str = "reward") -> Any:
        likelihood = LogLikelihoodObjective(examples, self.mixture.tokenizer)
        if name.startswith("log-likelihood"):
            return likelihood
        reward = RewardObjective(examples, self.reward, self.mixture.tokenizer, generation_kwargs=GENERATE)
        both = name == "reward and log-likelihood"
        return WeightedObjective([reward, likelihood], [1.0, 0.1]) if both else reward

    def answered(
        self, questions: list[dict[str, Any]], candidates: list[np.ndarray], granularity: Any = "expert"
    ) -> list[list[float]]:
        modules = [layer.module_name for layer in self.mixture.model.modules() if isinstance(layer, SVFLayer)]
        space = WeightSpace(self.mixture.experts, modules, granularity)
        evaluator = Evaluator(self.mixture.model, space, self.objective(questions))
        return evaluator.scores(candidates, range(len(questions))).tolist()

    def run(self, seeds: int, searches: list[str]) -> None:
        if not self.record["simple"]:
            self.record["simple"] = dict(
                zip(self.simple, self.answered(self.held_out, [*self.simple.values()]), strict=True)
            )
            self.save()
        for part in ("reward", "in-context", *(name for name in SEARCHES if name != "reward")):
            if part != "in-context" and part not in searches:
                continue
            for seed in range(seeds):
                known = self.record["seeds"].setdefault(str(seed), {})
                if part not in known:
                    begun, shots = time.perf_counter(), random.Random(seed).sample(self.pool, SHOTS)
                    known[part] = self.prompted(shots) if part == "in-context" else self.searched(shots, part, seed)
                    known[part] |= {"seconds": round(time.perf_counter() - begun), "load": os.getloadavg()[0]}
                    self.save()

    def prompted(self, shots: list[dict[str, Any]]) -> dict[str, Any]:
        space = WeightSpace(self.mixture.experts, [])
        evaluator = Evaluator(self.mixture.model, space, self.objective([*self.held_out, *shots]))
        found = in_context_scores(evaluator, [(list(range(HELD_OUT)), list(range(HELD_OUT, HELD_OUT + SHOTS)))])
        assert found is not None
        return {"held_out": found.tolist()}

    def searched(self, shots: list[dict[str, Any]], name: str, seed: int) -> dict[str, Any]:
        options = {"validation": None, "in_context": False, "seed": seed, **SEARCHES[name]}
        result = self.mixture.search(objective=self.objective(shots, name), **options)
        found = {
            "choice": result.choice,
            "alpha": {expert: np.round(values, 4).tolist() for expert, values in result.alpha.items()},
            "on_shots": result.scores,
            "weights": result.searched_weights,
            "usage": vars(result.usage),
            "best": [entry["best"] for entry in result.history],
        }
        return found | {"held_out": self.answers_of([found], name, self.held_out)[0]}

    def answers_of(self, found: list[dict[str, Any]], name: str, questions: list[dict[str, Any]]) -> list[list[float]]:
        candidates = [np.concatenate([scored_weights(x, name)[e] for e in self.mixture.experts]) for x in found]
        return self.answered(questions, candidates, SEARCHES[name].get("granularity", "expert"))

    def again(self, searches: list[str]) -> None:
        """Score the simple choices and what the searches have found on questions that are new."""
        if "simple on fresh" not in self.record:
            of_simple = self.answered(self.fresh, [*self.simple.values()])
            self.record["simple on fresh"] = dict(zip(self.simple, of_simple, strict=True))
            self.save()
        for name in searches:
            found = [seed[name] for seed in self.record["seeds"].values() if name in seed]
            if waiting := [part for part in found if "fresh" not in part]:
                for part, scores in zip(waiting, self.answers_of(waiting, name, self.fresh), strict=True):
                    part["fresh"] = scores
                self.save()

    def save(self) -> None:
        STORED.mkdir(exist_ok=True)
        write_whole(self.path, json.dumps(self.record) + "\n")


def scored_weights(found: dict[str, Any], name: str) -> dict[str, list[float]]:
    """Expert → its weights, of what is scored of a search: what was put in place, which may be an expert, where each
    layer has weights of its own, and else what was found."""
    if "granularity" in SEARCHES[name]:
        return dict(found["alpha"])
    return {expert: [weight] for expert, weight in found["weights"].items()}


def stored(task: str) -> dict[str, Any] | None:
    """What is known of a task.

    Raises:
        SystemExit: With other settings.
    """
    path = STORED / f"{task}.json"
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    if record["settings"] != SETTINGS:
        raise SystemExit(f"{path} was run with {record['settings']}, not {SETTINGS}; move it away first.")
    return record


# ---------------------------------------------------------------------------------------------------- report


def scores_by_seed(record: dict[str, Any], search: str, on: str = "held_out") -> dict[str, np.ndarray]:
    """Name → `[seeds, questions]`, of what is compared, for the seeds that have this search scored `on` them."""
    simple = record["simple" if on == "held_out" else f"simple on {on}"]
    in_order = [seed for _, seed in sorted(record["seeds"].items(), key=lambda pair: int(pair[0]))]
    seeds = [seed for seed in in_order if on in seed.get(search, {})]
    experts = [name for name in simple if name not in ("base", "uniform")]

    def best(names: list[str]) -> np.ndarray:
        # chosen on the examples of the search, by the reward; the first among equals
        chosen = [max(names, key=lambda name: seed["reward"]["on_shots"][name]) for seed in seeds]
        return np.array([simple[name] for name in chosen])

    scores = {
        "base": np.array([simple["base"]] * len(seeds)),
        "uniform": np.array([simple["uniform"]] * len(seeds)),
        "best expert": best(experts),
        "best simple": best(list(simple)),
    }
    if on == "held_out":
        scores["in-context"] = np.array([seed["in-context"]["held_out"] for seed in seeds])
    return scores | {"searched": np.array([seed[search][on] for seed in seeds])}


def spread(*tasks: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Mean of `[seeds, questions]`, and over tasks, with its 95 % interval, by bootstrap over seeds and questions."""
    rng = np.random.default_rng(seed)

    def resampled(values: np.ndarray) -> float:
        picked = values[rng.integers(len(values), size=len(values))]
        return float(picked[:, rng.integers(values.shape[1], size=values.shape[1])].mean())

    low, high = np.quantile([np.mean([resampled(task) for task in tasks]) for _ in range(2000)], [0.025, 0.975])
    return float(np.mean([task.mean() for task in tasks])), float(low), float(high)


def tables(records: list[dict[str, Any]], search: str, on: str = "held_out") -> list[str]:
    """Accuracies, and how they differ from that of what was searched."""
    of_all = [scores_by_seed(record, search, on) for record in records]
    names = list(of_all[0])
    lines = ["| accuracy on (seeds) | " + " | ".join(names) + " |", "|" + "---|" * (1 + len(names))]
    compared = ["", "| searched less | " + " | ".join(names[:-1]) + " |", "|" + "---|" * len(names)]
    for record, scores in zip(records, of_all, strict=True):
        cells = ["{:.3f} ({:.3f} to {:.3f})".format(*spread(scores[name])) for name in names]
        lines.append(f"| {record['task']} ({len(scores['base'])}) | " + " | ".join(cells) + " |")
    parts = [(record["task"], [scores]) for record, scores in zip(records, of_all, strict=True)]
    for name, some in [*parts, ("their mean", of_all)]:
        cells = []
        for rival in names[:-1]:
            mean, low, high = spread(*(scores["searched"] - scores[rival] for scores in some))
            text = f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
            cells.append(f"**{text}**" if low > 0 or high < 0 else text)
        compared.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, *compared, ""]


def report(tasks: list[str]) -> None:
    """Write docs/results/mixtures.md."""
    found = [record for task in tasks if (record := stored(task))]
    records = [record for record in found if any("reward" in seed for seed in record["seeds"].values())]
    if not records:
        raise SystemExit(f"There is no search in {STORED}.")
    searches = [name for name in SEARCHES if all(any(name in s for s in r["seeds"].values()) for r in records)]
    lines = [
        "# Searched mixtures on unseen tasks",
        "",
        "Written by `benchmarks/mixture_quality.py` from the runs in `benchmarks/mixture_runs/`; do not edit.",
        f"SmolLM2-135M-Instruct and the experts in `examples/experts`; {SHOTS} examples, {HELD_OUT} other questions,",
        f"greedy answers of at most {GENERATE['max_new_tokens']} tokens, the defaults of `AdaptiveMixture.search`",
        "(*reward*), or what else is said, but without held-out examples or folds: what is scored is what was found.",
        "The expected reward has three folds, and what is scored is what it put in place, which may be an expert.",
        "*Best expert* and *best simple* (of base, experts and uniform) are chosen by the reward on the same examples.",
        "95 % intervals by bootstrap over seeds and questions.",
        "",
    ]
    for search in searches:
        lines += [f"## Searched by the {search}", "", *tables(records, search)]
    lines += ["Bold: 0 is outside.", ""]
    again = [
        name for name in searches if all(any("fresh" in s.get(name, {}) for s in r["seeds"].values()) for r in records)
    ]
    if again:
        lines += [
            "## On questions that are new",
            "",
            "The ways of searching were chosen while these accuracies were looked at. So what was found was then",
            f"scored, once, on {FRESH} more questions of each task.",
            "",
        ]
        for search in again:
            lines += [f"By the {search}:", "", *tables(records, search, "fresh")]
    lines += [
        "## What was found",
        "",
        "On the 12 examples; the expected reward's *searched* is out of fold and its weights are those put in place.",
        "",
        "| task | by | score of best simple, searched | mean weights | pairs | tokens | s |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        for search in searches:
            seeds = [seed[search] for seed in record["seeds"].values() if search in seed]
            simple = np.mean([max(v for k, v in x["on_shots"].items() if k != "searched") for x in seeds])
            searched = np.mean([x["on_shots"]["searched"] for x in seeds])
            scored = [scored_weights(x, search) for x in seeds]
            weights = ", ".join(f"{k} {np.mean([x[k] for x in scored]):.2f}" for k in scored[0])
            cost = [f"{np.mean([x['usage'][key] for x in seeds]):,.0f}" for key in ("rows", "tokens", "seconds")]
            lines.append(
                f"| {record['task']} | {search} | {simple:.3f}, {searched:.3f} | {weights} | " + " | ".join(cost) + " |"
            )
    load = [part["load"] for record in records for seed in record["seeds"].values() for part in seed.values()]
    lines += ["", f"Load while it ran: {min(load):.1f} to {max(load):.1f}."]
    write_whole(ROOT / "docs" / "results" / "mixtures.md", "\n".join(lines) + "\n")
    print("docs/results/mixtures.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--searches", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="tasks at once, each with its share of the cores")
    parser.add_argument("--again", action="store_true", help="score what is stored on more questions, search nothing")
    parser.add_argument("--only-report", action="store_true", help="make the page from what is stored")
    parser.add_argument("--one", choices=TASKS, help="do this task, and no report")
    arguments = parser.parse_args()
    if arguments.one:
        torch.manual_seed(0)
        bench = Bench(arguments.one)
        if arguments.again:
            bench.again(arguments.searches)
        else:
            bench.run(arguments.seeds, arguments.searches)
        return
    if not arguments.only_report:
        cores = max(1, (os.cpu_count() or 1) // arguments.jobs)
        environment = {"OMP_NUM_THREADS": str(cores), **KEEP_MEMORY, **os.environ}
        command = [
            sys.executable,
            __file__,
            "--seeds",
            str(arguments.seeds),
            "--searches",
            *arguments.searches,
            *["--again"] * arguments.again,
            "--one",
        ]
        waiting, at_work = list(arguments.tasks), dict[str, subprocess.Popen[bytes]]()
        while waiting or at_work:
            while waiting and len(at_work) < arguments.jobs:
                task = waiting.pop(0)
                at_work[task] = subprocess.Popen([*command, task], env=environment)
            time.sleep(1)
            for task in [task for task, process in at_work.items() if process.poll() is not None]:
                if at_work.pop(task).returncode:
                    raise SystemExit(f"The task {task} failed; what it says is above.")
    report(list(TASKS))


if __name__ == "__main__":
    main()
