"""Tasks that no shipped expert was trained on, in the form of rows for a search: some near to one expert's task, some
between two of them, some near to none."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from peft_svf.scoring import REWARDS, RewardFunc, text_of
from peft_svf.scoring.rewards import last_word

SYSTEM_PROMPT = "Reply with the answer only."
WORDS = (
    *("apple", "bag", "bell", "boat", "book", "bottle", "box", "bread", "bridge", "button", "cake", "candle", "car"),
    *("castle", "chair", "clock", "cloud", "coat", "desk", "door", "drum", "egg", "farm", "field", "flag", "flower"),
    *("garden", "glass", "hammer", "hat", "island", "jacket", "kitchen", "ladder", "lake", "lamp", "lemon", "letter"),
    *("milk", "mirror", "moon", "nail", "ocean", "onion", "paper", "piano", "plate", "queen", "rain", "river", "road"),
    *("salt", "school", "ship", "shoe", "spoon", "stone", "street", "table", "tent", "tower", "tree", "umbrella"),
    *("valley", "village", "wall", "watch", "wheel", "window", "yard"),
)
NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo")
THINGS = ("apples", "books", "cards", "coins", "eggs", "pencils", "stamps", "stones")


LIKES = ("music", "tea", "chess", "tennis", "cats", "maps", "trains", "opera", "rice", "poetry", "snow", "boats")


def differences(rng: random.Random) -> tuple[str, str]:
    """Subtraction."""
    a, b = sorted(rng.sample(range(1, 31), 2), reverse=True)
    return f"What is {a} minus {b}?", str(a - b)


def stories(rng: random.Random) -> tuple[str, str]:
    """Sums as stories."""
    name, thing, a, b = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 9), rng.randint(2, 9)
    return f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?", str(a + b)


def largest(rng: random.Random) -> tuple[str, str]:
    """The largest number of a list."""
    numbers = rng.sample(range(1, 100), rng.randint(3, 5))
    return f"Which of these numbers is the largest? {', '.join(map(str, numbers))}", str(max(numbers))


def initials(rng: random.Random) -> tuple[str, str]:
    """A letter of a word of a list: two experts' tasks in one."""
    words, last = rng.sample(WORDS, rng.randint(3, 4)), rng.random() < 0.5
    word = words[-last]
    return f"What is the first letter of the {'last' if last else 'first'} word of this list? {', '.join(words)}", word[
        0
    ]


def likes(rng: random.Random) -> tuple[str, str]:
    """What somebody likes, where the expert was asked who likes something."""
    names, things = rng.sample(NAMES, 3), rng.sample(LIKES, 3)
    facts = " ".join(f"{name} likes {thing}." for name, thing in zip(names, things, strict=True))
    i = rng.randrange(3)
    return f"{facts}\nWhat does {names[i]} like? Reply only with a word.", things[i]


def last_word_right(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """1 if the last word of the completion is the answer."""
    words = [last_word(text_of(completion)).lower() for completion in completions]
    return [float(word == right) for word, right in zip(words, answer, strict=True)]


TASKS: dict[str, tuple[Callable[[random.Random], tuple[str, str]], RewardFunc]] = {
    "differences": (differences, REWARDS["number"]),
    "stories": (stories, REWARDS["number"]),
    "largest": (largest, REWARDS["number"]),
    "initials": (initials, last_word_right),
    "likes": (likes, last_word_right),
}  # with the reward that verifies an answer


def rows(task: str, count: int) -> list[dict[str, Any]]:
    """Rows with different questions, the same ones whenever they are asked for."""
    make, _ = TASKS[task]
    rng, found = random.Random(task), dict[str, str]()
    while len(found) < count:
        question, answer = make(rng)
        found.setdefault(question, answer)
    system = {"role": "system", "content": SYSTEM_PROMPT}
    return [
        {
            "prompt": [system, {"role": "user", "content": question}],
            "answer": answer,
            "completion": [{"role": "assistant", "content": answer}],
        }
        for question, answer in found.items()
    ]
