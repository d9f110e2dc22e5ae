"""SVF through transformers' own adapter calls, without a `PeftModel`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import IDS, deltas, logits, randomise, tiny_llama
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, pipeline

from peft_svf import SVFConfig, SVFLayer

CONFIG = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
KEYS = {
    f"model.layers.{i}.{module}.svf_delta.weight"
    for i in (0, 1)
    for module in (
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    )
}


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    """`tiny_llama()` with a tokenizer of single characters."""
    alphabet = ["<s>", "<pad>", "</s>", *"abcdefghijklmnopqrstuvwxyz0123456789 +-*/=?!.,:;()'ABCDEFGHI"]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(alphabet[:64])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="?"
    ).save_pretrained(tmp_path / "base")
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter_folder(base_folder: Path, tmp_path: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    model.add_adapter(SVFConfig(**CONFIG))
    randomise(model).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def expected(adapter_folder: Path) -> torch.Tensor:
    """Logits of the base with the adapter, by PEFT's own loader."""
    return logits(PeftModel.from_pretrained(tiny_llama(), adapter_folder))


@pytest.fixture
def log() -> Iterator[list[str]]:
    """What transformers logs as a warning or worse; its load report is one."""
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, handler = logging.getLogger("transformers"), Collect(level=logging.WARNING)
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def about_adapters(log: list[str]) -> list[str]:
    return [message for message in log if any(word in message for word in ("svf", "basis", "LOAD REPORT", "MISSING"))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("never_fold")
def test_add_adapter(dtype: torch.dtype) -> None:
    model = tiny_llama(dtype=dtype)
    before = logits(model)
    model.add_adapter(SVFConfig(**CONFIG))
    assert torch.equal(logits(model), before)
    assert {delta.dtype for delta in deltas(model).values()} == {torch.float32}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.svf_delta.default.weight" for name in deltas(model)
    }
    assert len(deltas(model)) == 14
    randomise(model)
    changed = logits(model)
    assert not torch.equal(changed, before)

    model.disable_adapters()
    assert torch.equal(logits(model), before)
    model.enable_adapters()
    assert torch.equal(logits(model), changed)


def test_several_adapters() -> None:
    model = tiny_llama()
    before = logits(model)
    model.add_adapter(SVFConfig(**CONFIG), "first")
    first = logits(randomise(model, "first"))
    model.add_adapter(SVFConfig(target_modules=["q_proj", "up_proj"], r=5), "second")
    assert model.active_adapters() == ["second"]
    second = logits(randomise(model, "second", seed=2))
    model.set_adapter("first")
    assert torch.equal(logits(model), first)
    model.set_adapter(["first", "second"])
    both = logits(model)
    assert not torch.equal(both, first)
    assert not torch.equal(both, second)

    model.delete_adapter("first")
    model.set_adapter("second")
    torch.testing.assert_close(logits(model), second, rtol=0, atol=1e-6)
    assert not deltas(model, "first")
    model.delete_adapter("second")
    assert torch.equal(logits(model), before)
    assert not [n for n, _ in model.named_parameters() if "svf" in n or "basis" in n]
    model.add_adapter(SVFConfig(**CONFIG), "first")
    assert torch.equal(logits(randomise(model, "first")), first)


@pytest.mark.parametrize("call", ["set_adapter", "delete_adapter"])
def test_an_unknown_name(call: str) -> None:
    model = tiny_llama()
    model.add_adapter(SVFConfig(**CONFIG))
    with pytest.raises(ValueError, match="nope"):
        getattr(model, call)("nope")


def test_the_adapter_s_state_dict_is_delta() -> None:
    model = tiny_llama()
    model.add_adapter(SVFConfig(**CONFIG), "first")
    model.add_adapter(SVFConfig(target_modules=["q_proj"]), "second")
    assert set(model.get_adapter_state_dict("first")) == KEYS
    assert set(model.get_adapter_state_dict()) == {key for key in KEYS if "q_proj" in key}


def test_save_pretrained_after_add_adapter(adapter_folder: Path) -> None:
    assert {path.name for path in adapter_folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (adapter_folder / "model.safetensors").exists()
    assert set(load_file(adapter_folder / "adapter_model.safetensors")) == {f"base_model.model.{key}" for key in KEYS}
    config = json.loads((adapter_folder / "adapter_config.json").read_text())
    assert len(config["base_fingerprint"]) == 14
    assert "runtime_config" not in config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_adapter(adapter_folder: Path, log: list[str], dtype: torch.dtype) -> None:
    model = tiny_llama(dtype=dtype)
    info = model.load_adapter(str(adapter_folder))
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert not about_adapters(log)
    reference = PeftModel.from_pretrained(tiny_llama(dtype=dtype), adapter_folder)
    assert torch.equal(logits(model), logits(reference))
    assert {delta.dtype for delta in deltas(model).values()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in model.parameters() if parameter.dtype == torch.float16)
    assert not any(delta.requires_grad for delta in deltas(model).values())


def test_load_a_second_adapter(adapter_folder: Path, expected: torch.Tensor, log: list[str]) -> None:
    model = tiny_llama()
    model.add_adapter(SVFConfig(target_modules=["q_proj"]), "first")
    first = logits(randomise(model, "first", seed=2))
    info = model.load_adapter(str(adapter_folder), "second")
    # transformers reports the δ of the other adapters as missing, with every method
    assert not [key for key in info.missing_keys if "basis" in key or "second" in key]
    assert not [message for message in log if "basis" in message]
    model.set_adapter("second")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
    model.set_adapter("first")
    torch.testing.assert_close(logits(model), first, rtol=0, atol=1e-6)


def test_load_an_adapter_for_training(adapter_folder: Path) -> None:
    model = tiny_llama()
    model.load_adapter(str(adapter_folder), is_trainable=True)
    model(IDS, labels=IDS).loss.backward()
    assert all(delta.grad is not None and delta.grad.abs().sum() > 0 for delta in deltas(model).values())
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        f"{name}.svf_delta.default.weight" for name in deltas(model)
    }


