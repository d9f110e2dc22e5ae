"""Random use: any order of adding, loading, merging, casting, mixing and generating keeps base and outputs right.

`PEFT_SVF_RANDOM_STEPS=20000 pytest tests/test_random_use.py` takes more steps, other ones each time.
"""

from __future__ import annotations

import copy
import os
import pickle
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from helpers import IDS, deltas, logits, svf_layers, tiny_llama
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from peft_svf import SVFConfig

STEPS = os.environ.get("PEFT_SVF_RANDOM_STEPS")
STEPS_EACH = 40
NAMES = ["0", "mlp", "weight", "svf_delta", "layers", "default", "default2", "two words", "ü" * 100]
TARGETS = ["all-linear", ["q_proj", "down_proj"], ["up_proj", "down_proj"], r".*layers\.1\..*_proj"]
ROWS = torch.cat([IDS, IDS.flip(1)])[:3]

names = st.sampled_from(NAMES)
seeds = st.integers(0, 9)
pick = st.randoms(use_true_random=False)


def untied() -> PreTrainedModel:
    return tiny_llama(num_key_value_heads=4)


def tied() -> PreTrainedModel:
    """The same MLP weights in both layers."""
    model = untied()
    first, second = (layer.mlp for layer in model.model.layers)
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(second, name).weight = getattr(first, name).weight
    return model


