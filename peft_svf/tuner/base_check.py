"""Check that an adapter is attached to the base model that it was trained on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from ..spectral.fingerprint import fingerprint_difference
from .protocol import AdaptedLayer


def check_base(adapter_name: str, layers: Sequence[AdaptedLayer], *, whole_model: bool = True) -> None:
    """Compare the layers' weights with those that an adapter was trained on, and record them in its config.

    On other weights an expert has the right shapes and computes nonsense, so nothing else would detect it.

    Args:
        adapter_name (`str`): The adapter. Its config is taken from the layers.
        layers (`Sequence[AdaptedLayer]`): Layers that have the adapter. Weights on the meta device are skipped.
        whole_model (`bool`): Whether these are all of its layers. Every recorded weight must then be among them.

    Raises:
        ValueError: A spectrum differs and `runtime_config.base_check` is `"error"`.
    """
    differences, seen = [], set()
    for layer in layers:
        config, found = layer.svf_config[adapter_name], layer.base_fingerprint
        expected = config.expected_fingerprint
        seen.add(_recorded_name(layer.module_name, expected))
        if found is not None and not expected:
            config.base_fingerprint = {**(config.base_fingerprint or {}), layer.module_name: found}
        elif found is not None and (difference := base_difference(expected, layer.module_name, found, layer.shape)):
            differences.append(f"{layer.module_name}: {difference}")
    if layers and whole_model:
        absent = sorted(set(expected) - seen)
        differences += [f"{name}: the adapter has this module, but it is not adapted here" for name in absent]
    if differences:
        refuse_base(
            f"Adapter {adapter_name!r}",
            differences,
            len(expected),
            base_model=config.base_model_name_or_path,
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
    return (
        "the adapter has no module of this name"
        if name is None
        else fingerprint_difference(expected[name], found, shape)
    )


def refuse_base(
    adapter: str, differences: Sequence[str], count: int, *, base_model: str | None, policy: str, override: str
) -> None:
    """Report that an adapter was made for another base model, as `policy` (`SVFRuntimeConfig.base_check`) says.

    Args:
        adapter: The adapter, as the subject of the message.
        differences: The differing weights, one description each.
        count: Number of compared weights.
        base_model: The base model that the adapter was made for.
        policy: `"error"`, `"warn"` or `"ignore"`.
        override: How to use the adapter anyway.

    Raises:
        ValueError: The policy is `"error"`.
    """
    if policy == "ignore":
        return
    named = f" ({base_model})" if base_model else ""
    message = (
        f"{adapter} was made for another base model: {len(differences)} of {count} weights differ, the first is "
        f"{differences[0]}. Load the base model that the adapter was made for{named}."
    )
    if policy == "error":
        raise ValueError(f"{message} To use it anyway, {override}.")
    warnings.warn(message, stacklevel=3)


def _recorded_name(module_name: str, recorded: Mapping[str, object]) -> str | None:
    """Return the name under which a module is recorded, or `None`.

    A model and its headless form differ by a prefix: `model.layers.0.mlp` and `layers.0.mlp`.
    """
    if module_name in recorded:
        return module_name
    same = [name for name in recorded if name.endswith(f".{module_name}") or module_name.endswith(f".{name}")]
    return same[0] if len(same) == 1 else None
