"""Which examples a search uses, and which evaluate it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np

FOLDS, FEW, MANY = 3, 6, 24


@dataclass
class Split:
    """
    Which examples are for what.

    Attributes:
        search: Indices of those to search on.
        held_out: Of those to compare on, if there are any.
        folds: Parts of `search` that are left out and scored in turn, if there are any.
    """

    search: list[int]
    held_out: list[int] = field(default_factory=list)
    folds: list[list[int]] = field(default_factory=list)

    @property
    def judged(self) -> list[int]:
        """The examples that the scores of a result are about."""
        return self.held_out or self.search

    def groups(self) -> list[tuple[list[int], list[int]]]:
        """All that are judged on, with those that may stand before each of them as demonstrations."""
        if self.held_out:
            return [(self.held_out, self.search)]
        if self.folds:
            return [(fold, [i for i in self.search if i not in fold]) for fold in self.folds]
        return [(self.search, self.search)]  # but those that ask the same


def split_examples(objective: Any, validation: Any, seed: int) -> tuple[Any, Split]:
    """
    The objective with all examples, and which are for what.

    Args:
        objective ([`Objective`]): With the examples.
        validation: See [`AdaptiveMixture.search`].
        seed (`int`): Decides which examples are held out.

    Raises:
        ValueError: A share or number of folds that leaves nothing.
    """
    count = len(objective.examples)
    if isinstance(validation, Iterable) and not isinstance(validation, (str, Mapping)):
        validation = list(validation)
        if not validation:
            raise ValueError("`validation` has no rows.")
        asked = {json.dumps(row.get("prompt"), default=str): i for i, row in enumerate(objective.examples)}
        for i, row in enumerate(validation):
            same = asked.get(json.dumps(row.get("prompt"), default=str)) if isinstance(row, Mapping) else None
            if same is not None:
                raise ValueError(f"Row {i} of `validation` asks the same as example {same}; it must be held out.")
        objective = objective.with_examples([*objective.examples, *validation])
        return objective, Split(list(range(count)), list(range(count, len(objective.examples))))
    # the same question must not be on two sides
    prompts = [json.dumps(row.get("prompt"), default=str) for row in objective.examples]
    distinct = list(dict.fromkeys(prompts))
    count = len(distinct)
    if validation == "auto":
        validation = 1 / 3 if count >= MANY else FOLDS if count >= FEW else None
    if validation is None:
        return objective, Split(list(range(len(prompts))))
    order = np.random.default_rng(seed).permutation(count).tolist()

    def rows_of(part: Sequence[int]) -> list[int]:
        chosen = {distinct[i] for i in part}
        return [i for i, prompt in enumerate(prompts) if prompt in chosen]

    if isinstance(validation, Real):  # numpy's, too
        validation = int(validation) if isinstance(validation, Integral) else float(validation)
    if isinstance(validation, float) and 0 < validation < 1:
        size = round(validation * count)
        if not 0 < size < count:
            raise ValueError(
                f"Of {count} different examples, `validation={validation:g}` holds out {size}; it must leave some."
            )
        return objective, Split(rows_of(order[size:]), rows_of(order[:size]))
    if isinstance(validation, int) and 2 <= validation <= count:
        return objective, Split(
            list(range(len(prompts))), folds=[rows_of(order[i::validation]) for i in range(validation)]
        )
    raise ValueError(
        f"`validation` must be 'auto', None, a share between 0 and 1, a number of folds from 2 to {count}, or rows; "
        f"got {validation!r}."
    )
