"""The tuner as a PEFT user meets it: identity, arithmetic, merging, checkpoints, dtypes, registration."""

from __future__ import annotations

import copy
import importlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model, init_empty_weights
from helpers import IDS, adapted, deltas, logits, randomise, tiny_llama
from helpers import svf_layers as layers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftConfig, PeftModel, PeftType, convert_to_lora, get_peft_model, save_as_lora
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import peft_svf
from peft_svf import SVFConfig, SVFModel, SVFRuntimeConfig
from peft_svf.tuner import registration

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Net(nn.Module):
    """One layer under a name."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def make_layer(kind: str, out: int, in_: int, bias: bool = True) -> nn.Module:
    if kind == "Linear":
        return nn.Linear(in_, out, bias=bias)
    layer = Conv1D(out, in_)
    nn.init.normal_(layer.bias, std=0.3)
    return layer


def make_model(kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """`"llama"` has no biases, `"llama-bias"` has them everywhere, `"gpt2"` is made of Conv1D."""
    if kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
        ).eval()
    else:
        model = tiny_llama(attention_bias=kind == "llama-bias", mlp_bias=kind == "llama-bias")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.get_base_layer().weight.detach().clone() for name, layer in layers(model).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal in every bit."""
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


# ------------------------------------------------------------------------------------------------------------ identity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "llama-bias", "gpt2"])
def test_a_fresh_adapter_changes_no_bit(kind: str, dtype: torch.dtype) -> None:
    model = make_model(kind, dtype)
    before = logits(model)
    model = get_peft_model(model, SVFConfig(target_modules="all-linear"))
    assert len(layers(model)) == (8 if kind == "gpt2" else 14)
    after = logits(model)
    assert after.dtype == before.dtype
    assert torch.equal(after, before)


@pytest.mark.parametrize("kind", ["llama", "llama-bias"])
def test_a_fresh_adapter_changes_no_bit_and_no_dtype_under_autocast(kind: str) -> None:
    model = make_model(kind)
    seen: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        return lambda module, args, output: seen.__setitem__(name, output)

    def observe(model: nn.Module) -> dict[str, torch.Tensor]:
        handles = [
            module.register_forward_hook(watch(name.removeprefix("base_model.model.")))
            for name, module in model.named_modules()
            if name.rpartition(".")[-1] in PROJECTIONS
        ]
        seen.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits(model)
        for handle in handles:
            handle.remove()
        return dict(seen)

    before = observe(model)
    after = observe(get_peft_model(model, SVFConfig(target_modules="all-linear")))
    assert {name: output.dtype for name, output in after.items()} == dict.fromkeys(before, torch.bfloat16)
    assert_same(after, before)


# --------------------------------------------------------------------------------------------------------- correctness


