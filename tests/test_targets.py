"""What `target_modules` means but SVF cannot adapt: refused by name, left out of all-linear, or one warning."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from helpers import IDS, adapted, logits, svf_layers, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from typer.testing import CliRunner

from peft_svf import SVFConfig
from peft_svf.cli.app import app
from peft_svf.tuner.targets import expert_weights, linear_weights, unusable_modules

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48}
STATES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}

MODELS: dict[str, Callable[[], Any]] = {
    "bloom": lambda: T.BloomForCausalLM(T.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
    "falcon": lambda: T.FalconForCausalLM(T.FalconConfig(**SIZES)),
    "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)),
    "t5": lambda: T.T5ForConditionalGeneration(T.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2)),
    "deberta": lambda: T.DebertaModel(T.DebertaConfig(**SIZES, intermediate_size=48)),
    "mixtral": lambda: T.MixtralForCausalLM(T.MixtralConfig(**LLAMA, num_local_experts=4)),
    "qwen3_moe": lambda: T.Qwen3MoeForCausalLM(
        T.Qwen3MoeConfig(**LLAMA, head_dim=8, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2)
    ),
    "gpt_oss": lambda: T.GptOssForCausalLM(T.GptOssConfig(**LLAMA, head_dim=8, num_local_experts=4)),
    "phimoe": lambda: T.PhimoeForCausalLM(T.PhimoeConfig(**LLAMA, num_local_experts=4)),
    "llama4": lambda: T.Llama4ForCausalLM(
        T.Llama4TextConfig(
            **LLAMA, head_dim=8, num_local_experts=4, intermediate_size_mlp=48, moe_layers=[1], pad_token_id=0
        )
    ),
    "mamba": lambda: T.MambaForCausalLM(T.MambaConfig(**STATES)),
    "falcon_mamba": lambda: T.FalconMambaForCausalLM(T.FalconMambaConfig(**STATES)),
    "mamba2": lambda: T.Mamba2ForCausalLM(T.Mamba2Config(**STATES, num_heads=8, head_dim=8, n_groups=2)),
    "jamba": lambda: T.JambaForCausalLM(
        T.JambaConfig(
            **LLAMA, num_experts=4, mamba_d_state=4, mamba_dt_rank=4, attn_layer_period=2, attn_layer_offset=1
        )
    ),
    "bamba": lambda: T.BambaForCausalLM(
        T.BambaConfig(
            **LLAMA, mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=4, attn_layer_indices=[1]
        )
    ),
    "encoder": lambda: nn.Sequential(nn.TransformerEncoderLayer(32, 4, 48), nn.Linear(32, 2)),
}


def attach(model: Any, targets: Any) -> tuple[PeftModel, list[str]]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = get_peft_model(model, SVFConfig(target_modules=targets))
    return model, [str(each.message) for each in said if "target_modules" in str(each.message)]


# ---------------------------------------------------------------------------------------------------- unusable modules


@pytest.mark.parametrize(
    ("name", "target", "why"),
    [
        ("mamba", "dt_proj", "MambaMixer reads its weight"),
        ("mamba", "out_proj", "MambaMixer reads its weight"),
        ("falcon_mamba", "x_proj", "FalconMambaMixer reads its weight"),
        ("mamba2", "out_proj", "Mamba2Mixer reads its weight"),
        ("jamba", "dt_proj", "JambaMambaMixer reads its weight"),
        ("bamba", "out_proj", "BambaMixer reads its weight"),
        ("encoder", "out_proj", "MultiheadAttention reads its weight"),
        ("encoder", "linear1", "TransformerEncoderLayer reads its weight"),
        ("llama4", "router", "its class Llama4Router does not return"),
        ("phimoe", "router", "its class PhimoeTopKRouter does not return"),
    ],
)
def test_a_module_that_an_adapter_cannot_change_is_refused_by_name(name: str, target: str, why: str) -> None:
    model = MODELS[name]()
    before = [key for key, _ in model.named_modules()]
    for targets in ([target], rf".*\.{target}"):
        with pytest.raises(ValueError, match=rf"Target module .*{target} cannot be adapted: {why}"):
            get_peft_model(model, SVFConfig(target_modules=targets))
    assert [key for key, _ in model.named_modules()] == before


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "mamba2", "jamba", "bamba", "llama4", "phimoe"])
def test_all_linear_leaves_it_out_and_the_rest_is_trained_and_merged(name: str) -> None:
    torch.manual_seed(0)
    base = MODELS[name]()
    unusable = unusable_modules(base)
    wanted = {each for each, module in base.named_modules() if type(module) is nn.Linear} - {"lm_head", *unusable}
    model, said = attach(base, "all-linear")
    assert unusable
    assert svf_layers(model).keys() == wanted
    assert sum("leaves out" in text for text in said) == 1
    with torch.no_grad():
        for layer in svf_layers(model).values():
            nn.init.normal_(layer.svf_delta["default"].weight, std=0.3)
    model.train()
    model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.eval()
    before = logits(model, use_cache=False)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, use_cache=False), before, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ["bloom", "falcon", "gpt2", "t5", "deberta"])
def test_nothing_is_left_out_of_models_that_call_their_modules(name: str) -> None:
    """Bloom reads weights only with `slow_but_exact`, T5 looks at a dtype, DeBERTa has a path that is not used."""
    assert unusable_modules(MODELS[name]()) == {}


def test_a_setting_that_makes_a_model_read_its_weights() -> None:
    settings = {"vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": 4, "pretraining_tp": 2}
    assert unusable_modules(T.BloomForCausalLM(T.BloomConfig(**settings, slow_but_exact=False))) == {}
    found = unusable_modules(T.BloomForCausalLM(T.BloomConfig(**settings, slow_but_exact=True)))
    assert {name.rpartition(".")[2] for name in found} == {"dense", "dense_4h_to_h"}


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.checked = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.called(x).to(self.checked.weight.dtype)
        return self.checked(x) @ self.read.weight.mT


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Concatenated(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, super().forward(x)], -1)


def test_custom_modules() -> None:
    model = nn.ModuleDict({"a": Reading(), "b": Scaled(4, 4), "c": Concatenated(4, 4)})
    assert unusable_modules(model).keys() == {"a.read", "c"}
    wrapped = get_peft_model(model, LoraConfig(target_modules=["read", "called"], r=2)).base_model.model
    assert unusable_modules(wrapped).keys() == {"a.read", "c"}


def test_embeddings_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"model\.embed_tokens is a Embedding"):
        get_peft_model(tiny_llama(), SVFConfig(target_modules=["q_proj", "embed_tokens"]))


# --------------------------------------------------------------------------------------------------------- MoE experts


@pytest.mark.parametrize(
    ("name", "targets", "warns"),
    [
        ("mixtral", "all-linear", True),
        ("mixtral", ["q_proj", "w1", "w2", "w3"], True),
        ("qwen3_moe", ["q_proj", "gate_proj", "up_proj", "down_proj"], True),
        ("qwen3_moe", r".*(q_proj|experts\.\d+\.up_proj)", True),
        ("gpt_oss", ["q_proj", "gate_up_proj"], True),
        ("gpt_oss", "all-linear", True),
        ("jamba", ["q_proj", "gate_proj"], True),
        ("mixtral", ["q_proj", "v_proj"], False),
        ("qwen3_moe", r".*self_attn\.(q|k)_proj", False),
        ("bloom", "all-linear", False),
    ],
)
def test_experts_that_a_target_means_give_one_warning(name: str, targets: Any, warns: bool) -> None:
    model, said = attach(MODELS[name](), targets)
    about = [text for text in said if "MoE experts" in text]
    assert len(about) == warns
    assert not warns or "% of the linear weights are left out" in about[0]
    assert all("experts" not in layer for layer in svf_layers(model))


def test_no_warning_for_experts_that_are_excluded_or_for_a_saved_adapter(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*MoE experts")
        config = SVFConfig(target_modules="all-linear", exclude_modules=r".*experts.*")
        get_peft_model(MODELS["qwen3_moe"](), config)
    base = MODELS["mixtral"]()
    with pytest.warns(UserWarning, match="MoE experts"):
        model = get_peft_model(base, SVFConfig(target_modules=["q_proj", "w1"]))
    model.save_pretrained(tmp_path)
    base = model.unload()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*MoE experts")
        PeftModel.from_pretrained(base, tmp_path)


# ------------------------------------------------------------------------------------------------------------ fraction


def test_the_fraction_of_linear_weights(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted(tiny_llama(), target_modules=["q_proj"])
    expected = 2 * 32 * 32 / sum(linear_weights(tiny_llama()).values())
    assert model.base_model.adapted_fraction() == pytest.approx(expected)
    model.print_trainable_parameters()
    assert f"adapted linear weights: {expected:.1%}" in capsys.readouterr().out
    get_peft_model(tiny_llama(), SVFConfig(target_modules="all-linear")).print_trainable_parameters()
    assert "adapted linear weights: 100.0%" in capsys.readouterr().out
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).print_trainable_parameters()
    assert "adapted linear weights" not in capsys.readouterr().out


def test_experts_count_as_linear_weights() -> None:
    base = MODELS["mixtral"]()
    experts = sum(p.numel() for name, p in base.named_parameters() if ".experts." in name)
    assert sum(expert_weights(base).values()) == experts
    total = experts + sum(m.weight.numel() for n, m in base.named_modules() if type(m) is nn.Linear and n != "lm_head")
    model, _ = attach(base, "all-linear")
    assert model.base_model.adapted_fraction() == pytest.approx(1 - experts / total)


def test_inspect_shows_the_fraction(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = T.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted(base, target_modules=["q_proj", "v_proj"]).save_pretrained(tmp_path / "expert")
    found = CliRunner().invoke(app, ["inspect", str(tmp_path / "expert"), "--json"])
    weights = linear_weights(tiny_llama())
    expected = sum(size for name, size in weights.items() if name.endswith(("q_proj", "v_proj"))) / sum(
        weights.values()
    )
    assert json.loads(found.output)["adapted_fraction"] == pytest.approx(expected)
    assert (
        f"{expected:.1%} of the linear weights" in CliRunner().invoke(app, ["inspect", str(tmp_path / "expert")]).output
    )
