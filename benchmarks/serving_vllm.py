"""Claim: an engine serves many experts in one batch for little more than one, and the base model as before.

    python benchmarks/serving_vllm.py PYTHON_OF_VLLM [--quick] [--output docs/results/serving-vllm.md]

`make test-vllm` makes that Python. The same requests go to an engine without experts and to engines with them: base
rows, one expert, four experts in one batch and in turn, and one folded expert. Without --quick also experts with
r = k/4, and 256 resident experts. CPU seconds are those of all processes of the engine. Wall time is only comparable on
an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from smollm2 import model_name

ROOT = Path(__file__).parents[1]
EXPERTS = ("sums", "lists", "letters", "retrieval")
REQUESTS, TOKENS, TIMES = 32, 32, 2
HIDDEN = 576
ENGINE = {"enforce_eager": True, "max_num_seqs": 32, "enable_prefix_caching": False}


def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(model_name())
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"What is {17 * i + 3} + {23 * i + 5}? Answer with the number."}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for i in range(REQUESTS)
    ]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def narrow(folder: Path, r: int) -> dict[str, str]:
    """The experts with their r leading singular values only."""
    for name in EXPERTS:
        source, target = ROOT / "examples" / "experts" / name, folder / name
        target.mkdir()
        config = json.loads((source / "adapter_config.json").read_text())
        numbers = {module: each[:4] for module, each in config["base_fingerprint"].items()}
        (target / "adapter_config.json").write_text(json.dumps({**config, "r": r, "base_fingerprint": numbers}))
        tensors = load_file(source / "adapter_model.safetensors")
        save_file({key: t[:r].clone() for key, t in tensors.items()}, target / "adapter_model.safetensors")
    return {name: str(folder / name) for name in EXPERTS}


def engine(python: str, work: Path, steps: list[Any], serving: dict[str, Any] | None) -> list[Any]:
    job = {"model": model_name(), "serving": serving, "engine": ENGINE, "steps": steps}
    (work / "job.json").write_text(json.dumps(job))
    script = ROOT / "tests" / "vllm_serving" / "engine.py"
    command = [python, str(script), str(work / "job.json"), str(work / "results.json")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    if done.returncode:
        sys.exit(f"vLLM failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    found: list[Any] = json.loads((work / "results.json").read_text())
    return found


def measure(python: str, work: Path, quick: bool) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    asked = prompts()

    def generate(*names: str, kind: str = "generate") -> dict[str, Any]:
        rows = [names[i % len(names)] for i in range(REQUESTS)]
        times = {"times": 1 if quick else TIMES} if kind == "generate" else {}
        return {"do": kind, "prompts": asked, "names": rows, "tokens": TOKENS, **times}

    shipped = {name: str(ROOT / "examples" / "experts" / name) for name in EXPERTS}
    many = {f"copy{i}": {EXPERTS[i % 4]: 1.0 + i / 1000} for i in range(252)}
    warm = {**generate(""), "times": 1}
    _, _, plain = engine(python, work, [warm, generate("")], None)
    add = {"do": "add", "experts": shipped}
    steps = [
        add,
        warm,
        generate(""),
        generate("sums"),
        generate(*EXPERTS),
        generate(*EXPERTS, kind="one_by_one"),
        {"do": "fold", "name": "sums"},
        generate("sums"),
    ]
    start, _, _, base, one, mixed, in_turn, fold_seconds, folded = engine(python, work, steps, {"slots": 8})
    rows = {
        "engine without experts": plain,
        "base rows": base,
        "one expert": one,
        "four experts in one batch": mixed,
        "four experts in turn": in_turn,
        "one expert, folded": folded,
    }
    more = {"fold seconds": fold_seconds, "start seconds": start}
    if quick:
        return rows, more
    (work / "narrow").mkdir()
    steps = [{"do": "add", "experts": narrow(work / "narrow", HIDDEN // 4)}, warm, generate(*EXPERTS)]
    *_, quarter = engine(python, work, steps, {"slots": 8, "r": HIDDEN // 4})
    steps = [add, {"do": "add", "experts": many}, warm, generate(*list(many)[:32]), {"do": "memory"}]
    *_, residents, (memory,) = engine(python, work, steps, {"slots": 256})
    rows["four experts in one batch, r = k/4"] = quarter
    rows["32 mixtures in one batch, 256 resident"] = residents
    return rows, {**more, **memory}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("python")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    load, times = os.getloadavg()[0], 1 if arguments.quick else TIMES
    with tempfile.TemporaryDirectory() as folder:
        rows, more = measure(arguments.python, Path(folder), arguments.quick)
    base = rows["engine without experts"]["cpu"]
    lines = [
        f"{REQUESTS} requests of {TOKENS} tokens, mean of {times} runs. {os.cpu_count()} CPU cores, load "
        f"{load:.1f} before and {os.getloadavg()[0]:.1f} after.",
        "",
        "| requests | CPU seconds | tokens per CPU second | relative to an engine without experts | wall seconds |",
        "|---|---|---|---|---|",
        *(
            f"| {title} | {row['cpu']:.2f} | {REQUESTS * TOKENS / row['cpu']:.0f} | {base / row['cpu']:.2f} | "
            f"{row['wall']:.1f} |"
            for title, row in rows.items()
        ),
        "",
        "| figure | value |",
        "|---|---|",
        *(
            f"| {name} | {value:.1f} |" if isinstance(value, float) else f"| {name} | {value} |"
            for name, value in more.items()
        ),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
