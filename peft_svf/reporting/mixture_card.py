"""The model card of a saved mixture: where it comes from, and what is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

MARK = "<!-- Written by peft-svf, and anew when a mixture is saved here. Take this line out to keep your changes. -->"


def mixture_card(
    name: str,
    base_model: str | None,
    sources: Mapping[str, str],
    weights: Mapping[str, float],
    result: Any,
) -> str:
    """
    Markdown with a YAML header.

    Args:
        name: What the mixture is called.
        base_model: Name of the base model.
        sources: Where each expert was loaded from.
        weights: α, per expert.
        result ([`MixtureResult`], *optional*): Of the search that found them.
    """
    header = ModelCardData(
        library_name="peft",
        base_model=None if base_model is None or Path(base_model).exists() else base_model,
        tags=["peft", "svf", "transformer-squared", "mixture"],
    )
    lines = [
        f"# {name}",
        "",
        f"A mixture `δ = Σ_k α_k δ_k` of SVF experts (Transformer²) for `{_shown(base_model or 'its base model')}`.",
        "",
        "| expert | source | α" + (" (mean) |" if result and len(result.groups) > 1 else " |"),
        "|---|---|---|",
        *(f"| {expert} | {_shown(sources.get(expert, ''))} | {alpha:.4g} |" for expert, alpha in weights.items()),
        "",
    ]
    if result is not None:
        lines += [*_search(result), ""]
    lines += [
        "```python",
        "import peft_svf  # registers SVF with PEFT",
        "from peft import PeftModel",
        "",
        f'model = PeftModel.from_pretrained(base_model, "{name}")',
        "```",
        "",
    ]
    return str(ModelCard(f"---\n{header.to_yaml()}\n---\n\n{MARK}\n\n" + "\n".join(lines)))


def is_mixture_card(path: Path) -> bool:
    """Whether it is a card of `mixture_card` in which nobody has taken out the mark."""
    return MARK in path.read_text(encoding="utf-8", errors="replace")


def _search(result: Any) -> list[str]:
    settings: Mapping[str, Any] = result.settings
    mean, low, high = result.difference
    return [
        f"Found by {settings.get('method', 'a search')} from {settings.get('examples', '')} examples, seed "
        f"{settings.get('seed', '')}; objective: {result.objective}; kept: **{result.choice}**. {result.candidates:,} "
        f"mixtures, {result.usage.evaluations:,} evaluations, {result.usage.tokens:,} tokens, "
        f"{result.usage.seconds:.0f} s.",
        "",
        f"| {result.objective} ({result.evaluated_on}, {result.num_evaluated} examples) | mean | 95 % interval |",
        "|---|---|---|",
        *(
            f"| {name} | {score:.3f} | {result.intervals[name][0]:.3f} to {result.intervals[name][1]:.3f} |"
            for name, score in result.scores.items()
        ),
        "",
        f"Searched less the best simple choice: {mean:+.3f} ({low:+.3f} to {high:+.3f}).",
        *(
            [
                "",
                "Expected reward, as far as known answers tell, which was climbed and decides between equals: "
                + ", ".join(f"{name} {mean:.3f}" for name, mean in result.expected.items())
                + ".",
            ]
            if result.expected
            else []
        ),
    ]


def _shown(source: str) -> str:
    """A Hub id as it is; of a folder, its name, for the rest of its path means nothing elsewhere."""
    return Path(source).name if Path(source).exists() else source
