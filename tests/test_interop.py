"""Experts in the formats of others, and back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from peft_svf import AdaptiveMixture, SVFConfig, SVFLayer
from peft_svf.interop import to_lora

IDS = torch.tensor([[4, 17, 5, 42, 8, 30, 11, 23], [7, 9, 33, 29, 40, 12, 4, 19]])


def base_model(**changes: Any) -> Any:
    return tiny_llama(vocab_size=50, initializer_range=0.2, **changes)


def expert(base: Any, scale: float = 0.3, seed: int = 0, **options: Any) -> Any:
    """With random δ, some of them 0."""
    config = SVFConfig(**{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})
    model = get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(model).values():
        delta = layer.svf_delta["default"].weight
        delta.data.copy_(scale * torch.randn(delta.shape, generator=generator))
    return model


def layers(model: Any) -> dict[str, SVFLayer]:
    return {name: module for name, module in model.base_model.model.named_modules() if isinstance(module, SVFLayer)}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


# ------------------------------------------------------------------------------------------ LoRA


@pytest.mark.parametrize("r", [None, 5])
def test_an_exported_expert_computes_the_same(r: int | None, tmp_path: Path) -> None:
    model = expert(base_model(), r=r)
    export = to_lora(model)
    assert export.rank == (5 if r else max(min(layer.shape) for layer in layers(model).values()))
    assert export.retained_overall == pytest.approx(1)
    export.save_pretrained(tmp_path)
    lora = PeftModel.from_pretrained(base_model(), tmp_path).eval()
    assert lora.peft_config["default"].peft_type == "LORA"
    assert (logits(lora) - logits(model)).abs().max() <= 1e-5 * logits(model).abs().max()
    again = to_lora(model, rank=10_000)
    assert {name: tensor.shape for name, tensor in again.state_dict.items()} == {
        name: tensor.shape for name, tensor in export.state_dict.items()
    }


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_a_lower_rank_is_the_best_there_is(rank: int) -> None:
    model = expert(base_model())
    export = to_lora(model, rank=rank)
    lost = whole = 0.0
    for name, layer in layers(model).items():
        change = layer.get_delta_weight("default").double()
        singular = torch.linalg.svdvals(change)
        A, B = (export.state_dict[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        assert len(A) == min(rank, len(singular))
        optimum = singular[rank:].square().sum().sqrt()
        error = (change - B @ A).norm()
        assert error == pytest.approx(float(optimum), abs=1e-6 * float(change.norm()))
        assert export.retained[name] == pytest.approx(float(1 - (optimum / change.norm()) ** 2), abs=1e-6)
        lost, whole = lost + float(optimum) ** 2, whole + float(change.norm()) ** 2
    assert export.retained_overall == pytest.approx(1 - lost / whole, abs=1e-6)


def test_ranks_by_energy_differ_between_modules_and_load(tmp_path: Path) -> None:
    model = expert(base_model())
    first = next(iter(layers(model).values()))
    first.svf_delta["default"].weight.data[2:] = 0
    export = to_lora(model, energy=0.8)
    assert set(export.config.rank_pattern) == set(export.config.alpha_pattern) != set()
    for name, share in export.retained.items():
        singular = torch.linalg.svdvals(layers(model)[name].get_delta_weight("default").double()).square()
        rank = len(export.state_dict[f"base_model.model.{name}.lora_A.weight"])
        assert share >= 0.8
        assert rank == 1 or singular[: rank - 1].sum() < 0.8 * singular.sum()
    export.save_pretrained(tmp_path)
    lora = PeftModel.from_pretrained(base_model(), tmp_path)
    for name, module in lora.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            assert module.scaling["default"] == 1
            assert module.r["default"] == len(export.state_dict[f"base_model.model.{name}.lora_A.weight"])
    about = json.loads((tmp_path / "export.json").read_text())
    assert about["retained_overall"] == export.retained_overall < 1


def test_an_expert_without_an_effect() -> None:
    export = to_lora(expert(base_model(), scale=0.0))
    assert export.rank == 1
    assert set(export.retained.values()) == {1.0}
    assert not any(tensor.isnan().any() for tensor in export.state_dict.values())
    assert to_lora(expert(base_model(), scale=0.0), energy=0.5).rank == 1


def test_conv1d_and_16_bit(tmp_path: Path) -> None:
    def gpt2() -> Any:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=32)).eval()

    model = expert(gpt2(), target_modules=["c_attn", "c_proj", "c_fc"])
    to_lora(model).save_pretrained(tmp_path)
    lora = PeftModel.from_pretrained(gpt2(), tmp_path).eval()
    assert torch.allclose(logits(lora), logits(model), atol=1e-4)
    coarse = to_lora(expert(base_model(dtype=torch.bfloat16)), dtype=torch.float16)
    assert {tensor.dtype for tensor in coarse.state_dict.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in coarse.state_dict.values())


def test_several_experts_and_mixtures(tmp_path: Path) -> None:
    folders = {}
    for seed, name in enumerate(("a", "b")):
        folders[name] = str(tmp_path / name)
        expert(base_model(), seed=seed).save_pretrained(folders[name])
    mixture = AdaptiveMixture.from_pretrained(base_model(), folders)
    mixture.set_weights({"a": 0.5, "b": 0.25})
    expected = logits(mixture.model)
    to_lora(mixture.model, mixture.adapter_name).save_pretrained(tmp_path / "lora")
    lora = PeftModel.from_pretrained(base_model(), tmp_path / "lora").eval()
    assert torch.allclose(logits(lora), expected, atol=1e-4)
    both = to_lora(mixture.model, ["a", "b"])
    mixture.model.base_model.set_adapter(["a", "b"])
    found = get_peft_model(base_model(), both.config).eval()
    assert set(both.state_dict) == {name.replace(".default", "") for name in found.state_dict() if "lora_" in name}
    assert set(to_lora(mixture.model).state_dict) == set(both.state_dict)


def test_loads_without_peft_svf(tmp_path: Path) -> None:
    model = expert(base_model())
    base_model().save_pretrained(tmp_path / "base")
    to_lora(model, rank=4).save_pretrained(tmp_path / "lora")
    code = (
        "import sys; from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
        f"base = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'base')!r})\n"
        f"PeftModel.from_pretrained(base, {str(tmp_path / 'lora')!r}); assert 'peft_svf' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "energy": 0.5}, "not both"),
        ({"rank": 0}, "at least 1, got 0"),
        ({"energy": 0.0}, "got 0.0"),
        ({"energy": 1.5}, "got 1.5"),
        ({"adapter_name": "nobody"}, "no adapter 'nobody'; there are default"),
        ({"adapter_name": []}, "Which expert"),
    ],
)
def test_what_cannot_be_exported(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_lora(expert(base_model()), **options)


def test_what_is_no_part_of_a_lora() -> None:
    with pytest.raises(ValueError, match="`bias`, which is no part of a LoRA"):
        to_lora(expert(base_model(), bias="svf_only"))
    lora = get_peft_model(base_model(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"is a .*LORA adapter"):
        to_lora(lora)


def test_a_merged_expert_is_exported_all_the_same() -> None:
    model = expert(base_model())
    before = to_lora(model, rank=3)
    model.merge_adapter()
    after = to_lora(model, rank=3)
    assert all(torch.equal(before.state_dict[name], after.state_dict[name]) for name in before.state_dict)
