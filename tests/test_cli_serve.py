"""`peft-svf serve`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from helpers import base_model, make_tokenizer, save_expert

from peft_svf import ExpertLibrary, SVFConfig

testing = pytest.importorskip("typer.testing")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, two experts, and a library of one more."""
    folder = tmp_path_factory.mktemp("world")
    base_model().save_pretrained(folder / "tiny-model")
    make_tokenizer().save_pretrained(folder / "tiny-model")
    for seed, name in enumerate(("sums", "lists", "third")):
        save_expert(folder / name, SVFConfig(target_modules="all-linear"), seed)
    with ExpertLibrary.edit(folder / "library") as library:
        library.add("third", folder / "third", description="the third one")
    return folder


def run(*words: str) -> Any:
    from peft_svf.cli.app import app

    return testing.CliRunner().invoke(app, ["serve", *words])


def test_serve(world: Path) -> None:
    words = [str(world / "tiny-model"), "--library", str(world / "library"), "--expert", f"sums={world / 'sums'}"]
    words += ["--port", "0", "--expert_root", str(world), "--max_mixture", "2", "--description", "sums=additions"]
    process = subprocess.Popen(
        [sys.executable, "-m", "peft_svf", "serve", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PEFT_SVF_API_KEY": "k"},
    )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said.startswith("Serving tiny-model, auto, "), said
        url = said.split()[-1]
        client = openai.OpenAI(base_url=url, api_key="k", max_retries=0)
        described = {card.id: (card.model_extra or {})["description"] for card in client.models.list()}
        assert described["sums"] == "additions"
        assert described["third"] == "the third one"
        answer = client.chat.completions.with_raw_response.create(
            model="auto", messages=[{"role": "user", "content": "1 + 2"}], max_tokens=4
        )
        assert answer.headers["x-peft-svf-expert"] in ("sums", "third", "base")
        assert float(answer.headers["x-peft-svf-confidence"]) <= 1
        assert client.completions.create(model="sums=0.5,third=0.5", prompt="a", max_tokens=1).choices
        with pytest.raises(openai.BadRequestError, match="may have 2"):
            client.completions.create(model="sums=1,third=1,lists=1", prompt="a")
        loaded = {"lora_name": "lists", "lora_path": "lists"}
        assert httpx.post(f"{url}/load_lora_adapter", json=loaded, headers={"authorization": "Bearer k"}).is_success
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()


def test_errors_come_before_the_model_is_loaded(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft_svf.mixture.loading

    monkeypatch.setattr(peft_svf.mixture.loading, "load_experts", lambda *_, **__: pytest.fail("it was loaded"))
    model, expert = str(world / "tiny-model"), ["--expert", f"sums={world / 'sums'}"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        found = run(model, *expert, "--port", port)
        assert found.exit_code == 1
        assert f"Cannot listen at 127.0.0.1:{port}" in found.output
    cases = {
        (model,): "--expert: It is missing",
        tuple(expert): "--model_name_or_path: It is missing",
        (model, "--model_name_or_path", model, *expert): "given twice",
        (model, *expert, "--engine", "vlm"): "Did you mean vllm?",
        (model, *expert, "--engine", "vllm", "--soft"): "--engine transformers",
        (model, *expert, "--engine", "vllm"): "needs vLLM",
    }
    for words, said in cases.items():
        found = run(*words)
        assert found.exit_code != 0
        assert said in " ".join(found.output.split()), words


def test_names_that_have_a_meaning(world: Path) -> None:
    found = run(str(world / "tiny-model"), "--expert", f"auto={world / 'sums'}", "--port", "0", "--dispatch", "mixture")
    assert found.exit_code == 1
    assert "cannot be served as 'auto'" in found.output


def test_a_missing_extra(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("peft_svf.serving.endpoint")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    found = run(str(world / "tiny-model"), "--expert", f"sums={world / 'sums'}")
    assert found.exit_code == 1
    assert "`peft-svf serve` needs uvicorn" in found.output
    assert "[serve]" in found.output


def test_vllm(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_svf.serving import options

    ran: list[Any] = []
    monkeypatch.setattr(options, "installed_vllm", lambda: options.NEWEST)
    monkeypatch.setattr(os, "execve", lambda *words: ran.extend(words) or sys.exit(0))  # type: ignore[func-returns-value]
    expert = ["--expert", f"sums={world / 'sums'}", "--expert_root", str(world / "library")]
    found = run(str(world / "tiny-model"), *expert, "--engine", "vllm", "--api_key", "secret", "--port", "81")
    assert found.exit_code == 0, found.output
    _, words, environment = ran
    after = {word: words[i + 1] for i, word in enumerate(words[:-1])}
    assert after["--model"] == str(world / "tiny-model")
    assert after["--served-model-name"] == "tiny-model"
    assert after["--port"] == "81"
    assert after["--lora-modules"] == f"sums={world / 'sums'}"
    roots = json.loads(after["--additional-config"])["peft_svf"]["roots"]
    assert roots == [str(world / "sums"), str(world / "library")]
    assert environment["VLLM_API_KEY"] == "secret"
    assert "secret" not in " ".join(words)
