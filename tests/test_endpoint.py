"""The endpoint over continuous batching: each request has its own expert or mixture."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import pytest
import torch
from helpers import base_model, make_tokenizer, save_expert
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from peft_svf import SVFConfig
from peft_svf.routing.dispatch import Dispatch
from peft_svf.serving.endpoint.app import Endpoint
from peft_svf.serving.endpoint.engine import Engine
from peft_svf.serving.endpoint.experts import Experts
from peft_svf.serving.endpoint.sampling import warn_of_unsupported
from peft_svf.serving.endpoint.server import Server, bound

KEY = "secret"
HEADERS = {"authorization": f"Bearer {KEY}"}


class ByFirstLetter:
    """A dispatcher: `m...` to math, `l...` to logic, others to base. `x...` has an error, and `y...` breaks all."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.batches: list[int] = []

    def __call__(self, prompts: Any) -> Dispatch:
        self.batches.append(len(prompts))
        time.sleep(0.02)
        assert not hasattr(self.model.config, "is_causal")  # transformers writes it during a step
        texts = [p if isinstance(p, str) else p[-1]["content"] for p in prompts]
        if any(text.startswith("y") for text in texts):
            raise RuntimeError("broken")
        labels = ["math", "logic", "base"]
        choices = [{"m": "math", "l": "logic"}.get(text[0], "base") for text in texts]
        probabilities = np.array([[0.75 if label == choice else 0.125 for label in labels] for choice in choices])
        return Dispatch(labels, probabilities, choices, 0.02, {i: "bad" for i, t in enumerate(texts) if t[0] == "x"})


