"""Lines, entries, sinks and the pump, without a server."""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime

import anyio
import anyio.to_thread
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepflow_runtime import LogConfig, LogEntry
from stepflow_runtime.logs.entry import decode
from stepflow_runtime.logs.pump import MAX_LINE, LineCutter, pump
from stepflow_runtime.logs.sinks import MAX_KEPT, LogHub
from stepflow_runtime.server.platform import read

LINE = {
    "timestamp": "2026-11-23T02:27:44.413575+00:00",
    "level": "WARN",
    "target": "stepflow_execution::flow_executor",
    "file": "crates/x.rs",
    "line": 759,
    "message": "Starting",
    "diags": {
        "trace_id": "t",
        "span_id": "s",
        "sampled": True,
        "run_id": "r",
        "flow_id": "f",
        "step_id": "a",
    },
}


# -- lines -----------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=40)))
def test_cutting_loses_nothing_however_the_bytes_arrive(chunks: list[bytes]) -> None:
    cutter = LineCutter()
    lines = [line for chunk in chunks for line in cutter.cut(chunk)]
    assert b"\n".join([*lines, cutter.rest()]) == b"".join(chunks)


@given(st.lists(st.binary(max_size=40)), st.integers(1, 30))
def test_a_line_over_the_cap_says_how_much_was_dropped(
    chunks: list[bytes], cap: int
) -> None:
    cutter = LineCutter(cap)
    lines = [line for chunk in chunks for line in cutter.cut(chunk)]
    whole = b"".join(chunks).split(b"\n")
    for line, original in zip([*lines, cutter.rest()], whole, strict=True):
        if len(original) <= cap:
            assert line == original
        else:
            dropped = len(original) - cap
            assert line == original[:cap] + b" ... [%d more bytes dropped]" % dropped


# -- entries ---------------------------------------------------------------------------


def test_a_log_line_becomes_an_entry() -> None:
    entry = decode(json.dumps(LINE).encode(), "stdout")
    assert entry == LogEntry(
        timestamp=datetime(2026, 11, 23, 2, 27, 44, 413575, tzinfo=UTC),
        level="WARN",
        message="Starting",
        stream="stdout",
        target="stepflow_execution::flow_executor",
        file="crates/x.rs",
        line=759,
        run_id="r",
        flow_id="f",
        step_id="a",
        trace_id="t",
        span_id="s",
    )


@pytest.mark.parametrize(
    "line",
    [
        b"thread 'main' panicked at x.rs:1",
        b"[1]",
        b"5",
        b"null",
        b"{}",
        b'{"level": 1}',
        b"{" * 100_000,
        json.dumps({**LINE, "timestamp": "0000-01-01T00:00:00Z"}).encode(),
        json.dumps({**LINE, "timestamp": "99999-01-01T00:00:00Z"}).encode(),
        json.dumps({**LINE, "timestamp": "2026-11-23T02:27:44"}).encode(),
        json.dumps({**LINE, "diags": [1]}).encode(),
        b"\xff\xfe nul \0",
    ],
)
def test_a_line_of_another_kind_is_an_entry_too(line: bytes) -> None:
    entry = decode(line, "stderr")
    assert entry.message == line.decode(errors="replace")
    assert (entry.level, entry.stream) == ("WARN", "stderr")
    assert entry.timestamp.tzinfo is not None


@given(st.binary())
def test_decoding_never_raises(line: bytes) -> None:
    assert isinstance(decode(line, "stdout").message, str)


# -- sinks -----------------------------------------------------------------------------


def test_a_record_carries_the_servers_time_and_level_and_the_entry(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(1, "stepflow.server")
    hub = LogHub(LogConfig())
    hostile = {**LINE, "name": "x", "args": [1], "message": "100 % {sure} %s"}
    hub.take(decode(json.dumps({**hostile, "level": "TRACE"}).encode(), "stdout"))
    (record,) = caplog.records
    assert record.getMessage() == "100 % {sure} %s"
    assert (record.levelname, record.levelno) == ("TRACE", 5)
    assert record.created == datetime(2026, 11, 23, 2, 27, 44, 413575, UTC).timestamp()
    assert record.msecs == 413
    assert (record.pathname, record.lineno) == ("crates/x.rs", 759)
    assert record.stepflow is hub.newest(1)[0]  # type: ignore[attr-defined]


def test_without_a_logger_the_ring_is_all_there_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(1)
    hub = LogHub(LogConfig(python_logger=None, keep=2))
    for number in range(5):
        hub.take(decode(b"%d" % number, "stdout"))
    assert [entry.message for entry in hub.newest(10)] == ["3", "4"]
    assert [entry.message for entry in hub.since(4)] == ["4"]
    assert caplog.records == []


def test_the_ring_is_bounded_in_characters_too() -> None:
    hub = LogHub(LogConfig(python_logger=None))
    for _ in range(100):
        hub.take(decode(b"x" * MAX_LINE, "stderr"))
    kept = hub.newest(100)
    assert sum(len(entry.message) for entry in kept) <= MAX_KEPT
    assert len(kept) == MAX_KEPT // MAX_LINE


def test_a_program_without_logging_gets_nothing_on_stderr(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    hub = LogHub(LogConfig(python_logger="somewhere.else"))
    hub.take(decode(json.dumps(LINE).encode(), "stdout"))
    assert capfd.readouterr() == ("", "")


# -- the pump --------------------------------------------------------------------------


@pytest.mark.anyio
async def test_the_pump_reads_to_the_end_of_the_pipe() -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    lines: list[bytes] = []

    def write() -> None:
        with open(writing, "wb", buffering=0) as pipe:
            pipe.writelines(b"line %d\n" % number for number in range(30_000))
            pipe.write(b"x" * (MAX_LINE + 5) + b"\nlast")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, write)
        await pump(reading, lines.append, read)
    os.close(reading)
    assert lines[:30_000] == [b"line %d" % number for number in range(30_000)]
    assert lines[30_000:] == [b"x" * MAX_LINE + b" ... [5 more bytes dropped]", b"last"]


@pytest.mark.anyio
async def test_a_cancelled_pump_hands_on_what_it_has() -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    lines: list[bytes] = []
    with anyio.move_on_after(0.1):
        os.write(writing, b"whole\nhalf")
        await pump(reading, lines.append, read)
    os.close(reading)
    os.close(writing)
    assert lines == [b"whole", b"half"]


@pytest.mark.anyio
async def test_other_tasks_get_their_turn_while_a_flood_comes_in() -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    turns = 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            await anyio.lowlevel.checkpoint()
            turns += 1

    def flood() -> None:
        with open(writing, "wb", buffering=0) as pipe:
            pipe.writelines(b"x" * 99 + b"\n" + b"y" * 60_000 for _ in range(200))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take_turns)
        tasks.start_soon(anyio.to_thread.run_sync, flood)
        await pump(reading, lambda line: None, read)
        tasks.cancel_scope.cancel()
    os.close(reading)
    assert turns > 100
