"""Which names an adapter may have."""

from __future__ import annotations

from torch import nn

from .rows import BASE

_MOST_BYTES = 255  # of the name of a folder


def check_adapter_name(name: object, what: str = "An adapter") -> None:
    """Check the name of a new adapter, before anything is changed.

    The name becomes a key of an `nn.ModuleDict`, a part of parameter names, and a folder of `save_pretrained`.

    Args:
        name: The name.
        what (`str`): The subject of the message.

    Raises:
        ValueError: The name cannot be one of these.
    """
    if not isinstance(name, str) or not name:
        why = "a name is a text of at least one letter"
    elif name == BASE:
        why = "this is the name of the base model in `adapter_names`"
    elif hasattr(nn.ModuleDict(), name):
        why = "PyTorch uses this name for an attribute of every `nn.ModuleDict`"
    elif any(character in name for character in "./\\"):
        why = "it names parameters and a folder, so it must not contain dots, slashes or backslashes"
    elif not name.isprintable():
        why = "it has characters that cannot be printed"
    elif len(name.encode()) > _MOST_BYTES:
        why = f"it names a folder, so it must not be longer than {_MOST_BYTES} bytes"
    else:
        return
    raise ValueError(f"{what} cannot be called {name!r}: {why}. Choose another adapter name, such as 'math'.")
