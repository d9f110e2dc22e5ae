"""Check that an adapter is attached to the base model that it was trained on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import zip_longest

from ..spectral.fingerprint import fingerprint_difference
from .config import SVFConfig
from .protocol import AdaptedLayer

NOT_RECORDED = "the adapter has no module of this name"


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
    known = {layer.module_name: _recorded_name(layer.module_name, expected) for layer in layers}
    differences = []
    for layer in layers:
        found, name = layer.fingerprint(adapter_name), known[layer.module_name]
        if found is None or name is None:
            continue
        if difference := fingerprint_difference(expected[name], found, layer.shape):
            differences.append(f"{layer.module_name}: {difference}")
    missing = [name for name, recorded in known.items() if recorded is None]
    absent = sorted(set(expected) - set(known.values())) if whole_model else []
    renamed = list(zip_longest(missing, absent))  # a module under another name is one difference
    differences += [_unmatched(here, recorded) for here, recorded in renamed]
    if differences:
        refuse_base(
            f"Adapter {adapter_name!r}",
            differences,
            len(layers) - len(missing) + len(renamed),
            config,
            policy=config.runtime_config.base_check,
            override="load its config with `SVFConfig.from_pretrained(path, "
            'runtime_config=SVFRuntimeConfig(base_check="warn"))` and pass it as `config=`',
        )


def base_difference(
    expected: Mapping[str, Sequence[float]], module_name: str, found: Sequence[float], shape: tuple[int, int]
) -> str | None:
    """Return how the fingerprint of a weight differs from the recorded one. `None` if it agrees or none is recorded."""
    if not expected:
        return None
    name = _recorded_name(module_name, expected)
    return NOT_RECORDED if name is None else fingerprint_difference(expected[name], found, shape)


def record_base(config: SVFConfig, adapter_name: str, layers: Sequence[AdaptedLayer], *, keep: bool = False) -> None:
    """Record in an adapter's config which weights it is attached to, unless the config came with such a record.

    Args:
        config: The config.
        adapter_name: The adapter.
        layers: Its layers. Those whose weights are not loaded yet are left out.
        keep: Whether to keep the record of other layers, because these are not all.
    """
    if config.expected_fingerprint:
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
    adapter: str, differences: Sequence[str], count: int, config: SVFConfig, *, policy: str, override: str
) -> None:
    """Report that an adapter was made for another base model, as `policy` (`SVFRuntimeConfig.base_check`) says.

    Args:
        adapter: The adapter, as the subject of the message.
        differences: The differing weights, one description each.
        count: Number of compared weights.
        config: Its config, which names the base model that the adapter was made for.
        policy: `"error"`, `"warn"` or `"ignore"`.
        override: How to use the adapter anyway.

    Raises:
        ValueError: The policy is `"error"`.
    """
    if policy == "ignore":
        return
    about = [each for each in (config.base_model_name_or_path, config.base_dtype) if each]
    named = f" ({', '.join(about)})" if about else ""
    message = (
        f"{adapter} was made for another base model: {len(differences)} of {count} weights differ, the first is "
        f"{differences[0]}. Load the base model that the adapter was made for, in the same dtype{named}."
    )
    if policy == "error":
        raise ValueError(f"{message} To use it anyway, {override}.")
    warnings.warn(message, stacklevel=3)


def _unmatched(here: str | None, recorded: str | None) -> str:
    if here is None:
        return f"{recorded}: the adapter has this module, but it is not adapted here"
    return f"{here}: {NOT_RECORDED}" + (f", but has {recorded}, which is not adapted here" if recorded else "")


def _recorded_name(module_name: str, recorded: Mapping[str, object]) -> str | None:
    """Return the name under which a module is recorded, or `None`.

    A model and its headless form differ by a prefix: `model.layers.0.mlp` and `layers.0.mlp`.
    """
    if module_name in recorded:
        return module_name
    same = [name for name in recorded if name.endswith(f".{module_name}") or module_name.endswith(f".{name}")]
    return same[0] if len(same) == 1 else None
