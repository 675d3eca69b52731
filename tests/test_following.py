"""Following a run over connections that break: every event, once, in order."""

from __future__ import annotations

import gc
import random
from collections.abc import Sequence
from typing import Any

import anyio
import anyio.lowlevel
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepflow_runtime import (
    ConnectionLostError,
    RunCompleted,
    RunEvent,
    RunInfo,
    RunStatus,
    StepStarted,
    UnknownEvent,
    UnsupportedServerError,
)
from stepflow_runtime import following as following_module
from stepflow_runtime.following import EventFollower
from stepflow_runtime.transport import Stream

from .conftest import each_backend

END = object()  # the server ends the answer
BREAK = object()  # the connection breaks


def line(number: int, kind: str, **data: Any) -> bytes:
    event = {"sequenceNumber": number, "event": {kind: {"runId": "r", **data}}}
    return b"data: " + msgspec.json.encode(event) + b"\n\n"


def journal(length: int, twins: Sequence[int] = ()) -> list[bytes]:
    """A run's events; at each of ``twins`` two have the same number."""
    lines = []
    for number in range(length):
        lines.append(line(number, "StepStarted", stepId=f"s{number}"))
        if number in twins:
            lines.append(line(number, "StepStarted", stepId=f"twin{number}"))
    return [*lines, line(length, "RunCompleted", status=2)]


class FakeStream:
    def __init__(self, parts: Sequence[bytes | object]) -> None:
        self.parts = list(parts)
        self.status, self.content_type = 200, "text/event-stream"
        self.is_closed = False

    async def receive(self) -> bytes:
        await anyio.lowlevel.checkpoint()
        if self.is_closed:
            raise ConnectionLostError("closed")
        part = self.parts.pop(0) if self.parts else END
        if part is END:
            return b""
        if part is BREAK:
            raise ConnectionLostError("broke")
        assert isinstance(part, bytes)
        return part

    def close(self) -> None:
        self.is_closed = True


class Server:
    """Serves a journal from the asked number on, as far as its connections last."""

    def __init__(self, lines: Sequence[bytes], *lasting: int) -> None:
        self.lines = lines
        self.lasting = list(lasting)
        self.asked: list[int] = []
        self.streams: list[FakeStream] = []
        self.status = RunStatus.RUNNING
        self.looks = 0
        self.last: int | None = None
        self.number_of = number_of

    async def connect(self, since: int) -> Stream:
        self.asked.append(since)
        rest = [each for each in self.lines if self.number_of(each) >= since]
        parts: list[bytes | object] = list(rest)
        if self.lasting:
            parts = [*rest[: self.lasting.pop(0)], BREAK]
        self.streams.append(FakeStream(parts))
        return self.streams[-1]

    async def look(self) -> RunInfo:
        self.looks += 1
        return RunInfo(run_id="r", status=self.status, last_sequence_number=self.last)

    def follow(self, since: int = 0) -> EventFollower:
        return EventFollower(self.connect, self.look, "r", since)


def number_of(text: bytes) -> int:
    return int(msgspec.json.decode(text[6:])["sequenceNumber"])


def names(events: Sequence[RunEvent]) -> list[str]:
    return [
        each.step_id if isinstance(each, StepStarted) else type(each).__name__
        for each in events
    ]


async def all_of(follower: EventFollower) -> list[RunEvent]:
    with anyio.fail_after(30):
        return [event async for event in follower]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following_module, "_PAUSES", (0.0,) * 6)


pytestmark = [pytest.mark.anyio, each_backend]


async def test_a_whole_stream_is_yielded_and_ends_by_itself() -> None:
    server = Server(journal(3))
    events = await all_of(server.follow())
    assert names(events) == ["s0", "s1", "s2", "RunCompleted"]
    assert server.asked == [0]
    assert server.streams[0].is_closed


async def test_a_broken_connection_is_made_anew_where_it_was() -> None:
    server = Server(journal(4), 2, 0, 1)
    assert names(await all_of(server.follow())) == [
        *("s0", "s1", "s2", "s3", "RunCompleted")
    ]
    assert server.asked == [0, 1, 1, 1]


async def test_events_of_one_number_come_once_each_wherever_it_breaks() -> None:
    expected = names(await all_of(Server(journal(3, twins=(1,))).follow()))
    assert expected == ["s0", "s1", "twin1", "s2", "RunCompleted"]
    for first in range(6):
        for second in range(6):
            server = Server(journal(3, twins=(1,)), first, second)
            assert names(await all_of(server.follow())) == expected


async def test_equal_events_of_one_number_are_as_many_as_there_are() -> None:
    twice = line(1, "StepStarted", stepId="x")
    lines = [line(0, "RunCreated"), twice, twice, line(2, "RunCompleted", status=2)]
    for lasting in range(5):
        events = await all_of(Server(lines, lasting).follow())
        assert len(events) == 4


@pytest.mark.parametrize("more", [b'"x":"\xff",', b'"x":1e999,', b"%b" % (b" " * 2000)])
async def test_events_are_known_again_whatever_is_in_them(more: bytes) -> None:
    lines = [each.replace(b"{", b"{" + more, 1) for each in journal(2, twins=(1,))]
    for lasting in range(5):
        server = Server(lines, lasting)
        server.number_of = lambda text: number_of(text.replace(more, b""))
        events = await all_of(server.follow())
        assert names(events) == ["s0", "s1", "twin1", "RunCompleted"]


async def test_what_is_kept_of_events_of_one_number_has_an_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(following_module, "_MOST_SHARING", 100)
    follower = Server([line(1, "StepStarted", stepId="x" * 9000)] * 101).follow()
    for _ in range(100):
        await follower.__anext__()
    assert sum(map(len, follower._seen_of_last)) < 10_000
    with pytest.raises(UnsupportedServerError, match="more than 100 events"):
        await follower.__anext__()


