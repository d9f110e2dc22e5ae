"""A basis pack: the singular bases of a model by module name, to share them.

A quantized model does not hold the weights that experts were trained on, so its bases must come from elsewhere. A pack
is a folder or Hub repository of safetensors files, one per weight, and an index that is written last.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open

from ..utils.errors import BaseCheckError
from ..utils.files import read_text
from .basis import SingularBasis, gate_side
from .cache import checksum
from .fingerprint import tolerances

INDEX = "basis.safetensors.index.json"
FORMAT = "peft_svf.pack.v1"


# Fractions of the squared norm of a weight. Quantization displaces up to 0.001 (8 bits) or 0.006 to 0.02 (4 bits).
# Between layers of the same shape it is 0.46 and more (measured on SmolLM2).
DISPLACED, DISPLACED_IF_FINE = 0.1, 0.01
# Neighbours in a row mostly share a scale, so 4-bit weights have at most 16 different values among them.
NEIGHBOURS, VALUES_IF_COARSE = 32, 16


def _displaced(weight: torch.Tensor, basis: SingularBasis) -> float:
    """Return the fraction of a weight that does not match the basis: Σ |‖q_iᵀ W‖² - σ_i²| / Σ σ_i²."""
    vectors = basis.vectors.to(device=weight.device, dtype=torch.float32)
    along = vectors.mT @ weight.float() if gate_side(*weight.shape) == "output" else (weight.float() @ vectors).mT
    found = along.square().sum(dim=1).cpu().double()  # not every device has fp64
    expected = basis.spectrum[: len(found)].square()
    return float((found - expected).abs().sum() / expected.sum().clamp(min=torch.finfo(torch.float64).tiny))


def _allowed(weight: torch.Tensor) -> float:
    """Return the fraction that rounding may displace: less for a weight of more than 4 bits."""
    rows = weight[:: max(1, len(weight) // 16), :NEIGHBOURS]
    values = sorted(len(row.unique()) for row in rows)
    return DISPLACED_IF_FINE if values[len(values) // 2] > VALUES_IF_COARSE else DISPLACED


class BasisPack:
    """
    The bases of a pack, read one at a time.

    Args:
        path: Folder or Hub id.
        revision (`str`, *optional*): Revision on the Hub.

    Attributes:
        about: Metadata of the pack, such as its `base_model`.

    Raises:
        ValueError: There is no pack, or it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], revision: str | None = None) -> None:
        self.path, self.revision = str(path), revision
        try:
            index = json.loads(read_text(self._file(INDEX)))
            self.files: dict[str, str] = dict(index["weight_map"])
            self.about: dict[str, Any] = dict(index["metadata"])
            kind = self.about["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path} is not a complete basis pack: {INDEX} cannot be read ({error}). Make one with "
                "`peft-svf decompose`."
            ) from error
        if kind != FORMAT:
            raise ValueError(f"{self.path} is a pack of the format {kind!r}. This version reads {FORMAT!r}.")
        for name, file in self.files.items():
            if not isinstance(file, str) or Path(file).name != file or Path(file).suffix != ".safetensors":
                raise ValueError(f"{self.path} names {file!r} for {name}, which is not a file next to the index.")

    def __repr__(self) -> str:
        return f"BasisPack({self.path!r})"

    @property
    def modules(self) -> list[str]:
        """The names of the decomposed modules."""
        return list(self.files)

    def basis_for(
        self, weight: torch.Tensor, *, name: str, quantized: bool = False, base_check: str = "error"
    ) -> SingularBasis:
        """Return the basis of a weight `[out, in]`, on its device and in its dtype.

        Args:
            weight: The weight.
            name: Name of its module.
            quantized: Whether the weight is a quantized copy of the decomposed one. The basis then keeps its dtype. A
                fine-tuning that changed the weight by less than rounding is not detected.
            base_check: What to do if a quantized weight does not match, as in [`SVFRuntimeConfig`].

        Raises:
            ValueError: The pack has no basis of this name, or one for another shape or other weights, or is damaged.
        """
        found = self.load(name, k=min(weight.shape))
        if quantized:
            part = _displaced(weight, found)
            if not part <= _allowed(weight):  # nor NaN
                reason = (
                    f"{self.path} was made from other weights than {name}: {part:.1%} of the weight does not match the "
                    "pack, and rounding explains 0.1 % (8 bits) to 2 % (4 bits)."
                )
                error = BaseCheckError(reason, 'For coarser quantization, pass `SVFRuntimeConfig(base_check="warn")`.')
                if base_check == "error" or part != part:
                    raise error
                if base_check == "warn":
                    warnings.warn(str(error), stacklevel=2)
            return SingularBasis(found.vectors.to(weight.device), found.spectrum)
        norm, expected = float(weight.detach().double().norm()), float(found.spectrum.norm())
        allowed = tolerances([0.0, 0.0, 0.0, expected], (weight.shape[0], weight.shape[1]))[3]
        if not abs(norm - expected) <= allowed:  # nor NaN
            raise ValueError(
                f"{self.path} was made from other weights: ‖W‖_F of {name} is {norm:.8g}, the pack has {expected:.8g}. "
                "Use the pack of this base model."
            )
        return SingularBasis(found.vectors.to(device=weight.device, dtype=weight.dtype), found.spectrum)

    def load(self, name: str, k: int) -> SingularBasis:
        """Return the stored basis of a module whose smaller side is `k`, on the CPU.

        Raises:
            ValueError: As `basis_for`, without the check of the weight.
        """
        known = self._name(name)
        try:
            with safe_open(self._file(self.files[known]), framework="pt") as file:
                shape = file.get_slice("vectors").get_shape()
                if len(shape) != 2 or shape[0] != k or not 1 <= shape[1] <= k:
                    raise ValueError(f"{self.path} has a basis of shape {shape} for {name}, whose smaller side is {k}.")
                if file.get_slice("spectrum").get_shape() != [k]:
                    raise ValueError(f"{self.path} has no spectrum of {k} singular values for {name}.")
                found = SingularBasis(file.get_tensor("vectors"), file.get_tensor("spectrum"))
                about = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.path} is damaged: {self.files[known]} cannot be read ({error}).") from error
        if about.get("sha256") != checksum(about.get("key", ""), found):
            raise ValueError(f"{self.path} is damaged: the checksum of {self.files[known]} differs.")
        return found

    def _name(self, name: str) -> str:
        """Return the name of a module in the pack. A model and its headless form differ by a prefix."""
        if name in self.files:
            return name
        same = [each for each in self.files if each.endswith(f".{name}") or name.endswith(f".{each}")]
        if len(same) != 1:
            first = next(iter(self.files), "none")
            raise ValueError(f"{self.path} has no basis for {name}; it has {len(self.files)}, such as {first}.")
        return same[0]

    def _file(self, name: str) -> Path:
        if os.path.isdir(self.path):
            return Path(self.path, name)
        return Path(hf_hub_download(self.path, name, revision=self.revision))