def dense(weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """`U diag(σ z) Vᵀ` from an fp64 SVD; weight `[out, in]`, z = 1 beyond the length of δ."""
    U, S, Vt = torch.linalg.svd(weight.double(), full_matrices=False)
    z = torch.ones_like(S)
    z[: len(delta)] += delta.double()
    return U @ torch.diag(S * z) @ Vt


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kind", "out", "in_", "r"),
    [
        ("Linear", 24, 40, None),  # wide
        ("Linear", 40, 24, None),  # tall
        ("Linear", 32, 32, None),
        ("Linear", 24, 40, 7),
        ("Linear", 40, 24, 7),
        ("Linear", 1, 16, None),
        ("Linear", 16, 1, None),
        ("Linear", 1, 1, None),
        ("Conv1D", 24, 40, None),
        ("Conv1D", 40, 24, None),
        ("Conv1D", 40, 24, 7),
        ("rank-deficient", 24, 40, None),
        ("rank-deficient", 40, 24, None),
        ("rank-deficient", 40, 24, 12),
    ],
)
def test_a_layer_computes_the_paper_s_equation(kind: str, out: int, in_: int, r: int | None, bias: bool) -> None:
    layer = make_layer("Conv1D" if kind == "Conv1D" else "Linear", out, in_, bias)
    if kind == "rank-deficient":
        layer.weight.data = torch.randn(out, 5) @ torch.randn(5, in_)
    weight = (layer.weight.mT if kind == "Conv1D" else layer.weight).detach().clone()
    offset = 0 if layer.bias is None else layer.bias.detach().double().clone()
    model = randomise(get_peft_model(Net(layer), SVFConfig(target_modules=["layer"], r=r)), std=1.0)
    delta = model.base_model.model.layer.svf_delta["default"]().detach()
    assert delta.shape == (min(out, in_, r or out),)

    x = torch.randn(3, 5, in_)
    wanted = dense(weight, delta)
    expected = x.double() @ wanted.mT + offset
    with torch.no_grad():
        assert relative_error(model(x), expected) <= 1e-5
        model.merge_adapter()
        assert relative_error(model(x), expected) <= 1e-5
    merged = model.base_model.model.layer.get_base_layer().weight
    assert relative_error(merged.mT if kind == "Conv1D" else merged, wanted) <= 1e-5


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    out=st.integers(1, 12),
    in_=st.integers(1, 12),
    r=st.one_of(st.none(), st.integers(1, 14)),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape_computes_the_paper_s_equation(out: int, in_: int, r: int | None, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(in_, out, bias=bias)
    weight, offset = layer.weight.detach().clone(), 0 if layer.bias is None else layer.bias.detach().double()
    runtime = SVFRuntimeConfig(use_cache=False)
    config = SVFConfig(target_modules=["layer"], r=r, runtime_config=runtime)
    model = randomise(get_peft_model(Net(layer), config), std=1.0, seed=seed)
    x = torch.randn(4, in_)
    terms = x.double().abs() @ dense(weight, torch.zeros(1)).abs().mT  # against cancellation when out = 1
    expected = x.double() @ dense(weight, model.base_model.model.layer.svf_delta["default"]()).mT + offset
    with torch.no_grad():
        error = (model(x).double() - expected).abs().max() / torch.maximum(expected.abs().max(), terms.max())
    assert error <= 1e-5


def test_bf16_is_as_close_as_bf16_gets() -> None:
    exact = adapted(tiny_llama())
    half = adapted(tiny_llama(dtype=torch.bfloat16))
    plain = relative_error(logits(tiny_llama(dtype=torch.bfloat16)), logits(tiny_llama()).double())
    assert relative_error(logits(half), logits(exact).double()) <= 3 * plain


# ---------------------------------------------------------------------------------------------------- several adapters


def three_experts(**second: Any) -> PeftModel:
    """Adapters of different width and reach; "c" is on layer 1 only."""
    model = adapted(r=4, target_modules=["q_proj", "down_proj"])
    model.add_adapter("b", SVFConfig(**{"r": 9, "target_modules": ["q_proj", "v_proj", "up_proj"], **second}))
    model.add_adapter("c", SVFConfig(target_modules=["v_proj", "up_proj"], layers_to_transform=[1]))
    return randomise(randomise(model, "b", seed=2), "c", seed=3)


def alone(model: PeftModel, adapter: str) -> torch.Tensor:
    """Logits of a fresh base with a copy of one adapter of `model` and nothing else."""
    single = get_peft_model(tiny_llama(), copy.deepcopy(model.peft_config[adapter]))
    for name, delta in deltas(single).items():
        delta.data.copy_(deltas(model, adapter)[name])
    return logits(single)


def test_adapters_of_different_rank_share_one_basis() -> None:
    model = adapted(r=4)
    first = alone(model, "default")
    model.add_adapter("wide", SVFConfig(r=16, target_modules="all-linear"))
    model.add_adapter("full", SVFConfig(target_modules="all-linear"))
    randomise(randomise(model, "wide", seed=2), "full", seed=3)
    for layer in layers(model).values():
        k = min(layer.in_features, layer.out_features)
        assert [len(layer.svf_delta[name].weight) for name in ("default", "wide", "full")] == [4, min(16, k), k]
        assert layer.basis is not None
        assert layer.basis.shape == (k, k)
    torch.testing.assert_close(logits(model), first, rtol=0, atol=1e-5)
    for name in ("wide", "full"):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), alone(model, name), rtol=0, atol=1e-5)
    bases = [name for name, _ in model.named_parameters() if "original_module_basis" in name]
    assert len(bases) == 14


@pytest.mark.parametrize("merged", [False, True])
def test_active_adapters_add_in_any_order(merged: bool) -> None:
    model = three_experts()
    before = base_weights(model)
    results = []
    for order in (["default", "b", "c"], ["c", "default", "b"]):
        model.base_model.set_adapter(order)
        if merged:
            model.merge_adapter(order[:1])
            model.merge_adapter(order[1:])
        results.append(logits(model))
        if merged:
            model.unmerge_adapter()
            assert_same(base_weights(model), before)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)

    single = adapted(target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    for name, delta in deltas(single).items():
        delta.data.zero_()
        for adapter in ("default", "b", "c"):
            part = deltas(model, adapter).get(name, torch.zeros(0))
            delta.data[: len(part)] += part
    torch.testing.assert_close(results[0], logits(single), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("never_fold")
def test_adding_an_adapter_leaves_the_active_one_alone() -> None:
    model = adapted()
    before, trainable = logits(model), {n for n, p in model.named_parameters() if p.requires_grad}
    model.add_adapter("other", SVFConfig(target_modules="all-linear"))
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model), before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    model.set_adapter("other")
    assert {n.split(".svf_delta.")[-1] for n, p in model.named_parameters() if p.requires_grad} == {"other.weight"}


# ------------------------------------------------------------------------------------------------ add_weighted_adapter


@pytest.mark.parametrize("weights", [[0.5, -1.5, 2.0], [1, 0, 0], [0.0, 0.0, 0.0]])
def test_a_weighted_adapter_is_the_exact_sum(weights: list[float]) -> None:
    model = three_experts()
    names = ["default", "b", "c"]
    before = alone(model, "default")
    model.add_weighted_adapter(names, weights, "mix")
    assert model.active_adapters == ["default"]
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)
    mixed = deltas(model, "mix")
    assert set(mixed) == set().union(*(deltas(model, name) for name in names))
    for name, delta in mixed.items():
        expected = torch.zeros(delta.shape)
        change = torch.zeros_like(layers(model)[name].get_base_layer().weight)
        for weight, adapter in zip(weights, names, strict=True):
            if name in deltas(model, adapter):
                part = deltas(model, adapter)[name].detach()
                expected[: len(part)] += weight * part
                change += weight * layers(model)[name].get_delta_weight(adapter)
        torch.testing.assert_close(delta.detach(), expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(layers(model)[name].get_delta_weight("mix"), change, rtol=1e-5, atol=1e-6)
    model.set_adapter("mix")
    if not any(weights):
        assert torch.equal(logits(model), logits(tiny_llama()))


def test_a_weighted_adapter_is_an_ordinary_adapter(tmp_path: Path) -> None:
    model = three_experts()
    model.add_weighted_adapter(["default", "b", "c"], [0.5, -1.5, 2.0], "mix")
    model.set_adapter("mix")
    model.save_pretrained(tmp_path, selected_adapters=["mix"])
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "mix")
    assert set(deltas(loaded)) == set(deltas(model, "mix"))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)


