"""Damaged and hostile files end in an error that says so, or in a load that is right: not in a crash or in nonsense."""

from __future__ import annotations

import copy
import json
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from helpers import deltas, logits, tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_svf import SVFConfig, SVFLayer, SVFRuntimeConfig
from peft_svf.interop import decompose, import_expert, inspect_adapter
from peft_svf.spectral import BasisPack

pytestmark = pytest.mark.slow

ADAPTER, CONFIG, INDEX = "adapter_model.safetensors", "adapter_config.json", "basis.safetensors.index.json"
MODULES = ["q_proj", "down_proj"]
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 10**12, 1e308, float("nan"), "", "x", "[", "../../etc/passwd", [], {}, [1], {"a": 1},
    "all-linear", ["q_proj"], "IA3", "none", [1, 2], [1, 2, 3, 4], ["a"] * 4, [float("inf")] * 4,
]  # fmt: skip
many = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
# Errors of a config that can be read but does not fit, each with the field, module or tensor it must name. All others
# name the file. The last two are PEFT's own.
DOES_NOT_FIT = (
    (ValueError, r"^Adapter 'default' was made for another base model: .*model\.layers\.0\."),
    (ValueError, r"^The checkpoint of adapter 'default' .*has .*(svf_delta|the first is )"),
    (ValueError, r"^(Target modules .* not found in the base model|No `target_modules` passed)"),
    (TypeError, r"^modules_to_save cannot be applied to modules of type"),
)


def base_model() -> Any:
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
    return tiny_llama(**sizes, num_key_value_heads=1, vocab_size=16)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An adapter, a basis pack, and a file of the released code; `bad` is where the damaged ones go."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    model = get_peft_model(base_model(), SVFConfig(target_modules=MODULES, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "svf_delta" in name:
            parameter.data.normal_()
    model.save_pretrained(folder / "adapter")
    base_model().save_pretrained(folder / "base")
    decompose(folder / "base", folder / "pack", target_modules=MODULES)
    vectors = {n: torch.randn(min(w.shape)) for n, w in base_model().state_dict().items() if "mlp" in n}
    torch.save(vectors, folder / "learnable_params.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFT_SVF_CACHE", str(folder / "cache"))
        yield folder


def damaged(content: bytes, random: Random) -> bytes:
    found = bytearray(content)
    for _ in range(random.choice([1, 1, 2, 8])):
        kind, place = random.randrange(3), random.randrange(min(len(found), random.choice([8, 300, len(found)])))
        if kind == 0:
            found[place] = random.randrange(256)
        elif kind == 1 and place > 0:
            del found[place:]
        else:
            found[place:place] = bytes(random.randrange(256) for _ in range(random.randrange(20)))
    return bytes(found)


def mutated(content: Any, random: Random) -> Any:
    """JSON with other values, names or fields, at any depth."""
    found = json.loads(json.dumps(content))
    for _ in range(random.choice([1, 1, 2])):
        place = found
        while True:
            key = random.choice([*place, "more"])
            if not isinstance(place.get(key), dict) or random.random() < 0.2:
                break
            place = place[key]
        if random.random() < 0.15:
            place.pop(key, None)
        elif random.random() < 0.1:
            place[random.choice(["../x", "", "model.layers.0.mlp.down_proj"])] = copy.deepcopy(random.choice(VALUES))
        else:
            place[key] = copy.deepcopy(random.choice(VALUES))
    return found


def written(content: Any, path: Path, random: Random) -> None:
    """As JSON, whose text may be damaged, too."""
    text = json.dumps(mutated(content, random)).encode()
    path.write_bytes(damaged(text, random) if random.random() < 0.3 else text)


def fresh(good: Path, bad: Path) -> Path:
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(good, bad)
    return bad


@torch.no_grad()
def check_loaded(model: Any, folder: Path) -> None:
    """That every δ is what the file says, that the file has no more, and that the model computes with it."""
    found = {f"base_model.model.{n}.svf_delta.weight": delta for n, delta in deltas(model.base_model.model).items()}
    stored = load_file(folder / ADAPTER)
    assert found.keys() == {name for name in stored if ".svf_delta." in name}
    for name, delta in found.items():
        assert torch.equal(delta, stored[name].float())
    assert logits(model.eval(), torch.tensor([[1, 2, 3]])).isfinite().all()


@settings(max_examples=1000, **many)
@given(st.randoms(use_true_random=False))
def test_adapters(world: Path, random: Random) -> None:
    folder = fresh(world / "adapter", world / "bad")
    if random.random() < 0.6:
        written(json.loads((folder / CONFIG).read_text()), folder / CONFIG, random)
    else:
        (folder / ADAPTER).write_bytes(damaged((folder / ADAPTER).read_bytes(), random))
    base = base_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = SVFConfig.from_pretrained(str(folder))
        except (ValueError, TypeError) as error:
            if f"{folder}/adapter_" not in str(error):
                raise
            return
        if not isinstance(config, SVFConfig):
            return  # another method's, which is not ours to judge
        try:
            model = PeftModel.from_pretrained(base, str(folder), config=config)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            if not any(isinstance(error, kind) and re.search(text, str(error), re.S) for kind, text in DOES_NOT_FIT):
                raise
            return
        check_loaded(model, folder)
        inspect_adapter(folder)


@settings(max_examples=600, **many)
@given(st.randoms(use_true_random=False))
def test_packs(world: Path, random: Random) -> None:
    folder = fresh(world / "pack", world / "bad")
    if random.random() < 0.5:
        written(json.loads((folder / INDEX).read_text()), folder / INDEX, random)
    else:
        path = random.choice(sorted(folder.glob("basis-*")))
        path.write_bytes(damaged(path.read_bytes(), random))
    config = SVFConfig(target_modules=MODULES, runtime_config=SVFRuntimeConfig(basis=str(folder)))
    base = base_model()
    message = None
    try:
        model = get_peft_model(base, config)
    except ValueError as error:
        message = str(error)
    if message is not None:
        assert str(folder) in message
        assert not any(isinstance(module, SVFLayer) for module in base.modules())
        return
    good = BasisPack(world / "pack")
    for layer in model.modules():
        if isinstance(layer, SVFLayer):
            assert torch.equal(layer.basis, good.load(layer.module_name, 8).vectors)


@settings(max_examples=500, **many)
@given(st.randoms(use_true_random=False))
def test_files_of_the_released_code(world: Path, random: Random) -> None:
    path = world / "bad.pt"
    path.write_bytes(damaged((world / "learnable_params.pt").read_bytes(), random))
    base = base_model()
    message = None
    try:
        model = import_expert(path, base)
    except ValueError as error:
        message = str(error)
    if message is not None:
        assert str(path) in message or "sums to 0" in message
        assert not any(isinstance(module, SVFLayer) for module in base.modules())
        return
    vectors = torch.load(path, map_location="cpu", weights_only=True)
    weights = base_model().state_dict()
    for name, delta in deltas(model).items():
        spectrum = torch.linalg.svdvals(weights[f"{name}.weight"].double())
        mask = vectors[f"{name}.weight"].double().sigmoid()
        expected = mask * spectrum.sum() / (spectrum * mask).sum() - 1
        torch.testing.assert_close(delta.double(), expected, rtol=1e-4, atol=1e-4)
