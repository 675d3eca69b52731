"""What is fuzzed: functions of bytes as they may come from outside.

Contract: a target takes any bytes, and returns if what we promise held. All that it does
with them besides, such as where it cuts them and which request they answer, follows from
the bytes: a file with them is enough to do it again.
"""

from __future__ import annotations

import json
import logging
import random
import re
import tempfile
import zlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, TypeVar
from unittest.mock import patch

import anyio

from stepflow_runtime import ConnectionLostError, FlowId, LogConfig, LogEntry, api
from stepflow_runtime.api import ApiExecutor
from stepflow_runtime.crew import Crew
from stepflow_runtime.errors import StepflowError
from stepflow_runtime.events import RunStatus
from stepflow_runtime.executor import FlowError, RunInfo
from stepflow_runtime.following import EventFollower
from stepflow_runtime.logs.entry import Stream as LogStream
from stepflow_runtime.logs.entry import decode
from stepflow_runtime.logs.grouping import Grouper
from stepflow_runtime.logs.pump import MAX_LINE, Pump
from stepflow_runtime.logs.ring import Filter
from stepflow_runtime.logs.sinks import LogHub
from stepflow_runtime.server.diagnosis import Failures, advice, last_words
from stepflow_runtime.transport import Response, ServerRestartedError, Stream
from stepflow_runtime.transport.direct import DirectTransport
from stepflow_runtime.transport.http1 import LONGEST_HEAD, AnswerReader

from .server import OneAnswer

__all__ = ["TARGETS", "Target"]

T = TypeVar("T")

BACKENDS: Final = ("asyncio", "asyncio", "asyncio", "trio")
RUN_ID: Final = "01a20baa-b023-7b92-bee0-7f3d5648ce78"


@dataclass(frozen=True)
class Target:
    """:param words: what the mutator is to insert besides what is in the corpus"""

    name: str
    run: Callable[[bytes], None]
    words: tuple[bytes, ...]


def chance(data: bytes) -> random.Random:
    return random.Random(zlib.crc32(data))


def cut(data: bytes, rng: random.Random) -> list[bytes]:
    """Into some pieces, or many small ones."""
    if rng.random() < 0.1:
        data, tail = data[:2000], data[2000:]
        size = rng.choice((1, 1, 2, 7))
        pieces = [data[i : i + size] for i in range(0, len(data), size)]
        return [*pieces, tail] if tail else pieces
    places = sorted({0, len(data), *(rng.randint(0, len(data)) for _ in range(4))})
    return [data[i:j] for i, j in pairwise(places)]


def run_in_loop(
    function: Callable[[T, random.Random], Awaitable[None]],
    rng: random.Random,
    given: T,
) -> None:
    anyio.run(function, given, rng, backend=rng.choice(BACKENDS))


# -- answers ---------------------------------------------------------------------------

# What is read of an answer: status, media type and body; None: it is none.
Meaning = tuple[int, str, bytes] | None


def fuzz_answers(data: bytes) -> None:
    """What a server sends after a request, through the transport of embedded servers.

    It is an answer or a lost connection, the same however it is cut; it brings no more than
    was sent; and the next request gets its own answer.
    """
    run_in_loop(_exchange, chance(data), data)


async def _exchange(data: bytes, rng: random.Random) -> None:
    meaning, is_whole = _reading(data)
    server = OneAnswer(cut(data, rng), stays_open=is_whole and rng.random() < 0.5)
    transport = DirectTransport(server.port)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.serve)
            found = await rng.choice(ASKING)(transport)
            # What is that long may be refused for its length, depending on the cuts.
            assert found == meaning or len(data) > LONGEST_HEAD, (found, meaning)
            await server.wait_sent()
            following = await transport.request("GET", "/next")
            assert following.body == b"/next"
            tasks.cancel_scope.cancel()
    finally:
        transport.close()
        server.close()


def _reading(data: bytes) -> tuple[Meaning, bool]:
    """What an answer means, and whether it is one before the connection is closed."""
    reader = AnswerReader()
    is_whole = False
    try:
        reader.feed(data)
        is_whole = reader.is_complete
        if not is_whole:
            reader.end()
    except ConnectionLostError:
        return None, False
    return (reader.status, reader.content_type, reader.take_body()), is_whole


async def _ask(transport: DirectTransport) -> Meaning:
    try:
        response = await transport.request("GET", "/first")
    except ConnectionLostError:
        return None
    return response[:3]


async def _ask_with_body(transport: DirectTransport) -> Meaning:
    try:
        response = await transport.request("POST", "/first", b'{"some":"body"}')
    except ConnectionLostError:
        return None
    return response[:3]


