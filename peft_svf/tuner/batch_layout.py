"""Where the rows of a batch are in the inputs of a layer.

A mixed batch counts the rows of each input. The count cannot tell rows from tokens in a model that works on
`[tokens, rows, ...]`. Nor can it tell them from images, of which one row may have two and another none, or from the
tokens that a router sends to an expert. Rows would then silently run with the adapters of other rows. So these cases
are refused unless the layout is known.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

_PLACEHOLDERS = [
    f"{kind}_token_{end}" for kind in ("image", "video", "audio", "speech", "vision") for end in ("id", "index")
]

_COMMON_BASES = {*PreTrainedModel.__mro__, *GenerationMixin.__mro__}


class Layout:
    """
    What is known of the inputs of the layers of a model.

    Args:
        model (`nn.Module`): The base model. Its own inputs have the rows first.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._rows_first: dict[str, bool] = {}
        self._of_text: dict[str, bool] = {}

    def has_rows_first(self, module_name: str) -> bool:
        """Whether the inputs of a layer cannot be `[tokens, rows, ...]`.

        They can in a model that is not from transformers. They also can if the code of a module that contains the layer
        swaps the first two dimensions of something.
        """
        if module_name not in self._rows_first:
            path = module_name.split(".")
            above = (self._model.get_submodule(".".join(path[:depth])) for depth in range(len(path)))
            kinds: Iterator[Any] = map(type, above)
            known = isinstance(self._model, PreTrainedModel)
            self._rows_first[module_name] = known and not any(map(_swaps_dimensions, kinds))
        return self._rows_first[module_name]

    def is_routed(self, module_name: str) -> bool:
        """Whether a layer is in an expert of a mixture of experts, so an input `[n, in]` holds tokens of any rows.

        Their number can be that of the rows or of all tokens, but their order is not.
        """
        return any("expert" in part and "shared" not in part for part in module_name.lower().split("."))

    def is_of_text(self, module_name: str) -> bool:
        """Whether a layer works on the tokens of the rows. Others of a multimodal model work on images or audio."""
        if module_name not in self._of_text:
            parts = getattr(getattr(self._model, "config", None), "sub_configs", None) or {}
            self._of_text[module_name] = not (parts.keys() - {"text_config"}) or self._is_in_decoder(module_name)
        return self._of_text[module_name]

    def _is_in_decoder(self, module_name: str) -> bool:
        layer = self._model.get_submodule(module_name)
        parts = (self._model.get_decoder(), self._model.get_output_embeddings())
        return any(layer is module for part in parts if part is not None for module in part.modules())

    def has_equal_rows(self, token_ids: torch.Tensor | None) -> bool:
        """Whether all rows of token ids have the same number of placeholders for images, videos and audio."""
        config = getattr(self._model, "config", None)
        known = [token for name in _PLACEHOLDERS if isinstance(token := getattr(config, name, None), int)]
        if token_ids is None or not known:
            return False
        counts = torch.stack([(token_ids == token).sum(dim=1) for token in known])
        return bool((counts == counts[:, :1]).all())


@cache
def _swaps_dimensions(kind: type[nn.Module]) -> bool:
    """Whether the code of a module class, or that it inherits, swaps the first two dimensions of a tensor."""
    own = [base for base in kind.__mro__ if base not in _COMMON_BASES]
    try:
        trees = [ast.parse(textwrap.dedent(inspect.getsource(base))) for base in own]
    except (OSError, TypeError, SyntaxError):
        return True
    return any(isinstance(node, ast.Call) and _is_swap(node) for tree in trees for node in ast.walk(tree))


def _is_swap(call: ast.Call) -> bool:
    """Whether a call is like `x.transpose(0, 1)`, `torch.transpose(x, 1, 0)` or `x.permute(1, 0, 2)`."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    flat = [leaf for argument in arguments for leaf in getattr(argument, "elts", [argument])]
    numbers = [leaf.value for leaf in flat if isinstance(leaf, ast.Constant) and isinstance(leaf.value, int)]
    if name in ("transpose", "swapaxes", "swapdims", "transpose_"):
        return set(numbers[-2:]) == {0, 1}
    return name == "permute" and numbers[:2] == [1, 0] and len(numbers) > 2
