"""Packed batches: the tokens of several prompts in one row, each with the expert or mixture of its prompt."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from helpers import adapted, randomise, tiny_llama
from torch import nn

from peft_svf import SVFConfig
from peft_svf.tuner.packed import BASE_SLOT, PackedRows

NAMES = ["default", "low", "few"]
PROMPTS = [[5, 9, 11, 7], [8], [30, 12], [21, 22, 23, 24, 25, 26]]
LENGTHS = [len(prompt) for prompt in PROMPTS]
MIXTURES: list[dict[str, float]] = [{"low": 1.0}, {}, {"default": 0.7, "few": -1.5}, {"default": 1.0}]


@pytest.fixture
def model() -> Any:
    model = adapted(tiny_llama(tie_word_embeddings=False), target_modules=r".*(_proj|lm_head)").eval()
    model.add_adapter("low", SVFConfig(target_modules="all-linear", r=7))
    model.add_adapter("few", SVFConfig(target_modules=["down_proj"]))
    for seed, name in enumerate(NAMES[1:]):
        randomise(model, name, seed=seed + 5)
    return model


def one_by_one(model: Any, mixtures: list[dict[str, float]] = MIXTURES) -> torch.Tensor:
    found = []
    for prompt, weights in zip(PROMPTS, mixtures, strict=True):
        with torch.no_grad(), model.base_model.row_mixture([[weights.get(name, 0.0) for name in NAMES]], NAMES):
            found.append(model(input_ids=torch.tensor([prompt])).logits[0])
    return torch.cat(found)


@torch.no_grad()
def packed(model: Any, rows: PackedRows, slots: list[int], keep: torch.Tensor | None = None) -> torch.Tensor:
    owner = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    seen = (owner[:, None] == owner) & torch.ones(len(owner), len(owner)).tril().bool()
    with rows.opened(slots, LENGTHS, keep):
        output = model.base_model.model(
            input_ids=torch.tensor([[token for prompt in PROMPTS for token in prompt]]),
            position_ids=torch.cat([torch.arange(n) for n in LENGTHS])[None],
            attention_mask=seen[None, None],
            **({} if keep is None else {"logits_to_keep": keep}),
        )
    found: torch.Tensor = output.logits[0]
    return found


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_each_token_has_the_mixture_of_its_row(model: Any) -> None:
    rows = PackedRows(model.base_model)
    slots = [rows.add(weights) for weights in MIXTURES]
    assert slots[1] == BASE_SLOT
    assert len(set(slots)) == 4
    close(packed(model, rows, slots), one_by_one(model))
    moved = [*MIXTURES[1:], MIXTURES[0]]
    close(packed(model, rows, [*slots[1:], slots[0]]), one_by_one(model, moved))


def test_rows_that_are_alike(model: Any) -> None:
    rows = PackedRows(model.base_model)
    slot = rows.add({"default": 1.0})
    close(packed(model, rows, [slot] * 4), one_by_one(model, [{"default": 1.0}] * 4))
    base = one_by_one(model, [{}] * 4)
    assert torch.equal(packed(model, rows, [BASE_SLOT] * 4), packed(model, PackedRows(model.base_model), [0] * 4))
    close(packed(model, rows, [BASE_SLOT] * 4), base)  # although an adapter is active


@pytest.mark.parametrize("keep", [[3, 4, 6, 12], [12, 0, 0, 0]])
def test_an_adapted_output_layer_gets_the_kept_tokens(model: Any, keep: list[int]) -> None:
    rows = PackedRows(model.base_model)
    slots = [rows.add(weights) for weights in MIXTURES]
    close(packed(model, rows, slots, torch.tensor(keep)), one_by_one(model)[keep])


def test_slots_keep_their_mixture(model: Any) -> None:
    rows = PackedRows(model.base_model)
    slots = [rows.add(weights) for weights in MIXTURES]
    wanted = one_by_one(model)
    for _ in range(9):  # the tables grow
        rows.add({"few": 2.0})
    randomise(model, "low", seed=77)
    close(packed(model, rows, slots), wanted)


def test_a_freed_slot_is_used_again(model: Any) -> None:
    rows = PackedRows(model.base_model)
    first = rows.add({"low": 1.0})
    rows.remove(first)
    rows.remove(BASE_SLOT)
    taken = [rows.add({"few": 1.0})]
    while taken[-1] != first:
        taken.append(rows.add({"few": 1.0}))
    assert BASE_SLOT not in taken
    close(packed(model, rows, [first] * 4), one_by_one(model, [{"few": 1.0}] * 4))
    other = rows.add({"default": 1.0})  # on all layers, so they look up both: nothing is left of `low`
    mixed: list[dict[str, float]] = [{"few": 1.0}, {"default": 1.0}] * 2
    close(packed(model, rows, [first, other] * 2), one_by_one(model, mixed))


def test_a_step_of_decoding_repeats_the_rows(model: Any) -> None:
    """δ of the tokens is kept between steps. A slot that another mixture got in between must not use the old one."""
    rows, layer = PackedRows(model.base_model), model.base_model.model.model.layers[0].mlp.down_proj
    other, slot = rows.add({"default": 1.0}), rows.add({"few": 1.0})
    x = torch.randn(1, 2, layer.in_features)

    def step() -> torch.Tensor:
        with torch.no_grad(), rows.opened([other, slot], [1, 1]):
            found: torch.Tensor = layer(x)
        return found

    before = step()
    assert torch.equal(step(), before)
    rows.remove(slot)
    assert rows.add({"low": 3.0}) == slot
    after = step()
    assert torch.equal(after[:, 0], before[:, 0])
    assert not torch.allclose(after[:, 1], before[:, 1])


def test_a_packed_batch_belongs_to_its_thread(model: Any) -> None:
    rows = PackedRows(model.base_model)
    slot, ids = rows.add({"few": 3.0}), torch.tensor([[4, 5, 6]])
    seen: list[torch.Tensor] = []

    def other() -> None:
        with torch.no_grad():
            seen.append(model(input_ids=ids, adapter_names=["low"]).logits)

    with torch.no_grad():
        wanted = model(input_ids=ids, adapter_names=["low"]).logits
        with rows.opened([slot], [3]):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
    torch.testing.assert_close(seen[0], wanted)


def test_an_input_of_other_tokens_is_refused(model: Any) -> None:
    rows = PackedRows(model.base_model)
    slots = [rows.add({"low": 1.0}), rows.add({"few": 1.0})]
    with pytest.raises(ValueError, match="q_proj got 4"), rows.opened(slots, [2, 3]), torch.no_grad():
        model.base_model.model(input_ids=torch.tensor([[4, 5, 6, 7]]))


@pytest.mark.parametrize("config", [{"bias": "all"}, {"modules_to_save": ["lm_head"]}])
def test_adapters_that_cannot_be_packed(config: dict[str, Any]) -> None:
    model = adapted(target_modules=["q_proj"], **config)
    with pytest.raises(ValueError, match="`modules_to_save` or `bias`"):
        PackedRows(model.base_model).add({"default": 1.0})


def test_an_expert_of_a_mixture_of_experts_cannot_be_packed() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4)])

    model = adapted(Routed(), target_modules=["0"])
    with pytest.raises(ValueError, match=r"experts\.0.*selected tokens"):
        PackedRows(model.base_model).check(["default"])


def test_a_slot_that_changes_during_a_step_is_read_anew_in_the_next(model: Any) -> None:
    """A new request can take the slot of one that left, while another thread runs the step."""
    rows = PackedRows(model.base_model)
    slots = [rows.add({"default": 1.0}), rows.add({"low": 1.0})]
    layer, table = next(iter(rows._tables.items()))
    values = table.values

    class Changing:
        """The values of a table, which another thread changes when they have just been read."""

        device = values.device

        def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
            found = values[index]
            table.values = values
            rows.remove(slots[1])
            assert rows.add({"few": 1.0, "default": 2.0}) == slots[1]
            return found

    table.values = Changing()  # type: ignore[assignment]
    found = []
    for _ in range(2):
        with rows.opened(slots, [1, 1]):
            found.append(layer.rows(torch.zeros(1, 2, layer.in_features)))  # type: ignore[misc]
    assert torch.equal(found[1][0], values[slots])
    assert not torch.equal(found[0], found[1])
