"""Questions: does `peft-svf serve` answer each request with its own expert, under load? What do `auto` and mixing cost?

    python benchmarks/serving.py [--part load | cost]    # writes docs/results/serving.md

The server is the command line, in a separate process, with SmolLM2 and the shipped experts.

- Load: requests with random experts, mixtures, or the base model, half of them as streams. One in ten clients leaves
  before the end. Meanwhile an expert is loaded and unloaded again and again. Each answer is compared with that of
  `generate` for the same prompt and mixture alone. A different answer counts as a tie if the logits of the two tokens
  differ by less than 1e-3 where the answers part.
- `auto`: 32 requests at once, for the four tasks, with exactly 64 new tokens; and the same with their experts by name.
- Mixed: 32 requests for four experts at once, and 8 at once expert by expert, with exactly 16 new tokens.

Times are CPU seconds of the server: other processes of a machine hardly change them.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any

import httpx2 as httpx
import psutil
import torch
from common import Record, argument_parser, load_model, parse
from smollm2 import model_name

from peft_svf import AdaptiveMixture
from peft_svf.scoring.tokens import prompt_ids
from peft_svf.training.recipe import recipe_task

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results" / "serving.md"
EXPERTS = {"sums": "math", "retrieval": "people", "lists": "list", "letters": "words"}  # and their labels
MIXTURES = ["sums=0.5,lists=0.5", "letters=0.7,retrieval=0.3", "lists=-0.5", "sums=0.4,lists=0.3,letters=0.3"]
TIE = 1e-3


class Server:
    """`peft-svf serve` in a process, and what it uses."""

    def __init__(self) -> None:
        options = [f"--expert={name}={ROOT / 'examples' / 'experts' / name}" for name in EXPERTS]
        options += [f"--label={name}={label}" for name, label in EXPERTS.items()]
        options += ["--dispatch=classifier", f"--classifier={ROOT / 'examples' / 'experts' / 'classification'}"]
        options += [f"--expert_root={ROOT / 'examples' / 'experts'}"]
        start = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "peft_svf", "serve", model_name(), "--port=0", *options],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        while "Serving" not in (line := self.process.stdout.readline()):
            assert line, "the server did not start"
        self.url = line.split()[-1]
        self._about = psutil.Process(self.process.pid)
        asyncio.run(self.ask("sums", "Hello", 1))
        self.start = {"wall": time.perf_counter() - start, "CPU": self.cpu()}

    def cpu(self) -> float:
        times = self._about.cpu_times()
        return float(times.user + times.system)

    def megabytes(self) -> float:
        return float(self._about.memory_info().rss / 2**20)

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=3600, limits=httpx.Limits(max_connections=None))

    async def ask(self, model: str, prompt: str, tokens: int, client: Any = None) -> Any:
        if client is None:
            async with self.client() as client:
                return await self.ask(model, prompt, tokens, client)
        return await client.post("/chat/completions", json=body(model, prompt, tokens, ignore_eos=True))


def body(model: str, prompt: str, tokens: int, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0, **more}


class Reference:
    """What `generate` answers, one prompt at a time."""

    def __init__(self, longest: int) -> None:
        self._longest, experts = longest, {name: str(ROOT / "examples" / "experts" / name) for name in EXPERTS}
        base, self.tokenizer = load_model(None)
        self.model = AdaptiveMixture.from_pretrained(base, experts, tokenizer=self.tokenizer).model.eval()
        self._known: dict[tuple[str, str], list[int]] = {}

    @contextmanager
    def mixed(self, model: str) -> Any:
        weights = {
            name: float(weight) for name, weight in (term.split("=") for term in model.split(",") if "=" in term)
        }
        weights = weights or ({model: 1.0} if model in EXPERTS else {"sums": 0.0})
        with torch.no_grad(), self.model.base_model.row_mixture([[*weights.values()]], [*weights]):
            yield

    def compare(self, model: str, prompt: str, tokens: int, text: str) -> str:
        """Return "equal", "tie" or "wrong"."""
        ids, end = self._ids(prompt), self.tokenizer.eos_token_id
        if (model, prompt) not in self._known:
            with self.mixed(model):
                output = self.model.generate(
                    input_ids=torch.tensor([ids]), max_new_tokens=self._longest, do_sample=False, pad_token_id=end
                )
            self._known[model, prompt] = output[0, len(ids) :].tolist()
        wanted = self._known[model, prompt][:tokens]
        if text == self.tokenizer.decode(wanted, skip_special_tokens=True):
            return "equal"
        found = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], end]
        part = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), len(wanted) - 1)
        with self.mixed(model):
            logits = self.model(input_ids=torch.tensor([ids + wanted[:part]])).logits[0, -1]
        best = logits.topk(2).values
        return "tie" if float(best[0] - best[1]) < TIE else "wrong"

    def _ids(self, prompt: str) -> list[int]:
        return prompt_ids([{"role": "user", "content": prompt}], self.tokenizer)


async def load(server: Server, prompts: Sequence[str], count: int, concurrent: int, tokens: int) -> dict[str, Any]:
    """Send random requests, and return what came back."""
    chance, waiting = random.Random(0), asyncio.Semaphore(concurrent)
    models = [*EXPERTS, "base", *MIXTURES, "extra"]
    answers: list[tuple[str, str, int, str]] = []
    counts = {"answered": 0, "left": 0, "refused": 0, "lost": 0, "loaded": 0}
    memory = []

    async def one(client: Any, model: str, prompt: str, longest: int, stream: bool, patience: float | None) -> None:
        async with waiting:
            try:
                await asyncio.wait_for(answered(client, model, prompt, longest, stream), patience)
            except asyncio.TimeoutError:
                counts["left"] += 1

    async def answered(client: Any, model: str, prompt: str, longest: int, stream: bool) -> None:
        asked = body(model, prompt, longest, stream=stream)
        async with client.stream("POST", "/chat/completions", json=asked) as response:
            if response.status_code == 404 and model == "extra":  # it is not loaded now
                counts["refused"] += 1
                return
            if response.status_code != 200:
                counts["lost"] += 1
                return
            lines = [line async for line in response.aiter_lines()]
        if stream:
            chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
            whole = chunks[-1]["choices"][0]["finish_reason"] is not None
        else:
            choice = json.loads("".join(lines))["choices"][0]
            text, whole = choice["message"]["content"], choice["finish_reason"] is not None
        counts["answered" if whole else "lost"] += 1
        answers.append(("sums" if model == "extra" else model, prompt, longest, text))
        if len(answers) % 50 == 0:
            memory.append(server.megabytes())
            print(f"{len(answers)} answers, {memory[-1]:.0f} MiB", flush=True)

    async def come_and_go(client: Any) -> None:
        while True:
            loaded = await client.post("/load_lora_adapter", json={"lora_name": "extra", "lora_path": "sums"})
            assert loaded.status_code == 200, loaded.text
            counts["loaded"] += 1
            await asyncio.sleep(3)
            await client.post("/unload_lora_adapter", json={"lora_name": "extra"})
            await asyncio.sleep(1)

    start, cpu = time.perf_counter(), server.cpu()
    async with server.client() as client:
        changing = asyncio.create_task(come_and_go(client))
        await asyncio.gather(
            *(
                one(
                    client,
                    chance.choice(models),
                    chance.choice(prompts),
                    chance.choice((tokens // 2, tokens)),
                    chance.random() < 0.5,
                    chance.uniform(0.1, 3) if chance.random() < 0.1 else None,
                )
                for _ in range(count)
            )
        )
        changing.cancel()
    seconds = {"wall": time.perf_counter() - start, "CPU": server.cpu() - cpu}
    return {"counts": counts, "answers": answers, "memory": memory, "seconds": seconds}


async def together(
    server: Server, asked: Sequence[tuple[str, str]], tokens: int
) -> tuple[float, list[Any], list[float]]:
    """Send requests at once; return the server's CPU seconds, the responses, and the seconds of each."""
    cpu = server.cpu()

    async def timed(client: Any, model: str, prompt: str) -> tuple[Any, float]:
        start = time.perf_counter()
        response = await server.ask(model, prompt, tokens, client)
        assert response.status_code == 200, response.text
        return response, time.perf_counter() - start

    async with server.client() as client:
        found = await asyncio.gather(*(timed(client, model, prompt) for model, prompt in asked))
    return server.cpu() - cpu, [response for response, _ in found], [seconds for _, seconds in found]


