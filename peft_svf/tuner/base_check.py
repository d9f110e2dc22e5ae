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
        name = recorded_name(layer.module_name, config.expected_fingerprint)
        seen.add(name)
        if found is None:
            continue
        if not config.expected_fingerprint:
            config.base_fingerprint = {**(config.base_fingerprint or {}), layer.module_name: found}
        elif name is None:
            differences.append(f"{layer.module_name}: the adapter has no module of this name")
        elif difference := fingerprint_difference(config.expected_fingerprint[name], found, layer.shape):
            differences.append(f"{layer.module_name}: {difference}")
    if layers and whole_model:
        absent = sorted(set(config.expected_fingerprint) - seen)
        differences += [f"{name}: the adapter has this module, but it is not adapted here" for name in absent]
    if not differences or (policy := config.runtime_config.base_check) == "ignore":
        return
    base = f" ({config.base_model_name_or_path})" if config.base_model_name_or_path else ""
    message = (
        f"Adapter {adapter_name!r} was made for another base model: {len(differences)} of "
        f"{len(config.expected_fingerprint)} weights differ, the first is {differences[0]}. Load the base model that "
        f"the adapter was trained on{base}."
    )
    if policy == "warn":
        warnings.warn(message, stacklevel=2)
        return
    raise ValueError(
        message + " To attach it anyway, load its config with `SVFConfig.from_pretrained(path, "
        'runtime_config=SVFRuntimeConfig(base_check="warn"))` and pass it as `config=`.'
    )


def recorded_name(module_name: str, recorded: Mapping[str, object]) -> str | None:
    """Return the name under which a module is recorded, or `None`.

    A model and its headless form differ by a prefix: `model.layers.0.mlp` and `layers.0.mlp`.
    """
    if module_name in recorded:
        return module_name
    same = [name for name in recorded if name.endswith(f".{module_name}") or module_name.endswith(f".{name}")]
    return same[0] if len(same) == 1 else None
