"""Adapters with the module names of older transformers versions, and adapters of models with added tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import IDS, deltas, randomise, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_bad_input import anatomy
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from peft_svf import AdaptiveMixture, SVFConfig, SVFRuntimeConfig, from_weights, merge_to_folder
from peft_svf.interop import decompose
from peft_svf.interop.inspect import check_spectrum
from peft_svf.tuner.renames import current_names

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEXT: dict[str, Any] = {**SIZES, "vocab_size": 64, "num_key_value_heads": 2}
TOKENS = torch.arange(6, 12).view(1, 6)


def llava(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(**SIZES, image_size=16, patch_size=8, projection_dim=32)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=5)
    return LlavaForConditionalGeneration(config).eval()


def qwen(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    text = {**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 4, "hidden_size": 32, "patch_size": 8}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=5, video_token_id=2)
    return Qwen2VLForConditionalGeneration(config).eval()


def before_4_52(name: str) -> str:
    """The names of LLaVA."""
    return name.replace("model.language_model.", "language_model.model.").replace("model.vision_tower", "vision_tower")


def before_4_52_of_qwen(name: str) -> str:
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


MODELS = {"llava": (llava, before_4_52), "qwen": (qwen, before_4_52_of_qwen)}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(TOKENS).logits
    return found


def made_older(folder: Path, old: Callable[[str], str]) -> None:
    """Rename the modules in an adapter's file and in its config."""
    prefix, file, path = "base_model.model.", folder / "adapter_model.safetensors", folder / "adapter_config.json"
    state = {prefix + old(key.removeprefix(prefix)): value.clone() for key, value in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    config = json.loads(path.read_text())
    if "base_fingerprint" in config:
        config["base_fingerprint"] = {old(name): numbers for name, numbers in config["base_fingerprint"].items()}
    if isinstance(config["target_modules"], list):
        config["target_modules"] = [old(name) for name in config["target_modules"]]
    path.write_text(json.dumps(config))


def by_transformers(model: Any, folder: Path) -> Any:
    model.load_adapter(str(folder))
    return model


def saved_again(model: Any, folder: Path) -> Any:
    PeftModel.from_pretrained(model, folder).save_pretrained(folder / "again")
    state = load_file(folder / "again" / "adapter_model.safetensors")
    names = json.loads((folder / "again" / "adapter_config.json").read_text())["base_fingerprint"]
    assert {f"base_model.model.{name}.svf_delta.weight" for name in names} == {*state}
    assert not current_names(model, names)
    return PeftModel.from_pretrained(model, folder / "again")


DOORS: dict[str, Callable[[Any, Path], Any]] = {
    "PeftModel": PeftModel.from_pretrained,
    "without base check": lambda model, folder: PeftModel.from_pretrained(
        model, folder, config=SVFConfig.from_pretrained(folder, runtime_config=SVFRuntimeConfig(base_check="ignore"))
    ),
    "transformers": by_transformers,
    "mixture": lambda model, folder: AdaptiveMixture.from_pretrained(model, {"only": folder}).model,
    "saved again": saved_again,
}


@pytest.mark.parametrize("targets", ["suffixes", "regex", "regex of old names", "whole names"])
@pytest.mark.parametrize("kind", MODELS)
def test_an_older_adapter(kind: str, targets: str, tmp_path: Path) -> None:
    make, old = MODELS[kind]
    whole = [name for name, _ in make().named_modules() if name.endswith(("q_proj", "qkv", "down_proj"))]
    regex = r".*\.(qkv|q_proj|down_proj)"
    chosen: Any = {"suffixes": ["q_proj", "qkv"], "whole names": whole}.get(targets, regex)
    model = randomise(get_peft_model(make(), SVFConfig(target_modules=chosen)))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    made_older(tmp_path, old)
    if targets == "regex of old names":
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        older = "|".join(old(name).replace(".", r"\.") for name in whole)
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": older}))
    for way, load in DOORS.items():
        found = load(make(), tmp_path)
        torch.testing.assert_close(logits(found), expected, rtol=0, atol=1e-6, msg=way)
    wanted = deltas(model)
    assert all(torch.equal(delta, wanted[name]) for name, delta in deltas(found).items())


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_the_files_of_a_model_may_have_older_names(kind: str, older: bool, tmp_path: Path) -> None:
    """As those that transformers saves."""
    make, old = MODELS[kind]
    model = randomise(get_peft_model(make(), SVFConfig(target_modules=["q_proj", "qkv"])))
    expected, base, expert = logits(model), tmp_path / "base", tmp_path / "expert"
    make().save_pretrained(base)
    model.save_pretrained(expert)
    if older:
        made_older(expert, old)
    merge_to_folder(expert, tmp_path / "merged", base)
    merged = make().__class__.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    assert check_spectrum(expert, base) == {}
    _, explained = from_weights(tmp_path / "merged", make(), SVFConfig(target_modules=["q_proj", "qkv"]))
    assert explained.overall == pytest.approx(1, abs=1e-5)
    assert len(decompose(base, tmp_path / "pack", target_modules=["q_proj"]).modules) >= 2


@pytest.mark.parametrize("kind", MODELS)
def test_an_older_adapter_of_another_base(kind: str, tmp_path: Path) -> None:
    make, old = MODELS[kind]
    randomise(get_peft_model(make(), SVFConfig(target_modules=["q_proj"]))).save_pretrained(tmp_path)
    made_older(tmp_path, old)
    other = make(1)
    before = anatomy(other)
    for way in ("PeftModel", "transformers", "mixture"):
        with pytest.raises(ValueError, match=r"(2 of 2|4 of 4) weights differ, the first is model\..*q_proj: σ"):
            DOORS[way](other, tmp_path)
        assert anatomy(other) == before


def test_an_older_adapter_that_is_incomplete(tmp_path: Path) -> None:
    randomise(get_peft_model(llava(), SVFConfig(target_modules=["q_proj", "qkv"]))).save_pretrained(tmp_path)
    made_older(tmp_path, before_4_52)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    save_file({key: value.clone() for key, value in state.items() if "layers.1" not in key}, file)
    for way, load in DOORS.items():
        model = llava()
        before = anatomy(model)
        with pytest.raises(ValueError, match=r"has no values for .* adapted modules, .*layers\.1\.self_attn\.q_proj"):
            load(model, tmp_path)
        assert anatomy(model) == before, way


def test_old_and_new_names_of_one_module_are_refused(tmp_path: Path) -> None:
    randomise(get_peft_model(llava(), SVFConfig(target_modules=["q_proj"]))).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = {key: value.clone() for key, value in load_file(file).items()}
    twice = {
        **state,
        **{
            key.replace("model.language_model.", "language_model.model."): value.clone() for key, value in state.items()
        },
    }
    save_file(twice, file)
    model = llava()
    with pytest.raises(ValueError, match=r"The adapter has .* and .*, and both are model\.language_model\."):
        PeftModel.from_pretrained(model, tmp_path)
    assert not hasattr(model, "peft_config")


def test_current_names() -> None:
    names = [
        "language_model.model.layers.0.self_attn.q_proj",
        "model.language_model.norm",
        "q_proj",
        "nonsense.layers.0",
    ]
    assert current_names(llava(), names) == {names[0]: "model.language_model.layers.0.self_attn.q_proj"}
    assert current_names(torch.nn.Sequential(torch.nn.Linear(2, 2)), ["1"]) == {}


def test_the_model_without_its_head(tmp_path: Path) -> None:
    model = randomise(get_peft_model(tiny_llama(), SVFConfig(target_modules=["q_proj"])))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.get_base_model().model(IDS).last_hidden_state
    for load in (PeftModel.from_pretrained, by_transformers):
        headless = tiny_llama().model
        assert isinstance(headless, LlamaModel)
        with torch.no_grad():
            torch.testing.assert_close(load(headless, tmp_path).eval()(IDS).last_hidden_state, expected)


# -------------------------------------------------------------------------------------------------------- added tokens


NEW = torch.tensor([[64, 4, 66, 65, 17, 5]])
CHANGES: dict[str, dict[str, Any]] = {
    "adapted output layer": {"target_modules": ["q_proj", "lm_head"]},
    "trained output layer": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "trained embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "both trained": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "neither": {"target_modules": ["q_proj"]},
}


def with_tokens(folder: Path, seed: int | None) -> Any:
    """A base model with three more tokens, whose embeddings depend on the seed."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if seed is not None:
        torch.manual_seed(seed)
        model.resize_token_embeddings(67, mean_resizing=False)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_added_tokens(change: str, tied: bool, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_llama(tie_word_embeddings=tied, initializer_range=0.2).save_pretrained(base)
    model: Any = get_peft_model(with_tokens(base, 0), SVFConfig(task_type="CAUSAL_LM", **CHANGES[change]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(adapter)
    with torch.no_grad():
        expected = model.eval()(NEW).logits
        for load in (PeftModel.from_pretrained, by_transformers):
            found = load(with_tokens(base, 1), adapter).eval()(NEW).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for load in (PeftModel.from_pretrained, by_transformers):
        small = with_tokens(base, None)
        before = anatomy(small)
        with pytest.raises(ValueError, match=r"resize_token_embeddings\(67\)"):
            load(small, adapter)
        assert anatomy(small) == before


@pytest.mark.parametrize("load", [PeftModel.from_pretrained, by_transformers])
def test_an_adapted_output_layer_does_not_replace_that_of_another_base(load: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), SVFConfig(task_type="CAUSAL_LM", target_modules=["lm_head"]))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    other = tiny_llama(seed=1)
    weight = other.lm_head.weight.detach().clone()
    with pytest.raises(ValueError, match="another base model: 1 of 1 weights differ"):
        load(other, tmp_path)
    assert torch.equal(other.lm_head.weight, weight)


def test_added_tokens_of_adapters_beside_one_on_the_output_layer(tmp_path: Path) -> None:
    """The key of the output layer's weight depends on the other adapters of the model."""
    tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path / "base")

    def base() -> Any:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(70)
        return model

    torch.manual_seed(0)
    model = get_peft_model(base(), SVFConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"), "a")
    model.add_adapter("b", SVFConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    randomise(model, "a", seed=1)
    randomise(model, "b", seed=2)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert "base_model.model.model.embed_tokens.weight" in saved  # at the first save
    for name, others in (("a", []), ("b", []), ("a", ["b"]), ("b", ["a"])):
        model.set_adapter(name)
        loaded = PeftModel.from_pretrained(base(), tmp_path / (others or [name])[0], "x")
        if others:
            loaded.load_adapter(tmp_path / name, "y")
            loaded.set_adapter("y")
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("kind", ["llava", "qwen"])
def test_the_changes_of_a_lora_with_older_names(kind: str, tmp_path: Path) -> None:
    make, old = MODELS[kind]
    config = LoraConfig(r=2, target_modules=["q_proj", "qkv"], init_lora_weights=False)
    model = get_peft_model(make(), config)
    model.save_pretrained(tmp_path / "new")
    model.save_pretrained(tmp_path / "old")
    made_older(tmp_path / "old", old)
    wanted = SVFConfig(target_modules=["q_proj", "qkv"])
    (new, of_new), (moved, of_old) = (from_weights(tmp_path / name, make(), wanted) for name in ("new", "old"))
    assert 0 < of_new.overall == of_old.overall
    for name, delta in deltas(new).items():
        assert torch.equal(delta, deltas(moved)[name])

    path = tmp_path / "old" / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"alpha_pattern": {"q_proj": 3}}))
    with pytest.raises(ValueError, match="older transformers version, and alpha_pattern for some of them"):
        from_weights(tmp_path / "old", make(), wanted)
