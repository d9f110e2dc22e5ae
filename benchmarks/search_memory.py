"""Claim: a search needs little more memory than the model, in 16 bit as in 32 bit.

    python benchmarks/search_memory.py [--experts N] [--shots N] [--new-tokens N]

Two experts with random δ on a model of Qwen2.5-0.5B's shape, 16 examples: the baselines and one generation of a search
by the reward of generated answers. Each dtype has a separate process. The peak is the resident set, model included,
and the time that of the processor.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

from common import Record, argument_parser, load_base, load_tokenizer, parse, stand_in_vectors
from memory import peak, reset_peak
from peft import get_peft_model

from peft_svf import AdaptiveMixture, SVFConfig, SVFRuntimeConfig

DTYPES = ("float32", "bfloat16")


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds, bytes and evaluations of the search in this process."""
    base, tokenizer = load_base(arguments), load_tokenizer(arguments)
    config = {"target_modules": "all-linear", "runtime_config": SVFRuntimeConfig(use_cache=False)}
    names = [f"expert{i}" for i in range(arguments.experts)]
    with stand_in_vectors():
        model: Any = get_peft_model(base.model, SVFConfig(**config), adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, SVFConfig(**config))
    for name, parameter in model.named_parameters():
        if "svf_delta" in name:
            parameter.data.normal_(std=0.05)
    mixture = AdaptiveMixture(model, names, tokenizer=tokenizer)
    questions = [{"prompt": f"How much is {i} + {i + 1}? Give the number only. The answer is "} for i in range(64)]

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [sum(map(ord, text)) % 7 / 7 for text in completions]

    reset_peak(arguments.device)
    start = time.process_time()
    result = mixture.search(
        questions[: arguments.shots],
        reward,
        max_new_tokens=arguments.new_tokens,
        validation=None,
        in_context=False,
        num_generations=1,
        seed=0,
    )
    seconds = time.process_time() - start
    return {"seconds": seconds, "peak": peak(arguments.device), "evaluations": result.usage.evaluations}


def main() -> None:
    parser = argument_parser(__doc__, rounds=1)
    parser.set_defaults(model="qwen2.5-0.5b")
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # the process of one dtype
    arguments = parse(parser)
    if arguments.here:
        print(json.dumps(measure(arguments)))
        return
    if arguments.quick:
        arguments.shots, arguments.new_tokens = 4, 2
    record = Record(arguments, __doc__)
    found: dict[str, dict[str, float]] = {}
    sizes = ["--shots", str(arguments.shots), "--new-tokens", str(arguments.new_tokens)]
    for dtype in DTYPES:
        command = [sys.executable, *sys.argv, *sizes, "--dtype", dtype, "--here"]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            sys.exit(process.stderr)
        found[dtype] = json.loads(process.stdout.splitlines()[-1])
        print(f"  {dtype}", file=sys.stderr, flush=True)
    rows = [
        [
            dtype,
            f"{its['peak'] / 2**30:.2f}",
            f"{its['seconds']:.0f}",
            f"{its['seconds'] / found[DTYPES[0]]['seconds']:.2f}",
        ]
        for dtype, its in found.items()
    ]
    size = f"{arguments.experts} experts, {arguments.shots} examples, {arguments.new_tokens} new tokens"
    title = f"{size}, {arguments.model}, {found[DTYPES[0]]['evaluations']:.0f} evaluations"
    record.table(title, ["", "peak, GiB", "seconds", "time, times float32"], rows)
    record.raw(found=found)
    record.write()


if __name__ == "__main__":
    main()
