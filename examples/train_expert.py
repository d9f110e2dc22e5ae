"""Train one expert vector by reinforcement learning: TRL's GRPOTrainer with `peft_config=SVFConfig(...)`.

    python examples/train_expert.py sums --output examples/experts/sums

made the experts in `examples/experts/`, each with the settings of its task in `RECIPES`. Simpler than a real training
run: no KL term (`beta=0`), no validation, a learning rate that falls linearly to 0; the last δ is the expert.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from huggingface_hub.utils import tqdm
from smollm2 import BASE_NAME, load_model
from tasks import TASKS, reward
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from peft_svf import SVFConfig
from peft_svf.adaptation import RewardObjective

MAX_NEW_TOKENS = 8


@dataclass(frozen=True)
class Recipe:
    """How long, how fast, and how many completions per step (in groups of `num_generations` per prompt)."""

    steps: int = 16
    learning_rate: float = 3e-3
    batch_size: int = 64
    num_generations: int = 8
    seed: int = 0


# at 3e-3 retrieval climbs to a reward of 0.56 and falls back to 0.23
RECIPES = {name: Recipe() for name in TASKS} | {
    "products": Recipe(steps=12),
    "retrieval": Recipe(learning_rate=2e-3),
}


class RewardBar(TrainerCallback):
    """A progress bar with the mean reward, and a record of it, in place of TRL's tables."""

    def __init__(self, description: str) -> None:
        self.description = description
        self.rewards: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(desc=self.description, total=state.max_steps, unit="step")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "reward" in logs:
            self.rewards.append(float(logs["reward"]))
            self.bar.set_postfix(reward=f"{self.rewards[-1]:.2f}")
            self.bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def accuracy(model: Any, tokenizer: Any, examples: Any, batch_size: int = 32) -> float:
    """Share of the examples that greedy decoding answers correctly."""
    model.eval()
    objective = RewardObjective(
        examples, reward, tokenizer, batch_size=batch_size, generation_kwargs={"max_new_tokens": MAX_NEW_TOKENS}
    )
    scores = objective(model)
    return sum(scores) / len(scores)


def train_expert(model: Any, tokenizer: Any, task: str, recipe: Recipe) -> tuple[Any, list[float]]:
    """The adapted model, and the mean reward of each step."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = GRPOTrainer(
            model,
            reward_funcs=reward,
            args=GRPOConfig(
                output_dir=scratch,
                max_steps=recipe.steps,
                learning_rate=recipe.learning_rate,
                lr_scheduler_type="linear",
                # one `generate` call for the whole batch, then backward in pieces
                per_device_train_batch_size=16,
                gradient_accumulation_steps=recipe.batch_size // 16,
                num_generations=recipe.num_generations,
                max_completion_length=MAX_NEW_TOKENS,
                beta=0.0,
                seed=recipe.seed,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                # without a GPU: fp32, and no recomputation
                use_cpu=not torch.cuda.is_available(),
                bf16=torch.cuda.is_available(),
                gradient_checkpointing=False,
            ),
            train_dataset=TASKS[task].examples("train", 2000),
            processing_class=tokenizer,
            peft_config=SVFConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        bar = RewardBar(f"Training an expert for {task}")
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(bar)
        trainer.train()
    return trainer.model, bar.rewards


def save_expert(model: Any, folder: Path, base: str | None = None) -> None:
    """Save the adapter, naming the base model: `base`, or the demo's own instead of its folder on this machine."""
    model.peft_config["default"].base_model_name_or_path = base or BASE_NAME
    model.save_pretrained(str(folder), save_embedding_layers=False)


def write_card(folder: Path, task: str, recipe: Recipe, record: dict[str, Any], base: str | None = None) -> None:
    """The model card: what it is, how to load it, recipe, numbers, plot."""
    loaded = (
        f"`base_model` is {base}."
        if base
        else "`base_model` is the dequantized GGUF, as `examples/smollm2.py` loads it; on the original checkpoint,\n"
        "which has other weights, loading is refused."
    )
    spec = TASKS[task]
    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    axes.plot(range(1, len(record["rewards"]) + 1), record["rewards"], label="mean reward of the samples")
    axes.axhline(record["accuracy_before"], ls=":", c="gray", label="greedy, base model")
    axes.axhline(record["accuracy_after"], ls="--", c="tab:green", label="greedy, expert (held out)")
    axes.set(xlabel="step", ylabel="accuracy", ylim=(0, 1.02), title=task)
    axes.legend(fontsize="small")
    figure.savefig(folder / "curve.png", dpi=110)
    plt.close(figure)
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    example = spec.examples("test", 1)[0]
    settings = ", ".join(f"{key}={value}" for key, value in spec.settings.items())
    (folder / "README.md").write_text(f"""---
library_name: peft
license: apache-2.0
base_model: {base or "HuggingFaceTB/SmolLM2-135M-Instruct"}
tags: [peft, svf, transformer-squared, grpo, reasoning-gym]
---
# SVF expert: {task}

An expert vector for {base or BASE_NAME},
trained by GRPO on reasoning-gym's `{spec.dataset}` ({settings}).

> {example["prompt"][-1]["content"]}
>
> {example["completion"][0]["content"]}

Greedy accuracy on {record["test_questions"]} held-out questions: **{record["accuracy_before"]:.2f}** before,
**{record["accuracy_after"]:.2f}** after.

![reward per step](curve.png)

```python
import peft_svf  # registers SVF with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "{folder.as_posix()}")
```

{loaded}

Recipe: `python examples/train_expert.py {task}` — {recipe.steps} steps of {recipe.batch_size} samples
({recipe.num_generations} per prompt), learning rate {recipe.learning_rate} falling linearly to 0, no KL term,
seed {recipe.seed}, system message "{spec.system}", at most {MAX_NEW_TOKENS} new tokens.
{record["trainable"]:,} trainable numbers, {record["seconds"]:.0f} s on {record["machine"]}.
""")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--output", type=Path, help="folder of the expert (default: outputs/experts/TASK)")
    parser.add_argument("--model", help="Hub id or folder (default: SmolLM2-135M-Instruct from the wheel)")
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), help="default: that of the task")
    arguments = parser.parse_args()
    changes = {name: getattr(arguments, name) for name in asdict(Recipe()) if getattr(arguments, name) is not None}
    recipe = Recipe(**{**asdict(RECIPES[arguments.task]), **changes})
    folder = arguments.output or Path("outputs/experts") / arguments.task

    model, tokenizer = load_model(arguments.model)
    test = TASKS[arguments.task].examples("test", 128)
    before = accuracy(model, tokenizer, test)
    start = time.perf_counter()
    model, rewards = train_expert(model, tokenizer, arguments.task, recipe)
    seconds = time.perf_counter() - start
    after = accuracy(model, tokenizer, test)
    print(f"{arguments.task}: greedy accuracy on {len(test)} held-out questions {before:.3f} -> {after:.3f}")
    save_expert(model, folder, arguments.model)
    record = {
        "task": arguments.task,
        "recipe": asdict(recipe),
        "test_questions": len(test),
        "accuracy_before": before,
        "accuracy_after": after,
        "rewards": rewards,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": round(seconds, 1),
        "machine": f"{os.cpu_count()} cores, torch {torch.__version__}, {platform.machine()}",
    }
    write_card(folder, arguments.task, recipe, record, arguments.model)
    print(f"saved in {folder}")


if __name__ == "__main__":
    main()
