"""What is in an adapter, without its base model; and whether a model is the one that it was made for."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peft.utils.save_and_load import load_peft_weights

from ..spectral.cache import BasisCache
from ..spectral.fingerprint import fingerprint, fingerprint_difference
from ..tuner.config import SVFConfig
from ..utils.progress import progress_bar
from .sources import linear_modules, model_files, model_folder, opened

_SUFFIX = ".svf_delta.weight"


@dataclass(frozen=True)
class AdapterSummary:
    """
    What an SVF adapter is, and how large its changes are.

    Attributes:
        path: Folder or Hub id.
        base_model: The model that it is for, as its config says.
        revision: Of that model.
        modules: Number of adapted weights.
        numbers: How many δ it has in all.
        r: Most singular values of a weight that it changes; `None` if all.
        rms: Root mean square of all δ.
        largest: The modules with the largest rms of δ, with that.
        fingerprinted: How many weights its base is recognised by.
        broken: Modules whose δ holds NaN or Inf; they count nowhere above.
        more: Names of what it holds besides δ, such as biases.
    """

    path: str
    base_model: str | None
    revision: str | None
    modules: int
    numbers: int
    r: int | None
    rms: float
    largest: dict[str, float]
    fingerprinted: int
    broken: list[str]
    more: list[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return asdict(self)


def inspect_adapter(
    path: str | os.PathLike[str], *, count: int = 5
) -> tuple[AdapterSummary, dict[str, NDArray[np.float32]]]:
    """
    A summary of an adapter, and its δ by the name of the module.

    Args:
        path: Folder or Hub id.
        count (`int`): How many of the largest changes to name.

    Raises:
        ValueError: There is no adapter, or it is of another method.
    """
    config = SVFConfig.from_pretrained(str(path))
    if not isinstance(config, SVFConfig):
        raise ValueError(f"{path} is a {config.peft_type} adapter, not an SVF one.")
    weights = load_peft_weights(str(path), device="cpu")
    deltas = {
        key.removeprefix("base_model.model.").removesuffix(_SUFFIX): value.float().numpy()
        for key, value in weights.items()
        if key.endswith(_SUFFIX)
    }
    whole = {name: delta for name, delta in deltas.items() if np.isfinite(delta).all()}
    sizes = {name: float(np.sqrt(np.mean(np.square(delta)))) for name, delta in whole.items()}
    numbers = sum(len(delta) for delta in whole.values())
    squares = sum(float(np.square(delta.astype(np.float64)).sum()) for delta in whole.values())
    summary = AdapterSummary(
        path=Path(path).as_posix(),
        base_model=config.base_model_name_or_path,
        revision=config.revision,
        modules=len(deltas),
        numbers=sum(len(delta) for delta in deltas.values()),
        r=config.r,
        rms=float(np.sqrt(squares / numbers)) if numbers else 0.0,
        largest=dict(sorted(sizes.items(), key=lambda pair: -pair[1])[:count]),
        fingerprinted=len(config.expected_fingerprint),
        broken=sorted(deltas.keys() - whole.keys()),
        more=sorted(key for key in weights if not key.endswith(_SUFFIX)),
    )
    return summary, deltas


def check_spectrum(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> dict[str, str]:
    """
    How the weights of a model differ from those that an adapter was made for, by module; nothing if it is the one.

    The weights are read one at a time, and decomposed unless the cache of singular bases has them.

    Args:
        path: Folder or Hub id of an SVF adapter.
        base: Folder or Hub id of a full-precision model.
        revision (`str`, *optional*): Of the model on the Hub.
        cache_dir (*optional*): Of singular bases.

    Raises:
        ValueError: There is no SVF adapter, it records no spectrum, or the model cannot be read.
    """
    config = SVFConfig.from_pretrained(str(path))
    expected = config.expected_fingerprint if isinstance(config, SVFConfig) else {}
    if not expected:
        raise ValueError(f"{path} is no SVF adapter that records the spectrum of its base model.")
    source, cache = model_folder(base, revision), BasisCache(cache_dir)
    places = {key: file for file, keys in model_files(source).items() for key in keys}
    modules, differences = linear_modules(source), {}
    for name, numbers in progress_bar(expected.items(), desc="Comparing", unit="weight"):
        if name not in modules or f"{name}.weight" not in places:
            differences[name] = "the model has no such weight"
            continue
        with opened(source / places[f"{name}.weight"]) as file:
            weight = file.get_tensor(f"{name}.weight")
        weight = weight.mT if modules[name] else weight
        found = fingerprint(cache.load_or_compute(weight, name=name).spectrum)
        if difference := fingerprint_difference(numbers, found, (weight.shape[0], weight.shape[1])):
            differences[name] = difference
    return differences
