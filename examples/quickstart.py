"""The whole of Transformer² on a laptop: train an expert by RL, save it, reload it, mix it with others.

   make demo            # or: python examples/quickstart.py [--quick] [--model NAME] [--output FOLDER]

1. trains an expert for one-digit products live, with TRL's GRPOTrainer;
2. saves it and reloads it into a fresh base model;
3. loads it beside the experts in examples/experts/ (with --model it trains such, as those are for other weights);
3. loads it beside the experts in examples/experts/ (with --model it trains some, as those do not fit);
   in other words, so that no expert alone is made for it;
5. prints one table, task by choice of weights, on held-out questions, whichever wins;
6. leaves the adapters, all numbers as JSON and a plot in the output folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from huggingface_hub.utils import tqdm
from peft import PeftModel
from smollm2 import load_model
from tasks import TASKS, reward
from train_expert import MAX_NEW_TOKENS, RECIPES, Recipe, accuracy, save_expert, train_expert

from peft_svf import AdaptiveMixture

LIVE_TASK = "products"
UNSEEN_TASK = "arithmetic"
SHOTS = 12
SHIPPED = Path(__file__).parent / "experts"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder (default: SmolLM2-135M-Instruct from the wheel)")
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, in three minutes")
    arguments = parser.parse_args()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(steps=4) if arguments.quick else RECIPES[LIVE_TASK]
    test_size, generations, population = (16, 2, 4) if arguments.quick else (64, 6, 8)
    numbers: dict[str, Any] = {"quick": arguments.quick, "model": arguments.model, "machine": _machine()}
    start = time.perf_counter()

    def heading(text: str) -> None:
        print(f"\n[{time.perf_counter() - start:4.0f} s] {text}", flush=True)

    heading(f"1. Train an expert for {LIVE_TASK}")
    model, tokenizer = load_model(arguments.model)
    test = {name: TASKS[name].examples("test", test_size) for name in TASKS}
    before = accuracy(model, tokenizer, test[LIVE_TASK])
    print(f"greedy accuracy on {len(test[LIVE_TASK])} held-out questions before: {before:.2f}", flush=True)
    trained, rewards = train_expert(model, tokenizer, LIVE_TASK, recipe)
    after = accuracy(trained, tokenizer, test[LIVE_TASK])
    print(f"greedy accuracy on {len(test[LIVE_TASK])} held-out questions after:  {after:.2f}", flush=True)

    heading("2. Save it, and reload it into a fresh base model")
    expert = output / LIVE_TASK
    save_expert(trained, expert, arguments.model)
    fresh, _ = load_model(arguments.model)
    reloaded = accuracy(PeftModel.from_pretrained(fresh, str(expert)), tokenizer, test[LIVE_TASK])
    size = (expert / "adapter_model.safetensors").stat().st_size
    print(f"{expert}: {size / 1000:.0f} kB, greedy accuracy after reloading: {reloaded:.2f}", flush=True)

    heading("3. Load it beside other experts")
    others = {path.name: path for path in sorted(SHIPPED.iterdir()) if path.is_dir()}
    if arguments.model:
        # those in examples/experts are for the weights of the demo's own model
        others = {task: output / task for task in others}
        for task, folder in others.items():
            fresh, _ = load_model(arguments.model)
            save_expert(train_expert(fresh, tokenizer, task, recipe)[0], folder, arguments.model)
    experts = {LIVE_TASK: str(expert), **{task: str(folder) for task, folder in others.items()}}
    fresh, _ = load_model(arguments.model)
    mixture = AdaptiveMixture.from_pretrained(fresh, experts, tokenizer=tokenizer)
    print("experts:", ", ".join(mixture.experts), flush=True)

    heading(f"4. Search a mixture for {UNSEEN_TASK}, which none was trained on, from {SHOTS} examples")
    result = mixture.search(
        TASKS[UNSEEN_TASK].examples("train", SHOTS),
        reward_funcs=reward,
        num_generations=generations,
        population_size=population,
        generation_kwargs={"max_new_tokens": MAX_NEW_TOKENS},
    )
    print(result, flush=True)
    mixture.save_pretrained(output / "mixture")

    heading("5. All of them, on held-out questions")
    count = len(mixture.experts)
    choices: dict[str, Any] = {
        "base": np.zeros(count),
        **dict(zip(mixture.experts, np.eye(count), strict=True)),
        "uniform": np.full(count, 1 / count),
        "searched": result.searched_weights,
    }
    tasks = [*[name for name in mixture.experts if name in TASKS], UNSEEN_TASK]
    table: dict[str, dict[str, float]] = {task: {} for task in tasks}
    with tqdm(desc="Evaluating", total=len(tasks) * len(choices), unit="cell") as bar:
        for choice, weights in choices.items():
            mixture.set_weights(weights)
            for task in tasks:
                table[task][choice] = accuracy(mixture.model, tokenizer, test[task])
                bar.update()
    mixture.set_weights(result.weights)
    sizes = {task: len(test[task]) for task in tasks}
    print(_format(table, sizes))
    print(f"\n{UNSEEN_TASK} is the unseen task; the search kept {result.choice!r}.")

    example = test[UNSEEN_TASK][0]["prompt"]
    inputs = tokenizer.apply_chat_template(example, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    reply = mixture.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    text = tokenizer.decode(reply[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"For example: {example[-1]['content']!r} -> {text!r}")

    numbers |= {
        "live": {"task": LIVE_TASK, "before": before, "after": after, "reloaded": reloaded, "rewards": rewards},
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
    left.plot(range(1, len(live["rewards"]) + 1), live["rewards"], label="mean reward of the samples")
    left.axhline(live["before"], ls=":", c="gray", label="held out, greedy, before")
    left.axhline(live["after"], ls="--", c="tab:green", label="held out, greedy, after")
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


def _machine() -> dict[str, Any]:
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "trl", "peft-svf")}
    return {"cores": os.cpu_count(), "platform": platform.machine(), "load": os.getloadavg()[0], **packages}


if __name__ == "__main__":
    main()
