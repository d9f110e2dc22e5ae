"""One verdict on an adapter at every door: every way to load, merge, export, show or push one, times every damage."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import adapted, deltas, logits, make_tokenizer, svf_layers, tiny_llama
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from test_bad_input import anatomy
from transformers import AutoModelForCausalLM

from peft_svf import AdaptiveMixture, SVFConfig, SVFRuntimeConfig
from peft_svf.interop import import_expert, inspect_adapter, merge_to_folder, push_expert, to_lora
from peft_svf.interop.inspect import check_spectrum
from peft_svf.mixture.loading import CLASSIFIER, load_experts

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MODULE = "model.layers.1.mlp.down_proj"
KEY = f"base_model.model.{MODULE}.svf_delta.weight"
FRESH = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.fixture(autouse=True, scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, another one, one of another architecture, and an adapter of the first."""
    folder = tmp_path_factory.mktemp("world")
    tiny_llama().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    tiny_llama(seed=1).save_pretrained(folder / "other")
    tiny_llama(hidden_size=24, intermediate_size=40, num_hidden_layers=3).save_pretrained(folder / "strange")
    for other in ("other", "strange"):
        make_tokenizer().save_pretrained(folder / other)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFT_SVF_CACHE", str(folder / "cache"))
        model = adapted(AutoModelForCausalLM.from_pretrained(folder / "base"), task_type="CAUSAL_LM")
        for delta in deltas(model).values():
            delta.data.copy_(delta.data.half())  # so that a file in fp16 is exact
        model.save_pretrained(folder / "adapter")
        torch.save(logits(model), folder / "expected.pt")
    return folder


@pytest.fixture(autouse=True)
def shared_cache(world: Path, own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_SVF_CACHE", str(world / "cache"))
    monkeypatch.setattr(transformers.utils.loading_report, "log_state_dict_report", lambda *args, **kwargs: None)


# -------------------------------------------------------------------------------------------------------------- damage


def rewritten(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = {key: value.clone() for key, value in load_file(folder / WEIGHTS).items()}
        change(state)
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def cut(folder: Path, keep: float = 0.5) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: int(len(data) * keep)])


def as_bin(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


# the damage, and what each door says about it
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (rewritten(lambda state: state.pop(KEY)), rf"no values for 1 of 14 adapted modules.*{MODULE}"),
    "extra": (
        rewritten(lambda state: state.update({KEY.replace("1.mlp", "7.mlp"): torch.ones(32)})),
        r"1 tensors that belong to no adapted module.*layers\.7\.mlp",
    ),
    "stranger": (
        rewritten(lambda state: state.update({"base_model.model.head.extra": torch.ones(3)})),
        r"tensors that belong to no adapted module.*head\.extra|more than δ \(.*head\.extra",
    ),
    "short": (rewritten(lambda state: state.update({KEY: torch.ones(7)})), rf"δ of shape \[7\] in {MODULE}"),
    "2-D": (rewritten(lambda state: state.update({KEY: torch.ones(32, 1)})), rf"δ of shape \[32, 1\] in {MODULE}"),
    "nan": (rewritten(lambda state: state[KEY][3:4].fill_(float("nan"))), rf"NaN or Inf in 1 of 14.*{MODULE}"),
    "inf": (rewritten(lambda state: state[KEY][3:4].fill_(float("-inf"))), rf"NaN or Inf in 1 of 14.*{MODULE}"),
    "integers": (rewritten(lambda state: state.update({KEY: state[KEY].to(torch.int8)})), rf"{MODULE}.* in torch.int8"),
    "empty state": (rewritten(lambda state: state.clear()), r"no values for 14 of 14 adapted modules"),
    "truncated": (cut, rf"{WEIGHTS} is damaged or cut short"),
    "empty": (lambda folder: cut(folder, 0), rf"{WEIGHTS} is damaged or cut short"),
}
HEALTHY: dict[str, Callable[[Path], Any]] = {
    "complete": lambda folder: None,
    "fp16": rewritten(lambda state: state.update({key: value.half() for key, value in state.items()})),
    "bin": as_bin,
    # as `get_peft_model_state_dict` gives it for a model that transformers adapted
    "without prefix": rewritten(
        lambda state: state.update({key.removeprefix("base_model.model."): state.pop(key) for key in [*state]})
    ),
}
BASES = {
    "other": r"another base model: 14 of 14 weights differ",
    "strange": r"another base model|belongs? to no adapted module|shape \[32\].*expected \[24\]",
}


def copied(world: Path, target: Path, base: str = "base") -> Path:
    folder = Path(shutil.copytree(world / "adapter", target / "adapter"))
    config = json.loads((folder / CONFIG).read_text())
    config["base_model_name_or_path"] = str(world / base)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