def test_the_same_adapter_twice_counts_twice() -> None:
    model = adapted()
    model.add_weighted_adapter(["default", "default"], [0.5, 0.75], "mix")
    for name, delta in deltas(model, "mix").items():
        torch.testing.assert_close(delta.detach(), 1.25 * deltas(model)[name].detach())


def test_a_weighted_adapter_stays_on_the_modules_of_its_parts() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.block = nn.Linear(6, 6), Net(nn.Linear(6, 6))
            self.block.lin = nn.Linear(6, 6)  # its name ends as the targeted one does

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block.lin(self.block(self.lin(x)))

    model = randomise(get_peft_model(Nested(), SVFConfig(target_modules="lin")))
    assert set(deltas(model)) == {"lin"}
    model.add_weighted_adapter(["default"], [1.0], "mix")
    assert set(deltas(model, "mix")) == {"lin"}


@pytest.mark.parametrize(
    ("adapters", "weights", "name", "message"),
    [
        (["default", "nope"], [1, 1], "mix", "'nope'.*default, b, c"),
        (["default", "b"], [1, 1], "b", "'b' already exists"),
        (["default", "b"], [1], "mix", "2 adapters and 1 weights"),
        ([], [], "mix", "0 adapters"),
        (["default", "b"], [1, float("nan")], "mix", "'b' is nan"),
        (["default", "b"], [float("-inf"), 1], "mix", "'default' is -inf"),
    ],
)
@pytest.mark.usefixtures("never_fold")
def test_a_weighted_adapter_refuses(adapters: list[str], weights: list[float], name: str, message: str) -> None:
    model = three_experts()
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(adapters, weights, name)
    assert list(model.peft_config) == ["default", "b", "c"]
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("extra", [{"modules_to_save": ["lm_head"]}, {"bias": "all"}])
def test_a_weighted_adapter_refuses_more_than_delta(extra: dict[str, Any]) -> None:
    model = adapted(make_model("llama-bias"), target_modules=["q_proj"], **extra)
    with pytest.raises(ValueError, match=r"'default' has `modules_to_save` or `bias`"):
        model.add_weighted_adapter(["default"], [1.0], "mix")


# ------------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("kind", ["llama", "llama-bias", "gpt2"])
def test_merge_and_unmerge(kind: str) -> None:
    model = adapted(make_model(kind))
    weights, before = base_weights(model), logits(model)
    model.merge_adapter()
    assert all(not torch.equal(layer.get_base_layer().weight, weights[name]) for name, layer in layers(model).items())
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert_same(base_weights(model), weights)
    assert torch.equal(logits(model), before)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unload_gives_a_plain_model(safe: bool) -> None:
    model = adapted(make_model("gpt2"))
    before = logits(model)
    merged = model.merge_and_unload(safe_merge=safe)
    torch.testing.assert_close(logits(merged), before, rtol=0, atol=1e-5)
    assert [type(m) for m in merged.modules()] == [type(m) for m in make_model("gpt2").modules()]
    assert merged.state_dict().keys() == make_model("gpt2").state_dict().keys()


