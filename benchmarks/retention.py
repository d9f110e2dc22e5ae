"""Question: do answers on earlier tasks stay the same when tasks are added?

    python benchmarks/retention.py [--steps 20] [--questions 48]    # writes docs/results/retention.md

Two ways to give one model four tasks, one after the other:

- A library of the shipped experts. After each expert is added, the library is loaded anew, and the first expert answers
  the same questions greedily. Tokens and logits are compared bit for bit.
- One LoRA adapter, trained by SFT on the tasks in turn, as one would do without a library. After each task it answers
  questions of all tasks that it has seen.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import Record, argument_parser, load_model, parse
from peft import LoraConfig, get_peft_model
from smollm2 import model_name

from peft_svf import AdaptiveMixture, ExpertLibrary, greedy_accuracy
from peft_svf.scoring.tokens import padded, prompt_ids
from peft_svf.training.recipe import recipe_answer_length, recipe_task

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results" / "retention.md"
TASKS = ("sums", "lists", "letters", "retrieval")  # in the order in which they are added
RATE, ROWS = 1e-3, 8  # learning rate and pairs per step of the LoRA adapter


def main() -> None:
    parser = argument_parser(__doc__, rounds=1)
    parser.add_argument("--steps", type=int, default=20, help="SFT steps per task (default: 20)")
    parser.add_argument("--questions", type=int, default=48, help="questions per task (default: 48)")
    arguments = parse(parser)
    if arguments.quick:
        arguments.steps, arguments.questions = 1, 4
    record = Record(arguments, __doc__)
    start = time.process_time()
    recipes = {name: ROOT / "examples" / "recipes" / f"{name}.yaml" for name in TASKS}
    tasks = {name: recipe_task(recipe) for name, recipe in recipes.items()}
    lengths = {name: recipe_answer_length(recipe) for name, recipe in recipes.items()}
    questions = {name: list(task.examples("test", arguments.questions)) for name, task in tasks.items()}

    def accuracy(model: Any, tokenizer: Any, name: str) -> float:
        return greedy_accuracy(model, tokenizer, questions[name], tasks[name].reward, max_new_tokens=lengths[name])

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        first: dict[str, Any] = {}
        for count, name in enumerate(TASKS, 1):
            files = digests(Path(folder))
            with ExpertLibrary.edit(folder) as library:
                library.add(name, ROOT / "examples" / "experts" / name)
            assert all(
                digests(Path(folder))[file] == digest for file, digest in files.items() if file != "library.json"
            )
            mixture = AdaptiveMixture.from_pretrained(model_name(), library, dtype=torch.float32)
            mixture.model.set_adapter(TASKS[0])
            found = answers(mixture.model, mixture.tokenizer, questions[TASKS[0]], lengths[TASKS[0]])
            equal = "the reference" if not first else "equal" if found == first else "DIFFERENT"
            first = first or found
            rows.append([f"{count}: + {name}", f"{accuracy(mixture.model, mixture.tokenizer, TASKS[0]):.3f}", equal])
            print(rows[-1], flush=True)
    record.table(
        "A library", ["experts", f"accuracy of the expert on {TASKS[0]}", "its tokens and logits"], rows, text_columns=1
    )

    model, tokenizer = load_model(None)
    lora = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    scores = [["none", *(f"{accuracy(lora, tokenizer, name):.3f}" for name in TASKS)]]
    print(scores[-1], flush=True)
    for count, name in enumerate(TASKS, 1):
        train(lora, tokenizer, list(tasks[name].examples("train", arguments.steps * ROWS)))
        seen = [f"{accuracy(lora, tokenizer, each):.3f}" for each in TASKS[:count]]
        scores.append([f"{count}: + {name}", *seen, *[""] * (len(TASKS) - count)])
        print(scores[-1], flush=True)
    record.table("One LoRA adapter, trained on the tasks in sequence", ["trained on", *TASKS], scores)
    record.raw(steps=arguments.steps, questions={name: len(its) for name, its in questions.items()})
    record.raw(cpu_seconds=time.process_time() - start)
    record.write()
    if not arguments.quick:
        PAGE.write_text(page(record.content), encoding="utf-8")


def digests(folder: Path) -> dict[str, str]:
    """Return a hash of each file of the experts in a library."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


@torch.no_grad()
def answers(model: Any, tokenizer: Any, rows: list[dict[str, Any]], length: int | None) -> dict[str, Any]:
    """Return the tokens of greedy answers, and a hash of all logits that chose them."""
    batch = padded([prompt_ids(row["prompt"], tokenizer) for row in rows], "left", None, tokenizer, model.device)
    output = model.generate(
        **batch, max_new_tokens=length, do_sample=False, output_logits=True, return_dict_in_generate=True,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    logits = hashlib.sha256(b"".join(step.numpy().tobytes() for step in output.logits)).hexdigest()
    return {"tokens": output.sequences[:, batch["input_ids"].shape[1] :].tolist(), "logits": logits}


def train(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    """Train an adapter on the reference answers: AdamW with a linear schedule, one pass, the loss on the answers."""
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=RATE, weight_decay=0)
    steps = len(rows) // ROWS
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for step in range(steps):
        part = rows[step * ROWS : (step + 1) * ROWS]
        asked = [prompt_ids(row["prompt"], tokenizer) for row in part]
        whole = [
            ids + tokenizer(str(row["answer"]), add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            for ids, row in zip(asked, part, strict=True)
        ]
        batch = padded(whole, "right", None, tokenizer, model.device)
        labels = torch.full_like(batch["input_ids"], -100)
        for i, (ids, all_ids) in enumerate(zip(asked, whole, strict=True)):
            labels[i, len(ids) : len(all_ids)] = torch.tensor(all_ids[len(ids) :])
        model(**batch, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def page(content: dict[str, Any]) -> str:
    """Return the page of the results."""
    raw = content["raw"]
    library, lora = (table(each) for each in content["tables"])
    counts = ", ".join(f"{count} of {name}" for name, count in raw["questions"].items())
    return f"""# What happens to earlier tasks when tasks are added

Written by `benchmarks/retention.py`; do not edit.
SmolLM2-135M-Instruct in fp32. Greedy answers to held-out questions: {counts}.

## A library of experts

{library}

The first expert answers the same questions after each expert is added. The adapter files of earlier experts are
compared as well: none changes.

## One LoRA adapter, trained on the tasks in sequence

{lora}

LoRA r=16 on all linear layers, SFT with {raw["steps"]} steps of {ROWS} pairs per task, learning rate {RATE:g}.
Each row is the accuracy on the tasks seen so far.

Earlier answers stay the same because each task has separate parameters. LoRA adapters that are kept apart have the same
property. One SVF expert that is trained on several tasks in turn has no such guarantee.

{raw["cpu_seconds"] / 60:.0f} minutes of CPU time, {content["machine"]["threads"]} thread,
{content["machine"]["cpu"]}.
"""


def table(content: dict[str, Any]) -> str:
    lines = [content["header"], ["---"] * len(content["header"]), *content["rows"]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    main()
