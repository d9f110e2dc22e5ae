"""The experts and mixtures that an engine has loaded, under the numbers that vLLM gives them."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch

from .mixtures import SCHEME, parse_mixture, unknown_experts
from .slots import SlotTable


class Values:
    """δ of one expert as a row of the slot table, on the CPU. `None` for zeros. Its mixtures share it."""

    def __init__(self, row: torch.Tensor | None) -> None:
        self.row = row


@dataclass(frozen=True)
class Loaded:
    """An expert or a mixture: a weighted sum."""

    name: str
    path: str
    terms: tuple[tuple[float, Values], ...]

    @property
    def is_mixture(self) -> bool:
        """Whether it is made of other experts, so that nothing is lost if it is forgotten."""
        return self.path.startswith(SCHEME) and self.path != SCHEME

    def row(self) -> torch.Tensor | None:
        """Return its δ, `None` for zeros."""
        rows = [(weight, values.row) for weight, values in self.terms if values.row is not None]
        if len(rows) == 1 and rows[0][0] == 1:
            return rows[0][1]
        return sum((weight * row for weight, row in rows[1:]), rows[0][0] * rows[0][1]) if rows else None


class LoadedExperts:
    """
    Loads experts when they are needed, and forgets the least recently used ones.

    vLLM's prefix cache knows an expert by its name and path. So another δ under the same name and path is refused: its
    requests would continue from what the old one computed.

    Args:
        table: The slots of the engine.
        read: Returns δ by module, given the path of an expert.
        capacity (`int`): Number of experts and mixtures to keep.
        has_prefix_cache (`bool`): Whether the engine reuses what it computed for the same beginning of a prompt.
        by_name_only (`bool`): Whether its prefix cache ignores the path. vLLM before 0.32 does.
    """

    def __init__(
        self,
        table: SlotTable,
        read: Callable[[str], Mapping[str, torch.Tensor]],
        *,
        capacity: int,
        has_prefix_cache: bool = True,
        by_name_only: bool = False,
    ) -> None:
        self.table, self.capacity = table, capacity
        self._read_deltas, self._has_prefix_cache, self._by_name_only = read, has_prefix_cache, by_name_only
        self._loaded: OrderedDict[int, Loaded] = OrderedDict()  # least recently used first
        self._paths: dict[str, str] = {}  # of experts by name, for mixtures
        self._digests: dict[object, bytes] = {}  # of δ, by the key of the prefix cache

    def __contains__(self, number: int) -> bool:
        return number in self._loaded

    def __getitem__(self, number: int) -> Loaded:
        return self._loaded[number]

    @property
    def numbers(self) -> set[int]:
        """The numbers of all loaded experts and mixtures."""
        return set(self._loaded)

    def number_of(self, name: str) -> int:
        """Return the number of an expert or mixture.

        Raises:
            ValueError: It is not loaded.
        """
        numbers = {loaded.name: number for number, loaded in self._loaded.items()}
        if message := unknown_experts({name: 1.0}, numbers):
            raise ValueError(message)
        return numbers[name]

    def add(self, number: int, name: str, path: str, *, keep: Collection[int] = (), again: bool = False) -> None:
        """Load an expert or mixture unless it is loaded already, and make it resident.

        Args:
            number: Its number in vLLM.
            name: Its name.
            path: Folder or Hub id, or a mixture after `peft-svf:`. Zeros if there is nothing after that.
            keep: Experts that must stay resident.
            again: Whether to read it even if it is loaded.

        Raises:
            ValueError: It cannot be served. Everything stays as it was.
        """
        known = self._loaded.get(number)
        if known is not None and known.name != name:
            raise ValueError(
                f"{name!r} has the number {number}, which is that of {known.name!r}. Each expert needs its own "
                "`lora_int_id`."
            )
        if known is None or again:
            loaded = Loaded(name, path, self._terms(path))
            self._claim(loaded)
            self._loaded[number] = loaded
            if not loaded.is_mixture:
                self._paths[name] = path
            self._evict({number, *keep})
            self.table.put(number, loaded.row(), keep)
        elif number not in self.table:
            self.table.put(number, known.row(), keep)
        self._loaded.move_to_end(number)
        self.table.touch(number)

    def add_zeros(self, number: int, name: str) -> None:
        """Load zeros that are no expert, to warm up."""
        self._loaded[number] = Loaded(name, SCHEME, ())
        self.table.put(number, None)

    def remove(self, number: int) -> bool:
        """Forget an expert, also for new mixtures. Return whether it was loaded."""
        loaded = self._drop(number)
        if loaded is not None and self._paths.get(loaded.name) == loaded.path:
            del self._paths[loaded.name]
        return loaded is not None

    def clear(self) -> None:
        """Forget all experts."""
        self._loaded.clear()
        self._paths.clear()
        self.table.clear()

    def update(self, name: str, row: torch.Tensor) -> None:
        """Replace δ of an expert, and of the mixtures that it is in. The prefix cache must be emptied.

        Raises:
            ValueError: It is not loaded.
        """
        values = self._values_of(name)
        values.row = row
        for number, loaded in self._loaded.items():
            if number in self.table and any(used is values for _, used in loaded.terms):
                self.table.put(number, loaded.row())
        self._digests.clear()
        for loaded in self._loaded.values():
            self._claim(loaded)

    def host_bytes(self) -> int:
        """Return the size of all δ in host memory. Mixtures need none."""
        rows = {id(values): values.row for loaded in self._loaded.values() for _, values in loaded.terms}
        return sum(row.nbytes for row in rows.values() if row is not None)

    def _terms(self, path: str) -> tuple[tuple[float, Values], ...]:
        if not path.startswith(SCHEME):
            return ((1.0, Values(self.table.flat(self._read_deltas(path)))),)
        if path == SCHEME:
            return ((1.0, Values(None)),)
        weights = parse_mixture(path.removeprefix(SCHEME))
        if message := unknown_experts(weights, self._paths):
            raise ValueError(message)
        return tuple((weight, self._values_of(name)) for name, weight in weights.items())

    def _values_of(self, name: str) -> Values:
        if message := unknown_experts({name: 1.0}, self._paths):
            raise ValueError(message)
        for loaded in self._loaded.values():
            if (loaded.name, loaded.path) == (name, self._paths[name]) and loaded.terms:
                return loaded.terms[0][1]
        return self._terms(self._paths[name])[0][1]  # forgotten in the meantime

    def _claim(self, loaded: Loaded) -> None:
        if not self._has_prefix_cache:
            return
        row = loaded.row()
        digest = hashlib.sha256(b"" if row is None else row.numpy().tobytes()).digest()
        key = loaded.name if self._by_name_only else (loaded.name, loaded.path)
        if self._digests.setdefault(key, digest) != digest:
            elsewhere = "" if self._by_name_only else "from another folder, or "
            raise ValueError(
                f"{loaded.name!r} ({loaded.path}) has changed since it was first loaded, and the prefix cache of the "
                f"engine holds results of the old one. Load it {elsewhere}under another name."
            )

    def _evict(self, keep: Collection[int]) -> None:
        mixtures_first = sorted(self._loaded, key=lambda number: not self._loaded[number].is_mixture)
        for number in mixtures_first:
            if len(self._loaded) <= self.capacity:
                return
            if number not in keep:
                self._drop(number)

    def _drop(self, number: int) -> Loaded | None:
        self.table.remove(number)
        return self._loaded.pop(number, None)
