"""Experts on quantized base models: bitsandbytes and torchao on the CPU, and a backend that only goes forward."""

from __future__ import annotations

import copy
import gc
import json
import shutil
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from helpers import tiny_llama
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from peft_svf import AdaptiveMixture, SVFConfig
from peft_svf.interop import decompose, merge_to_folder, to_lora
from peft_svf.spectral import BasisPack
from peft_svf.tuner import SVFRuntimeConfig
from peft_svf.tuner.layer import SVFLayer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:MatMul8bitLt", "ignore::DeprecationWarning")
KINDS = ("int8", "nf4", "fp4", "torchao int8", "torchao int4")
IDS = torch.tensor([[1, 5, 9, 30, 2], [1, 7, 3, 3, 8]])
# of the logits: rounding 8 or 4 bits moves them by 1 and 20 %
COARSE = {"int8": 0.05, "torchao int8": 0.05, "nf4": 0.4, "fp4": 0.4, "torchao int4": 0.4}


def quantization(kind: str) -> Any:
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if not kind.startswith("torchao"):
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.float32)
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig

    if kind == "torchao int8":
        return TorchAoConfig(Int8WeightOnlyConfig())
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4))


def full_model(seed: int = 0) -> Any:
    return tiny_llama(seed, hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in full precision, the pack of its bases, and an expert that was made on it."""
    where = tmp_path_factory.mktemp("quantized")
    full_model().save_pretrained(where / "model")
    decompose(where / "model", where / "pack")
    torch.manual_seed(1)
    expert = get_peft_model(full_model(), SVFConfig(target_modules="all-linear", init_weights=False))
    expert.save_pretrained(where / "expert")
    return where


def quantized(folder: Path, kind: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder / "model", quantization_config=quantization(kind), dtype=torch.float32, device_map="cpu"
    )


def config(folder: Path, **changes: Any) -> Any:
    runtime = SVFRuntimeConfig(**{"basis": str(folder / "pack"), **changes})
    return SVFConfig.from_pretrained(folder / "expert", runtime_config=runtime)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def svf_layers(model: Any) -> list[SVFLayer]:
    return [layer for layer in model.modules() if isinstance(layer, SVFLayer)]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_of_the_full_model_works_on_a_quantized_one(folder: Path, kind: str) -> None:
    plain = logits(quantized(folder, kind))
    model = PeftModel.from_pretrained(quantized(folder, kind), folder / "expert", config=config(folder))
    exact = logits(PeftModel.from_pretrained(full_model(), folder / "expert"))
    found = logits(model)
    assert difference(found, exact) < COARSE[kind] < difference(found, plain)
    with model.disable_adapter():
        # bitsandbytes alone may compute with 4-bit weights in bf16
        assert difference(logits(model), plain) <= (0.02 if kind in ("nf4", "fp4") else 0)
    layers = [layer for layer in model.modules() if isinstance(layer, SVFLayer)]
    assert len(layers) == 14
    assert all(layer.quantization_backend is not None for layer in layers)
    assert model.get_model_status().quantization_backend is not None
    with torch.no_grad():
        mixed = model(IDS, adapter_names=["default", "__base__"]).logits
    assert difference(mixed[0], found[0]) < 1e-2
    assert difference(mixed[1], plain[1]) < 2e-2


@pytest.mark.parametrize("kind", KINDS)
def test_the_effective_weight_is_that_of_the_rounded_weight(folder: Path, kind: str) -> None:
    model = PeftModel.from_pretrained(quantized(folder, kind), folder / "expert", config=config(folder))
    logits(model)  # on some CPUs bitsandbytes orders its weights anew
    for layer in (layer for layer in model.modules() if isinstance(layer, SVFLayer)):
        x = torch.randn(5, layer.in_features)
        delta = layer.summed_delta(["default"])
        assert delta is not None
        with torch.no_grad():
            expected = x @ layer.effective_weight(delta).float().mT
            assert difference(layer(x), expected) < 2e-2  # its own products are in int8 or bf16


@pytest.mark.parametrize("kind", KINDS)
def test_merging_quantizes_again_and_unmerging_brings_all_back(folder: Path, kind: str) -> None:
    model = PeftModel.from_pretrained(quantized(folder, kind), folder / "expert", config=config(folder))
    before = logits(model)
    stored = list(model.parameters())
    for _ in range(2):
        model.merge_adapter()
        assert difference(logits(model), before) < COARSE[kind]
        model.unmerge_adapter()
        assert difference(logits(model), before) < 1e-5
    assert all(before is after for before, after in zip(stored, model.parameters(), strict=True))
    merged = model.merge_and_unload()
    assert difference(logits(merged), before) < COARSE[kind]
    assert not any(isinstance(module, SVFLayer) for module in merged.modules())


def test_what_rounding_would_lose_in_a_merge_is_said(folder: Path) -> None:
    model = PeftModel.from_pretrained(quantized(folder, "nf4"), folder / "expert", config=config(folder))
    for layer in (layer for layer in model.modules() if isinstance(layer, SVFLayer)):
        layer.svf_delta["default"].weight.data.mul_(1e-4)
    with pytest.warns(UserWarning, match="14 of 14 merged weights are too coarse"):
        model.merge_adapter()


@pytest.mark.parametrize("kind", ["int8", "nf4", "torchao int8"])
def test_training_on_a_quantized_model(folder: Path, kind: str, tmp_path: Path) -> None:
    base = prepare_model_for_kbit_training(quantized(folder, kind), use_gradient_checkpointing=False)
    own = SVFConfig(target_modules="all-linear", runtime_config={"basis": str(folder / "pack")})
    model = get_peft_model(base, own)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(12):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert {p.dtype for name, p in model.named_parameters() if "svf_delta" in name} == {torch.float32}
    model.save_pretrained(tmp_path)
    there = PeftModel.from_pretrained(full_model(), tmp_path)  # its fingerprint is that of the full model
    assert difference(logits(there), logits(model)) < COARSE[kind]


def test_grpo_on_a_quantized_model_trains_in_fp32(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL casts what is trained on quantized models to bf16; from one command, nothing is lost."""
    from test_training import SUMS, tokenizer

    from peft_svf.training.run import main, parse

    # a random model earns no reward, which otherwise ends the training
    monkeypatch.setattr("peft_svf.training.run.check_outcome", lambda trainer: None)
    model = tmp_path / "model"
    full_model().save_pretrained(model)
    chat = tokenizer()
    chat.chat_template = "{% for message in messages %}{{ message['content'] + ';' }}{% endfor %}"
    chat.save_pretrained(model)
    decompose(model, tmp_path / "pack")
    arguments = ["--model_name_or_path", str(model), "--task", SUMS, "--output_dir", str(tmp_path / "out")]
    arguments += ["--load_in_4bit", "true", "--max_steps", "2", "--max_completion_length", "4", "--train_size", "32"]
    arguments += ["--validation_size", "4", "--test_size", "4", "--per_device_train_batch_size", "4"]
    arguments += ["--num_generations", "4", "--report_to", "none", "--learning_rate", "0.001"]
    arguments += ["--peft_kwargs", json.dumps({"runtime_config": {"basis": str(tmp_path / "pack")}})]
    assert parse(arguments)[2].load_in_4bit
    main(arguments)
    saved = SVFConfig.from_pretrained(tmp_path / "out")
    assert saved.base_fingerprint
    assert "runtime_config" not in json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    found = PeftModel.from_pretrained(full_model(), tmp_path / "out")
    assert {p.dtype for name, p in found.named_parameters() if "svf_delta" in name} == {torch.float32}


@pytest.mark.parametrize("door", ["PeftModel", "load_adapter", "transformers", "AdaptiveMixture"])
def test_doors_of_a_quantized_model(door: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same verdict as on a full-precision model, for every damage of tests/test_doors.py."""
    from test_doors import DAMAGE

    def load(model: Any, adapter: Path) -> Any:
        if door == "PeftModel":
            return PeftModel.from_pretrained(model, adapter)
        if door == "AdaptiveMixture":
            return AdaptiveMixture.from_pretrained(model, {"only": adapter}).model
        if door == "transformers":
            model.load_adapter(str(adapter))
            return model
        whole = PeftModel.from_pretrained(model, folder / "expert")
        whole.load_adapter(adapter, "second")
        whole.set_adapter("second")
        return whole

    monkeypatch.setenv("PEFT_SVF_BASIS", str(folder / "pack"))
    expected = logits(PeftModel.from_pretrained(quantized(folder, "nf4"), folder / "expert", config=config(folder)))
    assert difference(logits(load(quantized(folder, "nf4"), folder / "expert")), expected) < 1e-4
    plain = logits(quantized(folder, "nf4"))  # of another one: inference changes how the weights are stored
    for name, (damage, message) in DAMAGE.items():
        adapter = Path(shutil.copytree(folder / "expert", tmp_path / name))
        damage(adapter)
        base = quantized(folder, "nf4")
        modules = [type(module) for module in base.modules()]
        with pytest.raises(ValueError, match=message):
            load(base, adapter)
        if door != "load_adapter":  # there the first adapter stays
            assert [type(module) for module in base.modules()] == modules
            assert torch.equal(logits(base), plain)
    full_model(seed=5).save_pretrained(tmp_path / "other")
    other = AutoModelForCausalLM.from_pretrained(
        tmp_path / "other", quantization_config=quantization("nf4"), dtype=torch.float32, device_map="cpu"
    )
    with pytest.raises(ValueError, match=r"another base model|other weights"):
        load(other, folder / "expert")


def test_bitsandbytes_keeps_its_order(folder: Path) -> None:
    """On CPUs with bf16 instructions it orders 4-bit weights anew at the first inference, and then neither passes
    gradients nor saves them right: training went to 0 after its first checkpoint."""
    model = PeftModel.from_pretrained(quantized(folder, "nf4"), folder / "expert", config=config(folder))
    before = logits(model)
    model.state_dict()  # as saving does
    assert torch.equal(logits(model), before)
    embeddings = torch.randn(1, 3, 64, requires_grad=True)
    model(inputs_embeds=embeddings).logits.sum().backward()
    assert embeddings.grad is not None
    base = quantized(folder, "nf4")
    layer = base.model.layers[0].mlp.up_proj
    layer.weight.quant_state.packing_format_for_cpu = True  # as on such a CPU
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj has 4-bit weights .* Load the model again"):
        PeftModel.from_pretrained(base, folder / "expert", config=config(folder))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bassis": "PACK"}, "has no 'bassis'; it has base_check, .*basis"),
        ("PACK", "must be an SVFRuntimeConfig or a dict, got 'PACK'"),
    ],
)
def test_a_runtime_config_with_a_typo(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SVFConfig(runtime_config=given)


def test_without_a_pack_the_error_says_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = quantized(folder, "nf4")
    with pytest.raises(ValueError, match=r"q_proj is quantized \(bnb 4bit\).*peft-svf decompose.*decompose_quantized"):
        PeftModel.from_pretrained(base, folder / "expert")
    assert not any(isinstance(module, SVFLayer) for module in base.modules())
    # decomposing the rounded weights needs to be asked for, and then the fingerprint tells that it is another base
    rounded = config(folder, basis=None, decompose_quantized=True)
    with pytest.raises(ValueError, match=r"made for another base model: 14 of 14 weights differ"):
        PeftModel.from_pretrained(base, folder / "expert", config=rounded)
    monkeypatch.setenv("PEFT_SVF_BASIS", str(folder / "pack"))
    PeftModel.from_pretrained(base, folder / "expert")


def test_experts_that_stay_on_a_quantized_model(folder: Path, tmp_path: Path) -> None:
    runtime = SVFRuntimeConfig(decompose_quantized=True)
    own = SVFConfig(target_modules="all-linear", init_weights=False, runtime_config=runtime)
    model = get_peft_model(quantized(folder, "nf4"), own)
    model.save_pretrained(tmp_path)
    again = SVFConfig.from_pretrained(tmp_path, runtime_config=runtime)
    there = PeftModel.from_pretrained(quantized(folder, "nf4"), tmp_path, config=again)
    assert difference(logits(there), logits(model)) < 1e-5
    with pytest.raises(ValueError, match="made for another base model"):
        PeftModel.from_pretrained(full_model(), tmp_path)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_pack_of_another_model_is_refused(folder: Path, kind: str, tmp_path: Path) -> None:
    full_model(seed=5).save_pretrained(tmp_path / "other")
    decompose(tmp_path / "other", tmp_path / "pack")
    with pytest.raises(ValueError, match=r"made from other weights than .* of the weight does not match the pack"):
        PeftModel.from_pretrained(
            quantized(folder, kind), folder / "expert", config=config(folder, basis=str(tmp_path / "pack"))
        )


def test_mixtures_and_lora_from_a_quantized_model(folder: Path) -> None:
    base = quantized(folder, "torchao int8")
    mixture = AdaptiveMixture.from_pretrained(
        base,
        {"a": folder / "expert", "b": folder / "expert"},
        runtime_config=SVFRuntimeConfig(basis=str(folder / "pack")),
    )
    mixture.set_weights({"a": 0.25, "b": 0.75})
    found = logits(mixture.model)
    exact = logits(PeftModel.from_pretrained(full_model(), folder / "expert"))
    assert difference(found, exact) < 0.05
    lora = to_lora(mixture.model)
    assert lora.retained_overall == pytest.approx(1)


class OnlyForward(nn.Module):
    """A linear layer that shows no weight, as those of GPTQ."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        self.register_buffer("qweight", (weight * 1000).round().to(torch.int32))
        self.register_buffer("scales", torch.tensor([1e-3]))
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.qweight * self.scales, self.bias)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_a_backend_that_only_knows_the_way_forward(
    folder: Path, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = __import__("peft.utils", fromlist=["x"]).resolve_quantization_backend

    def resolve(layer: nn.Module, **kwargs: Any) -> Any:
        return ForwardOnlyQuantizationBackend("gptq") if isinstance(layer, OnlyForward) else real(layer, **kwargs)

    monkeypatch.setattr("peft_svf.tuner.model.resolve_quantization_backend", resolve)
    base = full_model()
    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            bias = torch.randn(module.out_features) * 0.1 if with_bias else None
            base.set_submodule(name, OnlyForward(module.weight.detach(), bias))
    plain = logits(base)
    own = config(folder)
    own.target_modules = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder / "expert", config=own)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    if not with_bias:
        exact = logits(PeftModel.from_pretrained(full_model(), folder / "expert"))
        assert difference(logits(model), exact) < 0.05
    for layer in (layer for layer in model.modules() if isinstance(layer, SVFLayer)):
        x, delta = torch.randn(3, layer.in_features), layer.summed_delta(["default"])
        assert delta is not None
        expected = nn.functional.linear(x, layer.effective_weight(delta), layer.bias)
        assert layer(x).detach() == pytest.approx(expected.detach(), abs=1e-4)
    layers = svf_layers(model)
    layers[0].quantization_backend = None  # the others would be merged for good
    layers[0].base_layer = nn.Linear(layers[0].in_features, layers[0].out_features)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(TypeError, match=r"is quantized \(gptq\), and PEFT cannot quantize a merged weight"):
            merge()
        assert svf_layers(model) == layers
        assert not any(layer.merged for layer in layers)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_where_accelerate_moves_things(folder: Path, kind: str) -> None:
    base = dispatch_model(quantized(folder, kind), {"": "cpu"}, force_hooks=True)
    model = PeftModel.from_pretrained(base, folder / "expert", config=config(folder))
    before = logits(model)
    model.merge_adapter()
    assert difference(logits(model), before) < COARSE[kind]
    model.unmerge_adapter()
    assert difference(logits(model), before) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_saves_the_adapter_and_holds_nothing_else(folder: Path, kind: str, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(quantized(folder, kind), folder / "expert", config=config(folder))
    names = [name for name, _ in model.named_parameters()]
    model.merge_adapter()
    assert [name for name, _ in model.named_parameters()] == names
    model.save_pretrained(tmp_path)
    saved, expected = (load_file(where / "adapter_model.safetensors") for where in (tmp_path, folder / "expert"))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in saved)
    old = [weakref.ref(layer.merge_state.quantized._weight) for layer in svf_layers(model)]
    merged = model.merge_and_unload()
    del model
    gc.collect()
    assert not any(reference() is not None for reference in old)
    assert torch.isfinite(logits(merged)).all()


def test_an_error_while_merging_leaves_the_layer_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = PeftModel.from_pretrained(quantized(folder, "nf4"), folder / "expert", config=config(folder))
    before = logits(model)

    def fails(*args: Any) -> float:
        raise MemoryError

    monkeypatch.setattr("peft_svf.tuner.layer.kept_fraction", fails)
    with pytest.raises(MemoryError):
        model.merge_adapter()
    assert not any(layer.merged for layer in svf_layers(model))
    assert difference(logits(model), before) < 1e-5


def test_low_cpu_mem_usage(folder: Path) -> None:
    for kind in ("int8", "nf4", "torchao int8"):
        options = {"config": config(folder)}
        model = PeftModel.from_pretrained(quantized(folder, kind), folder / "expert", **options)
        there = PeftModel.from_pretrained(
            quantized(folder, kind), folder / "expert", low_cpu_mem_usage=True, config=config(folder)
        )
        assert difference(logits(there), logits(model)) < 1e-5


def test_weights_that_peft_does_not_know_to_be_quantized(folder: Path, tmp_path: Path) -> None:
    class FP8Linear(nn.Linear):
        """As that of transformers: codes and their scales."""

    base = full_model()
    layer = FP8Linear(64, 128, bias=False)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    base.model.layers[0].mlp.up_proj = layer
    with pytest.raises(TypeError, match=r"up_proj is quantized \(FP8Linear, torch.float8_e4m3fn\)"):
        get_peft_model(base, SVFConfig(target_modules="all-linear"))

    class Codes(torch.Tensor):
        """As those of quanto, which say that they are floats."""

    base = full_model()
    weight = base.model.layers[0].mlp.up_proj.weight.detach().as_subclass(Codes)
    base.model.layers[0].mlp.up_proj._parameters["weight"] = weight
    with pytest.raises(TypeError, match="up_proj is quantized"):
        get_peft_model(base, SVFConfig(target_modules="all-linear"))
    shutil.copytree(folder / "model", tmp_path / "model")
    about = json.loads((tmp_path / "model" / "config.json").read_text())
    about["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"is quantized \(fp8\), so its files do not hold its weights"):
        decompose(tmp_path / "model", tmp_path / "pack")
    with pytest.raises(ValueError, match=r"is quantized \(fp8\)"):
        merge_to_folder(folder / "expert", tmp_path / "merged", tmp_path / "model")


def test_coarser_rounding_needs_to_be_asked_for(folder: Path) -> None:
    def two_bits() -> Any:
        base = full_model()
        for layer in base.model.layers:
            weight = layer.mlp.up_proj.weight.detach()
            scale = weight.abs().amax(dim=1, keepdim=True)
            layer.mlp.up_proj = OnlyForward((weight / scale * 1.5).round() / 1.5 * scale, None)
        return base

    pack = BasisPack(folder / "pack")
    weight = two_bits().model.layers[0].mlp.up_proj(torch.eye(64)).mT.contiguous()
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(ValueError, match=r"made from other weights.*base_check=\"warn\""):
        pack.basis_for(weight, name=name, quantized=True)
    with pytest.warns(UserWarning, match="made from other weights"):
        pack.basis_for(weight, name=name, quantized=True, base_check="warn")
    weight[0, 0] = torch.nan
    for quantized_weight in (True, False):
        with pytest.raises(ValueError, match="made from other weights"):
            pack.basis_for(weight, name=name, quantized=quantized_weight, base_check="warn")


@pytest.mark.parametrize("kind", ["int8", "torchao int8"])
def test_a_fine_rounding_of_similar_weights_is_told_apart(folder: Path, kind: str, tmp_path: Path) -> None:
    near = full_model()
    torch.manual_seed(3)
    for parameter in near.parameters():
        parameter.data += 0.2 * parameter.std() * torch.randn_like(parameter)
    near.save_pretrained(tmp_path / "near")
    decompose(tmp_path / "near", tmp_path / "pack")
    with pytest.raises(ValueError, match="made from other weights"):
        PeftModel.from_pretrained(
            quantized(folder, kind), folder / "expert", config=config(folder, basis=str(tmp_path / "pack"))
        )


def test_what_is_switched_off_comes_back(folder: Path) -> None:
    base = quantized(folder, "nf4")
    layers = [module for module in base.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    assert len(layers) == 14
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True  # whatever this CPU can do
    with pytest.raises(ValueError, match="is quantized"):
        get_peft_model(base, SVFConfig(target_modules="all-linear"))
    assert all(layer.support_avx512bf16_for_cpu for layer in layers)
    model = PeftModel.from_pretrained(base, folder / "expert", config=config(folder))
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    model.unload()
    assert all(layer.support_avx512bf16_for_cpu for layer in layers)


def test_the_pack_of_the_environment_is_for_quantized_models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_SVF_BASIS", str(folder / "pack"))
    get_peft_model(tiny_llama(), SVFConfig(target_modules="all-linear"))  # of other shapes


def test_plain_models_do_not_import_the_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("peft_svf.tuner.model.resolve_quantization_backend", never)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(full_model(), SVFConfig(target_modules="all-linear"))
