"""The transport over httpx: TLS, proxies, other event loops, and servers that misbehave."""

from __future__ import annotations

import asyncio
import base64
import gc
import gzip
import os
import ssl
import threading
import traceback
import tracemalloc
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import trustme
from anyio.abc import AnyByteStream, SocketAttribute
from anyio.streams.tls import TLSListener

from stepflow_runtime import ConnectionLostError
from stepflow_runtime.crew import Crew, Job, Kind
from stepflow_runtime.transport import Response
from stepflow_runtime.transport import remote as module
from stepflow_runtime.transport.remote import RemoteTransport

from .conftest import each_backend, wait_until

pytestmark = [pytest.mark.anyio, each_backend]

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nContent-Type: Text/Event-Stream; x=y\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
GZIP = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%b"
HELLO = gzip.compress(b"hello", mtime=0)
SECRET = "hunter2"
ENCODED_SECRET = base64.b64encode(f"user:{SECRET}".encode()).decode()
SOON = 0.2  # for timeouts that are to be over

Handle = Callable[[AnyByteStream], Awaitable[None]]


@pytest.fixture(scope="module")
def other_ca_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("other") / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(path))
    return str(path)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch, other_ca_file: str) -> None:
    """No proxies, and one authority, which is read faster than those of the world."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", other_ca_file)


# -- servers ---------------------------------------------------------------------------


async def read_head(stream: AnyByteStream) -> bytes:
    received = b""
    while b"\r\n\r\n" not in received:
        received += await stream.receive()
    return received


@asynccontextmanager
async def serving(
    handle: Handle, tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """A server that does ``handle`` with each connection; yields its port."""

    async def guarded(stream: AnyByteStream) -> None:
        async with stream:
            # TLS without a farewell raises the last of them.
            with suppress(
                anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError
            ):
                await handle(stream)

    plain = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = plain.extra(SocketAttribute.local_port)
    listener: Any = plain
    if tls is not None:
        listener = TLSListener(plain, tls, standard_compatible=False)
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, guarded)
        yield port
        tasks.cancel_scope.cancel()


def answering(*answers: bytes) -> Handle:
    """Give each request on a connection the next of ``answers``, then close."""

    async def handle(stream: AnyByteStream) -> None:
        for answer in answers:
            await read_head(stream)
            await stream.send(answer)

    return handle


def saying_once(answer: bytes) -> Handle:
    """The same, but without answers the server waits for the client to close."""

    async def handle(stream: AnyByteStream) -> None:
        await read_head(stream)
        await stream.send(answer)
        await stream.receive()

    return handle


async def silent(stream: AnyByteStream) -> None:
    while True:
        await stream.receive()


class Waiting:
    """A server that answers when it is told to, and tells when the client went."""

    def __init__(self, *, answer: bytes = OK) -> None:
        self.answer = answer
        self.has_arrived = anyio.Event()
        self.may_answer = anyio.Event()
        self.is_closed = anyio.Event()

    async def __call__(self, stream: AnyByteStream) -> None:
        await stream.receive()
        self.has_arrived.set()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._wait_closed, stream)
            await self.may_answer.wait()
            await stream.send(self.answer)

    async def _wait_closed(self, stream: AnyByteStream) -> None:
        with suppress(
            anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError
        ):
            while True:
                await stream.receive()
        self.is_closed.set()


# -- transports ------------------------------------------------------------------------


@asynccontextmanager
async def working() -> AsyncIterator[Crew]:
    crew = Crew()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(crew.work)
        try:
            await crew.wait_at_work()
            yield crew
        finally:
            crew.dismiss()


@asynccontextmanager
async def transport_to(
    port: int,
    scheme: str = "http",
    *,
    headers: dict[str, str] | None = None,
    timeout: float = 15,
    http_client: httpx.AsyncClient | None = None,
) -> AsyncIterator[RemoteTransport]:
    async with working() as crew:
        transport = RemoteTransport(
            f"{scheme}://127.0.0.1:{port}",
            headers=headers or {},
            timeout=timeout,
            crew=crew,
            http_client=http_client,
        )
        try:
            yield transport
        finally:
            await transport.aclose()


@asynccontextmanager
async def connected(handle: Handle, **options: Any) -> AsyncIterator[RemoteTransport]:
    async with serving(handle) as port, transport_to(port, **options) as transport:
        yield transport


async def failure_of(awaitable: Awaitable[object]) -> ConnectionLostError:
    with anyio.fail_after(15), pytest.raises(ConnectionLostError) as caught:
        await awaitable
    printed = "".join(traceback.format_exception(caught.value))
    for secret in (SECRET, ENCODED_SECRET):
        assert secret not in f"{printed} {caught.value} {caught.value!r}"
    return caught.value


@contextmanager
def time_limit() -> Iterator[None]:
    with anyio.fail_after(15):
        yield


# -- requests and answers --------------------------------------------------------------


async def test_a_request_is_what_it_should_be() -> None:
    requests = []

    async def handle(stream: AnyByteStream) -> None:
        received = await read_head(stream)
        while not received.endswith(b'{"a":1}'):
            received += await stream.receive()
        requests.append(received)
        await stream.send(OK)

    async with connected(handle) as transport:
        response = await transport.request("POST", "/x%2Fy?z=1", b'{"a":1}')
    assert response == Response(200, "application/json", b"{}")
    head, _, body = requests[0].partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    assert head.startswith(b"POST /x%2Fy?z=1 HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"content-length: 7" in lines
    assert b"accept: application/json" in lines
    assert b"content-type: application/json" in lines
    assert any(line.startswith(b"user-agent: stepflow-runtime/") for line in lines)
    assert body == b'{"a":1}'


async def test_headers_of_a_request_take_the_place_of_others_in_whatever_case() -> None:
    heads = []

    async def handle(stream: AnyByteStream) -> None:
        for _ in range(2):
            head = await read_head(stream)
            heads.append(head.lower().split(b"\r\n"))
            await stream.send(OK)

    defaults = {"Authorization": "Bearer one", "X-Kept": "kept"}
    async with connected(handle, headers=defaults) as transport:
        await transport.request("GET", "/")
        await transport.request(
            "POST",
            "/",
            b"",
            headers={"AUTHORIZATION": "Bearer two", "Content-Type": "text/plain"},
        )
    plain, changed = heads
    assert {b"authorization: bearer one", b"x-kept: kept"} <= set(plain)
    assert not any(line.startswith(b"content-type:") for line in plain)
    expected = {b"authorization: bearer two", b"content-type: text/plain"}
    assert expected | {b"x-kept: kept"} <= set(changed)
    for name in (b"authorization:", b"content-type:", b"accept:"):
        assert sum(line.startswith(name) for line in changed) == 1


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}", 404),
        (b"HTTP/1.1 503 Later\r\nContent-Length: 2\r\n\r\n{}", 503),
        (b"HTTP/1.1 302 Found\r\nLocation: /y\r\nContent-Length: 2\r\n\r\n{}", 302),
        (b"HTTP/1.1 308 Go\r\nLocation: /y\r\nContent-Length: 2\r\n\r\n{}", 308),
    ],
)
async def test_error_statuses_and_redirections_are_answers(
    answer: bytes, status: int
) -> None:
    async with connected(answering(answer)) as transport:
        response = await transport.request("POST", "/", b"{}")
    assert response == Response(status, "", b"{}")


@pytest.mark.parametrize(("body", "meaning"), [(HELLO, b"hello"), (b"", b"")])
async def test_a_compressed_answer_is_decompressed(body: bytes, meaning: bytes) -> None:
    async with connected(answering(GZIP % (len(body), body))) as transport:
        assert (await transport.request("GET", "/")).body == meaning


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n",
        GZIP,
    ],
    ids=["length", "chunked", "gzip"],
)
async def test_no_more_is_taken_than_of_a_server_nearby(
    monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    monkeypatch.setattr(module, "LONGEST_BODY", 200_000)
    for length in (200_000, 200_001, 20_000_000):
        body = bytes(length)
        if answer is GZIP:
            body = gzip.compress(body)
        async with connected(answering(answer % (len(body), body))) as transport:
            if length == 200_000:
                assert len((await transport.request("GET", "/")).body) == length
                continue
            tracemalloc.start()
            lost = await failure_of(transport.request("GET", "/"))
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert "longer than 200000 bytes" in str(lost)
        # What is sent as it is fills the buffers of the server, too, which is in here.
        assert peak < 2_000_000 or answer is not GZIP


async def test_a_stream_is_taken_as_it_is_or_not_at_all() -> None:
    body = gzip.compress(bytes(1_000_000))
    async with connected(answering(GZIP % (len(body), body))) as transport:
        lost = await failure_of(transport.stream("/"))
    assert "not asked for" in str(lost)


async def test_a_connection_is_used_again() -> None:
    connections = 0

    async def handle(stream: AnyByteStream) -> None:
        nonlocal connections
        connections += 1
        await answering(OK, OK)(stream)

    async with connected(handle) as transport:
        await transport.request("GET", "/")
        await transport.request("GET", "/")
    assert connections == 1


async def test_a_crowd_of_first_requests_makes_one_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[httpx.AsyncClient] = []

    def make() -> httpx.AsyncClient:
        made.append(original())
        return made[-1]

    original = module._make_client
    monkeypatch.setattr(module, "_make_client", make)
    async with (
        connected(answering(OK)) as transport,
        anyio.create_task_group() as tasks,
    ):
        for _ in range(10):
            tasks.start_soon(transport.request, "GET", "/")
    assert len(made) == 1


# -- what goes wrong -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "without an answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "without an answer"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc", "middle of an answer"),
        (CHUNKED + b"garbage\r\n", "middle of an answer"),
        (
            (
                b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n"
                b"Content-Length: 5\r\n\r\nabcde"
            ),
            "not compressed as it says",
        ),
        (GZIP % (20, HELLO[:20]), "not compressed as it says"),
        (GZIP % (30, HELLO + b"abcde"), "not compressed as it says"),
        (GZIP.replace(b"gzip", b"br") % (5, b"abcde"), "not asked for"),
        (GZIP.replace(b"gzip", b"gzip, gzip") % (5, b"abcde"), "not asked for"),
    ],
)
async def test_what_is_not_a_whole_answer_is_a_lost_connection(
    answer: bytes, words: str
) -> None:
    async with connected(answering(answer)) as transport:
        lost = await failure_of(transport.request("GET", "/"))
    assert words in str(lost)
    assert not lost.unsent


async def test_where_nobody_listens_nothing_was_sent(free_tcp_port: int) -> None:
    async with transport_to(free_tcp_port) as transport:
        lost = await failure_of(transport.request("GET", "/"))
        assert lost.unsent
        assert f"no connection to http://127.0.0.1:{free_tcp_port}: " in str(lost)
        assert isinstance(lost.__cause__, ConnectionRefusedError)
        assert (await failure_of(transport.stream("/"))).unsent


@pytest.mark.parametrize("host", ["nowhere.invalid", "x" * 70 + ".invalid"])
async def test_a_host_that_does_not_exist(host: str) -> None:
    async with working() as crew:
        transport = RemoteTransport(f"http://{host}", headers={}, timeout=15, crew=crew)
        lost = await failure_of(transport.request("GET", "/"))
        await transport.aclose()
    assert lost.unsent
    assert host in str(lost)


@pytest.mark.parametrize("path", ["/a\nb", "/" + "x" * 70_000])
async def test_a_path_that_is_none_was_not_sent(path: str) -> None:
    async with connected(answering(OK)) as transport:
        lost = await failure_of(transport.request("GET", path))
        assert lost.unsent


@pytest.mark.parametrize("value", [f"Bearer {SECRET}\n", f"Bearer {SECRET}\u20ac"])
async def test_a_header_that_is_none_is_not_shown(value: str) -> None:
    """A token that was read from a file, with the end of its line."""
    async with connected(answering(OK), headers={"authorization": value}) as transport:
        lost = await failure_of(transport.request("GET", "/"))
    assert lost.unsent
    assert "line breaks" in str(lost)


def test_of_the_server_only_its_address_is_shown(anyio_backend: object) -> None:
    transport = RemoteTransport(
        f"https://user:{SECRET}@[::1]:8443/{SECRET}",
        headers={"authorization": SECRET},
        timeout=1,
        crew=Crew(),
    )
    assert repr(transport) == "<RemoteTransport https://[::1]:8443>"


def test_a_url_that_is_none_is_refused_without_being_shown(
    anyio_backend: object,
) -> None:
    with pytest.raises(ValueError, match="not well-formed") as caught:
        RemoteTransport(
            f"http://user:{SECRET}/x@host", headers={}, timeout=1, crew=Crew()
        )
    assert SECRET not in "".join(traceback.format_exception(caught.value))


# -- timeouts --------------------------------------------------------------------------


async def test_for_how_long_an_answer_is_held_back_is_on_top_of_the_timeout() -> None:
    server = Waiting()
    answers = []

    async def ask() -> None:
        answers.append(await transport.request("GET", "/", held=60))

    async with (
        connected(server, timeout=SOON) as transport,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(ask)
        with time_limit():
            await server.has_arrived.wait()
        lost = await failure_of(transport.request("GET", "/"))
        assert not lost.unsent
        assert "no answer from http://127.0.0.1" in str(lost)
        assert f"within {SOON} s" in str(lost)
        server.may_answer.set()
    assert [answer.status for answer in answers] == [200]


async def test_a_server_that_drips_does_not_hold_a_request_for_ever() -> None:
    async def handle(stream: AnyByteStream) -> None:
        await read_head(stream)
        await stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while True:
            await stream.send(b"x")
            await anyio.sleep(SOON / 10)

    async with connected(handle, timeout=SOON) as transport:
        lost = await failure_of(transport.request("GET", "/"))
    assert not lost.unsent
    assert "within" in str(lost)


async def test_a_connection_that_is_not_made_in_time_was_not_used() -> None:
    async with serving(silent) as port, transport_to(port, "https", timeout=SOON) as to:
        lost = await failure_of(to.request("GET", "/"))
    assert lost.unsent
    assert f"no connection to https://127.0.0.1:{port} within {SOON} s" in str(lost)
    assert lost.__cause__ is None


async def test_a_request_that_gets_no_connection_was_not_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_MAX_CONNECTIONS", 1)
    server = Waiting()
    async with (
        connected(server, timeout=SOON) as transport,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(ignore_loss, transport)
        with time_limit():
            await server.has_arrived.wait()
        lost = await failure_of(transport.request("GET", "/"))
        tasks.cancel_scope.cancel()
    assert lost.unsent


async def ignore_loss(transport: RemoteTransport) -> None:
    with suppress(ConnectionLostError):
        await transport.request("GET", "/", held=60)


# -- cancellation ----------------------------------------------------------------------


async def test_a_cancelled_request_takes_its_connection_along() -> None:
    server = Waiting()
    async with connected(server) as transport:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(transport.request, "GET", "/")
            with time_limit():
                await server.has_arrived.wait()
            tasks.cancel_scope.cancel()
        with time_limit():
            await server.is_closed.wait()


async def test_a_request_that_is_cancelled_during_the_tls_handshake() -> None:
    server = Waiting()
    async with serving(server) as port, transport_to(port, "https") as transport:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(transport.request, "GET", "/")
            with time_limit():
                await server.has_arrived.wait()
            tasks.cancel_scope.cancel()
        gc.disable()  # it is to be closed, and not to be garbage
        try:
            with time_limit():
                await server.is_closed.wait()
        finally:
            gc.enable()


async def test_who_is_cancelled_already_sends_nothing() -> None:
    async with connected(answering(OK)) as transport:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await transport.request("GET", "/")
        assert transport._pool is None


async def test_an_heir_gets_the_answer_and_the_caller_goes_at_once() -> None:
    server = Waiting()
    inherited: list[Response | None] = []
    has_inherited = anyio.Event()
    has_gone = anyio.Event()
    scope = anyio.CancelScope()

    async def inherit(response: Response | None) -> None:
        inherited.append(response)
        has_inherited.set()

    async def ask() -> None:
        with scope:
            await transport.request("POST", "/", b"{}", heir=inherit)
        has_gone.set()

    async with connected(server) as transport, anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        with time_limit():
            await server.has_arrived.wait()
            scope.cancel()
            await has_gone.wait()
            assert inherited == []
            server.may_answer.set()
            await has_inherited.wait()
    assert inherited == [Response(200, "application/json", b"{}")]


async def test_an_answer_that_comes_with_the_cancellation_is_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Either the caller gets it or the heir, whichever way the loop decides."""
    scope = anyio.CancelScope()
    had: list[Response | None] = []

    def send(
        self: Crew, function: Callable[[], Awaitable[Any]], kind: Kind = Kind.CALL
    ) -> Job[Any] | None:
        job = original(self, function, kind)
        if not scope.cancel_called and job is not None:
            job.when_ended(scope.cancel)
        return job

    async def inherit(response: Response | None) -> None:
        had.append(response)

    original = Crew.send
    async with connected(answering(OK)) as transport:
        with monkeypatch.context() as patch:
            patch.setattr(Crew, "send", send)
            with scope:
                had.append(await transport.request("GET", "/", heir=inherit))
        await wait_until(lambda: had)
    assert [response and response.status for response in had] == [200]


