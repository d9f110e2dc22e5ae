"""What a server consists of. All of this needs the extra `serve`."""

from .app import Endpoint
from .engine import Engine
from .experts import Experts
from .server import Server, bound

__all__ = ["Endpoint", "Engine", "Experts", "Server", "bound"]
