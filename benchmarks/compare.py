"""Question: what does SVF learn, beside other methods, with the same trainer and the same rollouts?

    make compare          # or: python benchmarks/compare.py [--tasks NAME ...] [--minutes M] [--jobs N]

Every run is one `python -m peft_svf.training.run` with the recipe of a task; only the method, its learning rate and
the seed differ. The learning rate of each method is the best of at least four on `SWEEP_TASK`; rates within `TIE` of
the best are told apart on `TIE_TASK`. Both have seeds of their own, and neither tasks nor seeds are in the table. After
training, each adapter is tested on the other tasks, too, and its perplexity measured on a text that nothing was trained
on: what it forgot.

Hours on two cores. Each run leaves one JSON in `benchmarks/compare_runs/`, and is not repeated if that is there: stop
it at any time, or give it `--minutes`, and call it again, on another machine if you like. The table and the plots in
`docs/results/comparison.md` are made of what there is. `--jobs N` does N runs at once, each in a separate process with
its share of the cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from common import load_model

from peft_svf.training import greedy_accuracy
from peft_svf.training.run import build, parse, recipe_task, train
from peft_svf.utils.files import write_whole

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from smollm2 import model_name

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "examples" / "recipes"
STORED = Path(__file__).parent / "compare_runs"
TASKS = ("lists", "products", "sums")
SWEEP_TASK, SWEEP_SEED = "arithmetic", 100
TIE_TASK, TIE_SEED, TIE = "letters", 101, 0.02
SEEDS = (1, 2, 3)
# the budget of every run: 64 completions a step
BUDGET = {
    "max_steps": 8,
    "eval_steps": 2,
    "validation_size": 32,
    "test_size": 0,  # tested below, with all the other tasks
    "load_best_model_at_end": "false",
    "save_strategy": "no",
}
# test questions of the task that was trained, of each other task, and tokens of the text
TEST_SIZE, ELSEWHERE_SIZE, TEXT_TOKENS = 128, 64, 2048
SETTINGS = {"budget": BUDGET, "sizes": [TEST_SIZE, ELSEWHERE_SIZE, TEXT_TOKENS]}
# glibc gives large blocks back to the system after every operation and takes them anew for the next, a page fault for
# each 4 KiB: a fifth of a training step on a CPU
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**28)}


@dataclass(frozen=True, eq=False)
class Method:
    """A PEFT method, its settings, and the learning rates to choose among."""

    name: str
    peft_type: str
    rates: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)


METHODS = (
    Method("svf", "svf", (1e-3, 2e-3, 3e-3, 6e-3)),
    Method("lora r=16", "lora", (1e-4, 3e-4, 1e-3, 3e-3), {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0}),
    Method("lora r=1", "lora", (3e-4, 1e-3, 3e-3, 1e-2), {"lora_r": 1, "lora_alpha": 2, "lora_dropout": 0.0}),
    Method("ia3", "ia3", (1e-3, 3e-3, 1e-2, 3e-2)),
    Method("vera", "vera", (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), {"peft_kwargs": {"r": 64}}),
)


@dataclass(frozen=True)
class Run:
    """One training run of the comparison."""

    task: str
    method: Method
    rate: float
    seed: int

    @property
    def path(self) -> Path:
        return (
            STORED / f"{self.task}-{self.method.name.replace(' ', '-').replace('=', '')}-{self.rate:g}-{self.seed}.json"
        )

    def stored(self) -> dict[str, Any] | None:
        """What it left behind, if it was done.

        Raises:
            SystemExit: It was done with another budget.
        """
        if not self.path.exists():
            return None
        record: dict[str, Any] = json.loads(self.path.read_text())
        if record["settings"] != SETTINGS:
            raise SystemExit(f"{self.path} was run with {record['settings']}, not {SETTINGS}; move it away first.")
        return record


def perform(run: Run, model: str | None) -> None:
    """Train, test on everything, store."""
    output = ROOT / "outputs" / "compare" / run.path.stem
    shutil.rmtree(output, ignore_errors=True)
    options = {
        "model_name_or_path": model_name(model),
        "output_dir": output,
        "peft_type": run.method.peft_type,
        "learning_rate": run.rate,
        "seed": run.seed,
        **BUDGET,
        **({} if run.task in TASKS else {"eval_strategy": "no"}),
        **run.method.options,
    }
    words = [
        word
        for name, value in options.items()
        for word in (f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value))
    ]
    script, training, adapter, mixture, given = parse(["--config", str(RECIPES / f"{run.task}.yaml"), *words])
    trainer, data, functions = build(script, training, adapter, mixture)
    begun = os.times()
    record = train(trainer, data, functions, given).to_dict()
    ended = os.times()
    record["recipe"] = {name: value for name, value in record["recipe"].items() if name != "model_name_or_path"}
    record["base_model"] = model or "SmolLM2-135M-Instruct"

    adapted, tokenizer, base = trainer.model.eval(), trainer.processing_class, base_line(model)
    others = [task for task in (*TASKS, SWEEP_TASK) if task != run.task] if run.task in TASKS else []
    record |= {
        "task": run.task,
        "method": run.method.name,
        "learning_rate": run.rate,
        "seed": run.seed,
        "settings": SETTINGS,
        "cpu_seconds": round(ended.user + ended.system - begun.user - begun.system),
        "load": os.getloadavg()[0],
        "accuracy_before": base["accuracy"][run.task],
        "accuracy_after": accuracy_on(adapted, tokenizer, run.task, TEST_SIZE),
        "elsewhere": {task: accuracy_on(adapted, tokenizer, task, ELSEWHERE_SIZE) for task in others},
        "perplexity": perplexity(adapted, tokenizer) if others else None,
    }
    STORED.mkdir(exist_ok=True)
    write_whole(run.path, json.dumps(record, indent=1) + "\n")
    shutil.rmtree(output)


def accuracy_on(model: Any, tokenizer: Any, task: str, size: int) -> float:
    _, training, *_ = parse(["--config", str(RECIPES / f"{task}.yaml")])
    found, tokens = recipe_task(RECIPES / f"{task}.yaml"), training.max_completion_length
    return greedy_accuracy(model, tokenizer, found.examples("test", size), found.reward, max_new_tokens=tokens)


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any) -> float:
    """Of the beginning of a public-domain story that comes with reasoning-gym, whose words no task here is made of."""
    import reasoning_gym

    text = (Path(reasoning_gym.__file__).parent / "data" / "in_the_year_2889.txt").read_text()
    ids = torch.tensor(tokenizer(text)["input_ids"][:TEXT_TOKENS]).view(-1, 512)
    losses = [model(input_ids=rows, labels=rows).loss.item() for rows in ids.split(2)]
    return math.exp(mean(losses))


def base_line(model: str | None) -> dict[str, Any]:
    """The base model on everything."""
    path = STORED / "base.json"
    if not path.exists():
        base, tokenizer = load_model(model)
        tasks = (*TASKS, SWEEP_TASK, TIE_TASK)
        content = {
            "model": model,
            "settings": SETTINGS,
            "accuracy": {task: accuracy_on(base.eval(), tokenizer, task, TEST_SIZE) for task in tasks},
            "elsewhere": {task: accuracy_on(base, tokenizer, task, ELSEWHERE_SIZE) for task in tasks},
            "perplexity": perplexity(base, tokenizer),
        }
        STORED.mkdir(exist_ok=True)
        write_whole(path, json.dumps(content, indent=1) + "\n")
    content = json.loads(path.read_text())
    if content["model"] != model:
        raise SystemExit(
            f"The runs in {STORED} are of the model {content['model'] or 'SmolLM2-135M-Instruct'}; move them away "
            "first."
        )
    return content


def tied_rates(method: Method) -> list[float]:
    """The rates that the sweep cannot tell from the best; none until all are done."""
    found = {rate: Run(SWEEP_TASK, method, rate, SWEEP_SEED).stored() for rate in method.rates}
    accuracies = {rate: final_accuracy(record) for rate, record in found.items() if record is not None}
    if len(accuracies) < len(method.rates):
        return []
    return [rate for rate, accuracy in accuracies.items() if accuracy >= max(accuracies.values()) - TIE]


def chosen_rate(method: Method) -> float | None:
    """The best of the sweep, or of those that tie, on the task that tells them apart; `None` until all are done."""
    tied = tied_rates(method)
    if len(tied) < 2:
        return tied[0] if tied else None
    found = {rate: Run(TIE_TASK, method, rate, TIE_SEED).stored() for rate in tied}
    if any(record is None for record in found.values()):
        return None
    return max(tied, key=lambda rate: final_accuracy(found[rate]))  # type: ignore[arg-type]


def final_accuracy(record: dict[str, Any]) -> float:
    return float(record["accuracy_after"])


def curve(record: dict[str, Any]) -> list[tuple[int, float]]:
    """Steps and greedy validation accuracy."""
    return [(entry["step"], entry["eval_accuracy"]) for entry in record["history"] if "eval_accuracy" in entry]


# ---------------------------------------------------------------------------------------------------- report


def report() -> None:
    """Write docs/results/comparison.md, with its plots, from what is stored."""
    base = json.loads((STORED / "base.json").read_text())
    found = {method.name: _table_runs(method) for method in METHODS}
    lines = [
        "# SVF beside other methods",
        "",
        "Written by `benchmarks/compare.py` (`make compare`) from the runs in `benchmarks/compare_runs/`; do not edit.",
        "SmolLM2-135M-Instruct, all linear layers, TRL's GRPO, "
        f"{BUDGET['max_steps']} steps of 64 completions, greedy accuracy on held-out questions.",
        "",
        "## Learning rates",
        "",
        f"Greedy test accuracy on `{SWEEP_TASK}`, seed {SWEEP_SEED}; rates within {TIE} of the best are told apart on "
        f"`{TIE_TASK}`, seed {TIE_SEED}. Neither tasks nor seeds are in the next table.",
        "",
        f"| | {SWEEP_TASK} | {TIE_TASK} | chosen |",
        "|---|---|---|---|",
    ]
    for method in METHODS:
        tied, rate = tied_rates(method), chosen_rate(method)
        swept = _accuracies(SWEEP_TASK, method, method.rates, SWEEP_SEED)
        told_apart = _accuracies(TIE_TASK, method, tied, TIE_SEED) if len(tied) > 1 else ""
        lines.append(f"| {method.name} | {swept} | {told_apart} | {f'{rate:g}' if rate else 'open'} |")
    done = sum(len(records) for records in found.values())
    lines += [
        "",
        "## Accuracy",
        "",
        f"Mean ± standard error over seeds (number of seeds). {done} of {len(METHODS) * len(TASKS) * len(SEEDS)} runs "
        "are done." + ("" if done == len(METHODS) * len(TASKS) * len(SEEDS) else " **The table is not complete.**"),
        "",
        "| | trained numbers | " + " | ".join(TASKS) + " | mean of the tasks | CPU s per run |",
        "|" + "---|" * (4 + len(TASKS)),
        "| base model | 0 | " + " | ".join(f"{base['accuracy'][task]:.2f}" for task in TASKS) + " | | |",
    ]
    for name, records in found.items():
        cells = [_spread([final_accuracy(x) for x in records if x["task"] == task]) for task in TASKS]
        means = [
            mean(values) for task in TASKS if (values := [final_accuracy(x) for x in records if x["task"] == task])
        ]
        whole = f"{mean(means):.3f}" if len(means) == len(TASKS) else ""
        trained = f"{records[0]['trainable']:,}" if records else ""
        seconds = f"{mean(x['cpu_seconds'] for x in records):.0f}" if records else ""
        lines.append(f"| {name} | {trained} | " + " | ".join(cells) + f" | {whole} | {seconds} |")
    lines += [
        "",
        "## What was forgotten",
        "",
        "Change on the tasks that were not trained (mean over them, runs and seeds), and perplexity of a story.",
        "",
        "| | gain on the trained task | change on the others | perplexity |",
        "|---|---|---|---|",
        f"| base model | | | {base['perplexity']:.2f} |",
    ]
    for name, records in found.items():
        gains = [final_accuracy(x) - x["accuracy_before"] for x in records]
        changes = [mean(x["elsewhere"][t] - base["elsewhere"][t] for t in x["elsewhere"]) for x in records]
        perplexities = [x["perplexity"] for x in records]
        lines.append(f"| {name} | {_spread(gains)} | {_spread(changes)} | {_spread(perplexities)} |")
    if done:
        _plot(found)
        lines += ["", "## Budget", "", "![accuracy per rollout and per CPU second](comparison.png)"]
    write_whole(ROOT / "docs" / "results" / "comparison.md", "\n".join(lines) + "\n")
    print("docs/results/comparison.md")


def _table_runs(method: Method) -> list[dict[str, Any]]:
    rate = chosen_rate(method)
    if rate is None:
        return []
    stored = [Run(task, method, rate, seed).stored() for task in TASKS for seed in SEEDS]
    return [record for record in stored if record is not None]


def _accuracies(task: str, method: Method, rates: Sequence[float], seed: int) -> str:
    records = {rate: Run(task, method, rate, seed).stored() for rate in rates}
    return ", ".join(f"{rate:g}: {final_accuracy(x):.3f}" if x else f"{rate:g}: not run" for rate, x in records.items())


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    error = f" ± {stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{error} ({len(values)})"


def _plot(found: dict[str, list[dict[str, Any]]]) -> None:
    """Validation accuracy, mean over seeds, per completion and per CPU second."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(TASKS), 6), layout="constrained")
    axes = figure.subplots(2, len(TASKS), squeeze=False, sharey="col")
    for column, task in enumerate(TASKS):
        for name, records in found.items():
            curves = [(curve(x), x["cpu_seconds"]) for x in records if x["task"] == task]
            if not curves:
                continue
            steps = [step for step, _ in curves[0][0]]
            values = [mean(points[i][1] for points, _ in curves) for i in range(len(steps))]
            per_step = mean(seconds for _, seconds in curves) / steps[-1]
            axes[0, column].plot([64 * step for step in steps], values, "o-", label=name)
            axes[1, column].plot([per_step * step for step in steps], values, "o-", label=name)
        axes[0, column].set(title=task, xlabel="completions", ylabel="greedy accuracy, validation")
        axes[1, column].set(xlabel="CPU seconds", ylabel="greedy accuracy, validation")
    axes[0, 0].legend(fontsize="small")
    figure.savefig(ROOT / "docs" / "results" / "comparison.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--methods", nargs="+", choices=[method.name for method in METHODS])
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after so many minutes")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: 1)")
    parser.add_argument("--only-report", action="store_true", help="make the page from what is stored")
    parser.add_argument("--one", metavar="NAME", help="do the run of this name, and no other")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {arguments.jobs}")
    methods = [method for method in METHODS if not arguments.methods or method.name in arguments.methods]
    if arguments.one:
        perform(next(run for run in runs(METHODS, TASKS) if run.path.stem == arguments.one), arguments.model)
        return
    if not arguments.only_report:
        base_line(arguments.model)
        perform_all(methods, arguments)
    report()


