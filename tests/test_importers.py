"""Adapters of other methods as experts: exact where they are understood, refused otherwise, and the base untouched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import adapted, base_model, deltas, logits, svf_layers, tiny_llama
from peft import (
    AdaLoraConfig,
    FourierFTConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    RandLoraConfig,
    VeraConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from peft_svf import SVFConfig, from_weights, import_expert, merge_to_folder, to_lora

TARGETS = ["q_proj", "down_proj"]


def gpt2(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=44, n_embd=16, n_layer=2, n_head=2, n_positions=64)).eval()


def trained(base: Any, config: Any, std: float = 0.1) -> PeftModel:
    """An adapter of another method, with random numbers as trained ones."""
    model = get_peft_model(base, config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn_like(parameter))
    return model


def anatomy(model: nn.Module) -> Any:
    """All that must stay as it is: modules, hooks, training modes, parameters, whether they are trained, all bits."""
    return (
        [(n, type(m), m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in model.named_modules()],
        [(n, id(p), p.requires_grad, p.dtype) for n, p in model.named_parameters()],
        {n: t.clone().numpy().tobytes() for n, t in model.state_dict().items()},
        sorted(vars(model)),
    )


def sources(model: PeftModel, folder: Path) -> list[Any]:
    """The two doors."""
    model.save_pretrained(folder)
    return [folder, model]


# ------------------------------------------------------------------------------------------------- what is understood

UNDERSTOOD: dict[str, Callable[[], Any]] = {
    "gaussian": lambda: LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="gaussian"),
    "orthogonal": lambda: LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="orthogonal"),
    "mica": lambda: LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="mica"),
    "eva": lambda: LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="eva"),
    "rslora and patterns": lambda: LoraConfig(
        r=4,
        lora_alpha=7,
        use_rslora=True,
        target_modules=TARGETS,
        rank_pattern={"q_proj": 2},
        alpha_pattern={r"layers.1.mlp.down_proj": 3},
        lora_dropout=0.2,
    ),
    "some layers": lambda: LoraConfig(r=2, target_modules=TARGETS, layers_to_transform=[1], exclude_modules=["q_proj"]),
    "regex": lambda: LoraConfig(r=2, target_modules=r".*\.1\..*(up|gate)_proj"),
    "VeRA": lambda: VeraConfig(r=8, target_modules=["q_proj"], save_projection=False, d_initial=0.5),
    "LoHa": lambda: LoHaConfig(r=4, alpha=3, target_modules=TARGETS, init_weights=False, rank_dropout=0.3),
    "LoKr": lambda: LoKrConfig(r=4, target_modules=TARGETS, init_weights=False, decompose_both=True),
    "FourierFT": lambda: FourierFTConfig(n_frequency=20, target_modules=TARGETS),
    "RandLoRA": lambda: RandLoraConfig(r=4, target_modules=TARGETS),
}


@pytest.mark.parametrize("kind", UNDERSTOOD)
def test_an_adapter_gives_the_expert_of_its_merged_model(kind: str, tmp_path: Path) -> None:
    model = trained(base_model(), UNDERSTOOD[kind]()).train()  # dropout must not act
    found = []
    for finetuned in sources(model, tmp_path):
        base = base_model().train()
        before = anatomy(base)
        expert, explained = from_weights(finetuned, base)
        found.append((deltas(expert), explained))
        assert anatomy(expert.unload())[0] == [
            (name, kind, False, *rest)
            for name, kind, _, *rest in before[0]  # `from_weights` ends in eval mode
        ]
        assert anatomy(base)[2] == before[2]
    assert any(module.training for module in model.modules())
    merged, of_merged = from_weights(model.eval().merge_and_unload(), base_model())
    for expert, explained in found:
        assert explained.overall == pytest.approx(of_merged.overall, abs=1e-5)
        assert 0 < explained.overall < 1
        for name, delta in deltas(merged).items():
            torch.testing.assert_close(expert[name], delta, rtol=1e-3, atol=1e-4)


def test_a_lora_of_conv1d(tmp_path: Path) -> None:
    model = trained(gpt2(), LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True))
    found = [from_weights(finetuned, gpt2())[0] for finetuned in sources(model, tmp_path)]
    merged = deltas(from_weights(model.merge_and_unload(), gpt2())[0])
    for expert in found:
        for name, delta in deltas(expert).items():
            torch.testing.assert_close(delta, merged[name], rtol=1e-3, atol=1e-4)


def test_several_active_loras_add() -> None:
    model = trained(base_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    only, _ = from_weights(model, base_model())
    assert not any(delta.any() for name, delta in deltas(only).items() if "v_proj" in name)
    model.base_model.set_adapter(["default", "second"])
    both, _ = from_weights(model, base_model())
    assert all(delta.any() == ("q_proj" in name or "v_proj" in name) for name, delta in deltas(both).items())
    model.add_adapter("third", LoraConfig(r=2, target_modules=["o_proj"], use_dora=True))
    assert from_weights(model, base_model())[1].overall > 0
    model.base_model.set_adapter(["default", "third"])
    with pytest.raises(ValueError, match="The adapter 'third' has `use_dora`"):
        from_weights(model, base_model())


def test_a_change_that_the_expert_does_not_adapt_counts_as_unexplained(tmp_path: Path) -> None:
    """`all-linear` leaves out the output layer."""
    model = trained(base_model(), LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    for finetuned in sources(model, tmp_path):
        _, explained = from_weights(finetuned, base_model())
        assert explained.modules["lm_head"] == 0
        _, narrow = from_weights(finetuned, base_model(), SVFConfig(target_modules=["lm_head"]))
        assert narrow.modules["lm_head"] > 0
        assert narrow.modules["model.layers.0.self_attn.q_proj"] == 0
        assert narrow.overall < narrow.modules["lm_head"]


@pytest.mark.parametrize("changed", ["wte.weight", "ln_1.weight", "c_attn.bias", "lm_head.weight"])
@pytest.mark.parametrize("way", ["model", "folder"])
def test_changes_outside_of_linear_weights_count_as_unexplained(changed: str, way: str, tmp_path: Path) -> None:
    finetuned = GPT2LMHeadModel(GPT2Config(vocab_size=44, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=False))
    base = GPT2LMHeadModel(finetuned.config)
    base.load_state_dict(finetuned.state_dict())
    names = [name for name, _ in finetuned.named_parameters() if name.endswith(changed)]
    with torch.no_grad():
        for name in names:
            finetuned.get_parameter(name).add_(0.1)
    finetuned.save_pretrained(tmp_path)
    _, explained = from_weights(finetuned if way == "model" else tmp_path, base)
    assert {name for name, fraction in explained.modules.items() if fraction == 0} == {
        name.removesuffix(".weight") for name in names
    }
    assert explained.overall == 0


def test_other_embeddings_are_not_compared_but_named() -> None:
    finetuned, base = base_model(), base_model()
    finetuned.resize_token_embeddings(70)
    with pytest.warns(UserWarning, match="2 parameters of the base model are missing.*first is model.embed_tokens"):
        from_weights(finetuned, base)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj", "model.norm"])
def test_a_diverged_fine_tuning_is_refused(name: str) -> None:
    finetuned, base = base_model(), base_model()
    before = anatomy(base)
    with torch.no_grad():
        finetuned.get_submodule(name).weight.flatten()[0] = float("nan")
    with pytest.raises(ValueError, match=f"The change of {name} holds NaN or Inf"):
        from_weights(finetuned, base)
    assert anatomy(base) == before


def test_a_diverged_lora_is_refused(tmp_path: Path) -> None:
    model = trained(base_model(), LoraConfig(r=4, target_modules=TARGETS))
    with torch.no_grad():
        layer: Any = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
        layer.lora_B.default.weight[0, 0] = float("inf")
    for finetuned in sources(model, tmp_path):
        with pytest.raises(ValueError, match=r"The change of model.layers.1.mlp.down_proj holds NaN or Inf"):
            from_weights(finetuned, base_model())


def test_a_lora_on_a_tied_output_layer(tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True}
    model = trained(tiny_llama(**tied), LoraConfig(r=4, target_modules=["lm_head"]))
    found = [
        from_weights(finetuned, tiny_llama(**tied), SVFConfig(target_modules=["lm_head"]))
        for finetuned in sources(model, tmp_path)
    ]
    assert found[0][1].overall == found[1][1].overall > 0


# ---------------------------------------------------------------------------------------------------- what is refused

WRITTEN: dict[str, Any] = {
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "PISSA", "of_next_year"],
    "use_dora": [True],
    "lora_bias": [True],
    "bias": ["lora_only"],
    "alora_invocation_tokens": [[5, 6]],
    "trainable_token_indices": [[1, 2], {"embed_tokens": [1]}],
    "modules_to_save": [["lm_head"]],
    "layer_replication": [[[0, 2], [1, 2]]],
    "target_parameters": [["mlp.experts.up_proj"]],
    "use_qalora": [True],
    "velora_config": [{"rank": 4}],
    "ensure_weight_tying": [True],
    "a_field_of_next_year": [True, 3, {"scale": 2.0}],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in WRITTEN.items() for v in values])
def test_a_setting_that_is_not_understood_is_refused_by_name(field: str, value: Any, tmp_path: Path) -> None:
    trained(base_model(), LoraConfig(r=4, target_modules=TARGETS)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    more = {"loftq_config": {"loftq_bits": 4}} if value == "loftq" else {}  # without it, PEFT itself refuses
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value, **more}))
    base = base_model()
    before = anatomy(base)
    with pytest.raises(ValueError, match=rf"{tmp_path.name}.*`{field}.*Merge it first and pass the merged model"):
        from_weights(tmp_path, base)
    assert anatomy(base) == before


def test_a_new_field_that_is_off_is_no_reason_to_refuse(tmp_path: Path) -> None:
    trained(base_model(), LoraConfig(r=4, target_modules=TARGETS)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "new": None, "newer": False, "newest": {}}))
    assert from_weights(tmp_path, base_model())[1].overall > 0


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (LoraConfig(target_modules=TARGETS, init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (LoraConfig(target_modules=TARGETS, init_lora_weights="olora"), "init_lora_weights='olora'"),
        (LoraConfig(target_modules=TARGETS, lora_bias=True), "lora_bias"),
        (LoraConfig(target_modules=TARGETS, alora_invocation_tokens=[5], task_type="CAUSAL_LM"), "alora_invocation"),
        (LoraConfig(target_modules=TARGETS, trainable_token_indices=[3]), "trainable_token_indices"),
        (LoraConfig(target_modules=["q_proj", "embed_tokens"]), "a change of model.embed_tokens, a Embedding"),
        (AdaLoraConfig(target_modules=TARGETS, total_step=9), "the method ADALORA"),
        (PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "the method PROMPT_TUNING"),
    ],
    ids=["pissa", "olora", "lora_bias", "alora", "tokens", "embedding", "adalora", "prompt"],
)
def test_adapters_that_are_refused_leave_the_base(config: Any, what: str, tmp_path: Path) -> None:
    model = trained(base_model(), config)
    for finetuned in sources(model, tmp_path):
        base = base_model()
        before = anatomy(base)
        with pytest.raises(ValueError, match=f"{what}.*Merge it first"):
            from_weights(finetuned, base)
        assert anatomy(base) == before


def test_pissa_through_its_merged_model() -> None:
    """The way that the error names."""
    model = trained(base_model(), LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa"), std=0)
    expert, _ = from_weights(model.merge_and_unload(), base_model())
    torch.testing.assert_close(logits(expert), logits(base_model()), rtol=0, atol=1e-3)


@pytest.mark.parametrize("change", ["missing", "extra", "embeddings"])
def test_an_adapter_file_that_is_not_what_its_config_says(change: str, tmp_path: Path) -> None:
    trained(base_model(), LoraConfig(r=4, target_modules=TARGETS)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    first = next(iter(tensors))
    if change == "missing":
        del tensors[first]
    elif change == "extra":
        tensors[first.replace("layers.0", "layers.7")] = tensors[first].clone()
    else:
        tensors["base_model.model.model.embed_tokens.weight"] = base_model().model.embed_tokens.weight.detach() + 1
    save_file(tensors, path, metadata={"format": "pt"})
    base = base_model()
    before = anatomy(base)
    message = {
        "missing": r"lacks .*lora_A",
        "extra": r"layers\.7",
        "embeddings": r"another model\.embed_tokens\.weight",
    }
    with pytest.raises(ValueError, match=message[change]):
        from_weights(tmp_path, base)
    assert anatomy(base) == before


def test_the_weights_of_the_base_may_be_in_the_file(tmp_path: Path) -> None:
    model = trained(base_model(), LoraConfig(r=4, target_modules=TARGETS))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("embed_tokens" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    found, _ = from_weights(tmp_path, base_model())
    wanted, _ = from_weights(model, base_model())
    assert all(torch.equal(delta, deltas(wanted)[name]) for name, delta in deltas(found).items())


def test_a_lora_on_another_base() -> None:
    model = trained(base_model(seed=1), LoraConfig(r=4, target_modules=TARGETS))
    with pytest.raises(
        ValueError, match=r"made for another model\.layers\.0\.self_attn\.q_proj than the base model has"
    ):
        from_weights(model, base_model())
    cast = base_model().bfloat16().float()
    assert from_weights(trained(cast, LoraConfig(r=4, target_modules=TARGETS)), base_model())[1].overall > 0


def test_quantized_weights_and_mixed_folders(tmp_path: Path) -> None:
    finetuned = base_model()
    finetuned.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    base = base_model()
    before = anatomy(base)
    with pytest.raises(ValueError, match=r"q_proj\.weight is quantized \(torch\.float8_e4m3fn\)"):
        from_weights(tmp_path, base)
    assert anatomy(base) == before  # also after the adapter was attached
    trained(base_model(), LoraConfig(target_modules=TARGETS)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds both an adapter and model\.safetensors"):
        from_weights(tmp_path, base)
    base.add_adapter(LoraConfig(target_modules=TARGETS))
    with pytest.raises(ValueError, match="not a `PeftModel`"):
        from_weights(base, base_model())


def test_an_import_that_fails_leaves_what_is_trained(tmp_path: Path) -> None:
    base = base_model().train()
    base.model.norm.weight.requires_grad_(False)
    before = anatomy(base)
    vectors = {n: torch.zeros(min(p.shape)) for n, p in base.named_parameters() if "q_proj" in n}
    torch.save(vectors, tmp_path / "zero.pt")
    with pytest.raises(ValueError, match="sums to 0"):
        import_expert(tmp_path / "zero.pt", base, parametrization="raw")
    assert anatomy(base) == before


# ------------------------------------------------------------------------------------------------------- exports


def test_a_lora_beside_the_expert_is_not_left_out_of_an_export() -> None:
    model = adapted(base_model(), target_modules=["q_proj"])
    inject_adapter_in_model(LoraConfig(target_modules=["o_proj"]), model.base_model.model, "lora")
    with pytest.raises(ValueError, match=r"another adapter \(Linear on model\.layers\.0\.self_attn\.o_proj\)"):
        to_lora(model)


class Nested(nn.Module):
    """A name that is the end of another one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(6, 6)
        self.sub = nn.ModuleDict({"lin": nn.Linear(8, 8), "other": nn.Linear(6, 8)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.sub["lin"](self.sub["other"](self.lin(x)))
        return found


@pytest.mark.parametrize("targets", [["lin"], "lin", ["sub.lin"]])
def test_an_exported_lora_fits_modules_with_similar_names(targets: Any, tmp_path: Path) -> None:
    model = adapted(Nested(), target_modules=targets)
    to_lora(model).save_pretrained(tmp_path)
    x = torch.randn(3, 6)
    lora = PeftModel.from_pretrained(Nested(), tmp_path)
    assert {name for name, module in lora.named_modules() if hasattr(module, "lora_A")} == {
        f"base_model.model.{name}" for name in svf_layers(model)
    }
    torch.testing.assert_close(lora(x), model(x))


# ------------------------------------------------------------------------------------------------- merged folders


def stored(tmp_path: Path, shard: str) -> tuple[Path, Path, torch.Tensor]:
    """A base model, an expert of it, and the logits that both give together."""
    tiny_llama().save_pretrained(tmp_path / "base", max_shard_size=shard)
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "expert")
    return tmp_path / "base", tmp_path / "expert", logits(model)


@pytest.mark.parametrize("shard", ["20KB", "1GB"])
def test_an_expert_in_the_folder_of_its_base_is_left_out(shard: str, tmp_path: Path) -> None:
    base, expert, expected = stored(tmp_path, shard)
    adapted(seed=5).save_pretrained(base)  # another expert, in the folder of the model
    adapted(seed=6).save_pretrained(base / "checkpoint-7")
    (base / "adapter_model.bin").write_bytes(b"x")
    (base / "adapter_layers.py").write_text("# code of the model")
    (base / "model.fp16.safetensors.index.json").write_text("{}")
    merge_to_folder(expert, tmp_path / "merged", base)
    files = {path.name for path in (tmp_path / "merged").rglob("*") if path.is_file()}
    assert not {name for name in files if name.startswith(("adapter_config", "adapter_model", "model.fp16"))}
    assert "adapter_layers.py" in files
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()), expected, rtol=0, atol=1e-5
    )


