"""The base check: what it records, which other weights it sees, and which casts pass."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import adapted, deltas, logits, make_tokenizer, randomise, svf_layers, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from peft_svf import AdaptiveMixture, SVFConfig, SVFRuntimeConfig, inspect_adapter, merge_to_folder
from peft_svf.interop import decompose
from peft_svf.interop.inspect import check_spectrum
from peft_svf.spectral import delta_weight, fingerprint, fingerprint_difference, singular_basis
from peft_svf.spectral.fingerprint import LABELS, LARGEST_ERROR, SAMPLES, fingerprint_differences, sample_difference

OTHER_VECTORS = r"it has other singular vectors, so that the adapter's change is wrong by about 1\d\d%"


class One(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.lin = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        self.lin.weight = nn.Parameter(weight.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.lin(x)
        return found


def draw(kind: str, out_features: int, in_features: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weight = gaussian(out_features, in_features) / in_features**0.5
    if kind == "heavy-tailed":
        weight = weight * gaussian(out_features, in_features).abs().clamp(min=0.1).pow(-1)
    if kind == "low rank and noise":
        weight = gaussian(out_features, 3) @ gaussian(3, in_features) / 8 + 0.05 * weight
    if kind == "low rank":
        weight = gaussian(out_features, 3) @ gaussian(3, in_features)
    if kind == "pruned":
        weight = weight * (gaussian(out_features, in_features) > 0.3) * (gaussian(out_features, 1) > -1)
    if kind.startswith("orthogonal"):
        tall = out_features >= in_features
        q = torch.linalg.qr(weight if tall else weight.mT)[0]
        weight = (q if tall else q.mT).contiguous()
    if kind == "orthogonal and noise":
        weight = weight + 1e-3 * gaussian(out_features, in_features) / in_features**0.5
    return weight


KINDS = ["gaussian", "heavy-tailed", "low rank and noise", "low rank", "pruned", "orthogonal", "orthogonal and noise"]
CHANGES = {
    "fp16": lambda w: w.half(),
    "bf16": lambda w: w.bfloat16(),
    "noise 0.1 %": lambda w: w + 1e-3 * torch.randn_like(w) * w.square().mean().sqrt(),
    "noise 1 %": lambda w: w + 1e-2 * torch.randn_like(w) * w.square().mean().sqrt(),
    "noise 10 %": lambda w: w + 1e-1 * torch.randn_like(w) * w.square().mean().sqrt(),
}


def error_of_change(a: torch.Tensor, b: torch.Tensor, r: int) -> float:
    """How wrong ΔW of random experts becomes with the basis of b instead of that of a: the mean over 8 of them."""
    first, second = singular_basis(a, r), singular_basis(b, r)
    squares = []
    for seed in range(8):
        delta = torch.randn(r, generator=torch.Generator().manual_seed(seed))
        right = delta_weight(a, first.vectors, delta)
        wrong = delta_weight(b.float(), second.vectors.float(), delta)
        squares.append(float((wrong - right).square().sum() / right.square().sum()))
    return math.sqrt(sum(squares) / len(squares))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    change=st.sampled_from(list(CHANGES)),
    shape=st.sampled_from([(64, 64), (48, 160), (160, 96), (128, 128)]),
    narrow=st.booleans(),
    seed=st.integers(0, 999),
)
def test_the_verdict_follows_the_error_of_the_change(
    kind: str, change: str, shape: tuple[int, int], narrow: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    weight = draw(kind, *shape, seed)
    other = CHANGES[change](weight)
    r = 12 if narrow else min(shape)
    numbers = [
        fingerprint(basis.spectrum, basis.vectors[:, :r]) for basis in (singular_basis(weight), singular_basis(other))
    ]
    difference = fingerprint_difference(numbers[0], numbers[1], shape)
    error = error_of_change(weight, other, r)
    if error > 2 * LARGEST_ERROR:
        assert difference is not None
    if error < LARGEST_ERROR / 2 and change in ("fp16", "bf16"):
        assert difference is None
    assert sample_difference(*numbers) == pytest.approx(error, rel=2, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (32, 80), (80, 32)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cast_passes_or_is_refused(kind: str, shape: tuple[int, int], dtype: torch.dtype, tmp_path: Path) -> None:
    weight = draw(kind, *shape, seed=3)
    model = randomise(get_peft_model(One(weight), SVFConfig(target_modules=["lin"])))
    model.save_pretrained(tmp_path)
    if kind.startswith("orthogonal"):
        with pytest.raises(ValueError, match=r"1 of 1 weights differ, the first is lin: it has other singular vecto"):
            PeftModel.from_pretrained(One(weight.to(dtype)), tmp_path)
        return
    cast = PeftModel.from_pretrained(One(weight.to(dtype)), tmp_path)
    right, found = (svf_layers(each)["lin"].get_delta_weight("default").float() for each in (model, cast))
    assert (found - right).norm() <= 0.25 * right.norm()


def test_a_rotation_within_equal_singular_values_is_seen(tmp_path: Path) -> None:
    """Eight equal σ among 32: the spectrum is the same to the last digit, and most of ΔW is another one."""
    U, V = draw("orthogonal", 32, 32, 0).double(), draw("orthogonal", 32, 32, 1).double()
    sigma = torch.cat([torch.full((8,), 3.0), torch.linspace(1, 0.2, 24)]).double()
    rotation = torch.eye(32).double()
    rotation[:8, :8] = draw("orthogonal", 8, 8, 2).double()
    # all singular values stay, and the weight as well: only the choice of vectors differs
    bases = [U, U @ rotation]
    numbers = [fingerprint(sigma, each.float()) for each in bases]
    assert numbers[0][:4] == numbers[1][:4]
    assert torch.allclose(U @ sigma.diag() @ V.mT, U @ rotation @ sigma.diag() @ (V @ rotation).mT, atol=1e-5)
    assert "other singular vectors" in str(fingerprint_difference(numbers[0], numbers[1], (32, 32)))


def test_signs_of_columns_and_the_null_space_do_not_matter() -> None:
    basis = singular_basis(draw("low rank", 24, 40, 0))
    other = basis.vectors * torch.tensor([-1.0, 1.0]).repeat(12)
    other[:, 3:] = other[:, 3:] @ draw("orthogonal", 21, 21, 1)  # σ = 0 there
    assert fingerprint(basis.spectrum, other) == pytest.approx(fingerprint(basis.spectrum, basis.vectors), abs=2e-4)


def test_one_matrix_with_noise_is_found(tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "num_hidden_layers": 1, "intermediate_size": 256}
    adapted(tiny_llama(**wide)).save_pretrained(tmp_path)
    other = tiny_llama(**wide)
    name = "model.layers.0.self_attn.o_proj"
    weight = other.get_submodule(name).weight.data
    weight += (
        0.01 * weight.square().mean().sqrt() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    )
    with pytest.raises(ValueError, match=rf"1 of 7 weights differ, the first is {name}: "):
        PeftModel.from_pretrained(other, tmp_path)
    PeftModel.from_pretrained(tiny_llama(**wide).bfloat16(), tmp_path)


FIVE = ["gaussian", "heavy-tailed", "low rank and noise", "pruned", "blocks of 8 bit"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", FIVE)
def test_casts_of_a_model_pass_and_one_matrix_with_noise_does_not(kind: str, dtype: torch.dtype) -> None:
    """20 weights of a model: the same or their casts, and each of them in turn with 1 % of noise before the cast."""
    shape, torch_state = (192, 128), torch.Generator().manual_seed(1)

    def weight(seed: int) -> torch.Tensor:
        if kind != "blocks of 8 bit":
            return draw(kind, *shape, seed)
        blocks = draw("gaussian", *shape, seed).view(-1, 32)
        scale = (blocks.abs().amax(1, keepdim=True) / 127).half().float()
        return ((blocks / scale).round() * scale).view(shape)

    def numbers(weight: torch.Tensor) -> list[float]:
        basis = singular_basis(weight)
        return fingerprint(basis.spectrum, basis.vectors)

    weights = [weight(seed) for seed in range(20)]
    noisy = [w + 0.01 * w.square().mean().sqrt() * torch.randn(shape, generator=torch_state) for w in weights]
    recorded = [numbers(w) for w in weights]
    model = {f"{i}": (recorded[i], numbers(w.to(dtype)), shape) for i, w in enumerate(weights)}
    assert fingerprint_differences(model) == {}
    changed = {f"{i}": (recorded[i], numbers(w.to(dtype)), shape) for i, w in enumerate(noisy)}
    found = [list(fingerprint_differences({**model, name: one})) for name, one in changed.items()]
    assert all(names in ([], [name]) for name, names in zip(changed, found, strict=True))
    assert sum(map(bool, found)) >= FOUND[kind][dtype]


# At least, of 20. In bf16, rounding moves the norm of a small weight as much as the noise does. In weights of low rank,
# the noise makes ΔW as wrong as a cast does.
FOUND = {kind: {torch.float32: 20, torch.float16: 15, torch.bfloat16: 0} for kind in FIVE}
FOUND["low rank and noise"] = dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), 0)


def test_one_matrix_of_a_cast_model_with_noise_is_found() -> None:
    """Also in bf16: rounding averages out over the entries of a large weight."""
    shape, generator = (1024, 256), torch.Generator().manual_seed(0)
    weights = [draw("gaussian", *shape, seed) for seed in range(5)]
    recorded, cast = [], []
    for weight in weights:
        for numbers, each in ((recorded, weight), (cast, weight.bfloat16())):
            basis = singular_basis(each)
            numbers.append(fingerprint(basis.spectrum, basis.vectors))
    model = {f"{i}": (before, after, shape) for i, (before, after) in enumerate(zip(recorded, cast, strict=True))}
    assert fingerprint_differences(model) == {}
    noise = 0.01 * weights[2].square().mean().sqrt() * torch.randn(shape, generator=generator)
    basis = singular_basis((weights[2] + noise).bfloat16())
    model["2"] = recorded[2], fingerprint(basis.spectrum, basis.vectors), shape
    assert list(fingerprint_differences(model)) == ["2"]


@pytest.mark.parametrize("seed", range(6))
def test_noise_in_all_weights_is_no_cast(seed: int) -> None:
    """Casts and 1 % of noise of small models, whose single weights cannot tell them apart."""
    recorded = dict(adapted(tiny_llama(seed)).peft_config["default"].base_fingerprint)
    for dtype in (torch.float16, torch.bfloat16):
        get_peft_model(tiny_llama(seed, dtype), SVFConfig(target_modules="all-linear", base_fingerprint=recorded))
    other = tiny_llama(seed)
    torch.manual_seed(seed)
    for module in other.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.data
            weight += 0.01 * weight.square().mean().sqrt() * torch.randn_like(weight)
    with pytest.raises(ValueError, match="of 14 weights differ, the first is "):
        get_peft_model(other, SVFConfig(target_modules="all-linear", base_fingerprint=recorded))


def test_the_norm_of_a_rounded_dequantized_weight_may_move(tmp_path: Path) -> None:
    """Weights on a grid are rounded with a bias: the norm of this one moves by 2e-4 in bf16, and ΔW by 2 %."""
    weight = (draw("gaussian", 96, 96, 0) * 40).round() / 40 * 0.7723
    adapted(One(weight), target_modules=["lin"]).save_pretrained(tmp_path)
    PeftModel.from_pretrained(One(weight.bfloat16()), tmp_path)
    for factor in (1.002, 0.5):
        with pytest.raises(ValueError, match="lin: "):
            PeftModel.from_pretrained(One(weight * factor), tmp_path)


# ------------------------------------------------------------------------------------------------------------ records

PROBE = """
import torch
from peft_svf.spectral import fingerprint
Q = torch.linspace(-1, 1, 60).view(12, 5).sin()
print(fingerprint(torch.arange(12.0, 0, -1), Q))
"""
RECORD = [12, 7, 1, 25.4950976, -0.9874, 1.0071, -9.3675, -3.9601, -0.9126, -0.2584, 1.8152, -0.1701, -1.4019]
RECORD += [1.8547, 0.2301, -2.4872]


def test_the_record_is_the_same_everywhere() -> None:
    """In another process, and in later versions: adapters on disk depend on it."""
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"}
    found = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == pytest.approx(RECORD, abs=2e-4)
    Q = torch.linspace(-1, 1, 60).view(12, 5).sin()
    assert fingerprint(torch.arange(12.0, 0, -1), Q.bfloat16())[4:] == pytest.approx(RECORD[4:], abs=0.1)


def test_a_sample_depends_on_the_used_columns_only() -> None:
    basis = singular_basis(draw("gaussian", 24, 40, 0))
    numbers = fingerprint(basis.spectrum, basis.vectors[:, :7])
    assert len(numbers) == len(LABELS) + SAMPLES
    rest = basis.vectors.clone()
    rest[:, 7:] = 0
    assert fingerprint(basis.spectrum, rest[:, :7]) == numbers
    # nor on k: further rows of zeros are a larger matrix
    taller = torch.cat([basis.vectors[:, :7], torch.zeros(50, 7)])
    assert fingerprint(basis.spectrum, taller)[4:] == numbers[4:]


@pytest.mark.parametrize("r", [None, 5, 1000])
def test_all_doors_record_the_same(r: int | None, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), r=r)
    model.add_adapter("wider", SVFConfig(target_modules="all-linear"))
    model.save_pretrained(tmp_path / "expert")
    written = json.loads((tmp_path / "expert" / "adapter_config.json").read_text())
    assert written["base_dtype"] == "float32"
    for name, layer in svf_layers(model).items():
        assert written["base_fingerprint"][name] == layer.fingerprint("default")
        assert (layer.fingerprint("wider") == layer.fingerprint("default")) == (r != 5)
    assert check_spectrum(tmp_path / "expert", tmp_path / "base") == {}
    merge_to_folder(tmp_path / "expert", tmp_path / "merged")
    assert inspect_adapter(tmp_path / "expert")[0].fingerprinted == 14
    model.add_weighted_adapter(["default", "wider"], [0.5, 0.5], "mix")
    assert {len(numbers) for numbers in model.peft_config["mix"].base_fingerprint.values()} == {16}


def test_zero_weights_have_a_record(tmp_path: Path) -> None:
    adapted(One(torch.zeros(6, 9)), target_modules=["lin"]).save_pretrained(tmp_path)
    PeftModel.from_pretrained(One(torch.zeros(6, 9)), tmp_path)
    with pytest.raises(ValueError, match="lin: σ_1 is"):
        PeftModel.from_pretrained(One(torch.ones(6, 9)), tmp_path)


def only_spectra(folder: Path) -> None:
    """Make the record one of an earlier version."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config.pop("base_dtype")
    config["base_fingerprint"] = {name: numbers[:4] for name, numbers in config["base_fingerprint"].items()}
    path.write_text(json.dumps(config))


