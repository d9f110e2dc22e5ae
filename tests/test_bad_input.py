"""Bad input: each is an error, or a warning, that names the culprit, and leaves the model as it was."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import logits, randomise, tiny_llama
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_svf import SVFConfig, SVFLayer, SVFRuntimeConfig

WEIGHTS = "adapter_model.safetensors"
ALL_LINEAR = {"target_modules": "all-linear"}


def anatomy(model: nn.Module) -> dict[str, Any]:
    """What a failed attempt must leave as it was: modules, parameters, what is trained, training mode, PEFT's notes."""
    return {
        "modules": [(name, type(module), module.training) for name, module in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters()],
        "peft_config": {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()},
    }


def adapted(seed: int = 0, **config: Any) -> PeftModel:
    return randomise(get_peft_model(tiny_llama(seed), SVFConfig(**{**ALL_LINEAR, **config})))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An adapter for `tiny_llama()`."""
    adapted().save_pretrained(tmp_path)
    return tmp_path


# --------------------------------------------------------------------------------------------------------- the targets


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.emb = nn.Embedding(6, 6)
        self.conv = nn.Conv2d(3, 3, 3)
        self.norm = nn.LayerNorm(6)
        self.bilinear = nn.Bilinear(2, 2, 2)
        self.attention = nn.MultiheadAttention(6, 2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["no_such_proj"]}, "no_such_proj"),
        ({"target_modules": r".*nope"}, "nope"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": ["lin"], "exclude_modules": ["lin"]}, "exclude_modules"),
        ({}, "target_modules"),  # no default for an unknown architecture
    ],
)
def test_no_target_matches(config: dict[str, Any], message: str) -> None:
    model = Zoo()
    before = anatomy(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, SVFConfig(**config))
    assert anatomy(model) == before


def test_no_layer_matches() -> None:
    model = tiny_llama()
    before = anatomy(model)
    with pytest.raises(ValueError, match=r"q_proj.*'layers_to_transform': \[7\]"):
        get_peft_model(model, SVFConfig(target_modules=["q_proj"], layers_to_transform=[7]))
    assert anatomy(model) == before


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("emb", "Embedding"),
        ("conv", "Conv2d"),
        ("norm", "LayerNorm"),
        ("bilinear", "Bilinear"),
        ("attention", "MultiheadAttention"),
    ],
)
def test_a_target_of_another_kind(target: str, kind: str) -> None:
    model = Zoo()
    before = anatomy(model)
    with pytest.raises(TypeError, match=rf"{target} is a {kind}.*torch\.nn\.Linear.*Conv1D"):
        get_peft_model(model, SVFConfig(target_modules=["lin", target]))
    assert anatomy(model) == before
    get_peft_model(model, SVFConfig(target_modules=["lin"]))


def test_an_integer_weight() -> None:
    model = Zoo()
    model.lin.weight = nn.Parameter(torch.ones(6, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"lin: expected a floating point matrix, found .*int8"):
        get_peft_model(model, SVFConfig(target_modules=["lin"]))
    assert type(model.lin) is nn.Linear


# --------------------------------------------------------------------------------------------------------- the weights


BROKEN = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_or_inf_in_a_weight(value: float, use_cache: bool) -> None:
    model = tiny_llama()
    model.lm_head.requires_grad_(False)
    model.train()
    weight = model.get_submodule(BROKEN).weight
    kept = weight[2, 3].item()
    weight.data[2, 3] = value
    before = anatomy(model)
    config = SVFConfig(**ALL_LINEAR, runtime_config=SVFRuntimeConfig(use_cache=use_cache))
    with pytest.raises(ValueError, match=rf"{BROKEN} holds 1 NaN or Inf values out of 1536"):
        get_peft_model(model, config)
    assert anatomy(model) == before
    assert not hasattr(model, "peft_config")

    weight.data[2, 3] = kept
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", UserWarning
        )  # PEFT's "You are trying to modify a model with PEFT for a second time"
        again = get_peft_model(model, config)
    assert torch.equal(logits(again.eval()), logits(tiny_llama()))


@pytest.mark.parametrize("what", ["weight", "target"])
def test_a_failing_second_adapter_leaves_the_first(what: str) -> None:
    model = adapted(target_modules=["q_proj", "v_proj"])
    expected, before = logits(model), anatomy(model)
    if what == "weight":
        model.get_submodule("base_model.model." + BROKEN).weight.data[0, 0] = float("nan")
        with pytest.raises(ValueError, match=f"{BROKEN} holds 1 NaN"):
            model.add_adapter("second", SVFConfig(**ALL_LINEAR))
        model.get_submodule("base_model.model." + BROKEN).weight.data.copy_(
            tiny_llama().get_submodule(BROKEN).weight.data
        )
    else:
        with pytest.raises(TypeError, match="embed_tokens is a Embedding"):
            model.add_adapter("second", SVFConfig(target_modules=["q_proj", "k_proj", "embed_tokens"]))
    assert anatomy(model) == before
    assert torch.equal(logits(model), expected)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)

    model.add_adapter("second", SVFConfig(**ALL_LINEAR))
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(tiny_llama()))


def test_a_failing_second_adapter_leaves_what_is_trained() -> None:
    model = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
    before = anatomy(model)
    with pytest.raises(ValueError, match="target_modules"):
        model.add_adapter("second", SVFConfig(target_modules=["nope"], modules_to_save=["lm_head"]))
    assert anatomy(model) == before


# ---------------------------------------------------------------------------------------------------------- the config


@pytest.mark.parametrize("r", [0, -1, 1.5, 8.0, True, False, "8", "full"])
def test_r_that_is_no_rank(r: Any) -> None:
    with pytest.raises(ValueError, match=rf"`r` must be a positive integer.*got {r!r}"):
        SVFConfig(r=r)


def test_r_beyond_k_is_k() -> None:
    for name, module in adapted(r=10_000).named_modules():
        if isinstance(module, SVFLayer):
            k = min(module.in_features, module.out_features)
            assert (name, len(module.svf_delta["default"].weight)) == (name, k)
            assert module.basis is not None
            assert module.basis.shape == (k, k)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bias": "lora_only"}, "'lora_only'"),
        ({"layers_pattern": "layers"}, "`layers_pattern`"),
        ({"target_modules": ".*", "layers_to_transform": [0]}, "`layers_to_transform` cannot be used"),
    ],
)
def test_configs_that_make_no_sense(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SVFConfig(**config)


# ------------------------------------------------------------------------------------------------------ the checkpoint


def rewrite(folder: Path, change: Any) -> None:
    state = {key: value.clone() for key, value in load_file(folder / WEIGHTS).items()}  # not a map of the file
    change(state)
    save_file(state, folder / WEIGHTS)


KEY = f"base_model.model.{BROKEN}.svf_delta.weight"


def cut_short(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def missing_key(folder: Path) -> None:
    rewrite(folder, lambda state: state.pop(KEY))


def wrong_shape(folder: Path) -> None:
    rewrite(folder, lambda state: state.__setitem__(KEY, torch.zeros(7)))


BAD_FILES = [
    pytest.param(cut_short, WEIGHTS, id="cut-short"),
    pytest.param(missing_key, rf"{BROKEN}\.svf_delta", id="missing-key"),
    pytest.param(wrong_shape, rf"{BROKEN}\.svf_delta", id="wrong-shape"),
]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(("damage", "message"), BAD_FILES)
def test_a_damaged_adapter_file(saved: Path, damage: Any, message: str, low_cpu_mem_usage: bool) -> None:
    damage(saved)
    with pytest.raises(Exception, match=message):
        PeftModel.from_pretrained(tiny_llama(), saved, low_cpu_mem_usage=low_cpu_mem_usage)


@pytest.mark.parametrize(("damage", "message"), BAD_FILES)
def test_the_base_model_survives_a_damaged_adapter_file(saved: Path, damage: Any, message: str) -> None:
    intact = (saved / WEIGHTS).read_bytes()
    damage(saved)
    base = tiny_llama()
    before, expected = anatomy(base), logits(base)
    with pytest.raises(Exception):  # noqa: B017, PT011  (which one is the test above)
        PeftModel.from_pretrained(base, saved)
    assert torch.equal(logits(base), expected)
    after = anatomy(base)
    assert after["modules"] == before["modules"]
    assert [p[:2] for p in after["parameters"]] == [p[:2] for p in before["parameters"]]

    (saved / WEIGHTS).write_bytes(intact)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = PeftModel.from_pretrained(base, saved)
    assert torch.equal(logits(model), logits(adapted()))


@pytest.mark.parametrize(("damage", "message"), BAD_FILES)
@pytest.mark.usefixtures("never_fold")
def test_a_damaged_second_adapter_leaves_the_first(saved: Path, damage: Any, message: str) -> None:
    model = adapted(target_modules=["q_proj"])
    expected, before = logits(model), anatomy(model)
    damage(saved)
    with pytest.raises(Exception, match=message):
        model.load_adapter(saved, "second")
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model), expected)
    assert anatomy(model) == before


def test_a_checkpoint_of_other_modules(tmp_path: Path) -> None:
    """As if the two files were not from the same folder."""
    adapted(target_modules=["q_proj"]).save_pretrained(tmp_path / "q")
    adapted(target_modules=["up_proj"]).save_pretrained(tmp_path / "up")
    (tmp_path / "q" / WEIGHTS).write_bytes((tmp_path / "up" / WEIGHTS).read_bytes())
    with pytest.raises(ValueError, match=r"q_proj.*2 δ vectors.*up_proj"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path / "q")


# --------------------------------------------------------------------------------------------------------- other bases


def culprit(other: nn.Module, saved: Path) -> str:
    """A pattern for the first module, the value that the base has, and the one that the adapter was made for."""
    name = "model.layers.0.self_attn.q_proj"
    numbers = json.loads((saved / "adapter_config.json").read_text())["base_fingerprint"][name]
    found = torch.linalg.svdvals(other.get_submodule(name).weight.detach().double())[0].item()
    # to four digits, however many are shown
    have, want = (re.escape(f"{value:.8f}"[:6]) for value in (found, numbers[0]))
    return rf"{re.escape(name)}: σ_1 is {have}\d*, the adapter was made for {want}\d*"


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_for_another_base(saved: Path, low_cpu_mem_usage: bool) -> None:
    other = tiny_llama(seed=1)
    before, expected = anatomy(other), logits(other)
    with pytest.raises(ValueError, match=culprit(other, saved)) as caught:
        PeftModel.from_pretrained(other, saved, low_cpu_mem_usage=low_cpu_mem_usage)
    assert "14 of 14 weights differ" in str(caught.value)
    assert 'SVFRuntimeConfig(base_check="warn")' in str(caught.value)
    assert anatomy(other) == before
    assert torch.equal(logits(other), expected)
    get_peft_model(other, SVFConfig(**ALL_LINEAR))


def test_the_error_says_which_base_it_should_be(tmp_path: Path) -> None:
    base = tiny_llama()
    base.name_or_path = base.config._name_or_path = "somebody/the-right-base"
    get_peft_model(base, SVFConfig(**ALL_LINEAR)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="somebody/the-right-base"):
        PeftModel.from_pretrained(tiny_llama(seed=1), tmp_path)


def test_one_different_module_is_enough(saved: Path) -> None:
    other = tiny_llama()
    other.get_submodule(BROKEN).weight.data.mul_(1.01)
    with pytest.raises(ValueError, match=rf"1 of 14 weights differ, the first is {BROKEN}: σ_1"):
        PeftModel.from_pretrained(other, saved)


def test_a_warning_instead(saved: Path) -> None:
    other = tiny_llama(seed=1)
    config = SVFConfig.from_pretrained(saved, runtime_config=SVFRuntimeConfig(base_check="warn"))
    with pytest.warns(UserWarning, match=culprit(other, saved)):
        model = PeftModel.from_pretrained(other, saved, config=config)
    assert not torch.equal(logits(model), logits(tiny_llama(seed=1)))


def test_nothing_instead(saved: Path) -> None:
    config = SVFConfig.from_pretrained(saved, runtime_config=SVFRuntimeConfig(base_check="ignore"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(tiny_llama(seed=1), saved, config=config)


def test_a_second_adapter_for_another_base_leaves_the_first(saved: Path) -> None:
    model = adapted(seed=1, target_modules=["q_proj"])
    expected, before = logits(model), anatomy(model)
    with pytest.raises(ValueError, match="Adapter 'second' was made for another base model"):
        model.load_adapter(saved, "second")
    assert anatomy(model) == before
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_of_the_right_base_is_the_right_base(saved: Path, dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(tiny_llama(dtype=dtype), saved)


# --------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.set_adapter("nope"),
        lambda model: model.delete_adapter("nope"),
        lambda model: model.add_weighted_adapter(["nope"], [1.0], "mix"),
        lambda model: model.base_model.set_adapter(["default", "nope"]),
        lambda model: model.merge_adapter(["nope"]),
        lambda model: model.merge_and_unload(adapter_names=["nope"]),
    ],
    ids=["set_adapter", "delete_adapter", "add_weighted_adapter", "several", "merge_adapter", "merge_and_unload"],
)
@pytest.mark.usefixtures("never_fold")
def test_an_unknown_adapter_name(call: Any) -> None:
    model = adapted()
    expected = logits(model)
    with pytest.raises((ValueError, KeyError), match="nope"):
        call(model)
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model), expected)


def renamed(folder: Path, change: Any) -> None:
    """Rewrite the fingerprints' names."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_fingerprint"] = {change(name): numbers for name, numbers in config["base_fingerprint"].items()}
    path.write_text(json.dumps(config))


