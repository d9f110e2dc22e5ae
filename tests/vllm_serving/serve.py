"""Runs in vLLM's environment: greedy tokens for the prompts of a job, each with its LoRA or none, in one batch."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    job = json.loads(Path(sys.argv[1]).read_text())
    loras = {name: LoRARequest(name, i + 1, folder) for i, (name, folder) in enumerate(job["loras"].items())}
    options = {"enable_lora": True, "max_lora_rank": job["rank"], "max_loras": len(loras)} if loras else {}
    llm = LLM(job["model"], dtype="float32", max_model_len=512, enforce_eager=True, max_num_seqs=32, **options)
    greedy = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True)
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in job["prompts"]],
        greedy,
        lora_request=[loras.get(name) for name in job["names"]] if loras else None,
        use_tqdm=False,
    )
    Path(sys.argv[2]).write_text(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
