"""The HTTP server of an endpoint."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from .app import Endpoint


class Server(uvicorn.Server):
    """
    A server that ends when its requests are answered. Until then new requests get 503.

    Args:
        endpoint ([`Endpoint`]): What answers requests.
        on_start (`Callable`, *optional*): Called when requests are accepted.
    """

    def __init__(self, endpoint: Endpoint, on_start: Callable[[], Any] | None = None) -> None:
        super().__init__(uvicorn.Config(endpoint.app, lifespan="off", log_level="warning", server_header=False))
        self.endpoint, self._on_start = endpoint, on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept requests."""
        await super().startup(sockets)
        if self._on_start is not None:
            self._on_start()

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Begin to end. A second signal ends at once."""
        self.should_exit = self.force_exit = self.endpoint.app.draining
        self.endpoint.app.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Say whether the server ends now."""
        ended = await super().on_tick(counter)
        return ended or (self.endpoint.app.draining and self.endpoint.app.idle.is_set())


def bound(host: str, port: int) -> socket.socket:
    """
    Return a socket with this address, which does not listen yet. Port 0 takes a free one.

    Raises:
        OSError: The address is in use, or does not exist.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise OSError(f"Cannot listen at {host}:{port}: {error.strerror}. Pass another --port or --host.") from error
    return found
