"""A client of several servers: it goes on at a survivor, and sends no run twice unasked.

Faults come from relays before one real server, which stands for servers that share a store: what
was lost on the way, and what was not, is counted where it counts. What becomes of runs
whose server is killed is tried with two servers on one store.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import httpx
import msgspec
import pytest
import trustme
from anyio.abc import SocketAttribute, SocketStream
from anyio.streams.tls import TLSListener
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflow_runtime import (
    ConnectionLostError,
    FlowId,
    RunEvent,
    RunStatus,
    ServerFaultError,
    StepflowClient,
    StepflowRuntime,
    SubmitInterruptedError,
)
from stepflow_runtime import client as client_module
from stepflow_runtime.failover import PENALTY, Server, Servers
from stepflow_runtime.transport import Response

from .conftest import ECHO, SLEEP, each_backend, wait_until
from .executors import CONFIG

pytestmark = pytest.mark.anyio

# Nobody listens there.
DEAD = "http://127.0.0.1:1"

HEALTH = "GET /api/v1/health"
SUBMIT = "POST /api/v1/runs"


@pytest.fixture(autouse=True)
def _no_proxy_and_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever pauses before all servers were asked does not get far."""
    monkeypatch.setattr(client_module, "_PAUSES", (60.0,) * 5)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_PAUSES", (0.0,) * 5)


# -- relays ------------------------------------------------------------------------------

PASS = "pass"
UNHEARD = "unheard"  # closed after the request came, which the server does not get
UNANSWERED = "unanswered"  # the server gets it, and its answer is lost
HALF = "half"  # and half of its answer is lost
SILENCE = "silence"  # neither an answer nor an end

FAULTS = (UNHEARD, UNANSWERED, HALF, "502", "503", "504")


