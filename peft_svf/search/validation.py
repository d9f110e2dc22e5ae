"""Which examples a search uses, and which evaluate its result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Union

import numpy as np

from ..scoring.objectives import Objective

SPLITS, FEW, MANY = 3, 6, 24  # of `validation="auto"`: cross-validation from FEW examples, held-out ones from MANY


@dataclass
class Split:
    """
    Examples by purpose.

    Attributes:
        search: Indices of the examples of the search.
        held_out: Indices of the examples that evaluate the result, if any are held out.
        parts: For cross-validation, disjoint parts of `search`; each is left out and scored in turn.
    """

    search: list[int]
    held_out: list[int] = field(default_factory=list)
    parts: list[list[int]] = field(default_factory=list)

    @property
    def evaluated(self) -> list[int]:
        """The examples that the scores of a result are about."""
        return self.held_out or self.search

    def rest(self, part: Sequence[int]) -> list[int]:
        """Return the examples of the search without one part."""
        return [i for i in self.search if i not in part]

    def groups(self) -> list[tuple[list[int], list[int]]]:
        """Return all evaluated examples in groups, each with the examples that may serve it as demonstrations."""
        if self.held_out:
            return [(self.held_out, self.search)]
        return [(part, self.rest(part)) for part in self.parts] or [(self.search, self.search)]


def questions(objective: Objective, examples: Sequence[int]) -> list[int]:
    """Number the different prompts of these examples, in order of appearance; equal prompts get the same number."""
    rows = [objective.examples[i] for i in examples]
    prompts = [json.dumps(row.get("prompt"), default=str) if isinstance(row, Mapping) else repr(row) for row in rows]
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    return [numbers[prompt] for prompt in prompts]


def hold_out(objective: Objective, eval_examples: Sequence[dict[str, Any]]) -> tuple[Objective, Split]:
    """
    Add examples that evaluate the result.

    Raises:
        ValueError: There are none, or one has the same prompt as an example of the search.
    """
    rows, count = list(eval_examples), len(objective.examples)
    if not rows:
        raise ValueError("`eval_examples` is empty. Pass at least one example, or leave it out.")
    objective = objective.with_examples([*objective.examples, *rows])
    numbers = questions(objective, range(len(objective.examples)))
    for i, number in enumerate(numbers[count:]):
        if number in numbers[:count]:
            raise ValueError(
                f"Example {i} of `eval_examples` has the prompt of example {numbers.index(number)} of the search. "
                "Leave one of them out."
            )
    return objective, Split(list(range(count)), list(range(count, len(numbers))))


def split_examples(objective: Objective, validation: Union[str, float, None], seed: int) -> Split:
    """
    Divide the examples of an objective. Examples with the same prompt stay together.

    Args:
        objective ([`Objective`]): Has the examples.
        validation: See [`SearchConfig`].
        seed (`int`): Decides which examples are held out.

    Raises:
        ValueError: Another kind of value, or one that leaves no examples.
    """
    numbers = questions(objective, range(len(objective.examples)))
    count = max(numbers) + 1
    if validation == "auto":
        validation = 1 / 3 if count >= MANY else SPLITS if count >= FEW else None
    if validation is None:
        return Split(list(range(len(numbers))))
    order = np.random.default_rng(seed).permutation(count).tolist()

    def examples_of(some: Sequence[int]) -> list[int]:
        return [i for i, number in enumerate(numbers) if number in set(some)]

    if isinstance(validation, float) and 0 < validation < 1:
        size = round(validation * count)
        if not 0 < size < count:
            raise ValueError(
                f"`validation={validation:g}` holds out {size} of {count} different examples. Both parts need some."
            )
        return Split(examples_of(order[size:]), examples_of(order[:size]))
    if isinstance(validation, int) and not isinstance(validation, bool) and 2 <= validation <= count:
        return Split(list(range(len(numbers))), parts=[examples_of(order[i::validation]) for i in range(validation)])
    raise ValueError(
        "`validation` must be 'auto', None, a fraction between 0 and 1, or a number of cross-validation splits from 2 "
        f"to {count}, got {validation!r}."
    )
