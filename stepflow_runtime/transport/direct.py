"""HTTP/1.1 without TLS, straight to a server, over plain sockets.

The hot path of calls to an embedded server. Contract: a connection carries one request at
a time and goes back to the pool only after a whole answer that allows it; after anything
else, a stream or a cancellation included, it is closed. Nothing of the environment is read, proxies
least of all. A kept connection that the server has closed in the meantime is found out
before it is used. Should that miss, a request is sent a second time only if not a byte of
an answer came and sending it twice does no harm: it was not sent at all, or is a GET.

The connections belong to no event loop: tasks of several loops, in several threads, share
a pool, and it may outlive a loop that made some of them. That is also how the answer to a
request whose caller was cancelled can be waited for by somebody else.
"""

from __future__ import annotations

import errno
import math
import os
import socket
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Final, Self

import anyio
import anyio.lowlevel

from ..crew import Crew, Kind
from ..errors import ConnectionLostError
from ..forks import forget_in_child
from ..loops import Slot, Slots, current_loop, has_ended
from . import NO_HEADERS, Heir, Response
from .http1 import AnswerReader, RequestWriter, authority
from .hub import Hub, can_have_hub

__all__ = ["LOOPBACK", "DirectTransport"]

LOOPBACK: Final = "127.0.0.1"

# Each waiting run holds a connection, and each connection a descriptor; a process often
# has 1,024 of them. Requests beyond this wait for a free connection.
MAX_CONNECTIONS: Final = 256

# How long somebody else waits for the answer that a cancelled caller left behind.
_INHERITED_PATIENCE: Final = 60.0

# What is read at once: an answer mostly, or a good part of a long one.
_RECEIVE_SIZE: Final = 64 * 1024
_RECEIVE_MUCH: Final = 1024 * 1024

_EVENT_STREAM: Final = {"accept": "text/event-stream", "cache-control": "no-store"}


