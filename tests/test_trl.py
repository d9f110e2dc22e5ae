"""TRL's trainers take SVF as they are: policy gradients, SFT and DPO, checkpoints, the weight sync to vLLM."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_llama
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback

from peft_svf import SVFConfig

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

ALPHABET = ["<s>", "<pad>", "</s>", *"abcdefghijklmnopqrstuvwxyz0123456789 +-*/=?!.,:;()'ABCDEFGHI"][:64]
ADAPTER = "adapter_model.safetensors"
KINDS = ["GRPO", "RLOO", "SFT", "DPO"]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    characters = Tokenizer(models.WordLevel({c: i for i, c in enumerate(ALPHABET)}, unk_token="?"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="?",
        padding_side="left",
    )


def many_early_letters(completions: list[str], **kwargs: Any) -> list[float]:
    return [sum(c < "n" for c in completion) / 8 for completion in completions]


def dataset(kind: str) -> Any:
    prompts = [f"{a}+{b}=" for a in range(4) for b in range(4)]
    columns: dict[str, list[str]] = {"prompt": prompts}
    if kind == "SFT":
        columns["completion"] = [f"{a + b}!" for a in range(4) for b in range(4)]
    if kind == "DPO":
        columns["chosen"] = [f"{a + b}!" for a in range(4) for b in range(4)]
        columns["rejected"] = ["no idea"] * 16
    return datasets.Dataset.from_dict(columns)


# small and quiet, on the CPU
SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "logging_steps": 1,
    "max_steps": 2,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def trainer(kind: str, folder: Path, model: Any = None, reward: Any = many_early_letters, **options: Any) -> Trainer:
    """A trainer of two steps with `peft_config=`, or around the PeftModel `model`."""
    options = {
        **SETTINGS,
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "seed": 7,
        **options,
    }
    if kind in ("GRPO", "RLOO"):
        options = {"num_generations": 4, "max_completion_length": 8, **options}
    if kind in ("GRPO", "RLOO", "DPO"):
        options = {"beta": 0.1, **options}
    keywords: dict[str, Any] = {
        "model": model if model is not None else tiny_llama(),
        "args": getattr(trl, f"{kind}Config")(**options),
        "train_dataset": dataset(kind),
        "processing_class": tokenizer(),
        "peft_config": None if isinstance(model, PeftModel) else SVFConfig(target_modules="all-linear"),
    }
    if kind in ("GRPO", "RLOO"):
        keywords["reward_funcs"] = reward
    if "eval_strategy" in options:
        keywords["eval_dataset"] = dataset(kind)
    return getattr(trl, f"{kind}Trainer")(**keywords)


def deltas(model: nn.Module, adapter: str = "default") -> dict[str, torch.Tensor]:
    """δ by its name in a checkpoint."""
    marker = f".svf_delta.{adapter}.weight"
    return {
        n.replace(marker, ".svf_delta.weight"): p.detach() for n, p in model.named_parameters() if n.endswith(marker)
    }


def frozen(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".svf_delta." not in n}


def randomise(model: Any, adapter: str = "default") -> Any:
    generator = torch.Generator().manual_seed(1)
    for delta in deltas(model, adapter).values():
        delta.copy_(torch.randn(delta.shape, generator=generator) * 0.3)
    return model


def trained_expert() -> PeftModel:
    return randomise(get_peft_model(tiny_llama(), SVFConfig(target_modules="all-linear")))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal in every bit."""
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


