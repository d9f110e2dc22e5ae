"""Experts in an engine, without vLLM: the arithmetic of the gates, names of mixtures, loading, refusing."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import adapted, base_model, deltas, save_expert, tiny_llama
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear

import peft_svf_vllm
from peft_svf import SVFConfig
from peft_svf.interop import decompose
from peft_svf.serving import (
    ServingOptions,
    add_experts,
    engine_options,
    mixture_name,
    parse_mixture,
    serve_arguments,
    update_expert,
)
from peft_svf.serving import options as serving_options
from peft_svf.serving.bases import ServedBases, name_in
from peft_svf.serving.experts import ServedModel, read_expert
from peft_svf.serving.gated import GatedLinear, Part
from peft_svf.serving.loaded import LoadedExperts
from peft_svf.serving.resolver import mixture_path
from peft_svf.serving.shards import Shard, gate_factors, local_product, shards_of_layer
from peft_svf.serving.slots import SlotTable
from peft_svf.spectral import effective_weight, fingerprint, singular_basis

TOKENS = 6
CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pack(weight: torch.Tensor) -> Any:
    return lambda x, bias: linear(x, weight, bias)


# ------------------------------------------------------------------------------------------------------------- shards


def cut(out: int, inn: int, processes: int, along: str, rank: int, replicas: int = 1) -> Shard:
    """What `shards_of_layer` gives for a layer of one weight."""
    if along == "rows":
        size = out * replicas // processes
        place = rank // replicas
        rows = None if size == out else slice(place * size, (place + 1) * size)
        return Shard(0, size, (out, inn), rows=rows, replicas=replicas)
    size = inn // processes
    return Shard(0, out, (out, inn), columns=slice(rank * size, (rank + 1) * size))


@pytest.mark.parametrize("r", [4, 12])
@pytest.mark.parametrize(
    ("out", "inn", "along", "place"),
    [
        (12, 24, "columns", "output"),
        (24, 12, "rows", "input"),
        (12, 24, "rows", "beside"),
        (24, 12, "columns", "beside"),
    ],
)
@pytest.mark.parametrize("processes", [2, 3])
def test_each_way_to_cut_a_weight(out: int, inn: int, along: str, place: str, processes: int, r: int) -> None:
    W, x, delta = random(out, inn), random(TOKENS, inn, seed=1), random(TOKENS, r, seed=2)
    Q = singular_basis(W, r).vectors
    expected = torch.stack([effective_weight(W, Q, d) @ one for d, one in zip(delta, x, strict=True)])
    shards = [cut(out, inn, processes, along, rank) for rank in range(processes)]
    local = [W[s.rows or slice(None), s.columns or slice(None)] for s in shards]
    product = sum(local_product(w, Q, s) for w, s in zip(local, shards, strict=True))
    outputs, folded = [], []
    for shard, w in zip(shards, local, strict=True):
        factors = gate_factors(Q, shard, lambda: product)
        assert factors.place == place
        part = Part.of("w", shard, factors, pack)
        table = SlotTable({"w": r}, TOKENS, TOKENS, CPU)
        table.values = table.values.double()
        table.values[:TOKENS] = delta
        table.in_use, table.index = True, torch.arange(TOKENS)
        here = x[:, shard.columns or slice(None)]
        outputs.append(GatedLinear([part], table, whole=pack(w))(here))
        folded.append(w + part.factors(w).change(w, delta[0]))
    torch.testing.assert_close(torch.cat(outputs, -1) if along == "rows" else sum(outputs), expected)
    whole = torch.cat(folded, 0 if along == "rows" else 1)
    torch.testing.assert_close(whole, effective_weight(W, Q, delta[0]))


def test_more_processes_than_key_heads() -> None:
    out, inn, processes, replicas = 8, 16, 4, 2
    W = random(out, inn)
    Q = singular_basis(W).vectors
    shards = [cut(out, inn, processes, "rows", rank, replicas) for rank in range(processes)]
    product = sum(local_product(W[s.rows], Q, s) for s in shards)
    torch.testing.assert_close(product, W.mT @ Q)
    assert [s.rows for s in shards] == [slice(0, 4), slice(0, 4), slice(4, 8), slice(4, 8)]


def layer(**attributes: Any) -> Any:
    return SimpleNamespace(**{"tp_size": 1, "tp_rank": 0, **attributes})


def test_the_shards_of_layers() -> None:
    """Attributes as of vLLM's classes: 8 heads of 4, 2 key and value heads, 4 processes, this is the last."""
    four: Any = {"tp_size": 4, "tp_rank": 3}
    qkv = layer(**four, input_size=32, output_partition_sizes=[8, 4, 4], gather_output=False, num_kv_head_replicas=2)
    q, k, v = shards_of_layer(qkv)
    assert (q.start, q.shape, q.rows, q.replicas) == (0, (32, 32), slice(24, 32), 1)
    assert (k.start, k.shape, k.rows, k.replicas) == (8, (8, 32), slice(4, 8), 2)
    assert (v.start, v.shape, v.rows) == (12, (8, 32), slice(4, 8))
    gate, up = shards_of_layer(layer(**four, input_size=32, output_partition_sizes=[12, 12], gather_output=False))
    assert gate.shape == up.shape == (48, 32)
    assert up.rows == slice(36, 48)
    down = shards_of_layer(layer(**four, input_size=48, output_partition_sizes=[32], input_is_parallel=True))[0]
    assert (down.shape, down.rows, down.columns) == ((32, 48), None, slice(36, 48))
    # one key head for all: nothing is cut
    single = layer(**four, input_size=32, output_partition_sizes=[8, 4, 4], gather_output=False, num_kv_head_replicas=4)
    assert shards_of_layer(single)[1] == Shard(8, 4, (4, 32), replicas=4)
    replicated = layer(**four, input_size=32, output_partition_sizes=[16])
    assert shards_of_layer(replicated) == [Shard(0, 16, (16, 32))]


