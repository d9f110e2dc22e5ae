"""Check that an adapter is attached to the base model that it was trained on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import zip_longest

from ..spectral.fingerprint import LABELS, fingerprint_differences
from ..utils.errors import BaseCheckError
from .config import SVFConfig
from .protocol import AdaptedLayer

# How to use an adapter of another base model.
WITH_CONFIG = (
    "load its config with `SVFConfig.from_pretrained(path, "
    'runtime_config=SVFRuntimeConfig(base_check="warn"))` and pass it as `config=`'
)


def check_base(adapter_name: str, layers: Sequence[AdaptedLayer], *, whole_model: bool = True) -> None:
    """Compare the layers' weights with those that an adapter was trained on, and record them in its config.

    On other weights an expert has the right shapes and computes nonsense, so nothing else would detect it. Equal
    weights in another precision pass, unless their singular vectors are so close that rounding has rotated them.

    Args:
        adapter_name (`str`): The adapter. Its config is taken from the layers.
        layers (`Sequence[AdaptedLayer]`): Layers that have the adapter. Weights on the meta device are skipped.
        whole_model (`bool`): Whether these are all of its layers. Every recorded weight must then be among them.

    Raises:
        ValueError: A weight differs and `runtime_config.base_check` is `"error"`.
    """
    if not layers:
        return
    config = layers[0].svf_config[adapter_name]
    expected = config.expected_fingerprint
    if not expected:
        record_base(config, adapter_name, layers, keep=not whole_model)
        return
    if config.r != config.expected_r:  # the samples are of the leading r singular vectors
        expected = {name: numbers[: len(LABELS)] for name, numbers in expected.items()}
    found = {layer.module_name: (layer.fingerprint(adapter_name), layer.shape) for layer in layers}
    differences, count = base_differences(expected, found, whole_model=whole_model)
    if differences:
        refuse_base(
            f"Adapter {adapter_name!r}",
            differences,
            count,
            config,
            policy=config.runtime_config.base_check,
            override=WITH_CONFIG,
        )


def base_differences(
    expected: Mapping[str, Sequence[float]],
    found: Mapping[str, tuple[Sequence[float] | None, tuple[int, int]]],
    *,
    whole_model: bool = True,
) -> tuple[list[str], int]:
    """Return how weights differ from the recorded ones, one description each, and the number of compared weights.

    Args:
        expected: The recorded fingerprints by module. If there are none, nothing differs.
        found: The fingerprint and the shape of each weight. A fingerprint is `None` if the weight is not loaded.
        whole_model: Whether these are all weights of the adapter. Every recorded one must then be among them.
    """
    if not expected:
        return [], 0
    names = {here: _recorded_name(here, expected) for here in found}
    pairs = {
        here: (expected[name], numbers, shape)
        for here, (numbers, shape) in found.items()
        if (name := names[here]) is not None and numbers is not None
    }
    missing = [here for here, name in names.items() if name is None]
    absent = sorted(set(expected) - set(names.values())) if whole_model else []
    unmatched = list(zip_longest(missing, absent))  # a module under another name is one difference
    differences = [f"{name}: {difference}" for name, difference in fingerprint_differences(pairs).items()]
    differences += [_unmatched(here, recorded) for here, recorded in unmatched]
    return differences, len(found) - len(missing) + len(unmatched)


def record_base(config: SVFConfig, adapter_name: str, layers: Sequence[AdaptedLayer], *, keep: bool = False) -> None:
    """Record in an adapter's config which weights it is attached to, unless the config came with such a record.

    Args:
        config: The config.
        adapter_name: The adapter.
        layers: Its layers. Those whose weights are not loaded yet are left out.
        keep: Whether to keep the record of other layers, because these are not all.
    """
    if config.expected_fingerprint:
        config.base_fingerprint = dict(config.expected_fingerprint)  # the config may have been attached elsewhere
        return
    found = {layer.module_name: layer.fingerprint(adapter_name) for layer in layers}
    config.base_fingerprint = {
        **((keep and config.base_fingerprint) or {}),
        **{name: numbers for name, numbers in found.items() if numbers is not None},
    }
    for layer in layers[:1]:
        if layer.basis is not None:  # in the dtype of the weight, even of one that is quantized here
            config.base_dtype = str(layer.basis.dtype).removeprefix("torch.")


def refuse_base(
    adapter: str,
    differences: Sequence[str],
    count: int,
    config: SVFConfig,
    *,
    policy: str,
    override: str,
    merged: Sequence[str] = (),
) -> None:
    """Report that an adapter was made for another base model, as `policy` (`SVFRuntimeConfig.base_check`) says.

    Args:
        adapter: The adapter, as the subject of the message.
        differences: The differing weights, one description each.
        count: Number of compared weights.
        config: Its config, which names the base model that the adapter was made for.
        policy: `"error"`, `"warn"` or `"ignore"`.
        override: How to use the adapter anyway.
        merged: Adapters that were merged into the base model, which is why its weights differ.

    Raises:
        BaseCheckError: The policy is `"error"`.
    """
    if policy == "ignore":
        return
    about = [each for each in (config.base_model_name_or_path, config.base_dtype) if each]
    named = f" ({', '.join(about)})" if about else ""
    message = (
        f"{adapter} was made for another base model: {len(differences)} of {count} weights differ, the first is "
        f"{differences[0]}. Load the base model that the adapter was made for, in the same dtype{named}."
    )
    if merged:
        message = (
            f"{adapter} was made for the base model before {', '.join(map(repr, merged))} was merged into it: "
            f"{len(differences)} of {count} weights differ. Load the base model again{named}, or attach all adapters "
            "before you merge one."
        )
    if policy == "error":
        raise BaseCheckError(message, f"To use it anyway, {override}.")
    warnings.warn(message, stacklevel=3)


def _unmatched(here: str | None, recorded: str | None) -> str:
    if here is None:
        return f"{recorded}: the adapter has this module, but it is not adapted here"
    return f"{here}: the adapter has no module of this name" + (
        f", but has {recorded}, which is not adapted here" if recorded else ""
    )


def _recorded_name(module_name: str, recorded: Mapping[str, object]) -> str | None:
    """Return the name under which a module is recorded, or `None`.

    A model and its headless form differ by a prefix: `model.layers.0.mlp` and `layers.0.mlp`.
    """
    if module_name in recorded:
        return module_name
    same = [name for name in recorded if name.endswith(f".{module_name}") or module_name.endswith(f".{name}")]
    return same[0] if len(same) == 1 else None