class DirectTransport:
    """A pool of connections to one port.

    :param host: a name, or an IP address
    :param headers: sent with every request
    :param crew: does what cancelled callers leave behind; None: nobody does
    :param generation: what answers are to be marked with
    :param connect_timeout: seconds for making a connection
    """

    def __init__(
        self,
        port: int,
        host: str = LOOPBACK,
        *,
        headers: Mapping[str, str] = NO_HEADERS,
        crew: Crew | None = None,
        max_connections: int = MAX_CONNECTIONS,
        generation: int | None = None,
        connect_timeout: float = math.inf,
    ) -> None:
        self._host = host
        self._port = port
        self._write = RequestWriter(host, port, headers).request
        self._crew = crew
        self._max_connections = max_connections
        self._generation = generation
        self._connect_timeout = connect_timeout
        self._slots = Slots(max_connections, on_reclaim=_close_connection)
        self._idle: deque[_Connection] = deque()
        self._hubs: dict[Any, Hub | None] = {}
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
        message = self._write(method, path, body, headers)
        while True:
            exchange = await self._begin(message)
            try:
                answer = await exchange.whole_answer()
                return Response(
                    answer.status,
                    answer.content_type,
                    answer.take_body(),
                    self._generation,
                )
            except ConnectionLostError as exc:
                if not (exchange.was_in_vain and (exc.unsent or method == "GET")):
                    raise
                # The next connection is a younger one, or new.
            except GeneratorExit:  # the loop was closed around it: there is none to ask
                raise
            except anyio.get_cancelled_exc_class():
                if heir is not None and exchange.is_sent:
                    self._leave_to(heir, exchange)
                raise
            finally:
                if not exchange.is_inherited:
                    exchange.close()

    async def stream(self, path: str) -> _Exchange:
        message = self._write("GET", path, None, _EVENT_STREAM)
        while True:
            exchange = await self._begin(message)
            exchange.is_stream = True
            try:
                await exchange.read_head()
                return exchange
            except BaseException as exc:
                exchange.close()
                if not (isinstance(exc, ConnectionLostError) and exchange.was_in_vain):
                    raise

    async def _begin(self, message: list[bytes]) -> _Exchange:
        """Take a connection; the exchange is to be closed."""
        await anyio.lowlevel.checkpoint_if_cancelled()
        slots = self._slots
        slot = slots.take() or await slots.acquire()
        try:
            connection = self._take_idle()
            if connection is None:
                connection = _Connection(await self._connected())
            slot.holds = connection
            if self._closed:
                connection.close()
                raise ConnectionLostError("the transport is closed", unsent=True)
        except BaseException:
            slot.release()
            raise
        return _Exchange(self, slot, connection, message)

    async def _connected(self) -> socket.socket:
        seconds = self._connect_timeout
        with anyio.move_on_after(seconds):
            return await _connected(self._host, self._port)
        raise ConnectionLostError(
            f"no connection to the server on {authority(self._host, self._port)} within "
            f"{seconds:g} s",
            unsent=True,
        )

    def _leave_to(self, heir: Heir, exchange: _Exchange) -> None:
        """Have somebody else wait for the answer, and deal with it."""
        if self._crew is not None:
            job = self._crew.send(partial(self._inherit, exchange, heir), Kind.ERRAND)
            if job is not None:
                exchange.is_inherited = True
                job.when_ended(exchange.close)

    async def _inherit(self, exchange: _Exchange, heir: Heir) -> None:
        exchange.slot.loop = current_loop()
        response = None
        with (
            exchange,
            suppress(ConnectionLostError),
            anyio.move_on_after(_INHERITED_PATIENCE),
        ):
            answer = await exchange.whole_answer()
            response = Response(
                answer.status,
                answer.content_type,
                answer.take_body(),
                self._generation,
            )
        await heir(response)

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
        self._close_hubs(list(self._hubs))

    def forget(self) -> None:
        """In a forked child: the connections are the parent's; it makes its own."""
        for connection in (
            *self._idle,
            *(slot.holds for slot in self._slots.taken if slot.holds is not None),
        ):
            connection.hub = None  # an epoll that is shared with the parent
            connection.close()
        self._idle.clear()
        self._hubs.clear()
        self._slots = Slots(self._max_connections, on_reclaim=_close_connection)

    def take_back(self, connection: _Connection, *, reusable: bool) -> None:
        if reusable:
            connection.is_used = True
            self._idle.append(connection)
        else:
            connection.close()
        if self._closed:  # in the meantime
            self._close_idle()

    def hub_of(self, loop: Any) -> Hub | None:
        """Where the tasks of an event loop wait; None: each for itself."""
        try:
            return self._hubs[loop]
        except KeyError:
            pass
        self._close_hubs([each for each in list(self._hubs) if has_ended(each)])
        hub = Hub(loop) if can_have_hub(loop) else None
        self._hubs[loop] = hub
        if self._closed:  # in the meantime
            self._close_hubs([loop])
        return hub

    def _close_hubs(self, loops: list[Any]) -> None:
        for loop in loops:
            if (hub := self._hubs.pop(loop, None)) is not None:
                hub.close()

    def _take_idle(self) -> _Connection | None:
        while True:
            try:
                # Last in, first out: the others get to rest, and the warm one is used.
                connection = self._idle.pop()
            except IndexError:
                return None
            if not connection.is_stale():
                connection.answer.begin()
                return connection
            connection.close()

    def _close_idle(self) -> None:
        while self._idle:
            with suppress(IndexError):
                self._idle.pop().close()


def _close_connection(slot: Slot) -> None:
    if slot.holds is not None:
        slot.holds.close()


