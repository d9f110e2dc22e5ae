"""Run all benchmarks, sized for a quarter of an hour on two CPU cores, and write docs/results/speed.md.

    python benchmarks/run_all.py [--quick] [any option of the benchmarks, such as --model or --rounds]

The benchmarks run one after the other, each in a process of its own; nothing else should run beside them.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path("outputs/benchmarks")

# smaller than the benchmarks' own settings where those would take too long; a method is left out of one benchmark where
# another has it
RUNS = {
    "step-model": ["step.py", "--part", "model", "--rounds", "2", "--methods", "svf", "lora r=16"],
    "step-block": [
        *["step.py", "--part", "block", "--rounds", "1", "--methods"],
        *["svf", "svf r=k/8", "lora r=16", "dora r=16", "ia3", "full", "released"],
    ],
    "step-small-block": [
        *["step.py", "--part", "block", "--rounds", "5", "--model", "smollm2-135m", "--methods"],
        *["svf", "svf gate", "svf r=k/8", "lora r=16", "osf", "psoft r=32", "released"],
    ],
    "rollout": ["rollout.py", "--rounds", "1"],
    "grpo_update": ["grpo_update.py", "--rounds", "1", "--samples", "32", "--micro-batch", "32", "--new-tokens", "32"],
    "mixed_rows": ["mixed_rows.py", "--rounds", "1", "--new-tokens", "32"],
    "memory": ["memory.py", "--methods", "svf", "lora r=16", "full"],
    "attach": ["attach.py", "--rounds", "1"],
    "base_check": ["base_check.py", "--quick"],
}


def main() -> None:
    folder = Path(__file__).parent
    start = time.perf_counter()
    for name, (script, *options) in RUNS.items():
        print(f"\n[{time.perf_counter() - start:4.0f} s] {name}", flush=True)
        command = [sys.executable, str(folder / script), *options, *sys.argv[1:]]
        subprocess.run([*command, "--output", str(RESULTS / f"{name}.json")], check=True)
    print(f"\n[{time.perf_counter() - start:4.0f} s] report", flush=True)
    subprocess.run([sys.executable, str(folder / "report.py")], check=True)


if __name__ == "__main__":
    main()
