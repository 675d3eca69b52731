"""The transport against servers that do what they like, on every event loop.

The servers are plain threads with plain sockets: what they do does not depend on an event
loop, and each can do the one thing that a test needs at the moment that it needs it.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import re
import select
import socket
import struct
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import uvloop

from stepflow_runtime import ConnectionLostError
from stepflow_runtime.crew import Crew
from stepflow_runtime.loops import current_loop
from stepflow_runtime.transport import Response
from stepflow_runtime.transport.direct import DirectTransport
from stepflow_runtime.transport.http1 import AnswerReader
from stepflow_runtime.transport.hub import Hub, can_have_hub

from .conftest import ASYNCIO, TRIO, open_descriptors, wait_until
from .steps import cancelling_at_step, in_a_task

UVLOOP = pytest.param(("asyncio", {"use_uvloop": True}), id="asyncio+uvloop")

pytestmark = [
    pytest.mark.anyio,
    # Python 3.12 warns of forks in programs with threads, which is what is tried here.
    pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning"),
]

PATIENCE = 30.0  # seconds; what takes so long hangs
BIG = bytes(20_000_000)  # far more than the buffers of a connection take


@pytest.fixture(params=[ASYNCIO, UVLOOP, TRIO])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


# -- servers ---------------------------------------------------------------------------


class Gone(Exception):
    """The client has closed the connection, or broke it."""


class Peer:
    """A connection, as the server has it."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self._received = b""

    def request(self) -> str:
        """Read a whole request; return its path."""
        while b"\r\n\r\n" not in self._received:
            self._receive()
        head, _, self._received = self._received.partition(b"\r\n\r\n")
        length = re.search(rb"Content-Length: (\d+)", head)
        left = int(length[1]) if length is not None else 0
        while left > len(self._received):
            left -= len(self._received)
            self._received = b""
            self._receive()
        self._received = self._received[left:]
        return head.split()[1].decode()

    def _receive(self, size: int = 65536) -> None:
        try:
            data = self.socket.recv(size)
        except OSError:
            raise Gone from None
        if not data:
            raise Gone
        self._received += data

    def receive(self, size: int) -> None:
        """Read some of what comes, and forget it."""
        self._receive(size)
        self._received = b""

    def send(self, data: bytes) -> None:
        try:
            self.socket.sendall(data)
        except OSError:
            raise Gone from None

    def wait_gone(self) -> None:
        with suppress(Gone):
            while True:
                self.receive(65536)

    def reset(self) -> None:
        self.socket.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        self.socket.close()


