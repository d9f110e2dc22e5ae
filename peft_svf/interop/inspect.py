"""Summarize an adapter without its base model, and compare a model with the one that an adapter was made for."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

from ..spectral.cache import BasisCache
from ..spectral.fingerprint import fingerprint, fingerprint_differences
from ..tuner.checkpoint import Checkpoint, adapter_tensors
from ..tuner.config import SVFConfig, load_svf_config
from ..tuner.renames import current_names
from ..tuner.targets import adapted_fraction, linear_weights
from ..utils.progress import progress_bar
from .sources import ModelTensors, linear_modules, meta_model, model_folder

_SUFFIX = ".svf_delta.weight"


@dataclass(frozen=True)
class AdapterSummary:
    """
    What an SVF adapter holds, and how large its changes are.

    Attributes:
        path: Folder or Hub id.
        base_model: The base model named in its config.
        revision: The revision of the base model.
        modules: Number of adapted weights.
        numbers: Number of parameters δ.
        r: Largest number of adapted singular values per weight; `None` if all.
        rms: Root mean square of all δ.
        largest: The modules with the largest rms of δ, and that rms.
        fingerprinted: Number of weights whose spectrum is recorded.
        broken: Modules whose δ holds NaN or Inf. They are left out of the other statistics.
        more: Names of other parameters, such as biases.
        missing: Modules whose spectrum is recorded and whose δ is missing.
        problem: Why the adapter does not load, as far as its files show; `None` if it is whole.
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
    missing: list[str]
    problem: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as a JSON-serialisable dictionary."""
        return asdict(self)


def inspect_adapter(
    path: str | os.PathLike[str], *, count: int = 5
) -> tuple[AdapterSummary, dict[str, NDArray[np.float32]]]:
    """
    Return a summary of an adapter, and its δ by module name.

    Args:
        path: Folder or Hub id.
        count (`int`): Number of modules in `largest`.

    Raises:
        ValueError: There is no adapter, or it uses another PEFT method.
    """
    config = load_svf_config(path)
    weights = adapter_tensors(path)
    deltas = {
        key.removeprefix("base_model.model.").removesuffix(_SUFFIX): value.float().numpy()
        for key, value in weights.items()
        if key.endswith(_SUFFIX)
    }
    whole = {name: delta for name, delta in deltas.items() if np.isfinite(delta).all()}
    sizes = {name: float(np.sqrt(np.mean(np.square(delta)))) for name, delta in whole.items()}
    numbers = sum(delta.size for delta in whole.values())
    squares = sum(float(np.square(delta.astype(np.float64)).sum()) for delta in whole.values())
    summary = AdapterSummary(
        path=Path(path).as_posix(),
        base_model=config.base_model_name_or_path,
        revision=config.revision,
        modules=len(deltas),
        numbers=sum(delta.size for delta in deltas.values()),
        r=config.r,
        rms=float(np.sqrt(squares / numbers)) if numbers else 0.0,
        largest=dict(sorted(sizes.items(), key=lambda pair: -pair[1])[:count]),
        fingerprinted=len(config.expected_fingerprint),
        broken=sorted(deltas.keys() - whole.keys()),
        more=sorted(key for key in weights if not key.endswith(_SUFFIX)),
        missing=sorted(config.expected_fingerprint.keys() - deltas.keys()),
        problem=_problem(path, config, Checkpoint.of_tensors(weights)),
    )
    return summary, deltas


def _problem(path: str | os.PathLike[str], config: SVFConfig, checkpoint: Checkpoint) -> str | None:
    try:
        config.check_checkpoint(path, checkpoint)
    except ValueError as error:
        return str(error)
    return None


def adapted_part(
    base: str | os.PathLike[str] | None, modules: Iterable[str], *, revision: str | None = None
) -> float | None:
    """
    Return which fraction of the linear weights of a model is in these modules; `None` if its config is not at hand.

    MoE experts count as linear weights, the output layer does not. Nothing is downloaded.

    Args:
        base: Folder or Hub id of the model.
        modules: Names of the adapted modules, as in the δ of `inspect_adapter`.
        revision (`str`, *optional*): Revision of the model on the Hub.
    """
    if base is None:
        return None
    try:
        config = AutoConfig.from_pretrained(base, revision=revision, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError):  # not in the cache, or no causal language model
        return None
    return adapted_fraction(linear_weights(model), set(modules))


def check_spectrum(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> dict[str, str]:
    """
    Return how the weights of a model differ from those that an adapter was made for, by module; empty if they agree.

    A δ that is too long or too short for its weight counts as a difference.
    The weights are read one at a time, and decomposed unless the cache holds their singular bases.

    Args:
        path: Folder or Hub id of an SVF adapter.
        base: Folder or Hub id of a full-precision model.
        revision (`str`, *optional*): Revision of the model on the Hub.
        cache_dir (*optional*): Folder of the cached singular bases.

    Raises:
        ValueError: There is no SVF adapter, it records no spectrum, or the model cannot be read.
    """
    config = load_svf_config(path)
    expected, deltas = config.expected_fingerprint, config.checkpoint.deltas if config.checkpoint else {}
    if not expected:
        raise ValueError(f"{path} does not record the spectrum of its base model, so it cannot be checked.")
    source, cache = model_folder(base, revision), BasisCache(cache_dir, model=str(base))
    model = meta_model(source)
    names = current_names(model, expected)
    config.rename_modules(names)
    expected = config.expected_fingerprint
    deltas = {names.get(name, name): shape for name, shape in deltas.items()}
    tensors, modules = ModelTensors(source, model), linear_modules(model)
    differences, pairs = {}, {}
    for name, numbers in progress_bar(expected.items(), desc="Comparing", unit="weight"):
        if name not in modules or f"{name}.weight" not in tensors:
            differences[name] = "the model has no such weight"
            continue
        weight = tensors.read(f"{name}.weight", transposed=modules[name])
        basis = cache.load_or_compute(weight, name=name)
        if name in deltas and deltas[name] != (length := config.length(weight.shape),):
            differences[name] = f"δ has shape {list(deltas[name])}, expected [{length}]"
            continue
        found = fingerprint(basis.spectrum, basis.vectors[:, : config.r])
        pairs[name] = (numbers, found, (weight.shape[0], weight.shape[1]))
    return {**differences, **fingerprint_differences(pairs)}