class _Exchange:
    """A request and its answer, on a connection of its own meanwhile."""

    __slots__ = (
        "_answer",
        "_connection",
        "_is_closing",
        "_is_reading",
        "_is_second_hand",
        "_is_untouched",
        "_transport",
        "_unsent",
        "is_inherited",
        "is_stream",
        "slot",
        "was_in_vain",
    )

    def __init__(
        self,
        transport: DirectTransport,
        slot: Slot,
        connection: _Connection,
        message: list[bytes],
    ) -> None:
        self.slot = slot
        self.is_inherited = False
        # Then who reads it and who closes it are two: neither knows when the other is done.
        self.is_stream = False
        # Whether a connection that was used before brought nothing any more.
        self.was_in_vain = False
        self._is_second_hand = connection.is_used
        self._is_untouched = True
        self._is_reading = False
        self._is_closing = False
        self._transport = transport
        self._connection: _Connection | None = connection
        # A copy: it may have to be sent again.
        self._unsent: list[bytes | memoryview] = [*message]
        self._answer = connection.answer

    @property
    def is_sent(self) -> bool:
        return not self._unsent

    @property
    def status(self) -> int:
        return self._answer.status

    @property
    def content_type(self) -> str:
        return self._answer.content_type

    async def whole_answer(self) -> AnswerReader:
        """Send what is left to be sent, and wait for the end of the answer.

        To be called again, in whichever event loop, if it was cancelled.
        """
        answer, connection = self._answer, self._connection
        assert connection is not None
        if self._unsent:
            await self._send(connection)
        try:
            if not answer.is_complete:
                hub = self._transport.hub_of(self.slot.loop)
                if hub is not None:
                    await hub.wait(connection)
                    if (trouble := connection.trouble) is not None:
                        raise trouble
                else:
                    while not answer.is_complete:
                        await anyio.wait_readable(connection.socket)
                        connection.receive()
        except (ConnectionLostError, OSError, ValueError) as exc:
            raise self._lost(exc) from exc
        return answer

    async def read_head(self) -> None:
        while not self._answer.has_head:
            await self._go_on()

    async def receive(self) -> bytes:
        """The next bytes of the body; ``b""`` at its end."""
        while not (body := self._answer.take_body()) and not self._answer.is_complete:
            await self._go_on()
        return body

    def close(self) -> None:
        """Give the connection back, or close it; from any thread. Again: does nothing."""
        if self._is_reading:
            # Who waits for more would not notice that the descriptor is gone.
            if (connection := self._connection) is not None:
                self._is_closing = True
                connection.hang_up()
            return
        connection, self._connection = self._connection, None
        if connection is not None:
            reusable = self._answer.is_reusable and not self._unsent
            self._transport.take_back(
                connection, reusable=reusable and not self.is_stream
            )
            self.slot.release()

    def _close_if_asked(self) -> None:
        if self._is_closing:
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    async def _go_on(self) -> None:
        """Send what is left to be sent, and take in what comes then."""
        connection = self._connection
        if connection is None or self._is_closing:
            raise ConnectionLostError("the answer was closed before its end")
        self._is_reading = True
        try:
            await self._take_more(connection)
        finally:
            self._is_reading = False
            self._close_if_asked()

    async def _take_more(self, connection: _Connection) -> None:
        if self._unsent:
            await self._send(connection)
        try:
            connection.acknowledge_at_once()
            await anyio.wait_readable(connection.socket)
            connection.receive()
        except (ConnectionLostError, OSError, ValueError) as exc:
            raise self._lost(exc) from exc

    async def _send(self, connection: _Connection) -> None:
        """Send the request, or as much of it as the server wants to have."""
        unsent = self._unsent
        try:
            while unsent:
                if rest := connection.send(unsent[0]):
                    self._is_untouched = False
                    unsent[0] = rest
                    await _wait_for_room(connection)
                    connection.receive()
                    if self._answer.is_complete:
                        return  # the server does not want the rest
                else:
                    self._is_untouched = False
                    del unsent[0]
        except ConnectionLostError:
            raise
        except (OSError, ValueError) as exc:
            if self._is_untouched:
                raise self._lost(exc, unsent=True) from exc
            # Its reason, such as that the request is too long, may be there to be read.

    def _lost(self, exc: Exception, *, unsent: bool = False) -> ConnectionLostError:
        self.was_in_vain = self._is_second_hand and not self._answer.has_begun
        if isinstance(exc, ConnectionLostError):
            return exc
        return ConnectionLostError(
            f"the connection to the server broke: {exc}", unsent=unsent
        )