# --------------------------------------------------------------------------------------------------------------- doors


def second(model: Any, folder: Path) -> Any:
    model.load_adapter(str(folder), "second")
    model.set_adapter("second")
    return model


def by_state_dict(model: Any, folder: Path) -> Any:
    found = get_peft_model(model, SVFConfig(**FRESH))
    set_peft_model_state_dict(found, load_peft_weights(str(folder), device="cpu"))
    return found


def injected(model: Any, folder: Path) -> Any:
    config = SVFConfig.from_pretrained(folder)
    state = load_peft_weights(str(folder), device="cpu")
    found = inject_adapter_in_model(
        config, model, state_dict={key.removeprefix("base_model.model."): value for key, value in state.items()}
    )
    set_peft_model_state_dict(found, state)
    return found


def transformers_state(model: Any, folder: Path) -> Any:
    state = load_peft_weights(str(folder), device="cpu")
    model.load_adapter(peft_config=SVFConfig(**FRESH), adapter_state_dict=state)
    return model


def transformers_folder(model: Any, folder: Path, **options: Any) -> Any:
    model.load_adapter(str(folder), **options)
    return model


def transformers_subfolder(model: Any, folder: Path) -> Any:
    model.load_adapter(str(folder.parent), adapter_kwargs={"subfolder": folder.name})
    return model


def classifier(model: Any, folder: Path) -> Any:
    base = model.name_or_path
    good = Path(base).parent / ("adapter" if Path(base).name == "base" else "adapter-" + Path(base).name)
    if not good.exists():
        adapted(AutoModelForCausalLM.from_pretrained(base), task_type="CAUSAL_LM").save_pretrained(good)
    found = load_experts(base, {"math": str(good)}, classifier=str(folder)).model
    found.set_adapter(CLASSIFIER)
    return found


def merged(model: Any, folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(merge_to_folder(folder, folder.parent / "merged").folder)


def as_lora(model: Any, folder: Path) -> Any:
    to_lora(PeftModel.from_pretrained(model, folder)).save_pretrained(folder.parent / "lora")
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model.name_or_path), folder.parent / "lora")


def command(*words: str) -> Callable[[Any, Path], Any]:
    def go(model: Any, folder: Path) -> Any:
        app = pytest.importorskip("peft_svf.cli.app").app
        out = folder.parent / "out"
        result = (
            pytest.importorskip("typer.testing")
            .CliRunner()
            .invoke(app, [*words, str(folder), "--output_dir", str(out)])
        )
        if result.exit_code:
            raise ValueError(" ".join(result.output.split()))
        base = AutoModelForCausalLM.from_pretrained(model.name_or_path)
        return AutoModelForCausalLM.from_pretrained(out) if "merged" in words else PeftModel.from_pretrained(base, out)

    return go


Door = Callable[[Any, Path], Any]
DOORS: dict[str, Door] = {
    "PeftModel": lambda model, folder: PeftModel.from_pretrained(model, folder),
    "PeftModel low_cpu_mem_usage": lambda model, folder: PeftModel.from_pretrained(
        model, folder, low_cpu_mem_usage=True
    ),
    "PeftModel for training": lambda model, folder: PeftModel.from_pretrained(model, folder, is_trainable=True),
    "PeftModel without base check": lambda model, folder: PeftModel.from_pretrained(
        model, folder, config=SVFConfig.from_pretrained(folder, runtime_config=SVFRuntimeConfig(base_check="ignore"))
    ),
    "AutoPeftModel": lambda model, folder: AutoPeftModelForCausalLM.from_pretrained(folder),
    "injected": injected,
    "load_adapter": transformers_folder,
    "load_adapter low_cpu_mem_usage": lambda model, folder: transformers_folder(model, folder, low_cpu_mem_usage=True),
    "load_adapter for training": lambda model, folder: transformers_folder(model, folder, is_trainable=True),
    "load_adapter subfolder": transformers_subfolder,
    "AutoModel": lambda model, folder: AutoModelForCausalLM.from_pretrained(folder),
    "AdaptiveMixture": lambda model, folder: AdaptiveMixture.from_pretrained(model, {"only": folder}).model,
    "classifier": classifier,
    "merge_to_folder": merged,
    "to_lora": as_lora,
    "export merged": command("export", "merged"),
    "export lora": command("export", "lora"),
}
FROM_MEMORY: dict[str, Door] = {"set_peft_model_state_dict": by_state_dict, "adapter_state_dict": transformers_state}
ALL = {**DOORS, **FROM_MEMORY}


def opened(door: Door, model: Any, folder: Path) -> torch.Tensor:
    return logits(door(model, folder).eval())


