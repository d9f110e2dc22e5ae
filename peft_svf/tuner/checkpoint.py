"""Check that the tensors of a saved adapter are whole and healthy. Every way to load, merge or share one calls this."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from safetensors import SafetensorError, safe_open

_PREFIX, _SUFFIX = "base_model.model.", ".svf_delta.weight"


@dataclass(frozen=True)
class Checkpoint:
    """
    What a check of a saved adapter needs to know, without the values.

    Attributes:
        deltas (`dict[str, tuple[int, ...]]`): The shape of each δ, by module name.
        others (`dict[str, tuple[int, ...]]`): The shapes of other tensors by key, such as biases and `modules_to_save`.
        broken (`frozenset[str]`): The keys of tensors that hold NaN or Inf.
        integers (`dict[str, str]`): The dtype of each δ that holds integers, by key.
        where (`str`): The file, or `""` for tensors in memory.
        read (`Callable`, *optional*): Returns the tensor of a key.
    """

    deltas: dict[str, tuple[int, ...]]
    others: dict[str, tuple[int, ...]] = field(default_factory=dict)
    broken: frozenset[str] = frozenset()
    integers: dict[str, str] = field(default_factory=dict)
    where: str = ""
    read: Callable[[str], torch.Tensor] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, torch.Tensor], where: str = "") -> Checkpoint:
        """Describe a state dict in PEFT's format, with or without the prefix `base_model.model.`."""
        named = {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}
        return cls(
            deltas={key.removesuffix(_SUFFIX): tuple(t.shape) for key, t in named.items() if key.endswith(_SUFFIX)},
            others={key: tuple(tensor.shape) for key, tensor in named.items() if not key.endswith(_SUFFIX)},
            broken=frozenset(key for key, tensor in named.items() if not _is_finite(tensor)),
            integers={
                key: str(tensor.dtype)
                for key, tensor in named.items()
                if key.endswith(_SUFFIX) and not tensor.is_floating_point()
            },
            where=where,
            read=named.__getitem__,
        )

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """Return the checkpoint with other module names, given pairs of an old and a new name."""
        return replace(
            self,
            deltas={names.get(name, name): shape for name, shape in self.deltas.items()},
            broken=frozenset(
                f"{names[name]}{_SUFFIX}" if (name := key.removesuffix(_SUFFIX)) in names else key
                for key in self.broken
            ),
        )

    def check(
        self,
        subject: str,
        wanted: Mapping[str, int | None],
        *,
        strangers: Collection[str] = (),
        at_most: int | None = None,
    ) -> None:
        """Check that there is one healthy δ for each module, and nothing else.

        Args:
            subject (`str`): The adapter or its file, as the subject of the message.
            wanted (`dict[str, int]`): The length of δ by name of each adapted module; `None` if it is not known.
            strangers: Keys of further tensors for which the model has no place.
            at_most (`int`, *optional*): The largest length of a δ whose length is not known.

        Raises:
            ValueError: δ is missing, is left over, has another shape, or holds integers, NaN or Inf.
        """
        missing = sorted(wanted.keys() - self.deltas.keys())
        extra = sorted([*(f"{name}{_SUFFIX}" for name in self.deltas.keys() - wanted.keys()), *strangers])
        if missing:
            raise ValueError(
                f"{subject} has no values for {len(missing)} of {len(wanted)} adapted modules, the first is "
                f"{missing[0]}{_SUFFIX}. It holds {len(self.deltas)} δ vectors"
                + (f", such as {extra[0]}" if extra else "")
                + ". It is incomplete or was saved with another config: save or download the adapter again."
            )
        if extra:
            raise ValueError(
                f"{subject} has {len(extra)} tensors that belong to no adapted module, the first is {extra[0]}. It was "
                "saved with another config or for another model: save or download the adapter again."
            )
        for name, length in wanted.items():
            shape = self.deltas[name]
            fits = (
                shape == (length,) if length is not None else len(shape) == 1 and 0 < shape[0] <= (at_most or shape[0])
            )
            if not fits:
                raise ValueError(
                    f"{subject} has a δ of shape {list(shape)} in {name}{_SUFFIX}, expected "
                    f"{[length if length is not None else at_most]}. It is damaged or was saved for another model: "
                    "save or download the adapter again."
                )
        for key, dtype in self.integers.items():
            raise ValueError(
                f"{subject} has {key} in {dtype}, but δ is in floating point. It is damaged: save or download the "
                "adapter again."
            )
        if self.broken:
            raise ValueError(
                f"{subject} has NaN or Inf in {len(self.broken)} of {len(self.deltas) + len(self.others)} tensors, "
                f"the first is {min(self.broken)}. It is damaged, or the training diverged: use an earlier checkpoint."
            )


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """Describe the adapter file in a folder, `None` if there is none. Of its values only δ is read.

    Raises:
        ValueError: The file is damaged.
    """
    file = folder / SAFETENSORS_WEIGHTS_NAME
    try:
        if file.is_file():
            with safe_open(file, framework="pt") as content:
                keys = list(content.keys())
                deltas = {key: content.get_tensor(key) for key in keys if key.endswith(_SUFFIX)}
                shapes = {key: tuple(content.get_slice(key).get_shape()) for key in keys if key not in deltas}
            others = {key.removeprefix(_PREFIX): shape for key, shape in shapes.items()}
            return replace(Checkpoint.of_tensors(deltas, str(file)), others=others, read=partial(_read, file))
        file = folder / WEIGHTS_NAME
        if file.is_file():
            return Checkpoint.of_tensors(torch.load(file, map_location="cpu", weights_only=True), str(file))
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{file} is damaged or cut short ({error}). Save or download the adapter again.") from error
    return None


def adapter_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Return the tensors of a saved adapter.

    Args:
        path: Folder or Hub id.

    Raises:
        ValueError: The folder has no adapter file.
    """
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        raise ValueError(f"{path} holds no {SAFETENSORS_WEIGHTS_NAME}. Save or download the adapter again.")
    tensors: dict[str, torch.Tensor] = load_peft_weights(str(path), device="cpu")
    return tensors


def _read(file: Path, key: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as content:
        tensor: torch.Tensor = content.get_tensor(_PREFIX + key if _PREFIX + key in set(content.keys()) else key)
    return tensor


def _is_finite(tensor: torch.Tensor) -> bool:
    if tensor.is_floating_point() and tensor.dtype.itemsize < 2:  # fp8 has no `isfinite`
        tensor = tensor.float()
    return tensor.is_meta or bool(torch.isfinite(tensor).all())
