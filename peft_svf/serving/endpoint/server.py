"""The HTTP server of an endpoint."""

from __future__ import annotations

from typing import Any

import uvicorn

from .app import Endpoint


class Server(uvicorn.Server):
    """
    A server that ends when its requests are answered. Until then new requests get 503.

    Args:
        endpoint ([`Endpoint`]): What answers requests.
        host (`str`): Address to listen on.
        port (`int`): Port; 0 takes a free one.
    """

    def __init__(self, endpoint: Endpoint, *, host: str = "127.0.0.1", port: int = 8000) -> None:
        super().__init__(
            uvicorn.Config(endpoint.app, host=host, port=port, lifespan="off", log_level="warning", server_header=False)
        )
        self.endpoint = endpoint

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Begin to end. A second signal ends at once."""
        if self.endpoint.app.draining:
            super().handle_exit(sig, frame)
        self.endpoint.app.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Say whether the server ends now."""
        ended = await super().on_tick(counter)
        return ended or (self.endpoint.app.draining and self.endpoint.app.idle.is_set())
