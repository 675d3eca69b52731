"""HTTP/1.1 without TLS, straight to a server: plain sockets, parsed by httptools.

The hot path of calls to an embedded server. Contract: a connection carries one request at
a time and goes back to the pool only after a whole answer that allows it; after anything
else, cancellation included, it is closed. Nothing of the environment is read, proxies
least of all. A kept connection that the server has closed in the meantime is found out
before it is used, so that a request is never sent twice on a guess.

The connections belong to no event loop: tasks of several loops, in several threads, share
a pool, and it may outlive a loop that made some of them. That is also how the answer to a
request whose caller was cancelled can be waited for by somebody else.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import sys
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Final, Self

import anyio
import anyio.lowlevel
import httptools

from ..crew import Crew, Kind
from ..errors import ConnectionLostError
from ..forks import forget_in_child
from ..loops import Slot, Slots, current_loop, has_ended
from . import NO_HEADERS, Heir, Response

__all__ = ["LOOPBACK", "DirectTransport"]

LOOPBACK: Final = "127.0.0.1"

# Each waiting run holds a connection, and each connection a descriptor; a process often
# has 1,024 of them. Requests beyond this wait for a free connection.
MAX_CONNECTIONS: Final = 256

# How long somebody else waits for the answer that a cancelled caller left behind.
_INHERITED_PATIENCE: Final = 60.0

_RECEIVE_SIZE: Final = 65536

_DEFAULTS: Final = {"accept": "application/json", "content-type": "application/json"}


class DirectTransport:
    """A pool of connections to one port.

    :param host: a name, or an IP address
    :param headers: sent with every request
    :param crew: does what cancelled callers leave behind; None: nobody does
    """

    def __init__(
        self,
        port: int,
        host: str = LOOPBACK,
        *,
        headers: Mapping[str, str] = NO_HEADERS,
        crew: Crew | None = None,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        self._host = host
        self._port = port
        self._head = _Head(host, port, headers)
        self._crew = crew
        self._max_connections = max_connections
        self._slots = Slots(max_connections, on_reclaim=_close_connection)
        self._idle: deque[_Connection] = deque()
        self._closed = False
        forget_in_child(self)

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
        message = self._head.message(method, path, body, headers)
        exchange = await self._begin(message)
        try:
            return await exchange.response()
        except anyio.get_cancelled_exc_class():
            if heir is not None and exchange.is_sent:
                self._leave_to(heir, exchange)
            raise
        finally:
            if not exchange.is_inherited:
                exchange.close()

    async def stream(self, path: str) -> _Exchange:
        message = self._head.message(
            "GET",
            path,
            None,
            {"accept": "text/event-stream", "cache-control": "no-store"},
        )
        exchange = await self._begin(message)
        exchange.is_stream = True
        try:
            await exchange.read_head()
        except BaseException:
            exchange.close()
            raise
        return exchange

    async def _begin(self, message: bytes) -> _Exchange:
        """Take a connection and send a request; the exchange is to be closed."""
        await anyio.lowlevel.checkpoint_if_cancelled()
        slot = await self._slots.acquire()
        connection = slot.holds = self._take_idle() or _Connection()
        exchange = _Exchange(self, slot, connection, message)
        try:
            await connection.connect(self._host, self._port)
            self._refuse_if_closed()
        except BaseException:
            exchange.close()
            raise
        return exchange

    def _leave_to(self, heir: Heir, exchange: _Exchange) -> None:
        """Have somebody else wait for the answer, and deal with it."""
        if self._crew is not None:
            job = self._crew.send(partial(_inherit, exchange, heir), Kind.ERRAND)
            if job is not None:
                exchange.is_inherited = True
                job.when_ended(exchange.close)

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
        """In a forked child: the connections are the parent's; it makes its own."""
        self._close_idle()
        for slot in self._slots.taken:
            _close_connection(slot)
        self._slots = Slots(self._max_connections, on_reclaim=_close_connection)

    def take_back(self, connection: _Connection, *, reusable: bool) -> None:
        if reusable:
            self._idle.append(connection)
        else:
            connection.close()
        if self._closed:  # in the meantime
            self._close_idle()

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


async def _inherit(exchange: _Exchange, heir: Heir) -> None:
    exchange.slot.loop = current_loop()
    with exchange, anyio.move_on_after(_INHERITED_PATIENCE) as patience:
        response = await exchange.response()
    if not patience.cancelled_caught:
        await heir(response)