async def test_an_heir_is_not_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_INHERITED_PATIENCE", 0)
    server = Waiting()
    async with connected(server) as transport:
        async with anyio.create_task_group() as tasks:

            async def ask() -> None:
                await transport.request("GET", "/", heir=lambda response: ask())

            tasks.start_soon(ask)
            with time_limit():
                await server.has_arrived.wait()
            tasks.cancel_scope.cancel()
        with time_limit():
            await server.is_closed.wait()


# -- the end ---------------------------------------------------------------------------


@pytest.mark.parametrize("is_waited_for", [False, True])
async def test_closing_ends_requests_under_way(is_waited_for: bool) -> None:
    server = Waiting()
    lost = []
    async with connected(server) as transport:

        async def ask() -> None:
            lost.append(await failure_of(transport.request("GET", "/")))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            with time_limit():
                await server.has_arrived.wait()
            if is_waited_for:
                await transport.aclose()
                assert not transport._under_way
            else:
                transport.close()
        with time_limit():
            await server.is_closed.wait()
        late = await failure_of(transport.request("GET", "/"))
        assert (await failure_of(transport.stream("/"))).unsent
    assert [(str(each), each.unsent) for each in lost] == [
        ("the client was closed", False)
    ]
    assert (str(late), late.unsent) == ("the client is closed", True)