async def _ask_for_stream(transport: DirectTransport) -> Meaning:
    parts = []
    try:
        stream = await transport.stream("/first")
        try:
            while part := await stream.receive():
                parts.append(part)
        finally:
            stream.close()
    except ConnectionLostError:
        return None
    return stream.status, stream.content_type, b"".join(parts)


ASKING: Final = (_ask, _ask_with_body, _ask_for_stream)


# -- events ----------------------------------------------------------------------------


class _PlayedStream:
    """A stream that brings some pieces, and then breaks."""

    status, content_type = 200, "text/event-stream"

    def __init__(self, pieces: Sequence[bytes], end: ConnectionLostError) -> None:
        self._pieces = iter([piece for piece in pieces if piece])
        self._end = end

    async def receive(self) -> bytes:
        for piece in self._pieces:
            return piece
        raise self._end

    def close(self) -> None:
        self._pieces = iter(())


def fuzz_events(data: bytes) -> None:
    """A stream of events that comes twice, since the server is restarted.

    It brings events, no more than there are lines, and ends, or with an error of ours.
    """
    rng = chance(data)
    ends = [ConnectionLostError("it is over"), ServerRestartedError("once more")]
    if rng.random() < 0.3:
        del ends[1]

    async def connect(since: int) -> Stream:
        return _PlayedStream(cut(data, rng), ends.pop())

    async def look() -> RunInfo:
        status = rng.choice((RunStatus.RUNNING, RunStatus.COMPLETED))
        return RunInfo(run_id=RUN_ID, status=status, last_sequence_number=2**62)

    follower = EventFollower(connect, look, RUN_ID, 0, lambda: not ends)
    events = 0
    try:
        while True:
            _result_of(follower.__anext__())
            events += 1
    except (StepflowError, StopAsyncIteration) as exc:
        str(exc)
    finally:
        follower.close()
    assert events <= 2 * (data.count(b"\n") + 1)


def _result_of(awaitable: Any) -> Any:
    """Of a coroutine that waits for nothing."""
    try:
        awaitable.send(None)
    except StopIteration as exc:
        return exc.value
    raise AssertionError("it waits")


# -- payloads --------------------------------------------------------------------------


class _Answered(ApiExecutor):
    """An executor whose server answers the same to everything, some time long."""

    def __init__(self, body: bytes, status: int) -> None:
        super().__init__(Crew())
        self._response = Response(status, "application/json", body)
        self._left = 3

    async def _request(self, *args: Any, **options: Any) -> Response:
        if not self._left:
            raise ConnectionLostError("enough")
        self._left -= 1
        return self._response

    async def _open_stream(self, *args: Any, **options: Any) -> tuple[Stream, None]:
        await self._request()
        raise ConnectionLostError("there is no stream")

    @property
    def _generation(self) -> int | None:
        return None

    @property
    def _is_gone(self) -> bool:
        return self._left == 0

    def _gone(self) -> StepflowError:
        return ConnectionLostError("enough", unsent=True)


FLOW: Final = FlowId("be01d74fdc1c5e047b459ef19365580c71461ace456a243df20d805187baf674")
DOCUMENT: Final = {"steps": [{"id": "a", "component": "/noop"}]}
CALLS: Final[Sequence[Callable[[ApiExecutor], Awaitable[object]]]] = (
    lambda on: on.run(FLOW, 1),
    lambda on: on.run(FLOW, 1, variables_from_env=True),
    lambda on: on.submit(FLOW, 1),
    lambda on: on.get_result(RUN_ID),
    lambda on: on.submit_batch(FLOW, [1, 2]),
    lambda on: on.get_batch(RUN_ID),
    lambda on: on.cancel(RUN_ID),
    lambda on: on.get_run(RUN_ID),
    lambda on: on.list_runs(),
    lambda on: on.get_steps(RUN_ID),
    lambda on: on.delete_run(RUN_ID),
    lambda on: on.validate(DOCUMENT),
    lambda on: on.store_flow(DOCUMENT),
    lambda on: on.get_flow_variables(FLOW),
    lambda on: on.list_components(),
    lambda on: on.put_blob(1),
    lambda on: on.get_blob("b10b"),
    lambda on: on.health(),
)


def fuzz_payloads(data: bytes) -> None:
    """The body of the answer to each call: it brings a value, or an error of ours."""
    with patch.object(api, "_STILL_RUNNING_PAUSE", 0.0):
        run_in_loop(_call, chance(data), data)


async def _call(data: bytes, rng: random.Random) -> None:
    for status in (200, rng.choice((201, 400, 404, 500))):
        for call in CALLS:
            try:
                await call(_Answered(data, status))
            except StepflowError as exc:
                str(exc)
            except ValueError as exc:
                assert "get_batch() has their results" in str(exc)


