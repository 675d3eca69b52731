"""How bytes travel: one small protocol, and a module for each way.

A transport carries a request to one server and brings the answer back, whole or as it
comes. It knows HTTP and nothing of Stepflow. Whatever goes wrong on the way is a
:exc:`~stepflow_runtime.errors.ConnectionLostError`; an HTTP error status is an answer
like any other. A cancelled request leaves nothing behind: its connection is closed,
unless somebody else wants its answer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Final, NamedTuple, Protocol, TypeAlias

from ..errors import ConnectionLostError

__all__ = [
    "NO_HEADERS",
    "Heir",
    "Response",
    "ServerRestartedError",
    "Stream",
    "Transport",
]

NO_HEADERS: Final[Mapping[str, str]] = {}


class Response(NamedTuple):
    """An HTTP answer.

    :ivar status: the status code
    :ivar content_type: the media type without parameters, in lower case, or ``""``
    :ivar body: the whole body
    :ivar generation: whose answer it is, where servers come and go; else None
    """

    status: int
    content_type: str
    body: bytes
    generation: int | None = None


Heir: TypeAlias = Callable[[Response | None], Awaitable[object]]
"""What is to be done with an answer whose caller was cancelled while it waited for it."""


class ServerRestartedError(ConnectionLostError):
    """A stream ended with its server, and another one can go on with it at once."""


class Stream(Protocol):
    """An answer whose body comes bit by bit.

    :ivar status: the status code
    :ivar content_type: as in ``Response``
    """

    @property
    def status(self) -> int: ...

    @property
    def content_type(self) -> str: ...

    async def receive(self) -> bytes:
        """The next bytes of the body; ``b""`` at its end.

        :raises ConnectionLostError: if the connection broke before the end
        """
        ...

    def close(self) -> None:
        """Read no more. From any thread, as often as one likes."""
        ...


class Transport(Protocol):
    """A way to one server."""

    async def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        headers: Mapping[str, str] = NO_HEADERS,
        held: float = 0.0,
        heir: Heir | None = None,
    ) -> Response:
        """Send a request and return the answer.

        :param method: the HTTP method
        :param path: the path with its query, ready to be sent
        :param body: a document, or None for a request without one
        :param headers: more headers; in the place of ``content-type`` and ``accept``, which
            are ``application/json`` otherwise, if they are among them
        :param held: for how many seconds the server may hold the answer back, because it
            was asked to wait for something
        :param heir: gets the answer if the caller was cancelled after the request was sent,
            or None if none came. It is called by the transport's crew; the caller goes at
            once
        :raises ConnectionLostError: if there was no whole answer
        """
        ...

    async def stream(self, path: str) -> Stream:
        """Ask (GET) for something that is to be read while it comes.

        Returns when the head of the answer is there. The caller has to close the stream.

        :raises ConnectionLostError: if there was no answer
        """
        ...

    def close(self) -> None:
        """Have every connection closed, soon; from any thread."""
        ...

    async def aclose(self) -> None:
        """Close every connection; a request under way fails with ConnectionLostError."""
        ...