def test_unload_gives_the_base_model_back() -> None:
    base = tiny_llama()
    expected = {name: value.clone() for name, value in base.state_dict().items()}
    assert_same(adapted(base).unload().state_dict(), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_refuses_a_broken_adapter(value: float) -> None:
    model = adapted()
    weights = base_weights(model)
    broken = "model.layers.1.mlp.up_proj"
    deltas(model)[broken].data[3] = value
    # PEFT's words, and the module
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights.*default seems to be broken") as caught:
        model.merge_adapter(safe_merge=True)
    assert broken in str(caught.value)
    assert torch.equal(layers(model)[broken].get_base_layer().weight, weights[broken])
    assert not layers(model)[broken].merged

    model.merge_adapter()  # unsafe: goes through, and even that can be undone
    assert not layers(model)[broken].get_base_layer().weight.isfinite().all()
    model.unmerge_adapter()
    assert_same(base_weights(model), weights)


def test_merging_twice_warns_and_does_nothing() -> None:
    model = adapted()
    model.merge_adapter()
    merged = base_weights(model)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert_same(base_weights(model), merged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_a_thousand_merges_leave_every_bit(kind: str, dtype: torch.dtype) -> None:
    model = get_peft_model(Net(make_layer(kind, 24, 16)).to(dtype), SVFConfig(target_modules=["layer"]))
    (layer,) = layers(model).values()
    weight, (delta,) = layer.get_base_layer().weight, deltas(model).values()
    original, address = weight.detach().clone(), weight.data_ptr()
    changed = 0
    for _ in range(1000):
        delta.data.normal_(std=0.3)
        model.merge_adapter()
        changed += not torch.equal(weight, original)
        model.unmerge_adapter()
        assert torch.equal(weight, original)
    assert changed == 1000
    assert weight.data_ptr() == address


def test_the_delta_weight_is_what_merging_adds() -> None:
    for kind in ("llama", "gpt2"):
        model = adapted(make_model(kind))
        before = base_weights(model)
        change = {name: layer.get_delta_weight("default") for name, layer in layers(model).items()}
        model.merge_adapter()
        for name, layer in layers(model).items():
            weight = layer.get_base_layer().weight.detach()
            assert change[name].shape == weight.shape
            torch.testing.assert_close(weight - before[name], change[name], rtol=0, atol=1e-6)
            # of the unmerged weight, also while merged
            assert torch.equal(layer.get_delta_weight("default"), change[name])


# ------------------------------------------------------------------------------------------------- disable and delete


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.usefixtures("never_fold")
def test_disable_adapter_is_the_base_model(merged: bool) -> None:
    base = make_model("llama-bias")
    plain = logits(base)
    model = adapted(base)
    before, weights = logits(model), base_weights(model)
    if merged:
        model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert_same(base_weights(model), weights)
    assert not torch.equal(before, plain)
    assert torch.equal(logits(model), before)


def test_delete_adapter_frees_the_basis_with_the_last_one() -> None:
    model = three_experts()
    third = alone(model, "c")
    model.delete_adapter("default")
    model.delete_adapter("b")
    model.set_adapter("c")
    assert torch.equal(logits(model), third)
    for layer in layers(model).values():
        assert (layer.basis is None) == (not layer.svf_delta)
    model.delete_adapter("c")
    assert all(layer.basis is None for layer in layers(model).values())
    # PeftModel itself cannot be called without an adapter
    assert torch.equal(logits(model.base_model.model), logits(tiny_llama()))

    model.add_adapter("again", SVFConfig(target_modules="all-linear"))
    model.set_adapter("again")
    randomise(model, "again")
    assert torch.equal(logits(model), logits(adapted()))


def test_an_adapter_added_while_another_is_merged_has_the_basis_of_the_base_weight() -> None:
    model = adapted(r=4)
    model.merge_adapter()
    model.add_adapter("full", SVFConfig(target_modules="all-linear"))
    randomise(model, "full", seed=2)
    model.unmerge_adapter()
    model.set_adapter("full")
    torch.testing.assert_close(logits(model), alone(model, "full"), rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- selecting


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"target_modules": "all-linear"}, {f"layers.{i}.{m}" for i in (0, 1) for m in PROJECTIONS}),
        ({"target_modules": None}, {f"layers.{i}.{m}" for i in (0, 1) for m in ("q_proj", "v_proj")}),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0}, {"layers.0.q_proj"}),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, {"layers.1.q_proj"}),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
            {"layers.1.q_proj"},
        ),
        (
            {"target_modules": "all-linear", "exclude_modules": [m for m in PROJECTIONS if m != "up_proj"]},
            {"layers.0.up_proj", "layers.1.up_proj"},
        ),
        (
            {"target_modules": r".*\.1\..*_proj", "exclude_modules": r".*[qkvo]_proj"},
            {f"layers.1.{m}" for m in ("gate_proj", "up_proj", "down_proj")},
        ),
        ({"target_modules": ["lm_head"]}, {"lm_head"}),
    ],
)
def test_modules_are_chosen_as_in_peft(config: dict[str, Any], expected: set[str]) -> None:
    model = get_peft_model(tiny_llama(), SVFConfig(**config))
    found = {name.removeprefix("model.").replace("self_attn.", "").replace("mlp.", "") for name in deltas(model)}
    assert found == expected


def test_default_target_modules_follow_the_architecture() -> None:
    model = get_peft_model(make_model("gpt2"), SVFConfig())
    assert {name.rpartition(".")[-1] for name in deltas(model)} == {"c_attn"}


def test_modules_to_save_are_trained_and_saved(tmp_path: Path) -> None:
    model = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
    head = next(p for n, p in model.named_parameters() if "lm_head.modules_to_save.default" in n)
    assert head.requires_grad
    head.data.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert set(saved) == {"base_model.model.lm_head.weight"} | {
        f"base_model.model.model.layers.{i}.self_attn.q_proj.svf_delta.weight" for i in (0, 1)
    }
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama()))


@pytest.mark.parametrize(("bias", "trained"), [("none", 0), ("svf_only", 4), ("all", 14)])
def test_biases_are_trained_and_saved_as_asked(tmp_path: Path, bias: str, trained: int) -> None:
    model = adapted(make_model("llama-bias"), target_modules=["q_proj", "v_proj"], bias=bias)
    biases = [p for n, p in model.named_parameters() if n.endswith(".bias") and p.requires_grad]
    assert len(biases) == trained
    for parameter in biases:
        parameter.data.normal_()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(key.endswith(".bias") for key in saved) == trained
    loaded = PeftModel.from_pretrained(make_model("llama-bias"), tmp_path)
    if bias == "none":
        return
    found = {n: p for n, p in loaded.named_parameters() if n.endswith(".bias")}
    expected = {n: p for n, p in model.named_parameters() if n.endswith(".bias") and p.requires_grad}
    assert_same({n: found[n] for n in expected}, expected)