async def test_without_anybody_to_do_it_nothing_is_sent() -> None:
    transport = RemoteTransport("http://x", headers={}, timeout=1, crew=Crew())
    assert (await failure_of(transport.request("GET", "/"))).unsent
    assert (await failure_of(transport.stream("/"))).unsent
    await transport.aclose()
    transport.close()


async def test_a_crew_that_goes_takes_requests_and_streams_along() -> None:
    """And the idle connections are closed in spite of that, where that can be done."""
    has_arrived, idle_is_closed = anyio.Event(), anyio.Event()

    async def handle(stream: AnyByteStream) -> None:
        path = (await read_head(stream)).split()[1]
        if path == b"/held":
            has_arrived.set()
        else:
            await stream.send(OK if path == b"/idle" else CHUNKED)
        try:
            await stream.receive()
        finally:
            if path == b"/idle":
                idle_is_closed.set()

    lost = []

    async def ask() -> None:
        lost.append(await failure_of(transport.request("GET", "/held")))

    crew = Crew()
    async with serving(handle) as port, anyio.create_task_group() as tasks:
        tasks.start_soon(crew.work)
        await crew.wait_at_work()
        transport = RemoteTransport(
            f"http://127.0.0.1:{port}", headers={}, timeout=15, crew=crew
        )
        stream = await transport.stream("/stream")
        tasks.start_soon(ask)
        with time_limit():
            await has_arrived.wait()
        await transport.request("GET", "/idle")
        crew.dismiss()
        assert "has ended" in str(await failure_of(stream.receive()))
        await wait_until(lambda: lost)
        assert "has ended" in str(lost[0])
        assert not idle_is_closed.is_set()
        await transport.aclose()
        with time_limit():
            await idle_is_closed.wait()


