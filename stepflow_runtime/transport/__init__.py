"""How bytes travel: one small protocol, and a module for each way.

A transport carries a request to one server and brings the whole answer back. It knows
HTTP and nothing of Stepflow. Whatever goes wrong on the way is a
:exc:`~stepflow_runtime.errors.ConnectionLostError`; an HTTP error status is an answer
like any other. A cancelled request leaves nothing behind: its connection is closed.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

__all__ = ["Response", "Transport"]


class Response(NamedTuple):
    """An HTTP answer.

    :ivar status: the status code
    :ivar content_type: the media type without parameters, in lower case, or ``""``
    :ivar body: the whole body
    """

    status: int
    content_type: str
    body: bytes


class Transport(Protocol):
    """A way to one server."""

    async def request(
        self, method: str, path: str, body: bytes | None = None
    ) -> Response:
        """Send a request and return the answer.

        :param method: the HTTP method
        :param path: the path with its query, ready to be sent
        :param body: a JSON document, or None for a request without one
        :raises ConnectionLostError: if there was no whole answer
        """
        ...

    async def aclose(self) -> None:
        """Close every connection; a request under way fails with ConnectionLostError."""
        ...