def logged(run: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in run.state.log_history if key in entry]


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_trains_delta_and_nothing_else(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    run = trainer(kind, tmp_path, tiny_llama(dtype=dtype), max_steps=3)
    before = frozen(run.model)
    run.train()
    assert_same(frozen(run.model), before)
    untouched = {name.replace(".base_layer", "").removeprefix("base_model.model."): p for name, p in before.items()}
    assert_same(
        {name: p for name, p in untouched.items() if "original_module_basis" not in name},
        dict(tiny_llama(dtype=dtype).state_dict()),
    )
    moved = deltas(run.model)
    assert len(moved) == 14
    assert all(delta.dtype == torch.float32 and delta.abs().max() > 0 for delta in moved.values())
    assert all(math.isfinite(loss) for loss in logged(run, "loss"))

    # the reference is the base model, and so, at first, is the policy
    if kind in ("GRPO", "RLOO"):
        kl = logged(run, "kl")
        assert len(kl) == 3
        assert kl[0] == 0
        assert kl[-1] != 0
    if kind == "DPO":
        assert logged(run, "rewards/chosen")[0] == logged(run, "rewards/rejected")[0] == 0
        assert logged(run, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
        assert logged(run, "rewards/margins")[-1] != 0


@pytest.mark.parametrize("kind", ["GRPO", "RLOO", "DPO"])
def test_a_trained_expert_is_its_own_reference(kind: str, tmp_path: Path) -> None:
    expert = trained_expert()
    start = {name: delta.clone() for name, delta in deltas(expert).items()}
    run = trainer(kind, tmp_path, expert, learning_rate=1e-9)
    assert set(expert.peft_config) == {"default", "ref"}
    assert_same(deltas(run.model, "ref"), start)
    assert {n for n, p in run.model.named_parameters() if p.requires_grad} == {
        n.replace(".svf_delta.weight", ".svf_delta.default.weight") for n in start
    }
    run.train()
    assert_same(deltas(run.model, "ref"), start)
    distance = "rewards/chosen" if kind == "DPO" else "kl"
    assert len(logged(run, distance)) == 2
    assert all(abs(value) < 1e-6 for value in logged(run, distance))


def test_the_reference_stays_behind(tmp_path: Path) -> None:
    expert = trained_expert()
    start = {name: delta.clone() for name, delta in deltas(expert).items()}
    run = trainer("GRPO", tmp_path, expert, learning_rate=0.05, max_steps=3)
    run.train()
    assert_same(deltas(run.model, "ref"), start)
    assert all(not torch.equal(delta, start[name]) for name, delta in deltas(run.model).items())
    assert logged(run, "kl")[0] < 1e-6 < logged(run, "kl")[-1]


def test_gradient_checkpointing_trains_the_same(tmp_path: Path) -> None:
    results = []
    for on in (False, True):
        run = trainer("SFT", tmp_path, gradient_checkpointing=on)
        run.train()
        results.append(deltas(run.model))
    for name, delta in results[0].items():
        torch.testing.assert_close(results[1][name], delta, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- checkpoints


class Recorder(TrainerCallback):
    """δ when training begins and after each step."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, torch.Tensor]] = {}

    def _note(self, state: Any, model: nn.Module) -> None:
        self.seen[state.global_step] = {name: delta.clone() for name, delta in deltas(model).items()}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self._note(state, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self._note(state, model)


@pytest.mark.usefixtures("never_fold")  # when a layer starts to fold is not part of a checkpoint
@pytest.mark.parametrize("kind", KINDS)
def test_save_and_resume(kind: str, tmp_path: Path) -> None:
    run, record = trainer(kind, tmp_path, save_strategy="steps", save_steps=1, max_steps=3), Recorder()
    run.add_callback(record)
    run.train()
    for step in (1, 2, 3):
        assert_same(load_file(tmp_path / f"checkpoint-{step}" / ADAPTER), record.seen[step])

    again, resumed = trainer(kind, tmp_path / "again", max_steps=3), Recorder()
    again.add_callback(resumed)
    parameters = {id(p) for p in again.model.parameters()}
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert sorted(resumed.seen) == [1, 2, 3]
    assert_same(resumed.seen[1], record.seen[1])
    assert {id(p) for p in again.model.parameters()} == parameters
    if kind in ("SFT", "DPO"):  # the others draw new completions
        assert_same(resumed.seen[3], record.seen[3])


@pytest.mark.parametrize(("kind", "metric"), [("SFT", "eval_loss"), ("GRPO", "eval_reward"), ("DPO", "eval_loss")])
def test_load_best_model_at_end(kind: str, metric: str, tmp_path: Path) -> None:
    calls = []

    def ever_more(completions: list[str], **kwargs: Any) -> list[float]:
        calls.append(completions)
        return [10 * len(calls) + score for score in many_early_letters(completions)]

    better_every_step: dict[str, Any] = {
        "max_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": metric,
        "greater_is_better": kind != "GRPO",  # the wrong way round, so that the best is not the last
        "per_device_eval_batch_size": 16,
        **({"num_generations_eval": 4} if kind == "GRPO" else {}),
    }
    run, record = trainer(kind, tmp_path, reward=ever_more, **better_every_step), Recorder()
    run.add_callback(record)
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.name == "checkpoint-1"
    assert_same(deltas(run.model), load_file(best / ADAPTER))
    assert_same(deltas(run.model), record.seen[1])
    assert all(not torch.equal(delta, record.seen[3][name]) for name, delta in deltas(run.model).items())
    assert {p.requires_grad for n, p in run.model.named_parameters() if ".svf_delta." in n} == {True}


def test_the_saved_model_is_an_ordinary_adapter(tmp_path: Path) -> None:
    run = trainer("SFT", tmp_path)
    run.train()
    run.save_model(str(tmp_path / "final"))
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "final")
    assert_same(deltas(loaded), deltas(run.model))
    assert set(load_file(tmp_path / "final" / ADAPTER)) == set(deltas(run.model))


# -------------------------------------------------------------------------------------------------------- sync to vLLM


def sent_to_vllm(model: PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    """What TRL 1.16 sends (`trl/generation/vllm_generation.py`, `_iter_named_params`), with merge and unmerge."""
    model.merge_adapter()
    for name, param in model.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if model.prefix in name:
            continue
        if "original_module" in name:
            continue
        for prefix in ("_checkpoint_wrapped_module.", "modules_to_save.default."):
            name = name.replace(prefix, "")
        yield name, param.data
    model.unmerge_adapter()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extra", [{}, {"modules_to_save": ["lm_head"]}])
def test_the_weight_sync_sends_the_base_model_s_names(extra: dict[str, Any], dtype: torch.dtype) -> None:
    config = SVFConfig(target_modules="all-linear", **extra)
    model = randomise(get_peft_model(tiny_llama(dtype=dtype), config))
    if not extra:  # with `modules_to_save`, TRL sends those of every adapter
        model.add_adapter("ref", config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    base = tiny_llama(dtype=dtype).state_dict()
    for _ in range(3):
        sent = {name: value.clone() for name, value in sent_to_vllm(model)}
        assert {name: value.shape for name, value in sent.items()} == {
            name: value.shape for name, value in base.items()
        }
        assert {value.dtype for value in sent.values()} == {dtype}
        same = {name for name in base if torch.equal(sent[name], base[name])}
        assert same == {name for name in base if "_proj" not in name}
        assert_same(dict(model.state_dict()), before)
    served = tiny_llama(dtype=dtype)
    served.load_state_dict(sent)
    ids = torch.tensor([[3, 17, 5, 42, 8]])
    with torch.no_grad():
        difference = (served(ids).logits - model(ids).logits).abs().max()
    assert difference <= (1e-5 if dtype == torch.float32 else 2e-2)


def test_trl_still_filters_as_this_test_does() -> None:
    """The name of the basis is chosen for these two lines."""
    import inspect

    from trl.generation import vllm_generation

    source = inspect.getsource(vllm_generation)
    assert "model.prefix in name" in source
    assert '"original_module" in name' in source


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_training_goes_on_across_weight_syncs(kind: str, tmp_path: Path) -> None:
    """The loop of TRL with vLLM: sync before each generation."""

    class Sync(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
            before = frozen(model)
            merged = dict(sent_to_vllm(model))
            assert len(merged) == len(tiny_llama().state_dict())
            assert_same(frozen(model), before)

    plain = trainer(kind, tmp_path, max_steps=3)
    plain.train()
    synced = trainer(kind, tmp_path, max_steps=3)
    synced.add_callback(Sync())
    synced.train()
    assert_same(deltas(synced.model), deltas(plain.model))