class Served:
    """A server in a thread, the model behind it, and clients of it."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.root = folder
        config = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        paths = {
            name: save_expert(folder / name, SVFConfig(**config), 5 + i) for i, name in enumerate(("math", "logic"))
        }
        save_expert(folder / "late", SVFConfig(r=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"), 9)
        self.model = PeftModel.from_pretrained(base_model(), paths["math"], adapter_name="math")
        self.model.load_adapter(paths["logic"], adapter_name="logic")
        self.tokenizer, self.dispatcher = make_tokenizer(), ByFirstLetter(self.model)
        self.engine = Engine(self.model, self.tokenizer, **{"cache_tokens": 512, "step_tokens": 48, **options})
        described = {"math": "numbers and sums", "logic": ""}
        self.experts = Experts(self.engine, described, base_name="tiny", max_mixture=3, root=folder)
        self.endpoint = Endpoint(
            self.engine, self.experts, self.tokenizer, self.dispatcher, api_key=KEY, max_bytes=100_000
        )
        self.server, address = Server(self.endpoint), bound("127.0.0.1", 0)
        self.thread = threading.Thread(target=self.server.run, args=([address],), daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{address.getsockname()[1]}"
        self.http = httpx.Client(base_url=self.url, headers=HEADERS, timeout=60)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)

    def text(self, model: str, prompt: Any, max_tokens: int = 12, **options: Any) -> httpx.Response:
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, **options}
        return self.http.post("/v1/completions", json=body)

    def chat(self, model: str, content: str, **options: Any) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 12, **options}
        return self.http.post("/v1/chat/completions", json=body)

    @torch.no_grad()
    def wanted(self, weights: dict[str, float], prompt: str, max_tokens: int = 12) -> str:
        """What `generate` answers."""
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        names = list(weights) or ["math"]
        with self.engine.paused(), self.model.base_model.row_mixture([list(weights.values()) or [0.0]], names):
            found = self.model.generate(input_ids=ids, max_new_tokens=max_tokens, do_sample=False, pad_token_id=3)
        text: str = self.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
        return text

    def close(self) -> None:
        self.http.close()
        self.server.should_exit = True
        self.thread.join()
        self.endpoint.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("experts"))
    yield served
    assert served.engine.failure is None
    assert served.engine.running == 0
    served.close()


def idle(served: Served) -> None:
    deadline = time.monotonic() + 20
    while served.engine.running:
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------------------------- answers

MODELS: dict[str, dict[str, float]] = {
    "tiny": {},
    "base": {},
    "math": {"math": 1.0},
    "logic": {"logic": 1.0},
    "math=0.7,logic=0.3": {"math": 0.7, "logic": 0.3},
    "logic=-1.25": {"logic": -1.25},
}


def test_requests_in_flight_together_have_their_own_experts(served: Served) -> None:
    """More than the cache holds, so that some are put off and begin anew; in steps that cut long prompts."""
    prompts = ["a", "what is 3 + 4", "xyz " * 12, "0=1?", "q r s t u v w"]
    asked = [(name, prompt, 5 + 9 * i) for i, prompt in enumerate(prompts) for name in MODELS]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda each: served.text(*each), asked))
    for (name, prompt, length), response in zip(asked, found, strict=True):
        assert response.status_code == 200, response.text
        body = response.json()
        assert body["choices"][0]["text"] == served.wanted(MODELS[name], prompt, length), (name, prompt)
        assert body["model"] == ("tiny" if name == "base" else name)
    assert len({response.json()["choices"][0]["text"] for response in found}) > 20  # the experts do differ


def test_the_openai_client(served: Served) -> None:
    messages: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is 3?"}]
    wanted = served.wanted({"math": 1.0}, "[system]be brief\n[user]what is 3?\n[assistant]", 20)
    create = served.openai.chat.completions.create
    whole = create(model="math", messages=messages, max_completion_tokens=20, temperature=0, n=2)
    assert [choice.message.content for choice in whole.choices] == [wanted, wanted]
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(
        create(
            model="math", messages=messages, max_tokens=20, stream=True, stream_options={"include_usage": True}, seed=1
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == wanted
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage is not None
    assert 2 * chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    text = served.openai.completions.create(model="logic", prompt="abc", max_tokens=9, stream=True)
    assert "".join(chunk.choices[0].text for chunk in text) == served.wanted({"logic": 1.0}, "abc", 9)


def test_curl(served: Served) -> None:
    body = json.dumps({"model": "math", "prompt": "abc", "max_tokens": 5})
    done = subprocess.run(
        ["curl", "-s", "-i", f"{served.url}/v1/completions", "-H", f"Authorization: Bearer {KEY}", "-d", body],
        capture_output=True,
        text=True,
        check=True,
    )
    head, _, answer = done.stdout.replace("\r", "").partition("\n\n")
    assert json.loads(answer)["choices"][0]["text"] == served.wanted({"math": 1.0}, "abc", 5)
    assert "x-peft-svf-expert: math" in head


def test_several_prompts_and_tokens(served: Served) -> None:
    ids = [served.tokenizer(prompt)["input_ids"] for prompt in ("abc", "xyz")]
    wanted = [served.wanted({"math": 1.0}, prompt) for prompt in ("abc", "xyz")]
    for prompt in (["abc", "xyz"], ids):
        choices = served.text("math", prompt).json()["choices"]
        assert [(choice["index"], choice["text"]) for choice in choices] == list(enumerate(wanted))
    assert served.text("math", ids[0]).json()["choices"][0]["text"] == wanted[0]


def test_sampling(served: Served) -> None:
    def answers(**options: Any) -> list[str]:
        return [c["text"] for c in served.text("math", "abc", 24, n=4, **options).json()["choices"]]

    hot = answers(temperature=1.5, seed=3)
    assert len(set(hot)) == 4
    with ThreadPoolExecutor(3) as pool:  # a seed does not depend on other requests
        for other in pool.map(lambda _: answers(temperature=1.5, seed=3), range(3)):
            assert other == hot
    assert answers(temperature=1.5, seed=4) != hot
    greedy = served.wanted({"math": 1.0}, "abc", 24)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 0}, {"temperature": 1e-40}, {"temperature": 1e-300}):
        assert answers(**{"temperature": 1.5, "seed": 3, **narrow}) == [greedy] * 4


def test_an_answer_can_go_on_after_its_end(served: Served) -> None:
    whole = served.text("tiny", "a", 30).json()
    assert whole["choices"][0]["finish_reason"] == "stop"
    forced = served.text("tiny", "a", 30, ignore_eos=True).json()
    assert forced["usage"]["completion_tokens"] == 30
    assert forced["choices"][0]["finish_reason"] == "length"
    assert forced["choices"][0]["text"].startswith(whole["choices"][0]["text"])


def test_stop_texts(served: Served) -> None:
    whole = served.wanted({"math": 1.0}, "abc", 24)
    stop = whole[9:11]
    for stream in (False, True):
        with served.http.stream(
            "POST",
            "/v1/completions",
            json={"model": "math", "prompt": "abc", "max_tokens": 24, "stop": ["~~", stop], "stream": stream},
        ) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        choices = [choice for line in lines if line != "[DONE]" for choice in json.loads(line)["choices"]]
        assert "".join(choice["text"] for choice in choices) == whole[: whole.index(stop)]
        assert choices[-1]["finish_reason"] == "stop"


# -------------------------------------------------------------------------------------------------------------- `auto`


def test_auto_chooses_by_the_prompt(served: Served) -> None:
    served.dispatcher.batches.clear()
    prompts = ["m 1", "l 2", "other", "x 3"] * 4
    with ThreadPoolExecutor(len(prompts)) as pool:
        found = list(pool.map(lambda prompt: served.chat("auto", prompt), prompts))
    for prompt, response in zip(prompts, found, strict=True):
        name = {"m": "math", "l": "logic"}.get(prompt[0], "base")
        assert response.headers["x-peft-svf-expert"] == name
        assert response.headers["x-peft-svf-confidence"] == ("" if prompt[0] == "x" else "0.7500")
        assert float(response.headers["x-peft-svf-first-pass-ms"]) >= 20
        assert response.json()["model"] == ("tiny" if name == "base" else name)
        wanted = served.wanted(MODELS[name], f"[user]{prompt}\n[assistant]")
        assert response.json()["choices"][0]["message"]["content"] == wanted
    assert len(served.dispatcher.batches) < len(prompts)  # those that wait are dispatched together


def test_auto_falls_back_to_the_base_model(served: Served) -> None:
    response = served.text("auto", "y")
    assert response.headers["x-peft-svf-expert"] == "base"
    assert response.json()["choices"][0]["text"] == served.wanted({}, "y")
    assert "peft_svf_first_pass_failures_total" in served.http.get("/metrics").text
    both = served.text("auto", ["m", "l"])
    assert both.headers["x-peft-svf-expert"] == "math;logic"
    assert both.json()["model"] == "auto"


# ----------------------------------------------------------------------------------------------------------- bad input

MESSAGE = {"role": "user", "content": "a"}
BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "nobody"}, 404, "tiny, auto, math, logic"),
    ({"model": "../math"}, 404, "There is no model"),
    ({"model": "svf-classifier"}, 404, "There is no model"),
    ({"model": "math=0.5,nobody=0.5"}, 404, "tiny, auto, math, logic"),
    ({"model": "math=nan"}, 400, "math=nan"),
    ({"model": "math=inf"}, 400, "math=inf"),
    ({"model": "math=1e30"}, 400, "at most 10"),
    ({"model": "math=1,math=2"}, 400, "twice"),
    ({"model": "=1"}, 400, "no mixture"),
    ({"model": ",".join(f"e{i}=1" for i in range(4))}, 400, "may have 3"),
    ({"model": 7}, 400, "model"),
    ({"model": ""}, 400, "model"),
    ({"messages": []}, 400, "messages"),
    ({"messages": "a"}, 400, "messages"),
    ({"messages": [{"role": "user"}]}, 400, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, "messages.0"),
    ({"messages": [{**MESSAGE, "tool_calls": [{}]}]}, 400, "tool_calls"),
    ({"messages": [{"role": "user", "content": "a" * 500}]}, 400, "The context has 128"),
    ({"max_tokens": 127}, 400, "context has 128"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": "5"}, 400, "max_tokens"),
    ({"temperature": -1}, 400, "temperature"),
    ({"temperature": float("nan")}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"n": 1000}, 400, "n"),
    ({"n": 2, "stream": True}, 400, "stream"),
    ({"stop": ["a", ""]}, 400, "stop"),
    ({"logprobs": True}, 400, "'logprobs' is not supported"),
    ({"logprobs": 0}, 400, "'logprobs' is not supported"),
    ({"tools": [{}]}, 400, "'tools' is not supported"),
    ({"frequency_penalty": 0.5}, 400, "'frequency_penalty' is not supported"),
    ({"response_format": {"type": "json_object"}}, 400, "'response_format'"),
    ({"tempreature": 1}, 400, "no field 'tempreature'"),
    ({"stream_options": {"include_usage": True}}, 400, "'stream_options'"),
]


@pytest.mark.parametrize(("change", "status", "said"), BAD, ids=lambda value: str(value)[:40])
def test_bad_requests(served: Served, change: dict[str, Any], status: int, said: str) -> None:
    body = {"model": "math", "messages": [MESSAGE], **change}
    response = served.http.post("/v1/chat/completions", content=json.dumps(body))
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert said.lower() in error["message"].lower()
    assert error["type"] == "invalid_request_error"
    assert "Traceback" not in response.text
    assert str(served.root) not in response.text


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 50_000, b'{"model": "math", "prompt": []}']
)
def test_bad_bodies(served: Served, body: bytes) -> None:
    response = served.http.post("/v1/completions", content=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"]


def test_large_bodies_are_not_read(served: Served) -> None:
    assert served.http.post("/v1/completions", content=b" " * 10_000_000).status_code == 413

    def chunks() -> Iterator[bytes]:  # without a content-length
        for _ in range(100):
            yield b" " * 10_000

    assert served.http.post("/v1/completions", content=chunks()).status_code == 413


def test_neutral_values_are_accepted(served: Served) -> None:
    neutral = {"n": 1, "frequency_penalty": 0.0, "tools": None, "logprobs": False, "response_format": {"type": "text"}}
    echoed = {"role": "assistant", "content": "a", "refusal": None, "annotations": []}
    of_lm_eval = {**MESSAGE, "type": "text"}
    body = {"model": "math", "messages": [MESSAGE, echoed, of_lm_eval], "max_tokens": 2, "user": "me", **neutral}
    assert served.http.post("/v1/chat/completions", json=body).status_code == 200


def test_texts_that_are_no_text(served: Served) -> None:
    for change in ({"model": "\ud800"}, {"\ud800": 1}, {"prompt": "\ud800"}, {"prompt": ["a"] * 100, "n": 2}):
        body = {"model": "math", "prompt": "a", "max_tokens": 1, **change}
        response = served.http.post("/v1/completions", content=json.dumps(body))
        assert response.status_code in (400, 404), (change, response.text)


def test_a_bug_shows_nothing(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.experts, "find", lambda name: {}["a secret path"])
    response = served.text("math", "a")
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text


def test_token_ids_out_of_the_vocabulary(served: Served) -> None:
    for ids in ([5, 10**6], [-1], []):
        assert served.text("math", ids).status_code == 400


@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions", "/v1/load_lora_adapter"])
@pytest.mark.parametrize("key", [None, "Bearer wrong", KEY[:-1]])
def test_the_key(served: Served, path: str, key: str | None) -> None:
    response = httpx.request(
        "GET" if path == "/v1/models" else "POST", served.url + path, headers={"authorization": key} if key else {}
    )
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"


def test_other_routes(served: Served) -> None:
    assert served.http.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert served.http.get("/v1/completions").status_code == 405
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}


# ------------------------------------------------------------------------------------------------- models and metrics


def test_models(served: Served) -> None:
    cards = {card.id: card for card in served.openai.models.list()}
    assert list(cards) == ["tiny", "auto", "math", "logic"]
    assert cards["math"].model_extra == {
        "parent": "tiny",
        "max_model_len": 128,
        "description": "numbers and sums",
    }
    assert served.openai.models.retrieve("logic").id == "logic"
    assert served.http.get("/v1/models/nobody").status_code == 404


def test_metrics(served: Served) -> None:
    def value(line: str) -> float:
        lines = httpx.get(f"{served.url}/metrics").text.splitlines()
        return next((float(found.split()[-1]) for found in lines if found.startswith(line)), 0.0)

    prompts = 'peft_svf_tokens_total{expert="logic",kind="prompt"}'
    done = 'peft_svf_requests_total{expert="mixture",status="200"}'
    unknown = 'peft_svf_requests_total{expert="unknown",status="404"}'
    before = [value(line) for line in (prompts, done, unknown)]
    served.text("logic", "abcde", 1)
    served.text("math=0.1,logic=0.9", "a", 1)
    served.text("nobody", "a", 1)
    served.text("auto", "m", 1)
    assert [value(line) for line in (prompts, done, unknown)] == [before[0] + 5, before[1] + 1, before[2] + 1]
    assert value("peft_svf_running_requests") == 0
    assert 'peft_svf_first_pass_seconds_count{expert="math"}' in httpx.get(f"{served.url}/metrics").text


# ------------------------------------------------------------------------------------------ clients that leave, experts


def test_a_client_that_leaves_frees_its_request(served: Served) -> None:
    body = {"model": "math", "prompt": "a", "max_tokens": 120, "stop": ["~"]}
    for stream in (True, False):
        request = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
        content = json.dumps({**body, "stream": stream})
        with socket.create_connection(("127.0.0.1", int(served.url.rsplit(":", 1)[1]))) as raw, served.engine.paused():
            raw.sendall(f"{request}Content-Length: {len(content)}\r\n\r\n{content}".encode())
            while not served.engine.running:
                time.sleep(0.01)
        idle(served)
    assert served.text("math", "a").json()["choices"][0]["text"] == served.wanted({"math": 1.0}, "a")


def test_experts_come_and_go_while_requests_run(served: Served) -> None:
    def change(what: str, **body: str) -> httpx.Response:
        return served.http.post(f"/v1/{what}_lora_adapter", json=body)

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(served.text, "math", "abc", 100) for _ in range(3)]
        assert change("load", lora_name="new", lora_path="late").status_code == 200
        adapter = dict(served.experts)["new"].adapter
        wanted = served.wanted({adapter: 1.0}, "abc", 100)
        with served.engine.paused():
            mixed = pool.submit(served.text, "new", "abc", 100)
            while not served.engine.uses(adapter):
                time.sleep(0.001)
            assert change("unload", lora_name="new").status_code == 200
        assert served.text("new", "abc").status_code == 404
        assert mixed.result().json()["choices"][0]["text"] == wanted  # its request goes on
        texts = [each.result().json()["choices"][0]["text"] for each in running]
        assert texts == [served.wanted({"math": 1.0}, "abc", 100)] * 3
    idle(served)
    assert change("load", lora_name="again", lora_path="late").status_code == 200
    assert served.text("again", "abc", 100).json()["choices"][0]["text"] == wanted
    assert change("load", lora_name="mäθ", lora_path="math").status_code == 200
    other = served.text("mäθ", "abc")
    assert other.json()["choices"][0]["text"] == served.wanted({"math": 1.0}, "abc")
    assert other.headers["x-peft-svf-expert"] == "m%C3%A4%CE%B8"
    assert change("unload", lora_name="mäθ").status_code == 200
    assert change("load", lora_name="again", lora_path="late").status_code == 400
    assert change("unload", lora_name="again").status_code == 200
    assert list(served.model.peft_config) == ["math", "logic"]
    assert change("unload", lora_name="math").status_code == 400
    assert change("unload", lora_name="again").status_code == 404


def test_an_expert_that_comes_leaves_another_adapter_alone(served: Served) -> None:
    """Even if that one has the name that the new adapter would get."""
    taken = f"new-{served.experts._loads + 1}"
    with served.engine.changing():
        served.model.load_adapter(served.root / "logic", adapter_name=taken)
    other = served.wanted({taken: 1.0}, "abc")
    for path, status in (("nothing", 400), ("math", 200)):
        loaded = served.http.post("/v1/load_lora_adapter", json={"lora_name": "new", "lora_path": path})
        assert loaded.status_code == status
    assert served.text("new", "abc").json()["choices"][0]["text"] == served.wanted({"math": 1.0}, "abc") != other
    assert served.wanted({taken: 1.0}, "abc") == other
    served.http.post("/v1/unload_lora_adapter", json={"lora_name": "new"})
    with served.engine.changing():
        served.model.delete_adapter(taken)
    assert list(served.model.peft_config) == ["math", "logic"]


def test_damaged_experts_are_refused(served: Served) -> None:
    def damaged(name: str, change: Any) -> str:
        shutil.copytree(served.root / "late", served.root / name)
        change(served.root / name)
        return name

    def values(value: float) -> Any:
        def change(folder: Path) -> None:
            tensors = load_file(folder / "adapter_model.safetensors")
            next(iter(tensors.values()))[0] = value
            save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})

        return change

    def cut(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-20])

    save_expert(
        served.root / "foreign", SVFConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), 3, base=base_model(7)
    )
    (served.root / "link").symlink_to("/")
    (served.root / "circle").symlink_to(served.root / "circle")
    cases = {
        damaged("nan", values(float("nan"))): "adapter 'bad'",
        damaged("huge", values(1e20)): "damaged",
        damaged("cut", cut): "",
        "foreign": "q_proj",
        "nothing": "no folder",
        "..": "no folder",
        "link/etc": "no folder",
        "circle": "no folder",
        "a" * 300: "no folder",
        "a\0b": "no folder",
        "/etc": "no folder",
        str(served.root.parent): "no folder",
    }
    for path, said in cases.items():
        response = served.http.post("/v1/load_lora_adapter", json={"lora_name": "bad", "lora_path": path})
        assert response.status_code == 400, (path, response.text)
        assert said in response.json()["error"]["message"], path
    for name in ("auto", "tiny", "base", "a,b", "a=b", "a/b", "math", "svf-classifier"):
        response = served.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": "late"})
        assert response.status_code == 400, name
    assert list(served.model.peft_config) == ["math", "logic"]
    assert served.text("math", "a").json()["choices"][0]["text"] == served.wanted({"math": 1.0}, "a")


# ----------------------------------------------------------------------------------------------------- the end, death


def test_the_server_answers_what_runs_and_refuses_the_rest(tmp_path: Path) -> None:
    served = Served(tmp_path)
    with ThreadPoolExecutor(1) as pool:
        with served.engine.paused():
            running = pool.submit(served.text, "math", "abc", 60)
            while not served.engine.running:
                time.sleep(0.01)
            served.server.handle_exit(15, None)
            assert httpx.get(f"{served.url}/health").status_code == 503
            assert served.text("math", "a").status_code == 503
        assert running.result().json()["choices"][0]["text"] == served.wanted({"math": 1.0}, "abc", 60)
    served.thread.join(timeout=20)
    assert not served.thread.is_alive()
    served.close()


def test_a_dead_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(tmp_path)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("device lost")

    monkeypatch.setattr(served.model.base_model.model, "forward", broken)
    for _ in range(2):
        response = served.text("math", "abc")
        assert response.status_code == 503
        assert "device lost" not in response.text
    assert served.http.get("/health").status_code == 503
    served.close()


def test_values_that_are_not_finite_are_an_error(served: Served) -> None:
    """Never a wrong answer: the request gets an error, the next one its answer."""
    head = served.model.base_model.model.model.norm.register_forward_hook(lambda *_: _[-1] * float("nan"))
    response = served.text("math", "abc")
    head.remove()
    assert response.status_code == 500
    assert "not finite" in response.json()["error"]["message"]
    idle(served)
    assert served.text("math", "abc").json()["choices"][0]["text"] == served.wanted({"math": 1.0}, "abc")


def test_mixtures_that_overflow_are_refused(served: Served) -> None:
    with pytest.raises(Exception, match="too large"):
        asyncio.run(anext(served.engine.generate([5], {"math": 1e6}, Any, 1, [])))  # type: ignore[arg-type]
    assert served.engine.running == 0


def test_settings_of_the_model_that_the_endpoint_does_not_apply_are_said() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unsupported(GenerationConfig())
    with pytest.warns(UserWarning, match=r"has repetition_penalty=1\.2, min_p=0\.1, which the server does not apply"):
        warn_of_unsupported(GenerationConfig(repetition_penalty=1.2, min_p=0.1))
