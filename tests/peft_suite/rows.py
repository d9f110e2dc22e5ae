"""What SVF is tested with: its rows in the matrices of PEFT's test suite."""

from __future__ import annotations

from typing import Any

import pytest

from peft_svf import SVFConfig

Row = tuple[Any, ...]


def custom(name: str, model: str, **config: Any) -> Row:
    return (f"{name} SVF", model, SVFConfig, config)


# MLP: lin0 [20, 10], whose basis is on the input side, and lin1 [2, 20], whose basis is on the output side.
# EmbConv1D: an embedding, transformers' Conv1D, which stores its weight transposed, and lin0 [2, 10].
CUSTOM_MODELS = [
    custom("Vanilla MLP 1 regex", "MLP", target_modules="lin0"),
    custom("Vanilla MLP 2 output side", "MLP", target_modules=["lin1"]),
    custom("Vanilla MLP 3 both sides", "MLP", target_modules=["lin0", "lin1"]),
    custom("Vanilla MLP 4 modules_to_save", "MLP", target_modules=["lin0"], modules_to_save=["lin1"]),
    # r is below k = 10 of lin0 and above k = 2 of lin1
    custom("Vanilla MLP 5 truncated", "MLP", target_modules=["lin0", "lin1"], r=3),
    custom("Vanilla MLP 6 exclude_modules", "MLP", target_modules=r"lin\d", exclude_modules=["lin1"], r=1),
    custom("Conv1D 1 fan_in_fan_out", "EmbConv1D", target_modules=["conv1d"], fan_in_fan_out=True),
    custom("Conv1D 2 and linear", "EmbConv1D", target_modules=["conv1d", "lin0"]),
]


def pair(name: str, config_1: dict[str, Any], config_2: dict[str, Any]) -> Row:
    return (f"SVF {name}", "svf", SVFConfig, config_1 | {"init_weights": False}, config_2 | {"init_weights": False})


