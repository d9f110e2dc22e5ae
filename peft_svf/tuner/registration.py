"""Registration of SVF with PEFT, from outside PEFT.

PEFT finds a method through `PeftType`, a closed enum, and through the mappings that `register_peft_method` fills. So
one member is added to the enum, built in the same way as the enum builds its own.
"""

from __future__ import annotations

import functools
from typing import Any

from peft.utils import PeftType, register_peft_method


def add_peft_type(name: str) -> PeftType:
    """Return the member `name` of `PeftType`, added if it is missing. Every call returns the same object."""
    existing: PeftType | None = PeftType.__members__.get(name)
    if existing is not None:
        return existing
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    # Since Python 3.12 members are found as class attributes; `PeftType` itself refuses assignment, `type` does not.
    type.__setattr__(PeftType, name, member)
    return member


SVF_PEFT_TYPE = add_peft_type("SVF")


def register(config_cls: type, model_cls: type) -> None:
    """Register SVF with PEFT, once.

    Raises:
        ImportError: PEFT already has another implementation of this name. Both read the same `adapter_config.json`, so
            neither may silently replace the other.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known: Any = PEFT_TYPE_TO_CONFIG_MAPPING.get(SVF_PEFT_TYPE)
    if known is None:
        register_peft_method(name="svf", config_cls=config_cls, model_cls=model_cls)
        _print_adapted_fraction(model_cls)
        _ask_before_a_call(model_cls)
    elif (known.__module__, known.__qualname__) != (config_cls.__module__, config_cls.__qualname__):
        raise ImportError(
            f"The installed PEFT already has a method called SVF ({known.__module__}.{known.__qualname__}), which "
            "peft_svf does not overwrite. Use the one in PEFT, or update peft-svf."
        )


def _print_adapted_fraction(model_cls: type[Any]) -> None:
    """Let `PeftModel.print_trainable_parameters` add a line for SVF. PEFT has no hook for it."""
    from peft import PeftModel

    printed = PeftModel.print_trainable_parameters

    @functools.wraps(printed)
    def print_trainable_parameters(self: Any) -> None:
        printed(self)
        if isinstance(self.base_model, model_cls):
            fraction = self.base_model.adapted_fraction()
            print(f"adapted linear weights: {fraction:.1%} (without the output layer)")

    PeftModel.print_trainable_parameters = print_trainable_parameters


def _ask_before_a_call(model_cls: type[Any]) -> None:
    """Let SVF see the `adapter_names` of every call. PEFT asks no method while the adapters are disabled."""
    from peft import PeftModel

    enable_hooks = PeftModel._enable_peft_forward_hooks

    @functools.wraps(enable_hooks)
    def _enable_peft_forward_hooks(self: Any, *args: Any, **kwargs: Any) -> Any:
        # PEFT's own flag can stay set when several threads disable the adapters
        base = self.base_model
        if isinstance(base, model_cls) and base.uses_rows(kwargs.get("adapter_names")):
            return base._enable_peft_forward_hooks(*args, **kwargs)
        return enable_hooks(self, *args, **kwargs)

    PeftModel._enable_peft_forward_hooks = _enable_peft_forward_hooks
