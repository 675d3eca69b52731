"""A server that gives one answer as it is told, and proper ones after that."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress

import anyio
import anyio.lowlevel

__all__ = ["OneAnswer"]


class OneAnswer:
    """:param stays_open: whether its first connection can be used again afterwards"""

    def __init__(self, pieces: Sequence[bytes], *, stays_open: bool) -> None:
        self._pieces = pieces
        self._stays_open = stays_open
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._connections: list[socket.socket] = []
        self._sent = anyio.Event()

    async def serve(self) -> None:
        """Until it is cancelled."""
        async with anyio.create_task_group() as tasks:
            while True:
                await anyio.wait_readable(self._listener)
                connected, _ = self._listener.accept()
                connected.setblocking(False)
                connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._connections.append(connected)
                is_first = len(self._connections) == 1
                tasks.start_soon(self._converse, connected, is_first)

    async def wait_sent(self) -> None:
        """Wait until all of the one answer is under way."""
        await self._sent.wait()

    def close(self) -> None:
        self._listener.close()
        for connected in self._connections:
            connected.close()

    async def _converse(self, connected: socket.socket, is_first: bool) -> None:
        with suppress(OSError):
            if is_first:
                await self._answer_as_told(connected)
                if not self._stays_open:
                    connected.close()
                    return
            while path := await _request(connected):
                head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(path)
                await _send(connected, head + path)

    async def _answer_as_told(self, connected: socket.socket) -> None:
        try:
            await _request(connected)
            for piece in self._pieces:
                await _send(connected, piece)
                # So that it is mostly seen by itself.
                await anyio.lowlevel.checkpoint()
                await anyio.lowlevel.checkpoint()
        finally:
            self._sent.set()


async def _request(connected: socket.socket) -> bytes:
    """The path of a whole request; ``b""`` if none comes any more."""
    received = b""
    while not (b"\r\n\r\n" in received and received.endswith((b"\r\n\r\n", b"}"))):
        await anyio.wait_readable(connected)
        data = connected.recv(65536)
        if not data:
            return b""
        received += data
    return received.split()[1]


async def _send(connected: socket.socket, data: bytes) -> None:
    while data:
        try:
            data = data[connected.send(data) :]
        except BlockingIOError:
            await anyio.wait_writable(connected)