# -------------------------------------------------------------------------------------------------- dtypes and devices


@pytest.mark.usefixtures("never_fold")
def test_low_cpu_mem_usage(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), SVFConfig(target_modules="all-linear"), low_cpu_mem_usage=True)
    assert all(delta.is_meta for delta in deltas(model).values())
    assert all(layer.basis is not None and not layer.basis.is_meta for layer in layers(model).values())

    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=True)
    loaded.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
    for name in ("default", "second"):
        loaded.set_adapter(name)
        assert not any(parameter.is_meta for parameter in loaded.parameters())
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_delta_is_fp32_on_every_path_unless_refused(tmp_path: Path, dtype: torch.dtype, autocast: bool) -> None:
    adapted(tiny_llama(dtype=dtype)).save_pretrained(tmp_path)
    config = SVFConfig(target_modules="all-linear")
    for low in (False, True):
        options = {"autocast_adapter_dtype": autocast, "low_cpu_mem_usage": low}
        model = PeftModel.from_pretrained(tiny_llama(dtype=dtype), tmp_path, **options)
        model.add_adapter("added", config, **options)
        model.load_adapter(tmp_path, "loaded", **options)
        fresh = get_peft_model(tiny_llama(dtype=dtype), config, **options)
        kinds = {delta.dtype for name in ("default", "added", "loaded") for delta in deltas(model, name).values()}
        kinds |= {delta.dtype for delta in deltas(fresh).values()}
        assert kinds == {torch.float32 if autocast else dtype}
        assert {layer.basis.dtype for layer in layers(model).values() if layer.basis is not None} == {dtype}
        assert logits(model).dtype == dtype


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01), (torch.float64, 1e-5)])
def test_a_model_can_be_cast_after_attaching(dtype: torch.dtype, tolerance: float) -> None:
    model = adapted()
    before = logits(model)
    model = model.to(dtype)
    after = logits(model)
    assert after.dtype == dtype
    assert relative_error(after, before.double()) <= tolerance
    assert all(layer.get_delta_weight("default").dtype in (torch.float32, dtype) for layer in layers(model).values())
    model.merge_adapter()
    assert relative_error(logits(model), before.double()) <= tolerance


def test_an_adapter_moves_between_precisions(tmp_path: Path) -> None:
    """Casting a base does not make it another one."""
    adapted().save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        loaded = PeftModel.from_pretrained(tiny_llama(dtype=dtype), tmp_path)
        assert {delta.dtype for delta in deltas(loaded).values()} == {torch.float32}
        assert_same(deltas(loaded), deltas(adapted()))


# --------------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_holds_delta_and_nothing_else(tmp_path: Path) -> None:
    model = adapted(tiny_llama(hidden_size=256, intermediate_size=320, num_key_value_heads=4))
    model.add_adapter("other", SVFConfig(r=5, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    saved = load_file(tmp_path / "adapter_model.safetensors")
    expected = {f"base_model.model.{name}.svf_delta.weight": delta for name, delta in deltas(model).items()}
    assert_same(saved, expected)

    trainable = model.get_nb_trainable_parameters()[0]
    assert trainable == sum(delta.numel() for delta in expected.values()) == 14 * 256
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert size <= 4.2 * trainable + 200 * len(saved)


def test_get_peft_model_state_dict_and_back() -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    model = adapted()
    state = get_peft_model_state_dict(model)
    assert len(state) == 14
    assert all(key.endswith(".svf_delta.weight") for key in state)
    fresh = get_peft_model(tiny_llama(), SVFConfig(target_modules="all-linear"))
    result = set_peft_model_state_dict(fresh, state)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "svf" in key]
    assert torch.equal(logits(fresh), logits(model))


def test_loading_into_an_existing_adapter_keeps_its_storage(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    before = logits(model)
    addresses = {name: delta.data_ptr() for name, delta in deltas(model).items()}
    bases = {name: layer.basis for name, layer in layers(model).items()}
    randomise(model, seed=9)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model), before)
    assert {name: delta.data_ptr() for name, delta in deltas(model).items()} == addresses
    assert all(layer.basis is bases[name] for name, layer in layers(model).items())


