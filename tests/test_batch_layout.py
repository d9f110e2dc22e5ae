"""Rows are never taken for tokens or images: right, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import randomise, tiny_llama
from peft import get_peft_model
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LongformerConfig,
    LongformerModel,
    NllbMoeConfig,
    NllbMoeModel,
    PretrainedConfig,
    PreTrainedModel,
    XLNetConfig,
    XLNetLMHeadModel,
    XLNetModel,
)

from peft_svf import SVFConfig

IMAGE = 5


def two_experts(base: nn.Module, targets: Any = "all-linear") -> Any:
    model = get_peft_model(base.eval(), SVFConfig(target_modules=targets), "a")
    model.add_adapter("b", SVFConfig(target_modules=targets))
    randomise(model, "a", seed=1)
    return randomise(model, "b", seed=2).eval()


def output(model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(*args, **kwargs)
    return found if isinstance(found, torch.Tensor) else found[0]


def alone(model: Any, names: list[str], ids: torch.Tensor) -> torch.Tensor:
    """Each row alone in a batch, with its adapter active."""
    found = []
    for name, row in zip(names, ids, strict=True):
        model.set_adapter(name)
        found.append(output(model, row[None]))
    return torch.cat(found)


def ids(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(6, 60, (rows, tokens), generator=torch.Generator().manual_seed(0))


def xlnet() -> PreTrainedModel:
    torch.manual_seed(0)
    return XLNetLMHeadModel(XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48))


class OwnXLNet(XLNetModel):
    """Inherits all of its code."""


def inherited() -> PreTrainedModel:
    torch.manual_seed(0)
    return OwnXLNet(XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48))


def longformer() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    return LongformerModel(LongformerConfig(vocab_size=64, attention_window=4, pad_token_id=1, **sizes))


class TokensFirst(nn.Module):
    """Not from transformers; its layer works on `[tokens, rows, 32]`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.lin = nn.Embedding(64, 32), nn.Linear(32, 32)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.lin(self.embed(input_ids).swapaxes(0, 1))
        return x.movedim(0, 1)


class RemoteCode(PreTrainedModel):
    """Its layer works on `[tokens, rows, 32]`."""

    config_class = PretrainedConfig

    def __init__(self) -> None:
        super().__init__(PretrainedConfig())
        torch.manual_seed(0)
        self.embed, self.lin = nn.Embedding(64, 32), nn.Linear(32, 32)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.lin(self.embed(input_ids).transpose(dim0=0, dim1=1))
        return x.movedim(0, 1)


