"""Experts on the Hub: a stand-in speaks its HTTP on this machine, in a thread."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from helpers import adapted, base_model, logits, make_tokenizer
from hub_stand_in import TOKEN, serving
from huggingface_hub import HfApi, constants
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.utils.hub import hf_api

from peft_svf import AdaptiveMixture, ExpertLibrary
from peft_svf.interop import push_expert


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty Hub where this process is logged in, and an empty cache.

    `huggingface_hub` and transformers read the environment once, so what they read is replaced.
    """
    with serving() as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        for api in (huggingface_hub.hf_api.api, hf_api()):
            monkeypatch.setattr(api, "endpoint", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # PEFT reads this one at every load
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        at_another_machine(monkeypatch, tmp_path / "cache")
        yield


def at_another_machine(patch: pytest.MonkeyPatch, cache: Path, token: str | None = TOKEN) -> None:
    """Where nothing was downloaded yet."""
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        patch.setenv("HF_TOKEN", token)


@pytest.fixture
def base_path(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-llama"
    base_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def base(base_path: Path) -> Callable[[], Any]:
    return lambda: AutoModelForCausalLM.from_pretrained(base_path)


def expert(model: Any, seed: int = 0) -> PeftModel:
    return adapted(model, seed=seed, std=0.2, task_type="CAUSAL_LM").eval()


def same(a: Any, b: Any) -> bool:
    return torch.allclose(logits(a.eval()), logits(b.eval()), atol=1e-5)


def test_push_and_load_with_peft_s_own_calls(base: Callable[[], Any], tmp_path: Path) -> None:
    model = expert(base())
    model.push_to_hub("me/plain")
    assert same(PeftModel.from_pretrained(base(), "me/plain"), model)
    api = HfApi()
    assert set(api.list_repo_files("me/plain")) >= {"README.md", "adapter_config.json", "adapter_model.safetensors"}

    # another expert on a branch, and the first one by its commit
    first = api.model_info("me/plain").sha
    other = expert(base(), seed=1)
    api.create_branch("me/plain", branch="second")
    other.push_to_hub("me/plain", revision="second")
    assert same(PeftModel.from_pretrained(base(), "me/plain", revision="second"), other)
    assert same(PeftModel.from_pretrained(base(), "me/plain", revision=first), model)
    assert same(PeftModel.from_pretrained(base(), "me/plain"), model)

    # a folder of the repository
    other.save_pretrained(tmp_path / "saved")
    api.upload_folder(repo_id="me/plain", folder_path=tmp_path / "saved", path_in_repo="experts/other")
    assert same(PeftModel.from_pretrained(base(), "me/plain", subfolder="experts/other"), other)

    # several adapters, a mixture from the Hub, and transformers' own loader
    mixture = AdaptiveMixture.from_pretrained(base(), {"one": "me/plain", "two": "me/plain"})
    assert same(mixture.model, model)
    plain = base()
    plain.load_adapter("me/plain")
    assert same(plain, model)


def test_the_command_line_pushes(base: Callable[[], Any], tmp_path: Path) -> None:
    testing = pytest.importorskip("typer.testing")
    from peft_svf.cli.app import app

    model = expert(base())
    model.save_pretrained(tmp_path / "saved")
    done = testing.CliRunner().invoke(app, ["push", str(tmp_path / "saved"), "me/by-command", "--private", "--json"])
    assert done.exit_code == 0, done.output
    assert "/me/by-command/commit/" in json.loads(done.stdout)["url"]
    assert HfApi().model_info("me/by-command").private
    assert same(PeftModel.from_pretrained(base(), "me/by-command"), model)


def test_a_private_expert_needs_a_token(
    base: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expert(base()).push_to_hub("me/secret", private=True)
    at_another_machine(monkeypatch, tmp_path / "two")
    PeftModel.from_pretrained(base(), "me/secret")
    at_another_machine(monkeypatch, tmp_path / "three", token=None)
    with pytest.raises(ValueError, match="me/secret"):
        PeftModel.from_pretrained(base(), "me/secret")


def test_the_card_of_a_pushed_expert_loads_it(
    base: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = expert(base()), tmp_path / "saved" / "math"
    model.save_pretrained(folder)
    assert f'PeftModel.from_pretrained(base_model, "{folder}")' in (folder / "README.md").read_text()
    (folder / "optimizer.pt").touch()
    assert push_expert(folder, "me/math", private=True).startswith("http")
    files = HfApi().list_repo_files("me/math")
    assert "optimizer.pt" not in files
    assert "adapter_model.safetensors" in files
    card = Path(HfApi().hf_hub_download("me/math", "README.md")).read_text()
    push_expert(folder, "me/math", revision="v2")
    assert same(PeftModel.from_pretrained(base(), "me/math", revision="v2"), model)

    assert "- transformer-squared" in card
    snippet = re.search(r"```python\n(import peft_svf.*?)```", card, re.S)
    assert snippet is not None
    at_another_machine(monkeypatch, tmp_path / "elsewhere")
    found: dict[str, Any] = {}
    exec(snippet[1], found)
    assert same(found["model"], model)


def test_mistakes_are_named(base: Callable[[], Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="me/nothing"):
        PeftModel.from_pretrained(base(), "me/nothing")
    get_peft_model(base(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"is a LORA adapter\. Expected an SVF adapter"):
        push_expert(tmp_path / "saved", "me/lora")


def test_a_library_is_loaded_from_the_hub(
    base: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, name in enumerate(("sums", "lists")):
        expert(base(), seed).save_pretrained(tmp_path / name)
    HfApi().create_repo("me/lists")
    HfApi().upload_folder(repo_id="me/lists", folder_path=tmp_path / "lists")
    with ExpertLibrary.edit(tmp_path / "library") as library:
        library.add("sums", tmp_path / "sums")
        library.add("lists", "me/lists")
    (tmp_path / "library" / "sums" / "optimizer.bin").write_bytes(b"a pickle")
    HfApi().create_repo("me/library")
    HfApi().upload_folder(repo_id="me/library", folder_path=tmp_path / "library")
    HfApi().create_branch("me/lists", branch="before")  # the stand-in forgets the commits that no branch has
    (tmp_path / "lists" / "adapter_model.safetensors").write_bytes(b"a later push")
    HfApi().upload_folder(repo_id="me/lists", folder_path=tmp_path / "lists")
    at_another_machine(monkeypatch, tmp_path / "elsewhere")
    found = ExpertLibrary.from_pretrained("me/library")
    assert found.check() == {}
    assert not list((tmp_path / "elsewhere").rglob("*.bin"))
    mixture = AdaptiveMixture.from_pretrained(base(), found)
    assert mixture.sources["lists"].startswith("me/lists@")
    mixture.model.set_adapter("sums")
    assert torch.equal(logits(mixture.model), logits(PeftModel.from_pretrained(base(), tmp_path / "sums")))