# -- certificates ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def server_tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> str:
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return str(path)


@pytest.fixture
def trusted(
    ca_file: str, _plain_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", ca_file)


async def test_a_certificate_of_an_unknown_authority_is_refused(
    server_tls: ssl.SSLContext,
) -> None:
    async with (
        serving(answering(OK), server_tls) as port,
        transport_to(port, "https") as to,
    ):
        lost = await failure_of(to.request("POST", "/", b"{}"))
    assert lost.unsent
    assert f"certificate of https://127.0.0.1:{port} could not be verified" in str(lost)
    assert "SSL_CERT_FILE" in str(lost)
    assert isinstance(lost.__cause__, ssl.SSLCertVerificationError)


@pytest.mark.usefixtures("trusted")
async def test_the_environment_says_which_authority_to_trust(
    server_tls: ssl.SSLContext,
) -> None:
    async with (
        serving(answering(OK, OK), server_tls) as port,
        transport_to(port, "https") as to,
    ):
        assert (await to.request("POST", "/", b"{}")).body == b"{}"
        assert (await to.request("GET", "/")).body == b"{}"


async def test_an_authority_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    async with connected(answering(OK)) as transport:
        lost = await failure_of(transport.request("GET", "/"))
        assert lost.unsent
        assert "SSL_CERT_FILE" in str(lost)


async def test_https_where_none_is_spoken() -> None:
    async def handle(stream: AnyByteStream) -> None:
        await stream.receive()
        await stream.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with serving(handle) as port, transport_to(port, "https") as transport:
        lost = await failure_of(transport.request("GET", "/"))
    assert lost.unsent
    assert f"no TLS with https://127.0.0.1:{port}" in str(lost)


# -- clients of the caller's own -------------------------------------------------------


async def test_a_client_of_the_callers_own_is_used_as_it_is_and_not_closed(
    authority: trustme.CA, server_tls: ssl.SSLContext
) -> None:
    heads = []
    hooked = []

    async def handle(stream: AnyByteStream) -> None:
        heads.append(await read_head(stream))
        await stream.send(OK)

    async def hook(response: httpx.Response) -> None:
        hooked.append(await response.aread())

    context = ssl.create_default_context()
    authority.configure_trust(context)
    client = httpx.AsyncClient(
        verify=context,
        base_url="https://elsewhere.invalid/prefix",
        auth=("user", SECRET),
        headers={"user-agent": "mine"},
        event_hooks={"response": [hook]},
    )
    async with serving(handle, server_tls) as port:
        async with transport_to(port, "https", http_client=client) as transport:
            response = await transport.request("GET", "/x")
        assert not client.is_closed
        await client.aclose()
        async with transport_to(port, "https", http_client=client) as transport:
            lost = await failure_of(transport.request("GET", "/x"))
    assert response == Response(200, "application/json", b"{}")
    assert heads[0].startswith(b"GET /x HTTP/1.1\r\n")
    assert f"authorization: basic {ENCODED_SECRET}".encode().lower() in heads[0].lower()
    assert b"user-agent: mine" in heads[0].lower()
    assert hooked == [b"{}"]
    assert (str(lost), lost.unsent) == ("the http_client is closed", True)


async def test_the_timeout_holds_for_a_client_of_the_callers_own() -> None:
    async with (
        httpx.AsyncClient(timeout=None) as client,
        connected(silent, timeout=SOON, http_client=client) as transport,
    ):
        lost = await failure_of(transport.request("GET", "/"))
    assert not lost.unsent


@pytest.mark.parametrize(
    ("error", "unsent"),
    [
        (httpx.ConnectError("x"), True),
        (httpx.ReadError("x"), False),
        (httpx.ReadTimeout("x"), False),
        (httpx.RemoteProtocolError("x"), False),
        (httpx.LocalProtocolError("x"), False),
        (httpx.TooManyRedirects("x"), False),
    ],
)
async def test_of_another_transport_nothing_is_known_but_its_errors(
    error: Exception, unsent: bool
) -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        raise error

    async with (
        httpx.AsyncClient(transport=httpx.MockTransport(handle)) as client,
        transport_to(1, http_client=client) as transport,
    ):
        lost = await failure_of(transport.request("GET", "/"))
    assert lost.unsent is unsent


async def test_a_hook_that_raises_for_error_statuses_raises_nothing_of_httpx() -> None:
    async def hook(response: httpx.Response) -> None:
        response.raise_for_status()

    answer = b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n"
    async with (
        httpx.AsyncClient(event_hooks={"response": [hook]}) as client,
        connected(answering(answer), http_client=client) as transport,
    ):
        assert not (await failure_of(transport.request("GET", "/"))).unsent


async def test_what_a_hook_raises_of_its_own_is_raised() -> None:
    async def hook(response: httpx.Response) -> None:
        raise ZeroDivisionError

    async with (
        httpx.AsyncClient(event_hooks={"response": [hook]}) as client,
        connected(answering(OK), http_client=client) as transport,
    ):
        with pytest.raises(ZeroDivisionError):
            await transport.request("GET", "/")
        with pytest.raises(ZeroDivisionError):
            await transport.stream("/")


class Repeating(httpx.AsyncHTTPTransport):
    """Tries once more elsewhere, as transports of others do."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        with suppress(httpx.RemoteProtocolError):
            return await super().handle_async_request(request)
        raise httpx.ConnectError("the second time")


async def test_what_was_sent_once_stays_sent() -> None:
    async with (
        httpx.AsyncClient(transport=Repeating()) as client,
        connected(answering(b""), http_client=client) as transport,
    ):
        assert not (await failure_of(transport.request("GET", "/"))).unsent


# -- proxies ---------------------------------------------------------------------------


class Proxy:
    """Makes tunnels; has ``refusals`` for the first requests, None for a tunnel."""

    def __init__(self, *refusals: bytes | None) -> None:
        self.refusals = list(refusals)
        self.heads: list[bytes] = []

    async def __call__(self, client: AnyByteStream) -> None:
        head = await read_head(client)
        self.heads.append(head)
        refusal = self.refusals.pop(0) if self.refusals else None
        if refusal is not None:
            await client.send(refusal)
            return
        host, _, port = head.split()[1].rpartition(b":")
        async with await anyio.connect_tcp(host.decode(), int(port)) as server:
            await client.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._pump, server, client)
                await self._pump(client, server)
                tasks.cancel_scope.cancel()

    async def _pump(self, source: AnyByteStream, sink: AnyByteStream) -> None:
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            async for data in source:
                await sink.send(data)


@pytest.mark.usefixtures("trusted")
async def test_a_proxy_of_the_environment_is_used_with_its_credentials(
    server_tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Proxy()
    async with (
        serving(answering(OK), server_tls) as port,
        serving(proxy) as proxy_port,
    ):
        url = f"http://user:{SECRET}@127.0.0.1:{proxy_port}"
        monkeypatch.setenv("HTTPS_PROXY", url)
        async with transport_to(port, "https") as transport:
            assert (await transport.request("GET", "/")).body == b"{}"
    (head,) = proxy.heads
    assert head.startswith(b"CONNECT 127.0.0.1:%d HTTP/1.1\r\n" % port)
    assert f"Proxy-Authorization: Basic {ENCODED_SECRET}\r\n".encode() in head


@pytest.mark.usefixtures("trusted")
async def test_no_proxy_of_the_environment_where_it_says_so(
    server_tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch, free_tcp_port: int
) -> None:
    async with serving(answering(OK), server_tls) as port:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{free_tcp_port}")
        async with transport_to(port, "https") as transport:
            assert (await failure_of(transport.request("GET", "/"))).unsent
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        async with transport_to(port, "https") as transport:
            assert (await transport.request("GET", "/")).body == b"{}"


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (
            b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n",
            "makes no connection to https://127.0.0.1:1: 407 Proxy Auth",
        ),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", "502 Bad Gateway"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "does not speak HTTP"),
        (b"", "without an answer"),
        (b"HTTP/1.1 200 Connection established\r\n\r\n", "no "),
    ],
)
async def test_what_a_proxy_did_not_let_through_was_not_sent(
    refusal: bytes, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(Proxy(refusal)) as proxy_port:
        url = f"http://user:{SECRET}@127.0.0.1:{proxy_port}"
        monkeypatch.setenv("HTTPS_PROXY", url)
        async with transport_to(1, "https") as transport:
            lost = await failure_of(transport.request("POST", "/", b"{}"))
    assert lost.unsent
    assert words in str(lost)


async def test_a_proxy_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(silent) as proxy_port:
        url = f"http://user:{SECRET}@127.0.0.1:{proxy_port}"
        monkeypatch.setenv("HTTPS_PROXY", url)
        async with transport_to(1, "https", timeout=SOON) as transport:
            assert (await failure_of(transport.request("GET", "/"))).unsent


async def test_a_proxy_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, free_tcp_port: int
) -> None:
    url = f"http://user:{SECRET}@127.0.0.1:{free_tcp_port}"
    monkeypatch.setenv("HTTPS_PROXY", url)
    async with transport_to(1, "https") as transport:
        lost = await failure_of(transport.request("GET", "/"))
    assert lost.unsent
    assert f"127.0.0.1:{free_tcp_port} (on the way to https://127.0.0.1:1)" in str(lost)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (f"http://user:{SECRET}/x@127.0.0.1:1", "%2F"),
        (f"ftp://user:{SECRET}@127.0.0.1:1", "HTTPS_PROXY"),
        (f"socks5://user:{SECRET}@127.0.0.1:1", "httpx[socks]"),
    ],
)
async def test_a_proxy_that_is_none(
    url: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", url)
    async with transport_to(1, "https") as transport:
        lost = await failure_of(transport.request("GET", "/"))
    assert lost.unsent
    assert words in str(lost)


@pytest.mark.usefixtures("trusted")
async def test_a_tunnel_that_broke_leaves_its_place_to_others(
    server_tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In httpcore's pool it would stay for ever."""
    monkeypatch.setattr(module, "_MAX_CONNECTIONS", 1)
    proxy = Proxy(b"HTTP/1.1 200 Connection established\r\n\r\n")
    async with (
        serving(answering(OK), server_tls) as port,
        serving(proxy) as proxy_port,
    ):
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy_port}")
        async with transport_to(port, "https") as transport:
            assert (await failure_of(transport.request("GET", "/"))).unsent
            assert (await transport.request("GET", "/")).body == b"{}"


