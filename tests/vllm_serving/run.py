"""`make test-vllm`: experts served by vLLM give the tokens that transformers gives with the SVF adapters.

    python tests/vllm_serving/run.py PYTHON_OF_VLLM

Two shipped experts, cut to the 64 largest singular values as a LoRA server needs a rank that it allows, are exported as
LoRA and served in one batch; one of them is merged into a folder and served as a model. A token may differ where the
two best differ by no more than 1e-4 in transformers; what follows it is not compared.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_svf import SVFConfig
from peft_svf.interop import merge_to_folder, to_lora
from peft_svf.training.run import recipe_task

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from compare import TIE, compare
from smollm2 import load_model, model_name

ROOT = Path(__file__).parents[2]
EXPERTS, RANK, PROMPTS, TOKENS = ("sums", "lists"), 64, 32, 24
PREFIX = "base_model.model."


def main(python: str) -> None:
    torch.manual_seed(0)
    base, tokenizer = load_model()
    rows = [
        row
        for name in EXPERTS
        for row in recipe_task(ROOT / "examples" / "recipes" / f"{name}.yaml").examples("test", PROMPTS // 2)
    ]
    texts = [tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True) for row in rows]
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    names = [EXPERTS[i % 2] for i in range(len(prompts))]  # not each its own task's, so that mixing them up would show
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = narrow_experts(base, work)
        rank = max(export(model, name, work / f"{name}-lora") for name in EXPERTS)
        merge_to_folder(work / "sums", work / "merged", model_name())
        jobs = {
            "LoRA, two experts in one batch": {
                "model": model_name(),
                "loras": {name: str(work / f"{name}-lora") for name in EXPERTS},
                "names": names,
                "rank": rank,
            },
            "merged": {"model": str(work / "merged"), "loras": {}, "names": ["sums"] * len(prompts), "rank": 0},
        }
        failed = False
        for title, job in jobs.items():
            start = time.perf_counter()
            found = serve(python, work, {**job, "prompts": prompts, "tokens": TOKENS})
            same, tokens, other = 0, 0, []
            for ids, name, answer in zip(prompts, job["names"], found, strict=True):
                right, at = compare(model, name, ids, answer)
                same, tokens = same + right, tokens + (TOKENS if at is None or at > TIE else right)
                other += [] if at is None else [f"{name}: the token of transformers is better by {at:.1e}"]
            seconds = time.perf_counter() - start
            print(
                f"{title}: {same} of {tokens} tokens are those of transformers ({same / tokens:.1%}); {seconds:.0f} s"
            )
            print("".join(f"  {each}\n" for each in other), end="")
            enough = 1.0 if title == "merged" else 0.99
            failed |= same / tokens < enough
    print("0 passed, 1 failed" if failed else "2 passed, 0 failed")
    sys.exit(failed)


def narrow_experts(base: Any, work: Path) -> PeftModel:
    """The shipped experts with the 64 largest singular values only, which makes LoRA of rank 64 exact."""
    model: Any = None
    for name in EXPERTS:
        shipped = ROOT / "examples" / "experts" / name
        config = SVFConfig.from_pretrained(shipped)
        own = SVFConfig(r=RANK, target_modules=config.target_modules, task_type="CAUSAL_LM")
        if model is None:
            model = get_peft_model(base, own, adapter_name=name)
        else:
            model.add_adapter(name, own)
        deltas = load_file(shipped / "adapter_model.safetensors")
        modules = dict(model.base_model.model.named_modules())
        for key, delta in deltas.items():
            layer = modules[key.removeprefix(PREFIX).removesuffix(".svf_delta.weight")]
            layer.svf_delta[name].weight.data.copy_(delta[:RANK])
        model.save_pretrained(str(work), selected_adapters=[name])
    return model.eval()


def export(model: PeftModel, name: str, folder: Path) -> int:
    lora = to_lora(model, name)
    lora.save_pretrained(folder)
    return lora.rank


def serve(python: str, work: Path, job: dict[str, Any]) -> list[list[int]]:
    (work / "job.json").write_text(json.dumps(job))
    command = [python, str(Path(__file__).with_name("serve.py")), str(work / "job.json"), str(work / "tokens.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"vLLM failed:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}")
    found: list[list[int]] = json.loads((work / "tokens.json").read_text())
    return found


if __name__ == "__main__":
    main(sys.argv[1])
