"""An adapter on a base model that accelerate has offloaded before, to the CPU or to disk."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from helpers import IDS, adapted, deltas, logits, randomise, tiny_llama
from peft import PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from peft_svf import SVFConfig


def with_biases() -> PreTrainedModel:
    """Qwen2 has biases on the projections whose gate is on the output, and here a tied embedding."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def with_conv1d() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()


def to_cpu(model: PreTrainedModel, folder: Path) -> Any:
    return cpu_offload(model, execution_device=torch.device("cpu"))


def to_disk(model: PreTrainedModel, folder: Path) -> Any:
    return disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def some_to_disk(model: PreTrainedModel, folder: Path) -> Any:
    """As `from_pretrained(device_map=...)` does: PEFT then dispatches the model again."""
    body = next(iter(dict(model.named_children())))
    device_map = {"lm_head": "cpu"} | {
        f"{body}.{name}": "cpu" for name, _ in model.get_submodule(body).named_children()
    }
    device_map[next(name for name in device_map if name.endswith((".layers", ".h")))] = "disk"  # type: ignore[assignment]
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("offload", [to_cpu, to_disk, some_to_disk])
@pytest.mark.parametrize("make", [tiny_llama, with_biases, with_conv1d])
def test_everything_works_on_an_offloaded_base(
    make: Callable[[], PreTrainedModel], offload: Callable[..., Any], tmp_path: Path
) -> None:
    reference, base = adapted(make()), logits(make())
    reference.save_pretrained(tmp_path / "a")
    a = logits(reference)
    randomise(reference, seed=5).save_pretrained(tmp_path / "b")
    b = logits(reference)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT and accelerate, about devices
        model = PeftModel.from_pretrained(offload(make(), tmp_path / "offloaded"), tmp_path / "a").eval()
        model.load_adapter(tmp_path / "b", "b")
    torch.testing.assert_close(logits(model), a)
    rows = logits(model, adapter_names=["default", "b"])
    torch.testing.assert_close(rows, torch.stack([a[0], b[1]]))
    model.set_adapter("b")
    torch.testing.assert_close(logits(model), b)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(delta.grad.any() for delta in deltas(model, "b").values())
    model.save_pretrained(tmp_path / "saved", selected_adapters=["b"])
    again = PeftModel.from_pretrained(make(), tmp_path / "saved" / "b").eval()
    torch.testing.assert_close(logits(again), b)

    before = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), b, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    model.merge_adapter()
    with model.disable_adapter():  # which unmerges
        torch.testing.assert_close(logits(model), base, rtol=0, atol=0)
    torch.testing.assert_close(logits(model.merge_and_unload()), b, rtol=0, atol=1e-5)


def test_a_new_adapter_on_an_offloaded_base_starts_as_the_base_model() -> None:
    base = logits(tiny_llama())
    model = get_peft_model(to_cpu(tiny_llama(), Path()), SVFConfig(target_modules="all-linear"))
    assert torch.equal(logits(model), base)
    assert not any(delta.is_meta for delta in deltas(model).values())
