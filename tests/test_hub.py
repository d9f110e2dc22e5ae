"""Experts on the Hub, of which a stand-in speaks HTTP on this machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_stand_in import TOKEN
from test_adaptation import base_model, make_tokenizer

pytestmark = pytest.mark.slow

MAKE = """
import sys, torch
sys.path.insert(0, {tests!r})
import peft_svf
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from huggingface_hub import HfApi

def base():
    return AutoModelForCausalLM.from_pretrained({base!r})

def expert(seed=0):
    model = get_peft_model(base(), peft_svf.SVFConfig(target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "svf_delta" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model

def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[4, 17, 5, 42]])).logits

def same(a, b):
    return torch.allclose(logits(a), b if isinstance(b, torch.Tensor) else logits(b), atol=1e-5)
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("hub_stand_in.py"))], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    yield server.stdout.readline().strip()
    server.kill()
    server.wait()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    base_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def run(code: str, hub: str, base: Path, cache: Path, *, token: str | None = TOKEN, check: bool = True) -> Any:
    """Run a script that talks to this Hub, and to no other cache than this."""
    made = MAKE.format(tests=str(Path(__file__).parent), base=str(base))
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PEFT_SVF_CACHE": str(cache / "bases"),
    }
    environment.pop("HF_HUB_OFFLINE", None)
    environment.pop("HF_TOKEN", None)
    if token is not None:
        environment["HF_TOKEN"] = token
    done = subprocess.run([sys.executable, "-c", made + code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 or not check, done.stderr[-3000:]
    return done


def test_push_and_load_with_peft_s_own_calls(hub: str, base: Path, tmp_path: Path) -> None:
    code = """
model = expert()
model.push_to_hub("me/plain")
assert same(PeftModel.from_pretrained(base(), "me/plain"), model)
api = HfApi()
assert set(api.list_repo_files("me/plain")) >= {"README.md", "adapter_config.json", "adapter_model.safetensors"}

# another expert on a branch, and the first one by its commit
first = api.model_info("me/plain").sha
other = expert(seed=1)
api.create_branch("me/plain", branch="second")
other.push_to_hub("me/plain", revision="second")
load = lambda **options: PeftModel.from_pretrained(base(), "me/plain", **options)
assert same(load(revision="second"), other)
assert same(load(revision=first), model)
assert same(load(), model)

# a folder of the repository
other.save_pretrained("SAVED")
api.upload_folder(repo_id="me/plain", folder_path="SAVED", path_in_repo="experts/other")
assert same(load(subfolder="experts/other"), other)

# several adapters, a mixture from the Hub, and transformers' own loader
mixture = peft_svf.AdaptiveMixture.from_pretrained(base(), {"one": "me/plain", "two": "me/plain"})
assert same(mixture.model, model)
plain = base()
plain.load_adapter("me/plain")
assert same(plain, model)
""".replace("SAVED", str(tmp_path / "saved"))
    run(code, hub, base, tmp_path / "home")


def test_the_command_line_pushes(hub: str, base: Path, tmp_path: Path) -> None:
    code = """
import json, subprocess
expert().save_pretrained("SAVED")
main = "from peft_svf.cli.app import main; main()"
command = [sys.executable, "-c", main, "push", "SAVED", "me/by-command", "--private", "--json"]
done = subprocess.run(command, capture_output=True, text=True)
assert done.returncode == 0, done.stderr
assert "/me/by-command/commit/" in json.loads(done.stdout)["url"]
assert HfApi().model_info("me/by-command").private
assert same(PeftModel.from_pretrained(base(), "me/by-command"), expert())
""".replace("SAVED", str(tmp_path / "saved"))
    run(code, hub, base, tmp_path / "home")


def test_a_private_expert_needs_a_token(hub: str, base: Path, tmp_path: Path) -> None:
    run('expert().push_to_hub("me/secret", private=True)', hub, base, tmp_path / "one")
    load = 'PeftModel.from_pretrained(base(), "me/secret")'
    run(load, hub, base, tmp_path / "two")
    failed = run(load, hub, base, tmp_path / "three", token=None, check=False)
    assert failed.returncode != 0
    assert "me/secret" in failed.stderr


def test_the_card_of_a_pushed_expert_loads_it(hub: str, base: Path, tmp_path: Path) -> None:
    code = """
from peft_svf.interop import push_expert
model = expert()
model.save_pretrained("SAVED/math")
card = open("SAVED/math/README.md").read()
assert 'PeftModel.from_pretrained(base_model, "SAVED/math")' in card
open("SAVED/math/optimizer.pt", "w").close()
url = push_expert("SAVED/math", "me/math", private=True)
assert url.startswith("http"), url
api = HfApi()
files = api.list_repo_files("me/math")
assert "optimizer.pt" not in files and "adapter_model.safetensors" in files
torch.save(logits(model), "SAVED/logits.pt")
print(open(api.hf_hub_download("me/math", "README.md")).read())
push_expert("SAVED/math", "me/math", revision="v2")
assert same(PeftModel.from_pretrained(base(), "me/math", revision="v2"), model)
""".replace("SAVED", str(tmp_path / "saved"))
    card = run(code, hub, base, tmp_path / "home").stdout
    assert "- transformer-squared" in card
    snippet = re.search(r"```python\n(import peft_svf.*?)```", card, re.S)
    assert snippet is not None
    check = f"""
{snippet[1]}
assert same(model, torch.load({str(tmp_path / "saved" / "logits.pt")!r}))
"""
    run(check, hub, base, tmp_path / "elsewhere")


def test_mistakes_are_named(hub: str, base: Path, tmp_path: Path) -> None:
    failed = run('PeftModel.from_pretrained(base(), "me/nothing")', hub, base, tmp_path / "home", check=False)
    assert "me/nothing" in failed.stderr
    code = """
from peft import LoraConfig
from peft_svf.interop import push_expert
get_peft_model(base(), LoraConfig(target_modules=["q_proj"])).save_pretrained("SAVED")
push_expert("SAVED", "me/lora")
""".replace("SAVED", str(tmp_path / "saved"))
    failed = run(code, hub, base, tmp_path / "home", check=False)
    assert "is a LORA adapter. Expected an SVF adapter" in failed.stderr