class Server:
    """Does ``script`` with each connection, and then closes it.

    :ivar accepted: how many connections there were
    """

    def __init__(self, script: Callable[[Peer], None]) -> None:
        self._script = script
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = self._listener.getsockname()[1]
        self.accepted = 0
        self._peers: set[Peer] = set()
        self._threads: list[threading.Thread] = []
        self._wrong: list[BaseException] = []
        self._is_over = False
        self._start(self._accept)

    @property
    def open(self) -> int:
        return len(self._peers)

    def close(self) -> None:
        self._is_over = True
        # Wakes who accepts, unlike a close.
        self._listener.shutdown(socket.SHUT_RDWR)
        for peer in tuple(self._peers):
            with suppress(OSError):
                peer.socket.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        self._listener.close()
        assert self._wrong == []

    def _start(self, function: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=function, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connected, _ = self._listener.accept()
            except OSError:
                return
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.accepted += 1
            peer = Peer(connected)
            self._peers.add(peer)
            self._start(self._serve, peer)

    def _serve(self, peer: Peer) -> None:
        try:
            if not self._is_over:
                self._script(peer)
        except Gone:
            pass
        except BaseException as exc:  # noqa: BLE001 - raised by close()
            self._wrong.append(exc)
        finally:
            peer.socket.close()
            self._peers.discard(peer)


@contextmanager
def serving(
    script: Callable[[Peer], None], **options: Any
) -> Iterator[tuple[Server, DirectTransport]]:
    server = Server(script)
    transport = DirectTransport(server.port, **options)
    try:
        yield server, transport
    finally:
        transport.close()
        server.close()


def answer_to(path: str, *headers: str) -> bytes:
    body = path.encode()
    lines = "".join(f"{line}\r\n" for line in headers)
    return (
        f"HTTP/1.1 200 OK\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body
    )


def echo(peer: Peer) -> None:
    """A server that is well: answers each request with its path."""
    while True:
        peer.send(answer_to(peer.request()))


async def ask(transport: DirectTransport, path: str, **options: Any) -> None:
    """A request whose answer has to be its own."""
    with anyio.fail_after(PATIENCE):
        answer = await transport.request("GET", path, **options)
    assert answer[::2] == (200, path.encode())


async def failure_of(
    transport: DirectTransport, method: str = "POST"
) -> ConnectionLostError:
    with anyio.fail_after(PATIENCE), pytest.raises(ConnectionLostError) as caught:
        await transport.request(method, "/", b"{}" if method == "POST" else None)
    return caught.value


def idle(transport: DirectTransport) -> list[socket.socket]:
    return [connection.socket for connection in transport._idle]


def assert_at_rest(transport: DirectTransport) -> None:
    """Nothing is held by a request that is over."""
    assert transport._slots.taken == ()
    assert len(set(transport._idle)) == len(transport._idle)
    for connection in transport._idle:
        assert connection.waiter is None
        assert connection.answer.is_reusable


async def sure_to_arrive(connection: socket.socket) -> None:
    """Wait until there is something to read; it is left there."""
    ready, _, _ = await anyio.to_thread.run_sync(
        select.select, [connection], [], [], PATIENCE
    )
    assert ready


# -- answers before their time ---------------------------------------------------------

TOO_LARGE = b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nno!"


@pytest.mark.parametrize("then", ["close", "wait", "read on", "end of body", "reset"])
async def test_an_answer_before_the_request_was_read(then: str) -> None:
    def script(peer: Peer) -> None:
        peer.receive(1000)
        if then == "end of body":
            peer.send(b"HTTP/1.1 413 Too Large\r\n\r\nno!")
            peer.socket.shutdown(socket.SHUT_WR)
        else:
            peer.send(TOO_LARGE)
        if then == "reset":
            peer.reset()
        elif then == "read on":
            peer.wait_gone()
        elif then != "close":
            over.wait(PATIENCE)

    over = threading.Event()
    with serving(script) as (server, transport):
        try:
            with anyio.fail_after(PATIENCE):
                answer = await transport.request("POST", "/", BIG)
            assert (answer.status, answer.body) == (413, b"no!")
        except ConnectionLostError as exc:
            assert then in ("close", "reset")  # TCP may have thrown the answer away
            assert not exc.unsent
        over.set()
        # Half a request was sent there, unless the server had it all after all.
        assert idle(transport) == [] or then == "read on"
        assert_at_rest(transport)
        assert server.accepted == 1


async def test_a_request_is_taken_back_while_the_server_reads_it_slowly() -> None:
    def script(peer: Peer) -> None:
        if server.accepted > 1:
            echo(peer)
        peer.receive(1)
        begun.set()
        may_go_on.wait(PATIENCE)
        peer.wait_gone()
        gone.set()

    begun, may_go_on, gone = threading.Event(), threading.Event(), threading.Event()
    with serving(script) as (server, transport):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(transport.request, "POST", "/", bytes(50_000_000))
            await wait_until(begun.is_set)
            tasks.cancel_scope.cancel()
        # We are here although the server has read one byte of it.
        assert not gone.is_set()
        assert_at_rest(transport)
        may_go_on.set()
        await wait_until(gone.is_set)
        await ask(transport, "/next")
        assert server.accepted == 2


async def test_a_large_request_and_a_large_answer_arrive_whole() -> None:
    def script(peer: Peer) -> None:
        while True:
            peer.request()
            peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BIG) + BIG)

    with serving(script) as (server, transport), anyio.fail_after(PATIENCE):
        for _ in range(2):
            answer = await transport.request("POST", "/", BIG)
            assert answer.body == BIG
        assert server.accepted == 1


# -- no answer, half an answer ---------------------------------------------------------


async def test_an_answer_that_never_comes_is_not_waited_for_longer_than_one_wants() -> (
    None
):
    def script(peer: Peer) -> None:
        if server.accepted > 1:
            echo(peer)
        peer.request()
        peer.wait_gone()
        gone.set()

    gone = threading.Event()
    with serving(script) as (server, transport):
        with anyio.move_on_after(0.02) as scope:
            await transport.request("GET", "/")
        assert scope.cancelled_caught
        assert idle(transport) == []
        await wait_until(gone.is_set)
        await ask(transport, "/next")