# -- logs ------------------------------------------------------------------------------


class _PlayedPipe:
    """A pipe that brings some pieces, with pauses between them, and ends."""

    def __init__(self, pieces: Sequence[bytes | None]) -> None:
        self._pieces = iter([piece for piece in pieces if piece != b""])

    def read(self, timeout: float | None = None) -> bytes | None:
        for piece in self._pieces:
            return piece
        return b""

    def rest(self) -> None: ...

    def is_empty(self) -> bool:
        return False

    def hurry(self) -> None: ...

    def finish(self) -> None: ...

    def close(self) -> None: ...


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(self.format(record))


RECORDS: Final = _Records()
LOGGER: Final = logging.getLogger("tests.fuzz")
LOGGER.setLevel(1)
LOGGER.propagate = False
LOGGER.addHandler(RECORDS)

HEAD: Final = re.compile(r"\d{4}-\d\d-\d\dT")
CONTROLS: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
CONTROLS_IN_JSON: Final = re.compile("[\x00-\x1f\x80-\x9f]")


def fuzz_logs(data: bytes) -> None:
    """What the server writes into one of its pipes, up to the log files and the logger.

    Every line is in every place, once; nothing in it passes for another entry, or is
    obeyed by a terminal.
    """
    with tempfile.TemporaryDirectory(prefix="stepflow-fuzz-") as folder:
        _log(data, Path(folder), chance(data))


def _log(data: bytes, folder: Path, rng: random.Random) -> None:
    stream: LogStream = rng.choice(("stdout", "stderr"))
    options: dict[str, Any] = {"python_logger": None, "keep": len(data) + 1}
    logger = {**options, "python_logger": LOGGER.name}
    in_json = LogHub(LogConfig(**logger, file_path=folder / "json"))
    in_text = LogHub(LogConfig(**options, file_path=folder / "text", format="text"))
    RECORDS.records.clear()
    texts: list[bytes] = []

    def take(lines: Sequence[bytes]) -> None:
        texts.extend(lines)
        for hub in (in_json, in_text):
            batch = hub.take(stream, lines)
            assert batch is not None
            assert batch.work()

    with _opened(in_json), _opened(in_text), _no_reports():
        pieces: list[bytes | None] = [*cut(data, rng)]
        if rng.random() < 0.5:
            pieces = [each for piece in pieces for each in (piece, None)]
        grouper = Grouper() if stream == "stderr" else None
        pump = Pump(_PlayedPipe(pieces), take, grouper=grouper)
        run_in_loop(_pumped, rng, pump)
    if max(map(len, data.split(b"\n"))) <= MAX_LINE:
        assert b"\n".join(texts) == data.removesuffix(b"\n")
    _check_json((folder / "json").read_bytes(), in_json, len(texts))
    _check_text((folder / "text").read_bytes(), len(texts))
    _check_diagnosis(in_json)
    assert in_text.taken == len(texts)
    assert len(RECORDS.records) == len(texts)


async def _pumped(pump: Pump, _: random.Random) -> None:
    pump.start()
    await pump.wait()


@contextmanager
def _opened(hub: LogHub) -> Iterator[None]:
    hub.open()
    try:
        yield
    finally:
        hub.close()


@contextmanager
def _no_reports() -> Iterator[None]:
    """What the pump and the sinks catch and report is raised here."""
    reports: list[logging.LogRecord] = []

    def keep(record: logging.LogRecord) -> bool:
        reports.append(record)
        return False

    own = logging.getLogger("stepflow_runtime")
    own.addFilter(keep)
    try:
        yield
    finally:
        own.removeFilter(keep)
    for record in reports:
        cause = record.exc_info[1] if record.exc_info else None
        raise AssertionError(record.getMessage()) from cause


def _check_json(content: bytes, hub: LogHub, count: int) -> None:
    lines = content.decode().split("\n")
    assert lines.pop() == ""
    entries = hub.newest(count)
    assert len(entries) == len(lines) == hub.taken == count
    for line, entry in zip(lines, entries, strict=True):
        assert not CONTROLS_IN_JSON.search(line)
        assert isinstance(json.loads(line, parse_int=str), dict)
        again = decode(line.encode(), entry.stream)
        assert _essence(again) == _essence(entry), (again, entry)


def _essence(entry: LogEntry) -> tuple[object, ...]:
    # What looks like the server's but for its time stamp has the time of each look.
    stamp = None if entry.message.startswith('{"timestamp') else entry.timestamp
    return stamp, entry.level, entry.message, entry.run_id, entry.step_id