# ------------------------------------------------------------------------------------------------------------- layers


class Fused:
    """A fused layer of several weights, with a gate for each that is named."""

    def __init__(self, *sizes: int, inn: int, gated: str, r: int | None = None, dtype: torch.dtype = torch.float64):
        self.W = [random(size, inn, seed=i).to(dtype) for i, size in enumerate(sizes)]
        self.Q = [singular_basis(W, r).vectors for W in self.W]
        self.gated = [str(i) for i in range(len(sizes)) if str(i) in gated]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.parts = []
        for i, (W, Q) in enumerate(zip(self.W, self.Q, strict=True)):
            shard = Shard(starts[i], len(W), (len(W), inn))
            factors = gate_factors(Q, shard, lambda: pytest.fail("nothing is cut"))
            self.parts.append(Part.of(str(i), shard, factors, pack) if str(i) in self.gated else Part("", shard))
        self.table = SlotTable({n: self.Q[int(n)].shape[1] for n in self.gated}, 3, TOKENS, CPU)
        self.table.values = self.table.values.to(dtype)
        self.rows = [torch.randn(self.table.size, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (0, 1)]
        for expert, row in enumerate(self.rows, 1):
            self.table.put(expert, row)

    def weight(self, expert: int) -> torch.Tensor:
        if expert == 0:
            return torch.cat(self.W)
        row, ranges = self.rows[expert - 1], self.table.ranges
        return torch.cat(
            [
                effective_weight(W, Q, row[ranges[str(i)]]) if str(i) in self.gated else W
                for i, (W, Q) in enumerate(zip(self.W, self.Q, strict=True))
            ]
        )

    def linear(self, pieces: bool) -> GatedLinear:
        cut = [pack(W) for W in self.W] if pieces and GatedLinear.needs_pieces(self.parts) else None
        return GatedLinear(self.parts, self.table, whole=pack(torch.cat(self.W)), pieces=cut)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pieces", [False, True], ids=["quantized", "plain"])
@pytest.mark.parametrize(
    ("sizes", "inn", "gated", "r"),
    [
        ((16, 4, 4), 16, "012", None),  # q, k, v
        ((24, 24), 16, "01", None),  # gate, up
        ((24, 24), 16, "01", 5),
        ((24, 24), 16, "1", None),  # one has no basis
        ((24, 8), 16, "01", None),  # one gate on the input, one on the output
        ((16,), 24, "0", None),
        ((24,), 16, "0", 7),
    ],
)
def test_every_token_has_its_expert(
    sizes: tuple[int, ...], inn: int, gated: str, r: int | None, pieces: bool, bias: bool
) -> None:
    fused = Fused(*sizes, inn=inn, gated=gated, r=r)
    x, b = random(TOKENS, inn, seed=9), random(sum(sizes), seed=8) if bias else None
    experts = [1, 0, 2, 2, 0, 1]
    fused.table.route(experts)
    y = fused.linear(pieces)(x.unsqueeze(0), b)[0]
    expected = torch.stack([linear(one, fused.weight(e), b) for one, e in zip(x, experts, strict=True)])
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_of_the_base_model_keep_their_bits(dtype: torch.dtype) -> None:
    for sizes, inn in (((16, 4, 4), 16), ((24, 24), 16), ((16,), 24)):
        fused = Fused(*sizes, inn=inn, gated="012", dtype=dtype)
        x, b = random(TOKENS, inn, seed=9).to(dtype), random(sum(sizes), seed=8).to(dtype)
        gates = fused.linear(pieces=False)
        plain = linear(x, torch.cat(fused.W), b)
        assert torch.equal(gates(x, b), plain)  # no step was routed yet
        fused.table.route([0, 1, 0, 2, 0, 1])
        found = gates(x, b)
        assert torch.equal(found[::2], plain[::2])
        assert not torch.isclose(found[1::2], plain[1::2]).all()
        fused.table.route([0] * TOKENS)
        assert torch.equal(gates(x, b), plain)


def test_a_folded_expert_is_used_for_its_own_steps_only() -> None:
    fused = Fused(24, 24, inn=16, gated="01")
    gates, x = fused.linear(pieces=True), random(TOKENS, 16, seed=9)
    W = torch.cat(fused.W)
    gates.folded = pack(gates.folded_weight(W, fused.rows[1]))
    fused.table.route([2] * TOKENS)
    fused.table.folded = True
    torch.testing.assert_close(gates(x), linear(x, fused.weight(2)))
    fused.table.values.zero_()  # so it was not the gate
    torch.testing.assert_close(gates(x), linear(x, fused.weight(2)))
    fused.table.folded = False
    assert torch.equal(gates(x), linear(x, W))


# -------------------------------------------------------------------------------------------------------------- slots


def test_slots_hold_the_experts_of_the_last_steps() -> None:
    table = SlotTable({"a": 2, "b": 3}, 2, 8, CPU)
    for expert in (7, 8):
        table.put(expert, table.flat({"a": torch.full((2,), float(expert)), "b": torch.full((1,), float(expert))}))
    table.touch(7)
    table.put(9, None, keep={9})
    assert [expert in table for expert in (7, 8, 9)] == [True, False, True]
    table.route([9, 7, 0])
    assert table.of_tokens("a", 3).tolist() == [[0, 0], [7, 7], [0, 0]]
    assert table.of_tokens("b", 3).tolist() == [[0, 0, 0], [7, 0, 0], [0, 0, 0]]
    assert (table.in_use, table.only) == (True, None)
    table.route([7, 7])
    assert table.only == 7
    with pytest.raises(KeyError):
        table.route([8])
    with pytest.raises(RuntimeError, match=r"more than 2 experts\. Increase `max_loras`"):
        table.put(10, None, keep={7, 9, 10})
    table.clear()
    assert not table.in_use
    assert table.index.tolist() == [2] * 8


# ----------------------------------------------------------------------------------------------------------- mixtures


def test_names_of_mixtures() -> None:
    weights = {"math": 0.7, "logic": -0.1, "a/b": 1e-30}
    assert parse_mixture(mixture_name(weights)) == weights
    assert parse_mixture(" math=0.7, logic=.3") == {"math": 0.7, "logic": 0.3}
    assert parse_mixture("") == {}
    for wrong in ("math", "math=", "=1", "math=nan", "math=inf", "math=1,", "math=1,math=2", "a=1;b=2", "x=y=2"):
        with pytest.raises(ValueError, match="is no mixture"):
            parse_mixture(wrong)
    with pytest.raises(ValueError, match="at most 32 experts, got 33"):
        parse_mixture(",".join(f"e{i}=1" for i in range(33)))
    for name in ("a,b", "a=b", " a", ""):
        with pytest.raises(ValueError, match=rf"'{name}' cannot be in a mixture"):
            mixture_name({name: 1.0, "c": 2.0})
    with pytest.raises(ValueError, match="is no mixture"):
        mixture_name({"a": float("nan")})


def test_the_path_of_a_mixture_names_served_experts_only(caplog: Any) -> None:
    served = {"math": None, "logic": None}
    assert mixture_path("math=0.7,logic=0.3", served) == "peft-svf:math=0.7,logic=0.3"
    assert mixture_path("math", served) is None
    assert mixture_path("math=0.7,../secret=0.3", served) is None
    assert "There is no expert '../secret'. Served are: 'logic', 'math'." in caplog.text


# ------------------------------------------------------------------------------------------------------------- loading


class Reader:
    """Experts in memory: the path of one is a number that all of its δ are."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def __call__(self, path: str) -> dict[str, torch.Tensor]:
        self.read.append(path)
        return {"w": torch.full((2,), float(path))}


def loaded(capacity: int = 8, slots: int = 4, **options: Any) -> tuple[LoadedExperts, Reader]:
    reader = Reader()
    return LoadedExperts(SlotTable({"w": 2}, slots, 8, CPU), reader, capacity=capacity, **options), reader


def values(experts: LoadedExperts, number: int) -> float:
    experts.table.route([number])
    return float(experts.table.of_tokens("w", 1)[0, 0])


def test_mixtures_are_sums_of_loaded_experts() -> None:
    experts, reader = loaded()
    experts.add(1, "a", "2")
    experts.add(2, "b", "3")
    experts.add(3, "a=0.5,b=-1", "peft-svf:a=0.5,b=-1")
    experts.add(4, "nothing", "peft-svf:")
    assert [values(experts, number) for number in (1, 2, 3, 4)] == [2, 3, -2, 0]
    assert reader.read == ["2", "3"]
    with pytest.raises(ValueError, match=r"There is no expert 'c'\. Served are: 'a', 'b', 'nothing'\."):
        experts.add(5, "c=1", "peft-svf:c=1")
    assert experts.numbers == {1, 2, 3, 4}
    experts.update("a", torch.full((2,), 10.0))
    assert [values(experts, number) for number in (1, 2, 3)] == [10, 3, 2]
    assert experts.host_bytes() == 2 * 2 * 4


def test_evicted_experts_come_back() -> None:
    experts, reader = loaded(capacity=3, slots=2)
    experts.add(1, "a", "2")
    experts.add(2, "b", "3")
    experts.add(3, "m", "peft-svf:a=1,b=1")
    experts.add(4, "c", "4")
    assert experts.numbers == {1, 2, 4}  # the mixture first: it costs no file
    experts.add(3, "m", "peft-svf:a=1,b=1")
    assert 1 not in experts
    assert values(experts, 3) == 5
    experts.add(5, "n", "peft-svf:a=2")  # needs an evicted expert
    assert values(experts, 5) == 4
    assert reader.read == ["2", "3", "4", "2"]


def test_another_expert_under_the_same_name_is_refused() -> None:
    """Its requests would use prefix cache blocks of the old one."""
    experts, reader = loaded()
    experts.add(1, "a", "2")
    experts.remove(1)
    experts.add(2, "a", "2")
    experts.remove(2)
    reader_of_changed = lambda path: {"w": torch.tensor([9.0, 9.0])}  # noqa: E731
    experts._read_deltas = reader_of_changed
    with pytest.raises(ValueError, match=r"'a' \(2\) has changed since.*Load it from another folder, or under another"):
        experts.add(3, "a", "2")
    with pytest.raises(ValueError, match="has the number 4, which is that of 'b'"):
        experts.add(4, "b", "5") or experts.add(4, "a", "5")
    experts.add(3, "a", "6")  # another path
    assert values(experts, 3) == 9
    experts._read_deltas = reader
    with pytest.raises(ValueError, match="has changed since"):
        experts.add(3, "a", "6", again=True)
    assert values(experts, 3) == 9

    by_name, _ = loaded(by_name_only=True)
    by_name.add(1, "a", "2")
    with pytest.raises(ValueError, match="Load it under another name"):
        by_name.add(2, "a", "3")
    without, _ = loaded(has_prefix_cache=False, by_name_only=True)
    without.add(1, "a", "2")
    without.add(2, "a", "3")
    assert values(without, 2) == 3


def test_new_values_count_for_the_prefix_cache() -> None:
    experts, _ = loaded()
    experts.add(1, "live", "peft-svf:")
    experts.update("live", torch.ones(2))
    with pytest.raises(ValueError, match="has changed since"):
        experts.add(2, "live", "peft-svf:")
    with pytest.raises(ValueError, match="There is no expert 'gone'"):
        experts.update("gone", torch.ones(2))


# ------------------------------------------------------------------------------------------------------------- experts


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> Path:
    root: Path = tmp_path_factory.mktemp("serving")
    config = {"task_type": "CAUSAL_LM"}
    save_expert(root / "whole", SVFConfig(target_modules="all-linear", **config), seed=1)
    save_expert(root / "narrow", SVFConfig(target_modules=["down_proj"], r=5, **config), seed=2)
    save_expert(root / "other", SVFConfig(target_modules="all-linear", **config), seed=1, base=base_model(seed=3))
    base_model().save_pretrained(root / "model")
    return root


def served(r: int | None = None, **changes: Any) -> ServedModel:
    shapes = {
        name: module.weight
        for name, module in base_model().named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    bases = {name: singular_basis(weight.detach(), r) for name, weight in shapes.items()}
    options: dict[str, Any] = {
        "names": set(bases),
        "lengths": {name: basis.vectors.shape[1] for name, basis in bases.items()},
        "fingerprints": {
            name: (fingerprint(basis.spectrum, basis.vectors), tuple(shapes[name].shape))
            for name, basis in bases.items()
        },
    }
    return ServedModel(**{**options, **changes})


def test_an_expert_is_read_with_the_checks_of_a_model(folders: Path, tmp_path: Path) -> None:
    model = served()
    found = read_expert(str(folders / "whole"), model)
    assert found.keys() == model.lengths.keys()
    saved = load_file(folders / "whole" / "adapter_model.safetensors")
    assert all(torch.equal(saved[f"base_model.model.{name}.svf_delta.weight"], delta) for name, delta in found.items())
    assert {len(delta) for delta in read_expert(str(folders / "narrow"), model).values()} == {5}
    # a stage of a pipeline has some of the modules
    first = {name: length for name, length in model.lengths.items() if ".0." in name}
    assert len(read_expert(str(folders / "whole"), served(lengths=first))) == len(found)

    with pytest.raises(ValueError, match=r"other was made for another base model.*`base_check=\"warn\"`"):
        read_expert(str(folders / "other"), model)
    with pytest.warns(UserWarning, match="was made for another base model"):
        read_expert(str(folders / "other"), served(base_check="warn"))
    with pytest.raises(ValueError, match=r"adapts \d+ modules that have no gate in this engine"):
        read_expert(str(folders / "whole"), served(names=["model.layers.0.mlp.up_proj"]))
    with pytest.raises(ValueError, match="and the engine serves 4"):
        read_expert(str(folders / "narrow"), served(r=4))
    with pytest.raises(ValueError, match="There is no folder"):
        read_expert(str(tmp_path / "none"), model)


def damaged(folders: Path, target: Path, change: Any) -> str:
    target.mkdir()
    for file in (folders / "whole").iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(target / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, target / "adapter_model.safetensors")
    return str(target)


def test_damaged_experts_are_refused(folders: Path, tmp_path: Path) -> None:
    model, key = served(), "base_model.model.model.layers.1.mlp.up_proj.svf_delta.weight"

    def cut(tensors: Any) -> None:
        tensors[key] = tensors[key][:3].clone()

    cases = {
        "NaN or Inf in 1 of": lambda t: t[key].fill_(torch.inf),
        "has no values for 1 of": lambda t: t.pop(key),
        "trains more than δ, such as lm_head.weight": lambda t: t.update({"lm_head.weight": torch.ones(2)}),
        "has a δ of shape": lambda t: t.update({key: torch.ones(2, 2)}),
    }
    for number, (message, change) in enumerate(cases.items()):
        with pytest.raises(ValueError, match=message):
            read_expert(damaged(folders, tmp_path / str(number), change), model)
    short = Path(damaged(folders, tmp_path / "short", lambda t: None)) / "adapter_model.safetensors"
    short.write_bytes(short.read_bytes()[:-7])
    with pytest.raises(ValueError, match="is damaged or cut short"):
        read_expert(str(short.parent), model)
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    with pytest.raises(ValueError, match=r"is a LORA adapter\. Expected an SVF adapter"):
        read_expert(str(lora), model)


def test_bases_of_an_engine(folders: Path, tmp_path: Path) -> None:
    name, weight = "model.layers.0.mlp.down_proj", base_model().get_submodule("model.layers.0.mlp.down_proj").weight
    model = str(folders / "model")
    shape = (weight.shape[0], weight.shape[1])
    expected = singular_basis(weight.detach())
    computed = ServedBases(model, cache_dir=str(tmp_path / "cache"))
    assert torch.equal(computed.of(name, shape, torch.float32).vectors, expected.vectors)
    assert name in computed.names
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1
    decompose(model, tmp_path / "pack", target_modules=["down_proj"])
    pack = ServedBases(model, basis=str(tmp_path / "pack"))
    assert torch.equal(pack.of(name, shape, torch.float32).vectors, expected.vectors)
    assert len(pack.names) == 2
    base_model(seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=rf"was made from other weights: ‖W‖_F of {name}"):
        ServedBases(str(tmp_path / "other"), basis=str(tmp_path / "pack")).of(name, shape, torch.float32)
    with pytest.raises(ValueError, match=r"is quantized.*Name the basis pack of its full-precision model"):
        ServedBases(model, quantized=True)
    quantized = ServedBases("no/model", basis=str(tmp_path / "pack"), quantized=True)
    assert torch.equal(quantized.of(name, shape, torch.float32).vectors, expected.vectors)
    with pytest.raises(ValueError, match=r"has the shape \[3, 4\] in the engine"):
        computed.of(name, (3, 4), torch.float32)


def test_names_with_and_without_a_head() -> None:
    names = {"model.layers.0.mlp.up_proj", "model.layers.10.mlp.up_proj"}
    assert name_in(names, "layers.0.mlp.up_proj") == "model.layers.0.mlp.up_proj"
    assert name_in(names, "language_model.model.layers.10.mlp.up_proj") == "model.layers.10.mlp.up_proj"
    assert name_in(names, "layers.1.mlp.up_proj") is None
    assert name_in(names, "up_proj") is None


# ------------------------------------------------------------------------------------------------------------- options


def engine(**settings: Any) -> Any:
    return SimpleNamespace(additional_config={"peft_svf": settings})


def test_options_of_an_engine(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(serving_options, "installed_vllm", lambda: "0.32.0+cpu")
    options = engine_options(slots=4, basis="pack", roots=[str(tmp_path)], r=16)
    assert options == {
        "enable_lora": True,
        "max_loras": 4,
        "max_cpu_loras": 1024,
        "worker_extension_cls": "peft_svf.serving.worker.SVFWorker",
        "additional_config": {"peft_svf": {"basis": "pack", "roots": [str(tmp_path)], "r": 16}},
    }
    json.dumps(options)
    words = serve_arguments(slots=4, basis="pack")
    assert words[:3] == ["--enable-lora", "--max-loras", "4"]
    assert words[-2:] == ["--additional-config", '{"peft_svf": {"basis": "pack"}}']
    read = ServingOptions.of_engine(engine(**options["additional_config"]["peft_svf"]))
    assert read == ServingOptions(basis="pack", roots=(str(tmp_path),), r=16)
    for wrong, message in (({"bases": "x"}, "keys of"), ({"r": 0}, "positive"), ({"base_check": "no"}, "'ignore'")):
        with pytest.raises(ValueError, match=message):
            ServingOptions.of_engine(engine(**wrong))
    with pytest.raises(ValueError, match="must be a list of folders"):
        ServingOptions(roots="experts")  # type: ignore[arg-type]


def test_clients_load_experts_from_the_roots_only(monkeypatch: Any, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "out")
    options = ServingOptions(roots=(str(tmp_path / "in"),))
    assert options.checked_path(str(tmp_path / "in" / "a")) == str(tmp_path / "in" / "a")
    for path in ("in/../out", "out", "in/link", "in-other"):
        with pytest.raises(ValueError, match="is not in a folder that experts may be loaded from"):
            options.checked_path(str(tmp_path / path))
    with pytest.raises(ValueError, match="is not in a folder"):
        options.checked_path("user/expert")
    assert ServingOptions().checked_path("user/expert") == "user/expert"
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "True")
    with pytest.raises(ValueError, match="lets clients load any folder"):
        ServingOptions.of_engine(engine())


def test_versions_of_vllm(monkeypatch: Any) -> None:
    for version in ("0.26.0", "0.29.1", "0.32.9+cpu"):
        serving_options.check_vllm(version)
    for version in ("0.25.1", "0.33.0", "1.0"):
        with pytest.raises(ImportError, match=rf'0\.26 to 0\.32, but {version} .*`pip install "vllm>=0\.26,<0\.33"`'):
            serving_options.check_vllm(version)
    monkeypatch.setattr(serving_options, "installed_vllm", lambda: None)
    with pytest.raises(ImportError, match="needs vLLM, which is not installed"):
        engine_options()
    for version, ignores in (("0.26.0", True), ("0.31.0", True), ("0.32.0", False)):
        monkeypatch.setattr(serving_options, "installed_vllm", lambda version=version: version)
        assert serving_options.prefix_cache_ignores_paths() is ignores


# -------------------------------------------------------------------------------------------------------------- plugin


def test_the_entry_point_imports_nothing() -> None:
    program = """
import sys
import peft_svf_vllm
peft_svf_vllm.register(); peft_svf_vllm.register()
assert not {"torch", "peft", "peft_svf", "vllm"} & {*sys.modules}
assert sum(type(finder).__name__ == "_Finder" for finder in sys.meta_path) == 2
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_modules_are_patched_when_they_are_imported(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "pretend_mixin.py").write_text(
        "class LRUCacheWorkerLoRAManager:\n    def __init__(self, *a): self.a = a\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(peft_svf_vllm, "WORKER", "pretend_mixin")
    monkeypatch.setattr(peft_svf_vllm, "SERVER", "pretend_server")
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    peft_svf_vllm.register()
    import pretend_mixin  # type: ignore[import-not-found]

    plain = pretend_mixin.LRUCacheWorkerLoRAManager(SimpleNamespace(additional_config={}), "cpu", 3)
    assert type(plain).__name__ == "LRUCacheWorkerLoRAManager"
    assert plain.a[1:] == ("cpu", 3)
    for other in (None, "text", {"else": 1}):
        assert type(pretend_mixin.LRUCacheWorkerLoRAManager(SimpleNamespace(additional_config=other))) is type(plain)
    ours = ModuleType("peft_svf.serving.manager")
    ours.SVFWorkerManager = lambda *arguments: ("ours", arguments)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "peft_svf.serving.manager", ours)
    config = SimpleNamespace(additional_config={"peft_svf": {}})
    peft_svf_vllm.register()  # a second time, after the import
    assert pretend_mixin.LRUCacheWorkerLoRAManager(config, "cpu") == ("ours", (config, "cpu"))
    assert "pretend_mixin" in sys.modules
    del sys.modules["pretend_mixin"]


def test_a_server_resolves_mixtures_if_it_serves_experts(monkeypatch: Any) -> None:
    lora = ModuleType("vllm.lora")
    request, resolver = ModuleType("vllm.lora.request"), ModuleType("vllm.lora.resolver")
    request.LoRARequest = lambda name, number, path: (name, path)  # type: ignore[attr-defined]
    resolver.LoRAResolver = object  # type: ignore[attr-defined]
    for name, module in (("vllm", ModuleType("vllm")), ("vllm.lora", lora), (request.__name__, request)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, resolver.__name__, resolver)
    server = ModuleType("server")

    class Models:
        def __init__(self, client: Any, *, lora_modules: Any = None) -> None:
            self.lora_resolvers: list[Any] = []
            self.lora_requests = {"math": None, "logic": None}

    server.OpenAIServingModels = Models  # type: ignore[attr-defined]
    peft_svf_vllm._patch_server(server)
    peft_svf_vllm._patch_server(server)
    assert Models(SimpleNamespace(vllm_config=SimpleNamespace(additional_config={}))).lora_resolvers == []
    config = engine(max_mixtures=2)
    config.lora_config = None
    with pytest.raises(ValueError, match="needs `--enable-lora`"):
        Models(SimpleNamespace(vllm_config=config))
    config.lora_config = SimpleNamespace()
    (found,) = Models(SimpleNamespace(vllm_config=config)).lora_resolvers

    def resolve(name: str) -> Any:
        return asyncio.run(found.resolve_lora("base", name))

    assert resolve("math=1,logic=2") == ("math=1,logic=2", "peft-svf:math=1,logic=2")
    assert resolve("math=1,other=2") is None
    assert resolve("math=2") == ("math=2", "peft-svf:math=2")
    assert resolve("math=3") is None  # the third mixture
    assert resolve("math=2") is not None


# -------------------------------------------------------------------------------------------------------------- engine


class PretendEngine:
    def __init__(self, idle: bool = True) -> None:
        self.idle, self.added, self.calls = idle, [], []  # type: ignore[var-annotated]
        self.llm_engine = SimpleNamespace(add_lora=self.added.append)

    def reset_prefix_cache(self) -> bool:
        return self.idle

    def collective_rpc(self, method: str, args: Any) -> None:
        self.calls.append((method, args))


def test_requests_for_an_offline_engine(monkeypatch: Any) -> None:
    request = ModuleType("vllm.lora.request")
    request.LoRARequest = lambda name, number, path: SimpleNamespace(name=name, number=number, path=path)  # type: ignore[attr-defined]
    for name, module in (
        ("vllm", ModuleType("vllm")),
        ("vllm.lora", ModuleType("vllm.lora")),
        (request.__name__, request),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    llm = PretendEngine()
    found = add_experts(llm, {"a": "experts/a", "m": {"a": 0.5, "b": -2}, "live": None})
    assert [each.path for each in found.values()] == ["experts/a", "peft-svf:a=0.5,b=-2.0", "peft-svf:"]
    assert llm.added == list(found.values())
    assert len({each.number for each in found.values()}) == 3


def test_new_values_travel_as_a_file() -> None:
    from safetensors.torch import load

    model = adapted(tiny_llama())
    llm = PretendEngine()
    update_expert(llm, "live", deltas(model))
    ((method, (name, content)),) = llm.calls
    assert (method, name) == ("peft_svf_update", "live")
    sent = load(content)
    assert all(torch.equal(sent[f"{key}.svf_delta.weight"], delta) for key, delta in deltas(model).items())
    busy = PretendEngine(idle=False)
    with pytest.raises(RuntimeError, match="running requests"):
        update_expert(busy, "live", deltas(model))
    assert busy.calls == []