@pytest.mark.usefixtures("trusted")
async def test_others_whose_tunnels_hold_go_on_and_are_closed_after_use(
    server_tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = []

    async def ask() -> None:
        answers.append(await transport.request("GET", "/"))

    server = Waiting()
    proxy = Proxy(None, b"HTTP/1.1 200 Connection established\r\n\r\n")
    async with (
        serving(server, server_tls) as port,
        serving(proxy) as proxy_port,
    ):
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy_port}")
        async with (
            transport_to(port, "https") as transport,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(ask)
            with time_limit():
                await server.has_arrived.wait()
                assert (await failure_of(transport.request("GET", "/"))).unsent
                server.may_answer.set()
                await server.is_closed.wait()
    assert [answer.body for answer in answers] == [b"{}"]


# -- streams ---------------------------------------------------------------------------


async def test_a_stream_is_read_while_it_comes() -> None:
    heads = []

    async def handle(stream: AnyByteStream) -> None:
        heads.append((await read_head(stream)).lower())
        await stream.send(CHUNKED)
        await begun.wait()
        await stream.send(b"3\r\none\r\n")
        await first_was_read.wait()
        await stream.send(b"3\r\ntwo\r\n0\r\n\r\n")
        await stream.receive()

    begun, first_was_read = anyio.Event(), anyio.Event()
    headers = {"authorization": "Bearer x"}
    async with connected(handle, headers=headers) as transport:
        with time_limit():
            stream = await transport.stream("/events")
            assert (stream.status, stream.content_type) == (200, "text/event-stream")
            begun.set()
            assert await stream.receive() == b"one"
            first_was_read.set()
            assert await stream.receive() == b"two"
            assert await stream.receive() == b""
            assert await stream.receive() == b""
        stream.close()
        assert await stream.receive() == b""
    for line in (b"get /events ", b"accept: text/event-stream", b"bearer x"):
        assert line in heads[0]


async def test_a_stream_that_breaks_is_a_lost_connection() -> None:
    async with connected(answering(CHUNKED + b"3\r\none\r\n")) as transport:
        stream = await transport.stream("/")
        assert await stream.receive() == b"one"
        for _ in range(2):
            assert not (await failure_of(stream.receive())).unsent
        stream.close()


async def test_a_stream_that_is_refused_has_a_status_and_a_body() -> None:
    answer = b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\ngone"
    async with connected(answering(answer)) as transport:
        stream = await transport.stream("/")
        assert stream.status == 404
        assert await stream.receive() == b"gone"
        assert await stream.receive() == b""
        stream.close()


async def test_a_stream_that_is_silent_for_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_SILENCE", SOON)
    async with connected(saying_once(CHUNKED)) as transport:
        stream = await transport.stream("/")
        assert "within" in str(await failure_of(stream.receive()))
        stream.close()


async def test_a_cancelled_receive_loses_nothing() -> None:
    server = Waiting(answer=b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\none")

    async def handle(stream: AnyByteStream) -> None:
        await read_head(stream)
        await stream.send(CHUNKED)
        await server.may_answer.wait()
        await stream.send(b"3\r\none\r\n0\r\n\r\n")

    async with connected(handle) as transport:
        stream = await transport.stream("/")
        with anyio.move_on_after(0.01):
            await stream.receive()
        server.may_answer.set()
        with time_limit():
            assert await stream.receive() == b"one"
        stream.close()


async def test_closing_a_stream_ends_it() -> None:
    server = Waiting(answer=CHUNKED)
    server.may_answer.set()
    async with connected(server) as transport:
        stream = await transport.stream("/")
        async with anyio.create_task_group() as tasks:

            async def read() -> None:
                lost = await failure_of(stream.receive())
                assert "closed before its end" in str(lost)

            tasks.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            await anyio.to_thread.run_sync(stream.close)
        stream.close()
        with time_limit():
            await server.is_closed.wait()


async def test_a_stream_that_nobody_has_any_more_is_closed() -> None:
    server = Waiting(answer=CHUNKED)
    server.may_answer.set()
    async with connected(server) as transport:
        stream = await transport.stream("/")
        del stream
        gc.collect()
        with time_limit():
            await server.is_closed.wait()


async def test_a_stream_that_is_cancelled_before_it_begins_is_closed() -> None:
    server = Waiting()
    async with connected(server) as transport:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(transport.stream, "/")
            with time_limit():
                await server.has_arrived.wait()
            tasks.cancel_scope.cancel()
        with time_limit():
            await server.is_closed.wait()


async def test_closing_the_transport_ends_a_stream() -> None:
    server = Waiting(answer=CHUNKED)
    server.may_answer.set()
    async with connected(server) as transport:
        stream = await transport.stream("/")
        await transport.aclose()
        assert str(await failure_of(stream.receive())) == "the client was closed"
        with time_limit():
            await server.is_closed.wait()


MEBIBYTE = 1024 * 1024
MUCH = 50 * MEBIBYTE


async def test_who_reads_slowly_holds_the_server_up() -> None:
    sent = 0

    async def handle(stream: AnyByteStream) -> None:
        nonlocal sent
        await read_head(stream)
        await stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % MUCH)
        while sent < MUCH:
            await stream.send(bytes(MEBIBYTE))
            sent += MEBIBYTE

    async with connected(handle) as transport:
        stream = await transport.stream("/")
        before = -1
        while sent != before:
            before = sent
            await anyio.sleep(0.1)
        assert sent < MUCH / 2  # what the system takes in, in both directions
        received = 0
        while data := await stream.receive():
            received += len(data)
            assert len(stream._buffer._chunks) <= module._BUFFERED_CHUNKS
        assert received == MUCH
        stream.close()


async def test_a_stream_is_closed_while_it_waits_for_its_reader() -> None:
    """httpx's generators, which wait for nothing then, are not left to the collector."""

    async def handle(stream: AnyByteStream) -> None:
        await read_head(stream)
        await stream.send(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            while True:
                await stream.send(bytes(MEBIBYTE))
        finally:
            is_closed.set()

    is_closed = anyio.Event()
    async with connected(handle) as transport:
        stream = await transport.stream("/")
        full = module._BUFFERED_CHUNKS
        await wait_until(lambda: len(stream._buffer._chunks) == full)
        stream.close()
        with time_limit():
            await is_closed.wait()


# -- other event loops -----------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    clients: set[tuple[str, int]]

    def do_GET(self) -> None:
        self.clients.add(self.client_address)
        self.send_response(200)
        self.send_header("content-length", "5")
        if self.path == "/last":
            self.send_header("connection", "close")
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving_from_a_thread() -> Iterator[tuple[int, set[tuple[str, int]]]]:
    clients: set[tuple[str, int]] = set()
    handler = type("_Handler", (Handler,), {"clients": clients})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        try:
            yield server.server_address[1], clients
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def hired() -> Iterator[Crew]:
    crew = Crew(may_hire=True)
    try:
        yield crew
    finally:
        crew.dismiss()
        if crew._thread is not None:
            crew._thread.join()


def test_event_loops_in_a_row_share_the_connections(
    anyio_backend: tuple[str, object],
) -> None:
    async def use() -> None:
        with time_limit():
            assert (await transport.request("GET", "/")).body == b"hello"
            stream = await transport.stream("/")
            assert await stream.receive() == b"hello"
            assert await stream.receive() == b""
            stream.close()
            # The stream's connection is back in the pool when its job has ended.
            await wait_until(lambda: not transport._under_way)

    with serving_from_a_thread() as (port, clients), hired() as crew:
        transport = RemoteTransport(
            f"http://127.0.0.1:{port}", headers={}, timeout=15, crew=crew
        )
        for backend in (anyio_backend[0], "asyncio", "trio"):
            anyio.run(use, backend=backend)
        assert len(clients) == 1
        asyncio.run(transport.aclose())
        assert (transport._pool, transport._under_way) == (None, set())


def test_closing_without_waiting_closes_before_the_crew_goes(
    anyio_backend: tuple[str, object],
) -> None:
    async def use() -> None:
        with time_limit():
            await transport.request("GET", "/")

    with serving_from_a_thread() as (port, _), hired() as crew:
        transport = RemoteTransport(
            f"http://127.0.0.1:{port}", headers={}, timeout=15, crew=crew
        )
        anyio.run(use, backend=anyio_backend[0])
        transport.close()
        crew.dismiss()
        # What is left open now is a ResourceWarning, and keeps the server from its end.


def test_one_that_was_never_used_hires_nobody(anyio_backend: object) -> None:
    with hired() as crew:
        transport = RemoteTransport("http://x", headers={}, timeout=1, crew=crew)
        asyncio.run(transport.aclose())
        transport.close()
        assert crew._thread is None


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child_makes_connections_of_its_own(anyio_backend: object) -> None:
    async def use() -> None:
        with time_limit():
            assert (await transport.request("GET", "/")).body == b"hello"

    def has_pool() -> bool:
        return transport._pool is not None

    with serving_from_a_thread() as (port, clients), hired() as crew:
        transport = RemoteTransport(
            f"http://127.0.0.1:{port}", headers={}, timeout=15, crew=crew
        )
        asyncio.run(use())
        assert has_pool()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                warnings.simplefilter("ignore")  # the parent's connections are dropped
                assert not has_pool()
                asyncio.run(use())
                asyncio.run(transport.aclose())
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert len(clients) == 2
        asyncio.run(use())
        assert len(clients) == 2
        asyncio.run(transport.aclose())
