"""StepflowClient: where it goes, what it repeats, and what it keeps to itself."""

from __future__ import annotations

import asyncio
import base64
import gc
import os
import threading
import traceback
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, nullcontext, suppress
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest
from anyio.abc import SocketAttribute, SocketStream

from stepflow_runtime import (
    AccessDeniedError,
    ConnectionLostError,
    RunStatus,
    ServerFaultError,
    StepflowClient,
    StepflowError,
    StepflowExecutor,
    StepflowRuntime,
)
from stepflow_runtime import client as client_module
from stepflow_runtime.transport.direct import DirectTransport

from .conftest import ECHO, SLEEP, each_backend, freeze, wait_until

HEALTHY = b'{"status":"healthy"}'


def answer(status: int = 200, body: bytes = HEALTHY) -> bytes:
    return (
        f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


class Web:
    """A server that gives its answers in turn, and the last one for ever.

    An empty answer closes the connection.
    """

    def __init__(self, *answers: bytes) -> None:
        self.answers = list(answers)
        self.has_been_looked_at = False
        self.requests: list[bytes] = []
        self.port = 0

    async def handle(self, stream: SocketStream) -> None:
        async with stream:
            try:
                while True:
                    head = b""
                    while b"\r\n\r\n" not in head:
                        head += await stream.receive()
                    if not self.has_been_looked_at and head.startswith(b"GET"):
                        # What a client asks first: is this a server that it knows?
                        self.has_been_looked_at = True
                        await stream.send(answer())
                        continue
                    self.requests.append(head)
                    one = self.answers.pop(0) if self.answers[1:] else self.answers[0]
                    if not one:
                        return
                    await stream.send(one)
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                pass

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@asynccontextmanager
async def serving(*answers: bytes) -> AsyncIterator[Web]:
    web = Web(*answers)
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    web.port = listener.extra(SocketAttribute.local_port)
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, web.handle)
        yield web
        tasks.cancel_scope.cancel()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_PAUSES", (0.001,) * 5)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


# -- the address -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://localhost:7837", "http://localhost:7837"),
        ("http://localhost:7837/", "http://localhost:7837"),
        ("HTTP://LocalHost", "http://localhost:80"),
        ("https://example.org", "https://example.org:443"),
        ("https://example.org/flows/api/v1", "https://example.org:443/flows"),
        ("http://h/api/v1/", "http://h:80"),
        ("http://[::1]:5", "http://[::1]:5"),
        ("http://user:secret@h:1", "http://h:1"),
        ("https://bücher.example", "https://xn--bcher-kva.example:443"),
    ],
)
def test_an_address_is_understood(given: str, url: str) -> None:
    client = StepflowClient(given)
    assert client.url == url
    assert repr(client) == f"<StepflowClient {url}>"
    client.close()