class _Exchange:
    """A request and its answer, on a connection of its own meanwhile."""

    def __init__(
        self,
        transport: DirectTransport,
        slot: Slot,
        connection: _Connection,
        message: bytes,
    ) -> None:
        self.slot = slot
        self.is_inherited = False
        self.is_stream = False
        self._transport = transport
        self._connection: _Connection | None = connection
        self._unsent = memoryview(message)
        self._answer = _Answer()

    @property
    def is_sent(self) -> bool:
        return not self._unsent

    @property
    def status(self) -> int:
        return self._answer.status

    @property
    def content_type(self) -> str:
        return self._answer.content_type

    async def response(self) -> Response:
        """Wait for the whole answer. To be called again if it was cancelled."""
        answer = self._answer
        while not answer.is_complete:
            await self._go_on()
        return Response(answer.status, answer.content_type, answer.take_body())

    async def read_head(self) -> None:
        while not self._answer.has_head:
            await self._go_on()

    async def receive(self) -> bytes:
        """The next bytes of the body; ``b""`` at its end."""
        while not (body := self._answer.take_body()) and not self._answer.is_complete:
            await self._go_on()
        return body

    def close(self) -> None:
        """Give the connection back, or close it. A second time does nothing."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._transport.take_back(connection, reusable=self._answer.is_reusable)
            self.slot.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    async def _go_on(self) -> None:
        """Send what is left to be sent, and take in what comes then."""
        connection = self._connection
        if connection is None:
            raise ConnectionLostError("the answer was closed before its end")
        try:
            while self._unsent:
                self._unsent = await connection.send(self._unsent)
            if self.is_stream:
                connection.acknowledge_at_once()
            if data := await connection.receive():
                self._answer.feed(data)
            else:
                self._answer.end()
        except OSError as exc:
            raise ConnectionLostError(
                f"the connection to the server broke: {exc}"
            ) from exc
        except httptools.HttpParserError as exc:
            raise ConnectionLostError(
                f"what answers on the server's port does not speak HTTP: {exc}"
            ) from exc


class _Connection:
    def __init__(self) -> None:
        self._socket: socket.socket | None = None

    async def connect(self, host: str, port: int) -> None:
        """Connect, unless it is connected."""
        if self._socket is not None:
            return
        try:
            for family, address in await _resolve(host, port):
                self._socket = socket.socket(family, socket.SOCK_STREAM)
                try:
                    await _connect(self._socket, address)
                    return
                except OSError as exc:
                    self._socket.close()
                    refusal = exc
            raise refusal
        except OSError as exc:
            raise ConnectionLostError(
                f"no connection to the server on {_authority(host, port)}: {exc}",
                unsent=True,
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

    async def send(self, data: memoryview) -> memoryview:
        """Send some of it; return the rest."""
        assert self._socket is not None
        while True:
            try:
                return data[self._socket.send(data) :]
            except BlockingIOError:
                await anyio.wait_writable(self._socket)

    def acknowledge_at_once(self) -> None:
        """Do not wait some 40 ms for something to send, as the server does for this."""
        if self._socket is not None and sys.platform == "linux":
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    async def receive(self) -> bytes:
        assert self._socket is not None
        while True:
            # Always wait first: the checkpoint is what gives other tasks their turn.
            await anyio.wait_readable(self._socket)
            try:
                return self._socket.recv(_RECEIVE_SIZE)
            except BlockingIOError:
                continue

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


async def _resolve(host: str, port: int) -> list[tuple[int, Any]]:
    """Where to connect to: the socket's family and address, the best first."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return [(family, address) for family, _, _, _, address in found]
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    return [(family, (host, port))]


async def _connect(sock: socket.socket, address: Any) -> None:
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


class _Answer:
    """Takes down what the parser hears of one answer."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._has_begun = False
        self._begin()
        self.is_complete = False
        self.is_reusable = False

    def _begin(self) -> None:
        self.status = 0
        self.content_type = ""
        self.has_head = False
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
        self.is_complete = True

    def take_body(self) -> bytes:
        """What has come of the body since it was last taken."""
        body, self._body = b"".join(self._body), []
        return body

    def on_message_begin(self) -> None:
        self._has_begun = True

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-type":
            media_type = value.partition(b";")[0].strip().lower()
            self.content_type = media_type.decode("latin-1")
        elif name in (b"content-length", b"transfer-encoding"):
            self._has_length = True

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self._ends_with_connection = not self._has_length
        self.has_head = self.status >= 200

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        if self.status < 200:
            self._begin()  # an interim answer (100 Continue): the real one follows
        else:
            self.is_complete = True
            # Only in here does the parser know it.
            self.is_reusable = self._parser.should_keep_alive()


class _Head:
    """Makes the bytes of a request."""

    def __init__(self, host: str, port: int, headers: Mapping[str, str]) -> None:
        self._host = _authority(host, port)
        self._defaults = {
            **_DEFAULTS,
            **{name.lower(): value for name, value in headers.items()},
        }
        self._plain = self._lines(self._defaults)

    def message(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> bytes:
        lines = self._lines({**self._defaults, **headers}) if headers else self._plain
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\n{lines}"
        if body is None:
            return f"{head}\r\n".encode("latin-1")
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode("latin-1") + body

    def _lines(self, headers: Mapping[str, str]) -> str:
        return "".join(f"{name}: {value}\r\n" for name, value in headers.items())


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