def test_records_of_earlier_versions(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    only_spectra(tmp_path)
    old = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(old), logits(model))
    PeftModel.from_pretrained(tiny_llama(dtype=torch.bfloat16), tmp_path)
    with pytest.raises(ValueError, match="14 of 14 weights differ"):
        PeftModel.from_pretrained(tiny_llama(seed=1), tmp_path)
    tiny_llama().save_pretrained(tmp_path / "base")
    assert check_spectrum(tmp_path, tmp_path / "base") == {}
    old.save_pretrained(tmp_path / "again")  # what came with the adapter stays
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert {len(numbers) for numbers in written["base_fingerprint"].values()} == {4}


@pytest.mark.parametrize("numbers", [[1.0] * 5, [1.0] * 3, [1.0] * 15 + [math.nan], "x"])
def test_a_record_with_a_wrong_number_of_numbers(numbers: Any) -> None:
    with pytest.raises(ValueError, match="must have 4 or 16 numbers for lin"):
        SVFConfig(base_fingerprint={"lin": numbers})


def test_a_sharded_basis_is_compared_by_its_spectrum(tmp_path: Path) -> None:
    """Q that is not whole has no samples; the record of the same layer made before stays."""
    model = adapted(target_modules=["q_proj"])
    layer = next(iter(svf_layers(model).values()))
    recorded = layer.fingerprint("default")
    layer.basis.data = layer.basis.data[:5]
    assert layer.fingerprint("default") == recorded
    layer._fingerprints.clear()
    assert layer.fingerprint("default") == recorded[:4]
    assert fingerprint_difference(recorded, recorded[:4], layer.shape) is None
    assert fingerprint_difference(recorded[:4], recorded, layer.shape) is None