def _check_text(content: bytes, count: int) -> None:
    text = content.decode()
    assert not CONTROLS.search(text)
    heads = [line for line in text.split("\n") if HEAD.match(line)]
    assert len(heads) == count, (len(heads), count)


def _check_diagnosis(hub: LogHub) -> None:
    entries = hub.newest(2000)
    assert not CONTROLS.search(last_words(entries))
    advice(entries)
    error = FlowError(code="X", message="it failed", step_id="a", component="/noop")
    Failures(entries, RUN_ID, None).of(error)
    about = hub.newest(2000, Filter(level="warn", run_id=RUN_ID))
    assert all(entry.run_id == RUN_ID for entry in about)


# -- all of them -----------------------------------------------------------------------

_NUMBERS: Final = (
    b"0",
    b"-1",
    b"1.0",
    b"1e400",
    b"-0.0",
    b"NaN",
    b"9007199254740993",
    b"18446744073709551616",
    b"9" * 400,
    b"9" * 5000,
)
_JSON_WORDS: Final = (
    *_NUMBERS,
    b"null",
    b"true",
    b"{}",
    b"[]",
    b'""',
    b'"\\ud800"',
    b'"\\u0000"',
    b'"\\u009b2J"',
    b"\xc2\x9b2J",
    b"\xff\xfe",
    b"[" * 2000,
    b'{"a":' * 2000,
    b'"0001-01-01T00:00:00+23:59"',
    b'"9999-12-31T23:59:60Z"',
    b",",
    b":",
    b'"',
    b"\\",
)
_HTTP_WORDS: Final = (
    *_NUMBERS,
    b"\r\n",
    b"\n",
    b"\r",
    b"\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n",
    b"HTTP/1.0 200 OK\r\n",
    b"HTTP/0.9 200\r\n",
    b"HTTP/2.0 200 OK\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\n",
    b"HTTP/1.1 304 Not Modified\r\n",
    b"Content-Length: ",
    b"Content-Length: 5\r\n",
    b"Content-Length: 5, 5\r\n",
    b"Content-Length: +5\r\n",
    b"Content-Length: 1000000000000000\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: gzip, chunked\r\n",
    b"Transfer-Encoding:\x0bchunked\r\n",
    b"Content-Encoding: gzip\r\n",
    b"Connection: close\r\n",
    b"Connection: keep-alive\r\n",
    b"Connection: upgrade\r\nUpgrade: h2c\r\n",
    b"Trailer: X\r\n",
    b" folded\r\n",
    b"0\r\n\r\n",
    b"ffffffffffffffff\r\n",
    b"-1\r\n",
    b"5;ext=1\r\nhello\r\n",
    b"\0",
    b"\x80\xff",
)
_EVENT_WORDS: Final = (
    *_JSON_WORDS,
    b"\n",
    b"\r\n",
    b"\n\n",
    b": keep-alive\n\n",
    b"data:",
    b"data: {}\n\n",
    b"event: x\n",
    b"id: 1\n",
    b'"sequenceNumber":',
    b'"event":{"RunCompleted":{"runId":"' + RUN_ID.encode() + b'","status":2}}',
    b'"runId":',
)
_LOG_WORDS: Final = (
    *_JSON_WORDS,
    b"\n",
    b"\\n",
    b"\\n2026-11-24T03:47:45.315812+00:00   INFO forged: x",
    b"\n2026-11-24T03:47:45.315812+00:00   INFO forged: x",
    b'{"timestamp":"2026-11-24T03:47:45.315812+00:00","level":"INFO","message":"m"}\n',
    b"\x1b[31m",
    b"\x1b\x1b[0m[2J",
    b"\x1b]0;title\x07",
    b"\\u001b[2J",
    b"\\u2028",
    b"\x00",
    b"\x0c",
    b'"line":',
    b'"diags":{"run_id":"' + RUN_ID.encode() + b'"}',
    b'"stream":"stderr"',
    b'"exception":"Traceback"',
    b" run_id=" + RUN_ID.encode(),
    b"Traceback (most recent call last):\n",
    b"Component /a failed: x\n",
    b"thread 'main' (1) panicked at src/main.rs:1:1:\n",
    b"The above exception was the direct cause of the following exception:\n",
    b"  + Exception Group Traceback (most recent call last):\n",
    b"stack backtrace:\n",
)


def targets() -> Iterator[Target]:
    yield Target("answers", fuzz_answers, _HTTP_WORDS)
    yield Target("events", fuzz_events, _EVENT_WORDS)
    yield Target("payloads", fuzz_payloads, _JSON_WORDS)
    yield Target("logs", fuzz_logs, _LOG_WORDS)


TARGETS: Final = {target.name: target for target in targets()}
