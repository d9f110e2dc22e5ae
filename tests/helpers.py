"""Small models, tokenizers and experts, and functions that look into them. Fixtures are in `conftest.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from peft_svf import SVFConfig, SVFLayer, SVFRuntimeConfig

VOCABULARY = ["<unk>", "<s>", "</s>", "<pad>", *"abcdefghijklmnopqrstuvwxyz0123456789 +=?[]\n"]
IDS = torch.tensor([[4, 17, 5, 42, 8, 30, 11, 23], [7, 9, 33, 29, 40, 12, 4, 19]])


# -------------------------------------------------------------------------------------------------------------- models


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    """A random Llama of two layers. Same seed, same weights."""
    settings: dict[str, object] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).to(dtype).eval()
    torch.random.set_rng_state(state)
    return model


def base_model(seed: int = 0) -> PreTrainedModel:
    """A Llama for `make_tokenizer()`, with weights so large that its predictions are far from uniform."""
    return tiny_llama(seed, vocab_size=len(VOCABULARY), initializer_range=0.25, pad_token_id=3)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of `VOCABULARY`."""
    characters = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    )
    return tokenizer


# ------------------------------------------------------------------------------------------------------------- experts


def adapted(model: nn.Module | None = None, *, std: float = 0.3, seed: int = 1, **config: Any) -> PeftModel:
    """A model, `tiny_llama()` by default, with random δ on all linear layers."""
    config = {"target_modules": "all-linear", **config}
    return randomise(get_peft_model(model or tiny_llama(), SVFConfig(**config)), std=std, seed=seed)


def randomise(model: Any, adapter: str = "default", std: float = 0.3, seed: int = 1) -> Any:
    """Fill one adapter's δ with random numbers, and return the model."""
    generator = torch.Generator().manual_seed(seed)
    for delta in deltas(model, adapter).values():
        delta.data.copy_(torch.randn(delta.shape, generator=generator) * std)
    return model


def save_expert(
    folder: Path, config: SVFConfig, seed: int, std: float = 0.4, base: PreTrainedModel | None = None
) -> str:
    """Save an expert with random δ for `base_model()`, and return its folder."""
    config.runtime_config = SVFRuntimeConfig(use_cache=False)  # this runs before a test has its own cache
    model = randomise(get_peft_model(base or base_model(), config), std=std, seed=seed)
    model.save_pretrained(folder)
    return str(folder)


# ------------------------------------------------------------------------------------------------------------- looking


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids, **options).logits
    return found


def svf_layers(model: nn.Module) -> dict[str, SVFLayer]:
    """The adapted layers by name of the module in the base model."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, SVFLayer)
    }


def deltas(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """δ by name of the module in the base model."""
    return {
        name: layer.svf_delta[adapter].weight for name, layer in svf_layers(model).items() if adapter in layer.svf_delta
    }
