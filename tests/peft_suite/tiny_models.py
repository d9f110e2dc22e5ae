"""
The hub models of PEFT's test suite, remade: random, tiny, and in folders named like their hub ids.

Only what the selected tests load is here; none of them loads a tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    DebertaConfig,
    DebertaV2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    RobertaConfig,
    T5Config,
)

# Not 1 and 2, which are what the tests feed: the embedding of padding is zero.
TOKENS: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 4}
# Two layers, as the tests of layer indexing need a second one. Weights ten times as large as usual, so that an adapter
# moves the outputs by more than the tests tolerate.
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
USUAL: dict[str, Any] = TOKENS | SIZES | {"intermediate_size": 48, "initializer_range": 0.2}

GPT: dict[str, Any] = TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
OPT: dict[str, Any] = TOKENS | SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2}
LLAMA: dict[str, Any] = USUAL | {"num_key_value_heads": 2}  # grouped queries: k and v are narrower than q
DEBERTA: dict[str, Any] = USUAL | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
T5: dict[str, Any] = TOKENS | {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BART: dict[str, Any] = TOKENS | {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 4,
    "forced_eos_token_id": None,
    "init_std": 0.2,
}

CAUSAL_LM: dict[str, PretrainedConfig] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": OPTConfig(**OPT),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": GPT2Config(**GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": GPTJConfig(**GPT, rotary_dim=4),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": LlamaConfig(**LLAMA),
    "peft-internal-testing/tiny-dummy-qwen2": Qwen2Config(**LLAMA),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": Gemma3TextConfig(**LLAMA, head_dim=8),
}
SEQ_2_SEQ_LM: dict[str, PretrainedConfig] = {
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": T5Config(**T5, decoder_start_token_id=0),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": BartConfig(**BART),
}
FEATURE_EXTRACTION: dict[str, PretrainedConfig] = {
    "peft-internal-testing/tiny-random-BertModel": BertConfig(**USUAL),
    "peft-internal-testing/tiny-random-RobertaModel": RobertaConfig(**USUAL),
    "peft-internal-testing/tiny-random-DebertaModel": DebertaConfig(**DEBERTA),
    "peft-internal-testing/tiny-random-DebertaV2Model": DebertaV2Config(**DEBERTA),
}
SEQ_CLS: dict[str, PretrainedConfig] = {
    "peft-internal-testing/tiny-random-BertForSequenceClassification": BertConfig(**USUAL),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": RobertaConfig(**USUAL),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": LlamaConfig(**LLAMA, num_labels=1),
}


def save_tiny_models(folder: Path) -> None:
    """Save every model under `folder`, always with the same weights."""
    for auto_class, configs in (
        (AutoModelForCausalLM, CAUSAL_LM),
        (AutoModelForSeq2SeqLM, SEQ_2_SEQ_LM),
        (AutoModel, FEATURE_EXTRACTION),
        (AutoModelForSequenceClassification, SEQ_CLS),
    ):
        for model_id, config in configs.items():
            torch.manual_seed(0)
            auto_class.from_config(config).save_pretrained(folder / model_id)
