"""`SVFConfig` and `SVFRuntimeConfig`: the settings of an adapter, under PEFT's names."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Optional, Union

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME

from ..reporting.cards import complete_card
from ..spectral.fingerprint import LABELS, SAMPLES
from .checkpoint import Checkpoint, read_checkpoint
from .registration import SVF_PEFT_TYPE

_CHOICES = {"base_check": ("error", "warn", "ignore"), "fold": ("auto", "always", "never")}


def _is_finite(number: Any) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)


@dataclass
class SVFRuntimeConfig:
    """Settings of the current process. They are never saved with the adapter, like PEFT's `LoraRuntimeConfig`.

    Args:
        base_check (`"error"`, `"warn"` or `"ignore"`): What to do when a loaded adapter was trained on another base
            model, that is, when the spectrum of a weight differs from the one recorded in the adapter.
        cache_dir (`str`, *optional*): Folder of the cached singular bases. Default: `$PEFT_SVF_CACHE`, or `peft_svf` in
            the Hugging Face home.
        use_cache (`bool`): Whether to cache singular bases on disk.
        basis (`str`, *optional*): Folder or Hub id of a basis pack (`peft-svf decompose`). All singular bases are read
            from it and nothing is decomposed. A quantized base model needs the pack of its full-precision model; its
            default is `$PEFT_SVF_BASIS`.
        decompose_quantized (`bool`): Decompose the rounded weights of a quantized base model that has no pack. Experts
            trained this way do not transfer to the full-precision model, nor the other way round.
        fold (`"auto"`, `"always"` or `"never"`): Whether a layer stores its effective weight W(z) next to the base
            weight until δ changes. A folded layer is as fast as the base layer and stores one more weight. `"auto"`
            folds once that is cheaper than applying the gate to every token, `"always"` from the first token on.
            Neither folds if 16-bit rounding would lose more than 2 % of the change, or if the weights are sharded,
            offloaded or compiled by `torch.compile`. `"never"` frees the stored weight.
    """

    base_check: Literal["error", "warn", "ignore"] = "error"
    cache_dir: Optional[str] = None
    use_cache: bool = True
    basis: Optional[str] = None
    decompose_quantized: bool = False
    fold: Literal["auto", "always", "never"] = "auto"

    def __setattr__(self, name: str, value: Any) -> None:
        choices = _CHOICES.get(name)
        if choices is not None and value not in choices:
            *others, last = (repr(choice) for choice in choices)
            raise ValueError(f"`{name}` must be {', '.join(others)} or {last}, got {value!r}.")
        super().__setattr__(name, value)


@dataclass
class SVFConfig(PeftConfig):
    """
    Configuration of an [`SVFModel`]: singular value fine-tuning, https://huggingface.co/papers/2501.06252.

    Every adapted weight gets one trainable vector δ with one entry per singular value. The layer then computes with
    `W(z) = U diag(σ ⊙ (1 + δ)) Vᵀ`.

    Args:
        r (`int`, *optional*):
            Number of singular values to adapt, largest first. `None`, and any number above
            `k = min(out_features, in_features)` of a weight, adapts all `k`.
        target_modules (`Union[list[str], str]`, *optional*):
            Names of the modules to adapt. A string is a regex that must match the whole name; a list holds names or
            ends of names; `"all-linear"` is every linear and Conv1D layer except the output layer. `None` chooses by
            architecture, as LoRA does.
        exclude_modules (`Union[list[str], str]`, *optional*):
            Names of the modules to leave out, matched in the same way.
        layers_to_transform (`Union[list[int], int]`, *optional*):
            Indices of the layers to adapt; all if `None`.
        layers_pattern (`Union[list[str], str]`, *optional*):
            Name of the `nn.ModuleList` that the indices refer to, if PEFT does not find it.
        modules_to_save (`list[str]`, *optional*):
            Modules to train and save in full besides δ, such as a new classification head.
        fan_in_fan_out (`bool`):
            Whether the weights are stored as `[in, out]`. Corrected automatically for `nn.Linear` and transformers'
            `Conv1D`.
        bias (`str`):
            `"none"`, `"all"` or `"svf_only"`: which biases are trained and saved.
        init_weights (`bool`):
            `True` starts at δ = 0, which is exactly the base model. `False` draws random δ, for tests.
        base_fingerprint (`dict[str, list[float]]`, *optional*):
            σ_1, σ_mid, σ_k and ‖W‖_F of each adapted weight, and 12 samples of its singular vectors. Filled in when
            the adapter is attached, saved with it, and compared when it is attached again.
        base_dtype (`str`, *optional*):
            The dtype of these weights, such as `"float32"`. Filled in with `base_fingerprint`.
        runtime_config ([`SVFRuntimeConfig`] or `dict`):
            Settings of the current process; not saved.
    """

    r: Optional[int] = None
    target_modules: Optional[Union[list[str], set[str], str]] = None
    exclude_modules: Optional[Union[list[str], set[str], str]] = None
    layers_to_transform: Optional[Union[list[int], int]] = None
    layers_pattern: Optional[Union[list[str], str]] = None
    modules_to_save: Optional[list[str]] = None
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "svf_only"] = "none"
    init_weights: bool = True
    base_fingerprint: Optional[dict[str, list[float]]] = field(default=None, repr=False)
    base_dtype: Optional[str] = None
    runtime_config: SVFRuntimeConfig = field(default_factory=SVFRuntimeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SVF_PEFT_TYPE
        if isinstance(self.runtime_config, dict):
            known = [each.name for each in fields(SVFRuntimeConfig)]
            if unknown := [name for name in self.runtime_config if name not in known]:
                raise ValueError(f"`runtime_config` has no {unknown[0]!r}; it has {', '.join(known)}.")
            self.runtime_config = SVFRuntimeConfig(**self.runtime_config)
        if not isinstance(self.runtime_config, SVFRuntimeConfig):
            raise ValueError(f"`runtime_config` must be an SVFRuntimeConfig or a dict, got {self.runtime_config!r}.")
        self._check_types()
        # A copy: one config object may be attached to several models in turn, which overwrites `base_fingerprint`.
        # Only the fingerprint that came with the config is compared.
        self.expected_fingerprint, self.expected_r = dict(self.base_fingerprint or {}), self.r
        self._checkpoint: Checkpoint | None = None
        self._choice_of_checkpoint: list[Any] = []
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if self.r is not None and (isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1):
            raise ValueError(f"`r` must be a positive integer, or None for all singular values, got {self.r!r}.")
        if self.bias not in ("none", "all", "svf_only"):
            raise ValueError(f"`bias` must be 'none', 'all' or 'svf_only', got {self.bias!r}.")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            # a regex names the layers itself
            for field_name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, field_name) is not None:
                    raise ValueError(f"`{field_name}` cannot be used when `target_modules` is a str.")

    def _check_types(self) -> None:
        """Check the types of the fields, which may come from a file.

        Raises:
            ValueError: A field has the wrong type.
        """
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            texts = isinstance(value, (list, set, tuple)) and all(isinstance(each, str) for each in value)
            if not (value is None or texts or (isinstance(value, str) and name != "modules_to_save")):
                raise ValueError(f"`{name}` must be names of modules, got {value!r}.")
            if isinstance(value, str) and name != "layers_pattern" and value != "all-linear":
                try:
                    re.compile(value)
                except re.error as error:
                    raise ValueError(f"`{name}` is not a valid regular expression: {value!r} ({error}).") from error
        layers = self.layers_to_transform
        indices = layers if isinstance(layers, (list, tuple, set)) else [] if layers is None else [layers]
        if not all(isinstance(index, int) and not isinstance(index, bool) for index in indices):
            raise ValueError(f"`layers_to_transform` must be a layer index or a list of them, got {layers!r}.")
        if self.base_fingerprint is not None and not isinstance(self.base_fingerprint, dict):
            raise ValueError(f"`base_fingerprint` must map modules to numbers, got {self.base_fingerprint!r}.")
        for name, numbers in (self.base_fingerprint or {}).items():
            lengths = (len(LABELS), len(LABELS) + SAMPLES)  # files of earlier versions have no samples
            if not (isinstance(numbers, (list, tuple)) and len(numbers) in lengths and all(map(_is_finite, numbers))):
                raise ValueError(
                    f"`base_fingerprint` must have {lengths[0]} or {lengths[1]} numbers for {name}, got {numbers!r}."
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as a dictionary, without the runtime configuration."""
        config: dict[str, Any] = super().to_dict()
        config.pop("runtime_config")
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as PEFT does, and add the loading code to a model card in the folder if it has none."""
        super().save_pretrained(save_directory, **kwargs)
        if (card := Path(save_directory, "README.md")).is_file():
            complete_card(card, self.base_model_name_or_path, str(save_directory), self.revision)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Load as PEFT does, and check that a local adapter file can be read.

        PEFT's own error for a damaged file does not name it. `runtime_config=` is passed on.

        Raises:
            ValueError: There is no config, or it or the `adapter_model.safetensors` next to it is damaged.
            TypeError: The config does not belong to an adapter.
        """
        where = Path(pretrained_model_name_or_path, subfolder or "", CONFIG_NAME)
        try:
            config: PeftConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if not where.is_file():
                raise
            kind = TypeError if isinstance(error, TypeError) else ValueError  # the types that PEFT raises
            raise kind(f"{where} cannot be read: {type(error).__name__}: {error}") from error
        if where.is_file() and isinstance(config, SVFConfig):
            config._checkpoint, config._choice_of_checkpoint = read_checkpoint(where.parent), config._choice()
        return config

    def _choice(self) -> list[Any]:
        """Return the settings on which the shape of an adapter depends."""
        chosen = (self.r, self.target_modules, self.exclude_modules, self.layers_to_transform, self.layers_pattern)
        return [sorted(each, key=str) if isinstance(each, set) else each for each in chosen]

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The adapter file that this config was read with; `None` if the config was changed since."""
        return self._checkpoint if self._choice() == self._choice_of_checkpoint else None

    def length(self, shape: Sequence[int]) -> int:
        """Return the length of δ for a weight of this shape."""
        return min(shape) if self.r is None else min(self.r, *shape)

    def rename_modules(self, names: Mapping[str, str]) -> None:
        """Replace old module names by new ones, given pairs of both.

        A regex that does not match all of the new names becomes one that matches exactly these.
        """
        self.expected_fingerprint = {names.get(name, name): each for name, each in self.expected_fingerprint.items()}
        if names and isinstance(self.target_modules, set):
            self.target_modules = {names.get(name, name) for name in self.target_modules}
        pattern, modules = self.target_modules, sorted(self.expected_fingerprint)
        if names and isinstance(pattern, str) and not all(re.fullmatch(pattern, name) for name in modules):
            self.target_modules = "|".join(re.escape(name) for name in modules)

    def check_checkpoint(self, path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
        """Check a saved adapter without its base model: one healthy δ for each module that the config records.

        Raises:
            ValueError: The adapter is incomplete or damaged.
        """
        wanted = dict.fromkeys(self.expected_fingerprint or checkpoint.deltas)
        if not wanted:
            raise ValueError(f"{path} holds no δ. Save or download the adapter again.")
        checkpoint.check(str(path), wanted, at_most=self.r)


def load_svf_config(path: str | os.PathLike[str]) -> SVFConfig:
    """Load the config of a saved SVF adapter.

    Args:
        path: Folder or Hub id of the adapter.

    Raises:
        ValueError: There is no adapter, or it uses another PEFT method.
    """
    config = SVFConfig.from_pretrained(str(path))
    if not isinstance(config, SVFConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"{path} is a {kind} adapter. Expected an SVF adapter.")
    return config