class Relay:
    """Stands before a server, and does to each request what ``fault`` says of it.

    :ivar seen: the requests that came, without queries
    :ivar submitted: the inputs of the runs that came
    """

    def __init__(self, target: int, fault: Callable[[str], str]) -> None:
        self.target = target
        self.fault = fault
        self.seen: list[str] = []
        self.submitted: list[Any] = []
        self.url = ""

    async def handle(self, stream: SocketStream) -> None:
        async with stream:
            try:
                head, body = await read_message(stream)
                what = self.note(head, body)
                await self.answer(stream, self.fault(what), head, body)
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                pass

    def note(self, head: bytes, body: bytes) -> str:
        method, path, _ = head.decode().split(" ", 2)
        what = f"{method} {path.partition('?')[0]}"
        self.seen.append(what)
        if what == SUBMIT:
            self.submitted.extend(msgspec.json.decode(body)["input"])
        return what

    async def answer(
        self, stream: SocketStream, fault: str, head: bytes, body: bytes
    ) -> None:
        if fault == UNHEARD:
            return
        if fault == SILENCE:
            await stream.receive()
        elif fault.isdigit():
            await stream.send(b"HTTP/1.1 %s X\r\n" % fault.encode() + NOTHING)
        else:
            await self.forward(stream, fault, head, body)

    async def forward(
        self, stream: SocketStream, fault: str, head: bytes, body: bytes
    ) -> None:
        lines = head.split(b"\r\n")
        kept = [line for line in lines if not line.lower().startswith(b"connection:")]
        head = b"\r\n".join([kept[0], b"Connection: close", *kept[1:]])
        async with await anyio.connect_tcp("127.0.0.1", self.target) as server:
            await server.send(head + body)
            if fault.startswith("first "):
                await copy_some(server, stream, int(fault[6:]))
            elif fault == PASS:
                await copy_some(server, stream, None)
            else:
                answer = b"".join([part async for part in server])
                if fault == HALF:
                    await stream.send(answer[: len(answer) // 2])


NOTHING = b"Content-Length: 0\r\nConnection: close\r\n\r\n"


async def read_message(stream: SocketStream) -> tuple[bytes, bytes]:
    head = b""
    while b"\r\n\r\n" not in head:
        head += await stream.receive()
    head, _, body = head.partition(b"\r\n\r\n")
    length = 0
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            length = int(line[15:])
    while len(body) < length:
        body += await stream.receive()
    return head + b"\r\n\r\n", body


async def copy_some(source: SocketStream, to: SocketStream, most: int | None) -> None:
    async for part in source:
        await to.send(part[:most])
        if most is not None and (most := most - len(part)) <= 0:
            return


def in_turn(*faults: str, only: str | None = None) -> Callable[[str], str]:
    """These faults, one for each request but those for health; and none after them."""
    left = list(faults)

    def fault(what: str) -> str:
        if what == HEALTH or only not in (None, what) or not left:
            return PASS
        return left.pop(0)

    return fault


def always(fault: str, only: str | None = None) -> Callable[[str], str]:
    return lambda what: PASS if what == HEALTH or only not in (None, what) else fault


@asynccontextmanager
async def relays(
    port: int, *faults: Callable[[str], str], tls: ssl.SSLContext | None = None
) -> AsyncIterator[list[Relay]]:
    """A relay for each, all before the same server. ``tls`` is for the last one."""
    made = [Relay(port, fault) for fault in faults]
    listeners = []
    async with AsyncExitStack() as stack:
        for relay in made:
            tcp = await anyio.create_tcp_listener(local_host="127.0.0.1")
            listener: Any = await stack.enter_async_context(tcp)
            number = listener.extra(SocketAttribute.local_port)
            relay.url = f"http://127.0.0.1:{number}"
            if tls is not None and relay is made[-1]:
                listener = TLSListener(listener, tls, standard_compatible=False)
                relay.url = f"https://127.0.0.1:{number}"
            listeners.append(listener)
        async with anyio.create_task_group() as tasks:
            for listener, relay in zip(listeners, made, strict=True):
                tasks.start_soon(listener.serve, relay.handle)
            yield made
            tasks.cancel_scope.cancel()


@asynccontextmanager
async def clustered(
    *faults: Callable[[str], str], **options: Any
) -> AsyncIterator[tuple[StepflowClient, StepflowRuntime, list[Relay]]]:
    """A client of a server behind relays, and the server."""
    with anyio.fail_after(30):
        async with (
            StepflowRuntime.start(CONFIG) as runtime,
            relays(runtime.port, *faults) as made,
            StepflowClient([relay.url for relay in made], **options) as client,
        ):
            yield client, runtime, made


# -- which one is asked ------------------------------------------------------------------


class Nowhere:
    """A transport that is not used."""


def a_cluster(number: int) -> tuple[Servers, list[Server], list[float]]:
    now = [100.0]
    transport: Any = Nowhere()
    made = [Server(f"http://h{index}", "", transport) for index in range(number)]
    return Servers(made, lambda: now[0]), made, now


def test_the_one_that_answers_is_kept_to() -> None:
    servers, (a, b, c), now = a_cluster(3)
    assert list(servers.in_turn()) == [a, b, c]
    servers.failed(a)
    assert list(servers.in_turn()) == [b, c, a]
    servers.answered(b)
    now[0] += 2 * PENALTY
    assert list(servers.in_turn()) == [b, c, a]


def test_one_that_failed_is_asked_last_until_its_penalty_is_over() -> None:
    servers, (a, b, c), now = a_cluster(3)
    servers.failed(c)
    servers.failed(a)
    assert list(servers.in_turn()) == [b, c, a]
    now[0] += 1
    servers.failed(b)
    assert servers.favourite is not b
    assert set(servers.in_turn()) == {a, b, c}
    now[0] += PENALTY
    servers.failed(servers.favourite)
    assert servers.in_turn()[0] is servers.favourite
    servers.answered(a)  # an answer to what was asked long ago, perhaps
    servers.failed(b)
    servers.failed(c)
    assert servers.in_turn()[0] is a


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2), st.floats(0, 9))))
def test_none_is_ever_left_out_and_the_favourite_comes_first(
    told: list[tuple[bool, int, float]],
) -> None:
    servers, made, now = a_cluster(3)
    for is_well, number, seconds in told:
        (servers.answered if is_well else servers.failed)(made[number])
        turn = list(servers.in_turn())
        assert sorted(turn, key=made.index) == made
        if servers.favourite.unwell_until <= now[0]:
            assert turn[0] is servers.favourite
        penalties = [server.unwell_until > now[0] for server in turn]
        assert penalties == sorted(penalties)
        now[0] += seconds