def perform_all(methods: Sequence[Method], arguments: argparse.Namespace) -> None:
    """What is not stored, `--jobs` runs at a time, until the time is over. If a run fails, none is begun after it."""
    cores = max(1, (os.cpu_count() or 1) // arguments.jobs)
    environment = {"OMP_NUM_THREADS": str(cores), **KEEP_MEMORY, **os.environ}
    command = [sys.executable, __file__, *(["--model", arguments.model] if arguments.model else []), "--one"]
    start, at_work = time.monotonic(), dict[Run, subprocess.Popen[bytes]]()
    while True:
        minutes = (time.monotonic() - start) / 60
        waiting = [run for run in runs(methods, arguments.tasks) if run not in at_work and run.stored() is None]
        if minutes < arguments.minutes:
            for run in waiting[: arguments.jobs - len(at_work)]:
                print(f"[{minutes:4.0f} min] {run.path.stem}; {len(waiting)} to do", flush=True)
                at_work[run] = subprocess.Popen([*command, run.path.stem], env=environment)
        if not at_work:
            return
        time.sleep(1)
        for run in [run for run, process in at_work.items() if process.poll() is not None]:
            if at_work.pop(run).returncode:
                for process in at_work.values():
                    process.wait()
                raise SystemExit(f"The run {run.path.stem} failed; what it says is above.")


def runs(methods: Sequence[Method], tasks: Sequence[str]) -> list[Run]:
    """All runs that can be named now: the sweep, what tells ties apart, and where both are done, the table, a seed of
    everything at a time."""
    sweep = [Run(SWEEP_TASK, method, rate, SWEEP_SEED) for method in methods for rate in method.rates]
    tied = {method: tied_rates(method) for method in methods}
    ties = [Run(TIE_TASK, m, rate, TIE_SEED) for m, rates in tied.items() if len(rates) > 1 for rate in rates]
    table = [
        Run(task, method, rate, seed)
        for seed in SEEDS
        for task in tasks
        for method in methods
        if (rate := chosen_rate(method)) is not None
    ]
    return [*sweep, *ties, *table]


if __name__ == "__main__":
    main()
