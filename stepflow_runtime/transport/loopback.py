"""HTTP/1.1 to a server on this machine: anyio streams, parsed by httptools.

Contract: a connection carries one request at a time and goes back to the pool only
after a whole answer that allows it; after anything else, cancellation included, it is
closed. Nothing of the environment is read, proxies least of all. A kept connection that
the server has closed in the meantime is found out before it is used, so that a request
is never sent twice on a guess.
"""

from __future__ import annotations

import select
from typing import Final

import anyio
import httptools
from anyio.abc import SocketAttribute, SocketStream

from ..errors import ConnectionLostError
from . import Response

__all__ = ["LoopbackTransport"]

HOST: Final = "127.0.0.1"

# Each waiting run holds a connection, and each connection a descriptor; a process often
# has 1,024 of them. Requests beyond this wait for a free connection.
MAX_CONNECTIONS: Final = 256

_RECEIVE_SIZE: Final = 65536


class LoopbackTransport:
    """A pool of connections to one port of 127.0.0.1."""

    def __init__(self, port: int, *, max_connections: int = MAX_CONNECTIONS) -> None:
        self._port = port
        self._slots = anyio.Semaphore(max_connections, fast_acquire=True)
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()
        self._closed = False

    async def request(
        self, method: str, path: str, body: bytes | None = None
    ) -> Response:
        message = _message(method, path, self._port, body)
        async with self._slots:
            connection = await self._connection()
            try:
                response, reusable = await connection.exchange(message)
            except BaseException:
                self._busy.discard(connection)
                await connection.aclose()
                raise
            self._busy.discard(connection)
            if reusable and not self._closed:
                self._idle.append(connection)
            else:
                await connection.aclose()
            return response

    async def aclose(self) -> None:
        self._closed = True
        connections = [*self._idle, *self._busy]
        self._idle.clear()
        # A task each, so that a cancellation of this one cannot leave some of them open.
        async with anyio.create_task_group() as tasks:
            for connection in connections:
                tasks.start_soon(connection.aclose)

    async def _connection(self) -> _Connection:
        while self._idle and not self._closed:
            # Last in, first out: the others get to rest, and the warm one is used.
            connection = self._idle.pop()
            if not connection.is_stale():
                self._busy.add(connection)
                return connection
            await connection.aclose()
        self._refuse_if_closed()
        try:
            stream = await anyio.connect_tcp(HOST, self._port)
        except OSError as exc:
            # anyio's own text ("All connection attempts failed") keeps the reason back.
            raise ConnectionLostError(
                f"no connection to the server on {HOST}:{self._port}: "
                f"{exc.__cause__ or exc}",
                unsent=True,
            ) from exc
        connection = _Connection(stream)
        if self._closed:  # in the meantime
            await connection.aclose()
            self._refuse_if_closed()
        self._busy.add(connection)
        return connection

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise ConnectionLostError("the transport is closed", unsent=True)


class _Connection:
    def __init__(self, stream: SocketStream) -> None:
        self._stream = stream
        self._poller = select.poll()
        self._poller.register(
            stream.extra(SocketAttribute.raw_socket).fileno(), select.POLLIN
        )

    def is_stale(self) -> bool:
        """True if there is something to read while nothing was asked: the end, mostly."""
        return bool(self._poller.poll(0))

    async def exchange(self, message: bytes) -> tuple[Response, bool]:
        """Send a request; return its answer, and whether the connection may go on."""
        answer = _Answer()
        try:
            await self._stream.send(message)
            while not answer.is_complete:
                answer.feed(await self._stream.receive(_RECEIVE_SIZE))
        except anyio.EndOfStream as exc:
            answer.end(exc)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as exc:
            raise ConnectionLostError("the connection to the server broke") from exc
        except httptools.HttpParserError as exc:
            raise ConnectionLostError(
                f"what answers on the server's port does not speak HTTP: {exc}"
            ) from exc
        return answer.response(), answer.is_reusable

    async def aclose(self) -> None:
        await anyio.aclose_forcefully(self._stream)


class _Answer:
    """Takes down what the parser hears of one answer."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._has_begun = False
        self._begin()
        self.is_complete = False
        self.is_reusable = False

    def _begin(self) -> None:
        self._content_type = ""
        self._body: list[bytes] = []
        self._has_length = False
        self._ends_with_connection = False

    def feed(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def end(self, exc: anyio.EndOfStream) -> None:
        """Take note of the connection's end, which some answers have for their end.

        :raises ConnectionLostError: if this one has not
        """
        if not self._ends_with_connection:
            raise ConnectionLostError(
                "the server closed the connection in the middle of an answer"
                if self._has_begun
                else "the server closed the connection without an answer"
            ) from exc

    def response(self) -> Response:
        return Response(
            self._parser.get_status_code(), self._content_type, b"".join(self._body)
        )

    def on_message_begin(self) -> None:
        self._has_begun = True

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-type":
            media_type = value.partition(b";")[0].strip().lower()
            self._content_type = media_type.decode("latin-1")
        elif name in (b"content-length", b"transfer-encoding"):
            self._has_length = True

    def on_headers_complete(self) -> None:
        self._ends_with_connection = not self._has_length

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() < 200:
            self._begin()  # an interim answer (100 Continue): the real one follows
        else:
            self.is_complete = True
            # Only in here does the parser know it.
            self.is_reusable = self._parser.should_keep_alive()


def _message(method: str, path: str, port: int, body: bytes | None) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: {HOST}:{port}\r\nAccept: application/json\r\n"
    if body is None:
        return f"{head}\r\n".encode("ascii")
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode("ascii") + body