def test_a_lora_in_the_folder_of_the_base_is_refused(tmp_path: Path) -> None:
    base, expert, _ = stored(tmp_path, "1GB")
    trained(tiny_llama(), LoraConfig(target_modules=TARGETS)).save_pretrained(base)
    with pytest.raises(ValueError, match="comes with an adapter of type LORA, which the merged model would lack"):
        merge_to_folder(expert, tmp_path / "merged", base)
    assert not (tmp_path / "merged").exists()


def test_an_output_layer_in_the_adapter_is_that_of_the_base(tmp_path: Path) -> None:
    """PEFT saves it with an adapter of the output layer. With new tokens it is another one, and must not be lost."""
    base, expert, _ = stored(tmp_path, "1GB")
    model = adapted(AutoModelForCausalLM.from_pretrained(base), target_modules=["lm_head"])
    model.save_pretrained(expert)
    merge_to_folder(expert, tmp_path / "merged", base)
    path = expert / "adapter_model.safetensors"
    tensors = load_file(path)
    (head,) = (key for key in tensors if key.endswith("lm_head.base_layer.weight"))
    tensors[head][3] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"holds another lm_head\.weight than .*base, such as one with new tokens"):
        merge_to_folder(expert, tmp_path / "x", base)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("exists", [True, False])
