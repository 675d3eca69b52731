"""HTTP/1.1 to a server on this machine: plain sockets, parsed by httptools.

Contract: a connection carries one request at a time and goes back to the pool only
after a whole answer that allows it; after anything else, cancellation included, it is
closed. Nothing of the environment is read, proxies least of all. A kept connection that
the server has closed in the meantime is found out before it is used, so that a request
is never sent twice on a guess.

The connections belong to no event loop: tasks of several loops, in several threads, share
a pool, and it may outlive a loop that made some of them.
"""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from contextlib import suppress
from typing import Final

import anyio
import anyio.lowlevel
import httptools

from ..errors import ConnectionLostError
from ..forks import forget_in_child
from ..loops import Slot, Slots, has_ended
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
        self._slots = Slots(max_connections, on_reclaim=_close_connection)
        self._idle: deque[_Connection] = deque()
        self._closed = False
        forget_in_child(self)

    async def request(
        self, method: str, path: str, body: bytes | None = None
    ) -> Response:
        message = _message(method, path, self._port, body)
        await anyio.lowlevel.checkpoint_if_cancelled()
        slot = await self._slots.acquire()
        try:
            connection = slot.holds = self._take_idle() or _Connection()
            return await self._request(connection, message)
        finally:
            slot.release()

    async def _request(self, connection: _Connection, message: bytes) -> Response:
        reusable = False
        try:
            await connection.connect(self._port)
            self._refuse_if_closed()
            response, reusable = await connection.exchange(message)
        finally:
            if reusable:
                self._idle.append(connection)
            else:
                connection.close()
            if self._closed:  # in the meantime
                self._close_idle()
        return response

    async def aclose(self) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection; from any thread."""
        self._closed = True
        self._close_idle()
        for slot in self._slots.taken:
            if slot.holds is None:
                continue
            if has_ended(slot.loop):
                _close_connection(slot)
            else:
                # Who waits for it, wherever that is, wakes up, and closes it.
                slot.holds.hang_up()

    def forget(self) -> None:
        self._closed = True
        self._close_idle()
        for slot in self._slots.taken:
            _close_connection(slot)

    def _take_idle(self) -> _Connection | None:
        while True:
            try:
                # Last in, first out: the others get to rest, and the warm one is used.
                connection = self._idle.pop()
            except IndexError:
                return None
            if not connection.is_stale():
                return connection
            connection.close()

    def _close_idle(self) -> None:
        while self._idle:
            with suppress(IndexError):
                self._idle.pop().close()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise ConnectionLostError("the transport is closed", unsent=True)


def _close_connection(slot: Slot) -> None:
    if slot.holds is not None:
        slot.holds.close()


class _Connection:
    def __init__(self) -> None:
        self._socket: socket.socket | None = None

    async def connect(self, port: int) -> None:
        """Connect, unless it is connected."""
        if self._socket is not None:
            return
        try:
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            await _connect(self._socket, (HOST, port))
        except OSError as exc:
            raise ConnectionLostError(
                f"no connection to the server on {HOST}:{port}: {exc}", unsent=True
            ) from exc

    def is_stale(self) -> bool:
        """True if there is something to read while nothing was asked: the end, mostly."""
        assert self._socket is not None
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    async def exchange(self, message: bytes) -> tuple[Response, bool]:
        """Send a request; return its answer, and whether the connection may go on."""
        assert self._socket is not None
        answer = _Answer()
        try:
            await _send(self._socket, message)
            while not answer.is_complete:
                if data := await _receive(self._socket):
                    answer.feed(data)
                else:
                    answer.end()
                    break
        except OSError as exc:
            raise ConnectionLostError(
                f"the connection to the server broke: {exc}"
            ) from exc
        except httptools.HttpParserError as exc:
            raise ConnectionLostError(
                f"what answers on the server's port does not speak HTTP: {exc}"
            ) from exc
        return answer.response(), answer.is_reusable

    def hang_up(self) -> None:
        """End it on both sides, without closing the descriptor that others wait for."""
        if self._socket is not None:
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # not connected (yet, or any more), or closed by its owner

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()


async def _connect(sock: socket.socket, address: tuple[str, int]) -> None:
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    number = sock.connect_ex(address)
    if number in (errno.EINPROGRESS, errno.EWOULDBLOCK):
        await anyio.wait_writable(sock)
        number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if number:
        raise OSError(number, os.strerror(number))
    if sock.getsockname() == sock.getpeername():
        # TCP lets a socket find itself where nobody listens; it would keep the port from
        # the server that is about to come back there.
        raise ConnectionRefusedError(
            errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED)
        )


async def _send(sock: socket.socket, message: bytes) -> None:
    rest = memoryview(message)
    while rest:
        try:
            rest = rest[sock.send(rest) :]
        except BlockingIOError:
            await anyio.wait_writable(sock)


async def _receive(sock: socket.socket) -> bytes:
    while True:
        # Always wait first: the checkpoint is what gives other tasks their turn.
        await anyio.wait_readable(sock)
        try:
            return sock.recv(_RECEIVE_SIZE)
        except BlockingIOError:
            continue


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

    def end(self) -> None:
        """Take note of the connection's end, which some answers have for their end.

        :raises ConnectionLostError: if this one has not
        """
        if not self._ends_with_connection:
            raise ConnectionLostError(
                "the server closed the connection in the middle of an answer"
                if self._has_begun
                else "the server closed the connection without an answer"
            )

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
