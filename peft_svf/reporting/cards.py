"""What a model card has to say of an SVF adapter: that it loads with `import peft_svf` only."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import ModelCard

TAGS = ("peft", "svf", "transformer-squared")
HEADING = "## How to load it"
# of PEFT's template, with nothing below
_THEIRS = re.compile(
    r"## How to Get Started with the Model\s+Use the code below to get started with the model\.\s+"
    r"\[More Information Needed\]"
)


def loading_code(base_model: str | None, adapter: str, revision: str | None = None) -> str:
    """Python that loads an adapter. A base model whose name is no id and no folder's is left to the reader."""
    lines = ["import peft_svf  # registers SVF with PEFT, which says KeyError: 'SVF' without it"]
    lines += ["from peft import PeftModel"]
    if base_model and re.fullmatch(r"[\w./~-]+", base_model):
        version = f", revision={revision!r}" if revision else ""
        lines += [
            "from transformers import AutoModelForCausalLM",
            "",
            f'base_model = AutoModelForCausalLM.from_pretrained("{base_model}"{version})',
        ]
    else:
        lines += ["", f"# base_model: {base_model or 'the model that the adapter was trained on'}"]
    lines += [f'model = PeftModel.from_pretrained(base_model, "{adapter}")']
    return "\n".join(lines)


def complete_card(path: Path, base_model: str | None, adapter: str, revision: str | None = None) -> None:
    """Add to a card how the adapter is loaded, and tags to find it by, unless it has them."""
    card = ModelCard.load(path, ignore_metadata_errors=True)
    card.data.tags = sorted({*(card.data.tags or []), *TAGS})
    if "import peft_svf" not in card.text:
        code = loading_code(base_model, adapter, revision)
        section = f"{HEADING}\n\n`pip install peft-svf`\n\n```python\n{code}\n```"
        text, count = _THEIRS.subn(lambda _: section, card.text)
        card.text = text if count else f"{card.text.rstrip()}\n\n{section}\n"
    card.save(path)