def test_a_merge_that_fails_at_the_end_leaves_nothing(
    exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, expert, _ = stored(tmp_path, "20KB")
    (base / "code").mkdir()
    target = tmp_path / "merged"
    if exists:
        target.mkdir()
    real, calls = __import__("os").replace, []

    def full(source: Any, destination: Any) -> None:
        if Path(destination).parent == target:
            calls.append(destination)
            if len(calls) == 4:
                raise OSError("No space left on device")
        real(source, destination)

    monkeypatch.setattr("peft_svf.interop.merged.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        merge_to_folder(expert, target, base)
    assert target.exists() == exists
    assert not exists or not list(target.iterdir())


def bert() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=44, num_labels=3, **sizes)).eval()


def t5() -> Any:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(vocab_size=44, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2))


def vit() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=3, **sizes)).eval()


OTHER_MODELS: dict[str, tuple[Callable[[], Any], Any]] = {
    "a classifier": (bert, ["query", "classifier"]),
    "an encoder and a decoder": (t5, "all-linear"),
    "images, with other names in its files": (vit, "all-linear"),
}


@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_models_that_are_no_causal_lm_are_merged_into_a_folder(kind: str, tmp_path: Path) -> None:
    make, targets = OTHER_MODELS[kind]
    make().save_pretrained(tmp_path / "base")
    load = make().__class__.from_pretrained
    model = adapted(load(tmp_path / "base"), target_modules=targets)
    model.save_pretrained(tmp_path / "expert")
    folder = merge_to_folder(tmp_path / "expert", tmp_path / "merged", tmp_path / "base").folder
    wanted = model.merge_and_unload().state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in load(folder).state_dict().items())