def test_load_an_adapter_from_memory(expected: torch.Tensor, adapter_folder: Path) -> None:
    model = tiny_llama()
    state = load_file(adapter_folder / "adapter_model.safetensors")
    info = model.load_adapter(peft_config=SVFConfig(**CONFIG), adapter_state_dict=state)
    assert not info.missing_keys
    assert torch.equal(logits(model), expected)


def test_load_adapter_for_another_base(adapter_folder: Path) -> None:
    model = tiny_llama(seed=1)
    before = logits(model)
    with pytest.raises(ValueError, match=r"another base model.*self_attn\.q_proj"):
        model.load_adapter(str(adapter_folder))
    assert not any(isinstance(module, SVFLayer) for module in model.modules())
    assert torch.equal(logits(model), before)
    model.add_adapter(SVFConfig(**CONFIG))  # a second attempt is possible


@pytest.mark.parametrize("first", [True, False])
def test_a_failing_add_adapter(first: bool) -> None:
    model = tiny_llama()
    if not first:
        model.add_adapter(SVFConfig(target_modules=["q_proj"]), "apart")
        model.add_adapter(SVFConfig(target_modules=["q_proj", "k_proj"]), "busy")
        randomise(randomise(model, "apart"), "busy", seed=2)
    before = logits(model)
    modules = [(name, type(module)) for name, module in model.named_modules()]
    weight = model.model.layers[1].mlp.up_proj.weight
    kept = weight[0, 0].item()
    weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj holds 1 NaN or Inf"):
        model.add_adapter(SVFConfig(**CONFIG), "second")
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    weight.data[0, 0] = kept
    assert torch.equal(logits(model), before)
    model.add_adapter(SVFConfig(**CONFIG), "second")
    assert torch.equal(logits(model), logits(tiny_llama()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_model_from_an_adapter_folder(
    base_folder: Path, adapter_folder: Path, log: list[str], dtype: torch.dtype
) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(adapter_folder, dtype=dtype, output_loading_info=True)
    assert isinstance(model, PreTrainedModel)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not about_adapters(log)
    assert model.dtype == dtype
    assert {delta.dtype for delta in deltas(model).values()} == {torch.float32}
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype)  # whose rotary frequencies stay in fp32
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(base, adapter_folder)))


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}])
def test_auto_peft_model(adapter_folder: Path, expected: torch.Tensor, options: dict[str, bool]) -> None:
    model = AutoPeftModelForCausalLM.from_pretrained(adapter_folder, **options)
    assert torch.equal(logits(model), expected)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert len(deltas(model)) == 14
    assert all(delta.requires_grad == ("is_trainable" in options) for delta in deltas(model).values())


def test_pipeline(adapter_folder: Path, base_folder: Path, log: list[str]) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    generate = pipeline("text-generation", model=str(adapter_folder), tokenizer=str(base_folder))
    assert len(deltas(generate.model)) == 14
    (answer,) = generate("what is 2+2?", **options)
    plain = pipeline("text-generation", model=str(base_folder), tokenizer=str(base_folder))
    tokens = plain.tokenizer("what is 2+2?", return_tensors="pt")
    by_hand = PeftModel.from_pretrained(tiny_llama(), adapter_folder).generate(
        **tokens, max_new_tokens=6, do_sample=False
    )
    text = plain.tokenizer.decode(by_hand[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer["generated_text"] == text
    assert not about_adapters(log)


def test_generate_with_and_without_the_adapter() -> None:
    model = tiny_llama()
    plain = model.generate(IDS, max_new_tokens=12, do_sample=False)
    model.add_adapter(SVFConfig(**CONFIG))
    assert torch.equal(model.generate(IDS, max_new_tokens=12, do_sample=False), plain)
    randomise(model)
    for delta in deltas(model).values():
        delta.data.mul_(4)
    cached = model.generate(IDS, max_new_tokens=12, do_sample=False)
    assert not torch.equal(cached, plain)
    assert torch.equal(model.generate(IDS, max_new_tokens=12, do_sample=False, use_cache=False), cached)