async def test_a_stream_that_ends_before_the_run_is_asked_for_again() -> None:
    server = Server(journal(2))
    server.lines = server.lines[:2]
    with pytest.raises(ConnectionLostError, match="end before the run does"):
        await all_of(server.follow())
    assert len(server.asked) == 7


async def test_a_connection_that_brings_nothing_is_given_up_at_last() -> None:
    server = Server(journal(2), *[0] * 20)
    with pytest.raises(ConnectionLostError):
        await all_of(server.follow())
    assert len(server.asked) == 7
    server = Server(journal(30), *[2] * 30)  # each brings something: that is patience
    assert len(await all_of(server.follow())) == 31


async def test_a_line_may_come_in_any_parts() -> None:
    whole = b": keep-alive\n\n" + b"".join(journal(3))

    class InParts(Server):
        size = 0

        async def connect(self, since: int) -> Stream:
            size = self.size
            chance = random.Random(size)
            parts, rest = [], whole
            while rest:
                length = chance.randint(1, size)
                parts.append(rest[:length])
                rest = rest[length:]
            return FakeStream(parts)

    for size in (1, 2, 7, 100, 10_000):
        server = InParts([])
        server.size = size
        events = await all_of(server.follow())
        assert names(events) == ["s0", "s1", "s2", "RunCompleted"]


async def test_a_cancelled_run_that_never_completes_is_followed_to_its_end() -> None:
    """Its status says that it is over, and two keep-alives that nothing comes."""
    alive = b": keep-alive\n\n"

    class Quiet(Server):
        async def connect(self, since: int) -> Stream:
            return FakeStream([self.lines[0], alive, alive, alive, BREAK])

    server = Quiet(journal(1))
    server.status = RunStatus.CANCELLED
    assert names(await all_of(server.follow())) == ["s0"]
    assert server.looks == 2


async def test_nothing_follows_the_last_event() -> None:
    server = Server(journal(3))
    server.status, server.last = RunStatus.COMPLETED, 3
    assert await all_of(server.follow(since=4)) == []
    assert server.asked == []
    assert names(await all_of(server.follow(since=3))) == ["RunCompleted"]


async def test_a_slow_server_is_waited_for_though_the_run_is_over() -> None:
    class Slow(FakeStream):
        async def receive(self) -> bytes:
            await anyio.sleep(2.2)
            return await super().receive()

    class SlowServer(Server):
        async def connect(self, since: int) -> Stream:
            await super().connect(since)
            return Slow([b"".join(self.lines[since:])])

    server = SlowServer(journal(2))
    server.status, server.last = RunStatus.COMPLETED, 2
    assert names(await all_of(server.follow(since=1))) == ["s1", "RunCompleted"]


async def test_the_completion_of_a_sub_run_is_not_the_end() -> None:
    lines = [
        line(0, "RunCreated"),
        line(1, "RunCompleted", runId="sub", status=2),
        line(2, "RunCompleted", status=2),
    ]
    events = await all_of(Server(lines).follow())
    assert [type(each) for each in events[1:]] == [RunCompleted, RunCompleted]


async def test_what_is_not_known_is_yielded_and_what_is_no_event_refused() -> None:
    lines = [line(0, "StepPondered", depth=3), line(1, "StepStarted", stepId=5)]
    server = Server([*lines, line(2, "RunCompleted", status=2)])
    first, second, _ = await all_of(server.follow())
    assert isinstance(first, UnknownEvent) and isinstance(second, UnknownEvent)
    assert (first.kind, first.data["depth"]) == ("StepPondered", 3)
    assert (second.kind, second.run_id) == ("StepStarted", "r")
    broken = FakeStream([b"data: {\n\n"])

    async def connect(since: int) -> Stream:
        return broken

    follower = EventFollower(connect, Server([]).look, "r", 0)
    with pytest.raises(UnsupportedServerError):
        await follower.__anext__()


async def test_a_cancelled_wait_loses_nothing() -> None:
    class Slow(FakeStream):
        async def receive(self) -> bytes:
            await anyio.sleep(0.003)
            return await super().receive()

    class SlowServer(Server):
        async def connect(self, since: int) -> Stream:
            await super().connect(since)
            return Slow(self.streams[-1].parts)

    follower = SlowServer(journal(5)).follow()
    events: list[RunEvent] = []
    with anyio.fail_after(30):
        while not events or not isinstance(events[-1], RunCompleted):
            with anyio.move_on_after(0.002):
                events.append(await follower.__anext__())
            with anyio.move_on_after(0.02):
                events.append(await follower.__anext__())
    assert names(events) == ["s0", "s1", "s2", "s3", "s4", "RunCompleted"]


async def test_leaving_it_closes_the_connection() -> None:
    server = Server(journal(3))
    follower = server.follow()
    await follower.__anext__()
    await follower.aclose()
    assert server.streams[0].is_closed
    with pytest.raises(StopAsyncIteration):
        await follower.__anext__()
    forsaken = server.follow()
    await forsaken.__anext__()
    del forsaken
    gc.collect()
    assert server.streams[1].is_closed


@given(
    twins=st.sets(st.integers(0, 9)),
    lasting=st.lists(st.integers(0, 8), max_size=5),
    since=st.integers(0, 9),
)
def test_however_it_breaks_all_come_once(
    twins: set[int], lasting: list[int], since: int, anyio_backend: Any
) -> None:
    async def check() -> None:
        lines = journal(10, tuple(twins))
        events = await all_of(Server(lines, *lasting).follow(since))
        assert names(events) == names(await all_of(Server(lines).follow(since)))
        assert len(events) == sum(number_of(each) >= since for each in lines)

    anyio.run(check, backend=anyio_backend[0])
