"""The entry point that vLLM calls in each of its processes (`vllm.general_plugins`).

It lies outside `peft_svf`, whose import takes seconds. Nothing of `peft_svf` is imported before an engine asks for it
with `additional_config={"peft_svf": {...}}`. The patched modules are not imported here either: most processes of an
engine never need them.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

WORKER = "vllm.v1.worker.lora_model_runner_mixin"
SERVER = "vllm.entrypoints.openai.models.serving"


def register() -> None:
    """Let engines serve experts if their `additional_config` has the key `peft_svf`. May be called more than once."""
    _when_imported(WORKER, _patch_worker)
    _when_imported(SERVER, _patch_server)


def _patch_worker(module: ModuleType) -> None:
    """Replace the class that the worker makes its LoRA manager from, by a function that chooses."""
    original = getattr(module, "LRUCacheWorkerLoRAManager", None)
    if original is None or getattr(original, "is_of_peft_svf", False):
        return

    def manager(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_asked_for(vllm_config):
            return original(vllm_config, *args, **kwargs)
        from peft_svf.serving.manager import SVFWorkerManager

        return SVFWorkerManager(vllm_config, *args, **kwargs)

    manager.is_of_peft_svf = True  # type: ignore[attr-defined]
    module.LRUCacheWorkerLoRAManager = manager  # type: ignore[attr-defined]


def _patch_server(module: ModuleType) -> None:
    """Add the resolver of mixture names to the list of models of a server."""
    models = getattr(module, "OpenAIServingModels", None)
    if models is None or getattr(models.__init__, "is_of_peft_svf", False):
        return
    original = models.__init__

    def init(self: Any, engine_client: Any, *args: Any, **kwargs: Any) -> None:
        original(self, engine_client, *args, **kwargs)
        if _is_asked_for(getattr(engine_client, "vllm_config", None)):
            from peft_svf.serving.resolver import mixture_resolver

            self.lora_resolvers.append(mixture_resolver(self, engine_client.vllm_config))

    init.is_of_peft_svf = True  # type: ignore[attr-defined]
    models.__init__ = init


def _is_asked_for(vllm_config: Any) -> bool:
    additional = getattr(vllm_config, "additional_config", None)
    return isinstance(additional, dict) and "peft_svf" in additional


def _when_imported(name: str, patch: Callable[[ModuleType], None]) -> None:
    if name in sys.modules:
        patch(sys.modules[name])
    elif not any(isinstance(finder, _Finder) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, patch))


class _Finder(MetaPathFinder):
    """Calls a function on one module, right after it was imported."""

    def __init__(self, name: str, patch: Callable[[ModuleType], None]) -> None:
        self.name, self.patch = name, patch

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        loader, execute = spec.loader, spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.patch(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
