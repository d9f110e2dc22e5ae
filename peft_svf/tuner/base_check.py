"""Is this the base model that the adapter was made for?"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..spectral import fingerprint_difference

if TYPE_CHECKING:
    from .layer import SVFLayer


def check_base(adapter_name: str, layers: Sequence[SVFLayer]) -> None:
    """Compare the layers' weights with those that an adapter was made for, and note them in its config.

    An expert for other weights has the right shapes and computes nonsense, so nothing else would tell.

    Args:
        adapter_name (`str`): The adapter; its config is taken from the layers.
        layers (`Sequence[SVFLayer]`): Layers that have the adapter. Those whose weights are on meta wait.

    Raises:
        ValueError: A spectrum differs and `runtime_config.base_check` is `"error"`.
    """
    checked, differences = 0, []
    for layer in layers:
        config = layer.svf_config[adapter_name]
        expected, found = config.expected_fingerprint.get(layer.module_name), layer.base_fingerprint
        if found is None:
            continue
        if expected is None:
            config.base_fingerprint = {**(config.base_fingerprint or {}), layer.module_name: found}
            continue
        checked += 1
        if (difference := fingerprint_difference(expected, found, layer.shape)) is not None:
            differences.append(f"{layer.module_name}: {difference}")
    if not differences or (policy := config.runtime_config.base_check) == "ignore":
        return
    message = (
        f"Adapter {adapter_name!r} was made for another base model: {len(differences)} of {checked} weights differ, "
        f"the first is {differences[0]}. Load the base model that the adapter was trained on"
        + (f" ({config.base_model_name_or_path})" if config.base_model_name_or_path else "")
        + "."
    )
    if policy == "warn":
        warnings.warn(message, stacklevel=2)
        return
    raise ValueError(
        message + " If you know better, load its config with `SVFConfig.from_pretrained(path, "
        'runtime_config=SVFRuntimeConfig(base_check="warn"))` and pass it as `config=`.'
    )
