"""The worker's manager of experts in a stand-in of vLLM: the same outputs as PEFT's rows, layer by layer."""

from __future__ import annotations

import base64
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm_stand_in
from helpers import base_model, save_expert
from peft import PeftModel
from safetensors.torch import load_file, save, save_file
from vllm_stand_in import FusedLlama, LoRARequest, engine_config

from peft_svf import SVFConfig
from peft_svf.interop import decompose
from peft_svf.serving import options

FUSED = {
    "self_attn.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attn.o_proj": ["self_attn.o_proj"],
    "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down_proj": ["mlp.down_proj"],
}
TOKENS = ["a", "", "b", "mixture", "a", ""]
MIXTURE = {"a": 0.7, "b": -0.4}


@pytest.fixture(scope="module")
def root(tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("worker")
    base_model().save_pretrained(folder / "model")
    for seed, name in enumerate("ab"):
        config = SVFConfig(target_modules="all-linear", task_type="CAUSAL_LM")
        save_expert(folder / name, config, seed=seed)
    save_expert(folder / "narrow", SVFConfig(target_modules=["down_proj"], r=3, task_type="CAUSAL_LM"), seed=5)
    decompose(folder / "model", folder / "pack", target_modules="all-linear")
    return folder


@pytest.fixture(scope="module")
def reference(root: Path) -> Any:
    model: Any = PeftModel.from_pretrained(base_model(), root / "a", adapter_name="a")
    model.load_adapter(root / "b", adapter_name="b")
    model.add_weighted_adapter(list(MIXTURE), list(MIXTURE.values()), "mixture")
    return model.eval().base_model.model


@pytest.fixture
def manager_of(root: Path, monkeypatch: Any) -> Any:
    vllm_stand_in.install(monkeypatch)
    monkeypatch.setattr(options, "installed_vllm", lambda: "0.32.0")

    def start(quantized: bool = False, targets: Any = None, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
        from peft_svf.serving.manager import SVFWorkerManager

        config = engine_config(str(root / "model"), **settings)
        config.lora_config.target_modules = targets
        if quantized:
            config.model_config.hf_config.quantization_config = {}
        manager = SVFWorkerManager(config, torch.device("cpu"), {})
        manager.model = manager.create_lora_manager(FusedLlama(base_model().to(dtype), quantized), config)
        return manager

    return start


def load(manager: Any, root: Path) -> dict[str, Any]:
    requests = {name: LoRARequest(name, number, str(root / name)) for number, name in enumerate("ab", 3)}
    requests["mixture"] = LoRARequest("mixture", 9, "peft-svf:a=0.7,b=-0.4")
    for request in requests.values():
        manager.add_adapter(request)
    return requests


def step(manager: Any, requests: dict[str, Any], names: list[str]) -> None:
    numbers = [requests[name].lora_int_id if name else 0 for name in names]
    wanted = {requests[name] for name in names if name}
    manager.set_active_adapters(wanted, SimpleNamespace(index_mapping=tuple(numbers)))


@torch.no_grad()
def check(manager: Any, reference: Any, names: list[str]) -> None:
    """Each fused layer gives what the layers of PEFT give with these experts."""
    for number in range(2):
        for fused, parts in FUSED.items():
            layer = manager.model.get_submodule(f"model.layers.{number}.{fused}")
            x = torch.randn(len(names), layer.input_size, generator=torch.Generator().manual_seed(number))
            modules = [reference.get_submodule(f"model.layers.{number}.{part}") for part in parts]
            weights = {
                name: torch.cat([m.base_layer.weight + (m.get_delta_weight(name) if name else 0) for m in modules])
                for name in set(names)
            }
            expected = torch.stack([weights[name] @ row for name, row in zip(names, x, strict=True)])
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "quantized"])
@pytest.mark.parametrize("pack", [False, True], ids=["decomposed", "pack"])
def test_a_step_of_experts_mixtures_and_base_rows(
    manager_of: Any, reference: Any, root: Path, quantized: bool, pack: bool, tmp_path: Path
) -> None:
    if quantized and not pack:
        with pytest.raises(ValueError, match="Name the basis pack of its full-precision model"):
            manager_of(quantized=True)
        return
    manager = manager_of(
        quantized, basis=str(root / "pack") if pack else None, cache_dir=str(tmp_path), roots=[str(root)]
    )
    requests = load(manager, root)
    step(manager, requests, TOKENS)
    check(manager, reference, TOKENS)
    step(manager, requests, ["", ""])
    check(manager, reference, ["", ""])
    assert manager.list_adapters() == {3, 4, 9}
    assert manager.pin_adapter(3)
    assert not manager.pin_adapter(5)
    assert manager.remove_adapter(4)
    assert not manager.remove_adapter(4)


