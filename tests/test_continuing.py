"""`peft-svf train` from the folder of an adapter continues its training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import svf_layers, tiny_llama
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file
from test_training import base as base
from test_training import data as data
from test_training import script
from test_trl import ADAPTER, randomise
from transformers import AutoModelForCausalLM

from peft_svf import SVFConfig
from peft_svf.training import Record, run
from peft_svf.training.run import build, main, parse
from peft_svf.tuner.deltas import adapter_deltas


def expert_on(base: Path, folder: Path, **config: Any) -> Path:
    """An expert with random δ that names its base model, as a training saves it."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config = {"target_modules": ["q_proj", "down_proj"], "r": 9, "task_type": "CAUSAL_LM", **config}
    randomise(get_peft_model(model, SVFConfig(**config))).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("objective", ["grpo", "rloo", "reinforce"])
def test_a_training_continues_an_expert(objective: str, base: Path, data: Path, tmp_path: Path) -> None:
    expert = expert_on(base, tmp_path / "expert")
    start = load_file(expert / ADAPTER)
    more = {"num_generations": None} if objective == "reinforce" else {}
    options = script(expert, data, tmp_path / "more", objective=objective, beta=0.1, max_steps=2, **more)
    trainer, *_ = build(*parse(options)[:4])
    assert [tuple(delta.shape) for delta in adapter_deltas(trainer.model).values()] == [(9,)] * 4
    record = main(options)

    end = load_file(tmp_path / "more" / ADAPTER)
    assert end.keys() == start.keys()
    assert all(0 < (end[name] - start[name]).abs().max() < 0.1 for name in end)
    assert not (tmp_path / "more" / "ref").exists()
    assert PeftConfig.from_pretrained(tmp_path / "more").base_model_name_or_path == str(base)
    assert (record.continues, record.base_model) == (str(expert), str(base))
    assert record.accuracy_before is not None
    card = (tmp_path / "more" / "README.md").read_text(encoding="utf-8")
    assert "continuing `expert`" in card
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "more")


def test_the_accuracy_before_is_that_of_the_expert(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expert, seen = expert_on(base, tmp_path / "expert"), []

    def spied(model: Any, *args: Any, **kwargs: Any) -> float:
        seen.append({name: torch.as_tensor(delta).clone() for name, delta in adapter_deltas(model).items()})
        assert not any(layer.disable_adapters for layer in svf_layers(model).values())
        return 0.125

    monkeypatch.setattr(run, "greedy_accuracy", spied)
    record: Record = main(script(expert, data, tmp_path / "more", max_steps=1, eval_strategy="no", eval_steps=None))
    assert record.accuracy_before == 0.125
    start = load_file(expert / ADAPTER)
    assert len(seen) == 1
    assert sorted(float(delta.sum()) for delta in seen[0].values()) == sorted(float(d.sum()) for d in start.values())


def test_a_continued_training_resumes(base: Path, data: Path, tmp_path: Path) -> None:
    expert = expert_on(base, tmp_path / "expert")
    options = script(expert, data, tmp_path / "more", beta=0.1)
    main([*options, "--max_steps", "1"])
    record = main([*options, "--max_steps", "2", "--resume_from_checkpoint", "true"])
    assert [entry["step"] for entry in record.history if "reward" in entry] == [1, 2]


def test_an_adapter_of_another_method(base: Path, data: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")).save_pretrained(
        tmp_path / "lora"
    )
    _, training, adapter, *_ = parse(script(tmp_path / "lora", data, tmp_path / "more"))
    assert (adapter.peft_type, adapter.model_name_or_path) == ("lora", str(base))
    assert training.learning_rate == 1e-4


@pytest.mark.parametrize("option", [{"r": 4}, {"target_modules": "q_proj"}, {"peft_type": "lora"}, {"lora_r": 4}])
def test_options_of_a_new_adapter_are_refused(option: dict[str, Any], base: Path, data: Path, tmp_path: Path) -> None:
    expert = expert_on(base, tmp_path / "expert")
    with pytest.raises(ValueError, match=rf"--{next(iter(option))} would have no effect: .*trained svf adapter"):
        parse(script(expert, data, tmp_path / "more", **option))


def test_an_adapter_without_a_base_model_is_named(data: Path, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), SVFConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "expert")
    with pytest.raises(ValueError, match="expert is an adapter that does not name its base model"):
        parse(script(tmp_path / "expert", data, tmp_path / "more"))


def test_a_whole_model_next_to_an_adapter_config_is_a_model(base: Path, data: Path, tmp_path: Path) -> None:
    expert = expert_on(base, tmp_path / "expert")
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(expert)
    _, _, adapter, *_ = parse(script(expert, data, tmp_path / "more"))
    assert (adapter.expert, adapter.model_name_or_path) == (None, str(expert))


def test_a_wrong_option_is_refused_before_the_hub_is_asked(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("peft_svf.training.continuing.find_adapter_config_file", lambda name, **_: asked.append(name))
    with pytest.raises(ValueError, match=r"no option --dta\. Did you mean --data"):
        parse([*script(Path("someone/model"), data, tmp_path / "out"), "--dta", "x"])
    assert asked == []
    parse(script(Path("someone/model"), data, tmp_path / "out"))
    assert asked == ["someone/model"]


def test_a_missing_folder_is_not_taken_for_a_name_on_the_hub(data: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere\. Pass a folder or a Hub id"):
        parse(script(tmp_path / "nowhere", data, tmp_path / "out"))