@pytest.mark.parametrize("kind", ["llama", "llama-bias", "gpt2"])
def test_save_and_load(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(5)
    base = make_model(kind)
    fresh = copy.deepcopy(base)
    model = adapted(base, r=20)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    trainable = PeftModel.from_pretrained(copy.deepcopy(model.unload()), tmp_path, is_trainable=True)
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {
        f"base_model.model.{name}.svf_delta.default.weight" for name in deltas(trainable)
    }


# ------------------------------------------------------------------------------------------------------------ training


def test_the_basis_stays_frozen() -> None:
    model = get_peft_model(tiny_llama(), SVFConfig(target_modules="all-linear"))
    trainable = {f"base_model.model.{name}.svf_delta.default.weight" for name in deltas(model)}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    model.requires_grad_(True)
    model.base_model._mark_only_adapters_as_trainable(model.base_model.model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable


@pytest.mark.parametrize(("out", "in_", "r"), [(12, 20, None), (20, 12, None), (20, 12, 5), (12, 20, 5)])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_the_gradient_is_that_of_the_dense_weight(kind: str, out: int, in_: int, r: int | None) -> None:
    model = randomise(get_peft_model(Net(make_layer(kind, out, in_).double()), SVFConfig(target_modules="layer", r=r)))
    (layer,), (delta,) = layers(model).values(), deltas(model).values()
    x = torch.randn(7, in_, dtype=torch.float64, requires_grad=True)
    target = torch.randn(7, out, dtype=torch.float64)
    (model(x) * target).tanh().sum().backward()

    base = layer.get_base_layer()
    weight = (base.weight.mT if kind == "Conv1D" else base.weight).detach()
    U, S, Vt = torch.linalg.svd(weight, full_matrices=False)
    n = len(delta)
    d = delta.detach().double().requires_grad_()
    effective = weight + (U[:, :n] * (S[:n] * d)) @ Vt[:n]
    x2 = x.detach().clone().requires_grad_()
    ((x2 @ effective.mT + base.bias.detach()) * target).tanh().sum().backward()
    assert d.grad is not None
    torch.testing.assert_close(delta.grad, d.grad.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-6, atol=1e-7)
    assert base.weight.grad is None


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    grads = {name: delta.grad for name, delta in deltas(model).items()}
    return {name: grad.clone() for name, grad in grads.items() if grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = adapted().train()
    plain = gradients(model)
    assert len(plain) == 14
    assert all(grad.abs().sum() > 0 for grad in plain.values())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert model.base_model.model.is_gradient_checkpointing
    checkpointed = gradients(model)
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad)


def test_training_moves_delta_only() -> None:
    model = get_peft_model(tiny_llama(), SVFConfig(target_modules="all-linear")).train()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(IDS, labels=IDS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert_same({n: p for n, p in model.named_parameters() if n in frozen}, frozen)
    assert all(delta.abs().min() > 0 for delta in deltas(model).values())


# ------------------------------------------------------------------------------------------------- copying and pickles


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.usefixtures("never_fold")
def test_a_copy_is_equal_and_independent(how: Any, merged: bool) -> None:
    model = three_experts()
    base = base_weights(model)
    if merged:
        model.merge_adapter()
    before = logits(model)
    twin = how(model)
    assert torch.equal(logits(twin), before)
    if merged:
        twin.unmerge_adapter()
        assert_same(base_weights(twin), base)
    randomise(twin, seed=7)
    twin.delete_adapter("b")
    assert torch.equal(logits(model), before)
    assert list(model.peft_config) == ["default", "b", "c"]


# ------------------------------------------------------------------------------------------------------------- configs


def test_the_config_survives_json(tmp_path: Path) -> None:
    config = SVFConfig(
        r=6,
        target_modules=["q_proj", "up_proj"],
        exclude_modules=["k_proj"],
        layers_to_transform=[0, 1],
        task_type="CAUSAL_LM",
        runtime_config=SVFRuntimeConfig(base_check="warn", cache_dir=str(tmp_path / "bases")),
    )
    model = adapted(r=None, **{k: v for k, v in vars(config).items() if k in ("target_modules", "runtime_config")})
    model.add_adapter("second", config)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    assert written["peft_type"] == "SVF"
    assert written["r"] == 6
    assert "runtime_config" not in written
    assert "expected_fingerprint" not in written
    assert str(tmp_path / "bases") not in json.dumps(written)
    assert set(written["base_fingerprint"]) == set(deltas(model, "second"))
    for name, numbers in written["base_fingerprint"].items():
        S = torch.linalg.svdvals(layers(model)[name].get_base_layer().weight.detach().double())
        expected = [S[0].item(), S[(len(S) - 1) // 2].item(), S[-1].item(), S.norm().item()]
        assert numbers[:4] == pytest.approx(expected, rel=1e-6)
        assert len(numbers) == 16

    read = PeftConfig.from_pretrained(str(tmp_path / "second"))
    assert type(read) is SVFConfig
    assert read.runtime_config == SVFRuntimeConfig()
    saved = model.peft_config["second"].to_dict()
    changed = {"inference_mode"}  # an adapter on disk is for inference
    assert {k: v for k, v in read.to_dict().items() if k not in changed} == {
        k: v for k, v in saved.items() if k not in changed
    }


@pytest.mark.parametrize("both_at_once", [False, True])
def test_one_config_serves_two_bases(tmp_path: Path, both_at_once: bool) -> None:
    """What is saved with each is the fingerprint of its own base."""
    config = SVFConfig(target_modules="all-linear")
    models = []
    for seed in (0, 1):
        models.append(get_peft_model(tiny_llama(seed), config))
        if not both_at_once:
            models[seed].save_pretrained(tmp_path / str(seed))
    if both_at_once:
        for seed in (0, 1):
            models[seed].save_pretrained(tmp_path / str(seed))
    first, second = (
        json.loads((tmp_path / str(seed) / "adapter_config.json").read_text())["base_fingerprint"] for seed in (0, 1)
    )
    assert len(first) == len(second) == 14
    assert all(first[name] != second[name] for name in first)
    for seed in (0, 1):  # each accepts its own base
        PeftModel.from_pretrained(tiny_llama(seed), tmp_path / str(seed))


def test_the_runtime_config_chooses_the_cache(tmp_path: Path) -> None:
    where = tmp_path / "here"
    adapted(runtime_config=SVFRuntimeConfig(cache_dir=str(where), use_cache=False))
    assert not where.exists()
    adapted(runtime_config=SVFRuntimeConfig(cache_dir=str(where)))
    assert len(list(where.glob("*.safetensors"))) == 14
    with pytest.raises(ValueError, match="'loud'"):
        SVFRuntimeConfig(base_check="loud")  # type: ignore[arg-type]


@pytest.mark.parametrize("fan_in_fan_out", [True, False])
def test_fan_in_fan_out_follows_the_layer(fan_in_fan_out: bool) -> None:
    for kind in ("Linear", "Conv1D"):
        config = SVFConfig(target_modules=["layer"], fan_in_fan_out=fan_in_fan_out)
        layer = make_layer(kind, 6, 4)
        weight = (layer.weight.mT if kind == "Conv1D" else layer.weight).detach().clone()
        if kind == "Linear" and fan_in_fan_out:
            with pytest.warns(UserWarning, match="fan_in_fan_out is set to True but the target module layer"):
                model = get_peft_model(Net(layer), config)
        else:
            model = get_peft_model(Net(layer), config)
        randomise(model)
        x = torch.randn(3, 4)
        expected = x.double() @ dense(weight, next(iter(deltas(model).values()))).mT + layer.bias
        assert relative_error(model(x).detach(), expected.detach()) <= 1e-5


# -------------------------------------------------------------------------------------------------------- LoRA exports


def test_convert_to_lora_is_exact_at_full_rank(tmp_path: Path) -> None:
    model = adapted(target_modules=["q_proj", "o_proj"])
    config, state = convert_to_lora(model, rank=32)
    assert config.r == 32
    assert len(state) == 8
    save_as_lora(tmp_path, model, rank=32)
    lora = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert lora.peft_config["default"].peft_type == PeftType.LORA
    torch.testing.assert_close(logits(lora), logits(model), rtol=0, atol=1e-5)


def test_a_narrow_adapter_is_a_narrow_lora(tmp_path: Path) -> None:
    model = adapted(r=3)
    save_as_lora(tmp_path, model, rank=3)
    lora = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(lora), logits(model), rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------------------- meta and offload


def meta_llama(**config: Any) -> PeftModel:
    with init_empty_weights(include_buffers=False):
        base = tiny_llama()
    assert base.model.layers[0].mlp.up_proj.weight.is_meta
    return get_peft_model(base, SVFConfig(target_modules="all-linear", **config))


def test_a_base_on_meta_names_the_module_on_forward() -> None:
    model = meta_llama()
    assert len(layers(model)) == 14
    assert all(layer.basis is not None and layer.basis.is_meta for layer in layers(model).values())
    with pytest.raises(RuntimeError, match=r"model\.layers\.0\.self_attn\.q_proj is on the meta device"):
        logits(model)
    with pytest.raises(RuntimeError, match=r"is on the meta device"):
        model.merge_adapter()


def weights_for(model: PeftModel, source: nn.Module) -> dict[str, torch.Tensor]:
    """The values of `source`, a plain model, under the names that they have in `model`, and δ = 0.1."""
    state = {}
    for key, value in model.state_dict().items():
        if ".svf_delta." in key:
            state[key] = torch.full(value.shape, 0.1)
        elif "original_module_basis" not in key:
            state[key] = source.state_dict()[key.removeprefix("base_model.model.").replace(".base_layer", "")]
    return state


def test_weights_may_come_after_the_adapter(tmp_path: Path) -> None:
    reference = adapted()
    for delta in deltas(reference).values():
        delta.data.fill_(0.1)
    reference.save_pretrained(tmp_path)
    fingerprints = json.loads((tmp_path / "adapter_config.json").read_text())["base_fingerprint"]

    model = meta_llama()
    result = model.load_state_dict(weights_for(model, tiny_llama()), assign=True, strict=False)
    assert not result.unexpected_keys
    torch.testing.assert_close(logits(model), logits(reference), rtol=0, atol=1e-6)
    assert model.peft_config["default"].base_fingerprint == fingerprints

    expecting = meta_llama(base_fingerprint=fingerprints)
    expecting.load_state_dict(weights_for(expecting, tiny_llama()), assign=True, strict=False)
    torch.testing.assert_close(logits(expecting), logits(reference), rtol=0, atol=1e-6)

    mistaken = meta_llama(base_fingerprint=fingerprints)
    mistaken.load_state_dict(weights_for(mistaken, tiny_llama(seed=1)), assign=True, strict=False)
    for _ in range(2):  # and not only the first time
        with pytest.raises(ValueError, match=r"another base model.*model\.layers\.0\.self_attn\.q_proj:"):
            logits(mistaken)


def test_a_whole_state_dict_loads_onto_meta() -> None:
    reference = adapted()
    model = meta_llama()
    model.load_state_dict(reference.state_dict(), assign=True)
    assert torch.equal(logits(model), logits(reference))


@pytest.mark.parametrize("how", ["cpu_offload", "dispatch", "disk"])
def test_accelerate_offload_after_attaching(tmp_path: Path, how: str) -> None:
    model = adapted()
    before, weights = logits(model), base_weights(model)
    if how == "cpu_offload":
        cpu_offload(model, execution_device=torch.device("cpu"))
    elif how == "disk":
        device_map = {"base_model.model.model": "disk", "base_model.model.lm_head": "cpu"}
        dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    else:
        dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    if how != "dispatch":
        assert all(delta.is_meta for delta in deltas(model).values())
    assert torch.equal(logits(model), before)
    if how == "disk":
        return
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    if how == "dispatch":
        assert_same(base_weights(model), weights)


# --------------------------------------------------------------------------------------------------------- portability


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def portable(model: PreTrainedModel) -> torch.Tensor:
    return logits(adapted(model, runtime_config=SVFRuntimeConfig(use_cache=False)))


def wide_llama() -> PreTrainedModel:
    return tiny_llama(hidden_size=96, intermediate_size=160, num_key_value_heads=4)


@pytest.mark.usefixtures("threads")
def test_an_adapter_means_the_same_for_any_number_of_threads() -> None:
    torch.set_num_threads(1)
    one = portable(wide_llama())
    torch.set_num_threads(2)
    torch.testing.assert_close(portable(wide_llama()), one, rtol=0, atol=1e-4)


@pytest.mark.parametrize("use_cache", [False, True])
def test_an_adapter_means_the_same_for_any_memory_layout(use_cache: bool) -> None:
    runtime = SVFRuntimeConfig(use_cache=use_cache)
    expected = logits(adapted(wide_llama(), runtime_config=runtime))
    permuted = wide_llama()
    for module in permuted.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()
            assert not module.weight.is_contiguous()
    torch.testing.assert_close(logits(adapted(permuted, runtime_config=runtime)), expected, rtol=0, atol=1e-4)


def test_an_adapter_means_the_same_with_an_fp64_svd() -> None:
    model = adapted(wide_llama())
    expected = logits(model)
    for layer in layers(model).values():
        U, _, Vt = torch.linalg.svd(layer.get_base_layer().weight.detach().double(), full_matrices=False)
        Q = U if layer.side == "output" else Vt.mT
        largest = Q.gather(0, Q.abs().argmax(0, keepdim=True))
        assert layer.basis is not None
        torch.testing.assert_close(layer.basis, (Q * largest.sign()).float(), rtol=0, atol=1e-5)
        layer.basis.data.copy_(Q * largest.sign())
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)


# -------------------------------------------------------------------------------------------------------- registration


def test_svf_is_a_member_of_peft_s_enum() -> None:
    member = PeftType("SVF")
    assert member is PeftType["SVF"] is PeftType.SVF is registration.add_peft_type("SVF")  # type: ignore[attr-defined]
    assert isinstance(member, PeftType)
    assert (member.value, member.name, str(member)) == ("SVF", "SVF", "PeftType.SVF")
    assert list(PeftType).count(member) == 1
    assert "SVF" in [m.value for m in PeftType]
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    assert PEFT_TYPE_TO_CONFIG_MAPPING["SVF"] is SVFConfig  # type: ignore[index]
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is SVFModel
    with pytest.raises(ValueError, match="NOT_A_METHOD"):
        PeftType("NOT_A_METHOD")
    with pytest.raises(KeyError):
        PeftType["NOT_A_METHOD"]
    with pytest.raises(AttributeError):
        PeftType.SVF = 3  # type: ignore[misc,assignment]


def test_registering_again_changes_nothing() -> None:
    before = list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    importlib.reload(registration)
    registration.register(SVFConfig, SVFModel)
    importlib.reload(peft_svf.tuner)
    importlib.reload(peft_svf)
    assert (list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING)) == before
    assert PEFT_TYPE_TO_CONFIG_MAPPING["SVF"] is peft_svf.SVFConfig  # type: ignore[index]


def test_a_pickled_config_is_equal() -> None:
    config = SVFConfig(r=3, target_modules=["a"], runtime_config=SVFRuntimeConfig(base_check="ignore"))
    assert pickle.loads(pickle.dumps(config)) == config


FOREIGN = """
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
class TheirConfig: pass
PEFT_TYPE_TO_CONFIG_MAPPING["SVF"] = TheirConfig
try:
    import peft_svf
except ImportError as error:
    print(error)
assert PEFT_TYPE_TO_CONFIG_MAPPING["SVF"] is TheirConfig
"""


def test_another_svf_in_peft_is_not_overwritten() -> None:
    run = subprocess.run(
        [sys.executable, "-c", FOREIGN], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert run.returncode == 0, run.stderr
    assert "already has a method called SVF (__main__.TheirConfig)" in run.stdout
    assert "or update peft-svf" in run.stdout


@pytest.mark.slow
def test_a_pickled_config_brings_the_package_along() -> None:
    data = pickle.dumps(SVFConfig(r=3, target_modules=["a"]))
    code = f"import pickle; config = pickle.loads({data!r}); print(config.r, config.peft_type.value)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["3", "SVF"], run.stderr


def test_saving_before_the_weights_came_keeps_the_fingerprint(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path / "with")
    fingerprints = json.loads((tmp_path / "with" / "adapter_config.json").read_text())["base_fingerprint"]
    waiting = meta_llama(base_fingerprint=fingerprints)
    from peft import get_peft_model_state_dict

    get_peft_model_state_dict(waiting)  # what comes before the config is written
    assert waiting.peft_config["default"].base_fingerprint == fingerprints
