"""`SVFConfig`: what to adapt, with PEFT's names for it."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Optional, Union

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..reporting.cards import complete_card
from .registration import SVF_PEFT_TYPE

_CHOICES = {"base_check": ("error", "warn", "ignore"), "fold": ("auto", "always", "never")}


def _is_finite(number: Any) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)


@dataclass
class SVFRuntimeConfig:
    """Choices of this process, never saved with the adapter (as PEFT's `LoraRuntimeConfig`).

    Args:
        base_check (`"error"`, `"warn"` or `"ignore"`): What to do when a loaded adapter was made for another base
            model, that is, when the spectrum of a weight differs from the one recorded in the adapter.
        cache_dir (`str`, *optional*): Where singular bases are kept. Default: `$PEFT_SVF_CACHE`, or `peft_svf` under
            the Hugging Face home.
        use_cache (`bool`): Whether to keep and reuse singular bases on disk.
        basis (`str`, *optional*): Folder or Hub id of a basis pack (`peft-svf decompose`), which all singular bases are
            read from; nothing is decomposed then. Quantized base models need the pack of their full-precision model;
            for them the default is `$PEFT_SVF_BASIS`.
        decompose_quantized (`bool`): On a quantized base model without a pack, decompose the rounded weights. Experts
            for other precisions do not fit then, nor does what is trained so fit them.
        fold (`"auto"`, `"always"` or `"never"`): Whether a layer keeps its effective weight W(z) beside the base
            weight, as long as δ stays the same, which makes it as fast as the base layer and takes the memory of one
            more weight. `"auto"` does where that is less work than going through the singular basis with every token,
            `"always"` from the first token on. Neither does where it cannot be done exactly (16-bit weights that would
            round more than 2 % of the change away) or not at all (sharded or offloaded weights, `torch.compile`).
            `"never"` frees what was kept.
    """

    base_check: Literal["error", "warn", "ignore"] = field(
        default="error", metadata={"help": "What to do if the adapter was made for another base model."}
    )
    cache_dir: Optional[str] = field(default=None, metadata={"help": "Folder of the singular bases."})
    use_cache: bool = field(default=True, metadata={"help": "Whether to keep singular bases on disk."})
    basis: Optional[str] = field(
        default=None, metadata={"help": "Folder or Hub id of a basis pack, instead of decomposing the weights."}
    )
    decompose_quantized: bool = field(
        default=False, metadata={"help": "Whether to decompose rounded weights if there is no basis pack."}
    )
    fold: Literal["auto", "always", "never"] = field(
        default="auto", metadata={"help": "Whether to keep effective weights for speed; takes one more set of weights."}
    )

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

    Every adapted weight gets one trainable vector δ with one entry per singular value, and acts as
    `W(z) = U diag(σ ⊙ (1 + δ)) Vᵀ`.

    Args:
        r (`int`, *optional*):
            Number of singular values to adapt, the largest ones first. `None`, and any number beyond
            `k = min(out_features, in_features)` of a weight, adapts all `k`.
        target_modules (`Union[list[str], str]`, *optional*):
            The names of the modules to adapt. A string is a regex that must match the whole name; a list holds names or
            ends of names; `"all-linear"` is every linear and Conv1D layer but the output layer. `None` chooses by
            architecture, as LoRA does.
        exclude_modules (`Union[list[str], str]`, *optional*):
            The names of the modules to leave out, matched in the same way.
        layers_to_transform (`Union[list[int], int]`, *optional*):
            Indices of the layers to adapt; all if `None`.
        layers_pattern (`Union[list[str], str]`, *optional*):
            Name of the `nn.ModuleList` that the indices refer to, if it is not found by itself.
        modules_to_save (`list[str]`, *optional*):
            Modules to train and save in full besides δ, such as a fresh classification head.
        fan_in_fan_out (`bool`):
            Whether the weights are stored as `[in, out]`. Set by itself for `nn.Linear` and transformers' `Conv1D`.
        bias (`str`):
            `"none"`, `"all"` or `"svf_only"`: which biases are trained and saved.
        init_weights (`bool`):
            `True`: δ = 0, the base model exactly. `False`: random δ, for tests.
        base_fingerprint (`dict[str, list[float]]`, *optional*):
            σ_1, σ_mid, σ_k and ‖W‖_F of each adapted weight. Filled in when the adapter is attached, saved with it, and
            compared when it is attached again.
        runtime_config ([`SVFRuntimeConfig`] or `dict`):
            Choices of this process; not saved.
    """

    r: Optional[int] = field(
        default=None, metadata={"help": "Number of leading singular values to adapt; None for all."}
    )
    target_modules: Optional[Union[list[str], set[str], str]] = field(
        default=None,
        metadata={
            "help": (
                "List of module names or regex expression of the module names to adapt, or 'all-linear'. If not "
                "specified, modules are chosen according to the model architecture."
            )
        },
    )
    exclude_modules: Optional[Union[list[str], set[str], str]] = field(
        default=None, metadata={"help": "List of module names or regex expression of the module names to leave out."}
    )
    layers_to_transform: Optional[Union[list[int], int]] = field(
        default=None, metadata={"help": "The indices of the layers to adapt; all layers if None."}
    )
    layers_pattern: Optional[Union[list[str], str]] = field(
        default=None, metadata={"help": "The name of the nn.ModuleList that `layers_to_transform` refers to."}
    )
    modules_to_save: Optional[list[str]] = field(
        default=None, metadata={"help": "Modules to train and save in full, such as a classification head."}
    )
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "Whether the weights are stored as (fan_in, fan_out), as Conv1D does."}
    )
    bias: Literal["none", "all", "svf_only"] = field(
        default="none", metadata={"help": "Which biases to train: 'none', 'all' or 'svf_only'."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "True starts at the base model exactly; False is random, for tests."}
    )
    base_fingerprint: Optional[dict[str, list[float]]] = field(
        default=None,
        repr=False,
        metadata={"help": "Spectrum of each adapted weight; filled in and compared when attached."},
    )
    runtime_config: SVFRuntimeConfig = field(
        default_factory=SVFRuntimeConfig, metadata={"help": "Choices of this process; not saved."}
    )

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
        # What the adapter was made for, as opposed to what `base_fingerprint` says once it is attached: a config object
        # may be used for several models in turn, a saved adapter may not.
        self.expected_fingerprint = dict(self.base_fingerprint or {})
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
        """Fields come from files, too.

        Raises:
            ValueError: One is of another kind than it must be.
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
                    raise ValueError(f"`{name}` is no regular expression: {value!r} ({error}).") from error
        layers = self.layers_to_transform
        indices = layers if isinstance(layers, (list, tuple, set)) else [] if layers is None else [layers]
        if not all(isinstance(index, int) and not isinstance(index, bool) for index in indices):
            raise ValueError(f"`layers_to_transform` must be a number or numbers of layers, got {layers!r}.")
        if self.base_fingerprint is not None and not isinstance(self.base_fingerprint, dict):
            raise ValueError(f"`base_fingerprint` must map modules to four numbers, got {self.base_fingerprint!r}.")
        for name, numbers in (self.base_fingerprint or {}).items():
            if not (isinstance(numbers, (list, tuple)) and len(numbers) == 4 and all(map(_is_finite, numbers))):
                raise ValueError(f"`base_fingerprint` must have four numbers for {name}, got {numbers!r}.")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a dictionary, without the runtime configuration."""
        config: dict[str, Any] = super().to_dict()
        config.pop("runtime_config")
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's; a card beside it is told how the adapter is loaded, if it does not say so."""
        super().save_pretrained(save_directory, **kwargs)
        if (card := Path(save_directory, "README.md")).is_file():
            complete_card(card, self.base_model_name_or_path, str(save_directory), self.revision)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """As PEFT's. `runtime_config=` is passed on; a local adapter file that is damaged is refused by name here, as
        PEFT's own error for it names no file.

        Raises:
            ValueError: No config there, a damaged one, or a damaged `adapter_model.safetensors` beside it.
            TypeError: A config that is none of an adapter.
        """
        where = Path(pretrained_model_name_or_path, subfolder or "", CONFIG_NAME)
        try:
            config: PeftConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if not where.is_file():
                raise
            kind = TypeError if isinstance(error, TypeError) else ValueError  # as PEFT has it
            raise kind(f"{where} cannot be read: {type(error).__name__}: {error}") from error
        file = Path(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        if file.is_file():
            try:
                with safe_open(file, framework="pt"):
                    pass
            except SafetensorError as error:
                raise ValueError(
                    f"{file} is damaged or cut short ({error}). Save or download the adapter again."
                ) from error
        return config