# -------------------------------------------------------------------------------------------------------- other doors


def orthogonal_llama(dtype: torch.dtype = torch.float32) -> Any:
    model = tiny_llama()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight, generator=torch.Generator().manual_seed(module.out_features))
    return model.to(dtype)


def test_a_cast_of_equal_singular_values_is_refused_at_every_door(tmp_path: Path) -> None:
    base, cast = tmp_path / "base", tmp_path / "cast"
    orthogonal_llama().save_pretrained(base)
    orthogonal_llama(torch.bfloat16).save_pretrained(cast)
    path = tmp_path / "expert"
    model = adapted(AutoModelForCausalLM.from_pretrained(base))
    model.save_pretrained(path)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path)
    assert torch.equal(logits(again), logits(model))
    message = rf"1[34] of 14 weights differ.*{OTHER_VECTORS}.*in the same dtype \({base}, float32\)"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(cast), path)
    with pytest.raises(ValueError, match=message):
        AdaptiveMixture.from_pretrained(
            AutoModelForCausalLM.from_pretrained(cast), {"a": path}, tokenizer=make_tokenizer()
        )
    with pytest.raises(ValueError, match=message):
        merge_to_folder(path, tmp_path / "merged", cast)
    assert len(check_spectrum(path, cast)) >= 13
    assert check_spectrum(path, base) == {}
    config = SVFConfig.from_pretrained(path, runtime_config=SVFRuntimeConfig(base_check="warn"))
    with pytest.warns(UserWarning, match=OTHER_VECTORS):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(cast), path, config=config)
    # the vectors of the model in fp32 serve its cast
    decompose(base, tmp_path / "pack")
    config = SVFConfig.from_pretrained(path, runtime_config=SVFRuntimeConfig(basis=str(tmp_path / "pack")))
    served = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(cast), path, config=config)
    for name, layer in svf_layers(served).items():
        right = svf_layers(model)[name].get_delta_weight("default")
        assert (layer.get_delta_weight("default") - right).norm() <= 0.01 * right.norm()
    # the one whose record is in bf16 wants bf16
    adapted(AutoModelForCausalLM.from_pretrained(cast, dtype=torch.bfloat16)).save_pretrained(tmp_path / "in bf16")
    with pytest.raises(ValueError, match=r"\(.*, bfloat16\)"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "in bf16")
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(cast).float(), tmp_path / "in bf16")