@pytest.mark.parametrize("rows", [2, 4])
def test_as_many_rows_as_tokens_in_a_model_with_rows_first(rows: int) -> None:
    model, names = two_experts(tiny_llama()), ["a", "b", "b", "a"][:rows]
    found = output(model, ids(rows, rows), adapter_names=names)
    torch.testing.assert_close(found, alone(model, names, ids(rows, rows)), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("base", "targets", "tokens"),
    [
        (xlnet, ["layer_1", "layer_2"], 4),
        (inherited, ["layer_1", "layer_2"], 4),
        (longformer, ["query", "value"], 4),
        (TokensFirst, ["lin"], 4),
        (RemoteCode, ["lin"], 4),
    ],
)
def test_as_many_rows_as_tokens_in_a_model_with_tokens_first(base: Any, targets: list[str], tokens: int) -> None:
    model = two_experts(base(), targets)
    with pytest.raises(ValueError, match="could belong to the first or to the second dimension"):
        output(model, ids(tokens, tokens), adapter_names=["a", "b"] * (tokens // 2))
    with (
        pytest.raises(ValueError, match="could belong to the first or to the second dimension"),
        model.base_model.row_mixture([[1.0, 0.0], [0.5, 0.5]] * (tokens // 2)),
    ):
        output(model, ids(tokens, tokens))


def test_equal_rows_are_right_in_any_layout() -> None:
    model, names = two_experts(xlnet(), ["layer_1", "layer_2"]), ["b"] * 4
    found = output(model, ids(4, 4), adapter_names=names)
    torch.testing.assert_close(found, alone(model, names, ids(4, 4)), atol=1e-5, rtol=0)
    with model.base_model.row_mixture([[0.0, 1.0]] * 4):
        torch.testing.assert_close(output(model, ids(4, 4)), found, atol=1e-5, rtol=0)


# -------------------------------------------------------------------------------------------------------------- images


def llava() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=32)
    text = LlamaConfig(**sizes, vocab_size=64, num_key_value_heads=2)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1)
    )


def pictures(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def with_images(*counts: int) -> torch.Tensor:
    """Token ids of rows with so many images, of four tokens each."""
    found = ids(len(counts), 12)
    for row, count in zip(found, counts, strict=True):
        row[1 : 1 + 4 * count] = IMAGE
    return found


def test_one_image_in_each_row() -> None:
    model, names, tokens = two_experts(llava()), ["a", "b"], with_images(1, 1)
    found = output(model, tokens, pixel_values=pictures(2), adapter_names=names)
    for row, name in enumerate(names):
        model.set_adapter(name)
        own = output(model, tokens[row : row + 1], pixel_values=pictures(2)[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], own, atol=1e-4, rtol=0)


@pytest.mark.parametrize("generates", [False, True])
def test_two_images_in_one_row_and_none_in_the_other(generates: bool) -> None:
    model, tokens = two_experts(llava()), with_images(2, 0)
    call = (lambda *args, **kwargs: model.generate(*args, max_new_tokens=2, **kwargs)) if generates else model
    with pytest.raises(ValueError, match="works on images or audio"):
        output(call, input_ids=tokens, pixel_values=pictures(2), adapter_names=["a", "b"])
    model.set_adapter("b")
    if not generates:  # equal rows
        expected = output(model, tokens, pixel_values=pictures(2))
        found = output(model, tokens, pixel_values=pictures(2), adapter_names=["b", "b"])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_images_do_not_matter_to_experts_of_the_text() -> None:
    model, tokens = two_experts(llava(), r".*language_model.*_proj"), with_images(2, 0)
    found = output(model, tokens, pixel_values=pictures(2), adapter_names=["a", "b"])
    model.set_adapter("a")
    own = output(model, tokens[:1], pixel_values=pictures(2))
    torch.testing.assert_close(found[:1], own, atol=1e-4, rtol=0)


def test_text_without_images_is_not_refused() -> None:
    model, names, tokens = two_experts(llava()), ["a", "b"], with_images(0, 0)
    torch.testing.assert_close(
        output(model, tokens, adapter_names=names), alone(model, names, tokens), atol=1e-5, rtol=0
    )


# ------------------------------------------------------------------------------------------------- mixtures of experts


class Experts(nn.Module):
    """Two experts that get all tokens, each in another order, as of transformers 4 and of remote code."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 2, bias=False)
        self.experts = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, 32)
        weights, chosen = self.gate(tokens).softmax(dim=-1).topk(2)
        out = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            rank, token = torch.where(i == chosen.T)
            out.index_add_(0, token, expert(tokens[token]) * weights[token, rank, None])
        return out.reshape(x.shape)


def hand_made() -> nn.Module:
    model = tiny_llama()
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp = Experts()
    return model


def nllb() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    experts = {"num_experts": 2, "encoder_sparse_step": 1, "expert_capacity": 64}
    return NllbMoeModel(
        NllbMoeConfig(vocab_size=64, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, **sizes, **experts)
    )


MIXTURES = [(hand_made, r".*experts\.\d"), (nllb, ["fc1"])]


@pytest.mark.parametrize(("base", "targets"), MIXTURES)
@pytest.mark.parametrize("tokens", [1, 6])
def test_tokens_of_an_expert_are_never_taken_for_rows(base: Any, targets: Any, tokens: int) -> None:
    model, text = two_experts(base(), targets), ids(2, tokens)
    inputs = {"input_ids": text} if base is hand_made else {"input_ids": text, "decoder_input_ids": text}
    with pytest.raises(ValueError, match=r"experts.* is an expert of a mixture of experts"):
        output(model, **inputs, adapter_names=["a", "b"])
    model.set_adapter("b")
    expected = output(model, **inputs)
    model.set_adapter("a")
    torch.testing.assert_close(output(model, **inputs, adapter_names=["b", "b"]), expected)


def test_rows_are_told_apart_around_untouched_experts() -> None:
    model, text = two_experts(hand_made(), ["q_proj", "gate"]), ids(2, 6)
    expected = alone(model, ["a", "b"], text)
    torch.testing.assert_close(output(model, text, adapter_names=["a", "b"]), expected, rtol=0, atol=1e-5)