MULTIPLE_ACTIVE_ADAPTERS = [
    pair("Same", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    pair("Different", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
    pair("Overlapping", {"target_modules": ["lin0"]}, {"target_modules": ["lin0", "lin1"]}),
    pair("Different r", {"target_modules": ["lin0"], "r": 4}, {"target_modules": ["lin0"]}),
]


def mixed(name: str, config_0: dict[str, Any], config_1: dict[str, Any]) -> Row:
    return (
        f"SVF mixed adapter {name}",
        SVFConfig(**config_0, init_weights=False),
        SVFConfig(**config_1, init_weights=False),
    )


MIXED_ADAPTERS = [
    mixed("same", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    mixed("different r", {"target_modules": ["lin0"], "r": 4}, {"target_modules": ["lin0"]}),
]


def transformers_rows(task_type: str, *configs: dict[str, Any]) -> list[Row]:
    return [(SVFConfig, {"task_type": task_type, "target_modules": None} | config) for config in configs]


# An older release may lack some of these matrices; with this one and newer ones that is an error.
WRITTEN_FOR = "0.21.2"

# By test file: the lists of the module that pytest.mark.parametrize is given.
# `bias` has no rows, as in PEFT: the suite's tests of `bias` set it themselves, and its other tests assume "none".
MATRICES: dict[str, dict[str, list[Any]]] = {
    "test_custom_models": {
        "TEST_CASES": CUSTOM_MODELS,
        "ALL_PEFT_CONFIG_CLASSES": [SVFConfig],
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": MULTIPLE_ACTIVE_ADAPTERS,
        "MIXED_ADAPTER_TEST_CASES": MIXED_ADAPTERS,
    },
    "test_decoder_models": {"ALL_CONFIGS": transformers_rows("CAUSAL_LM", {})},
    "test_encoder_decoder_models": {
        "ALL_CONFIGS": transformers_rows("SEQ_2_SEQ_LM", {}, {"target_modules": "all-linear", "r": 4})
    },
    "test_feature_extraction_models": {"ALL_CONFIGS": transformers_rows("FEATURE_EXTRACTION", {})},
    "test_seq_classifier": {"ALL_CONFIGS": transformers_rows("SEQ_CLS", {})},
    "test_config": {"ALL_CONFIG_CLASSES": [(SVFConfig, {})], "LAYER_INDEXING_CONFIG_CLASSES": [(SVFConfig, {})]},
}

_TWO_CONFIGS = "test_name, config0, config1"

# By test: the parameter names and the rows of tests that bring a matrix of their own, where it is not about LoRA alone.
ONE_TEST_MATRICES: dict[str, tuple[str, list[Any]]] = {
    "test_multiple_adapters_mixed_modules_to_save": ("config_cls", [SVFConfig]),
    "test_multiple_adapters_mixed_modules_to_save_order_switched": ("config_cls", [SVFConfig]),
    "test_adapter_name_makes_no_difference": (
        "config0",
        [pytest.param(SVFConfig(target_modules=["lin0"], init_weights=False), id="SVF")],
    ),
    "test_default_target_modules_not_set_raises": ("config_cls", [SVFConfig]),
    "test_default_target_modules_not_set_model_type_set_raises": ("config_cls", [SVFConfig]),
    "test_default_target_modules_list_of_str": ("config_cls", [SVFConfig]),
    "test_default_target_modules_str": ("config_cls", [SVFConfig]),
    "test_save_pretrained_with_target_modules": ("config_class", [SVFConfig]),
    "test_mixed_adapter_batches_different_target_layers": (
        _TWO_CONFIGS,
        [
            mixed("different layers", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
            mixed("different layers, switched", {"target_modules": ["lin1"]}, {"target_modules": ["lin0"]}),
        ],
    ),
    "test_mixed_adapter_batches_multiple_modules_to_save": (
        _TWO_CONFIGS,
        [mixed("modules_to_save", *[{"target_modules": ["lin0"], "modules_to_save": ["lin1"]}] * 2)],
    ),
    "test_mixed_adapter_batches_unsupported_layer_raises": (
        _TWO_CONFIGS,
        [mixed("unsupported modules_to_save", *[{"target_modules": ["lin0"], "modules_to_save": ["gru"]}] * 2)],
    ),
    "test_mixed_adapter_batches_partly_overlapping_target_layers": (
        _TWO_CONFIGS,
        [mixed("overlapping layers", {"target_modules": ["lin0"]}, {"target_modules": ["lin0", "lin1"]})],
    ),
    # without the embedding, which LoRA adapts there, too
    "test_mixed_adapter_batches_lora_conv1d_emb": (
        _TWO_CONFIGS,
        [mixed("conv1d", {"target_modules": ["conv1d"], "r": 2}, {"target_modules": ["conv1d", "lin0"]})],
    ),
    "test_mixed_adapter_batches_lora_conv1d_emb_multiple_modules_to_save": (
        _TWO_CONFIGS,
        [
            mixed(
                "conv1d and modules_to_save", *[{"target_modules": ["conv1d"], "modules_to_save": ["emb", "lin0"]}] * 2
            )
        ],
    ),
    "test_mixed_adapter_batches_lora_wrong_adapter_name_raises": (
        "test_name, config",
        [("SVF mixed batch wrong adapter name", SVFConfig(target_modules=["lin0"], init_weights=False))],
    ),
}

# The only tests that we leave out, by name, and why.
_REVISION = "loads a LoRA config from the hub, peft-internal-testing/tiny-opt-lora-revision"
NEEDS_HUB = {
    "test_from_pretrained": _REVISION,
    "test_from_pretrained_cache_dir": _REVISION,
    "test_save_pretrained_with_runtime_config": _REVISION,
}

# Tests for which a setting of this process has to be another than the default.
RUN_WITH: dict[str, dict[str, str]] = {
    # they load an adapter into a base model with other random weights than those it was made for, which SVF refuses on
    # purpose
    "test_loading_model_requires_grad_set_correctly": {"base_check": "ignore"},
    "test_loading_model_with_modules_to_save_requires_grad_set_correctly": {"base_check": "ignore"},
    # it compares two calls within 1e-6, between which a layer may start to fold, and on some CPUs that rounds by more
    "test_disable_adapter": {"fold": "never"},
}
