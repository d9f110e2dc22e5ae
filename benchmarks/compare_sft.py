"""Question: what does SVF learn from pairs, beside other methods and full fine-tuning, with TRL's `SFTTrainer`?

    python benchmarks/compare_sft.py [--tasks NAME ...] [--minutes M]

260 pairs of `sft_pairs.py`, 25 or 10 steps of 8 pairs, exact match of greedy answers on 160 other pairs. Every method
gets the best of its four learning rates for each task, chosen with the pairs and the order of `SWEEP_SEED`, which is
not in the table. Full fine-tuning trains all weights of the model, embeddings included.

Two hours on one core. Each run leaves one JSON in `benchmarks/sft_runs/`, and is not repeated if that is there: stop it
at any time and call it again. `docs/results/sft.md` is made of what there is.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from common import load_model
from sft_pairs import TASKS
from smollm2 import model_name
from transformers import set_seed
from trl import SFTTrainer

from peft_svf.training import greedy_accuracy
from peft_svf.training.run import build, parse
from peft_svf.utils.files import write_whole

ROOT = Path(__file__).parents[1]
STORED = Path(__file__).parent / "sft_runs"
SWEEP_SEED, SEEDS = 100, (1, 2, 3)
TRAIN, TEST = 260, 160
STEPS = {"units": 25, "orders": 10}  # after 25, every method knows all orders
BUDGET = {
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "linear",
    "warmup_steps": 2,
    "test_size": 0,  # tested below
    "validation_size": 0,
    "eval_strategy": "no",
    "save_strategy": "no",
}
SETTINGS = {"budget": BUDGET, "pairs": [TRAIN, TEST], "steps": STEPS}


@dataclass(frozen=True, eq=False)
class Method:
    """A method of PEFT, or full fine-tuning (`peft_type=None`), and the learning rates to choose among."""

    name: str
    peft_type: str | None
    rates: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)


METHODS = (
    Method("svf", "svf", (1e-3, 3e-3, 1e-2, 3e-2)),
    Method("lora r=16", "lora", (1e-4, 3e-4, 1e-3, 3e-3), {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0}),
    Method("ia3", "ia3", (3e-3, 1e-2, 3e-2, 1e-1)),
    Method("full fine-tuning", None, (1e-5, 3e-5, 1e-4, 3e-4)),
)


def stored_at(task: str, method: Method, rate: float, seed: int) -> Path:
    return STORED / f"{task}-{method.name.replace(' ', '-').replace('=', '')}-{rate:g}-{seed}.json"


def stored(task: str, method: Method, rate: float, seed: int) -> dict[str, Any] | None:
    """Return what a run left behind, if it was done.

    Raises:
        SystemExit: It was done with another budget.
    """
    path = stored_at(task, method, rate, seed)
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    if record["settings"] != SETTINGS:
        raise SystemExit(f"{path} was run with {record['settings']}, not {SETTINGS}; move it away first.")
    return record


def perform(task: str, method: Method, rate: float, seed: int, model: str | None) -> None:
    """Train, test, store."""
    pairs = TASKS[task](TRAIN + TEST, seed)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "pairs.jsonl")
        data.write_text("".join(json.dumps(row) + "\n" for row in pairs[:TRAIN]))
        options = {
            "objective": "sft",
            "model_name_or_path": model_name(model),
            "data": data,
            "chat": "true",
            "output_dir": Path(folder, "out"),
            "peft_type": method.peft_type or "svf",  # full fine-tuning takes only the data and arguments of this
            "learning_rate": rate,
            "seed": seed,
            "report_to": "none",
            "max_steps": STEPS[task],
            **BUDGET,
            **method.options,
        }
        script, training, adapter, mixture, _ = parse([f"--{name}={value}" for name, value in options.items()])
        trainer, _, functions = build(script, training, adapter, mixture)
        if method.peft_type is None:
            base, tokenizer = load_model(model)
            # The pairs are tokenized already.
            trainer = SFTTrainer(base, args=training, train_dataset=trainer.train_dataset, processing_class=tokenizer)
        set_seed(seed)
        begun = os.times()
        trainer.train()
        ended = os.times()
        test = [
            {"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["completion"]}
            for row in pairs[TRAIN:]
        ]
        accuracy = greedy_accuracy(
            trainer.model.eval(), trainer.processing_class, test, functions, max_new_tokens=40, batch_size=40
        )
    record = {
        "settings": SETTINGS,
        "task": task,
        "method": method.name,
        "learning_rate": rate,
        "seed": seed,
        "trainable": sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad),
        "losses": [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry],
        "accuracy": accuracy,
        "cpu_seconds": round(ended.user + ended.system - begun.user - begun.system),
        "load": os.getloadavg()[0],
        "base_model": model or "SmolLM2-135M-Instruct",
    }
    STORED.mkdir(exist_ok=True)
    write_whole(stored_at(task, method, rate, seed), json.dumps(record, indent=1) + "\n")


def chosen_rate(task: str, method: Method) -> float | None:
    """Return the best rate of the sweep, the smaller of equals; `None` until all are done."""
    found = {rate: stored(task, method, rate, SWEEP_SEED) for rate in method.rates}
    accuracies = {rate: record["accuracy"] for rate, record in found.items() if record is not None}
    return max(accuracies, key=accuracies.__getitem__) if len(accuracies) == len(method.rates) else None


def report(tasks: list[str]) -> None:
    """Write docs/results/sft.md from what is stored."""
    lines = [
        "# SFT with SVF and other methods",
        "",
        "Written by `benchmarks/compare_sft.py` from the runs in `benchmarks/sft_runs/`; do not edit.",
        f"SmolLM2-135M-Instruct, all linear layers, TRL's `SFTTrainer`, {TRAIN} pairs, {STEPS['units']} steps "
        f"(`units`) or {STEPS['orders']} (`orders`) of {BUDGET['per_device_train_batch_size']} pairs.",
        f"Exact match of greedy answers to {TEST} other pairs. The base model answers none of them in this form.",
        "`units` converts units, `orders` turns an order in words into a record (`benchmarks/sft_pairs.py`).",
        "",
        "## Learning rates",
        "",
        f"Exact match with the pairs and the order of seed {SWEEP_SEED}, which is not in the next table.",
        "",
        "| | " + " | ".join(tasks) + " |",
        "|" + "---|" * (1 + len(tasks)),
    ]
    for method in METHODS:
        cells = []
        for task in tasks:
            found = {rate: stored(task, method, rate, SWEEP_SEED) for rate in method.rates}
            cells.append(", ".join(f"{rate:g}: {x['accuracy']:.3f}" for rate, x in found.items() if x))
        lines.append(f"| {method.name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## Exact match",
        "",
        "Mean ± standard error over seeds (number of seeds), each with other pairs.",
        "",
        "| | trained numbers | " + " | ".join(tasks) + " | CPU s per run |",
        "|" + "---|" * (3 + len(tasks)),
    ]
    for method in METHODS:
        cells, records = [], []
        for task in tasks:
            rate = chosen_rate(task, method)
            runs = [] if rate is None else [x for seed in SEEDS if (x := stored(task, method, rate, seed))]
            records += runs
            cells.append(_spread([x["accuracy"] for x in runs]))
        trained = f"{records[0]['trainable']:,}" if records else ""
        seconds = f"{mean(x['cpu_seconds'] for x in records):.0f}" if records else ""
        lines.append(f"| {method.name} | {trained} | " + " | ".join(cells) + f" | {seconds} |")
    write_whole(ROOT / "docs" / "results" / "sft.md", "\n".join(lines) + "\n")


def _spread(values: list[float]) -> str:
    if not values:
        return "not run"
    error = f" ± {stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{error} ({len(values)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--model", help="Hub id or folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so many")
    arguments = parser.parse_args()
    begun = time.monotonic()

    def run_missing(seeds: tuple[int, ...]) -> None:
        for seed in seeds:
            for task in arguments.tasks:
                for method in METHODS:
                    rate = chosen_rate(task, method)
                    for one in method.rates if seed == SWEEP_SEED else [rate]:
                        if (
                            one is None
                            or stored(task, method, one, seed)
                            or time.monotonic() > begun + 60 * arguments.minutes
                        ):
                            continue
                        perform(task, method, one, seed, arguments.model)
                        report(arguments.tasks)

    run_missing((SWEEP_SEED,))
    run_missing(SEEDS)
    report(arguments.tasks)


if __name__ == "__main__":
    main()