@pytest.mark.parametrize("content", ["{oops", "[]", "[1]", "{}"])
def test_a_base_folder_with_a_damaged_adapter_config(content: str, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    adapted(tiny_llama()).save_pretrained(tmp_path / "expert")
    (tmp_path / "base" / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"adapter_config.json is damaged or names no adapter. Remove it"):
        merge_to_folder(tmp_path / "expert", tmp_path / "merged", tmp_path / "base")
    assert not (tmp_path / "merged").exists()


def test_merging_inside_the_folder_of_the_base_leaves_no_empty_folders(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    adapted(tiny_llama()).save_pretrained(tmp_path / "expert")
    folder = merge_to_folder(tmp_path / "expert", tmp_path / "merged", tmp_path).folder
    assert not [path for path in folder.iterdir() if path.is_dir()]


def test_an_incomplete_expert_without_a_record_of_its_base_is_not_merged(tmp_path: Path) -> None:
    """Its targets show what is missing."""
    tiny_llama().save_pretrained(tmp_path / "base")
    adapted(tiny_llama()).save_pretrained(tmp_path / "expert")
    file, config = tmp_path / "expert" / "adapter_model.safetensors", tmp_path / "expert" / "adapter_config.json"
    save_file({key: value for key, value in load_file(file).items() if "up_proj" not in key}, file)
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_fingerprint": None}))
    with pytest.raises(ValueError, match="has no values for 2 of 14 adapted modules"):
        merge_to_folder(tmp_path / "expert", tmp_path / "merged", tmp_path / "base")
