"""The common beginning of all prompts of a task, such as the system message, read once for all of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

SHORTEST = 8  # tokens; shorter prefixes save too little

# With these arguments, `generate` makes other rows or other kinds of caches.
ONE_ROW = ("num_beams", "num_return_sequences")
LOCAL_ATTENTION = ("attention_types", "window_size")  # in configs of models that count positions in the cache
NO_OTHER = ("cache_implementation", "past_key_values", "assistant_model", "prompt_lookup_num_tokens")


@dataclass(frozen=True)
class Prefix:
    """
    Keys and values of the first tokens of a batch, by layer: pairs of `[rows, heads, tokens, head dimension]`.

    A batch row is prefix, padding, rest of the prompt. Positions follow the attention mask.
    """

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    def __len__(self) -> int:
        """Number of tokens."""
        return self.layers[0][0].shape[-2]

    def rows(self, index: Sequence[int]) -> Prefix:
        """Select rows, which may be repeated."""
        places = torch.tensor(index, device=self.layers[0][0].device)
        return Prefix(tuple((keys[places], values[places]) for keys, values in self.layers))

    def __add__(self, other: Prefix) -> Prefix:
        """Concatenate the rows of both."""
        layers = zip(self.layers, other.layers, strict=True)
        return Prefix(
            tuple((torch.cat(keys), torch.cat(values)) for keys, values in (zip(*pair, strict=True) for pair in layers))
        )

    def cache(self) -> DynamicCache:
        """Return a cache for a model to continue from. This prefix stays unchanged."""
        return DynamicCache(ddp_cache_data=self.layers)


def common_prefix(sequences: Sequence[list[int]]) -> list[int]:
    """Return the tokens that all sequences begin with, without the last token of the shortest; `[]` if too few."""
    least, most = min(sequences), max(sequences)  # in lexical order, so what these two share, all share
    length = next((i for i, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), len(least))
    length = min(length, min(map(len, sequences)) - 1)
    return least[:length] if length >= SHORTEST else []


def generates_from_prefix(generation_kwargs: Mapping[str, Any], default: Any = None) -> bool:
    """Whether `generate` can continue from a prefix, given its arguments and the model's generation config."""

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
    """Whether the forward of a model, or of the base of a PEFT model, has this argument."""
    return name in _parameters(model)


def _parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inspect.signature(inner.forward).parameters


def last_logits(model: Any, count: int = 1) -> dict[str, Any]:
    """Return the argument of a model's forward for the logits of the last `count` tokens only; none if it has none.

    On a CPU they are given as positions. Given a number, models cut a slice out of their hidden states, for which torch
    multiplies row by row. In 16 bit, it then copies the output embeddings for every batch row.
    """
    parameters = _parameters(model)
    if "logits_to_keep" not in parameters:
        return {}
    takes_positions = "Tensor" in str(parameters["logits_to_keep"].annotation)
    return {"logits_to_keep": torch.arange(-count, 0) if takes_positions and model.device.type == "cpu" else count}


def last_logits_of_generate(model: Any, generation_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same for `generate`, given its arguments; none where it repeats its arguments for several rows."""
    if "logits_to_keep" in generation_kwargs or not generates_from_prefix(
        generation_kwargs, getattr(model, "generation_config", None)
    ):
        return {}
    return last_logits(model)


def padding_may_be_inside(model: Any) -> bool:
    """Whether padding may follow a prefix: the model must take its positions from `position_ids`."""
    return takes(model, "position_ids") and not any(hasattr(model.config, name) for name in LOCAL_ATTENTION)


def read_prefix(model: Any, ids: list[int], rows: int, **kwargs: Any) -> Prefix | None:
    """Let a model read these tokens in several batch rows, each with its own mixture.

    Args:
        model: The model.
        ids (`list[int]`): The tokens.
        rows (`int`): Number of batch rows.
        kwargs: More arguments of the model's forward.

    Returns:
        `None` if the model cannot continue from a prefix. It may keep a window or a state instead of all keys and
        values, or take positions from the cache instead of `position_ids`.
    """
    if not padding_may_be_inside(model):
        return None
    inputs = torch.tensor(ids, device=model.device).expand(rows, -1)
    kwargs = {**last_logits(model), **kwargs}
    output = model(input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=True, **kwargs)
    return kept_of(output, len(ids))


def kept_of(output: Any, tokens: int) -> Prefix | None:
    """Return the keys and values in the output of a model; `None` if it keeps anything but those of all tokens."""
    kept = getattr(output, "past_key_values", None)
    layers = getattr(kept, "layers", [])
    if type(kept) is not DynamicCache or not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return None
    if any(not layer.is_initialized or layer.keys.shape[-2] != tokens for layer in layers):
        return None
    return Prefix(tuple((layer.keys, layer.values) for layer in layers))