@pytest.mark.parametrize(
    "url",
    [
        *("", "localhost:7837", "ftp://h", "http://", "http://h:x", "http://h:99999"),
        *("http://h?x=1", "http://h#x", "http://h/a b", "http://[::1", "http://h/ü"),
        *("http://u:p/w@h", "http://u:1/w@h", "http://u:p#w@h", "http://u:p?w@h"),
    ],
)
def test_what_is_no_address_is_refused_by_name(url: str) -> None:
    with pytest.raises(ValueError, match="^url"):
        StepflowClient(url)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"headers": ["x"]}, TypeError, "headers must be a mapping"),
        ({"headers": {"a": 1}}, TypeError, "'a' does not"),
        ({"headers": {"a b": "x"}}, ValueError, "'a b' is not the name"),
        ({"headers": {"": "x"}}, ValueError, "not the name of a header"),
        ({"headers": {"a": "x\r\nb: c"}}, ValueError, "the value of 'a'"),
        ({"headers": {"a": "€"}}, ValueError, "the value of 'a'"),
        ({"headers": {"Content-Length": "5"}}, ValueError, "is set by each request"),
        ({"timeout": 0}, ValueError, "timeout must be"),
        ({"timeout": "1"}, TypeError, "timeout must be"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(
    options: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        StepflowClient("http://h", **options)


def test_errors_of_construction_do_not_show_credentials() -> None:
    for url in (
        *("http://user:hunter2@h:x", "ftp://user:hunter2@h", "http://u:hunter2@"),
        *("http://u:hunter2/x@h", "http://u:1/hunter2@h", "http://u:hunter2#x@h"),
    ):
        with pytest.raises(ValueError) as caught:
            StepflowClient(url)
        assert "hunter2" not in "".join(traceback.format_exception(caught.value))
    headers = {"a": "hunter2\n"}
    with pytest.raises(ValueError) as caught:
        StepflowClient("http://h", headers=headers)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


# -- the way there ---------------------------------------------------------------------

pytestmark = pytest.mark.anyio


@each_backend
async def test_headers_and_credentials_are_sent_and_never_shown() -> None:
    denied = answer(401, b"")
    async with serving(denied) as web:
        url = f"http://user:p%40ss@127.0.0.1:{web.port}/prefix/"
        async with StepflowClient(url, headers={"X-Team": "blue"}) as client:
            with pytest.raises(AccessDeniedError, match="credentials are missing") as e:
                await client.run(ECHO)
    head = web.requests[0].decode().lower()
    assert head.startswith("post /prefix/api/v1/flows http/1.1\r\n")
    expected = base64.b64encode(b"user:p@ss").decode()
    assert f"\r\nauthorization: basic {expected}\r\n".lower() in head
    assert "\r\nx-team: blue\r\n" in head
    shown = "".join(traceback.format_exception(e.value)) + repr(client)
    assert "p@ss" not in shown and "p%40ss" not in shown and expected not in shown


@each_backend
async def test_an_authorization_header_outranks_the_urls() -> None:
    async with serving(answer()) as web:
        url = f"http://user:pass@127.0.0.1:{web.port}"
        async with StepflowClient(url, headers={"Authorization": "Bearer t"}) as client:
            await client.health()
    assert b"authorization: Bearer t\r\n" in web.requests[0]
    assert b"Basic" not in web.requests[0]


@each_backend
async def test_plain_http_takes_the_lean_way_unless_a_proxy_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def name(client: StepflowClient) -> str:
        client.close()
        return type(client._servers.all[0].transport).__name__

    assert name(StepflowClient("http://h")) == "_Timed"
    assert name(StepflowClient("https://h")) == "RemoteTransport"
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    assert name(StepflowClient("http://h")) == "RemoteTransport"
    monkeypatch.setenv("no_proxy", "h,other")
    assert name(StepflowClient("http://h")) == "_Timed"
    assert name(StepflowClient("http://h2")) == "RemoteTransport"


@each_backend
async def test_a_name_is_resolved() -> None:
    async with (
        serving(answer()) as web,
        StepflowClient(f"http://localhost:{web.port}") as client,
    ):
        assert (await client.health()).is_healthy


# -- what is repeated ------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("trouble", [b"", answer(503, b""), answer(429, b"")])
async def test_what_is_safe_to_repeat_is_repeated(trouble: bytes) -> None:
    async with (
        serving(trouble, trouble, answer()) as web,
        StepflowClient(web.url) as client,
    ):
        assert (await client.health()).is_healthy
    assert len(web.requests) == 3


@each_backend
async def test_but_not_for_ever() -> None:
    async with serving(answer(503, b"")) as web, StepflowClient(web.url) as client:
        with pytest.raises(ServerFaultError):
            await client.health()
    assert len(web.requests) == 6


@each_backend
async def test_a_run_that_may_have_begun_is_never_started_again() -> None:
    stored = (answer(200, b'{"flowId":"f"}'), answer(200, b'{"blobId":"f"}'))
    for trouble in (b"", answer(503, b"")):
        async with serving(*stored, trouble) as web, StepflowClient(web.url) as client:
            with pytest.raises((ConnectionLostError, ServerFaultError)):
                await client.submit(ECHO)
        assert [request.split()[1] for request in web.requests] == [
            *(b"/api/v1/flows", b"/api/v1/blobs", b"/api/v1/runs")
        ]


@each_backend
async def test_a_refusal_is_not_repeated() -> None:
    async with serving(answer(404, b"")) as web, StepflowClient(web.url) as client:
        with pytest.raises(StepflowError):
            await client.get_run("r")
    assert len(web.requests) == 1


@each_backend
async def test_nobody_there_is_tried_some_times_and_told(free_tcp_port: int) -> None:
    async with StepflowClient(f"http://127.0.0.1:{free_tcp_port}") as client:
        with pytest.raises(ConnectionLostError, match="no connection to the server"):
            await client.submit(ECHO)


@each_backend
async def test_a_server_that_hangs_is_not_waited_for_without_end() -> None:
    async with (
        StepflowRuntime.start(shutdown_timeout=0.1) as runtime,
        StepflowClient(runtime.url, timeout=0.05) as client,
    ):
        assert (await client.run(SLEEP, 400)).is_success  # that is not hanging
        freeze(runtime)
        with pytest.raises(ConnectionLostError, match=r"within 0\.05 s"):
            await client.health()


# -- its life --------------------------------------------------------------------------


@each_backend
async def test_a_closed_client_says_so() -> None:
    async with serving(answer()) as web:
        async with StepflowClient(web.url) as client:
            await client.health()
        with pytest.raises(ConnectionLostError, match="closed"):
            await client.health()


@each_backend
async def test_a_client_of_ones_own_has_to_be_entered() -> None:
    async with serving(answer()) as web, httpx.AsyncClient() as own:
        client = StepflowClient(web.url, http_client=own)
        with pytest.raises(RuntimeError, match="has to be entered"):
            await client.health()
        async with client:
            assert (await client.health()).is_healthy
        assert not own.is_closed


@each_backend
@pytest.mark.parametrize("entered", [True, False])
async def test_a_cancelled_caller_goes_at_once_and_its_run_is_cancelled(
    entered: bool,
) -> None:
    """Before its id is known, and after that."""

    async def cancelled(after: float) -> None:
        with anyio.move_on_after(after) as scope:
            await client.run(flow_id, 30_000)
        assert scope.cancelled_caught

    async def statuses() -> list[RunStatus]:
        return [run.status for run in await runtime.list_runs()]

    async with StepflowRuntime.start() as runtime:
        client = StepflowClient(runtime.url)
        flow_id = await runtime.store_flow(SLEEP)
        around = client if entered else nullcontext()
        async with around, anyio.create_task_group() as tasks:
            tasks.start_soon(cancelled, 0.4)
            tasks.start_soon(cancelled, 1.5)
        if not entered:
            await wait_until(lambda: not client._crew.has_errands)
            await client.aclose()
        # Who leaves a client that was entered has waited for it.
        assert await statuses() == [RunStatus.CANCELLED] * 2


def test_a_client_works_in_a_program_without_an_event_loop() -> None:
    with StepflowRuntime.start() as runtime, StepflowClient(runtime.url) as client:
        assert isinstance(client, StepflowExecutor)
        for backend in ("asyncio", "trio"):
            result = anyio.run(client.run, ECHO, 5, backend=backend)
            assert result.unwrap() == 5


@each_backend
async def test_a_server_that_was_restarted_gets_the_flow_again() -> None:
    """Its store was in memory; the client has not noticed."""
    async with StepflowRuntime.start() as first:
        port = first.port
        client = StepflowClient(first.url)
        assert (await client.run(ECHO, 1)).output == 1
    async with StepflowRuntime.start(port=port):
        assert (await client.run(ECHO, 2)).output == 2
    await client.aclose()


@each_backend
async def test_a_forsaken_stream_gives_its_connection_back() -> None:
    async with StepflowRuntime.start() as runtime:
        transport = DirectTransport(runtime.port, max_connections=1)
        run_id = await runtime.submit(SLEEP, 30_000)
        stream = await transport.stream(
            f"/api/v1/runs/{run_id}/events?runId={run_id}&since=0"
        )
        assert stream.status == 200
        assert (await stream.receive()).startswith(b"data:")
        with anyio.move_on_after(0.05) as scope:
            await transport.request("GET", "/api/v1/health")
        assert scope.cancelled_caught
        stream.close()
        with anyio.fail_after(10):
            response = await transport.request("GET", "/api/v1/health")
        assert response.status == 200
        await transport.aclose()


@each_backend
async def test_an_heir_gets_the_answer_that_nobody_waits_for() -> None:
    from stepflow_runtime.crew import Crew

    inherited: list[Any] = []

    async def heir(response: Any) -> None:
        inherited.append(response)

    async with StepflowRuntime.start() as runtime, anyio.create_task_group() as tasks:
        crew = Crew()
        tasks.start_soon(crew.work)
        await crew.wait_at_work()
        flow_id = await runtime.store_flow(SLEEP)
        transport = DirectTransport(runtime.port, crew=crew)
        body = b'{"flowId":"%s","input":[30000],"wait":true,"timeoutSecs":1}'
        with anyio.move_on_after(0.4):
            await transport.request(
                "POST", "/api/v1/runs", body % flow_id.encode(), heir=heir
            )
        assert not inherited
        await wait_until(lambda: inherited)
        assert inherited[0].status == 200
        with anyio.move_on_after(0.4):
            await transport.request("POST", "/api/v1/runs", body % flow_id.encode())
        assert not crew.has_errands  # nobody was named
        await transport.aclose()
        crew.dismiss()


@each_backend
async def test_a_scope_around_the_client_cancels_its_runs_too() -> None:
    async with StepflowRuntime.start() as runtime:
        flow_id = await runtime.store_flow(SLEEP)
        with anyio.move_on_after(0.4) as scope:
            async with StepflowClient(runtime.url) as client:
                await client.run(flow_id, 30_000)
        assert scope.cancelled_caught
        (run,) = await runtime.list_runs()
        assert run.status is RunStatus.CANCELLED


def test_a_second_cancellation_ends_the_leaving_too() -> None:
    """asyncio's own stops at no shield: here it comes while the client settles."""

    async def use(url: str) -> None:
        async with StepflowClient(url) as client:
            flow_id = await client.store_flow(SLEEP)
            entered.set()
            await client.run(flow_id, 30_000)

    async def main() -> None:
        task = asyncio.create_task(use(runtime.url))
        await entered.wait()
        await asyncio.sleep(0.2)
        freeze(runtime)  # nobody answers to what is left behind
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0.1)
        done, _ = await asyncio.wait([task], timeout=20)
        assert done and task.cancelled()

    entered = asyncio.Event()
    with StepflowRuntime.start(shutdown_timeout=0.1) as runtime:
        asyncio.run(main())


@each_backend
async def test_leaving_a_client_ends_what_was_iterated() -> None:
    async with StepflowRuntime.start() as runtime:
        async with StepflowClient(runtime.url) as client:
            results = client.run_many(SLEEP, [0, 30_000, 30_000])
            assert (await anext(results))[0] == 0
        assert {run.status for run in await runtime.list_runs()} == {
            *(RunStatus.CANCELLED, RunStatus.COMPLETED)
        }
        with pytest.raises((StopAsyncIteration, ConnectionLostError)):
            await anext(results)


@each_backend
async def test_a_forsaken_client_still_cancels_what_was_left_to_it() -> None:
    async with StepflowRuntime.start() as runtime:
        client = StepflowClient(runtime.url)
        await client.store_flow(SLEEP)
        with anyio.move_on_after(0.4):
            await client.run(SLEEP, 30_000)
        await (
            anyio.lowlevel.checkpoint()
        )  # until then the task has the cancellation, and its frames
        del client
        gc.collect()
        (run,) = await runtime.list_runs()
        result = await runtime.get_result(run.run_id, timeout=20)
        await wait_until(lambda: "stepflow-runtime crew" not in thread_names())
    assert result.error is not None and result.error.code == "CANCELLED"


def thread_names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def test_a_forked_child_makes_connections_of_its_own() -> None:
    with StepflowRuntime.start() as runtime, StepflowClient(runtime.url) as client:
        assert anyio.run(client.health).is_healthy
        child = os.fork()
        if child == 0:
            status = 1
            with suppress(BaseException):
                status = 0 if anyio.run(client.health).is_healthy else 2
            os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert anyio.run(client.health).is_healthy


def test_headers_are_a_mapping_of_any_kind() -> None:
    headers: Mapping[str, str] = httpx.Headers({"X-Y": "z"})
    StepflowClient("http://h", headers=headers).close()