async def _wait_for_room(connection: _Connection) -> None:
    """Wait until more can be sent, or something comes that was not to come yet."""

    async def wait_and_end(wait: Callable[[socket.socket], Awaitable[None]]) -> None:
        # Whoever uses it next will see what is wrong with it.
        with suppress(OSError, ValueError):
            await wait(connection.socket)
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait_and_end, anyio.wait_readable)
        await wait_and_end(anyio.wait_writable)


class _Connection:
    """A socket, and what has come by it.

    :ivar answer: to the request that is under way
    :ivar trouble: why there will be no more of it
    """

    __slots__ = ("answer", "hub", "is_used", "socket", "trouble", "waiter")

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.answer = AnswerReader()
        self.is_used = False
        self.trouble: Exception | None = None
        self.hub: Hub | None = None
        self.waiter: Any = None

    def fileno(self) -> int:
        return self.socket.fileno()

    def is_stale(self) -> bool:
        """True if there is something to read while nothing was asked: the end, mostly."""
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def send(self, data: bytes | memoryview) -> memoryview | None:
        """Send what there is room for; return the rest, if there is any."""
        try:
            sent = self.socket.send(data)
        except BlockingIOError:
            sent = 0
        return None if sent == len(data) else memoryview(data)[sent:]

    def receive(self) -> None:
        """Take in what is there, if there is anything.

        :raises OSError: if the connection broke
        :raises ConnectionLostError: if it is no answer, or has ended in the middle of one
        """
        answer = self.answer
        try:
            data = self.socket.recv(
                _RECEIVE_SIZE if answer.missing < _RECEIVE_SIZE else _RECEIVE_MUCH
            )
        except BlockingIOError:
            return
        if data:
            answer.feed(data)
        else:
            answer.end()

    def take_in(self) -> bool:
        """For the hub: read, and tell whether that was all that will come."""
        try:
            self.receive()
        except Exception as exc:  # noqa: BLE001 - raised where it is waited for
            self.trouble = exc
            return True
        return self.answer.is_complete

    def acknowledge_at_once(self) -> None:
        """Do not wait some 40 ms for something to send, as the server does for this."""
        if sys.platform == "linux":
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def hang_up(self) -> None:
        """End it on both sides, without closing the descriptor that others wait for."""
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # not connected (yet, or any more), or closed by its owner

    def close(self) -> None:
        if (hub := self.hub) is not None:
            hub.forget(self)
        self.socket.close()


async def _connected(host: str, port: int) -> socket.socket:
    """A socket that is connected to the server.

    :raises ConnectionLostError: if there is no way
    """
    try:
        for family, address in await _resolve(host, port):
            try:
                return await _connect(family, address)
            except OSError as exc:
                refusal = exc
        raise refusal
    except OSError as exc:
        raise ConnectionLostError(
            f"no connection to the server on {authority(host, port)}: {exc}",
            unsent=True,
        ) from exc


async def _resolve(host: str, port: int) -> list[tuple[int, Any]]:
    """Where to connect to: the socket's family and address, the best first."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError):
            socket.inet_pton(family, host)
            return [(family, (host, port))]
    found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(family, address) for family, _, _, _, address in found]


async def _connect(family: int, address: Any) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        number = sock.connect_ex(address)
        if number in (errno.EINPROGRESS, errno.EWOULDBLOCK):
            await anyio.wait_writable(sock)
            number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            raise OSError(number, os.strerror(number))
        if sock.getsockname() == sock.getpeername():
            # TCP lets a socket find itself where nobody listens; it would keep the port
            # from the server that is about to come back there.
            raise ConnectionRefusedError(
                errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED)
            )
    except BaseException:
        sock.close()
        raise
    return sock
