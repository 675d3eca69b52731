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
        for connection in connections:
            await connection.aclose()

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
            raise ConnectionLostError(
                f"no connection to the server on {HOST}:{self._port}: {exc}",
                unsent=True,
            ) from exc
        connection = _Connection(stream)
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
        parser = httptools.HttpResponseParser(answer)
        try:
            await self._stream.send(message)
            while not answer.is_complete:
                parser.feed_data(await self._stream.receive(_RECEIVE_SIZE))
        except anyio.EndOfStream as exc:
            raise ConnectionLostError(
                "the server closed the connection in the middle of an answer"
                if answer.has_begun
                else "the server closed the connection without an answer"
            ) from exc
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as exc:
            raise ConnectionLostError("the connection to the server broke") from exc
        except httptools.HttpParserError as exc:
            raise ConnectionLostError(
                f"what answers on the server's port does not speak HTTP: {exc}"
            ) from exc
        return (
            Response(
                parser.get_status_code(), answer.content_type, b"".join(answer.body)
            ),
            parser.should_keep_alive(),
        )

    async def aclose(self) -> None:
        await anyio.aclose_forcefully(self._stream)


class _Answer:
    """Takes down what the parser hears."""

    def __init__(self) -> None:
        self.content_type = ""
        self.body: list[bytes] = []
        self.has_begun = False
        self.is_complete = False

    def on_message_begin(self) -> None:
        self.has_begun = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            media_type = value.partition(b";")[0].strip().lower()
            self.content_type = media_type.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        self.is_complete = True


def _message(method: str, path: str, port: int, body: bytes | None) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: {HOST}:{port}\r\nAccept: application/json\r\n"
    if body is None:
        return f"{head}\r\n".encode("ascii")
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode("ascii") + body
