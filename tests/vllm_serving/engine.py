"""Runs in vLLM's environment: does the steps of a job in one engine, and writes what came of each.

python engine.py job.json results.json
"""

import json
import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def compile_with_adapters() -> None:
    """vLLM turns compilation off on a CPU if there are adapters. This hides them from that decision."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__

    def check(cls: Any, config: Any) -> None:
        kept, config.lora_config = config.lora_config, None
        original(cls, config)
        config.lora_config = kept

    CpuPlatform.check_and_update_config = classmethod(check)


if os.environ.get("PEFT_SVF_TEST_COMPILED"):  # here, because the processes of an engine import this file
    compile_with_adapters()


def cpu_seconds() -> float:
    """Of this process and those that it started, and so on."""
    ticks, parents = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(entry.name)], ticks[int(entry.name)] = int(words[1]), int(words[11]) + int(words[12])
    family = {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(ticks[each] for each in family if each in ticks) / os.sysconf("SC_CLK_TCK")


class Job:
    def __init__(self, job: dict[str, Any]) -> None:
        from vllm import LLM

        from peft_svf.serving import engine_options

        options = {} if job.get("serving") is None else engine_options(**job["serving"])
        start = time.perf_counter()
        self.llm = LLM(job["model"], dtype="float32", max_model_len=512, **{**options, **job.get("engine", {})})
        self.start_seconds = time.perf_counter() - start
        self.requests: dict[str, Any] = {"": None}

    def add(self, experts: dict[str, Any]) -> None:
        from peft_svf.serving import add_experts

        self.requests |= add_experts(self.llm, experts)

    def generate(self, prompts: Any, names: Any, tokens: int, logprobs: int | None = None, times: int = 1) -> Any:
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=logprobs)
        requests = [self.requests[name] for name in names] if any(names) else None
        cpu, wall = cpu_seconds(), time.perf_counter()
        for _ in range(times):
            found = self.llm.generate(
                [{"prompt_token_ids": ids} for ids in prompts], greedy, lora_request=requests, use_tqdm=False
            )
        return {
            "wall": (time.perf_counter() - wall) / times,
            "cpu": (cpu_seconds() - cpu) / times,
            "tokens": [list(each.outputs[0].token_ids) for each in found],
            "cached": sum(each.num_cached_tokens or 0 for each in found),
            "logprobs": logprobs
            and [[sorted((t, p.logprob) for t, p in d.items()) for d in each.outputs[0].logprobs] for each in found],
        }

    def one_by_one(self, prompts: Any, names: Any, tokens: int) -> Any:
        """Each expert's requests in turn, as an engine does that holds one of them."""
        total = {"wall": 0.0, "cpu": 0.0}
        for name in dict.fromkeys(names):
            chosen = [i for i, each in enumerate(names) if each == name]
            part = self.generate([prompts[i] for i in chosen], [name] * len(chosen), tokens)
            total = {key: total[key] + part[key] for key in total}
        return total

    def fold(self, name: str | None) -> Any:
        from peft_svf.serving import fold_expert

        start = time.perf_counter()
        fold_expert(self.llm, name)
        return time.perf_counter() - start

    def update(self, name: str, file: str) -> Any:
        from safetensors.torch import load_file

        from peft_svf.serving import update_expert

        start = time.perf_counter()
        update_expert(self.llm, name, load_file(file))
        return time.perf_counter() - start

    def replace(self, file: str, folder: str) -> None:
        shutil.copy(file, Path(folder) / "adapter_model.safetensors")

    def reset(self) -> bool:
        return bool(self.llm.reset_prefix_cache())

    def memory(self) -> Any:
        return self.llm.collective_rpc("peft_svf_memory")


def main(job: dict[str, Any]) -> list[Any]:
    engine, results = Job(job), []
    results.append(engine.start_seconds)
    for step in job["steps"]:
        kind, arguments = step["do"], {key: value for key, value in step.items() if key not in ("do", "refused")}
        try:
            result = getattr(engine, kind)(**arguments)
        except Exception as error:
            if not step.get("refused"):
                raise
            result = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        results.append(result)
    return results


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