def main() -> None:
    parser = argument_parser(__doc__, rounds=1)
    parser.add_argument("--requests", type=int, default=500, help="requests of the load test (default: 500)")
    parser.add_argument("--concurrent", type=int, default=32, help="requests at once (default: 32)")
    parser.add_argument("--tokens", type=int, default=12, help="new tokens of the load test, at most (default: 12)")
    parser.add_argument("--part", choices=["load", "cost", "all"], default="all")
    arguments = parse(parser)
    if arguments.quick:
        arguments.requests, arguments.concurrent, arguments.tokens = 20, 4, 4
    size = 2 if arguments.quick else 8
    questions = {
        name: [example["prompt"][-1]["content"] for example in list(recipe_task(path).examples("test", size))]
        for name in EXPERTS
        for path in [ROOT / "examples" / "recipes" / f"{name}.yaml"]
    }
    named = [(name, prompt) for name, prompts in questions.items() for prompt in prompts]
    load_record, cost_record = (Record(arguments, __doc__) for _ in range(2))
    server = Server()
    try:
        if arguments.part != "cost":
            few = [prompt for prompts in questions.values() for prompt in prompts[:3]]
            found = asyncio.run(load(server, few, arguments.requests, arguments.concurrent, arguments.tokens))
        if arguments.part != "load":
            cost(cost_record, server, named, arguments.quick)
    finally:
        server.process.terminate()
        server.process.wait()
    if arguments.part != "cost":
        verdict(load_record, found, arguments)
    if not arguments.quick:
        parts = [json.loads(path.read_text()) for path in (_file("load"), _file("cost")) if path.exists()]
        PAGE.write_text(page(parts), encoding="utf-8")


