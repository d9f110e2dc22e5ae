"""`make test-vllm`: experts in one engine give the tokens of transformers and PEFT, row by row.

    python tests/vllm_serving/experts.py PYTHON_OF_VLLM [NAME_OF_AN_ENGINE ...]

Five shipped experts with full r, eight mixtures and rows of the base model share every batch. A token may differ where
the two best differ by no more than 1e-4 in transformers; what follows it is not compared.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from compare import BASE, Comparison
from peft import PeftModel
from safetensors.torch import load_file, save_file

import peft_svf
from peft_svf.training.run import recipe_task

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from smollm2 import load_model, model_name

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "experts"
EXPERTS = ("sums", "lists", "letters", "retrieval", "classification")
PROMPTS, FEW, TOKENS = 256, 56, 16
PORT = 18427
# Blocks of 32 tokens, so that the short prompts here reach the prefix cache.
EAGER = {"enforce_eager": True, "max_num_seqs": 32, "block_size": 32}


def mixtures() -> dict[str, dict[str, float]]:
    """Eight mixtures of two to four experts, whose weights need not sum to 1."""
    generator = random.Random(0)
    found = {}
    for number in range(8):
        chosen = generator.sample(EXPERTS, generator.choice([2, 3, 4]))
        found[f"mixture{number}"] = {name: round(generator.uniform(-0.3, 1.0), 2) for name in chosen}
    return found


def transformers_model() -> tuple[Any, Any]:
    base, tokenizer = load_model()
    model: Any = PeftModel.from_pretrained(base, FOLDER / EXPERTS[0], adapter_name=EXPERTS[0])
    for name in EXPERTS[1:]:
        model.load_adapter(FOLDER / name, adapter_name=name)
    for name, weights in mixtures().items():
        model.add_weighted_adapter(list(weights), list(weights.values()), name)
    return model.eval(), tokenizer


def prompts(tokenizer: Any) -> list[list[int]]:
    rows = [
        row
        for name in EXPERTS[:4]
        for row in recipe_task(ROOT / "examples" / "recipes" / f"{name}.yaml").examples("test", PROMPTS // 4)
    ]
    texts = [tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True) for row in rows]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def broken_experts(work: Path) -> dict[str, tuple[Any, str]]:
    """What an engine must refuse, and a part of the message."""

    def copy(name: str, change: Any = None) -> Path:
        folder = shutil.copytree(FOLDER / "sums", work / name)
        if change is not None:
            file = folder / "adapter_model.safetensors"
            tensors = load_file(file)
            change(tensors)
            save_file(tensors, file)
        return folder

    def first(tensors: dict[str, torch.Tensor]) -> str:
        return min(tensors)

    cut = copy("cut")
    (cut / "adapter_model.safetensors").write_bytes((cut / "adapter_model.safetensors").read_bytes()[:-1000])
    other = copy("other")
    config = json.loads((other / "adapter_config.json").read_text())
    config["base_fingerprint"] = {
        name: [1.3 * number for number in numbers] for name, numbers in config["base_fingerprint"].items()
    }
    (other / "adapter_config.json").write_text(json.dumps(config))
    return {
        "nan": (str(copy("nan", lambda t: t[first(t)].fill_(float("nan")))), "NaN or Inf"),
        "short": (str(copy("short", lambda t: t.pop(first(t)))), "has no values for 1 of"),
        "cut": (str(cut), "is damaged or cut short"),
        "other": (str(other), "was made for another base model"),
        "missing": (str(work / "nowhere"), "There is no folder"),
        "unknown": ({"sums": 0.5, "nobody": 0.5}, "There is no expert 'nobody'"),
        "strangers": (str(copy("strangers", lambda t: t.update({"lm_head.weight": torch.ones(2)}))), "more than δ"),
    }


class Run:
    """Engines, one after the other, and what must hold of them."""

    def __init__(self, python: str, work: Path) -> None:
        self.python, self.work, self.failed = python, work, 0
        model, tokenizer = transformers_model()
        self.comparison = Comparison(model)
        self.prompts = prompts(tokenizer)
        rows = ["", *EXPERTS, *mixtures()]
        self.names = list(itertools.islice(itertools.cycle(rows), PROMPTS))
        self.add = [
            {"do": "add", "experts": {name: str(FOLDER / name) for name in EXPERTS}},
            {"do": "add", "experts": mixtures()},
        ]

    def engine(
        self, steps: list[Any], *, serving: Any, environment: dict[str, str] | None = None, **engine: Any
    ) -> Any:
        job = {"model": model_name(), "serving": serving, "engine": {**EAGER, **engine}, "steps": steps}
        (self.work / "job.json").write_text(json.dumps(job))
        command = [
            self.python,
            Path(__file__).with_name("engine.py"),
            self.work / "job.json",
            self.work / "results.json",
        ]
        variables = {**self.environment(), **(environment or {})}
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=variables)
        if done.returncode:
            sys.exit(f"vLLM failed:\n{done.stdout[-8000:]}\n{done.stderr[-8000:]}")
        return json.loads((self.work / "results.json").read_text())[1:]

    def environment(self) -> dict[str, str]:
        own = {"PYTHONPATH": str(Path(peft_svf.__file__).parents[1]), "VLLM_CPU_KVCACHE_SPACE": "1"}
        return {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **own}

    def check(self, title: str, holds: bool, more: str = "") -> None:
        self.failed += not holds
        print(f"{'ok  ' if holds else 'FAIL'} {title}{': ' if more else ''}{more}", flush=True)

    def generate(self, count: int = PROMPTS, shift: int = 0, **more: Any) -> dict[str, Any]:
        names = [*self.names[shift:], *self.names[:shift]]
        return {"do": "generate", "prompts": self.prompts[:count], "names": names[:count], "tokens": TOKENS, **more}

    def tokens(self, title: str, step: dict[str, Any], result: Any) -> None:
        names = [name or BASE for name in step["names"]]
        count = self.comparison.count(names, step["prompts"], result["tokens"])
        self.check(title, not count.different, "; ".join([str(count), *count.different[:3]]))

    # ------------------------------------------------------------------------------------------------------- engines

    def eager(self) -> None:
        whole, shifted, again = self.generate(), self.generate(FEW, shift=1), self.generate(FEW)
        base = {**self.generate(FEW), "names": [""] * FEW, "logprobs": 5}
        alone = {**self.generate(FEW), "names": ["letters"] * FEW}
        live = {**self.generate(8), "names": ["live"] * 8}
        broken = broken_experts(self.work)
        changed = shutil.copytree(FOLDER / "sums", self.work / "changed")
        steps = [
            *self.add,
            {"do": "add", "experts": {"changed": str(changed)}},
            whole,
            shifted,
            again,
            base,
            *({"do": "add", "experts": {name: source}, "refused": True} for name, (source, _) in broken.items()),
            {"do": "replace", "file": str(FOLDER / "lists" / "adapter_model.safetensors"), "folder": str(changed)},
            {"do": "add", "experts": {"changed": str(changed)}, "refused": True},
            again,
            {"do": "fold", "name": "letters"},
            alone,
            again,
            {"do": "fold", "name": None},
            {"do": "reset"},
            base,
            {"do": "add", "experts": {"live": None}},
            live,
            {"do": "update", "name": "live", "file": str(FOLDER / "lists" / "adapter_model.safetensors")},
            live,
            {"do": "memory"},
        ]
        results = self.engine(steps, serving={"slots": 16})
        at = results
        self.tokens("256 prompts: 5 experts, 8 mixtures, base rows", whole, at[3])
        self.tokens("the same prompts for other experts", shifted, at[4])
        self.check("a repeated batch hits the prefix cache", at[5]["cached"] > at[3]["cached"], str(at[5]["cached"]))
        self.check("and gives the same tokens", at[5]["tokens"] == at[3]["tokens"][:FEW])
        place = 7
        for name, (_, message) in broken.items():
            error = at[place]["error"] if at[place] else "accepted"
            self.check(f"{name} is refused", message in error, error[:300])
            place += 1
        error = at[place + 1]["error"] if at[place + 1] else "accepted"
        self.check("another expert under a used name is refused", "has changed since" in error, error[:300])
        self.check("the engine lives on", at[place + 2]["tokens"] == at[5]["tokens"])
        self.tokens("one folded expert", alone, at[place + 4])
        self.check("others beside a folded expert", at[place + 5]["tokens"] == at[5]["tokens"])
        self.check("the base model after folding, bit for bit", at[place + 8]["logprobs"] == at[6]["logprobs"])
        zeros, lists = at[place + 10], at[place + 12]
        self.tokens("an expert of zeros", {**live, "names": [""] * 8}, zeros)
        self.tokens("its new δ", {**live, "names": ["lists"] * 8}, lists)
        print("     ", at[place + 13])
        self.base_logprobs = at[6]["logprobs"]

    def plain(self) -> None:
        """An engine that does not ask for experts."""
        base = {**self.generate(FEW), "names": [""] * FEW, "logprobs": 5}
        (found,) = self.engine([base], serving=None)
        if hasattr(self, "base_logprobs"):
            same = found["logprobs"] == self.base_logprobs
            self.check("base rows have the logits of an engine without experts, bit for bit", same)
        self.tokens("an engine without experts", base, found)

    def few_slots(self) -> None:
        """Fewer slots than experts, and less room in host memory."""
        whole = self.generate(128)
        results = self.engine([*self.add, whole, whole, {"do": "memory"}], serving={"slots": 3, "loaded": 9})
        self.tokens("3 slots for 13 experts and mixtures", whole, results[2])
        self.check("and once more", results[3]["tokens"] == results[2]["tokens"], str(results[4]))

    def tensor_parallel(self) -> None:
        """Three processes, as the model has three key and value heads."""
        whole, alone = self.generate(64), {**self.generate(16), "names": ["letters"] * 16}
        steps = [*self.add, whole, {"do": "fold", "name": "letters"}, alone]
        environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # more processes than cores
        results = self.engine(steps, serving={"slots": 16}, tensor_parallel_size=3, environment=environment)
        self.tokens("three processes", whole, results[2])
        self.tokens("three processes, folded", alone, results[4])

    def compiled(self) -> None:
        """vLLM compiles no model with adapters on a CPU; the test turns that off."""
        whole = self.generate(64)
        environment = {"PEFT_SVF_TEST_COMPILED": "1"}
        results = self.engine([*self.add, whole], serving={"slots": 16}, enforce_eager=False, environment=environment)
        self.tokens("compiled", whole, results[2])

    def server(self) -> None:
        """An OpenAI-compatible server: experts and mixtures as models, and folders that clients may not load from."""
        outside = shutil.copytree(FOLDER / "letters", self.work / "outside")
        arguments = [
            *("serve", model_name(), "--served-model-name", "base", "--dtype", "float32", "--max-model-len", "512"),
            *("--enforce-eager", "--max-num-seqs", "32", "--port", str(PORT), "--enable-lora", "--max-loras", "8"),
            *("--additional-config", json.dumps({"peft_svf": {"roots": [str(FOLDER)], "max_mixtures": 2}})),
            *("--lora-modules", *(f"{name}={FOLDER / name}" for name in ("sums", "lists"))),
        ]
        mixtures = {"sums=0.5,lists=0.5": "mixture"}
        command = [self.python, str(Path(__file__).with_name("server.py")), *arguments]
        log = (self.work / "server.log").open("w")
        process = subprocess.Popen(
            command, env={**self.environment(), "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}, stdout=log, stderr=log
        )
        try:
            self.wait_for(process)
            ids = [each["id"] for each in ask("/v1/models")[1]["data"]]
            self.check("the server lists base model and experts", ids == ["base", "sums", "lists"], str(ids))
            names = ["sums", "", "lists", "sums=0.5,lists=0.5"]
            with ThreadPoolExecutor(4) as pool:
                answers = list(pool.map(self.completion, names, self.prompts[:4]))
            self.comparison.model.add_weighted_adapter(["sums", "lists"], [0.5, 0.5], mixtures["sums=0.5,lists=0.5"])
            step = {"names": [mixtures.get(name, name) for name in names], "prompts": self.prompts[:4]}
            self.tokens("the server's answers", step, {"tokens": answers})
            for model in ("nobody", "sums=0.5,nobody=0.5", "sums=nan"):
                code, _ = ask("/v1/completions", model=model, prompt="a", max_tokens=1)
                self.check(f"{model} is not found", code == 404, str(code))
            self.completion("sums=1", self.prompts[0])
            code, _ = ask("/v1/completions", model="sums=2", prompt="a", max_tokens=1)
            self.check("clients may name two mixtures", code == 404, str(code))
            code, answer = ask("/v1/load_lora_adapter", lora_name="outside", lora_path=str(outside))
            message = str(answer)
            self.check("a folder outside of the roots", code >= 400 and "may be loaded from" in message, message[:300])
            code, answer = ask("/v1/load_lora_adapter", lora_name="letters", lora_path=str(FOLDER / "letters"))
            self.check("a folder inside of the roots", code == 200, str(answer)[:300])
            step = {"names": ["letters"], "prompts": self.prompts[:1]}
            self.tokens("an expert loaded by a client", step, {"tokens": [self.completion("letters", self.prompts[0])]})
        finally:
            process.terminate()
            process.wait(60)

    def completion(self, name: str, prompt: list[int]) -> list[int]:
        options = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True}
        code, answer = ask("/v1/completions", model=name or "base", prompt=prompt, **options)
        assert code == 200, answer
        found: list[int] = answer["choices"][0]["token_ids"]
        return found

    def wait_for(self, process: subprocess.Popen[bytes]) -> None:
        for _ in range(600):
            if process.poll() is not None:
                break
            with contextlib.suppress(OSError):
                ask("/v1/models")
                return
            time.sleep(1)
        sys.exit(f"vLLM failed:\n{(self.work / 'server.log').read_text()[-8000:]}")


ENGINES = ("eager", "plain", "few_slots", "tensor_parallel", "compiled", "server")


def ask(path: str, **body: Any) -> tuple[int, Any]:
    """Status and content of an answer; a request with a body is a POST."""
    data = json.dumps(body).encode() if body else None
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            code, content = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        code, content = error.code, error.read()
    try:
        return code, json.loads(content)
    except ValueError:
        return code, content.decode()


def main(python: str, *engines: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        run = Run(python, Path(folder))
        for name in engines or ENGINES:
            start = time.perf_counter()
            getattr(run, name)()
            print(f"     {name}: {time.perf_counter() - start:.0f} s", flush=True)
    return run.failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) > 0)
