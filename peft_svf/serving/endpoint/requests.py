"""What a request may hold. A field that has no effect here is refused, unless its value asks for nothing."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Optional, TypeVar, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from .errors import RequestError

# Fields of the OpenAI API that are not supported, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),
}
MOST_CHOICES = 128  # of one request


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool = False


class Request(BaseModel):
    """The fields that both endpoints have."""

    model_config = ConfigDict(strict=True, extra="allow")
    model: str = Field(min_length=1, max_length=4096)
    max_tokens: Optional[int] = Field(None, ge=1)
    temperature: Optional[float] = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: Optional[float] = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: Optional[int] = Field(None, ge=-1, le=2**31 - 1)
    seed: Optional[int] = None
    ignore_eos: Optional[bool] = None  # of vLLM, for load tests
    stop: Union[str, list[str], None] = None
    n: Optional[int] = Field(None, ge=1, le=MOST_CHOICES)
    stream: Optional[bool] = None
    stream_options: Optional[StreamOptions] = None
    user: Optional[str] = None

    @property
    def stops(self) -> list[str]:
        """The texts at which an answer ends."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def longest(self) -> int | None:
        """Longest answer, in tokens; `None` if the request does not say."""
        return self.max_tokens


class TextPart(BaseModel):
    """A part of the content of a message."""

    model_config = ConfigDict(strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a chat."""

    model_config = ConfigDict(strict=True, extra="allow")
    role: str
    content: Union[str, list[TextPart]]
    name: Optional[str] = None

    @model_validator(mode="after")
    def _check_extra(self) -> Message:
        # clients send the answers of a server back, with fields such as `refusal: null`; lm-eval sends `type: text`
        used = [name for name, value in (self.model_extra or {}).items() if value and (name, value) != ("type", "text")]
        if used:
            raise PydanticCustomError("unsupported", f"{used[0]!r} is not supported. Leave it out")
        return self

    @property
    def text(self) -> str:
        """The content as text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Request):
    """The body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Optional[int] = Field(None, ge=1)

    @property
    def longest(self) -> int | None:
        """Longest answer, in tokens; `None` if the request does not say."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def prompts(self) -> list[Any]:
        """The only prompt, as messages."""
        return [[{"role": message.role, "content": message.text} for message in self.messages]]


_Tokens = Annotated[list[int], Field(min_length=1)]


class TextRequest(Request):
    """The body of `/v1/completions`."""

    prompt: Union[str, _Tokens, Annotated[list[Union[str, _Tokens]], Field(min_length=1, max_length=MOST_CHOICES)]]

    @property
    def longest(self) -> int:
        """Longest answer, in tokens."""
        return self.max_tokens or 16  # as the OpenAI API

    @property
    def prompts(self) -> list[Any]:
        """The prompts, each as text or tokens."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else list(self.prompt)


class LoadRequest(BaseModel):
    """The body of `/v1/load_lora_adapter`, as vLLM has it."""

    model_config = ConfigDict(strict=True, extra="forbid")
    lora_name: str = Field(min_length=1, max_length=255)
    lora_path: str = Field(min_length=1, max_length=4096)


class UnloadRequest(BaseModel):
    """The body of `/v1/unload_lora_adapter`."""

    model_config = ConfigDict(strict=True, extra="forbid")
    lora_name: str = Field(min_length=1, max_length=255)


Kind = TypeVar("Kind", bound=BaseModel)


def parsed(kind: type[Kind], body: bytes) -> Kind:
    """
    Read the body of a request.

    Raises:
        RequestError: It is no JSON, a field is missing, has a wrong value, is unknown, or is not supported.
    """
    try:
        data = json.loads(body, parse_constant=float)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "The body is no valid JSON.") from error
    try:
        found = kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        param = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("list[", "function-"))) or None
        raise RequestError(400, f"{param or 'The body'}: {first['msg']}.", param=param) from error
    for name, value in (found.model_extra or {}).items():
        if name not in _NEUTRAL:
            raise RequestError(400, f"There is no field {name[:100]!r}.", param=name[:100])
        if value is not None and not any(_same(value, neutral) for neutral in _NEUTRAL[name]):
            raise RequestError(400, f"{name!r} is not supported. Leave it out.", param=name)
    stops = found.stops if isinstance(found, Request) else []
    if len(stops) > 16 or not all(stops):  # vLLM's clients send more than the 4 of the OpenAI API
        raise RequestError(400, "'stop' must be up to 16 texts that are not empty.", param="stop")
    if isinstance(found, Request) and found.stream_options and not found.stream:
        raise RequestError(400, "'stream_options' needs 'stream': true.", param="stream_options")
    return found


def _same(value: Any, other: Any) -> bool:
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)  # 0 == False, and means more