def verdict(record: Record, found: dict[str, Any], arguments: Any) -> None:
    """Compare the answers of the load test, and record it."""
    reference = Reference(arguments.tokens)
    verdicts = [reference.compare(*answer) for answer in found["answers"]]
    counts, memory = found["counts"], found["memory"]
    record.table(
        "Load",
        ["", "result"],
        [
            ["requests, at once", f"{arguments.requests}, {arguments.concurrent}"],
            ["new tokens, at most", f"{arguments.tokens // 2} or {arguments.tokens}"],
            ["answers equal to `generate`, token by token", f"{verdicts.count('equal')} of {len(verdicts)}"],
            ["answers that part at a tie of 1e-3", str(verdicts.count("tie"))],
            ["wrong answers", str(verdicts.count("wrong"))],
            ["lost requests", str(counts["lost"])],
            ["clients that left", str(counts["left"])],
            ["times that an expert was loaded and unloaded", str(counts["loaded"])],
            ["requests for it while it was not there (404)", str(counts["refused"])],
            ["memory of the server, each 50 answers", ", ".join(f"{each:.0f}" for each in memory) + " MiB"],
            ["wall, CPU seconds", f"{found['seconds']['wall']:.0f}, {found['seconds']['CPU']:.0f}"],
        ],
    )
    record.path = _file("load")
    record.write()


def cost(record: Record, server: Server, named: Sequence[tuple[str, str]], quick: bool) -> None:
    """Measure the start, the first pass, and mixed requests."""
    longest, short = (8, 2) if quick else (64, 16)
    for _ in range(2):  # the weights of the classification expert fold in the first batches
        asyncio.run(together(server, [("auto", prompt) for _, prompt in named], 1))
    auto, responses, seconds = asyncio.run(together(server, [("auto", prompt) for _, prompt in named], longest))
    explicit, *_ = asyncio.run(together(server, named, longest))
    mixed, *_ = asyncio.run(together(server, named, short))
    in_turn = sum(
        asyncio.run(together(server, [each for each in named if each[0] == name], short))[0] for name in EXPERTS
    )
    chosen = [response.headers["x-peft-svf-expert"] for response in responses]
    passes = [float(response.headers["x-peft-svf-first-pass-ms"]) / 1000 for response in responses]
    shares = [first / whole for first, whole in zip(passes, seconds, strict=True)]
    right = mean(each == name for each, (name, _) in zip(chosen, named, strict=True))
    record.table(
        "Cost",
        ["", "result"],
        [
            ["start, to the first answer", f"{server.start['wall']:.1f} s wall, {server.start['CPU']:.1f} CPU s"],
            ["`auto`: right expert", f"{right:.2f} of {len(named)}"],
            ["`auto`: first pass of a request's time, median", f"{median(shares):.0%}"],
            [
                "`auto`: CPU seconds, then by name",
                f"{auto:.1f}, {explicit:.1f}: the first pass is {1 - explicit / auto:.0%}",
            ],
            ["four experts mixed, then in turn", f"{mixed:.1f}, {in_turn:.1f} CPU s: {in_turn / mixed:.2f} times"],
        ],
    )
    record.raw(start=server.start, first_pass=passes, request=seconds)
    record.path = _file("cost")
    record.write()


def _file(part: str) -> Path:
    return ROOT / "outputs" / "benchmarks" / f"serving-{part}.json"


def page(parts: Sequence[dict[str, Any]]) -> str:
    """Return the results as a page of the docs."""
    lines = [
        "# Serving",
        "",
        "SmolLM2-135M-Instruct and the shipped experts. CPU seconds are those of the server process.",
    ]
    for content in parts:
        about, (table,) = content["machine"], content["tables"]
        before, after = content["load_before"], content["load_after"]
        lines += [
            "",
            f"## {table['title']}",
            "",
            f"From `{content['command']}`, {about['cpu']}, {about['cores']} cores,",
        ]
        lines += [f"{about['threads']} thread, transformers {about['transformers']}. Load average {before:.1f} before,"]
        lines += [f"{after:.1f} after.", "", f"| {' | '.join(table['header'])} |", "|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in table["rows"]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
