"""Write pairs to try SFT with: conversions of lengths, masses, volumes and times, as a user would collect them.

python benchmarks/sft_pairs.py pairs.jsonl
peft-svf train --objective sft --model_name_or_path MODEL --data pairs.jsonl --chat true --output_dir units
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

# from, to, how many
UNITS = [
    ("km", "m", 1000),
    ("m", "cm", 100),
    ("cm", "mm", 10),
    ("kg", "g", 1000),
    ("t", "kg", 1000),
    ("l", "ml", 1000),
    ("h", "min", 60),
    ("min", "s", 60),
    ("weeks", "days", 7),
    ("dozens", "pieces", 12),
]


def unit_conversions(count: int = 260, seed: int = 0) -> list[dict[str, str]]:
    """Return different pairs, in random order: `{"prompt": "Convert 3 km to m.", "completion": "3000 m"}`."""
    rng = random.Random(seed)
    every = [(number, *unit) for unit in UNITS for number in range(1, 61)]
    return [
        {"prompt": f"Convert {number} {old} to {new}.", "completion": f"{number * factor} {new}"}
        for number, old, new, factor in rng.sample(every, count)
    ]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text("".join(json.dumps(row) + "\n" for row in unit_conversions()), encoding="utf-8")