# -- addresses ---------------------------------------------------------------------------


def test_several_addresses_are_told_without_credentials() -> None:
    client = StepflowClient(("http://user:hunter2@a", "https://b/flows/api/v1"))
    assert client.urls == ("http://a:80", "https://b:443/flows")
    assert client.url == "http://a:80"
    assert repr(client) == "<StepflowClient http://a:80, https://b:443/flows>"
    client.close()
    with StepflowClient(["http://a"]) as client:
        assert client.urls == (client.url,) == ("http://a:80",)


@pytest.mark.parametrize(
    ("url", "kind", "words"),
    [
        ([], ValueError, "url is an empty sequence"),
        (["http://a", "ftp://b"], ValueError, r"^url\[1\] must begin with"),
        (["http://a", 1], TypeError, r"^url\[1\] must be a string"),
        (["http://h", "http://h:80/"], ValueError, r"^url\[1\] is that of url\[0\]"),
        (["http://u:hunter2@h", "http://h"], ValueError, r"url\[0\]: http://h:80$"),
        (["http://a", "http://u:hunter2/x@b"], ValueError, r"^url\[1\]"),
        ({"http://a"}, TypeError, "a string or a sequence of strings, not set"),
        (b"http://a", TypeError, "a sequence of strings, not bytes"),
        (None, TypeError, "not NoneType"),
    ],
)
def test_addresses_that_cannot_work_are_refused_by_name(
    url: Any, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words) as caught:
        StepflowClient(url)
    assert "hunter2" not in str(caught.value)


@each_backend
async def test_each_server_gets_its_credentials_and_all_get_the_headers() -> None:
    heads: list[bytes] = []

    async def handle(stream: SocketStream) -> None:
        async with stream:
            heads.append((await read_message(stream))[0])

    async with (
        await anyio.create_tcp_listener(local_host="127.0.0.1") as first,
        await anyio.create_tcp_listener(local_host="127.0.0.1") as second,
        anyio.create_task_group() as tasks,
    ):
        urls = []
        for user, listener in (("ada", first), ("bob", second)):
            port = listener.extra(SocketAttribute.local_port)
            urls.append(f"http://{user}:x@127.0.0.1:{port}")
            tasks.start_soon(listener.serve, handle)
        async with StepflowClient(urls, headers={"x-team": "blue"}) as client:
            with anyio.move_on_after(10):
                tasks.start_soon(client.health)
                await wait_until(lambda: len(heads) == 2)
            tasks.cancel_scope.cancel()
    assert b"authorization: Basic YWRhOng=" in heads[0]
    assert b"authorization: Basic Ym9iOng=" in heads[1]
    assert all(b"x-team: blue" in head for head in heads)


# -- what is safe to repeat --------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("fault", [*FAULTS, "429"])
async def test_a_read_goes_on_at_the_next_server_at_once_and_stays_there(
    fault: str,
) -> None:
    async with clustered(always(fault), always(PASS)) as (client, runtime, (a, b)):
        run_id = await runtime.submit(ECHO, 1)
        assert client.url == a.url
        for _ in range(3):
            assert (await client.get_result(run_id)).output == 1
        assert client.url == b.url
    assert [len(each.seen) for each in (a, b)] == [2, 1 + 3 * 2]


@each_backend
async def test_a_server_that_is_not_there_or_silent_is_left_for_another() -> None:
    async with (
        StepflowRuntime.start(CONFIG) as runtime,
        relays(runtime.port, always(SILENCE)) as (silent,),
        full_backlog() as hanging,
        StepflowClient([DEAD, hanging, silent.url, runtime.url], timeout=0.4) as client,
    ):
        with anyio.fail_after(10):
            # Where no connection comes about, even a run may be sent elsewhere; silence of a
            # server that has not told its version yet is no submit.
            assert (await client.run(ECHO, 1)).output == 1
        assert client.url == runtime.url
        assert SUBMIT not in silent.seen
        assert len(await runtime.list_runs()) == 1


