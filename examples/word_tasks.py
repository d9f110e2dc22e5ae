"""Two small tasks about words, `examples.word_tasks:lists` and `examples.word_tasks:letters`, for reasoning-gym.

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
class LettersConfig:
    """Which letters to ask for."""

    places: tuple[str, ...] = ("first", "last")
    seed: int | None = None
    size: int = 500

    def validate(self) -> None:
        assert {"first", "last"} >= set(self.places) > set(), "places are first and last"


class LettersDataset(ProceduralDataset):
    """The first or the last letter of a word."""

    def __init__(self, config: LettersConfig) -> None:
        super().__init__(config=config, seed=config.seed, size=config.size)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = random.Random(self.seed + index)
        word, place = rng.choice(WORDS), rng.choice(self.config.places)
        return {
            "question": f"What is the {place} letter of the word {word}?",
            "answer": word[0 if place == "first" else -1],
            "metadata": {"source_dataset": "letters", "source_index": index},
        }

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float:
        return float((answer or "").lower() == entry["answer"])


register_dataset("lists", ListsDataset, ListsConfig)
register_dataset("letters", LettersDataset, LettersConfig)
