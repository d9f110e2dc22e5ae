"""Model cards, and the report of a training."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import tiny_llama
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model

import peft_svf
from peft_svf import SVFConfig
from peft_svf.reporting.cards import (
    complete_card,
    is_mixture_card,
    loading_code,
    merged_card,
    mixture_card,
    publish_card,
    training_card,
)
from peft_svf.training.report import Record, write_report

RECIPE = {"objective": "reinforce", "learning_rate": 0.002, "system_prompt": "Réponds {{ bref }}."}


def record(**changes: Any) -> Record:
    values: dict[str, Any] = {
        "name": "sums",
        "recipe": RECIPE,
        "base_model": "someone/base",
        "trainable": 12345,
        "accuracy_before": 0.25,
        "accuracy_after": 0.5,
        "test_size": 40,
        "example": ("What is\n1 + 1?", "2"),
        "seconds": 61.2,
        "history": [{"step": 1, "reward": 0.5, "kl": float("nan")}],
        "best_step": 20,
    }
    return Record(**{**values, **changes})


def body(card: str) -> str:
    """The text of a card, in which no placeholder and no run of blank lines is left."""
    assert "\n\n\n" not in card
    assert card.endswith("\n")
    return ModelCard(card).text


@pytest.mark.parametrize("example", [None, ("What is\n1 + 1?", "2")])
@pytest.mark.parametrize("images", [[], ["![curve](curve.png)", "![delta](delta.png)"]])
@pytest.mark.parametrize("after", [None, 0.5])
def test_the_card_of_a_training(example: tuple[str, str] | None, images: list[str], after: float | None) -> None:
    values = record(accuracy_after=after, accuracy_by_category={"a": 0.1, "b": 1.0}).to_dict()
    card = training_card(values, "out/sums", example=example, images=images)
    data, text = ModelCard(card).data, body(card)
    assert (data.base_model, data.tags) == ("someone/base", ["peft", "svf", "transformer-squared", "reinforce"])
    assert "# sums\n\nAn SVF expert vector for `someone/base`, trained by REINFORCE.\n" in text
    assert ("> What is\n> 1 + 1?\n>\n> **2**\n" in text) is (example is not None)
    assert ("on 40 held-out questions: 0.250 before, **0.500** after.\n" in text) is (after is not None)
    assert "By category: a 0.100, b 1.000.\n" in text
    assert "12,345 trainable parameters, 61 s of training, kept the model of step 20. The full log" in text
    assert "\n".join(images) in text
    assert loading_code("someone/base", "out/sums") in text
    assert "system_prompt: Réponds {{ bref }}.\n```\n" in text  # a recipe is no template


def test_the_card_of_another_method() -> None:
    values = record(recipe={"peft_type": "lora"}, best_step=None).to_dict()
    card = training_card(values, "out/sums", svf=False)
    assert ModelCard(card).data.tags == ["peft", "grpo"]
    assert "A LORA adapter for `someone/base`, trained by GRPO." in body(card)
    assert "peft_svf" not in card
    assert "61 s of training. The full log" in card


RESULT = SimpleNamespace(
    settings={"method": "cem", "examples": 12, "seed": 3},
    reason="CEM on the reward, as asked",
    objective="reward",
    choice="searched",
    candidates=1200,
    usage=SimpleNamespace(evaluations=3400, tokens=56000, seconds=7.4),
    evaluated_on="validation",
    num_evaluated=40,
    scores={"base": 0.25, "searched": 0.5},
    intervals={"base": (0.1, 0.4), "searched": (0.3, 0.7)},
    difference=(0.25, 0.1, 0.4),
    groups=["all"],
    expected={"base": 0.2, "searched": 0.6},
)


@pytest.mark.parametrize("result", [None, RESULT])
def test_the_card_of_a_mixture(result: Any, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    sources = {"one": str(tmp_path / "one"), "two": "someone/two"}
    card = mixture_card("mix", str(tmp_path), sources, {"one": 0.75, "two": -0.5}, result)
    data, text = ModelCard(card).data, body(card)
    assert (data.base_model, data.tags) == (None, ["peft", "svf", "transformer-squared", "mixture"])
    assert str(tmp_path) not in card
    assert "| expert | source | α |\n|---|---|---|\n| one | one | 0.75 |\n| two | someone/two | -0.5 |\n" in text
    assert 'model = PeftModel.from_pretrained(base_model, "mix")\n```\n' in text
    assert ("The search scored 1,200 mixtures in 3,400 evaluations" in text) is (result is not None)
    assert ("| base | 0.250 | 0.100 to 0.400 |\n| searched | 0.500 | 0.300 to 0.700 |\n\nSearched" in text) is bool(
        result
    )
    assert ("best baseline: +0.250 (+0.100 to +0.400)." in text) is bool(result)
    assert ("decides between equals: base 0.200, searched 0.600." in text) is bool(result)
    path = tmp_path / "README.md"
    path.write_text(card)
    assert is_mixture_card(path)
    path.write_text(text.partition("-->")[2])
    assert not is_mixture_card(path)


def test_the_card_of_a_merged_model(tmp_path: Path) -> None:
    card = merged_card(str(tmp_path / "math"), str(tmp_path), 14)
    assert str(tmp_path) not in card.replace(tmp_path.name, "")
    assert f"# {tmp_path.name} with the expert math\n" in body(card)
    assert ModelCard(merged_card("me/math", "someone/base", 14)).data.base_model == "someone/base"


def test_a_card_is_completed_once(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("---\ntags:\n- mine\n---\n\n# Mine\n")
    complete_card(path, "someone/base", "me/math", "v1")
    first = path.read_text()
    assert ModelCard(first).data.tags == ["mine", "peft", "svf", "transformer-squared"]
    assert "# Mine\n\n## How to load it\n" in first
    assert "from_pretrained(\"someone/base\", revision='v1')" in first
    complete_card(path, "someone/base", "me/math", "v1")
    assert path.read_text() == first


def test_a_published_card_names_the_repository(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    publish_card(path, "someone/base", "me/math")
    assert "# math\n" in path.read_text()
    assert 'PeftModel.from_pretrained(base_model, "me/math")' in path.read_text()
    path.write_text(training_card(record(base_model=str(tmp_path)).to_dict(), str(tmp_path / "math")))
    publish_card(path, "someone/base", "me/sums")
    assert ModelCard.load(path).data.base_model is None
    assert 'PeftModel.from_pretrained(base_model, "me/sums")' in path.read_text()
    assert str(tmp_path / "math") not in path.read_text()


@pytest.mark.parametrize("config", [SVFConfig(target_modules=["q_proj"]), LoraConfig(target_modules=["q_proj"])])
def test_a_report_without_metadata_of_the_package(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a clone on PYTHONPATH: the report is written after the training and must not fail."""
    found = importlib.metadata.Distribution.from_name

    def without_ours(name: str) -> importlib.metadata.Distribution:
        if name in ("peft-svf", "trl"):
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", without_ours)
    model = get_peft_model(tiny_llama(), config)
    write_report(model, record(), tmp_path)
    machine = json.loads((tmp_path / "training.json").read_text())["machine"]
    assert (machine["peft-svf"], machine["trl"]) == (peft_svf.__version__, None)
    assert machine["torch"] == torch.__version__
    assert ("import peft_svf" in (tmp_path / "README.md").read_text()) is (config.peft_type == "SVF")