@asynccontextmanager
async def full_backlog() -> AsyncIterator[str]:
    """The address of somebody who takes no connection and refuses none."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        port = server.getsockname()[1]
        sockets = [socket.socket() for _ in range(4)]
        try:
            for each in sockets:
                each.setblocking(False)
                each.connect_ex(("127.0.0.1", port))
            yield f"http://127.0.0.1:{port}"
        finally:
            for each in sockets:
                each.close()


@each_backend
async def test_a_wait_for_a_runs_end_goes_on_however_its_server_goes() -> None:
    async def waited(fault: str) -> None:
        def but_for_submits(what: str) -> str:
            return PASS if what in (HEALTH, SUBMIT) else fault

        faults = but_for_submits, always(PASS)
        async with clustered(*faults, timeout=0.3) as (client, runtime, (_, b)):
            flow_id = await runtime.store_flow(SLEEP)
            assert (await client.run(flow_id, 1300)).is_success
            assert len(await runtime.list_runs()) == 1
            assert client.url == b.url

    async with anyio.create_task_group() as tasks:
        for fault in (UNHEARD, UNANSWERED, HALF, SILENCE):
            tasks.start_soon(waited, fault)


def test_one_of_several_servers_is_asked_to_wait_for_a_short_time_only() -> None:
    """It does not notice the end of a run that another one has before that time is over."""
    with StepflowClient([DEAD, "http://h"]) as several, StepflowClient(DEAD) as one:
        assert [several._next_wait(waited) for waited in (0, 5, 9, 600)] == [1, 1, 2, 5]
        assert [one._next_wait(waited) for waited in (0, 600)] == [30, 30]


@each_backend
async def test_when_none_can_be_reached_the_error_names_all(
    short_pauses: None,
) -> None:
    async with clustered(always(UNHEARD), always(UNHEARD)) as (client, _, (a, b)):
        with pytest.raises(ConnectionLostError, match="none of the 2 servers") as lost:
            await client.get_run("r")
        assert a.url in str(lost.value) and b.url in str(lost.value)
        assert not lost.value.unsent
        # As often as a single server would have been asked, each.
        for relay in (a, b):
            assert relay.seen.count("GET /api/v1/runs/r") == 6
    with StepflowClient([DEAD, "http://user:hunter2@127.0.0.1:2"]) as client:
        with pytest.raises(ConnectionLostError, match=r"none of .*:1: .*:2: ") as lost:
            await client.submit(ECHO)
        assert lost.value.unsent and "hunter2" not in str(lost.value)
    async with clustered(always("503"), always(UNHEARD)) as (client, _, _):
        with pytest.raises(ServerFaultError):
            await client.get_run("r")


@each_backend
async def test_silent_servers_together_have_the_patience_that_one_has(
    short_pauses: None,
) -> None:
    options = {"timeout": 0.1}
    async with clustered(*[always(SILENCE)] * 4, **options) as (client, _, made):
        with pytest.raises(ConnectionLostError, match="none of the 4 servers"):
            await client.get_run("r")
        asked = sum(relay.seen.count("GET /api/v1/runs/r") for relay in made)
        assert 2 <= asked <= 7


@each_backend
async def test_the_first_one_of_all_that_recovers_is_used(short_pauses: None) -> None:
    async with clustered(
        in_turn(*[UNHEARD] * 5), in_turn(*[UNHEARD] * 3), always(UNHEARD)
    ) as (client, runtime, (_, b, _c)):
        assert (await client.get_result(await runtime.submit(ECHO, 1))).output == 1
        assert client.url == b.url


@each_backend
async def test_http_and_https_may_be_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    async with (
        StepflowRuntime.start(CONFIG) as runtime,
        relays(runtime.port, in_turn(PASS, UNHEARD), always(PASS), tls=tls) as (a, b),
        StepflowClient([a.url, b.url]) as client,
    ):
        for index in range(3):
            run_id = await runtime.submit(ECHO, index)
            assert (await client.get_result(run_id)).output == index
        assert client.url == b.url and b.url.startswith("https:")
        assert (await client.run(ECHO, 9)).output == 9
        events = [event async for event in client.events(run_id)]
        assert len(events) == 5


@each_backend
async def test_an_httpx_client_of_ones_own_serves_all() -> None:
    async with (
        StepflowRuntime.start(CONFIG) as runtime,
        httpx.AsyncClient() as own,
        StepflowClient([DEAD, runtime.url], http_client=own) as client,
    ):
        assert (await client.run(ECHO, 1)).output == 1
        assert client.url == runtime.url


# -- events ------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("backwards", [False, True])
async def test_events_come_once_each_over_servers_that_break_off(
    backwards: bool,
) -> None:
    flow = {
        "name": "chain",
        "steps": [
            {"id": f"s{i}", "component": "/noop", "input": source}
            for i, source in enumerate(
                [{"$input": "$"}, *({"$step": f"s{i}"} for i in range(7))]
            )
        ],
        "output": {"$step": "s7"},
    }
    lengths = random.Random(7 + backwards)

    def broken_off(what: str) -> str:
        # At least the head, an event that is known, and a new one come through.
        return (
            f"first {lengths.randint(700, 1500)}" if what.endswith("events") else PASS
        )

    def key(event: RunEvent) -> tuple[int, str]:
        return event.sequence_number, repr(event)

    async with clustered(broken_off, broken_off) as (client, runtime, (a, b)):
        run_id = await runtime.submit(flow, 1)
        await runtime.get_result(run_id)
        expected = [key(event) async for event in runtime.events(run_id)]
        got = [key(event) async for event in client.events(run_id)]
        assert got == expected
        streams = [sum(what.endswith("events") for what in r.seen) for r in (a, b)]
        assert min(streams) >= 1 and sum(streams) >= 3


@each_backend
@pytest.mark.parametrize("fault", [UNHEARD, "503"])
async def test_a_stream_that_cannot_be_opened_is_opened_at_the_next(
    fault: str,
) -> None:
    async with clustered(always(fault), always(PASS)) as (client, runtime, (a, b)):
        run_id = await runtime.submit(ECHO, 1)
        assert len([event async for event in client.events(run_id)]) == 5
        assert len(a.seen) == 2 and client.url == b.url


# -- runs are sent once ------------------------------------------------------------------


async def submitted(
    client: StepflowClient, how: str, flow: FlowId, **options: Any
) -> Any:
    match how:
        case "run":
            return await client.run(flow, 1, **options)
        case "submit":
            return await client.submit(flow, 1, **options)
        case "submit_batch":
            return await client.submit_batch(flow, [1, 2], **options)
        case "run_many":
            return [each async for each in client.run_many(flow, [1], **options)]


@each_backend
@pytest.mark.parametrize("how", ["run", "submit", "submit_batch", "run_many"])
async def test_a_run_that_may_have_arrived_is_not_sent_again_unless_that_is_wanted(
    how: str,
) -> None:
    for fault in (UNHEARD, UNANSWERED, HALF):
        faults = (in_turn(fault, only=SUBMIT), in_turn(fault, only=SUBMIT))
        async with clustered(*faults) as (client, runtime, (a, b)):
            flow_id = await runtime.store_flow(ECHO)
            with pytest.raises(SubmitInterruptedError, match="nobody knows") as lost:
                await submitted(client, how, flow_id)
            assert isinstance(lost.value, ConnectionLostError)
            assert not lost.value.unsent
            assert [r.seen.count(SUBMIT) for r in (a, b)] == [1, 0]
            arrived = fault != UNHEARD
            await wait_until_runs(runtime, arrived)
            assert client.url == b.url  # for whatever comes next
            # It is lost once more there, and then arrives at the first one.
            await submitted(client, how, flow_id, on_unknown="resubmit")
            assert [r.seen.count(SUBMIT) for r in (a, b)] == [2, 1]
            await wait_until_runs(runtime, 1 + 2 * arrived)


async def wait_until_runs(runtime: StepflowRuntime, number: int) -> None:
    with anyio.fail_after(10):
        while len(await runtime.list_runs()) < number:  # noqa: ASYNC110
            await anyio.sleep(0.01)
    assert len(await runtime.list_runs()) == number


@each_backend
@pytest.mark.parametrize("fault", [UNHEARD, SILENCE, "503"])
async def test_a_run_whose_server_was_only_asked_for_its_version_was_not_sent(
    fault: str,
) -> None:
    faults = (lambda _: fault), always(PASS)
    async with clustered(*faults, timeout=0.3) as (client, runtime, (a, b)):
        flow_id = await runtime.store_flow(ECHO)
        assert (await client.run(flow_id, 1)).output == 1
        assert (a.seen, b.seen[:2]) == ([HEALTH], [HEALTH, SUBMIT])


@each_backend
async def test_a_run_for_which_no_connection_came_about_was_not_sent() -> None:
    async with (
        StepflowRuntime.start(CONFIG) as runtime,
        full_backlog() as hanging,
        StepflowClient([hanging, runtime.url], timeout=0.4) as client,
    ):
        client._servers.all[0].is_known = True  # it was well a moment ago
        flow_id = await runtime.store_flow(ECHO)
        assert (await client.run(flow_id, 1)).output == 1
        assert client.url == runtime.url


@each_backend
async def test_a_single_server_is_no_other_case(short_pauses: None) -> None:
    async with (
        StepflowRuntime.start(CONFIG) as runtime,
        relays(runtime.port, always(UNANSWERED, only=SUBMIT)) as (relay,),
        StepflowClient(relay.url) as client,
    ):
        flow_id = await client.store_flow(ECHO)
        with pytest.raises(SubmitInterruptedError):
            await client.run(flow_id, 1)
        assert relay.submitted == [1]
        with pytest.raises(SubmitInterruptedError):
            await client.run(flow_id, 2, on_unknown="resubmit")
        assert relay.submitted == [1, 2, 2, 2]  # and not for ever
        for wrong in ("RAISE", None, True, ["raise"]):
            with pytest.raises(ValueError, match='on_unknown must be "raise" or'):
                await client.submit(flow_id, 3, on_unknown=wrong)  # type: ignore[arg-type]
        # It cannot have arrived, and that is known.
        with (
            StepflowClient(DEAD) as nobody,
            pytest.raises(ConnectionLostError) as lost,
        ):
            await nobody.submit(flow_id, 3, on_unknown="resubmit")
        assert lost.value.unsent and type(lost.value) is ConnectionLostError


@each_backend
async def test_what_is_resubmitted_in_vain_may_still_have_arrived(
    short_pauses: None,
) -> None:
    """The first sending broke, and after that nobody is there: no honest "unsent"."""
    async with (
        StepflowRuntime.start(CONFIG) as runtime,
        relays(runtime.port, always(UNANSWERED, only=SUBMIT)) as (relay,),
        StepflowClient([relay.url, DEAD]) as client,
    ):
        flow_id = await client.store_flow(ECHO)
        first, dead = (server.transport for server in client._servers.all)

        class OnceOnly:
            aclose, close, stream = first.aclose, first.close, first.stream

            def __init__(self) -> None:
                self.requests = [first.request]

            async def request(self, *args: Any, **options: Any) -> Response:
                request = self.requests.pop() if self.requests else dead.request
                return await request(*args, **options)

        client._servers.all[0].transport = OnceOnly()
        with pytest.raises(SubmitInterruptedError) as lost:
            await client.run(flow_id, 1, on_unknown="resubmit")
        assert not lost.value.unsent
        assert relay.submitted == [1]
        await first.aclose()


scripts = st.lists(st.sampled_from((PASS, *FAULTS)), max_size=5)


@each_backend
def test_whatever_happens_a_run_is_sent_once(
    anyio_backend: Any, short_pauses: None
) -> None:
    @settings(max_examples=25)
    @given(first=scripts, second=scripts, resubmit=st.booleans())
    def holds(first: list[str], second: list[str], resubmit: bool) -> None:
        faults = in_turn(*first), in_turn(*second)
        on_unknown: Any = "resubmit" if resubmit else "raise"
        anyio.run(check, faults, on_unknown, backend=anyio_backend[0])

    async def check(faults: Sequence[Callable[[str], str]], on_unknown: Any) -> None:
        before = len(await runtime.list_runs(limit=100_000))
        succeeded = 0
        async with (
            relays(runtime.port, *faults) as made,
            StepflowClient([DEAD, *[relay.url for relay in made]]) as client,
        ):
            flow_id = await client.store_flow(ECHO)
            for index in range(3):
                try:
                    result = await client.run(flow_id, index, on_unknown=on_unknown)
                except (SubmitInterruptedError, ServerFaultError):
                    continue
                assert result.output == index
                succeeded += 1
        sent = Counter(each for relay in made for each in relay.submitted)
        assert max(sent.values()) <= (1 if on_unknown == "raise" else 3)
        there = len(await runtime.list_runs(limit=100_000)) - before
        assert succeeded <= there <= sent.total()

    with StepflowRuntime.start(CONFIG) as runtime:
        holds()


# -- servers that share a store ----------------------------------------------------------


def on_store(path: Path) -> Mapping[str, Any]:
    """Recovers the runs of its own id when it starts, and takes over nobody else's."""
    url = f"sqlite:{path}?mode=rwc"
    return {
        **CONFIG,
        "storageConfig": {"type": "sqlite", "databaseUrl": url, "autoMigrate": True},
        "recovery": {"enabled": False},
    }


