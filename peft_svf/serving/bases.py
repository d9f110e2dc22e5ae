"""The singular bases of the weights that an engine serves: from a basis pack, or from the files of the model."""

from __future__ import annotations

from collections.abc import Collection

import torch

from ..interop.sources import ModelTensors, linear_modules, meta_model, model_folder
from ..spectral.basis import SingularBasis
from ..spectral.cache import BasisCache
from ..spectral.pack import BasisPack


class ServedBases:
    """
    Reads or computes one basis at a time.

    The weights come from the files of the model, because an engine on a CPU does not keep them. A pack is compared with
    them. A quantized model has no weights in its files and needs a pack.

    Args:
        model (`str`): Folder or Hub id of the served model.
        revision (`str`, *optional*): Its revision on the Hub.
        basis (`str`, *optional*): Folder or Hub id of a basis pack. Without it, the weights are decomposed, and cached.
        cache_dir (`str`, *optional*): Folder of the cache.
        quantized (`bool`): Whether the files of the model hold quantized weights.

    Raises:
        ValueError: The pack or the model cannot be read, or the model is quantized and there is no pack.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        basis: str | None = None,
        cache_dir: str | None = None,
        quantized: bool = False,
    ) -> None:
        self.pack = BasisPack(basis) if basis else None
        self._cache = BasisCache(cache_dir, model=model)
        self._tensors: ModelTensors | None = None
        self._transposed: dict[str, bool] = {}
        if not quantized:
            source = model_folder(model, revision)
            skeleton = meta_model(source)
            self._tensors = ModelTensors(source, skeleton)
            self._transposed = linear_modules(skeleton)
        elif self.pack is None:
            raise ValueError(
                f"{model} is quantized, so its files do not hold the weights that experts were trained on. Name the "
                "basis pack of its full-precision model as `basis`; `peft-svf decompose` makes one."
            )

    @property
    def names(self) -> Collection[str]:
        """The modules that can have a basis, as transformers names them."""
        if self.pack is not None:
            return self.pack.modules
        assert self._tensors is not None
        return [name for name in self._transposed if f"{name}.weight" in self._tensors]

    def of(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> SingularBasis:
        """Return the basis of a weight, on the CPU.

        Args:
            name: Its module.
            shape: `[out, in]` in the engine.
            dtype: Dtype in the engine.

        Raises:
            ValueError: The weight or its basis is missing, damaged, of another shape, or they do not belong together.
        """
        if self._tensors is None:
            assert self.pack is not None
            found = self.pack.load(name, k=min(shape))
            return SingularBasis(found.vectors.to(dtype), found.spectrum)
        weight = self._tensors.read(f"{name}.weight", transposed=self._transposed.get(name, False)).to(dtype)
        if tuple(weight.shape) != shape:
            raise ValueError(f"{name} has the shape {list(shape)} in the engine and {list(weight.shape)} in its file.")
        if self.pack is not None:
            return self.pack.basis_for(weight, name=name)
        return self._cache.load_or_compute(weight, name=name)


def name_in(names: Collection[str], module: str) -> str | None:
    """Return the name of an engine's module among others, `None` if it is not there.

    A model and its headless form differ by a prefix.
    """
    if module in names:
        return module
    same = [each for each in names if each.endswith(f".{module}") or module.endswith(f".{each}")]
    return same[0] if len(same) == 1 else None
