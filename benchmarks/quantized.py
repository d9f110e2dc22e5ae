"""Question: does an expert that was trained on the full-precision model still help on a quantized one?

    python benchmarks/quantized.py [--kinds nf4 int8] [--tasks sums lists] [--only-report]

For each kind of bitsandbytes and each task: the accuracy of the quantized base model, of the shipped expert on it with
a basis pack, and of an expert that was trained on it by the same recipe (which is stored in benchmarks/quantized_runs
and not trained again); beside them those of the full-precision model. Then what the fingerprint says of the shipped
expert where the rounded weights are decomposed instead.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import Record, argument_parser, parse
from peft import PeftModel
from smollm2 import model_name
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from peft_svf import SVFConfig, SVFRuntimeConfig
from peft_svf.interop import decompose
from peft_svf.training.evaluation import greedy_accuracy
from peft_svf.training.run import recipe_task

ROOT = Path(__file__).parents[1]
RUNS = Path(__file__).parent / "quantized_runs"
SIZE, BATCH = 128, 32
KINDS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "full precision": ([], {}),
    "int8": (["--load_in_8bit", "true"], {"load_in_8bit": True}),
    "nf4": (
        ["--load_in_4bit", "true", "--bnb_4bit_quant_type", "nf4"],
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    ),
}


def main() -> None:
    parser = argument_parser(__doc__, rounds=1)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS)[1:], default=["nf4", "int8"])
    parser.add_argument("--tasks", nargs="+", default=["sums", "lists"])
    parser.add_argument("--only-report", action="store_true", help="train nothing")
    arguments = parse(parser)
    record = Record(arguments, __doc__)
    pack = Path(os.environ.get("TMPDIR", "/tmp"), "smollm2-basis")
    decompose(model_name(), pack)
    rows = []
    for task in arguments.tasks:
        for kind in ["full precision", *arguments.kinds]:
            own = RUNS / f"{kind}-{task}"
            if kind != "full precision" and not (own / "training.json").exists() and not arguments.only_report:
                train(kind, task, own, pack)
            rows.append([task, kind, *measure(kind, task, own, pack)])
            record.raw(rows=rows)
            print(rows[-1], flush=True)
    record.table(
        f"greedy accuracy on up to {SIZE} held-out questions",
        ["task", "base model", "without expert", "shipped expert", "expert trained on it", "without a pack"],
        rows,
    )
    record.write()


def load(kind: str) -> Any:
    options = {"quantization_config": BitsAndBytesConfig(**KINDS[kind][1])} if KINDS[kind][1] else {}
    return AutoModelForCausalLM.from_pretrained(model_name(), dtype=torch.float32, device_map="cpu", **options)


def train(kind: str, task: str, output: Path, pack: Path) -> None:
    """By the recipe of the shipped expert, from the command line."""
    folder = output.with_name(output.name + ".unfinished")
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "peft_svf.training.run", "--config", f"examples/recipes/{task}.yaml"]
    command += ["--model_name_or_path", model_name(), "--output_dir", str(folder), *KINDS[kind][0]]
    command += ["--peft_kwargs", json.dumps({"runtime_config": {"basis": str(pack)}})]
    command += ["--base_model_name", f"SmolLM2-135M-Instruct, {kind}", "--test_size", str(SIZE)]
    subprocess.run(command, check=True, cwd=ROOT)
    output.mkdir(parents=True, exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors", "training.json"):
        shutil.move(folder / name, output / name)
    shutil.rmtree(folder)


def measure(kind: str, name: str, own: Path, pack: Path) -> list[str]:
    """The accuracies without expert, with the shipped one, with its own; and the error without a pack."""
    tokenizer = AutoTokenizer.from_pretrained(model_name())
    task = recipe_task(ROOT / "examples" / "recipes" / f"{name}.yaml")
    examples = task.examples("test", SIZE)
    shipped = ROOT / "examples" / "experts" / name

    def config(path: Path, **runtime: Any) -> Any:
        return SVFConfig.from_pretrained(path, runtime_config=SVFRuntimeConfig(**runtime))

    error = ""
    if kind != "full precision":
        try:
            PeftModel.from_pretrained(load(kind), shipped, config=config(shipped, decompose_quantized=True))
        except ValueError as refused:
            error = str(refused).partition(", the first is")[0]
    runtime = {"basis": str(pack)} if kind != "full precision" else {}
    model = PeftModel.from_pretrained(load(kind), shipped, adapter_name="shipped", config=config(shipped, **runtime))
    tokens = json.loads((shipped / "training.json").read_text())["recipe"]["max_completion_length"]

    def accuracy() -> str:
        found = greedy_accuracy(model, tokenizer, examples, task.reward, batch_size=BATCH, max_new_tokens=tokens)
        return f"{found:.3f}"

    with model.disable_adapter():
        found = [accuracy()]
    found.append(accuracy())
    if (own / "training.json").exists():
        model.load_adapter(own, adapter_name="own", config=config(own, **runtime))
        model.set_adapter("own")
        found.append(accuracy())
    else:
        found.append("")
    return [*found, error]


if __name__ == "__main__":
    main()
