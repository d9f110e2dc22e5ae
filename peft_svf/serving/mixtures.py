"""The names of mixtures in requests: `math=0.7,logic=0.3`."""

from __future__ import annotations

import math
from collections.abc import Mapping

# Paths that name no file. vLLM wants a path for each request, and its prefix cache tells requests apart by it.
SCHEME = "peft-svf:"
MOST_EXPERTS = 32  # of one mixture, as clients can name any


def parse_mixture(text: str) -> dict[str, float]:
    """Return the weight of each expert.

    Args:
        text (`str`): Pairs such as `math=0.7,logic=0.3`. Empty for the base model. Weights may be negative, and need
            not sum to 1.

    Raises:
        ValueError: It is no such text, names an expert twice or too many, or has a weight that is not finite.
    """
    weights: dict[str, float] = {}
    for term in text.split(",") if text else []:
        name, separator, number = term.strip().partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not (name and separator and math.isfinite(weight)):
            raise ValueError(f"{text!r} is no mixture: {term!r} must be an expert and its weight, such as math=0.7.")
        if name in weights:
            raise ValueError(f"{text!r} is no mixture: it names {name!r} twice.")
        weights[name] = weight
    if len(weights) > MOST_EXPERTS:
        raise ValueError(f"A mixture may have at most {MOST_EXPERTS} experts, got {len(weights)}.")
    return weights


def mixture_name(weights: Mapping[str, float]) -> str:
    """Return the text of a mixture, from which `parse_mixture` returns exactly these weights.

    Raises:
        ValueError: A name has a comma, an equal sign or outer spaces, or as `parse_mixture`.
    """
    for name in weights:
        if not name or name != name.strip() or any(character in name for character in ",="):
            raise ValueError(
                f"{name!r} cannot be in a mixture: commas, equal signs and outer spaces have a meaning there."
            )
    text = ",".join(f"{name}={float(weight)!r}" for name, weight in weights.items())
    parse_mixture(text)
    return text


def unknown_experts(wanted: Mapping[str, float], known: Mapping[str, object]) -> str | None:
    """Return the message about experts of a mixture that are not served; `None` if all are."""
    missing = [name for name in wanted if name not in known]
    if not missing:
        return None
    served = ", ".join(sorted(map(repr, known))) or "none"
    return f"There is no expert {missing[0]!r}. Served are: {served}."