class RandomUse(RuleBasedStateMachine):
    """A model, and what should be in it: δ by adapter and module, the base weights, and what is active and merged."""

    make: Callable[[], PreTrainedModel] = staticmethod(untied)
    targets: ClassVar = TARGETS

    @initialize(name=names, seed=seeds)
    def start(self, name: str, seed: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        warnings.simplefilter("ignore")
        base = self.make()
        self.reference = copy.deepcopy(base).double()
        linear = {n: m for n, m in self.reference.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
        self.linear = linear
        self.base = {n: m.weight.detach().clone() for n, m in linear.items()}
        self.factors = {n: torch.linalg.svd(w, full_matrices=False) for n, w in self.base.items()}
        self.values: dict[str, dict[str, torch.Tensor]] = {}
        self.saved: dict[str, tuple[Path, dict[str, torch.Tensor]]] = {}
        self.merged: list[str] = []
        self.dtype = torch.float32
        self.model: Any = get_peft_model(base, SVFConfig(target_modules="all-linear"), adapter_name=name).eval()
        self.fill(name, seed)
        self.active = [name]

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()

    # -------------------------------------------------------------------------------------------------------- reference

    def fill(self, name: str, seed: int) -> None:
        """Write random δ, and record them."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in dict.fromkeys(deltas(self.model, name).values()):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        self.values[name] = self.in_model(name)

    def in_model(self, name: str) -> dict[str, torch.Tensor]:
        return {n: p.detach().double().clone() for n, p in deltas(self.model, name).items()}

    @torch.no_grad()
    def expected(self, weights: dict[str, float], ids: torch.Tensor = IDS) -> torch.Tensor:
        """The logits in fp64, from the SVD of the recorded weights."""
        for name, module in self.linear.items():
            u, s, v = self.factors[name]
            z = torch.ones_like(s)
            for adapter, weight in weights.items():
                delta = self.values[adapter].get(name, s[:0])
                z[: len(delta)] += weight * delta
            module.weight.data = (u * (s * z)) @ v if weights else self.base[name]
        found: torch.Tensor = self.reference(input_ids=ids).logits
        return found

    def in_effect(self) -> dict[str, float]:
        return dict.fromkeys([*self.merged, *self.active], 1.0)

    def assert_close(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)

    def unused(self, name: str) -> str:
        return next(n for n in [name, *NAMES] if n not in self.values)

    def room(self) -> bool:
        return len(self.values) < 3

    # ------------------------------------------------------------------------------------------------------- invariants

    @invariant()
    def the_base_is_untouched_unless_merged(self) -> None:
        if not hasattr(self, "model"):
            return
        for name, layer in svf_layers(self.model).items():
            assert set(layer.merged_adapters) == set(self.merged) if self.merged else not layer.merged, name
            if not layer.merged:
                assert torch.equal(layer.get_base_layer().weight.double(), self.base[name]), name

    @invariant()
    def outputs_are_those_of_the_reference(self) -> None:
        if hasattr(self, "model"):
            assert list(self.model.peft_config) == list(self.values)
            assert self.model.active_adapters == self.active
            self.assert_close(logits(self.model), self.expected(self.in_effect()))

    # ------------------------------------------------------------------------------------------------------------ rules

    @precondition(room)
    @rule(name=names, seed=seeds, random=pick, r=st.sampled_from([None, 9]))
    def add(self, name: str, seed: int, random: Any, r: int | None) -> None:
        name = self.unused(name)
        self.model.add_adapter(name, SVFConfig(target_modules=random.choice(self.targets), r=r))
        self.merged = []  # PEFT unmerges, and warns
        self.fill(name, seed)

    @rule(random=pick)
    def save(self, random: Any) -> None:
        folder = Path(tempfile.mkdtemp(dir=self.folder.name))
        self.model.save_pretrained(folder)
        for name, values in self.values.items():
            where = folder if name == "default" else folder / name
            stored = load_file(where / "adapter_model.safetensors")
            assert {re.sub(r"base_model\.model\.|\.svf_delta\.weight", "", key) for key in stored} == values.keys()
            self.saved[name] = where, values

    @precondition(lambda self: self.saved and self.room())
    @rule(name=names, random=pick)
    def load(self, name: str, random: Any) -> None:
        name, (folder, values) = self.unused(name), random.choice(list(self.saved.values()))
        self.model.load_adapter(folder, name)
        self.merged = []
        self.values[name] = self.in_model(name)
        assert self.values[name].keys() == values.keys()
        assert all(torch.equal(self.values[name][n].float(), values[n].float()) for n in values)

    @precondition(lambda self: len(self.values) > 1)
    @rule(random=pick)
    def delete(self, random: Any) -> None:
        name = random.choice(list(self.values))
        if name in self.merged:
            with pytest.raises(ValueError, match="merged"):
                self.model.delete_adapter(name)
            return
        self.model.delete_adapter(name)
        del self.values[name]
        self.active = [n for n in self.active if n != name] or [min(self.values)]

    @rule(random=pick)
    def activate(self, random: Any) -> None:
        chosen = random.sample(list(self.values), random.randint(1, min(2, len(self.values))))
        self.model.set_adapter(chosen[0])
        self.model.base_model.set_adapter(chosen)
        self.active, self.merged = chosen, []

    @rule(random=pick)
    def merge(self, random: Any) -> None:
        chosen = random.choice([None, [random.choice(list(self.values))]])
        everywhere = all(len(self.values[name]) == len(self.linear) for name in chosen or self.active)
        if not everywhere:
            return  # then layers are merged differently, which `tests/test_adapter_state.py` covers
        self.model.merge_adapter(adapter_names=chosen)
        self.merged = list(dict.fromkeys([*self.merged, *(chosen or self.active)]))

    @precondition(lambda self: self.merged)
    @rule()
    def unmerge(self) -> None:
        self.model.unmerge_adapter()
        self.merged = []

    @rule(dtype=st.sampled_from([torch.float32, torch.float64]))
    def cast(self, dtype: torch.dtype) -> None:
        self.model.to(dtype)
        self.dtype = dtype
        self.values = {name: self.in_model(name) for name in self.values}

    @rule()
    def move(self) -> None:
        self.model.to("cpu")

    @rule(duplicate=st.sampled_from([copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]))
    def copy(self, duplicate: Any) -> None:
        self.model = duplicate(self.model)

    @rule(random=pick, seed=seeds)
    def train(self, random: Any, seed: int) -> None:
        if free := [name for name in self.values if name not in self.merged]:
            self.fill(random.choice(free), seed)

    @precondition(room)
    @rule(name=names, random=pick)
    def mix(self, name: str, random: Any) -> None:
        name, parts = self.unused(name), [random.choice(list(self.values)) for _ in range(2)]
        alpha = [0.5, -0.25]
        self.model.base_model.add_weighted_adapter(parts, alpha, name)
        self.merged = []
        mixed: dict[str, torch.Tensor] = {}
        for module in {module for part in parts for module in self.values[part]}:
            terms = [a * self.values[p][module] for p, a in zip(parts, alpha, strict=True) if module in self.values[p]]
            mixed[module] = torch.zeros(max(map(len, terms)), dtype=torch.float64)
            for term in terms:
                mixed[module][: len(term)] += term
        self.values[name] = self.in_model(name)
        assert self.values[name].keys() == mixed.keys()
        for module, found in self.values[name].items():
            torch.testing.assert_close(found[: len(mixed[module])], mixed[module], rtol=0, atol=1e-6)
            assert not found[len(mixed[module]) :].any()

    @rule()
    def disable(self) -> None:
        before = [parameter.requires_grad for parameter in self.model.parameters()]
        with self.model.disable_adapter():
            self.assert_close(logits(self.model), self.expected({}))
        assert [parameter.requires_grad for parameter in self.model.parameters()] == before
        self.merged = []  # as PEFT's layers, which cannot switch off a merged adapter otherwise

    @rule(random=pick)
    def rows(self, random: Any) -> None:
        adapter_names = [random.choice([*self.values, "__base__"]) for _ in ROWS]
        if self.merged:
            with pytest.raises(ValueError, match="merged"):
                logits(self.model, ROWS, adapter_names=adapter_names)
            return
        found = logits(self.model, ROWS, adapter_names=adapter_names)
        for i, name in enumerate(adapter_names):
            alone = self.expected({} if name == "__base__" else {name: 1.0}, ROWS[i : i + 1])
            self.assert_close(found[i : i + 1], alone)

    @precondition(lambda self: not self.merged)
    @rule(random=pick)
    def mixtures(self, random: Any) -> None:
        alpha = [[random.uniform(-1, 1) for _ in self.values] for _ in ROWS]
        with self.model.base_model.row_mixture(torch.tensor(alpha, dtype=torch.float64)):
            found = logits(self.model, ROWS)
        for i, row in enumerate(alpha):
            self.assert_close(
                found[i : i + 1], self.expected(dict(zip(self.values, row, strict=True)), ROWS[i : i + 1])
            )

    @rule()
    def generate(self) -> None:
        options = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        found = self.model.generate(IDS, pad_token_id=2, eos_token_id=None, **options)
        for i, step in enumerate(found.logits):
            ids = found.sequences[:, : IDS.shape[1] + i]
            self.assert_close(step, self.expected(self.in_effect(), ids)[:, -1])

    @rule()
    def reload(self) -> None:
        folder = Path(tempfile.mkdtemp(dir=self.folder.name))
        self.model.save_pretrained(folder)
        model: Any = None
        for name in self.values:
            where = folder if name == "default" else folder / name
            if model is None:
                model = PeftModel.from_pretrained(self.make().to(self.dtype), where, adapter_name=name)
            else:
                model.load_adapter(where, name)
        self.model, self.merged, self.active = model, [], [next(iter(self.values))]
        for name, values in self.values.items():
            found = self.in_model(name)
            assert found.keys() == values.keys()
            assert all(torch.equal(found[n].float(), values[n].float()) for n in values)
            self.values[name] = found


class RandomUseTied(RandomUse):
    make = staticmethod(tied)
    targets: ClassVar = ["all-linear", ["up_proj", "down_proj"], ["gate_proj", "o_proj"]]


@pytest.mark.parametrize("machine", [RandomUse, RandomUseTied])
def test_random_use(machine: type[RandomUse]) -> None:
    chosen = settings(
        max_examples=max(1, int(STEPS or 2000) // (2 * STEPS_EACH)),
        stateful_step_count=STEPS_EACH,
        deadline=None,
        database=None,
        derandomize=STEPS is None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # shrinking takes minutes
    )
    run_state_machine_as_test(machine, settings=chosen)