def test_fewer_slots_than_experts(manager_of: Any, reference: Any, root: Path) -> None:
    manager = manager_of(slots=2, basis=str(root / "pack"))
    requests = load(manager, root)
    for names in (["a", "mixture"], ["b", "", "a"], ["mixture", "b"]):
        step(manager, requests, names)
        check(manager, reference, names)
    memory = manager.memory()
    assert (memory["loaded"], memory["resident"]) == (3, 2)
    assert memory["slot_bytes"] == sum(manager.served.lengths.values()) * 4
    assert memory["table_bytes"] == 3 * memory["slot_bytes"]
    assert memory["host_bytes"] == 2 * memory["slot_bytes"]  # the mixture has none


def test_some_modules_and_singular_values(manager_of: Any, root: Path) -> None:
    manager = manager_of(basis=str(root / "pack"), targets=["down_proj", "qkv_proj"], r=3)
    assert {name.rpartition(".")[2] for name in manager.served.lengths} == {"down_proj", "q_proj", "k_proj", "v_proj"}
    manager.add_adapter(LoRARequest("narrow", 1, str(root / "narrow")))
    with pytest.raises(ValueError, match=r"adapts \d+ modules that have no gate in this engine"):
        manager.add_adapter(LoRARequest("a", 2, str(root / "a")))
    assert manager.list_adapters() == {1}


def test_one_folded_expert(manager_of: Any, reference: Any, root: Path) -> None:
    manager = manager_of(basis=str(root / "pack"))
    requests = load(manager, root)
    step(manager, requests, TOKENS)
    layers = [method.layer for method in manager.methods]
    inputs = [torch.randn(len(TOKENS), layer.input_size) for layer in layers]
    before = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    for name in ("mixture", "a"):
        manager.fold(name)
        step(manager, requests, [name] * 3)
        assert manager.table.folded
        check(manager, reference, [name] * 3)
        step(manager, requests, TOKENS)
        assert not manager.table.folded
        check(manager, reference, TOKENS)
    manager.fold(None)
    step(manager, requests, TOKENS)
    assert all(torch.equal(layer(x), y) for layer, x, y in zip(layers, inputs, before, strict=True))
    with pytest.raises(ValueError, match="There is no expert 'c'"):
        manager.fold("c")
    manager.fold("a")
    manager.remove_all_adapters()
    assert all(method.linear.folded is None for method in manager.methods)


def test_what_cannot_be_folded(manager_of: Any, root: Path) -> None:
    quantized = manager_of(quantized=True, basis=str(root / "pack"))
    load(quantized, root)
    with pytest.raises(ValueError, match=r"qkv_proj is quantized, so it cannot fold 'a'"):
        quantized.fold("a")
    manager = manager_of(basis=str(root / "pack"))
    load(manager, root)
    manager._captures = True
    with pytest.raises(ValueError, match="Captured graphs do not see a folded expert"):
        manager.fold("a")
    with pytest.raises(RuntimeError, match="serves experts, so its weights cannot be replaced"):
        manager.methods[0].process_weights_after_loading(manager.methods[0].layer)


def test_rounding_that_would_lose_an_expert(manager_of: Any, root: Path, tmp_path: Path) -> None:
    manager = manager_of(dtype=torch.bfloat16, cache_dir=str(tmp_path), base_check="ignore")
    load(manager, root)
    manager.fold("a")
    tensors = load_file(root / "a" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"Folding 'a' in torch.bfloat16 would lose \d+% of its change in model"):
        manager.update("a", {key: tensor * 1e-3 for key, tensor in tensors.items()})
    assert all(method.linear.folded is None for method in manager.methods)