def test_a_module_under_another_name_is_one_difference(tmp_path: Path) -> None:
    adapted(target_modules=["q_proj", "v_proj"]).save_pretrained(tmp_path)
    recorded = json.loads((tmp_path / "adapter_config.json").read_text())["base_fingerprint"]
    renamed = {name.replace("q_proj", "query"): numbers for name, numbers in recorded.items()}
    first = "model.layers.0.self_attn"
    message = (
        rf"2 of 4 weights differ, the first is {first}.q_proj: the adapter has no module of this name, but has "
        rf"{first}.query, which is not adapted here\."
    )
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny_llama(), SVFConfig(target_modules=["q_proj", "v_proj"], base_fingerprint=renamed))


def test_more_and_fewer_modules_count_once(tmp_path: Path) -> None:
    model = adapted(target_modules=["q_proj"])
    model.save_pretrained(tmp_path)
    recorded = json.loads((tmp_path / "adapter_config.json").read_text())["base_fingerprint"]
    more = SVFConfig(target_modules=["q_proj", "v_proj"], base_fingerprint=recorded)
    with pytest.raises(
        ValueError, match=r"2 of 4 weights differ, the first is .*0.self_attn.v_proj: the adapter has no"
    ):
        get_peft_model(tiny_llama(), more)
    fewer = SVFConfig(target_modules=["q_proj"], layers_to_transform=[0], base_fingerprint=recorded)
    with pytest.raises(
        ValueError, match=r"1 of 2 weights differ, the first is .*1.self_attn.q_proj: .* not adapted here"
    ):
        get_peft_model(tiny_llama(), fewer)
    assert len(deltas(model)) == 2
