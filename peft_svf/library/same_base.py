"""Whether two experts were made for one base model, by what their configs record, without the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..spectral.fingerprint import LABELS, fingerprint_differences
from ..tuner.config import SVFConfig


def base_difference(config: SVFConfig, other: SVFConfig) -> str | None:
    """Return how the base models of two experts differ, `None` if they agree, or if nothing can be compared.

    The fingerprints of the weights that both adapt decide, because one model has several names: a Hub id, and folders.
    Names are compared only if an expert records no fingerprint.

    Args:
        config: The config of a saved expert.
        other: That of an expert to compare with.
    """
    here, there = config.expected_fingerprint, other.expected_fingerprint
    lengths = {} if config.checkpoint is None else config.checkpoint.deltas
    pairs: dict[str, tuple[Sequence[float], Sequence[float], tuple[int, int]]] = {}
    for name in here.keys() & there.keys() & lengths.keys():
        k = lengths[name][0]  # the shape is not recorded; a weight is at least as large as its δ
        ours, theirs = here[name], there[name]
        if _rank(config, name) != _rank(other, name):  # samples of other numbers of singular vectors
            ours, theirs = ours[: len(LABELS)], theirs[: len(LABELS)]
        pairs[name] = (theirs, ours, (k, k))
    if pairs:
        return _first(fingerprint_differences(pairs), len(pairs))
    if here and there:
        return None  # they adapt different weights; loading compares each with the model
    names = [each.base_model_name_or_path for each in (config, other)]
    if all(names) and names[0] != names[1]:
        return f"its base model is {names[0]!r}, not {names[1]!r}"
    return None


def _rank(config: SVFConfig, name: str) -> int | None:
    return None if config.checkpoint is None else config.checkpoint.deltas.get(name, (0,))[0]


def _first(differences: Mapping[str, str], count: int) -> str | None:
    if not differences:
        return None
    name = min(differences)
    return f"{len(differences)} of {count} weights differ, the first is {name}: {differences[name]}"
