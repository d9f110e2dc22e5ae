"""Two small tasks about words, `examples.word_tasks:lists` and `examples.word_tasks:kinds`, for reasoning-gym.

A module like this one is all that a task of your own needs; `peft_svf.training.find_task` finds it by its import path.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from reasoning_gym.factory import ProceduralDataset, register_dataset

# fmt: off
WORDS = [
    "apple", "bag", "bell", "bird", "boat", "book", "bottle", "bowl", "box", "bread", "bridge", "bus", "button",
    "cake", "camera", "candle", "car", "carpet", "castle", "chair", "cheese", "clock", "cloud", "coat", "cow",
    "cup", "desk", "dog", "door", "drum", "duck", "egg", "farm", "fence", "field", "fish", "flag", "floor",
    "flower", "forest", "fork", "garden", "gate", "glass", "grass", "hammer", "hat", "horse", "house", "island",
    "jacket", "key", "king", "kitchen", "knife", "ladder", "lake", "lamp", "leaf", "lemon", "letter", "lion",
    "milk", "mirror", "money", "moon", "mouse", "nail", "needle", "nest", "nose", "ocean", "onion", "paper",
    "pencil", "piano", "pig", "pillow", "plane", "plate", "pocket", "pond", "potato", "queen", "rain", "ring",
    "river", "road", "roof", "rope", "salt", "school", "sheep", "ship", "shirt", "shoe", "snow", "soap", "spoon",
    "star", "stone", "street", "sugar", "sun", "table", "tent", "tiger", "tower", "train", "tree", "truck",
    "umbrella", "valley", "village", "wall", "watch", "wheel", "window", "wolf", "wood", "yard",
]
KINDS = {
    "animals": ["dog", "cat", "horse", "cow", "lion", "tiger", "bear", "wolf", "sheep", "goat", "rabbit", "mouse",
        "monkey", "elephant", "fox", "deer", "duck", "hen"],
    "fruits": ["apple", "banana", "lemon", "grape", "peach", "pear", "cherry", "plum", "mango", "melon",
        "kiwi", "fig", "apricot", "papaya", "pineapple"],
    "colors": ["red", "blue", "green", "yellow", "black", "white", "purple", "pink", "brown", "gray", "violet",
        "silver", "gold", "beige"],
    "tools": ["hammer", "saw", "drill", "wrench", "shovel", "axe", "rake", "pliers", "ladder", "screwdriver",
        "chisel", "file", "clamp"],
    "countries": ["France", "Spain", "Italy", "Germany", "China", "Japan", "India", "Brazil", "Canada", "Egypt",
        "Mexico", "Russia", "Kenya", "Peru"],
    "vehicles": ["car", "bus", "truck", "train", "bicycle", "boat", "ship", "plane", "taxi", "tractor", "van", "tram",
        "helicopter"],
    "clothes": ["shirt", "coat", "hat", "shoe", "sock", "dress", "jacket", "scarf", "glove", "skirt", "sweater",
        "belt", "boot"],
    "furniture": ["chair", "table", "bed", "sofa", "desk", "shelf", "bench", "cupboard", "stool", "wardrobe",
        "couch"],
}
# fmt: on


@dataclass
class ListsConfig:
    """How many words the lists have."""

    min_words: int = 3
    max_words: int = 5
    seed: int | None = None
    size: int = 500

    def validate(self) -> None:
        assert 2 <= self.min_words <= self.max_words <= len(WORDS), f"2 <= min_words <= max_words <= {len(WORDS)}"


class ListsDataset(ProceduralDataset):
    """The first or the last word of a list."""

    def __init__(self, config: ListsConfig) -> None:
        super().__init__(config=config, seed=config.seed, size=config.size)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = random.Random(self.seed + index)
        words = rng.sample(WORDS, rng.randint(self.config.min_words, self.config.max_words))
        place = rng.choice(("first", "last"))
        return {
            "question": f"What is the {place} word of this list? {', '.join(words)}",
            "answer": words[0 if place == "first" else -1],
            "metadata": {"source_dataset": "lists", "source_index": index},
        }


@dataclass
class KindsConfig:
    """Among how many words to choose."""

    words: int = 3
    seed: int | None = None
    size: int = 500

    def validate(self) -> None:
        assert 2 <= self.words <= 8, "2 <= words <= 8"


class KindsDataset(ProceduralDataset):
    """The one word of a list that is an animal, a color and so on."""

    def __init__(self, config: KindsConfig) -> None:
        super().__init__(config=config, seed=config.seed, size=config.size)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = random.Random(self.seed + index)
        kind, other = rng.sample(list(KINDS), 2)
        answer = rng.choice(KINDS[kind])
        words = [answer, *rng.sample(KINDS[other], self.config.words - 1)]
        rng.shuffle(words)
        return {
            "question": f"Which of these is one of the {kind}? {', '.join(words)}",
            "answer": answer,
            "metadata": {"source_dataset": "kinds", "source_index": index},
        }


register_dataset("lists", ListsDataset, ListsConfig)
register_dataset("kinds", KindsDataset, KindsConfig)
