"""Experts in the formats of others, and back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import logits, svf_layers, tiny_llama
from peft import IA3Config, LoraConfig, OFTConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_adaptation import make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from peft_svf import AdaptiveMixture, SVFConfig, SVFLayer, SVFRuntimeConfig
from peft_svf.interop import decompose, from_weights, import_expert, merge_to_folder, packs, to_lora
from peft_svf.interop.inspect import inspect_adapter
from peft_svf.spectral import BasisPack


def base_model(**changes: Any) -> Any:
    return tiny_llama(vocab_size=50, initializer_range=0.2, **changes)


def expert(base: Any, scale: float = 0.3, seed: int = 0, **options: Any) -> Any:
    """With random δ, some of them 0."""
    config = SVFConfig(**{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})
    model = get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(seed)
    for layer in svf_layers(model).values():
        delta = layer.svf_delta["default"].weight
        delta.data.copy_(scale * torch.randn(delta.shape, generator=generator))
    return model


# ------------------------------------------------------------------------------------------ LoRA


@pytest.mark.parametrize("r", [None, 5])
def test_an_exported_expert_computes_the_same(r: int | None, tmp_path: Path) -> None:
    model = expert(base_model(), r=r)
    export = to_lora(model)
    assert export.rank == (5 if r else max(min(layer.shape) for layer in svf_layers(model).values()))
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
    for name, layer in svf_layers(model).items():
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
    first = next(iter(svf_layers(model).values()))
    first.svf_delta["default"].weight.data[2:] = 0
    export = to_lora(model, energy=0.8)
    assert set(export.config.rank_pattern) == set(export.config.alpha_pattern) != set()
    for name, share in export.retained.items():
        singular = torch.linalg.svdvals(svf_layers(model)[name].get_delta_weight("default").double()).square()
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
        ({"adapter_name": "nobody"}, "'nobody' not found; there are default"),
        ({"adapter_name": []}, "No adapter is active"),
    ],
)
def test_what_cannot_be_exported(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_lora(expert(base_model()), **options)


def test_what_is_no_part_of_a_lora() -> None:
    with pytest.raises(ValueError, match="`bias`, which a LoRA cannot hold"):
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


# ------------------------------------------------------------------------------------------ the released code


def released_weight(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """As the released code composes it, in fp32. The decomposition is rounded from an fp64 one: two fp32 ones differ by
    more than what is compared here, as near-equal singular values turn into each other."""
    U, S, V = (part.float() for part in torch.svd(weight.double()))
    return (U @ torch.diag(S * mask) @ V.T) * (S.sum() / (S * mask).sum())


def mlp_names(base: Any) -> list[str]:
    return [name for name in base.state_dict() if "mlp" in name]


def logit_vectors(base: Any, seed: int = 0, spread: float = 0.3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: min(value.shape) for name, value in base.state_dict().items() if "mlp" in name}
    return {name: 0.1 + spread * torch.randn(k, generator=generator) for name, k in shapes.items()}


def expect(model: Any, expected: dict[str, torch.Tensor]) -> None:
    """That the effective weights are these, and no others are adapted."""
    found = svf_layers(model)
    assert {f"{name}.weight" for name in found} == set(expected)
    for name, layer in found.items():
        want = expected[f"{name}.weight"].double()
        delta = layer.svf_delta["default"].weight.detach()
        error = (layer.effective_weight(delta).double() - want).norm() / want.norm()
        assert error < 1e-6, name


def save_parameters(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """As the released code does, parameters and all."""
    torch.save({name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize("max_mult", [1.0, 2.0])
def test_vectors_by_name(max_mult: float, tmp_path: Path) -> None:
    base, vectors = base_model(), logit_vectors(base_model())
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    path = save_parameters(tmp_path / "learnable_params_1.pt", vectors)
    model = import_expert(path, base, max_mult=max_mult)
    expect(model, {name: released_weight(weights[name], max_mult * v.sigmoid()) for name, v in vectors.items()})


def test_vectors_by_place_in_any_order(tmp_path: Path) -> None:
    base, vectors = base_model(), logit_vectors(base_model())
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    places = {f"learnable_params_module_list.{i}": vectors[name] for i, name in enumerate(mlp_names(base))}
    path = save_parameters(tmp_path / "policy_params.pt", dict(reversed(places.items())))
    expect(import_expert(path, base), {n: released_weight(weights[n], v.sigmoid()) for n, v in vectors.items()})


@pytest.mark.parametrize("per_matrix", [True, False])
def test_a_mixture(per_matrix: bool, tmp_path: Path) -> None:
    base = base_model()
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    names, parts = mlp_names(base), [logit_vectors(base, seed, 0.03) for seed in range(3)]
    alpha = torch.rand(3, len(names) if per_matrix else 1, generator=torch.Generator().manual_seed(0))
    tensors = {f"weights_{k}_k_{n.replace('.', '_')}": part[n] for k, part in enumerate(parts) for n in names}
    path = save_parameters(tmp_path / "policy_params.pt", {"adaptive_weights": alpha, **tensors})
    expected = {}
    for i, name in enumerate(names):
        mask = sum(alpha[k, i if per_matrix else 0] * parts[k][name] for k in range(3))
        expected[name] = released_weight(weights[name], mask)
    expect(import_expert(path, base), expected)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_the_vector_of_trinity(suffix: str, tmp_path: Path) -> None:
    base = base_model(tie_word_embeddings=False)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    names = [name for name, w in weights.items() if w.ndim == 2 and ("layers" not in name or ".layers.1." in name)]
    assert names[0] == "model.embed_tokens.weight"
    assert names[-1] == "lm_head.weight"
    offsets = {name: 0.05 * torch.randn(min(weights[name].shape)) for name in names}
    vector = torch.cat([*offsets.values(), torch.randn(40)])
    path = tmp_path / f"model_iter{suffix}"
    if suffix == ".npy":
        np.save(path, vector.double().numpy())
    else:
        save_file({"trinity_router_es_vector": vector}, path)
    with pytest.raises(ValueError, match=r"changes model.embed_tokens, an embedding"), pytest.warns(match="40 values"):
        import_expert(path, base, layers=[1])
    with pytest.warns(match="40 values after those for singular values"):
        model = import_expert(path, base, layers=[1], skip=["model.embed_tokens"])
    expect(model, {name: released_weight(weights[name], 1 + offsets[name]) for name in names[1:]})


def test_a_decomposition_in_fp32_gives_nearly_the_same(tmp_path: Path) -> None:
    base, vectors = base_model(), logit_vectors(base_model())
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = import_expert(save_parameters(tmp_path / "learnable_params.pt", vectors), base)
    for name, layer in svf_layers(model).items():
        U, S, V = torch.svd(weights[f"{name}.weight"])
        mask = vectors[f"{name}.weight"].sigmoid()
        want = (U @ torch.diag(S * mask) @ V.T) * (S.sum() / (S * mask).sum())
        error = layer.effective_weight(layer.svf_delta["default"].weight.detach()) - want
        assert error.norm() / want.norm() < 1e-4


def test_an_imported_expert_is_an_ordinary_adapter(tmp_path: Path) -> None:
    path = save_parameters(tmp_path / "learnable_params.pt", logit_vectors(base_model()))
    model = import_expert(path, base_model())
    model.save_pretrained(tmp_path / "expert")
    again = PeftModel.from_pretrained(base_model(), tmp_path / "expert").eval()
    assert torch.equal(logits(again), logits(model))
    plain = import_expert(path, base_model(), parametrization="raw", normalize=False)
    layer = svf_layers(plain)["model.layers.0.mlp.up_proj"]
    vector = logit_vectors(base_model())["model.layers.0.mlp.up_proj.weight"]
    assert torch.allclose(layer.svf_delta["default"].weight, vector - 1)


class Payload:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('the payload ran')",))


def broken(kind: str, folder: Path) -> Path:
    """A file that must not be imported."""
    base, path = base_model(), folder / "learnable_params.pt"
    vectors: dict[str, Any] = logit_vectors(base)
    first = next(iter(vectors))
    if kind == "payload":
        torch.save({**vectors, "more": Payload()}, path)
        return path
    if kind == "object":
        torch.save({**vectors, "step": 3}, path)
        return path
    changed = {
        "wrong length": {**vectors, first: torch.zeros(7)},
        "unknown name": {**vectors, "model.layers.9.mlp.up_proj.weight": torch.zeros(7)},
        "nan": {**vectors, first: vectors[first] * float("nan")},
        "too few places": {f"learnable_params_module_list.{i}": v for i, v in enumerate([*vectors.values()][:-1])},
        "mixture of nothing": {"adaptive_weights": torch.ones(2, 5), "weights_0_k_x": torch.zeros(3)},
        "mixture columns": {
            "adaptive_weights": torch.ones(1, 5),
            **{f"weights_0_k_{n.replace('.', '_')}": v for n, v in vectors.items()},
        },
        "mixture parts": {
            "adaptive_weights": torch.ones(2, 1),
            **{f"weights_0_k_{n.replace('.', '_')}": v for n, v in vectors.items()},
        },
    }
    save_parameters(path, changed.get(kind, vectors))
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-500])
    if kind == "text":
        path.write_text("a text")
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("payload", "holds Python objects"),
        ("object", "'step': int; expected tensors by name"),
        ("wrong length", "has a vector of shape .7,. for model.layers.0.mlp.gate_proj.weight, which has 32"),
        ("unknown name", "'model.layers.9.mlp.up_proj.weight', which the model does not have"),
        ("nan", "NaN or Inf for model.layers.0"),
        ("too few places", "has 5 vectors, up to position 4, but the model has 6"),
        ("mixture of nothing", "'weights_0_k_x', which fits no weight"),
        ("mixture columns", r"shape \(1, 5\) for 6 matrices"),
        ("mixture parts", r"parts \[0\] for model.layers.0.*; expected 2"),
        ("truncated", "is damaged or not a file of tensors"),
        ("text", "holds Python objects|is damaged"),
    ],
)
def test_files_that_are_refused(kind: str, message: str, tmp_path: Path) -> None:
    base = base_model()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        import_expert(broken(kind, tmp_path), base)
    assert base.state_dict().keys() == before.keys()


def test_more_that_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="is damaged or not a file of tensors"):
        import_expert(tmp_path / "objects.npy", base_model())
    np.save(tmp_path / "short.npy", np.zeros(5))
    with pytest.raises(ValueError, match="has 5 values, but the"):
        import_expert(tmp_path / "short.npy", base_model(), layers=[0])
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt"):
        import_expert(tmp_path / "nothing.pt", base_model())
    path = save_parameters(tmp_path / "zero.pt", {n: 0 * v for n, v in logit_vectors(base_model()).items()})
    with pytest.raises(ValueError, match="sums to 0"):
        import_expert(path, base_model(), parametrization="raw")
    with pytest.raises(ValueError, match="got 'cosine'"):
        import_expert(path, base_model(), parametrization="cosine")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------ fine-tuned models


def test_a_model_that_an_expert_made_is_explained_entirely(tmp_path: Path) -> None:
    model = expert(base_model(), scale=0.1)
    want = {name: layer.svf_delta["default"].weight.detach().clone() for name, layer in svf_layers(model).items()}
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "one")
    merged.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    for finetuned in (merged, tmp_path / "one", str(tmp_path / "shards")):
        found, explained = from_weights(finetuned, base_model())
        assert explained.overall == pytest.approx(1, abs=1e-5)
        assert min(explained.modules.values()) == pytest.approx(1, abs=1e-4)
        for name, layer in svf_layers(found).items():
            assert torch.allclose(layer.svf_delta["default"].weight, want[name], atol=1e-4)


@pytest.mark.parametrize("r", [None, 6])
def test_the_projection_is_the_least_squares_solution(r: int | None) -> None:
    base, finetuned = base_model(), base_model()
    for parameter in finetuned.parameters():
        generator = torch.Generator().manual_seed(parameter.numel())
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    config = SVFConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=r)
    model, explained = from_weights(finetuned, base, config)
    for name, layer in svf_layers(model).items():
        W = layer.get_base_layer().weight.double()
        D = finetuned.get_submodule(name).weight.double() - W
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        terms = torch.stack([S[i] * torch.outer(U[:, i], Vh[i]).flatten() for i in range(layer.rank("default"))], dim=1)
        solution = torch.linalg.lstsq(terms, D.flatten().unsqueeze(1)).solution.squeeze(1)
        found = layer.svf_delta["default"].weight.double()
        assert torch.allclose(found, solution, atol=1e-4 * float(solution.abs().max()))
        share = 1 - (terms @ solution - D.flatten()).square().sum() / D.square().sum()
        assert explained.modules[name] == pytest.approx(float(share), abs=1e-4)
    assert 0 < explained.overall < 0.2


def test_a_lora_as_an_expert(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    lora = get_peft_model(base_model(), config)
    lora.save_pretrained(tmp_path)
    model, explained = from_weights(lora, base_model())
    again, same = from_weights(tmp_path, base_model())
    assert same.overall == pytest.approx(explained.overall)
    assert 0 < explained.overall < 1
    for name, layer in svf_layers(again).items():
        other = svf_layers(model)[name].svf_delta["default"].weight
        assert torch.allclose(layer.svf_delta["default"].weight, other, atol=1e-6)
        assert bool(other.any()) == ("q_proj" in name or "down_proj" in name)


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gate_proj.weight has shape \(40, 32\) in the fine-tuned model and"):
        from_weights(base_model(intermediate_size=40), base_model(), SVFConfig(target_modules=["gate_proj"]))
    with pytest.raises(ValueError, match=r"no model.layers.1.* in the fine-tuned model"):
        from_weights(base_model(num_hidden_layers=1), base_model())
    with pytest.raises(ValueError, match=r"neither model\.safetensors"):
        from_weights(tmp_path, base_model())
    expert(base_model()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is an SVF adapter already"):
        from_weights(tmp_path, base_model())


# ------------------------------------------------------------------------------------------ merged models


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=32)).eval()


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("kind", ["llama", "bf16", "gpt2", "r"])
def test_merged_file_by_file_is_merged_in_memory(kind: str, shard: str, tmp_path: Path) -> None:
    def base() -> Any:
        return gpt2() if kind == "gpt2" else base_model(dtype=torch.bfloat16 if kind == "bf16" else torch.float32)

    base().save_pretrained(tmp_path / "base", max_shard_size=shard)
    make_tokenizer().save_pretrained(tmp_path / "base")
    options: dict[str, Any] = {"r": 6} if kind == "r" else {}
    if kind == "gpt2":
        options["target_modules"] = ["c_attn", "c_fc"]
    model = expert(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), **options)
    model.save_pretrained(tmp_path / "expert")
    found = merge_to_folder(tmp_path / "expert", tmp_path / "merged")
    assert found.folder == tmp_path / "merged"
    assert set(found.shares) == set(svf_layers(model))
    assert all(0.9 < share <= 1.001 for share in found.shares.values())
    again = merge_to_folder(tmp_path / "expert", tmp_path / "again", base=tmp_path / "base")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = model.merge_and_unload().state_dict()
    assert merged.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in merged.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").vocab_size == make_tokenizer().vocab_size
    for path in found.folder.iterdir():
        assert path.read_bytes() == (again.folder / path.name).read_bytes(), path.name
    assert not list(tmp_path.glob(".*"))


def test_a_small_change_of_16_bit_weights_is_said_to_be_lost(tmp_path: Path) -> None:
    base_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    expert(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), scale=1e-4).save_pretrained(tmp_path / "expert")
    with pytest.warns(UserWarning, match="too coarse for the change: as little as"):
        merge_to_folder(tmp_path / "expert", tmp_path / "merged")


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    base_model().save_pretrained(tmp_path / "base")
    base_model(seed=1).save_pretrained(tmp_path / "other")
    expert(AutoModelForCausalLM.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "expert")
    target = tmp_path / "merged"
    with pytest.raises(ValueError, match="made for another base model: 14 of 14 weights differ"):
        merge_to_folder(tmp_path / "expert", target, base=tmp_path / "other")
    with pytest.warns(UserWarning, match="made for another base model"):
        merge_to_folder(tmp_path / "expert", target, base=tmp_path / "other", base_check="warn")
    with pytest.raises(ValueError, match="is not an empty folder"):
        merge_to_folder(tmp_path / "expert", target)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text((tmp_path / "base" / "config.json").read_text())
    with pytest.raises(ValueError, match=r"neither model\.safetensors"):
        merge_to_folder(tmp_path / "expert", tmp_path / "x", base=tmp_path / "empty")
    get_peft_model(base_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"is a .*LORA adapter"):
        merge_to_folder(tmp_path / "lora", tmp_path / "x")
    expert(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), bias="svf_only").save_pretrained(tmp_path / "bias")
    tied = base_model(tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    expert(AutoModelForCausalLM.from_pretrained(tmp_path / "tied"), target_modules=["lm_head"]).save_pretrained(
        tmp_path / "head"
    )
    with pytest.raises(ValueError, match=r"lm_head shares its weight with model\.embed_tokens"):
        merge_to_folder(tmp_path / "head", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.glob(".*"))


# ------------------------------------------------------------------------------------------ basis packs


def with_pack(pack: Path, **options: Any) -> SVFConfig:
    return SVFConfig(
        target_modules="all-linear", task_type="CAUSAL_LM", runtime_config=SVFRuntimeConfig(basis=str(pack)), **options
    )


@pytest.mark.parametrize("kind", ["llama", "bf16", "gpt2"])
def test_a_pack_takes_the_place_of_the_decomposition(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = gpt2() if kind == "gpt2" else base_model(dtype=torch.bfloat16 if kind == "bf16" else torch.float32)
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    pack = decompose(tmp_path / "base", tmp_path / "pack")
    assert pack.about["base_model"] == str(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = svf_layers(get_peft_model(base, SVFConfig(target_modules="all-linear")))
    monkeypatch.setattr("peft_svf.tuner.layer.singular_basis", None)
    monkeypatch.setattr("peft_svf.spectral.cache.singular_basis", None)
    found = svf_layers(get_peft_model(again, with_pack(tmp_path / "pack")))
    assert found.keys() == expected.keys() == set(pack.modules)
    for name, layer in found.items():
        assert torch.equal(layer.basis, expected[name].basis), name
        assert layer.fingerprint("default") == expected[name].fingerprint("default")


def test_decomposing_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base_model().save_pretrained(tmp_path / "base")
    real, done = packs.singular_basis, []

    def counted(weight: Any, r: Any, *, name: str) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(name)
        return real(weight, r, name=name)

    monkeypatch.setattr(packs, "singular_basis", counted)
    with pytest.raises(KeyboardInterrupt):
        decompose(tmp_path / "base", tmp_path / "pack")
    with pytest.raises(ValueError, match="not a complete basis pack"):
        BasisPack(tmp_path / "pack")
    first = sorted((tmp_path / "pack").iterdir())[0]
    first.write_bytes(first.read_bytes()[:-10])  # a disk that was full
    again: list[str] = []
    monkeypatch.setattr(packs, "singular_basis", lambda w, r, *, name: (again.append(name), real(w, r, name=name))[1])
    pack = decompose(tmp_path / "base", tmp_path / "pack")
    assert len(pack.modules) == 14
    assert len(again) == 12
    again.clear()
    first.write_bytes(first.read_bytes()[:-1] + bytes([first.read_bytes()[-1] ^ 1]))  # a bit has flipped
    decompose(tmp_path / "base", tmp_path / "pack")
    assert len(again) == 1
    again.clear()
    decompose(tmp_path / "base", tmp_path / "pack", r=4)  # another setting
    assert len(again) == 14
    assert BasisPack(tmp_path / "pack").load("model.layers.0.mlp.up_proj", 32).vectors.shape == (32, 4)


def test_a_narrow_pack_and_its_adapters(tmp_path: Path) -> None:
    base_model().save_pretrained(tmp_path / "base")
    decompose(tmp_path / "base", tmp_path / "pack", r=4, dtype=torch.float16, target_modules=["up_proj", "q_proj"])
    config = with_pack(tmp_path / "pack", r=4)
    config.target_modules = {"up_proj"}
    assert set(svf_layers(get_peft_model(base_model(), config))) == {f"model.layers.{i}.mlp.up_proj" for i in (0, 1)}
    config = with_pack(tmp_path / "pack", r=5)
    config.target_modules = {"up_proj"}
    with pytest.raises(ValueError, match="has 4 singular vectors for model"):
        get_peft_model(base_model(), config)
    with pytest.raises(ValueError, match=r"has no basis for model\.layers\.0\..*; it has 4, such as"):
        get_peft_model(base_model(), with_pack(tmp_path / "pack", r=4))


def damaged(kind: str, pack: Path) -> None:
    index, first = pack / "basis.safetensors.index.json", pack / "basis-00001-of-00014.safetensors"
    content = json.loads(index.read_text())
    name = next(name for name, file in content["weight_map"].items() if file == first.name)
    if kind == "format":
        content["metadata"]["format"] = "another"
    if kind in ("elsewhere", "no file"):
        content["weight_map"][name] = {"elsewhere": "../base/model.safetensors", "no file": "gone.safetensors"}[kind]
    index.write_text("[]" if kind == "index" else json.dumps(content))
    tensors = load_file(first)
    with safe_open(first, framework="pt") as file:
        about = file.metadata()
    if kind == "shape":
        tensors["vectors"] = tensors["vectors"][:-1].contiguous()
    if kind == "spectrum":
        tensors["spectrum"] = tensors["spectrum"][:-1].contiguous()
    if kind == "nan":
        tensors["vectors"][0, 0] = float("nan")
    save_file(tensors, first, metadata=about)
    if kind == "short":
        first.write_bytes(first.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("index", "is not a complete basis pack"),
        ("format", "format 'another'. This version reads"),
        ("elsewhere", "names '../base/model.safetensors'"),
        ("no file", "is damaged: gone.safetensors cannot be read"),
        ("shape", r"basis of shape \[31, 32\] for .*, whose smaller side is 32"),
        ("spectrum", "no spectrum of 32 singular values"),
        ("nan", r"the checksum of basis-00001-of-00014\.safetensors differs"),
        ("short", "basis-00001-of-00014.safetensors cannot be read"),
    ],
)
def test_packs_that_are_refused(kind: str, message: str, tmp_path: Path) -> None:
    base_model().save_pretrained(tmp_path / "base")
    decompose(tmp_path / "base", tmp_path / "pack")
    damaged(kind, tmp_path / "pack")
    base = base_model()
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, with_pack(tmp_path / "pack"))
    assert not any(isinstance(module, SVFLayer) for module in base.modules())


def test_the_pack_of_another_model(tmp_path: Path) -> None:
    base_model().save_pretrained(tmp_path / "base")
    decompose(tmp_path / "base", tmp_path / "pack")
    with pytest.raises(ValueError, match=r"was made from other weights: ‖W‖_F of model\.layers"):
        get_peft_model(base_model(seed=1), with_pack(tmp_path / "pack"))
    with pytest.raises(ValueError, match="nowhere is not a complete basis pack"):
        get_peft_model(base_model(), with_pack(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no linear modules that match"):
        decompose(tmp_path / "base", tmp_path / "x", target_modules=["nothing"])
    with pytest.raises(ValueError, match="`r` must be at least 1"):
        decompose(tmp_path / "base", tmp_path / "x", r=0)


# ------------------------------------------------------------------------------------------ what was wrong once


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (LoraConfig(target_modules=["q_proj"], use_dora=True), "`use_dora`"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "`modules_to_save`"),
        (LoraConfig(target_modules=["q_proj"], bias="all"), "`bias`"),
        (OFTConfig(target_modules=["q_proj"], r=0, oft_block_size=4), "the method OFT"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "the method IA3"),
    ],
)
def test_adapters_that_are_more_than_a_sum_are_to_be_merged_first(config: Any, what: str, tmp_path: Path) -> None:
    other = get_peft_model(base_model(), config)
    other.save_pretrained(tmp_path)
    base = base_model()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    for finetuned in (other, tmp_path):
        with pytest.raises(ValueError, match=f"has {what}.*Merge it first"):
            from_weights(finetuned, base)
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    from_weights(other.merge_and_unload(), base)


def test_the_base_must_be_bare_and_is_left_so_by_an_error(tmp_path: Path) -> None:
    base = base_model()
    lora = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="The base model has adapters"):
        from_weights(lora, base)
    base = base_model()
    before = base.state_dict().keys()
    with pytest.raises(ValueError, match=r"no model\.layers\.1"):
        from_weights(base_model(num_hidden_layers=1), base)
    assert base.state_dict().keys() == before
    zero = save_parameters(tmp_path / "zero.pt", {n: 0 * v for n, v in logit_vectors(base_model()).items()})
    with pytest.raises(ValueError, match="sums to 0"):
        import_expert(zero, base, parametrization="raw")
    assert base.state_dict().keys() == before


def test_a_lora_does_not_take_the_place_of_its_expert(tmp_path: Path) -> None:
    model = expert(base_model())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="already holds an adapter of type SVF"):
        to_lora(model, rank=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="named twice"):
        to_lora(model, ["default", "default"])


def test_values_that_are_no_numbers_are_not_passed_on(tmp_path: Path) -> None:
    base_model().save_pretrained(tmp_path / "base")
    model = expert(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    name, layer = next(iter(svf_layers(model).items()))
    layer.svf_delta["default"].weight.data[0] = float("nan")
    with pytest.raises(ValueError, match=rf"δ of {name} in default holds NaN or Inf"):
        to_lora(model)
    model.save_pretrained(tmp_path / "expert")
    with pytest.raises(ValueError, match=rf"expert has NaN or Inf in 1 of 14 tensors, the first is {name}"):
        merge_to_folder(tmp_path / "expert", tmp_path / "merged")
    summary, _ = inspect_adapter(tmp_path / "expert")
    assert summary.broken == [name]
    json.dumps(summary.to_dict(), allow_nan=False)


def test_more_about_merged_folders(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base_model().save_pretrained(base, max_shard_size="20KB")
    index = (base / "model.safetensors.index.json").read_text()
    for path in base.glob("model-*"):
        path.unlink()
    base_model().save_pretrained(base)
    (base / "model.safetensors.index.json").write_text(index)  # stale, as after an older save
    (base / "more").mkdir()
    (base / "more" / "template.jinja").write_text("x")
    (base / "modeling.py").write_text("x")
    (base / "pytorch_model.bin").write_text("x")
    model = expert(AutoModelForCausalLM.from_pretrained(base))
    model.save_pretrained(tmp_path / "expert")
    (tmp_path / "volume").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "volume")
    merge_to_folder(tmp_path / "expert", tmp_path / "link", base_check="ignore")
    found = {str(path.relative_to(tmp_path / "volume")) for path in (tmp_path / "volume").rglob("*") if path.is_file()}
    assert found >= {"model.safetensors", "more/template.jinja", "modeling.py", "config.json", "README.md"}
    assert not found & {"pytorch_model.bin", "model.safetensors.index.json"}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "volume")
    assert torch.allclose(logits(merged), logits(model), atol=1e-5)
    other = tmp_path / "other"
    base_model().save_pretrained(other)
    card = merge_to_folder(tmp_path / "expert", tmp_path / "x", base=other).folder / "README.md"
    assert "The weights of other with" in card.read_text()
    assert str(tmp_path) not in card.read_text()


def test_the_revision_of_the_base_is_that_of_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base_model().save_pretrained(tmp_path / "base")
    model = expert(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.peft_config["default"].base_model_name_or_path = "someone/model"
    model.peft_config["default"].revision = "abc"
    model.save_pretrained(tmp_path / "expert")
    asked = []

    def download(name: str, revision: str | None, **_: Any) -> str:
        asked.append((name, revision))
        return str(tmp_path / "base")

    monkeypatch.setattr("peft_svf.interop.sources.snapshot_download", download)
    merge_to_folder(tmp_path / "expert", tmp_path / "one")
    merge_to_folder(tmp_path / "expert", tmp_path / "two", base="another/model")
    assert asked == [("someone/model", "abc"), ("another/model", None)]


@pytest.mark.parametrize("kind", ["place", "mixture"])
def test_what_is_not_known_in_a_file_is_not_left_out_in_silence(kind: str, tmp_path: Path) -> None:
    vectors = logit_vectors(base_model())
    if kind == "place":
        tensors = {f"learnable_params_module_list.{i}": v for i, v in enumerate(vectors.values())}
    else:
        tensors = {f"weights_0_k_{n.replace('.', '_')}": v for n, v in vectors.items()}
        tensors["adaptive_weights"] = torch.ones(1, 1)
    path = save_parameters(tmp_path / "policy_params.pt", {**tensors, "value_head.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"unknown entry 'value_head\.weight'"):
        import_expert(path, base_model())
