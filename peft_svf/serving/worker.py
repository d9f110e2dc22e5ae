"""Methods of a worker that `collective_rpc` calls: new δ without a file, folding, and what is loaded."""

from __future__ import annotations

import base64
from typing import Any

from safetensors.torch import load


class SVFWorker:
    """Added to vLLM's worker by `worker_extension_cls`."""

    model_runner: Any

    def peft_svf_update(self, name: str, adapter: bytes) -> None:
        """Replace δ of a loaded expert. Reset the prefix cache afterwards.

        Args:
            name: The expert.
            adapter: The content of an `adapter_model.safetensors`.

        Raises:
            ValueError: The expert is not loaded, or δ cannot be served.
        """
        self.model_runner.lora_manager.update(name, load(adapter))

    def peft_svf_update_text(self, name: str, adapter: str) -> None:
        """Replace δ over HTTP (`/collective_rpc`), which takes text: the same in base64."""
        self.peft_svf_update(name, base64.b64decode(adapter, validate=True))

    def peft_svf_fold(self, name: str | None = None) -> None:
        """Fold one expert for the steps that need no other; `None` drops the folded weights.

        Raises:
            ValueError: It cannot be folded.
        """
        self.model_runner.lora_manager.fold(name)

    def peft_svf_memory(self) -> dict[str, int]:
        """Return how many experts are loaded, and their bytes."""
        found: dict[str, int] = self.model_runner.lora_manager.memory()
        return found
