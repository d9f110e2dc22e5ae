"""Errors of requests in the form of the OpenAI API."""

from __future__ import annotations

from typing import Any


class RequestError(Exception):
    """
    A request that gets an error as its answer.

    Args:
        status (`int`): HTTP status.
        message (`str`): For the client.
        param (`str`, *optional*): The field of the request.
        code (`str`, *optional*): A short name that programs can compare.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON."""

        def text(value: str | None) -> str | None:  # names of a client can have what is no text
            return None if value is None else value.encode(errors="backslashreplace").decode()

        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": text(self.message), "type": kind, "param": text(self.param), "code": self.code}}


def unavailable(why: str) -> RequestError:
    """Return the error of a server that cannot answer now."""
    return RequestError(503, f"{why} Try again later.", code="unavailable")
