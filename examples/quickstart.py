"""The whole of Transformer² on a laptop: train an expert by RL, save it, reload it, mix it with others.

   make demo            # or: python examples/quickstart.py [--quick] [--model NAME] [--output FOLDER]

1. trains an expert for one-digit products live, as `peft-svf train --config examples/recipes/products.yaml` does;
2. reloads it into a fresh base model;
3. loads it together with two experts of examples/experts/ (with --model it trains them, as those do not fit);
4. searches a mixture for a task that no expert was trained on, from a few examples;
5. prints one table, task by choice of weights, on held-out questions, whichever wins;
6. leaves the adapters, all numbers as JSON and a plot in the output folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from huggingface_hub.utils import tqdm
from peft import PeftModel
from smollm2 import BASE_NAME, load_model, model_name

from peft_svf import AdaptiveMixture
from peft_svf.training import Record, greedy_accuracy, machine
from peft_svf.training.run import main as run
from peft_svf.training.run import recipe_task

LIVE_TASK = "products"
UNSEEN_TASK = "arithmetic"
OTHERS = ("retrieval", "sums")  # of the shipped experts; more take longer
SHOTS = 12
MAX_NEW_TOKENS = 8
SHIPPED = Path(__file__).parent / "experts"
RECIPES = Path(__file__).parent / "recipes"


def train(task: str, folder: Path, model: str | None, *, quick: bool) -> Record:
    """Train an expert by its recipe, but without validation; in 4 steps if `quick`. What was in the folder goes."""
    if (folder / "training.json").exists():
        shutil.rmtree(folder)
    options = {"model_name_or_path": model_name(model), "output_dir": str(folder)}
    options |= {} if model else {"base_model_name": BASE_NAME}
    options |= {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": "false"}
    options |= {"max_steps": "4", "test_size": "16"} if quick else {"test_size": "64"}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    return run(["--config", str(RECIPES / f"{task}.yaml"), *words])


def main() -> None:
    # deprecations between the libraries, which nobody can act on who runs a demo
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(peft|transformers|trl)\b")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder (default: SmolLM2-135M-Instruct from the wheel)")
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, in four minutes")
    arguments = parser.parse_args()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    quick: bool = arguments.quick
    test_size, steps = (16, 2) if quick else (64, None)
    numbers: dict[str, Any] = {
        "quick": quick,
        "model": arguments.model,
        "load": os.getloadavg()[0],
        "machine": machine(),
    }
    start = time.perf_counter()

    def heading(text: str) -> None:
        print(f"\n[{time.perf_counter() - start:4.0f} s] {text}", flush=True)

    heading(f"1. Train an expert for {LIVE_TASK}")
    expert = output / LIVE_TASK
    record = train(LIVE_TASK, expert, arguments.model, quick=quick)

    heading("2. Reload it into a fresh base model")
    tasks = {name: recipe_task(RECIPES / f"{name}.yaml") for name in (LIVE_TASK, *OTHERS, UNSEEN_TASK)}
    test = {name: task.examples("test", test_size) for name, task in tasks.items()}
    fresh, tokenizer = load_model(arguments.model)

    def accuracy(model: Any, task: str) -> float:
        return greedy_accuracy(model, tokenizer, test[task], tasks[task].reward, max_new_tokens=MAX_NEW_TOKENS)

    reloaded = accuracy(PeftModel.from_pretrained(fresh, str(expert)), LIVE_TASK)
    size = (expert / "adapter_model.safetensors").stat().st_size
    print(f"{expert}: {size / 1000:.0f} kB, greedy accuracy after reloading: {reloaded:.2f}", flush=True)

    heading("3. Load it together with other experts")
    folders = {task: SHIPPED / task for task in OTHERS}
    if arguments.model:  # those in examples/experts are for the weights of the demo's own model
        folders = {task: output / task for task in OTHERS}
        for task, folder in folders.items():
            train(task, folder, arguments.model, quick=quick)
    experts = {LIVE_TASK: str(expert), **{task: str(folder) for task, folder in folders.items()}}
    fresh, _ = load_model(arguments.model)
    mixture = AdaptiveMixture.from_pretrained(fresh, experts, tokenizer=tokenizer)
    print("experts:", ", ".join(mixture.experts), flush=True)

    heading(f"4. Search a mixture for {UNSEEN_TASK}, which no expert was trained on, from {SHOTS} examples")
    result = mixture.search(
        tasks[UNSEEN_TASK].examples("train", SHOTS),
        reward_funcs=tasks[UNSEEN_TASK].reward,
        max_new_tokens=MAX_NEW_TOKENS,
        num_generations=steps,
        validation=None if quick else "auto",
    )
    print(result, flush=True)
    mixture.save_pretrained(output / "mixture")
    example = test[UNSEEN_TASK][0]["prompt"]
    inputs = tokenizer.apply_chat_template(example, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    reply = mixture.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    text = tokenizer.decode(reply[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"For example: {example[-1]['content']!r} -> {text!r}")

    heading("5. All of them, on held-out questions")
    # the mixture in place comes first: its weights may differ from layer to layer, so it is not set again
    table = {task: {"searched": accuracy(mixture.model, task)} for task in tasks}
    count = len(mixture.experts)
    baselines: dict[str, Any] = {
        "base": np.zeros(count),
        **dict(zip(mixture.experts, np.eye(count), strict=True)),
        "uniform": np.full(count, 1 / count),
    }
    with tqdm(desc="Evaluating", total=len(tasks) * len(baselines), unit="cell") as bar:
        for name, weights in baselines.items():
            mixture.set_weights(weights)
            for task in tasks:
                table[task][name] = accuracy(mixture.model, task)
                bar.update()
    table = {task: {name: row[name] for name in (*baselines, "searched")} for task, row in table.items()}
    sizes = {task: len(test[task]) for task in tasks}
    print(_format(table, sizes))
    print(f"\n{UNSEEN_TASK} is the unseen task; the search put {result.choice!r} in place.")

    numbers |= {
        "live": {"task": LIVE_TASK, "reloaded": reloaded, **record.to_dict()},
        "adapter_bytes": size,
        "search": result.to_dict(),
        "held_out_questions": sizes,
        "accuracy": table,
        "seconds": round(time.perf_counter() - start, 1),
    }
    (output / "results.json").write_text(json.dumps(numbers, indent=2) + "\n")
    _plot(numbers, output / "results.png")
    heading(f"6. Adapters, results.json and results.png are in {output}")


def _format(table: dict[str, dict[str, float]], sizes: dict[str, int]) -> str:
    choices = list(next(iter(table.values())))
    width = max(10, *(len(choice) + 2 for choice in choices))
    lines = [f"{'accuracy':16s}" + "".join(f"{choice:>{width}s}" for choice in choices)]
    for task, row in table.items():
        best = max(row.values())
        cells = "".join(f"{f'{value:.2f}' + ('*' if value == best else ' '):>{width}s}" for value in row.values())
        lines.append(f"{f'{task} ({sizes[task]})':16s}{cells}")
    return "\n".join(lines)


def _plot(numbers: dict[str, Any], path: Path) -> None:
    live, table = numbers["live"], numbers["accuracy"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=(1, 1.4), layout="constrained")
    rewards = [entry["reward"] for entry in live["history"] if "reward" in entry]
    left.plot(range(1, len(rewards) + 1), rewards, label="mean reward of the samples")
    left.axhline(live["accuracy_before"], ls=":", c="gray", label="held out, greedy, before")
    left.axhline(live["accuracy_after"], ls="--", c="tab:green", label="held out, greedy, after")
    left.set(xlabel="GRPO step", ylabel="accuracy", ylim=(0, 1.03), title=f"Live expert: {live['task']}")
    left.legend(fontsize="small")
    values = np.array([list(row.values()) for row in table.values()])
    right.imshow(values, vmin=0, vmax=1, cmap="Greens", aspect="auto")
    right.set_xticks(range(values.shape[1]), list(next(iter(table.values()))), rotation=20)
    right.set_yticks(range(values.shape[0]), [f"{task}\n({numbers['held_out_questions'][task]})" for task in table])
    for (row, column), value in np.ndenumerate(values):
        right.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "black")
    right.set_title("Held-out accuracy: task × weights")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
