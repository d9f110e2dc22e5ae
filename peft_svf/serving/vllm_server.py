"""The command that starts vLLM's own server with experts."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from .options import serve_arguments


def server_command(
    model: str,
    experts: Mapping[str, str],
    *,
    name: str,
    host: str,
    port: int,
    root: Path | None = None,
    base_check: str = "error",
    dtype: str = "auto",
    revision: str | None = None,
    api_key: str | None = None,
) -> tuple[list[str], dict[str, str]]:
    """
    Return a command, and its additions to the environment.

    Args:
        model (`str`): Hub id or folder of the base model.
        experts (`dict[str, str]`): Folder of each expert.
        name (`str`): Name of the base model in requests.
        host (`str`): Address to listen on.
        port (`int`): Port.
        root (`Path`, *optional*): The folder that clients may load other experts from. Without one they cannot.
        base_check (`str`): As of [`ServingOptions`].
        dtype (`str`): Of the base model.
        revision (`str`, *optional*): Of the base model on the Hub.
        api_key (`str`, *optional*): The key that requests must have.

    Raises:
        ImportError: vLLM is missing or has another version than those that were tested.
    """
    # Mixtures are resolved by the interface that also loads experts. It may load those that are served, and no others.
    roots = [*experts.values(), *([] if root is None else [str(root)])]
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    words += ["--served-model-name", name, "--host", host, "--port", str(port), "--dtype", dtype]
    words += [] if revision is None else ["--revision", revision]
    words += serve_arguments(roots=roots, base_check=base_check)
    words += ["--lora-modules", *(f"{expert}={path}" for expert, path in experts.items())]
    # The key is in the environment, because all users of a machine can read the arguments of a process.
    key = {} if api_key is None else {"VLLM_API_KEY": api_key}
    return words, {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", **key}