@contextmanager
def server_on(path: Path, name: str) -> Iterator[StepflowRuntime]:
    env = {"STEPFLOW_ORCHESTRATOR_ID": name}
    runtime = StepflowRuntime.start(on_store(path), env=env)
    try:
        yield runtime
    finally:
        runtime.stop()


def kill(runtime: StepflowRuntime) -> None:
    assert runtime.pid is not None
    os.kill(runtime.pid, signal.SIGKILL)


@each_backend
def test_results_and_events_come_from_the_survivor_when_a_server_is_killed(
    tmp_path: Path, anyio_backend: Any
) -> None:
    """And another server takes its runs over: one that the client does not know."""
    store = tmp_path / "runs.db"

    async def check() -> None:
        results: dict[str, Any] = {}
        events: list[RunEvent] = []

        async def wait_result(run_id: str) -> None:
            results[run_id] = (await client.get_result(run_id)).is_success

        async def follow(run_id: str) -> None:
            events.extend([event async for event in client.events(run_id)])

        async with StepflowClient([a.url, b.url]) as client:
            flow_id = await client.store_flow(SLEEP)
            run_ids = [await client.submit(flow_id, 500) for _ in range(4)]
            async with anyio.create_task_group() as tasks:
                for run_id in run_ids:
                    tasks.start_soon(wait_result, run_id)
                tasks.start_soon(follow, run_ids[0])
                await anyio.sleep(0.2)
                assert client.url == a.url
                kill(a)
                await wait_until(lambda: client.url == b.url)
                start = partial(in_its_place.enter_context, server_on(store, "a"))
                await anyio.to_thread.run_sync(start)
            assert results == dict.fromkeys(run_ids, True)
            assert [run.status for run in await client.list_runs()] == (
                [RunStatus.COMPLETED] * 4
            )
            numbers = [event.sequence_number for event in events]
            assert all(one <= other for one, other in pairwise(numbers))
            again = [event async for event in client.events(run_ids[0])]
            assert events == again

    with (
        ExitStack() as in_its_place,
        server_on(store, "a") as a,
        server_on(store, "b") as b,
    ):
        anyio.run(check, backend=anyio_backend[0])


@each_backend
def test_a_run_is_known_before_it_is_over_and_goes_on_elsewhere(
    tmp_path: Path, anyio_backend: Any
) -> None:
    """The first request does not wait for its end: an answer that is lost is lost for good."""
    store = tmp_path / "runs.db"

    async def check() -> None:
        async with StepflowClient([a.url, b.url]) as client:
            flow_id = await client.store_flow(SLEEP)
            outcomes: list[Any] = []

            async def run() -> None:
                outcomes.append(await client.run(flow_id, 700))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(run)
                tasks.start_soon(run)
                await anyio.sleep(0.3)
                kill(a)
                start = partial(in_its_place.enter_context, server_on(store, "a"))
                await anyio.to_thread.run_sync(start)
            assert [each.is_success for each in outcomes] == [True, True]
            statuses = [run.status for run in await client.list_runs()]
            assert statuses == [RunStatus.COMPLETED] * 2

    with (
        ExitStack() as in_its_place,
        server_on(store, "a") as a,
        server_on(store, "b") as b,
    ):
        anyio.run(check, backend=anyio_backend[0])
