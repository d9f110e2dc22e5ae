"""Claim: a GRPO update with SVF, from rollout to optimizer step, takes no longer than one with LoRA.

    python benchmarks/grpo_update.py [--samples N] [--micro-batch N] [--new-tokens N] [--methods NAME ...]

TRL's GRPOTrainer with 64 samples in groups of 8, backward in pieces of 16 unless told otherwise, and no KL term. Every
completion has the full 64 tokens, so that both methods do the same work, and rewards are random. The two trainers take
turns, a step each; the first step of each is dropped.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from common import (
    LORA,
    METHODS,
    Base,
    Record,
    argument_parser,
    as_trained,
    folded,
    folding,
    interleaved,
    load_base,
    load_tokenizer,
    nullcontext,
    parse,
    peft_config,
    ratios,
    spread,
    stand_in_vectors,
    synchronize,
    typical,
)
from torch import nn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from peft_svf.training import find_task


def random_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    return [random.random() for _ in completions]


def make_trainer(base: Base, method: str, arguments: argparse.Namespace, tokenizer: Any, folder: str) -> Any:
    gpu = base.device.type == "cuda"
    samples, new_tokens = arguments.samples, arguments.new_tokens
    micro_batch = min(arguments.micro_batch, samples)
    with stand_in_vectors() if base.random else nullcontext():
        trainer = GRPOTrainer(
            base.copy(),
            reward_funcs=random_reward,
            args=GRPOConfig(
                output_dir=folder,
                max_steps=1,
                learning_rate=1e-3,
                lr_scheduler_type="constant",
                per_device_train_batch_size=micro_batch,
                gradient_accumulation_steps=samples // micro_batch,
                num_generations=8,
                max_completion_length=new_tokens,
                generation_kwargs={"min_new_tokens": new_tokens},
                beta=0.0,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                use_cpu=not gpu,
                bf16=gpu,
                gradient_checkpointing=False,
            ),
            train_dataset=find_task("reasoning_gym:chain_sum?max_terms=2&max_digits=1").examples("train", 256),
            processing_class=tokenizer,
            peft_config=peft_config(method, base),
        )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    as_trained(trainer.model)
    return trainer


class StepClock(TrainerCallback):
    """How long each step takes, from before the rollout to after the update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize()
        self.seconds.append(time.perf_counter() - self.start)


def main() -> None:
    parser = argument_parser(__doc__, rounds=2)
    parser.add_argument("--samples", type=int, help="per update (default: 64; quick: 8)")
    parser.add_argument("--micro-batch", type=int, default=16, help="per backward (default: 16)")
    parser.add_argument("--methods", nargs="+", default=["svf", LORA], choices=METHODS[:6], metavar="NAME")
    parser.add_argument("--new-tokens", type=int, help="default: 64; quick: 8")
    arguments = parse(parser)
    arguments.samples = arguments.samples or (8 if arguments.quick else 64)
    arguments.new_tokens = arguments.new_tokens or (8 if arguments.quick else 64)
    record = Record(arguments, __doc__)
    base, tokenizer = load_base(arguments), load_tokenizer(arguments)
    models: dict[str, nn.Module] = {}
    clocks = {method: StepClock() for method in arguments.methods}

    def make(method: str, folder: str) -> Callable[[], object]:
        trainer = make_trainer(base, method, arguments, tokenizer, folder)
        models[method] = trainer.model
        trainer.add_callback(clocks[method])
        trainer.train()  # one step
        return trainer.train

    with tempfile.TemporaryDirectory() as folder:
        interleaved({method: partial(make, method, folder) for method in clocks}, arguments.rounds)
    times = {method: clock.seconds[1:] for method, clock in clocks.items()}
    counts = {method: folded(model) for method, model in models.items()}
    relative = ratios(times, LORA)
    rows = [
        [method, f"{relative.get(method, float('nan')):.2f}", typical(values), spread(values), str(len(values))]
        for method, values in times.items()
    ]
    title = f"GRPO update, {base.label}, {arguments.samples} samples of {arguments.new_tokens} tokens"
    record.table(title, ["", f"times {LORA}", "median", "range", "timed"], rows, folding(counts))
    dropped = {method: clock.seconds[0] for method, clock in clocks.items()}
    record.raw(seconds=times, ratios=relative, dropped=dropped, folded=counts)
    record.write()


if __name__ == "__main__":
    main()
