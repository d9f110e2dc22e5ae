"""What a request must pass before it is read: the key, the size, and whether the server still takes requests."""

from __future__ import annotations

import asyncio
import hmac
from typing import Any

from starlette.responses import JSONResponse

from .errors import RequestError, unavailable


class Guard:
    """
    ASGI middleware around an endpoint. `/health` and `/metrics` need no key.

    Args:
        app: The application.
        api_key (`str`, *optional*): The key that requests must have.
        max_bytes (`int`): Largest body of a request.

    Attributes:
        draining: Whether new requests are refused, because the server is about to end.
        idle: Set while no request runs.
    """

    def __init__(self, app: Any, *, api_key: str | None, max_bytes: int) -> None:
        self._app, self._key, self._max_bytes = app, api_key, max_bytes
        self.draining, self._running = False, 0
        self.idle = asyncio.Event()
        self.idle.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle an ASGI connection."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1"):
            await self._app(scope, receive, send)
            return
        self._running += 1
        self.idle.clear()
        try:
            try:
                headers = {name.decode("latin-1").lower(): value for name, value in scope["headers"]}
                self._check(headers)
                body = await self._body(headers, receive)
            except RequestError as error:
                await JSONResponse(error.body, error.status, {"connection": "close"})(scope, receive, send)
                return
            messages = iter([{"type": "http.request", "body": body, "more_body": False}])

            async def replayed() -> Any:
                return next(messages, None) or await receive()

            await self._app(scope, replayed, send)
        finally:
            self._running -= 1
            if not self._running:
                self.idle.set()

    def _check(self, headers: dict[str, bytes]) -> None:
        given = headers.get("authorization", b"").removeprefix(b"Bearer ")
        if self._key is not None and not hmac.compare_digest(given, self._key.encode()):
            raise RequestError(401, "The API key is missing or wrong.", code="invalid_api_key")
        if self.draining:
            raise unavailable("The server is about to end.")

    async def _body(self, headers: dict[str, bytes], receive: Any) -> bytes:
        length = headers.get("content-length", b"0")
        if length.isdigit() and int(length) > self._max_bytes:
            raise self._too_large()
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise RequestError(400, "The client has left.")
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_bytes:  # its length need not be said, or true
                raise self._too_large()
        return bytes(body)

    def _too_large(self) -> RequestError:
        return RequestError(413, f"The body may have at most {self._max_bytes} bytes.", code="request_too_large")
