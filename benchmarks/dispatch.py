"""Question: do prompts find their expert, and what do the two passes cost?

    python benchmarks/dispatch.py [--size N] [--parts accuracy passes batch memory]

The shipped experts' own tasks (held-out questions) and two foreign ones, mixed: where each dispatcher sends the
questions, and how many are then answered rightly. Then the time of the passes for 32 prompts and 64 new tokens; one
mixed batch against one batch for each expert; and the memory of 100 experts.
"""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Record, argument_parser, interleaved, load_base, load_tokenizer, parse, spread

from peft_svf import (
    AdaptiveMixture,
    EvaluationTask,
    NearestDispatcher,
    PromptDispatcher,
    SelfAdaptiveModel,
    SVFConfig,
    evaluate,
)
from peft_svf.training import find_task
from peft_svf.training.run import recipe_task

EXAMPLES = Path(__file__).parents[1] / "examples"
EXPERTS = {
    "sums": "sums of small numbers",
    "retrieval": "who in a text does or likes something",
    "lists": "the first or last word of a list",
    "letters": "the first or last letter of a word",
}
LABELS = {"sums": "math", "retrieval": "people", "lists": "list", "letters": "words"}  # as the classifier learned them
FOREIGN = ("reasoning_gym:spell_backward", "reasoning_gym:count_primes")
NEW_TOKENS, LONG = 12, 64


def main() -> None:
    parser = argument_parser(__doc__, rounds=3)
    parser.add_argument("--size", type=int, default=64, help="questions of each task")
    parser.add_argument("--shots", type=int, default=16, help="prompts of each expert as examples")
    parser.add_argument("--parts", nargs="+", default=["accuracy", "passes", "batch", "memory"])
    arguments = parse(parser)
    if arguments.quick:
        arguments.size, arguments.shots = 4, 4
    record = Record(arguments, __doc__)
    base, tokenizer = load_base(arguments), load_tokenizer(arguments)
    paths = {name: str(EXAMPLES / "experts" / name) for name in (*EXPERTS, "classification")}
    mixture = AdaptiveMixture.from_pretrained(base.copy(), paths, tokenizer=tokenizer)
    model = mixture.model
    own = {name: recipe_task(EXAMPLES / "recipes" / f"{name}.yaml") for name in EXPERTS}
    foreign = {spec.partition(":")[2]: find_task(spec, system_prompt="Reply with the answer only.") for spec in FOREIGN}
    tasks = [
        EvaluationTask(name, list(task.examples("test", arguments.size)), task.reward, name if name in own else None)
        for name, task in {**own, **foreign}.items()
    ]
    shots = {name: [row["prompt"] for row in task.examples("train", arguments.shots)] for name, task in own.items()}
    asked = {"experts": EXPERTS, "labels": LABELS}
    plain = {"experts": dict.fromkeys(EXPERTS, ""), "labels": LABELS}
    known = [prompt for its in shots.values() for prompt in its]
    classifies = {**plain, "adapter_name": "classification", "other": False}
    dispatchers: dict[str, Any] = {
        "prompt, with descriptions": PromptDispatcher(model, tokenizer, **asked),
        "prompt": PromptDispatcher(model, tokenizer, **plain),
        "prompt, calibrated": PromptDispatcher(model, tokenizer, **plain, calibrate=known),
        "classification expert": PromptDispatcher(model, tokenizer, **classifies),
        "the same, calibrated": PromptDispatcher(model, tokenizer, **classifies, calibrate=known),
        "nearest": NearestDispatcher(model, tokenizer, shots),
    }
    if "accuracy" in arguments.parts:
        accuracy(record, model, tokenizer, tasks, dispatchers)
    prompts = [row["prompt"] for task in tasks for row in task.examples if task.expert]
    prompts = random.Random(0).sample(prompts, min(32, len(prompts)))
    if "passes" in arguments.parts:
        passes(record, arguments, model, tokenizer, dispatchers, prompts)
    if "batch" in arguments.parts:
        batch(record, arguments, model, tokenizer, dispatchers["nearest"], prompts)
    if "memory" in arguments.parts:
        memory(record, model)
    record.write()