@pytest.mark.parametrize("healthy", HEALTHY)
@pytest.mark.parametrize("door", ALL)
def test_a_healthy_adapter_passes(door: str, healthy: str, world: Path, tmp_path: Path) -> None:
    if healthy == "bin" and door.startswith(("load_adapter", "AutoModel")):
        pytest.skip("transformers itself looks for adapter_model.safetensors")
    folder = copied(world, tmp_path)
    HEALTHY[healthy](folder)
    found = opened(ALL[door], AutoModelForCausalLM.from_pretrained(world / "base"), folder)
    torch.testing.assert_close(found, torch.load(world / "expected.pt"), rtol=0, atol=2e-6)


def refused(door: str, model: Any, folder: Path, message: str) -> None:
    """The error names the damage, and the adapter or its file. The model is as it was."""
    before, expected = anatomy(model), logits(model)
    with pytest.raises(ValueError, match=message) as caught:
        opened(ALL[door], model, folder)
    assert re.search(
        rf"[aA]dapter '(default|only|second|{CLASSIFIER})'|{re.escape(folder.as_posix())}", str(caught.value)
    )
    if door == "set_peft_model_state_dict":
        return  # whose model had the adapter before
    assert anatomy(model) == before
    assert not hasattr(model, "peft_config")
    assert not model._hf_peft_config_loaded
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("door", ALL)
def test_a_damaged_adapter_is_refused(door: str, damage: str, world: Path, tmp_path: Path) -> None:
    if door in FROM_MEMORY and damage in ("truncated", "empty"):
        pytest.skip("there is no file")
    folder = copied(world, tmp_path)
    DAMAGE[damage][0](folder)
    refused(door, AutoModelForCausalLM.from_pretrained(world / "base"), folder, DAMAGE[damage][1])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("door", [door for door in DOORS if door != "PeftModel without base check"])
def test_another_base_is_refused(door: str, base: str, world: Path, tmp_path: Path) -> None:
    refused(door, AutoModelForCausalLM.from_pretrained(world / base), copied(world, tmp_path, base), BASES[base])


@pytest.mark.parametrize("door", [*FROM_MEMORY, "PeftModel without base check"])
def test_another_architecture_is_refused_without_a_base_check(door: str, world: Path, tmp_path: Path) -> None:
    message = r"no values for 7 of 21 adapted modules.*layers\.2|shape \[32\] in .*expected \[24\]"
    refused(door, AutoModelForCausalLM.from_pretrained(world / "strange"), copied(world, tmp_path), message)


# ---------------------------------------------------------------------------------------------------- a second adapter


@pytest.mark.parametrize("damage", [*DAMAGE, "other"])
@pytest.mark.parametrize("kind", ["PeftModel", "transformers"])
@pytest.mark.usefixtures("never_fold")
def test_a_refused_second_adapter_leaves_the_first(kind: str, damage: str, world: Path, tmp_path: Path) -> None:
    folder = copied(world, tmp_path)
    if damage in DAMAGE:
        DAMAGE[damage][0](folder)
    base = tiny_llama(seed=1 if damage == "other" else 0)
    first = SVFConfig(target_modules=["q_proj", "o_proj"], modules_to_save=["lm_head"])
    if kind == "PeftModel":
        model: Any = get_peft_model(base, first)
    else:
        base.add_adapter(first)
        model = base
    for delta in deltas(model).values():
        delta.data.fill_(0.3)
    before, expected = anatomy(model), logits(model)
    message = DAMAGE[damage][1] if damage in DAMAGE else BASES["other"]
    with pytest.raises(ValueError, match=message):
        second(model, folder)
    assert anatomy(model) == before
    assert torch.equal(logits(model), expected)
    assert {name for layer in svf_layers(model).values() for name in layer.svf_delta} == {"default"}

    if damage != "other":
        model.load_adapter(str(copied(world, tmp_path / "again")), "second")
        assert {*model.peft_config} == {"default", "second"}


@pytest.mark.parametrize("damage", [damage for damage in DAMAGE if damage not in ("truncated", "empty")])
def test_a_refused_state_dict_leaves_the_values(damage: str, world: Path, tmp_path: Path) -> None:
    model = adapted()
    before = {name: delta.detach().clone() for name, delta in deltas(model).items()}
    folder = copied(world, tmp_path)
    DAMAGE[damage][0](folder)
    with pytest.raises(ValueError, match=DAMAGE[damage][1]):
        set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
    with pytest.raises(ValueError, match=DAMAGE[damage][1]):
        model.load_adapter(folder, "default")
    assert all(torch.equal(delta, before[name]) for name, delta in deltas(model).items())


