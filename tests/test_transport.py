"""The loopback transport, against a server that misbehaves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio
import pytest
from anyio.abc import SocketAttribute, SocketStream

from stepflow_runtime import ConnectionLostError
from stepflow_runtime.transport.direct import DirectTransport

from .conftest import each_backend

pytestmark = [pytest.mark.anyio, each_backend]

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


async def read_request(stream: SocketStream) -> bytes:
    received = b""
    while b"\r\n\r\n" not in received:
        received += await stream.receive()
    return received


@asynccontextmanager
async def serving(
    handle: Callable[[SocketStream], Awaitable[None]],
) -> AsyncIterator[DirectTransport]:
    """A transport to a server that does ``handle`` with each connection."""

    async def guarded(stream: SocketStream) -> None:
        async with stream:
            try:
                await handle(stream)
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                pass

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, guarded)
        transport = DirectTransport(listener.extra(SocketAttribute.local_port))
        try:
            yield transport
        finally:
            await transport.aclose()
            tasks.cancel_scope.cancel()


def answering(*answers: bytes) -> Callable[[SocketStream], Awaitable[None]]:
    """Give each request on a connection the next of ``answers``, then close."""

    async def handle(stream: SocketStream) -> None:
        for answer in answers:
            await read_request(stream)
            await stream.send(answer)

    return handle


async def test_a_request_is_what_it_should_be() -> None:
    requests = []

    async def handle(stream: SocketStream) -> None:
        requests.append(await read_request(stream))
        await stream.send(OK)

    async with serving(handle) as transport:
        response = await transport.request("POST", "/x?y=1", b'{"a":1}')
    assert response[:3] == (200, "application/json", b"{}")
    head, _, body = requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /x?y=1 HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"\r\nContent-Length: 7" in head
    assert body == b'{"a":1}'


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (OK, b"{}"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, b"{}"),
        (
            (
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
                b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n"
            ),
            b"abcde",
        ),
        (b"HTTP/1.1 200 OK\r\n\r\nto the end", b"to the end"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b""),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nto the end", b"to the end"),
    ],
)
@pytest.mark.parametrize("cut", [False, True])
async def test_answers_of_every_form(answer: bytes, body: bytes, cut: bool) -> None:
    async def handle(stream: SocketStream) -> None:
        await read_request(stream)
        for part in (
            [answer[i : i + 1] for i in range(len(answer))] if cut else [answer]
        ):
            await stream.send(part)

    async with serving(handle) as transport:
        assert (await transport.request("GET", "/")).body == body


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "without an answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc", "middle of an answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "middle of an answer"),
        (b"SSH-2.0-OpenSSH\r\n", "does not speak HTTP"),
        (b"\x00" * 100, "does not speak HTTP"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
            "does not speak HTTP",
        ),
    ],
)
async def test_what_is_not_a_whole_answer_is_a_lost_connection(
    answer: bytes, words: str
) -> None:
    async with serving(answering(answer)) as transport:
        with pytest.raises(ConnectionLostError, match=words) as caught:
            await transport.request("GET", "/")
    assert not caught.value.unsent


async def test_where_nobody_listens_nothing_was_sent(free_tcp_port: int) -> None:
    transport = DirectTransport(free_tcp_port)
    with pytest.raises(ConnectionLostError, match=f"{free_tcp_port}") as caught:
        await transport.request("GET", "/")
    assert caught.value.unsent


async def test_a_connection_is_used_again_and_a_new_one_made_when_it_was_closed() -> (
    None
):
    connections = 0

    async def handle(stream: SocketStream) -> None:
        nonlocal connections
        connections += 1
        await answering(OK, OK)(stream)
        closed.set()

    async with serving(handle) as transport:
        closed = anyio.Event()
        for expected in (1, 1):
            await transport.request("GET", "/")
            assert connections == expected
        await closed.wait()
        await anyio.sleep(0.05)  # for the FIN to arrive
        await transport.request("POST", "/", b"{}")
        assert connections == 2


async def test_a_cancelled_request_takes_its_connection_along() -> None:
    connections = 0

    async def handle(stream: SocketStream) -> None:
        nonlocal connections
        connections += 1
        if connections == 1:
            await read_request(stream)
            with pytest.raises(anyio.EndOfStream):
                await stream.receive()
            ended.set()
        else:
            await answering(OK)(stream)

    ended = anyio.Event()
    async with serving(handle) as transport:
        with anyio.move_on_after(0.05):
            await transport.request("GET", "/")
        assert (await transport.request("GET", "/")).body == b"{}"
        with anyio.fail_after(5):
            await ended.wait()


async def test_closing_ends_requests_under_way() -> None:
    async def handle(stream: SocketStream) -> None:
        await read_request(stream)
        arrived.set()
        await anyio.sleep_forever()

    arrived = anyio.Event()
    async with serving(handle) as transport, anyio.create_task_group() as tasks:

        async def request() -> None:
            with pytest.raises(ConnectionLostError):
                await transport.request("GET", "/")

        tasks.start_soon(request)
        await arrived.wait()
        await transport.aclose()
        with pytest.raises(ConnectionLostError, match="closed"):
            await transport.request("GET", "/")


async def test_no_more_connections_than_allowed() -> None:
    at_once = most = 0

    async def handle(stream: SocketStream) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        try:
            while True:
                await read_request(stream)
                await anyio.sleep(0.005)
                await stream.send(OK)
        finally:
            at_once -= 1

    async with serving(handle) as transport:
        limited = DirectTransport(transport._port, max_connections=3)
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(limited.request, "GET", "/")
        await limited.aclose()
    assert most == 3