def accuracy(
    record: Record, model: Any, tokenizer: Any, tasks: list[EvaluationTask], dispatchers: dict[str, Any]
) -> None:
    found = evaluate(
        model, tokenizer, tasks, dispatchers, generation_kwargs={"max_new_tokens": NEW_TOKENS}, timed_prompts=0
    )
    names = [*found.tasks, "all"]
    size = len(tasks[0].examples)
    record.table(
        f"share of the prompts that went where they belong, {size} of each task",
        ["", *names],
        [[name, *(f"{shares[task]:.2f}" for task in names)] for name, shares in found.dispatch_accuracy.items()],
        f"The tasks {', '.join(task.name for task in tasks if task.expert is None)} belong to no expert.",
    )
    gain = found.accuracy["oracle"]["all"] - found.accuracy["base"]["all"]
    rows = []
    for name, means in found.accuracy.items():
        low, high = found.intervals[name]["all"]
        share = (means["all"] - found.accuracy["base"]["all"]) / gain
        rows.append([name, *(f"{means[task]:.3f}" for task in names), f"{low:.3f} to {high:.3f}", f"{share:.2f}"])
    record.table("accuracy of the answers", ["", *names, "95 % interval", "of the oracle's gain"], rows)
    record.raw(evaluation=found.to_dict())


def passes(
    record: Record, arguments: Any, model: Any, tokenizer: Any, dispatchers: dict[str, Any], prompts: list[Any]
) -> None:
    options = {"max_new_tokens": LONG, "min_new_tokens": LONG, "do_sample": False}
    rows = []
    for name, dispatcher in dispatchers.items():
        adaptive = SelfAdaptiveModel(model, tokenizer, dispatcher)
        found = [adaptive.chat(prompts, return_details=True, **options).seconds for _ in range(arguments.rounds)]
        first, second = (float(np.median([seconds[key] for seconds in found])) for key in ("first", "second"))
        rows.append([name, f"{first:.2f}", f"{second:.2f}", f"{first / second:.0%}"])
    record.table(
        f"seconds of the passes, {len(prompts)} prompts, {LONG} new tokens",
        ["", "first", "second", "first of second"],
        rows,
    )


def batch(record: Record, arguments: Any, model: Any, tokenizer: Any, dispatcher: Any, prompts: list[Any]) -> None:
    options = {"max_new_tokens": LONG, "min_new_tokens": LONG, "do_sample": False}
    names = list(EXPERTS)
    chosen = [names[i % len(names)] for i in range(len(prompts))]  # as many for each
    texts: dict[str, list[str]] = {}

    class Fixed:
        experts = dispatcher.experts

        def __init__(self, choices: list[str]) -> None:
            self.choices = choices

        def __call__(self, prompts: Any) -> Any:
            from peft_svf import Dispatch

            return Dispatch(names, np.full((len(prompts), len(names)), 1 / len(names)), self.choices)

    def mixed() -> None:
        texts["one batch"] = SelfAdaptiveModel(model, tokenizer, Fixed(chosen)).chat(prompts, **options)

    def grouped() -> None:
        found: list[str] = [""] * len(prompts)
        for name in names:
            rows = [i for i, choice in enumerate(chosen) if choice == name]
            model.set_adapter(name)
            whole = [
                tokenizer.apply_chat_template(prompts[i], tokenize=False, add_generation_prompt=True) for i in rows
            ]
            inputs = tokenizer(whole, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False)
            output = model.generate(**inputs, pad_token_id=tokenizer.pad_token_id, **options)
            answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for i, text in zip(rows, answers, strict=True):
                found[i] = text
        texts["a batch for each expert"] = found

    ways: dict[str, Callable[[], None]] = {"one batch": mixed, "a batch for each expert": grouped}
    times, _ = interleaved({name: (lambda way=way: way) for name, way in ways.items()}, arguments.rounds)
    medians = {name: float(np.median(values)) for name, values in times.items()}
    same = sum(a == b for a, b in zip(*texts.values(), strict=True))
    record.table(
        f"{len(prompts)} prompts for {len(names)} experts, {LONG} new tokens",
        ["", "seconds", "spread"],
        [[name, f"{medians[name]:.2f}", spread(times[name])] for name in ways],
        f"One batch takes {medians['a batch for each expert'] / medians['one batch']:.2f} times less; {same} of "
        f"{len(prompts)} texts are the same.",
    )


def memory(record: Record, model: Any) -> None:
    def resident() -> float:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def deltas() -> int:
        return sum(p.numel() * p.element_size() for name, p in model.named_parameters() if "svf_delta" in name)

    before, held = resident(), deltas()
    for i in range(100):
        model.add_adapter(f"extra-{i}", SVFConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    record.table(
        "100 experts more",
        ["", "MiB"],
        [
            ["of the process", f"{resident() - before:.0f}"],
            ["of their vectors", f"{(deltas() - held) / 2**20:.0f}"],
        ],
    )
    torch.set_grad_enabled(True)


if __name__ == "__main__":
    main()
