"""Write docs/results/speed.md from what the benchmarks left in outputs/benchmarks.

    python benchmarks/report.py [--results FOLDER] [--output FILE]

The same results give the same page.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path("outputs/benchmarks")
ORDER = (
    *("step", "step-model", "step-block", "step-small-block", "step-accumulate"),
    *("rollout", "grpo_update", "mixed_rows", "memory", "attach", "base_check"),
)
INTRO = """# Speed and memory

Written by `make bench` (`benchmarks/report.py`); do not edit. Candidates of a table take turns in one process; ratios
are ratios of medians; every time that was measured is in `outputs/benchmarks/*.json`.
"""


def describe(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "peft", "peft_svf"))
    device = "" if machine["device"] == "cpu" else f"{machine['device']}; "
    return f"{device}{machine['cpu']}, {machine['threads']} threads of {machine['cores']} cores; {versions}"


def markdown_table(table: dict[str, Any]) -> list[str]:
    header = table["header"]
    lines = [f"**{table['title']}**", ""]
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in table["rows"]:
        lines.append("| " + " | ".join([*row, *[""] * (len(header) - len(row))]) + " |")
    return [*lines, "", *([table["note"], ""] if table["note"] else [])]


def section(record: dict[str, Any], show_machine: bool) -> list[str]:
    lines = [f"`{record['command']}`", ""]
    for table in record["tables"]:
        lines += markdown_table(table)
    load = f"Load average {record['load_before']:.1f} before, {record['load_after']:.1f} after."
    return [*lines, f"{load} {describe(record['machine'])}." if show_machine else load, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=Path("docs/results/speed.md"))
    arguments = parser.parse_args()

    def place(path: Path) -> tuple[int, str]:
        return (ORDER.index(path.stem) if path.stem in ORDER else len(ORDER), path.stem)

    records = [json.loads(path.read_text()) for path in sorted(arguments.results.glob("*.json"), key=place)]
    if not records:
        raise SystemExit(f"There are no results in {arguments.results}.")
    machines = {describe(record["machine"]) for record in records}
    lines = [INTRO]
    if len(machines) == 1:
        lines += [f"Machine: {machines.pop()}.", ""]
    claim = ""
    for record in records:
        if record["claim"] != claim:
            claim = record["claim"]
            lines += [f"## {claim.removesuffix('.')}", ""]
        lines += section(record, show_machine=bool(machines))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text("\n".join(lines))
    print(f"{arguments.output}: {len(records)} benchmarks")


if __name__ == "__main__":
    main()
