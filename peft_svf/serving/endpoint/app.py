"""The endpoint: the OpenAI API over an engine whose requests have different experts."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ...scoring.tokens import prompt_ids
from .engine import Engine
from .errors import RequestError, unavailable
from .experts import AUTO, Choice, Experts
from .first_pass import Dispatched, FirstPass
from .guard import Guard
from .metrics import Metrics
from .requests import MOST_CHOICES, ChatRequest, LoadRequest, Request, TextRequest, UnloadRequest, parsed
from .sampling import Sampling
from .text import TextStream

_log = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass
class Answer:
    """
    One answer while it is generated.

    Attributes:
        choice ([`Choice`]): What generates it.
        dispatched ([`Dispatched`], *optional*): The first pass of `"auto"`.
        ids: The prompt.
        tokens: Number of generated tokens.
        finish: `"stop"` or `"length"`, once it is finished.
    """

    choice: Choice
    dispatched: Dispatched | None
    ids: list[int]
    tokens: int = 0
    finish: str | None = None


class Endpoint:
    """
    An OpenAI-compatible endpoint for one model and its experts.

    Args:
        engine ([`Engine`]): Generates the answers.
        experts ([`Experts`]): The names that requests may use.
        tokenizer: The tokenizer.
        dispatcher ([`Dispatcher`]): Chooses the expert of requests for `"auto"`.
        soft (`bool`): Mix the experts of `"auto"` by their probabilities.
        api_key (`str`, *optional*): The key that requests must have.
        max_bytes (`int`): Largest body of a request.

    Attributes:
        app: The ASGI application.
    """

    def __init__(
        self,
        engine: Engine,
        experts: Experts,
        tokenizer: Any,
        dispatcher: Any,
        *,
        soft: bool = False,
        api_key: str | None = None,
        max_bytes: int = 2**20,
    ) -> None:
        self.engine, self.experts, self.tokenizer = engine, experts, tokenizer
        self.metrics = Metrics(engine)
        # One thread for all that uses the model beside the engine: first passes, and experts that come and go.
        self._beside = ThreadPoolExecutor(1, "peft-svf-beside")
        self.first_pass = FirstPass(
            dispatcher, experts, self._beside, soft=soft, on_failure=self.metrics.first_pass_failures.inc
        )
        self._started = int(time.time())
        routes = [
            Route(path, _answered(handler), methods=[method])
            for method, path, handler in [
                ("GET", "/health", self.health),
                ("GET", "/metrics", self.show_metrics),
                ("GET", "/v1/models", self.models),
                ("GET", "/v1/models/{name:path}", self.model),
                ("POST", "/v1/chat/completions", self._answering(ChatRequest)),
                ("POST", "/v1/completions", self._answering(TextRequest)),
                ("POST", "/v1/load_lora_adapter", self.load),
                ("POST", "/v1/unload_lora_adapter", self.unload),
            ]
        ]
        handlers: Any = {404: _no_route, 405: _no_route}
        self.app = Guard(Starlette(routes=routes, exception_handlers=handlers), api_key=api_key, max_bytes=max_bytes)

    def close(self) -> None:
        """End the engine."""
        self._beside.shutdown()
        self.engine.stop()

    # ------------------------------------------------------------------------------------------------ routes

    async def health(self, request: HTTPRequest) -> Response:
        """200 if requests can be answered, else 503."""
        if self.app.draining or self.engine.failure:
            why = "it is about to end" if self.app.draining else "the engine has stopped"
            return JSONResponse({"status": why}, 503)
        return JSONResponse({"status": "ok"})

    async def show_metrics(self, request: HTTPRequest) -> Response:
        """Prometheus metrics."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: HTTPRequest) -> Response:
        """All names that a request may have as its `model`, but for mixtures."""
        return JSONResponse({"object": "list", "data": self._listed()})

    async def model(self, request: HTTPRequest) -> Response:
        """One of them."""
        name = request.path_params["name"]
        for card in self._listed():
            if card["id"] == name:
                return JSONResponse(card)
        raise self.experts.unknown(name)

    def _listed(self) -> list[dict[str, Any]]:
        base = self.experts.base_name
        about = {
            base: "The base model.",
            AUTO: "Chooses the expert of each request from its prompt.",
            **{name: expert.description for name, expert in self.experts},
        }
        return [
            {
                "id": name,
                "object": "model",
                "created": self._started,
                "owned_by": "peft-svf",
                "parent": None if name == base else base,
                "max_model_len": self.engine.context,
                "description": description,
            }
            for name, description in about.items()
        ]

    async def load(self, request: HTTPRequest) -> Response:
        """Load an expert from the folder that the server was started with."""
        asked = parsed(LoadRequest, await request.body())
        await self._aside(self.experts.load, asked.lora_name, asked.lora_path)
        return Response(f"Success: the expert {asked.lora_name!r} is loaded.", media_type="text/plain")

    async def unload(self, request: HTTPRequest) -> Response:
        """Remove an expert that was loaded so."""
        asked = parsed(UnloadRequest, await request.body())
        await self._aside(self.experts.unload, asked.lora_name)
        return Response(f"Success: the expert {asked.lora_name!r} is removed.", media_type="text/plain")

    async def _aside(self, function: Callable[..., None], *args: Any) -> None:
        await asyncio.get_running_loop().run_in_executor(self._beside, function, *args)

    # ------------------------------------------------------------------------------------------------ answers

    def _answering(self, kind: type[ChatRequest] | type[TextRequest]) -> Callable[[HTTPRequest], Awaitable[Response]]:
        async def answer(request: HTTPRequest) -> Response:
            if self.engine.failure:
                raise unavailable("The engine has stopped.")
            asked: Any = parsed(kind, await request.body())
            return await _unless_gone(request, self._response(asked))

        return answer

    async def _response(self, asked: ChatRequest | TextRequest) -> Response:
        prompts = [prompt for prompt in asked.prompts for _ in range(asked.n or 1)]
        if len(prompts) > MOST_CHOICES:
            raise RequestError(400, f"A request may have {MOST_CHOICES} answers, got {len(prompts)}.", param="n")
        if asked.stream and len(prompts) > 1:
            raise RequestError(400, "A stream has one prompt and one choice ('n').", param="stream")
        try:
            answers = await _all(self._begun(asked, prompt) for prompt in prompts)
        except RequestError as error:
            self.metrics.requests.labels(self._label(asked.model), str(error.status)).inc()
            raise
        form = _Form(asked, answers)
        if asked.stream:
            return _Events(self._events(asked, answers[0], form), headers=form.headers)
        texts = await _all(self._whole(asked, answer, i) for i, answer in enumerate(answers))
        return JSONResponse(form.whole(texts), headers=form.headers)

    async def _begun(self, asked: ChatRequest | TextRequest, prompt: Any) -> Answer:
        """Read a prompt, and choose what answers it."""
        choice = None if asked.model == AUTO else self.experts.find(asked.model)
        ids = self._ids(prompt)
        room = self.engine.context - len(ids)
        if room < 1 or (asked.longest or 1) > room:
            raise RequestError(
                400,
                f"The prompt has {len(ids)} tokens and the answer up to {asked.longest or 1}, but the context has "
                f"{self.engine.context}. Shorten one of them.",
                param="messages" if isinstance(asked, ChatRequest) else "prompt",
                code="context_length_exceeded",
            )
        if choice is not None:
            return Answer(choice, None, ids)
        text = prompt if not isinstance(prompt, list) or isinstance(asked, ChatRequest) else self._text(prompt)
        dispatched = await self.first_pass(text)
        self.metrics.first_pass.labels(dispatched.choice.label).observe(dispatched.seconds)
        return Answer(dispatched.choice, dispatched, ids)

    def _ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, list) and isinstance(prompt[0], int):
            size = self.engine.model.get_input_embeddings().weight.shape[0]
            if not all(0 <= token < size for token in prompt):
                raise RequestError(400, f"A token must be from 0 to {size - 1}.", param="prompt")
            return prompt
        if not isinstance(prompt, str) and not getattr(self.tokenizer, "chat_template", None):
            raise RequestError(400, "The model has no chat template. Use /v1/completions.", param="messages")
        try:
            ids = prompt_ids(prompt, self.tokenizer)
        except Exception as error:  # a chat template may raise anything
            raise RequestError(400, f"The chat template refuses the messages: {error}", param="messages") from error
        if not ids:
            raise RequestError(400, "The prompt is empty.", param="prompt")
        return ids

    def _text(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    async def _pieces(self, asked: Request, answer: Answer, index: int = 0) -> AsyncGenerator[str, None]:
        """Yield the text of an answer piece by piece, and count it."""
        text = TextStream(self.tokenizer, asked.stops)
        longest = asked.longest or self.engine.context - len(answer.ids)
        sampling, label = self._sampling(asked, index), answer.choice.label
        ends = frozenset() if asked.ignore_eos else self.engine.ends
        status, ended = "499", False  # until it is done: the client has left, as nginx calls it
        try:
            generated = self.engine.generate(answer.ids, answer.choice.weights, sampling, longest, ends)
            async with aclosing(generated):
                async for tokens in generated:
                    answer.tokens += len(tokens)
                    ended = tokens[-1] in ends
                    yield text.push(tokens[:-1] if ended else tokens)
                    if text.stopped:
                        break
            yield text.flush()
            answer.finish = "stop" if ended or text.stopped else "length"
            status = "200"
        except Exception as error:
            status = str(error.status) if isinstance(error, RequestError) else "500"
            raise
        finally:
            self.metrics.tokens.labels(label, "prompt").inc(len(answer.ids))
            self.metrics.tokens.labels(label, "generated").inc(answer.tokens)
            self.metrics.requests.labels(label, status).inc()
            if self.experts.has_unused:
                self._beside.submit(self.experts.delete_unused)

    async def _whole(self, asked: Request, answer: Answer, index: int) -> str:
        async with aclosing(self._pieces(asked, answer, index)) as pieces:
            return "".join([piece async for piece in pieces])

    async def _events(self, asked: Request, answer: Answer, form: _Form) -> AsyncGenerator[str, None]:
        """Yield the events of a stream."""
        try:
            yield form.event("", first=True)
            async with aclosing(self._pieces(asked, answer)) as pieces:
                async for piece in pieces:
                    if piece:
                        yield form.event(piece)
            yield form.event("", finish=answer.finish)
            if asked.stream_options and asked.stream_options.include_usage:
                yield form.usage_event()
        except RequestError as error:
            yield _event(error.body)
        except Exception:
            _log.exception("A stream failed.")
            yield _event(_INTERNAL.body)
        yield _event("[DONE]")

    def _sampling(self, asked: Request, index: int) -> Sampling:
        """The temperature and the limits that a request leaves out come from the model's generation config."""
        config = self.engine.model.generation_config
        usual = config if config.do_sample else None

        def either(given: float | None, name: str, default: float) -> float:
            return next(v for v in (given, getattr(usual, name, None), default) if v is not None)

        return Sampling(
            temperature=either(asked.temperature, "temperature", 1.0 if usual else 0.0),
            top_p=either(asked.top_p, "top_p", 1.0),
            top_k=max(int(either(asked.top_k, "top_k", 0)), 0),
            seed=None if asked.seed is None else asked.seed + index,
        )

    def _label(self, name: str) -> str:
        """The label of a request for metrics; the same for all names that are not served."""
        try:
            return AUTO if name == AUTO else self.experts.find(name).label
        except RequestError:
            return "unknown"


class _Form:
    """The JSON of answers."""

    def __init__(self, asked: ChatRequest | TextRequest, answers: list[Answer]) -> None:
        self._answers, self._is_chat = answers, isinstance(asked, ChatRequest)
        names = list(dict.fromkeys(answer.choice.name for answer in answers))
        self._about: dict[str, Any] = {
            "id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": names[0] if len(names) == 1 else asked.model,
        }

    @property
    def headers(self) -> dict[str, str]:
        """What was chosen, in the conventions of semantic-router. Several answers are separated by `;`."""
        headers = {"x-peft-svf-expert": ";".join(_expert(answer) for answer in self._answers)}
        passes = [answer.dispatched for answer in self._answers if answer.dispatched]
        if passes:
            confidences = ["" if each.confidence is None else f"{each.confidence:.4f}" for each in passes]
            headers["x-peft-svf-confidence"] = ";".join(confidences)
            headers["x-peft-svf-first-pass-ms"] = f"{1000 * max(each.seconds for each in passes):.1f}"
        return headers

    def whole(self, texts: list[str]) -> dict[str, Any]:
        """The body of a response."""
        choices = [
            {"index": i, "finish_reason": answer.finish, "logprobs": None}
            | ({"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text})
            for i, (text, answer) in enumerate(zip(texts, self._answers, strict=True))
        ]
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {**self._about, "object": kind, "choices": choices, "usage": self._usage()}

    def event(self, text: str, *, first: bool = False, finish: str | None = None) -> str:
        """An event of a stream."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
        if self._is_chat:
            choice["delta"] = {**({"role": "assistant"} if first else {}), **({} if finish else {"content": text})}
        else:
            choice["text"] = text
        return self._chunk([choice])

    def usage_event(self) -> str:
        """The last event of a stream, with the number of tokens."""
        return self._chunk([], usage=self._usage())

    def _chunk(self, choices: list[Any], **more: Any) -> str:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return _event({**self._about, "object": kind, "choices": choices, **more})

    def _usage(self) -> dict[str, int]:
        prompts, tokens = (sum(map(count, self._answers)) for count in (lambda a: len(a.ids), lambda a: a.tokens))
        return {"prompt_tokens": prompts, "completion_tokens": tokens, "total_tokens": prompts + tokens}


class _Events(StreamingResponse):
    """A stream of events, whose request ends with the connection."""

    def __init__(self, events: AsyncGenerator[str, None], headers: dict[str, str]) -> None:
        self._events = events
        super().__init__(events, headers={**headers, "cache-control": "no-cache"}, media_type="text/event-stream")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


def _expert(answer: Answer) -> str:
    """The expert of an answer as a header, which can only have ASCII."""
    name = answer.choice.name if answer.choice.weights else answer.choice.label
    return name if name.isascii() else quote(name, safe="=,")


def _event(data: Any) -> str:
    return f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n"


async def _unless_gone(request: HTTPRequest, work: Coroutine[Any, Any, Response]) -> Response:
    """Do the work of a request, and cancel it when its client leaves."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else Response(status_code=499)
    finally:
        await _cancelled([working, leaving])


async def _all(works: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Do all of this at once. If one part fails, cancel the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await _cancelled(tasks)


async def _cancelled(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


_INTERNAL = RequestError(500, "The server failed. Its log says why.", code="internal_error")


def _answered(handler: Callable[[HTTPRequest], Awaitable[Response]]) -> Callable[[HTTPRequest], Awaitable[Response]]:
    """Give errors a response. After others, Starlette would raise them again, and uvicorn close the connection."""

    async def answer(request: HTTPRequest) -> Response:
        try:
            return await handler(request)
        except RequestError as error:
            return JSONResponse(error.body, error.status)
        except Exception:
            _log.exception("A request failed.")
            return JSONResponse(_INTERNAL.body, 500)

    return answer


async def _no_route(request: HTTPRequest, error: Any) -> Response:
    refused = RequestError(error.status_code, f"There is no {request.method} {request.url.path[:200]}.")
    return JSONResponse(refused.body, refused.status)