STAGES = {
    "at once": None,
    "with the request": b"",
    "in the status": b"HTTP/1.1 20",
    "in the head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "after the head": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n",
    "in the body": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc",
    "in a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nabc",
    "between chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n",
    "in the trailers": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: ",
    "after an interim answer": b"HTTP/1.1 100 Continue\r\n\r\n",
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_connection_that_ends_too_early(stage: str, how: str) -> None:
    def script(peer: Peer) -> None:
        answer = STAGES[stage]
        if answer is not None:
            requests.append(peer.request())
            peer.send(answer)
        if how == "reset":
            peer.reset()

    requests: list[str] = []
    with serving(script) as (server, transport):
        for method in ("GET", "POST"):
            lost = await failure_of(transport, method)
            assert not (lost.unsent and stage != "at once")
        with pytest.raises(ConnectionLostError), anyio.fail_after(PATIENCE):
            stream = await transport.stream("/")
            try:
                while await stream.receive():
                    pass
            finally:
                stream.close()
        # A new connection that breaks is no reason to try another one.
        assert server.accepted == 3
        assert len(requests) in (0, 3)
        assert_at_rest(transport)
        assert idle(transport) == []


# -- more than was asked for -----------------------------------------------------------


@pytest.mark.parametrize(
    "more", [answer_to("/forged"), b"HTTP/1.1 408 Timeout\r\n\r\n", b"x", b"\r\n"]
)
async def test_an_answer_to_nothing_is_taken_for_no_answer(more: bytes) -> None:
    def script(peer: Peer) -> None:
        peer.send(answer_to(peer.request()))
        if server.accepted % 2:
            may_send.wait(PATIENCE)
            peer.send(more)
            peer.wait_gone()
        else:
            echo(peer)

    may_send = threading.Event()
    with serving(script) as (server, transport):
        await ask(transport, "/a")
        (connection,) = idle(transport)
        may_send.set()
        await sure_to_arrive(connection)
        await ask(transport, "/b")
        await ask(transport, "/c")
        assert server.accepted == 2
        assert connection.fileno() == -1


@pytest.mark.parametrize(
    "more", [answer_to("/forged"), b"x", b"HTTP/1.1 100 Go on\r\n\r\n"]
)
async def test_two_answers_to_one_request(more: bytes) -> None:
    """The next request must not get the second one."""

    def script(peer: Peer) -> None:
        while True:
            peer.send(answer_to(peer.request()) + more)

    with serving(script) as (server, transport):
        for number in range(20):
            await ask(transport, f"/{number}")
            assert idle(transport) == []
        assert server.accepted == 20


@pytest.mark.parametrize("size", [65536 - 65, 65536, 70_000, 1_100_000])
async def test_a_second_answer_behind_a_long_one(size: int) -> None:
    """However much of it was read together with the first one."""

    def script(peer: Peer) -> None:
        while True:
            path = peer.request()
            body = path.encode().ljust(size)
            head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
            peer.send(head + body + answer_to("/forged"))

    with serving(script) as (_, transport), anyio.fail_after(PATIENCE):
        for number in range(5):
            answer = await transport.request("GET", f"/{number}")
            assert answer.body.rstrip() == f"/{number}".encode()
            if found := idle(transport):
                await sure_to_arrive(found[0])


# -- connections that the server closes ------------------------------------------------


async def test_the_server_closes_at_the_moment_of_the_next_request() -> None:
    """A GET has its answer, by a second try; a POST arrives once, or not at all."""
    rounds = 1000

    def script(peer: Peer) -> None:
        while True:
            path = peer.request()
            arrived[path] += 1
            with lock:
                chance = dice.random()
            if chance < 0.15 and peer in used:
                return  # without an answer, on a connection that was used
            peer.send(answer_to(path))
            used.add(peer)
            if chance > 0.6:
                for _ in range(int((chance - 0.6) * 2000)):
                    pass  # for some microseconds
                if chance > 0.8:
                    peer.reset()
                return

    arrived: Counter[str] = Counter()
    used: set[Peer] = set()
    lost = 0
    dice, lock = random.Random(1), threading.Lock()
    with serving(script) as (_, transport):
        for number in range(rounds // 2):
            await ask(transport, f"/get/{number}")
            try:
                with anyio.fail_after(PATIENCE):
                    answer = await transport.request("POST", f"/post/{number}", b"{}")
                assert answer.body == f"/post/{number}".encode()
                assert arrived[f"/post/{number}"] == 1
            except ConnectionLostError as exc:
                lost += 1
                assert not exc.unsent  # or it would have been sent again
        assert_at_rest(transport)
    posts = {path: count for path, count in arrived.items() if "post" in path}
    assert set(posts.values()) == {1}
    assert len(posts) >= rounds // 2 - lost
    twice = sum(arrived[f"/get/{number}"] > 1 for number in range(rounds // 2))
    assert twice > 0, "no race took place"
    assert lost > 0, "no race took place"


@pytest.mark.parametrize("kind", ["request", "stream"])
async def test_what_is_safe_is_tried_again_on_a_connection_that_was_dead(
    kind: str,
) -> None:
    def script(peer: Peer) -> None:
        peer.send(answer_to(peer.request()))
        peer.request()
        if server.accepted == 1:
            return  # that was read, and is not answered
        peer.send(answer_to("/again"))

    with serving(script) as (server, transport):
        await ask(transport, "/first")
        if kind == "request":
            # The second connection answers with the path of its first request.
            await ask(transport, "/again")
        else:
            with anyio.fail_after(PATIENCE):
                stream = await transport.stream("/again")
            assert await stream.receive() == b"/again"
            stream.close()
        assert server.accepted == 2


# -- cancellation ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["new", "kept", "large", "stream", "name"])
async def test_a_cancellation_at_any_point(kind: str) -> None:
    """Whatever it hits: nothing stays open, and the next request has its own answer."""
    counted = 0
    with serving(echo, max_connections=1) as (server, transport):
        if kind == "name":
            transport._host = "localhost"

        async def once() -> None:
            if kind == "stream":
                with await transport.stream(f"/{number}") as stream:  # type: ignore[attr-defined, unused-ignore]
                    while await stream.receive():
                        pass
            else:
                body = BIG[:8_000_000] if kind == "large" else b"{}"
                answer = await transport.request("POST", f"/{number}", body)
                assert answer.body == f"/{number}".encode()

        for number in range(200):
            if kind == "new":
                transport._close_idle()
            with anyio.fail_after(PATIENCE):
                with (
                    anyio.CancelScope() as scope,
                    cancelling_at_step(number, scope.cancel) as counter,
                ):
                    await in_a_task(once)
                assert_at_rest(transport)
                await ask(transport, f"/after/{number}")
            if not counter.fired:
                counted = number
                break
        assert counted > 1, "nothing was cancelled"
        assert_at_rest(transport)
        await wait_until(lambda: server.open == len(transport._idle))


async def test_waiters_for_a_connection_come_and_go() -> None:
    def script(peer: Peer) -> None:
        while True:
            path = peer.request()
            with lock:
                pause = dice.random() / 300
            over.wait(pause)
            peer.send(answer_to(path))

    answered = 0

    async def request(number: int) -> None:
        nonlocal answered
        with anyio.move_on_after(dice.random() / 5):
            await ask(transport, f"/{number}")
            answered += 1

    dice, lock, over = random.Random(2), threading.Lock(), threading.Event()
    with serving(script, max_connections=3) as (server, transport):
        async with anyio.create_task_group() as tasks:
            for number in range(150):
                tasks.start_soon(request, number)
        over.set()
        assert_at_rest(transport)
        assert 0 < answered
        await ask(transport, "/last")
        await wait_until(lambda: server.open <= 3)
        assert len(transport._idle) <= 3


@pytest.mark.parametrize("anyio_backend", [ASYNCIO, UVLOOP])
async def test_tasks_cancelled_at_random_under_load() -> None:
    """asyncio's own ``task.cancel()``; 5,000 requests, and each answer is that of its own."""
    requests = 2500

    def script(peer: Peer) -> None:
        while True:
            path = peer.request()
            if path.endswith("7"):
                over.wait(0.002)
            peer.send(answer_to(path))

    async def request(number: int) -> None:
        answer = await transport.request("GET", f"/{number}")
        assert answer.body == f"/{number}".encode()
        answered.append(number)

    async def worker(mine: range) -> None:
        for number in mine:
            task = asyncio.create_task(request(number))
            if dice.random() < 0.3:
                for _ in range(dice.randrange(6)):
                    await asyncio.sleep(0)
                if dice.random() < 0.5:
                    await asyncio.sleep(dice.random() / 1000)
                if task.cancel():
                    tried.append(number)
            try:
                await task
            except asyncio.CancelledError:
                cancelled.append(number)

    answered: list[int] = []
    tried: list[int] = []
    cancelled: list[int] = []
    dice, over = random.Random(3), threading.Event()
    before = open_descriptors()
    with serving(script, max_connections=16) as (server, transport):
        with anyio.fail_after(2 * PATIENCE):
            await asyncio.gather(*(worker(range(i, requests, 32)) for i in range(32)))
        assert sorted(answered + cancelled) == list(range(requests))
        assert set(cancelled) <= set(tried)
        assert len(cancelled) > requests / 50
        assert_at_rest(transport)
        await wait_until(lambda: server.open == len(transport._idle))
        over.set()
    after = open_descriptors()
    assert len(after) <= len(before)


# -- streams ---------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["task", "thread"])
async def test_a_stream_is_closed_while_it_is_read(by: str) -> None:
    def script(peer: Peer) -> None:
        peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
        peer.wait_gone()

    async def read() -> None:
        assert await stream.receive() == b"a"
        reading.set()
        with pytest.raises(ConnectionLostError):
            await stream.receive()

    with serving(script, max_connections=1) as (server, transport):
        for _ in range(10):
            with anyio.fail_after(PATIENCE):
                reading = threading.Event()
                stream = await transport.stream("/")
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(read)
                    await wait_until(reading.is_set)
                    if by == "task":
                        stream.close()
                    else:
                        await anyio.to_thread.run_sync(stream.close)
            stream.close()
            assert_at_rest(transport)
        await wait_until(lambda: not server.open)


async def test_a_closed_stream_has_no_part_in_what_comes_later() -> None:
    """Its end was there, but not read: who reads on must not get the next answer."""

    def script(peer: Peer) -> None:
        while True:
            path = peer.request()
            head, _, body = answer_to(path).partition(b"\r\n\r\n")
            peer.send(head + b"\r\n\r\n" + body[:2])
            if path == "/next":
                half.set()
                may_go_on.wait(PATIENCE)
            peer.send(body[2:])

    async def read_on() -> None:
        await wait_until(half.is_set)
        (slot,) = transport._slots.taken
        await wait_until(lambda: slot.holds.answer.has_head)
        with suppress(ConnectionLostError):
            assert await stream.receive() in (b"", b"/a")
        stream.close()
        assert (stream.status, stream.content_type) == (200, "")
        may_go_on.set()

    half, may_go_on = threading.Event(), threading.Event()
    with serving(script) as (_, transport), anyio.fail_after(PATIENCE):
        stream = await transport.stream("/a")
        stream.close()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read_on)
            await ask(transport, "/next")


def test_a_stream_is_closed_by_a_thread_at_any_moment() -> None:
    """Before it is read, while it is, and after its end; nobody is left waiting."""

    def script(peer: Peer) -> None:
        while True:
            peer.request()
            peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(3):
                peer.send(b"1\r\na\r\n")
            if dice.random() < 0.5:
                peer.send(b"0\r\n\r\n")
            else:
                peer.wait_gone()

    async def read() -> None:
        for _ in range(100):
            with anyio.fail_after(PATIENCE):
                stream = await transport.stream("/")
                closing.append(stream)
                wanted.release()
                with suppress(ConnectionLostError):
                    while await stream.receive():
                        pass
                    stream.close()

    def close() -> None:
        while wanted.acquire(timeout=PATIENCE) and closing:
            for _ in range(random.randrange(300)):
                pass
            closing.pop().close()

    dice = random.Random(4)
    closing: list[Any] = []
    wanted = threading.Semaphore(0)
    with serving(script, max_connections=2) as (_, transport), quick_switches():
        closer = threading.Thread(target=close)
        closer.start()
        try:
            for backend in ("asyncio", "trio"):
                anyio.run(read, backend=backend)
        finally:
            wanted.release()
            closer.join(PATIENCE)
        assert_at_rest(transport)


@contextmanager
def quick_switches() -> Iterator[None]:
    """Let threads take turns so often that they meet in the middle of things."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


# -- several event loops ---------------------------------------------------------------


def test_loops_of_every_kind_share_a_transport() -> None:
    """2,000 requests of four threads through eight connections."""
    each, at_once = 500, 10

    async def main(name: str) -> None:
        async def worker(mine: range) -> None:
            for number in mine:
                path = f"/{name}/{number}"
                with anyio.move_on_after(0.001 if number % 50 == 0 else PATIENCE):
                    await ask(transport, path)
                    answered[path] += 1

        async with anyio.create_task_group() as tasks:
            for i in range(at_once):
                tasks.start_soon(worker, range(i, each, at_once))

    def run(name: str, **options: Any) -> None:
        try:
            anyio.run(main, name, **options)
        except BaseException as exc:  # noqa: BLE001 - seen below
            wrong.append(exc)

    answered: Counter[str] = Counter()
    wrong: list[BaseException] = []
    with serving(echo, max_connections=8) as (_, transport), quick_switches():
        kinds: dict[str, dict[str, Any]] = {
            "one": {"backend": "asyncio"},
            "two": {"backend": "asyncio"},
            "uvloop": {"backend_options": {"use_uvloop": True}},
            "trio": {"backend": "trio"},
        }
        threads = [
            threading.Thread(target=run, args=(name,), kwargs=options, daemon=True)
            for name, options in kinds.items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * PATIENCE)
        assert wrong == []
        assert not any(thread.is_alive() for thread in threads)
        assert 4 * each * 0.98 <= len(answered) <= 4 * each
        assert set(answered.values()) == {1}
        assert_at_rest(transport)
        assert len(transport._idle) <= 8


async def test_a_hub_leaves_alone_what_another_loop_took_in_the_same_moment() -> None:
    """Its epoll has reported a connection, and then the other thread was faster."""
    if not can_have_hub(current_loop()):
        pytest.skip("only asyncio's loops have hubs")

    class Member:
        def __init__(self, connected: socket.socket) -> None:
            self.socket = connected
            self.hub: Hub | None = None
            self.waiter: Any = None
            self.taken_in = 0

        def fileno(self) -> int:
            return self.socket.fileno()

        def take_in(self) -> bool:
            self.taken_in += 1
            return True

    class Members(dict[int, Any]):
        def get(self, number: int, default: Any = None) -> Any:
            found = super().get(number, default)
            if found is ours and ours.hub is here:
                there._enter(ours)
                ours.waiter = loop.create_future()
            return found

    loop = current_loop()
    here, there = Hub(loop), Hub(loop)
    near, far = socket.socketpair()
    with near, far:
        ours = Member(near)
        here._enter(ours)
        here._members = Members(here._members)
        far.send(b"x")
        here._on_readable()
        assert ours.taken_in == 0
        assert ours.hub is there
        assert not ours.waiter.done()
        there._on_readable()
        assert ours.waiter.done()
        for hub in (here, there):
            hub.forget(ours)
            hub._leave()
            hub.close()
    assert ours.hub is None


@pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_loop_is_closed_around_its_requests(
    make_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    def script(peer: Peer) -> None:
        peer.request()
        arrived.release()
        peer.wait_gone()

    arrived = threading.Semaphore(0)
    with serving(script, max_connections=9) as (_, transport):
        for kind in ("GET", "large", "stream"):
            loop = make_loop()
            coroutines: list[Any] = [
                transport.stream("/")
                if kind == "stream"
                else transport.request("POST", "/", BIG if kind == "large" else b"{}")
                for _ in range(3)
            ]
            tasks = [loop.create_task(coroutine) for coroutine in coroutines]
            for _ in range(3):
                loop.run_until_complete(loop.run_in_executor(None, arrived.acquire))
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()
            for task in tasks:
                task._log_destroy_pending = False  # type: ignore[attr-defined]
            del task, tasks, coroutines
            gc.collect()

        # Whoever comes next has every connection, and is told of no trouble.
        async def come_next() -> None:
            async with anyio.create_task_group() as tasks:
                for _ in range(9):
                    tasks.start_soon(failure_of, transport)
                for _ in range(9):
                    await anyio.to_thread.run_sync(arrived.acquire)
                transport.close()

        asyncio.run(come_next())
        assert_at_rest(transport)


async def test_closing_from_another_thread_ends_everything_that_waits() -> None:
    """Requests that were sent, that are being sent, that wait for a connection."""

    def script(peer: Peer) -> None:
        if "POST" not in (path := peer.request()):
            arrived.append(path)
        peer.wait_gone()

    arrived: list[str] = []
    ended = 0

    async def request() -> None:
        nonlocal ended
        await failure_of(transport, "GET")
        ended += 1

    with (
        serving(script, max_connections=30) as (_, transport),
        anyio.fail_after(PATIENCE),
    ):
        async with anyio.create_task_group() as tasks:
            for _ in range(50):
                tasks.start_soon(request)
            await wait_until(lambda: len(arrived) == 30)
            await anyio.to_thread.run_sync(transport.close)
        assert ended == 50
        assert_at_rest(transport)
        assert transport._hubs == {}


# -- forks -----------------------------------------------------------------------------


async def test_a_fork_in_the_middle_of_a_request() -> None:
    """The child has connections of its own; the parent's go on as if nothing was."""

    def script(peer: Peer) -> None:
        while True:
            path = peer.request()
            if path == "/held":
                arrived.set()
                may_answer.wait(PATIENCE)
            peer.send(answer_to(path))

    def child() -> int:
        inherited = {connection.fileno() for connection in mine}
        if inherited != {-1}:
            return 2
        loop = asyncio.new_event_loop()  # nothing of the parent's is run here
        answer: Response = loop.run_until_complete(transport.request("GET", "/child"))
        loop.close()
        transport.close()
        return 0 if answer.body == b"/child" else 3

    arrived, may_answer = threading.Event(), threading.Event()
    with serving(script) as (_, transport):
        await ask(transport, "/first")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, transport, "/held")
            await wait_until(arrived.is_set)
            await ask(transport, "/kept")
            mine = [
                *idle(transport),
                *(slot.holds.socket for slot in transport._slots.taken),
            ]
            assert len(mine) == 2

            def fork() -> int:
                # From a thread without a loop.
                if (pid := os.fork()) == 0:
                    code = 1
                    try:
                        warnings.simplefilter("error")
                        code = child()
                    finally:
                        os._exit(code)
                return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

            assert await anyio.to_thread.run_sync(fork) == 0
            may_answer.set()
        for number in range(5):
            await ask(transport, f"/{number}")
        assert_at_rest(transport)


# -- anything at all -------------------------------------------------------------------


class Madman:
    """A server that does at each request one of the things above, by the dice.

    What it sends is either the answer to the request, and what follows it at once, or
    none. (An answer that it sends by itself while the next request is on its way is not to
    be told from that one's, in HTTP/1.1.)
    """

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self._lock = threading.Lock()
        self.over = threading.Event()

    def __call__(self, peer: Peer) -> None:
        if self._one_of(20) == 0:
            peer.reset()
        else:
            while self._answer(peer, peer.request()):
                pass

    def _one_of(self, number: int) -> int:
        with self._lock:
            return self._dice.randrange(number)

    def _answer(self, peer: Peer, path: str) -> bool:
        answer, body = answer_to(path), path.encode()
        match self._one_of(18):
            case 0:
                peer.send(answer + answer_to("/forged"))
            case 1:
                peer.send(answer_to(path, "Connection: close"))
                return False
            case 2:
                peer.send(answer[: self._one_of(len(answer))])
                return False
            case 3:
                peer.send(answer[: self._one_of(len(answer))])
                peer.reset()
                return False
            case 4:
                peer.send(answer)
                peer.reset()
                return False
            case 5:
                for i in range(len(answer)):
                    peer.send(answer[i : i + 1])
            case 6:
                peer.send(b"HTTP/1.1 100 Continue\r\n\r\n" * self._one_of(50) + answer)
            case 7:
                peer.send(
                    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
                    + b"".join(b"1;x=y\r\n%c\r\n" % byte for byte in body)
                    + b"0\r\nContent-Type: forged/type\r\n\r\n"
                )
            case 8:
                peer.send(b"HTTP/1.1 200 OK\r\n\r\n" + body)
                return False
            case 9:
                peer.send(b"HTTP/1.1 200 OK\r\n" + b"X-Y: z\r\n" * 100_000)
                return False
            case 10:
                peer.send(bytes(self._one_of(256) for _ in range(50)))
                return False
            case 11:
                peer.send(answer_to(path, "Content-Length: 1"))
            case 12:
                self.over.wait(0.01)
                peer.send(answer)
            case 13:
                peer.wait_gone()
            case _:
                peer.send(answer)
        return True


@pytest.mark.parametrize("seed", [5, 6])
async def test_a_server_that_has_gone_mad(seed: int) -> None:
    """No hang, no wrong answer, and nothing raised but a ConnectionLostError."""

    async def client(name: int) -> None:
        dice = random.Random(seed * 1000 + name)
        for number in range(40):
            path = f"/{name}/{number}"
            patience = 0.05 if dice.random() < 0.8 else dice.random() / 200
            with anyio.move_on_after(patience), suppress(ConnectionLostError):
                if dice.random() < 0.2:
                    with await transport.stream(path) as stream:
                        body = b""
                        while more := await stream.receive():
                            body += more
                        status = stream.status
                else:
                    method = dice.choice(["GET", "POST"])
                    size = dice.choice([0, 100, 100_000, 3_000_000])
                    document = None if method == "GET" else BIG[:size]
                    answer = await transport.request(method, path, document)
                    status, body = answer.status, answer.body
                    assert answer.content_type == ""
                outcomes[status, body == path.encode()] += 1

    outcomes: Counter[tuple[int, bool]] = Counter()
    madman = Madman(seed)
    with serving(madman, max_connections=6) as (server, transport):
        with anyio.fail_after(2 * PATIENCE):
            async with anyio.create_task_group() as tasks:
                for name in range(10):
                    tasks.start_soon(client, name)
        madman.over.set()
        assert set(outcomes) == {(200, True)}
        assert outcomes[200, True] > 50
        assert_at_rest(transport)
        assert len(transport._idle) <= 6
        # It has closed some of those that rest.
        await wait_until(lambda: server.open <= len(transport._idle))


async def test_an_heir_of_a_mad_server_harms_nobody() -> None:
    """Exchanges change hands between loops while the server does what it likes."""

    async def inherit(answer: Response | None) -> None:
        if answer is not None:
            inherited[answer.status] += 1

    async def client(name: int) -> None:
        dice = random.Random(name)
        for number in range(25):
            path = f"/{name}/{number}"
            with (
                anyio.move_on_after(dice.random() / 300),
                suppress(ConnectionLostError),
            ):
                answer = await transport.request("POST", path, b"{}", heir=inherit)
                assert answer.body == path.encode()

    inherited: Counter[int] = Counter()
    madman = Madman(7)
    crew = Crew(may_hire=True)
    with (
        serving(madman, crew=crew, max_connections=20) as (_, transport),
        quick_switches(),
        anyio.fail_after(2 * PATIENCE),
    ):
        async with anyio.create_task_group() as tasks:
            for name in range(10):
                tasks.start_soon(client, name)
        assert set(inherited) <= {200}
        transport.close()
        await wait_until(lambda: not crew.has_errands)
        assert_at_rest(transport)
        crew.dismiss()
        assert crew._thread is not None
        await anyio.to_thread.run_sync(crew._thread.join)
        assert inherited[200] > 0


@pytest.mark.anyio
async def test_whatever_goes_wrong_in_reading_reaches_who_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On asyncio it is read in a callback, where nobody would hear of it."""

    def fail(self: AnswerReader, data: bytes) -> None:
        raise MemoryError

    monkeypatch.setattr(AnswerReader, "feed", fail)
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:

        async def answer(stream: anyio.abc.SocketStream) -> None:
            async with stream:
                await stream.send(b"HTTP/1.1 200 OK\r\n\r\n")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, answer)
            port = listener.extra(anyio.abc.SocketAttribute.local_port)
            transport = DirectTransport(port)
            with anyio.fail_after(10), pytest.raises(MemoryError):
                await transport.request("GET", "/")
            await transport.aclose()
            tasks.cancel_scope.cancel()
