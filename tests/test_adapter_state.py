"""The state of adapters: names, saving, base weights with several owners, partly merged layers, frozen experts."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import IDS, adapted, deltas, logits, randomise, svf_layers, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AlbertConfig, AlbertModel, PreTrainedModel

from peft_svf import AdaptiveMixture, SVFConfig, SVFRuntimeConfig

LINEAR = {"target_modules": "all-linear"}
AWKWARD = [
    "0",
    "1",
    "mlp",
    "layers",
    "weight",
    "bias",
    "model",
    "svf_delta",
    "self_attn",
    "lm_head",
    "default2",
    "base_layer",
]
FINE = ["ünï", "two words", "x" * 200, "default", "svf", "-", "q_proj"]
REFUSED = ["values", "train", "type", "keys", "items", "pop", "training", "forward", "_modules", "v1.0", "", "__base__"]
REFUSED += ["a/b", "../x", "/abs", "a\\b", "..", ".", "x" * 256, "ü" * 128, "a\nb", "a\0b"]


def tied_llama(seed: int = 0) -> PreTrainedModel:
    """A Llama with the same MLP weights in both layers."""
    model = tiny_llama(seed)
    first, second = (layer.mlp for layer in model.model.layers)
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(second, name).weight = getattr(first, name).weight
    return model


def with_adapters(names: list[str], model: nn.Module | None = None, **config: Any) -> PeftModel:
    """A model with random adapters of these names, the first one active."""
    config = {**LINEAR, **config}
    peft_model = get_peft_model(model or tiny_llama(), SVFConfig(**config), adapter_name=names[0])
    for name in names[1:]:
        peft_model.add_adapter(name, SVFConfig(**config))
    for seed, name in enumerate(names):
        randomise(peft_model, name, seed=seed)
    return peft_model.eval()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.get_base_layer().weight.detach().clone() for name, layer in svf_layers(model).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# --------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("names", [["0", "mlp", "weight"], ["layers", "default", "bias"], AWKWARD, FINE])
def test_every_adapter_is_saved_whole_whatever_the_others_are_called(names: list[str], tmp_path: Path) -> None:
    model = with_adapters(names)
    model.save_pretrained(tmp_path)
    loaded = None
    for name in names:
        folder = tmp_path if name == "default" else tmp_path / name
        assert len(load_file(folder / "adapter_model.safetensors")) == 14
        if loaded is None:
            loaded = PeftModel.from_pretrained(tiny_llama(), folder, adapter_name=name)
        else:
            loaded.load_adapter(folder, name)
    for name in names:
        assert_same(deltas(loaded, name), deltas(model, name))
        model.set_adapter(name)
        loaded.set_adapter(name)
        torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


def test_modules_to_save_and_bias_are_saved_whole(tmp_path: Path) -> None:
    model = tiny_llama(attention_bias=True)
    one = get_peft_model(model, SVFConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], bias="all"), "weight")
    for name in ("0", "original_module", "lm_head", "bias", "self_attn"):
        one.add_adapter(name, SVFConfig(target_modules=["v_proj"]))
    with torch.no_grad():
        for name, parameter in one.named_parameters():
            if parameter.requires_grad or name.endswith(".bias"):
                parameter.normal_()
    one.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(attention_bias=True), tmp_path / "weight")
    torch.testing.assert_close(logits(loaded), logits(one.eval()), rtol=0, atol=1e-5)
    several = PeftModel.from_pretrained(tiny_llama(attention_bias=True), tmp_path / "0", adapter_name="0")
    several.load_adapter(tmp_path / "weight", "layers")
    several.set_adapter("layers")
    torch.testing.assert_close(logits(several), logits(one), rtol=0, atol=1e-5)


def test_transformers_saves_and_loads_awkward_names(tmp_path: Path) -> None:
    model = tiny_llama()
    for seed, name in enumerate(("weight", "mlp", "0")):
        model.add_adapter(SVFConfig(**LINEAR), name)
        randomise(model, name, seed=seed)
    for name in ("0", "mlp", "weight"):
        model.set_adapter(name)
        model.save_pretrained(tmp_path / name)
        other = tiny_llama()
        other.load_adapter(tmp_path / name, "layers")
        torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=0)


def test_a_mixture_is_saved_whole(tmp_path: Path) -> None:
    names = ["0", "mlp", "ünï"]
    with_adapters(names).save_pretrained(tmp_path)
    mixture = AdaptiveMixture.from_pretrained(tiny_llama(), {n: tmp_path / n for n in names}, adapter_name="weight")
    mixture.set_weights([0.5, 0.3, 0.2])
    mixture.save_pretrained(tmp_path / "mixture")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "mixture")
    torch.testing.assert_close(logits(loaded), logits(mixture.model), rtol=0, atol=0)


def test_a_foreign_state_dict_with_lost_keys_is_refused() -> None:
    model = with_adapters(["default", "mlp"])
    foreign = {key: value.clone() for key, value in model.state_dict().items()}  # as gathered from shards
    with pytest.raises(ValueError, match="'mlp' is called like a module"):
        get_peft_model_state_dict(model, state_dict=foreign, adapter_name="default")
    own = get_peft_model_state_dict(model, state_dict=model.state_dict(), adapter_name="default")
    assert len(own) == 14


def test_an_adapter_called_like_a_module_leaves_the_others_frozen(tmp_path: Path) -> None:
    with_adapters(["default"]).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    for name in ("0", "mlp"):
        model.add_adapter(name, SVFConfig(**LINEAR))
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", REFUSED)
def test_names_that_cannot_work_are_refused_at_every_door(name: str, tmp_path: Path) -> None:
    base = tiny_llama()
    before, keys = logits(base), list(base.state_dict())
    with pytest.raises(ValueError, match="adapter name") as error:
        get_peft_model(base, SVFConfig(**LINEAR), adapter_name=name)
    assert repr(name) in str(error.value)
    if name:
        with pytest.raises(ValueError, match="adapter name"):
            base.add_adapter(SVFConfig(**LINEAR), name)
    assert list(base.state_dict()) == keys
    assert not base._hf_peft_config_loaded
    assert torch.equal(logits(base), before)

    model = adapted(base)
    model.save_pretrained(tmp_path)
    keys, before = list(model.state_dict()), logits(model)
    for refused in (
        lambda: model.add_adapter(name, SVFConfig(**LINEAR)),
        lambda: model.load_adapter(tmp_path, name),
        lambda: model.base_model.add_weighted_adapter(["default"], [1.0], name),
        lambda: AdaptiveMixture(model, ["default"], adapter_name=name),
        lambda: AdaptiveMixture.from_pretrained(tiny_llama(), {name: tmp_path, "other": tmp_path}),
    ):
        with pytest.raises(ValueError, match="adapter name"):
            refused()
    assert list(model.peft_config) == ["default"]
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model), before)


# ------------------------------------------------------------------------------------------------------- shared weights


def test_layers_with_one_weight_are_merged_and_restored_once() -> None:
    model = randomise(get_peft_model(tied_llama(), SVFConfig(**LINEAR)))
    first, second = (layer.mlp.up_proj for layer in model.base_model.model.model.layers)
    assert first.svf_delta["default"] is second.svf_delta["default"]
    assert first.basis is second.basis
    before, expected = weights(model), logits(model)
    for merge in (model.merge_adapter, lambda: [second.merge(), model.merge_adapter()]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merge()
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
        assert first.merged
        assert second.merged
        model.unmerge_adapter()
        assert_same(weights(model), before)
        assert not first.merged
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    assert merged.model.layers[0].mlp.up_proj.weight is merged.model.layers[1].mlp.up_proj.weight


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_shared_layers_share_too(copied: Any) -> None:
    model = copied(randomise(get_peft_model(tied_llama(), SVFConfig(**LINEAR))))
    expected, before = logits(model), weights(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert_same(weights(model), before)


def test_shared_layers_are_saved_deleted_cast_and_mixed_together(tmp_path: Path) -> None:
    model = with_adapters(["0", "mlp"], tied_llama())
    model.base_model.add_weighted_adapter(["0", "mlp"], [0.5, 0.5], "mix")
    model.set_adapter("mix")
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "mix" / "adapter_model.safetensors")) == 14
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(tied_llama(), tmp_path / "mix", low_cpu_mem_usage=low_cpu_mem_usage)
        torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)
        first, second = (layer.mlp.up_proj for layer in loaded.base_model.model.model.layers)
        assert first.svf_delta["default"].weight is second.svf_delta["default"].weight
    by_transformers = tied_llama()
    by_transformers.load_adapter(tmp_path / "mix")
    torch.testing.assert_close(logits(by_transformers), logits(model), rtol=0, atol=1e-6)
    by_transformers.save_pretrained(tmp_path / "again")
    assert len(load_file(tmp_path / "again" / "adapter_model.safetensors")) == 14

    model.delete_adapter("mlp")
    model.to(torch.float64)
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-9)


def test_a_file_with_different_values_for_one_weight_is_refused(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)  # for separate weights
    policy = SVFRuntimeConfig(base_check="ignore")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp.*layers\.1\.mlp.*one\s+weight"):
        PeftModel.from_pretrained(tied_llama(), tmp_path, config=_config(tmp_path, policy))


def _config(folder: Path, policy: SVFRuntimeConfig) -> SVFConfig:
    config = SVFConfig.from_pretrained(folder)
    config.runtime_config = policy
    return config


def test_shared_layers_cannot_have_different_mixture_weights() -> None:
    model = with_adapters(["a", "b"], tied_llama())
    with (
        pytest.raises(ValueError, match="share one weight"),
        model.base_model.row_mixture(torch.rand(2, 2, 2), ["a", "b"], "layer"),
    ):
        pass
    mixture = AdaptiveMixture(model, ["a", "b"])
    names = [layer.module_name for layer in svf_layers(model).values()]
    with pytest.raises(ValueError, match="share one weight"):
        mixture.set_weights(torch.rand(2, len(names)).numpy(), {name: i for i, name in enumerate(names)})


def _tied_embedding() -> nn.Module:
    return tiny_llama(tie_word_embeddings=True)


def _transposed() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 6, bias=False), nn.Linear(6, 8, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.detach().T)
    return model


def _half_overlapping() -> nn.Module:
    model, memory = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(12, 8)
    model[0].weight, model[1].weight = nn.Parameter(memory[:8]), nn.Parameter(memory[4:])
    return model


def _module_at_two_places() -> nn.Module:
    one = nn.Linear(8, 8)
    return nn.ModuleDict({"first": nn.Sequential(one), "second": nn.Sequential(one)})


@pytest.mark.parametrize(
    ("make", "targets", "names"),
    [
        (_tied_embedding, ["lm_head"], ["lm_head", "model.embed_tokens"]),
        (tied_llama, r".*layers\.0\.mlp\.up_proj", ["layers.0.mlp.up_proj", "layers.1.mlp.up_proj"]),
        (_transposed, ["0", "1"], ["0", "1.base_layer"]),
        (_half_overlapping, ["0", "1"], ["0", "1.base_layer"]),
        (_module_at_two_places, r"first\.0", ["first.0", "second.0"]),
    ],
)
def test_a_weight_that_another_module_uses_is_not_merged(make: Any, targets: Any, names: list[str]) -> None:
    model = randomise(get_peft_model(make(), SVFConfig(target_modules=targets)))
    before = weights(model)
    for merge in (model.merge_adapter, model.merge_and_unload, lambda: next(iter(svf_layers(model).values())).merge()):
        with pytest.raises(ValueError, match="shares its weight") as error:
            merge()
        assert all(name in str(error.value) for name in names), str(error.value)
        assert_same(weights(model), before)


def test_parts_of_one_memory_that_do_not_overlap_are_merged() -> None:
    model, memory = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 6)), torch.randn(6, 14)
    model[0].weight, model[1].weight = nn.Parameter(memory[:, :8]), nn.Parameter(memory[:, 8:])
    model = randomise(get_peft_model(model, SVFConfig(target_modules=["0", "1"]))).eval()
    x, before = torch.randn(3, 8), weights(model)
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    assert_same(weights(model), before)


@pytest.mark.parametrize("cast_first", [True, False])
def test_views_of_one_weight_may_be_separated_by_a_cast(cast_first: bool) -> None:
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = nn.Parameter(first.weight.detach())  # another parameter, the same memory
    model = randomise(get_peft_model(nn.Sequential(first, second), SVFConfig(target_modules=["0", "1"]))).eval()
    x = torch.randn(3, 6)
    expected, before = model(x).double(), weights(model)
    for change in (model.double, model.merge_adapter) if cast_first else (model.merge_adapter, model.double):
        change()
    torch.testing.assert_close(model(x.double()), expected, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert_same(weights(model), {name: weight.double() for name, weight in before.items()})


def test_weights_that_were_separated_are_merged_separately() -> None:
    model = get_peft_model(tied_llama(), SVFConfig(**LINEAR)).eval()
    layer = model.base_model.model.model.layers[1].mlp.up_proj.get_base_layer()
    layer.weight = nn.Parameter(layer.weight.detach() * 2)
    before = weights(model)
    model.merge_adapter()  # δ = 0
    assert_same(weights(model), before)
    model.unmerge_adapter()
    assert_same(weights(model), before)


def test_a_block_that_is_used_twice_is_merged_once() -> None:
    torch.manual_seed(0)
    config = AlbertConfig(vocab_size=64, embedding_size=8, hidden_size=16, intermediate_size=24, num_attention_heads=2)
    config.num_hidden_layers = 3
    model = randomise(get_peft_model(AlbertModel(config).eval(), SVFConfig(**LINEAR)))
    before = weights(model)
    with torch.no_grad():
        expected = model(input_ids=IDS).last_hidden_state
        model.merge_adapter()
        torch.testing.assert_close(model(input_ids=IDS).last_hidden_state, expected, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert_same(weights(model), before)


# --------------------------------------------------------------------------------------------------------- other tuners


def _svf_on_lora() -> PeftModel:
    return get_peft_model(get_peft_model(tiny_llama(), _lora(), "low"), SVFConfig(**LINEAR), "top")


def _lora_on_svf() -> PeftModel:
    return get_peft_model(get_peft_model(tiny_llama(), SVFConfig(**LINEAR), "top"), _lora(), "low")


def _lora() -> LoraConfig:
    return LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)


@pytest.mark.parametrize("make", [_svf_on_lora, _lora_on_svf])
def test_merging_with_lora_on_the_same_weight_is_refused_with_both_names(make: Any) -> None:
    model = randomise(make(), "top")
    inner = model.base_model.model
    svf = model if make is _svf_on_lora else inner
    before, expected = weights(model), logits(model)
    with pytest.raises(ValueError, match=r"'top'.*'low'"):
        svf.base_model.merge_adapter()
    assert_same(weights(model), before)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
    if make is _lora_on_svf:
        with pytest.raises(ValueError, match=r"'top'.*'low'"):
            model.merge_adapter()  # LoRA's, which calls the layers of SVF


def test_after_a_refused_merge_of_lora_on_top_no_folded_weight_is_out_of_date() -> None:
    inner = get_peft_model(tiny_llama(), SVFConfig(**LINEAR, runtime_config=SVFRuntimeConfig(fold="always")), "top")
    model = randomise(get_peft_model(inner, _lora(), "low"), "top")
    expected = logits(model)
    with pytest.raises(ValueError, match=r"'top'.*'low'"):
        model.merge_adapter()
    merged = logits(model)
    for layer in svf_layers(model).values():
        layer.fold.release()
    torch.testing.assert_close(merged, logits(model), rtol=0, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


def test_unmerging_an_svf_adapter_leaves_a_disabled_lora_alone() -> None:
    lora = get_peft_model(tiny_llama(), _lora(), "low")
    model = randomise(get_peft_model(lora, SVFConfig(**LINEAR), "top"), "top")
    lora.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.enable_adapters(False)
    before, expected = weights(model), logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert_same(weights(model), before)


def test_a_saved_expert_is_refused_by_a_base_with_another_adapter(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    base = get_peft_model(tiny_llama(), _lora(), "low")
    before, keys = logits(base), list(base.state_dict())
    with pytest.raises(ValueError, match="'low' is active or merged"):
        PeftModel.from_pretrained(base, tmp_path)
    assert list(base.state_dict()) == keys
    assert torch.equal(logits(base), before)
    with pytest.raises(ValueError, match="adapters already"):
        AdaptiveMixture.from_pretrained(base, {"a": tmp_path})
    with pytest.warns(UserWarning, match="'low' is active"):
        get_peft_model(base.get_base_model(), _config(tmp_path, SVFRuntimeConfig(base_check="warn")))


# --------------------------------------------------------------------------------------------------------- while merged


@pytest.mark.parametrize("earlier", [[], ["b"]])
def test_a_merge_that_fails_half_way_is_undone(earlier: list[str]) -> None:
    model = get_peft_model(tiny_llama(), SVFConfig(**LINEAR), "a")
    model.add_adapter("b", SVFConfig(**LINEAR))
    randomise(randomise(model, "a"), "b", seed=1)
    if earlier:
        model.merge_adapter(earlier)
    before = weights(model)
    broken = list(svf_layers(model).values())[5]
    broken.delta_weights(["a"])[0].data[0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(["a"], safe_merge=True)
    assert_same(weights(model), before)
    assert all(layer.merged_adapters == earlier for layer in svf_layers(model).values())


def test_a_safe_merge_that_fails_unloads_nothing() -> None:
    model = randomise(get_peft_model(tiny_llama(), SVFConfig(**LINEAR)))
    before, layers = weights(model), list(svf_layers(model))
    list(svf_layers(model).values())[5].delta_weights(["default"])[0].data[0] = float("inf")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)
    assert_same(weights(model), before)
    assert list(svf_layers(model)) == layers


def test_a_safe_merge_that_unloads_is_silent(recwarn: pytest.WarningsRecorder) -> None:
    model = randomise(get_peft_model(tiny_llama(), SVFConfig(**LINEAR)))
    expected = logits(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert torch.allclose(logits(merged), expected, atol=1e-5)
    assert not svf_layers(merged)
    assert not [warning for warning in recwarn if "merged" in str(warning.message)]


def _write(model: PeftModel) -> None:
    next(iter(svf_layers(model).values())).get_base_layer().weight.data[0, 0] += 1


def _load_base(model: PeftModel) -> None:
    state = {key: value + 1 for key, value in model.state_dict().items() if key.endswith("base_layer.weight")}
    model.load_state_dict(state, strict=False)


def _optimize(model: PeftModel) -> None:
    weight = next(iter(svf_layers(model).values())).get_base_layer().weight
    weight.requires_grad_(True).grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()


@pytest.mark.parametrize("change", [_write, _load_base, _optimize])
def test_unmerge_notices_that_the_weight_was_changed(change: Any) -> None:
    model = adapted()
    model.merge_adapter()
    change(model)
    with pytest.raises(ValueError, match="was changed while default was merged"):
        model.unmerge_adapter()
    with pytest.raises(ValueError, match="was changed while default was merged"):
        model.set_adapter("default")


@pytest.mark.parametrize("names", [["a"], ["b"]])
@pytest.mark.parametrize("active", [["a"], ["a", "b"], ["b", "a"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_some_adapters_keeps_the_effect_of_the_active_ones(
    names: list[str], active: list[str], dtype: torch.dtype
) -> None:
    model = with_adapters(["a", "b"], tiny_llama(dtype=dtype, attention_bias=True), r=9)
    for name in ("a", "b"):
        next(iter(deltas(model, name).values())).data[0] = -1  # 1 + δ = 0
    model.base_model.set_adapter(list(dict.fromkeys([*active, *names])))
    expected, before = logits(model), weights(model)
    model.base_model.set_adapter(active)
    model.merge_adapter(adapter_names=names)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(tiny_llama(dtype=dtype, attention_bias=True)), rtol=0, atol=0)
    assert_same(weights(model), before)


@pytest.mark.parametrize("convert", [lambda m: m.to(torch.float64), lambda m: m.bfloat16(), lambda m: m.half().float()])
def test_casting_while_merged_is_casting_the_base(convert: Any) -> None:
    model = adapted()
    plain = convert(adapted())
    model.merge_adapter()
    convert(model)
    model.unmerge_adapter()
    assert_same(weights(model), weights(plain))
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=0)


def test_saving_while_merged_saves_the_original_output_layer(tmp_path: Path) -> None:
    model = adapted(target_modules=["lm_head", "q_proj"])
    expected, original = logits(model), model.base_model.model.lm_head.get_base_layer().weight.detach().clone()
    model.merge_adapter()
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.lm_head.base_layer.weight"], original)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-6)


def test_a_merged_adapter_is_neither_deleted_nor_overwritten(tmp_path: Path) -> None:
    model = with_adapters(["default", "other"])
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    before, expected = weights(model), logits(model)
    for refused in (
        lambda: model.delete_adapter("default"),
        lambda: model.load_adapter(tmp_path / "other", "default"),
        lambda: set_peft_model_state_dict(model, load_file(tmp_path / "adapter_model.safetensors")),
        lambda: next(iter(svf_layers(model).values())).delete_adapter("default"),
    ):
        with pytest.raises(ValueError, match="merged"):
            refused()
    assert_same(weights(model), before)
    model.delete_adapter("other")
    model.add_adapter("third", SVFConfig(target_modules=["q_proj", "lm_head"]))  # unmerges, as PEFT's set_adapter
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert_same({n: w for n, w in weights(model).items() if n != "lm_head"}, weights(adapted()))


# ------------------------------------------------------------------------------------------------------ frozen experts


def _trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("trainable", [False, True])
def test_disable_adapter_leaves_frozen_experts_frozen(trainable: bool, tmp_path: Path) -> None:
    adapted(target_modules=["q_proj"], modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=trainable)
    before = _trainable(model)
    assert bool(before) == trainable
    with model.disable_adapter():
        assert not _trainable(model)
        with model.disable_adapter():
            pass
        assert not _trainable(model)
    assert _trainable(model) == before
    model.base_model.enable_adapter_layers()
    assert _trainable(model) == before


def test_what_is_chosen_while_disabled_holds(tmp_path: Path) -> None:
    model = with_adapters(["a", "b"])
    with model.disable_adapter():
        model.add_adapter("c", SVFConfig(**LINEAR))
        model.set_adapter("b")
    assert _trainable(model) == [name for name, _ in model.named_parameters() if ".svf_delta.b." in name]
    with model.disable_adapter():
        model.add_adapter("d", SVFConfig(**LINEAR))
    assert _trainable(model) == [name for name, _ in model.named_parameters() if ".svf_delta.b." in name]


def test_deleting_an_adapter_leaves_the_next_one_frozen(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    model.load_adapter(tmp_path, "other")
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert not _trainable(model)


def test_all_layers_agree_on_the_adapter_that_is_active_after_a_deletion() -> None:
    config = {"modules_to_save": ["lm_head"]}
    model = get_peft_model(tiny_llama(), SVFConfig(target_modules=["q_proj", "v_proj"], **config), adapter_name="a")
    model.add_adapter("b", SVFConfig(target_modules=["v_proj"], **config))
    model.add_adapter("c", SVFConfig(target_modules=["q_proj"]))
    model.delete_adapter("a")
    assert model.active_adapters == ["b"]
    assert all(layer.active_adapters == ["b"] for layer in svf_layers(model).values())
    assert model.base_model.model.lm_head.active_adapters == ["b"]
    model.delete_adapter("b")
    model.delete_adapter("c")
    assert not model.active_adapters


def test_transformers_leaves_frozen_experts_frozen(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    model = tiny_llama()
    model.load_adapter(tmp_path)
    model.disable_adapters()
    model.enable_adapters()
    assert not [name for name in _trainable(model) if "svf_delta" in name]


def test_a_partial_file_of_shared_layers_names_the_missing_key(tmp_path: Path) -> None:
    model = randomise(get_peft_model(tied_llama(), SVFConfig(**LINEAR)))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    state.pop(next(key for key in state if "layers.1.mlp" in key))
    save_file(state, file)
    with pytest.raises((KeyError, ValueError), match=r"layers\.1\.mlp"):
        PeftModel.from_pretrained(tied_llama(), tmp_path)
