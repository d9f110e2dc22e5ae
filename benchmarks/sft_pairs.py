"""Write pairs to try SFT with, as a user would collect them: conversions of units, or orders as records.

python benchmarks/sft_pairs.py pairs.jsonl [units | orders]
peft-svf train --objective sft --model_name_or_path MODEL --data pairs.jsonl --chat true --output_dir units
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
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

NAMES = ["Anna", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kemal", "Lena"]
CITIES = ["Oslo", "Lima", "Cairo", "Paris", "Delhi", "Rome", "Quito", "Seoul", "Turin", "Bern"]
ITEMS = ["mug", "lamp", "chair", "pillow", "bottle", "towel", "basket", "vase", "clock", "carpet"]
COLOURS = ["red", "blue", "green", "white", "black", "yellow"]
COUNTS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "half a dozen", 7: "seven", 8: "eight", 12: "a dozen"}
ORDERS = [
    "{name} from {city} orders {count} {colour} {item}s.",
    "Please send {count} {colour} {item}s to {name} in {city}.",
    "Hello, {name} here. I would like {count} {item}s in {colour}, delivered to {city}.",
    "In {city}, {name} is waiting for {count} {item}s. They should be {colour}.",
    "{count} {item}s for {name}, please, all of them {colour}. The address is in {city}.",
]


def unit_conversions(count: int = 260, seed: int = 0) -> list[dict[str, str]]:
    """Return different pairs, in random order: `{"prompt": "Convert 3 km to m.", "completion": "3000 m"}`."""
    rng = random.Random(seed)
    every = [(number, *unit) for unit in UNITS for number in range(1, 61)]
    return [
        {"prompt": f"Convert {number} {old} to {new}.", "completion": f"{number * factor} {new}"}
        for number, old, new, factor in rng.sample(every, count)
    ]


def orders(count: int = 260, seed: int = 0) -> list[dict[str, str]]:
    """Return different pairs of an order and its record, `"customer=Anna; city=Oslo; item=red mug; count=3"`."""
    rng = random.Random(seed)
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        name, city, item, colour = (rng.choice(words) for words in (NAMES, CITIES, ITEMS, COLOURS))
        number = rng.choice(list(COUNTS))
        text = rng.choice(ORDERS).format(name=name, city=city, item=item, colour=colour, count=COUNTS[number])
        text = text[0].upper() + text[1:]
        pairs[text] = f"customer={name}; city={city}; item={colour} {item}; count={number}"
    return [{"prompt": text, "completion": record} for text, record in pairs.items()]


TASKS: dict[str, Callable[[int, int], list[dict[str, str]]]] = {"units": unit_conversions, "orders": orders}


if __name__ == "__main__":
    rows = TASKS[sys.argv[2] if len(sys.argv) > 2 else "units"](260, 0)
    Path(sys.argv[1]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
