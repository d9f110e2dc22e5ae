"""The δ of the experts that an engine can use in its next step, and which token uses which."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch


class SlotTable:
    """
    One row of δ per resident expert, for all weights. The row after the last slot is the base model's, all zeros.

    Args:
        lengths (`dict[str, int]`): Length of δ by module.
        slots (`int`): Number of experts that one step may use.
        tokens (`int`): Most tokens of one step.
        device: Device of the model.

    Attributes:
        values (`torch.Tensor`): δ, `[slots + 1, sum of the lengths]`, fp32.
        index (`torch.Tensor`): The row of each token of the current step, `[tokens]`. A fixed buffer, because captured
            graphs read it.
        in_use (`bool`): Whether any token of the current step has an expert.
        only (`int`, *optional*): The expert that all tokens of the current step have.
        folded (`bool`): Whether the folded weights are those of the current step. Set by their owner.
    """

    def __init__(self, lengths: Mapping[str, int], slots: int, tokens: int, device: torch.device) -> None:
        ends = np.cumsum([0, *lengths.values()]).tolist()
        self.ranges = {name: slice(ends[i], ends[i + 1]) for i, name in enumerate(lengths)}
        self.slots, self.size = slots, ends[-1]
        self.values = torch.zeros(slots + 1, self.size, dtype=torch.float32, device=device)
        self.index = torch.full((tokens,), slots, dtype=torch.long, device=device)
        self.in_use, self.folded = False, False
        self.only: int | None = None
        self._slot_of: OrderedDict[int, int] = OrderedDict()  # by expert, least recently used first

    def __contains__(self, expert: int) -> bool:
        return expert in self._slot_of

    def of_tokens(self, name: str, tokens: int) -> torch.Tensor:
        """Return δ of a module for each of the first tokens, `[tokens, r]`."""
        return self.values[:, self.ranges[name]][self.index[:tokens]]

    def flat(self, deltas: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return δ of all weights as one row, on the CPU. A shorter δ is filled up with zeros.

        Modules that are not in the table are left out: they belong to another stage of the pipeline.
        """
        row = torch.zeros(self.size, dtype=torch.float32)
        for name, place in self.ranges.items():
            if name in deltas:
                row[place][: len(deltas[name])] = deltas[name]
        return row

    def put(self, expert: int, row: torch.Tensor | None, keep: Collection[int] = ()) -> None:
        """Make an expert resident, or write its δ again.

        Args:
            expert: Its number.
            row: Its δ, or `None` for zeros.
            keep: Experts that must stay.

        Raises:
            RuntimeError: All slots are taken by experts that must stay.
        """
        if expert not in self._slot_of:
            free = set(range(self.slots)) - set(self._slot_of.values())
            if not free:
                oldest = next((each for each in self._slot_of if each not in keep), None)
                if oldest is None:
                    raise RuntimeError(f"One step needs more than {self.slots} experts. Increase `max_loras`.")
                free = {self._slot_of.pop(oldest)}
            self._slot_of[expert] = min(free)
        self.touch(expert)
        slot = self.values[self._slot_of[expert]]
        slot.zero_() if row is None else slot.copy_(row)

    def touch(self, expert: int) -> None:
        """Mark a resident expert as the last used one."""
        self._slot_of.move_to_end(expert)

    def remove(self, expert: int) -> None:
        """Free the slot of an expert, if it has one."""
        self._slot_of.pop(expert, None)

    def route(self, experts: Sequence[int]) -> None:
        """Set the expert of each token of the next step. 0 is the base model.

        Raises:
            KeyError: An expert is not resident.
        """
        present, places = np.unique(np.asarray(experts, dtype=np.int64), return_inverse=True)
        rows = np.array([self._slot_of[int(each)] if each > 0 else self.slots for each in present], dtype=np.int64)
        self.in_use = bool((present > 0).any())
        self.only = int(present[0]) if len(present) == 1 and self.in_use else None
        self.index[: len(places)] = torch.from_numpy(rows[places])

    def clear(self) -> None:
        """Remove all experts. The next step is the base model's."""
        self._slot_of.clear()
        self.in_use, self.folded, self.only = False, False, None
        self.index.fill_(self.slots)
