"""Trainings that would change nothing are errors: frozen experts, optimizers without δ, modules without a gradient."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import IDS, adapted, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from test_trl import KINDS, SETTINGS, dataset, deltas, tokenizer, trainer
from torch import nn

from peft_svf import SVFConfig
from peft_svf.training import DeltaIsTrained, ExactState, ReinforceConfig, ReinforceTrainer


@pytest.fixture
def expert(tmp_path: Path) -> str:
    adapted().save_pretrained(tmp_path / "expert")
    return str(tmp_path / "expert")


def frozen(expert: str) -> PeftModel:
    return PeftModel.from_pretrained(tiny_llama(), expert)


def reinforce(model: Any, folder: Path, **options: Any) -> ReinforceTrainer:
    settings = {**SETTINGS, "output_dir": str(folder), "per_device_train_batch_size": 4, "max_completion_length": 5}
    return ReinforceTrainer(
        model,
        reward_funcs=lambda completions, **_: [1.0] * len(completions),
        args=ReinforceConfig(**{**settings, **options}),
        train_dataset=dataset("GRPO"),
        processing_class=tokenizer(),
    )


# ------------------------------------------------------------------------------------------------------ frozen experts


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_trl_with_a_frozen_expert(kind: str, checkpointing: bool, expert: str, tmp_path: Path) -> None:
    """The reference pass (GRPO, RLOO, DPO) or the checkpointing would let the training run to its end."""
    run = trainer(kind, tmp_path, frozen(expert), gradient_checkpointing=checkpointing)
    before = {name: delta.clone() for name, delta in deltas(run.model).items()}
    with pytest.raises(ValueError, match=r"Adapters? 'default'.* would not be trained.*is_trainable=True"):
        run.train()
    assert all(torch.equal(delta, before[name]) for name, delta in deltas(run.model).items())


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("callback", [ExactState, DeltaIsTrained, None])
def test_reinforce_with_a_frozen_expert(callback: Any, beta: float, expert: str, tmp_path: Path) -> None:
    run = reinforce(frozen(expert), tmp_path, beta=beta)
    if callback is not None:
        run.add_callback(callback())
    with pytest.raises(ValueError, match=r"'default'.* would not be trained"):
        run.train()
    assert run.state.global_step == 0


@pytest.mark.parametrize("kind", KINDS)
def test_trl_with_a_trainable_expert(kind: str, expert: str, tmp_path: Path) -> None:
    run = trainer(kind, tmp_path, PeftModel.from_pretrained(tiny_llama(), expert, is_trainable=True))
    run.add_callback(ExactState())
    before = {name: delta.clone() for name, delta in deltas(run.model).items()}
    run.train()
    assert not any(torch.equal(delta, before[name]) for name, delta in deltas(run.model).items())


def test_a_custom_loop_with_a_frozen_expert(expert: str) -> None:
    model = frozen(expert)
    model.train()
    with pytest.raises(ValueError, match=r"Adapter 'default' would not be trained.*model\.eval"):
        model(input_ids=IDS, labels=IDS)
    with pytest.warns(UserWarning, match="Adapter 'default' would not be trained"):
        model(input_ids=IDS)
    model.set_requires_grad("default")
    model(input_ids=IDS, labels=IDS).loss.backward()


def test_an_expert_that_only_lets_gradients_through_may_be_frozen(expert: str) -> None:
    """Inference, a soft prompt, and an adapter of another method next to it."""
    model = frozen(expert)
    model(input_ids=IDS, labels=IDS)  # not put into training mode
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            model(input_ids=IDS, labels=IDS)
        prompt = torch.randn(2, 8, 32, requires_grad=True)
        model(inputs_embeds=prompt, labels=IDS).loss.backward()
        assert prompt.grad is not None
        torch.optim.SGD([prompt], lr=1.0).step()
        model.eval()
        model(input_ids=IDS, labels=IDS)
        head = nn.Linear(64, 2)
        model.get_base_model().model.norm.weight.requires_grad_(True)
        model.train()
        head(model(input_ids=IDS).logits).sum().backward()
        torch.optim.SGD([*head.parameters(), *model.parameters()], lr=1e-3).step()


# ---------------------------------------------------------------------------------------------------------- optimizers


def test_an_optimizer_of_before_the_adapter() -> None:
    base = tiny_llama()
    optimizer = torch.optim.AdamW(base.parameters())
    model = get_peft_model(base, SVFConfig(target_modules="all-linear"), adapter_name="math")
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    with pytest.raises(ValueError, match="Adapter 'math' would not be trained: the optimizer has no trainable"):
        optimizer.step()
    torch.optim.AdamW(model.parameters()).step()


def test_an_optimizer_of_before_transformers_add_adapter() -> None:
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.add_adapter(SVFConfig(target_modules=["q_proj"]), adapter_name="logic")
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    with pytest.raises(ValueError, match="Adapter 'logic' would not be trained"):
        optimizer.step()


def test_an_optimizer_of_another_model_is_left_alone() -> None:
    model = adapted()
    model.train()
    other = nn.Linear(2, 2).requires_grad_(False)
    torch.optim.SGD(other.parameters(), lr=0.1).step()


@pytest.mark.parametrize("which", ["none", "some"])
def test_a_trainer_with_an_optimizer_that_lacks_delta(which: str, tmp_path: Path) -> None:
    model = adapted(target_modules=["q_proj", "v_proj"])
    model.get_base_model().model.norm.weight.requires_grad_(True)
    names = {"none": ["norm"], "some": ["norm", "q_proj.svf_delta"]}[which]
    held = [p for name, p in model.named_parameters() if p.requires_grad and any(part in name for part in names)]
    run = reinforce(model, tmp_path)
    run.optimizer = torch.optim.AdamW(held)
    with pytest.raises(ValueError, match=r"lacks \d of 4 vectors δ.*[qv]_proj"):
        run.train()


# ----------------------------------------------------------------------------------------------------------- gradients


class Ignoring(nn.Module):
    """A layer that a model calls without using the result."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.unused = module, nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.unused(x)
        return self.module(x, *args, **kwargs)  # type: ignore[no-any-return]


def test_modules_without_a_gradient_are_named(tmp_path: Path) -> None:
    base = tiny_llama()
    base.model.layers[1].mlp = Ignoring(base.model.layers[1].mlp)
    run = trainer("SFT", tmp_path, get_peft_model(base, SVFConfig(target_modules=["q_proj", "unused"])))
    run.add_callback(DeltaIsTrained())
    with pytest.warns(UserWarning, match=r"1 adapted modules got no gradient in 2 steps.*layers\.1\.mlp\.unused"):
        run.train()


def test_no_gradient_at_all(tmp_path: Path) -> None:
    base = tiny_llama()
    base.model.layers[1].mlp = Ignoring(base.model.layers[1].mlp)
    model = get_peft_model(base, SVFConfig(target_modules=["unused"]))
    base.model.norm.weight.requires_grad_(True)
    run = trainer("SFT", tmp_path, model)
    run.add_callback(DeltaIsTrained())
    with pytest.raises(ValueError, match="no δ got a gradient in the first step"):
        run.train()


def test_other_methods_are_left_alone(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], r=2))
    run = trainer("SFT", tmp_path, model)
    run.add_callback(ExactState())
    run.train()