def test_keys_with_the_name_of_the_adapter() -> None:
    model, other = adapted(), adapted(seed=2)
    set_peft_model_state_dict(other, {k: v for k, v in model.state_dict().items() if "svf_delta" in k})
    assert torch.equal(logits(other), logits(model))


def test_a_config_that_was_changed_is_not_held_against_its_file(world: Path) -> None:
    """To train a smaller expert with the settings of another one."""
    config = SVFConfig.from_pretrained(world / "adapter")
    config.r = 4
    get_peft_model(tiny_llama(), config)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("door", ["PeftModel", "load_adapter", "AutoModel", "AdaptiveMixture"])
def test_nan_in_a_saved_module(door: str, value: float, world: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(world / "base")
    adapted(base, task_type="CAUSAL_LM", modules_to_save=["lm_head"]).save_pretrained(tmp_path / "adapter")
    rewritten(lambda state: state["base_model.model.lm_head.weight"][5].fill_(value))(tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(world / "base")
    with pytest.raises(ValueError, match=r"NaN or Inf in 1 of 15 tensors, the first is .*lm_head"):
        DOORS[door](model, tmp_path / "adapter")


# ---------------------------------------------------------------------------------------------------- show and publish


class Api:
    """Says what was uploaded."""

    def __init__(self, token: Any = None) -> None:
        self.repo_id = "me/expert"

    def create_repo(self, *args: Any, **kwargs: Any) -> Api:
        return self

    def upload_folder(self, **kwargs: Any) -> Any:
        return type("Commit", (), {"commit_url": "uploaded"})


@pytest.mark.parametrize("damage", [damage for damage in DAMAGE if damage not in ("short", "stranger")])
def test_a_damaged_adapter_is_shown_as_that_and_not_pushed(
    damage: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_svf.interop.hub.HfApi", Api)
    folder = copied(world, tmp_path)
    assert inspect_adapter(folder)[0].problem is None
    assert push_expert(folder, "me/expert") == "uploaded"
    DAMAGE[damage][0](folder)
    with pytest.raises(ValueError, match=DAMAGE[damage][1]):
        push_expert(folder, "me/expert")
    if damage in ("truncated", "empty"):
        with pytest.raises(ValueError, match=DAMAGE[damage][1]):
            inspect_adapter(folder)
        return
    summary, _ = inspect_adapter(folder)
    assert re.search(DAMAGE[damage][1], summary.problem or "")
    assert summary.missing == ([MODULE] if damage == "missing" else summary.missing)
    assert (damage == "empty state") == (len(summary.missing) == 14)


def test_a_vector_of_another_length_is_shown_beside_the_model(world: Path, tmp_path: Path) -> None:
    folder = copied(world, tmp_path)
    assert check_spectrum(folder, world / "base") == {}
    DAMAGE["short"][0](folder)
    assert check_spectrum(folder, world / "base") == {MODULE: "δ has shape [7], expected [32]"}


def test_a_config_alone_is_not_pushed(world: Path, tmp_path: Path) -> None:
    folder = copied(world, tmp_path)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="holds the config of an adapter, but not its file"):
        push_expert(folder, "me/expert")


def test_a_partial_expert_of_the_released_code(tmp_path: Path) -> None:
    base = tiny_llama()
    vectors = {n: torch.randn(min(w.shape)) for n, w in base.state_dict().items() if "mlp" in n}
    import_path = tmp_path / "learnable_params.pt"
    torch.save(vectors, import_path)
    import_expert(import_path, tiny_llama())
    del vectors[f"{MODULE}.weight"]
    torch.save(vectors, import_path)
    before = anatomy(base)
    with pytest.raises(ValueError, match=rf"no vector for {MODULE}\.weight"):
        import_expert(import_path, base)
    assert anatomy(base) == before


@pytest.mark.parametrize("missing", ["lm_head.weight", "q_proj.base_layer.bias"])
@pytest.mark.parametrize("door", ["PeftModel", "load_adapter", "injected"])
def test_a_trained_parameter_that_is_missing(door: str, missing: str, tmp_path: Path) -> None:
    """PEFT would leave it at its value, and a new output layer at random values."""
    chosen: dict[str, Any] = {"modules_to_save": ["lm_head"]} if missing.startswith("lm_head") else {"bias": "svf_only"}
    model = adapted(tiny_llama(attention_bias=True), target_modules=["q_proj", "v_proj"], **chosen)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    save_file({key: value for key, value in state.items() if not key.endswith(missing)}, tmp_path / WEIGHTS)
    name = missing.replace(".base_layer", "")
    with pytest.raises(ValueError, match=rf"trained parameters besides δ, the first is .*{re.escape(name)}"):
        DOORS[door](tiny_llama(attention_bias=True), tmp_path)
