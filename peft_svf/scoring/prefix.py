"""What the prompts of a task all begin with, the system message and the chat template mostly, read once for all."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

SHORTEST = 8  # tokens; below that it is not worth the trouble

# with these, `generate` makes other rows, or caches of another kind
ONE_ROW = ("num_beams", "num_return_sequences")
LOCAL_ATTENTION = ("attention_types", "window_size")  # of configs whose models count places in the cache
NO_OTHER = ("cache_implementation", "past_key_values", "assistant_model", "prompt_lookup_num_tokens")


@dataclass(frozen=True)
class Prefix:
    """
    Keys and values of the tokens that a batch begins with, by layer: pairs of `[rows, heads, tokens, head dimension]`.

    In a batch it stands before the padding: prefix, padding, rest of the prompt. Positions follow the attention mask.
    """

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    def __len__(self) -> int:
        """Tokens."""
        return self.layers[0][0].shape[-2]

    def rows(self, index: Sequence[int]) -> Prefix:
        """These rows of it, which may be repeated."""
        places = torch.tensor(index, device=self.layers[0][0].device)
        return Prefix(tuple((keys[places], values[places]) for keys, values in self.layers))

    def __add__(self, other: Prefix) -> Prefix:
        """The rows of both."""
        layers = zip(self.layers, other.layers, strict=True)
        return Prefix(
            tuple((torch.cat(keys), torch.cat(values)) for keys, values in (zip(*pair, strict=True) for pair in layers))
        )

    def cache(self) -> DynamicCache:
        """For a model to go on from; leaves this one as it is."""
        return DynamicCache(ddp_cache_data=self.layers)


def common_prefix(sequences: Sequence[list[int]]) -> list[int]:
    """What all of these begin with, but for the last token of the shortest, and nothing if that is too short."""
    least, most = min(sequences), max(sequences)  # what these two share, all do
    length = next((i for i, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), len(least))
    length = min(length, min(map(len, sequences)) - 1)
    return least[:length] if length >= SHORTEST else []


def generates_from_prefix(generation_kwargs: Mapping[str, Any], default: Any = None) -> bool:
    """Whether `generate` can go on from a prefix with these arguments and a model's generation config."""

    def value(name: str) -> Any:
        sources = (generation_kwargs.get("generation_config"), default)
        given = [generation_kwargs.get(name), *(getattr(source, name, None) for source in sources)]
        return next((each for each in given if each is not None), None)

    return (
        all((value(name) or 1) == 1 for name in ONE_ROW)
        and all(value(name) is None for name in NO_OTHER)
        and value("use_cache") is not False
    )


def takes(model: Any, name: str) -> bool:
    """Whether a model, perhaps a PEFT model, has this argument."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return name in inspect.signature(inner.forward).parameters


def padding_may_be_inside(model: Any) -> bool:
    """Whether padding may stand between what a model has read and what comes: it tells distances by `position_ids`."""
    return takes(model, "position_ids") and not any(hasattr(model.config, name) for name in LOCAL_ATTENTION)


def read_prefix(model: Any, ids: list[int], rows: int, **kwargs: Any) -> Prefix | None:
    """Let a model read these tokens, in as many rows as it has mixtures.

    Args:
        model: The model.
        ids (`list[int]`): The tokens.
        rows (`int`): How often.
        kwargs: More for the model's forward.

    Returns:
        `None` if padding could not stand between a prefix and the rest: the model keeps anything but all keys and
        values of the tokens, such as those of a window or a state, or it tells distances by places and not by
        `position_ids`.
    """
    if not padding_may_be_inside(model):
        return None
    inputs = torch.tensor(ids, device=model.device).expand(rows, -1)
    if takes(model, "logits_to_keep"):
        kwargs["logits_to_keep"] = 1
    output = model(input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=True, **kwargs)
    return kept_of(output, len(ids))


def kept_of(output: Any, tokens: int) -> Prefix | None:
    """The keys and values that a model keeps of what it has read, if it keeps those of all tokens and nothing else."""
    kept = getattr(output, "past_key_values", None)
    layers = getattr(kept, "layers", [])
    if type(kept) is not DynamicCache or not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return None
    if any(not layer.is_initialized or layer.keys.shape[-2] != tokens for layer in layers):
        return None
    return Prefix(tuple((layer.keys, layer.values) for layer in layers))
