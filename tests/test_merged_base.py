"""A base model that an adapter was merged into is not the base model of the adapter any more."""

from __future__ import annotations

import copy
import gc
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import adapted, base_model, logits, make_tokenizer, randomise, save_expert, svf_layers, tiny_llama
from peft import PeftModel, get_peft_model

from peft_svf import AdaptiveMixture, SVFConfig, SVFRuntimeConfig
from peft_svf.tuner import merged_weights
from peft_svf.tuner import model as model_module
from peft_svf.tuner.merged_weights import remember_merged

MERGED = "before 'default' was merged into it: 14 of 14 weights differ. Load the base model again"


@pytest.fixture(scope="module", params=[{}, {"r": 8}], ids=["full", "r=8"])
def saved(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Two experts, `default` and `other`, and their config."""
    folder = tmp_path_factory.mktemp("experts")
    runtime = SVFRuntimeConfig(use_cache=False)
    model = adapted(runtime_config=runtime, **request.param)
    model.add_adapter("other", SVFConfig(target_modules="all-linear", runtime_config=runtime, **request.param))
    randomise(model, "other", std=0.1, seed=2).save_pretrained(folder)
    return folder, request.param


def merged(config: dict[str, Any], **options: Any) -> Any:
    model = adapted(tiny_llama(**options), **config)
    return model.merge_and_unload()


def not_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(layers: Any) -> None:
        raise AssertionError("decomposed")

    monkeypatch.setattr(model_module, "build_bases", refuse)


def test_its_adapters_are_refused_at_once(saved: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, config = saved
    base = merged(config)
    expected, state = logits(base), list(base.state_dict())
    not_decomposed(monkeypatch)
    with pytest.raises(ValueError, match=MERGED):
        PeftModel.from_pretrained(base, folder)
    with pytest.raises(ValueError, match=MERGED):
        AdaptiveMixture.from_pretrained(base, {"a": folder / "other", "b": folder})
    with pytest.raises(ValueError, match=MERGED):
        base.load_adapter(str(folder / "other"))
    assert torch.equal(logits(base), expected)
    assert list(base.state_dict()) == state


def test_in_16_bit(saved: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, config = saved
    base = merged(config, dtype=torch.bfloat16)
    not_decomposed(monkeypatch)
    with pytest.raises(ValueError, match=MERGED):
        PeftModel.from_pretrained(base, folder)


def test_a_weight_that_is_written_back_is_the_base_model(saved: tuple[Path, dict[str, Any]]) -> None:
    folder, config = saved
    base = merged(config)
    base.load_state_dict(tiny_llama().state_dict())
    PeftModel.from_pretrained(base, folder).unload()
    written = merged(config)
    for parameter, original in zip(written.parameters(), tiny_llama().parameters(), strict=True):
        parameter.data = original.data
    PeftModel.from_pretrained(written, folder)


def test_some_weights_written_back(saved: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, config = saved
    base = merged(config)
    base.model.layers[0].load_state_dict(tiny_llama().model.layers[0].state_dict())
    not_decomposed(monkeypatch)
    with pytest.raises(ValueError, match="7 of 7 weights differ"):
        PeftModel.from_pretrained(base, folder)


def test_unloaded_without_merging(saved: tuple[Path, dict[str, Any]]) -> None:
    folder, config = saved
    base = adapted(**config).unload()
    PeftModel.from_pretrained(base, folder)
    model = adapted(**config)
    model.merge_adapter()
    model.unmerge_adapter()
    PeftModel.from_pretrained(model.unload(), folder)


def test_adapters_of_the_merged_model_fit_it(saved: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    base = merged(saved[1])
    second = randomise(get_peft_model(base, SVFConfig(target_modules="all-linear", **saved[1])), seed=7).eval()
    expected = logits(second)
    second.save_pretrained(tmp_path)
    base = second.unload()
    assert torch.allclose(logits(PeftModel.from_pretrained(base, tmp_path)), expected, atol=1e-5)


@pytest.mark.parametrize("std", [0.02, 0.3])
def test_adapters_of_the_merged_model_fit_it_although_rounding_turned_its_vectors(std: float, tmp_path: Path) -> None:
    base = adapted(tiny_llama(dtype=torch.bfloat16, hidden_size=64), std=std).merge_and_unload()
    second = randomise(get_peft_model(base, SVFConfig(target_modules="all-linear")), seed=7).eval()
    expected = logits(second)
    second.save_pretrained(tmp_path)
    base = second.unload()
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path)), expected)


def test_the_check_can_be_changed(saved: tuple[Path, dict[str, Any]]) -> None:
    folder, config = saved
    for policy in ("warn", "ignore"):
        base = merged(config)
        given = SVFConfig.from_pretrained(folder, runtime_config=SVFRuntimeConfig(base_check=policy))
        with pytest.warns(UserWarning, match="another base model") if policy == "warn" else _quiet():
            PeftModel.from_pretrained(base, folder, config=given)


def _quiet() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def test_a_change_that_the_base_check_accepts(tmp_path: Path) -> None:
    model = adapted(std=1e-5)
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(model.merge_and_unload(), tmp_path)


def test_nothing_is_saved_with_the_model() -> None:
    base, plain = merged({}), tiny_llama()
    assert [vars(m).keys() for m in base.modules()] == [vars(m).keys() for m in plain.modules()]
    buffer = io.BytesIO()
    torch.save(copy.deepcopy(base), buffer)
    assert b"merged" not in buffer.getvalue()
    gc.collect()
    marks = len(merged_weights._merged)
    del base
    gc.collect()
    assert len(merged_weights._merged) < marks


@pytest.mark.parametrize("config", [{}, {"r": 8}])
def test_the_numbers_are_those_of_the_merged_weights(config: dict[str, Any]) -> None:
    model = adapted(std=1.0, **config)  # some 1 + δ are negative, and the order changes
    layers = list(svf_layers(model).values())
    known = {layer.get_base_layer(): layer.shape for layer in layers}
    base = model.merge_and_unload()
    remember_merged(layers)
    marks = {module: merged_weights._merged[module] for module in known}
    for layer in svf_layers(get_peft_model(base, SVFConfig(target_modules="all-linear", **config))).values():
        found = layer.fingerprint("default")
        assert found is not None
        (numbers,) = marks[layer.get_base_layer()].fingerprints.values()
        assert len(numbers) == len(found) or config
        assert numbers == pytest.approx(found[: len(numbers)], rel=1e-4, abs=2e-3)


def test_the_command_line_names_its_option(tmp_path: Path) -> None:
    testing = pytest.importorskip("typer.testing")
    from peft_svf.cli.app import app

    base_model(seed=3).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    expert = save_expert(tmp_path / "expert", SVFConfig(target_modules="all-linear"), 0)
    words = ["--model_name_or_path", str(tmp_path / "base"), "--expert", f"a={expert}", "--dispatch", "mixture"]
    done = testing.CliRunner().invoke(app, ["generate", *words, "--prompt", "1 + 2"])
    assert done.exit_code == 1
    assert "made for another base model" in done.stderr
    assert done.stderr.strip().endswith("To use it anyway, pass --base_check warn.")
    assert "SVFRuntimeConfig" not in done.stderr
    config = json.loads((Path(expert) / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (Path(expert) / "adapter_config.json").write_text(json.dumps(config))
    words = ["--model_name_or_path", str(tmp_path / "base"), "--adapter_name_or_path", expert, "--max_steps", "1"]
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 + 2", "completion": "3"}\n' * 4)
    words += ["--data", str(tmp_path / "rows.jsonl"), "--objective", "sft", "--output_dir", str(tmp_path / "out")]
    done = testing.CliRunner().invoke(app, ["train", *words])
    assert done.exit_code == 1
    assert "made for another base model" in done.stderr
    assert "base_check" not in done.stderr
