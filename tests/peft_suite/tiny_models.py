"""
The hub models of PEFT's test suite, remade: random, tiny, and in folders named like their hub ids.

Only what the selected tests load is here. None of them loads a tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

# Two layers, as the tests of layer indexing need a second one. Weights ten times as large as usual, so that an adapter
# moves the logits by more than the tests' tolerances.
SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MLP: dict[str, Any] = {"intermediate_size": 48}
LARGE_WEIGHTS: dict[str, Any] = {"initializer_range": 0.2}
SPECIAL_TOKENS: dict[str, Any] = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
GROUPED_QUERY: dict[str, Any] = {"num_key_value_heads": 2}
GPT = {
    "vocab_size": 64,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
BERT = SIZES | MLP | LARGE_WEIGHTS | {"pad_token_id": 1}
DEBERTA = BERT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
LLAMA = SIZES | MLP | LARGE_WEIGHTS | SPECIAL_TOKENS | GROUPED_QUERY

# hub id: (model class, config class, its arguments)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # decoder
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "OPTForCausalLM",
        "OPTConfig",
        SIZES | SPECIAL_TOKENS | {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2},
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", "GPT2Config", GPT | LARGE_WEIGHTS),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "GPTJForCausalLM",
        "GPTJConfig",
        GPT | LARGE_WEIGHTS | {"rotary_dim": 4},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        LLAMA | {"head_dim": 8},
    ),
    # encoder-decoder
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        | {"decoder_start_token_id": 0},
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        "BartConfig",
        {"vocab_size": 64, "d_model": 32, "max_position_embeddings": 64, "init_std": 0.2}
        | {
            f"{side}_{name}": value
            for side in ("encoder", "decoder")
            for name, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 48}.items()
        },
    ),
    # feature extraction
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", "BertConfig", BERT),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", "RobertaConfig", BERT),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", "DebertaConfig", DEBERTA),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", "DebertaV2Config", DEBERTA),
    # sequence classification
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        "BertConfig",
        BERT,
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        BERT,
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        "LlamaConfig",
        LLAMA | {"num_labels": 1},
    ),
}


def save_tiny_models(folder: Path) -> None:
    """Save every model under `folder`, always with the same weights."""
    for model_id, (model_class, config_class, arguments) in MODELS.items():
        config: PretrainedConfig = getattr(transformers, config_class)(**arguments)
        torch.manual_seed(0)
        model: PreTrainedModel = getattr(transformers, model_class)(config)
        model.save_pretrained(folder / model_id)