def test_a_prefix_does_not_hide_another_base(saved: Path) -> None:
    """As between a model with a head and without: `model.layers.0` and `layers.0`."""
    renamed(saved, lambda name: name.removeprefix("model."))
    PeftModel.from_pretrained(tiny_llama(), saved)
    with pytest.raises(ValueError, match="14 of 14 weights differ"):
        PeftModel.from_pretrained(tiny_llama(seed=1), saved)


def test_fingerprints_of_other_modules_are_no_pass(saved: Path) -> None:
    renamed(saved, lambda name: name.replace("q_proj", "query"))
    with pytest.raises(ValueError, match=r"no values for 2 of 14 .*layers\.0\.self_attn\.query"):
        PeftModel.from_pretrained(tiny_llama(), saved)
    alone = replace(SVFConfig.from_pretrained(saved))  # which knows no file
    with pytest.raises(ValueError, match=r"q_proj: the adapter has no module of this name"):
        get_peft_model(tiny_llama(), alone)


def test_an_adapter_for_a_deeper_model(tmp_path: Path) -> None:
    deep = tiny_llama(num_hidden_layers=3)
    get_peft_model(deep, SVFConfig(**ALL_LINEAR)).save_pretrained(tmp_path)
    shallow = tiny_llama(num_hidden_layers=3)
    del shallow.model.layers[2]
    with pytest.raises(ValueError, match=r"model\.layers\.2\..*it is not adapted here"):
        PeftModel.from_pretrained(shallow, tmp_path)


def test_ctrl_c_while_attaching_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_llama()
    before = anatomy(base)

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("peft_svf.tuner.model.build_bases", interrupt)
        with pytest.raises(KeyboardInterrupt):
            get_peft_model(base, SVFConfig(**ALL_LINEAR))
    assert anatomy(base) == before
    get_peft_model(base, SVFConfig(**ALL_LINEAR))