def test_new_values_reach_slots_mixtures_and_folded_weights(manager_of: Any, reference: Any, root: Path) -> None:
    from peft_svf.serving.worker import SVFWorker

    manager = manager_of(basis=str(root / "pack"))
    requests = {
        "live": LoRARequest("live", 1, "peft-svf:"),
        "double": LoRARequest("double", 2, "peft-svf:live=1"),
    }
    for request in requests.values():
        manager.add_adapter(request)
    step(manager, requests, ["live", "double"])
    check(manager, reference, ["", ""])
    worker = SVFWorker()
    worker.model_runner = SimpleNamespace(lora_manager=manager)
    content = save(load_file(root / "a" / "adapter_model.safetensors"))
    worker.peft_svf_update("live", content)
    check(manager, reference, ["a", "a"])
    worker.peft_svf_fold("double")
    other = save(load_file(root / "b" / "adapter_model.safetensors"))
    worker.peft_svf_update_text("live", base64.b64encode(other).decode())
    step(manager, requests, ["double"])
    assert manager.table.folded
    check(manager, reference, ["b"])
    assert worker.peft_svf_memory()["loaded"] == 2
    broken = {key: tensor / 0 for key, tensor in load_file(root / "a" / "adapter_model.safetensors").items()}
    with pytest.raises(ValueError, match="The new δ of 'live' has NaN or Inf"):
        worker.peft_svf_update("live", save(broken))
    with pytest.raises(ValueError, match="There is no expert 'other'"):
        worker.peft_svf_update("other", content)
    check(manager, reference, ["b"])


def test_loading_in_a_step_and_in_place(manager_of: Any, reference: Any, root: Path, tmp_path: Path) -> None:
    manager = manager_of(basis=str(root / "pack"), roots=[str(root), str(tmp_path)])
    requests = {"a": LoRARequest("a", 1, str(root / "a"))}
    step(manager, requests, ["a"])  # was not added before
    check(manager, reference, ["a"])
    (tmp_path / "b").mkdir()
    for file in (root / "b").iterdir():
        (tmp_path / "b" / file.name).write_bytes(file.read_bytes())
    other = LoRARequest("a", 1, str(tmp_path / "b"))
    manager.add_adapter(other)  # known: nothing is read
    check(manager, reference, ["a"])
    manager.add_adapter(LoRARequest("a", 1, str(tmp_path / "b"), load_inplace=True))
    check(manager, reference, ["b"])
    save_file(load_file(root / "a" / "adapter_model.safetensors"), tmp_path / "b" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="has changed since it was first loaded"):
        manager.add_adapter(LoRARequest("a", 1, str(tmp_path / "b"), load_inplace=True))
    check(manager, reference, ["b"])
    with pytest.raises(ValueError, match="is not in a folder that experts may be loaded from"):
        manager.add_adapter(LoRARequest("x", 2, str(tmp_path.parent / "elsewhere")))


def test_the_warm_up_of_vllm(manager_of: Any, root: Path) -> None:
    manager = manager_of(slots=3, basis=str(root / "pack"))
    dummies = {f"warmup_{i}": LoRARequest(f"warmup_{i}", i, "/not/a/real/path") for i in (1, 2, 3)}
    with manager.dummy_lora_cache():
        for request in dummies.values():
            assert manager.add_dummy_lora(request, rank=manager.get_dummy_lora_warmup_rank(8))
    step(manager, dummies, list(dummies))
    assert manager.table.in_use
    manager.remove_all_adapters()
    assert manager.list_adapters() == set()
    assert not manager.table.in_use
    manager.add_adapter(LoRARequest("a", 1, str(root / "a")))  # the number of a dummy


def test_a_pack_of_another_model(manager_of: Any, root: Path, tmp_path: Path) -> None:
    base_model(seed=7).save_pretrained(tmp_path / "model")
    decompose(tmp_path / "model", tmp_path / "pack")
    with pytest.raises(ValueError, match="was made from other weights"):
        manager_of(basis=str(tmp_path / "pack"))
    names = tmp_path / "names"
    decompose(root / "model", names, target_modules=["lm_head"])
    with pytest.raises(ValueError, match="No linear layer of FusedLlama has a basis"):
        manager_of(basis=str(names))
