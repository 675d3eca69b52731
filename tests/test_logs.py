"""Lines, entries, the ring, sinks and the pump, without a server."""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import os
import signal
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import msgspec
import pytest
from blockbuster import BlockBuster
from hypothesis import given
from hypothesis import strategies as st

from stepflow_runtime import LogConfig, LogEntry, LogFollower
from stepflow_runtime.logs.entry import decode, told_level
from stepflow_runtime.logs.grouping import Grouper
from stepflow_runtime.logs.pump import MAX_LINE, LineCutter, Pump
from stepflow_runtime.logs.ring import MAX_KEPT, Filter, Ring
from stepflow_runtime.logs.sinks import LogHub
from stepflow_runtime.server.platform.posix import READ_SIZE, Bell, Pipe

from .conftest import each_backend

DIAGS = {
    "trace_id": "t",
    "span_id": "s",
    "sampled": True,
    "run_id": "r",
    "flow_id": "f",
    "step_id": "a",
}
LINE = {
    "timestamp": "2026-11-23T02:27:44.413575+00:00",
    "level": "WARN",
    "target": "stepflow_execution::flow_executor",
    "file": "crates/x.rs",
    "line": 759,
    "message": "Starting",
    "diags": DIAGS,
}
AT = datetime(2026, 11, 23, 2, 27, 44, 413575, tzinfo=UTC)
ENTRY = LogEntry(
    timestamp=AT,
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
    extra={"diags": {"sampled": True}},
)


def line(**fields: Any) -> bytes:
    """A line as the server writes it."""
    return json.dumps({**LINE, **fields}, separators=(",", ":")).encode()


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
    for cut, original in zip([*lines, cutter.rest()], whole, strict=True):
        if len(original) <= cap:
            assert cut == original
        else:
            dropped = len(original) - cap
            assert cut == original[:cap] + b" ... [%d more bytes dropped]" % dropped


def test_100_megabytes_without_a_newline_take_the_memory_of_one_line() -> None:
    cutter = LineCutter()
    for _ in range(100):
        assert cutter.cut(b"x" * 1024 * 1024) == []
    (cut,) = cutter.cut(b"\n")
    assert cut == b"x" * MAX_LINE + b" ... [%d more bytes dropped]" % (99 * 1024 * 1024)


# -- entries ---------------------------------------------------------------------------


def test_a_log_line_becomes_an_entry() -> None:
    assert decode(line(), "stdout") == ENTRY


def test_what_an_entry_has_no_field_for_is_in_extra() -> None:
    odd = line(
        level="notice",
        line="x",
        target=None,
        name="n",
        args=[1],
        diags={**DIAGS, "run_id": 5, "user": "u"},
    )
    assert decode(odd, "stdout") == msgspec.structs.replace(
        ENTRY,
        level="INFO",
        line=None,
        target="",
        run_id=None,
        extra={
            "level": "notice",
            "line": "x",
            "name": "n",
            "args": [1],
            "diags": {"run_id": 5, "sampled": True, "user": "u"},
        },
    )
    assert decode(line(diags=[1]), "stdout").extra == {"diags": [1]}
    assert decode(line(level="warning"), "stdout").level == "WARN"


RUN = "01a20999-149c-7742-8de2-ca3113ca3b92"
OTHER = "01a20999-1524-7a73-b2bd-ea83e2f45008"


@pytest.mark.parametrize(
    ("message", "run_id"),
    [
        (f"Items execution completed: run_id={RUN}, item_count=1", RUN),
        (f"Items execution completed: run_id={OTHER}, item_count=1", OTHER),
        ("Starting", OTHER),
        ("a run_id=other one", OTHER),
        (f"task_id={RUN}, parent_run_id={RUN}", OTHER),
    ],
)
@pytest.mark.parametrize("odd", [{}, {"odd": 1}])
def test_a_run_that_the_message_names_has_the_say(
    message: str, run_id: str, odd: dict[str, Any]
) -> None:
    """When runs overlap, diags name the wrong one."""
    diags = {**DIAGS, "run_id": OTHER}
    entry = decode(line(message=message, diags=diags, **odd), "stdout")
    assert entry.run_id == run_id
    # Nothing of another run's is left, nor lost.
    assert entry.flow_id == ("f" if run_id == OTHER else None)
    kept = diags if run_id == RUN else {"sampled": True}
    assert entry.extra == {"diags": kept, **odd}
    outside = {name: value for name, value in LINE.items() if name != "diags"}
    raw = json.dumps({**outside, "message": message, **odd}).encode()
    named = None if "completed" not in message else run_id
    assert decode(raw, "stdout").run_id == named


def test_a_line_of_a_workers_own_logging_is_like_the_servers() -> None:
    """As stepflow_py's ``setup_observability`` writes it, ids outside of diags."""
    raw = json.dumps(
        {
            "timestamp": LINE["timestamp"],
            "level": "ERROR",
            "logger": "stepflow_py.worker",
            "message": "Component x failed: y",
            "exception": "Traceback (most recent call last):\nValueError: y",
            "run_id": RUN,
            "step_id": "a",
        }
    ).encode()
    assert decode(raw, "stderr") == LogEntry(
        timestamp=AT,
        level="ERROR",
        message="Component x failed: y\nTraceback (most recent call last):\nValueError: y",
        stream="stderr",
        run_id=RUN,
        step_id="a",
        extra={"logger": "stepflow_py.worker"},
    )


def test_entries_can_be_in_a_set() -> None:
    assert (
        len({ENTRY, decode(line(), "stdout"), decode(line(level="INFO"), "stdout")})
        == 2
    )


@pytest.mark.parametrize(
    "line",
    [
        b"thread 'main' panicked at x.rs:1",
        b"[1]",
        b"5",
        b"null",
        b'"text"',
        b"{}",
        b'{"level": 1}',
        b"{" * 100_000,
        line(timestamp="0000-01-01T00:00:00Z"),
        line(timestamp="99999-01-01T00:00:00Z"),
        line(timestamp="2026-11-23T02:27:44"),
        line(timestamp=5),
        line(message=None),
        line(level=3),
        line()[:-1],
        line()[:70],
        b"\xff\xfe nul \0",
    ],
)
def test_a_line_of_another_kind_is_an_entry_too(line: bytes) -> None:
    entry = decode(line, "stderr")
    assert entry.message == line.decode(errors="replace")
    assert (entry.level, entry.stream) == ("WARN", "stderr")
    assert entry.timestamp.tzinfo is not None


def test_a_line_that_was_cut_off_keeps_its_time_stamp_whenever_it_is_looked_at() -> (
    None
):
    assert decode(line()[:-20], "stdout").timestamp == AT


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4) | st.sampled_from(sorted(LINE)), inner)
    ),
    max_leaves=8,
)
KEYS = st.sampled_from([*sorted(LINE), "extra", "stream", "run_id", "name", "module"])


@given(
    st.dictionaries(KEYS, JSON).map(lambda changes: line(**changes))
    | st.binary()
    | JSON.map(lambda value: json.dumps(value).encode())
)
def test_decoding_never_raises_and_loses_nothing(raw: bytes) -> None:
    entry = decode(raw, "stdout")
    assert entry.level in ("TRACE", "DEBUG", "INFO", "WARN", "ERROR")
    assert entry.timestamp.tzinfo is not None
    if entry.message == raw.decode(errors="replace"):
        return
    fields = json.loads(raw)
    for name in ("timestamp", "message", "level", "target", "file", "line", "diags"):
        value = fields.pop(name, None)
        if name == "diags" and isinstance(value, dict):
            kept = entry.extra.get("diags", {})
            for key, each in value.items():
                assert_same(kept[key] if key in kept else getattr(entry, key), each)
        elif name == "timestamp":
            assert entry.timestamp.isoformat()
        elif value is not None and name not in entry.extra:
            told = getattr(entry, name)
            assert told == value or (name == "level" and told == value.upper())
    for name, value in fields.items():
        is_own = name in ("run_id", "stream") and name not in entry.extra
        assert_same(getattr(entry, name) if is_own else entry.extra[name], value)


def assert_same(one: object, other: object) -> None:
    """In JSON, where NaN is like itself."""
    assert json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


@pytest.mark.parametrize("level", ["TRACE", "DEBUG", "INFO", "WARN", "ERROR"])
def test_the_level_of_a_line_is_told_at_a_glance(level: str) -> None:
    assert told_level(line(level=level)) == level
    assert told_level(b" " + line(level=level)) is None
    assert told_level(b"x" * 1000) is None


# -- the ring --------------------------------------------------------------------------


def hub_of(**fields: Any) -> LogHub:
    return LogHub(LogConfig(**{"python_logger": None, **fields}))


def feed(hub: LogHub, stream: Any, lines: Sequence[bytes]) -> None:
    """What a pump does with lines."""
    batch = hub.take(stream, lines)
    assert batch is None or batch.work()


def messages(entries: Sequence[LogEntry]) -> list[str]:
    return [entry.message for entry in entries]


def test_the_ring_keeps_the_newest(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(1)
    hub = hub_of(keep=2)
    feed(hub, "stdout", [b"0", b"1"])
    feed(hub, "stdout", [b"2", line(message="3")])
    assert messages(hub.newest(10)) == ["2", "3"]
    assert messages(hub.newest(1)) == ["3"]
    assert messages(hub.newest(0)) == []
    assert messages(hub.since(3, 10)) == ["3"]
    feed(hub, "stderr", [b"%d" % number for number in range(4, 9)])
    assert messages(hub.newest(10)) == ["7", "8"]
    assert hub.taken == 9
    assert caplog.records == []


@pytest.mark.parametrize("is_json", [False, True])
def test_the_ring_is_bounded_in_bytes_too(is_json: bool) -> None:
    hub = hub_of()
    long = line(padding="x" * MAX_LINE) if is_json else b"x" * MAX_LINE
    for _ in range(40):
        feed(hub, "stdout", [long])
    assert len(hub.newest(100)) == MAX_KEPT // len(long)


def test_the_ring_counts_what_entries_take() -> None:
    """What ``extra`` holds takes 20 times as much memory as in the line."""
    hub = hub_of()
    long = line(padding=[[]] * (MAX_LINE // 4))
    tracemalloc.start()
    try:
        for _ in range(10):
            feed(hub, "stderr", [long])
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0 < kept < 2 * MAX_KEPT


def test_what_waits_weighs_what_it_takes(tmp_path: Any) -> None:
    hub = hub_of(file_path=tmp_path / "log")
    for lines in ([b""] * 100_000, [line(padding=[[]] * 100_000)]):
        tracemalloc.start()
        try:
            batch = hub.take("stderr", lines)
            taken, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert batch is not None
        assert taken / 2 < batch.weight


def test_what_is_wanted_is_picked() -> None:
    hub = hub_of()
    for number, level in enumerate(["ERROR", "INFO", "WARN", "DEBUG", "ERROR"]):
        diags = {"run_id": f"run-{number % 2}", "step_id": "a" if number > 1 else "b"}
        feed(hub, "stdout", [line(message=str(number), level=level, diags=diags)])
    feed(hub, "stderr", [b"Traceback"])

    def picked(limit: int = 100, **wanted: str) -> list[str]:
        return messages(hub.newest(limit, Filter(**wanted)))

    assert picked(level="warn") == ["0", "2", "4", "Traceback"]
    assert picked(level="WARN", limit=2) == ["4", "Traceback"]
    assert picked(run_id="run-0") == ["0", "2", "4"]
    assert picked(run_id="run-0", limit=2) == ["2", "4"]
    assert picked(run_id="run-1", step_id="a") == ["3"]
    assert picked(run_id="run-1", step_id="a", level="error") == []
    assert picked(run_id="run") == []


def test_the_newest_are_found_in_a_large_ring() -> None:
    hub = hub_of(keep=50_000)
    for number in range(50):
        diags = {"run_id": f"run-{number % 5}"}
        lines = [line(message=f"{number}-{each}", diags=diags) for each in range(1000)]
        feed(hub, "stdout", lines)
    found = hub.newest(1500, Filter(run_id="run-3"))
    assert messages(found) == [
        *(f"43-{each}" for each in range(500, 1000)),
        *(f"48-{each}" for each in range(1000)),
    ]
    assert len(hub.newest(20_000, Filter(run_id="run-3"))) == 10_000
    assert hub.newest(0, Filter(run_id="run-3")) == []
    assert hub.newest(5, Filter(run_id="run-9")) == []


@given(st.text(), st.text())
def test_an_id_is_found_however_json_writes_it(run_id: str, other: str) -> None:
    hub = hub_of()
    for each in (run_id, other):
        feed(hub, "stdout", [line(diags={"run_id": each})])
    expected = 1 + (run_id == other)
    assert len(hub.newest(10, Filter(run_id=run_id))) == expected


@pytest.mark.parametrize("level", ["notice", "", 3, "WARNING"])
def test_a_level_that_is_none_is_refused(level: Any) -> None:
    with pytest.raises(ValueError, match="level must be one of trace, debug, info"):
        Filter(level)


@pytest.fixture
def flooded() -> Iterator[LogHub]:
    """A hub that a thread fills all the time."""
    hub = hub_of(keep=1000)
    has_ended = threading.Event()

    def flood() -> None:
        while not has_ended.is_set():
            feed(hub, "stdout", [line()] * 100)

    thread = threading.Thread(target=flood)
    thread.start()
    yield hub
    has_ended.set()
    thread.join()


def test_a_forked_child_can_look_whatever_its_pumps_were_at(flooded: LogHub) -> None:
    for _ in range(100):
        pid = os.fork()
        if not pid:
            signal.alarm(5)
            os._exit(len(flooded.newest(5)))
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 5


def test_a_signal_handler_can_look_while_the_program_looks(flooded: LogHub) -> None:
    looks = 0

    def look(number: int, frame: Any) -> None:
        nonlocal looks
        looks += len(flooded.newest(1))

    faulthandler.dump_traceback_later(30, exit=True)
    before = signal.signal(signal.SIGALRM, look)
    try:
        deadline = time.monotonic() + 20
        while looks < 100 and time.monotonic() < deadline:
            signal.setitimer(signal.ITIMER_REAL, 0.0005)
            for _ in range(5):
                flooded.newest(100)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()
    assert looks >= 100


# -- followers -------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_follower_gets_what_comes_and_ends_with_the_log() -> None:
    hub = hub_of()
    feed(hub, "stdout", [b"0", b"1"])
    found: dict[int, list[str]] = {}

    async def follow(recent: int) -> None:
        follower = hub.follow(Filter(), recent)
        begun.append(recent)
        found[recent] = [entry.message async for entry in follower]
        assert follower.lost == 0

    begun: list[int] = []
    async with anyio.create_task_group() as tasks:
        for recent in (0, 1, 100):
            tasks.start_soon(follow, recent)
        while len(begun) < 3:
            await anyio.lowlevel.checkpoint()
        for number in range(2, 6):
            await anyio.to_thread.run_sync(feed, hub, "stdout", [b"%d" % number])
        hub.end()
    assert found[0] == ["2", "3", "4", "5"]
    assert found[1] == ["1", "2", "3", "4", "5"]
    assert found[100] == ["0", "1", "2", "3", "4", "5"]
    assert [e async for e in hub.follow(Filter(), 0)] == []
    assert len([e async for e in hub.follow(Filter(), 3)]) == 3


@pytest.mark.anyio
async def test_a_slow_follower_loses_the_oldest_which_are_counted() -> None:
    hub = hub_of(keep=10)
    follower = hub.follow(Filter(), 0)
    feed(hub, "stdout", [b"%d" % number for number in range(25)])
    assert (await anext(follower)).message == "15"
    assert follower.lost == 15
    feed(hub, "stdout", [b"%d" % number for number in range(25, 37)])
    hub.end()
    assert [entry.message async for entry in follower] == [
        *map(str, range(16, 25)),
        *map(str, range(27, 37)),
    ]
    assert follower.lost == 17


@pytest.mark.anyio
async def test_a_cancelled_follower_loses_nothing() -> None:
    hub = hub_of()
    follower = hub.follow(Filter(), 0)
    for _ in range(3):
        with anyio.move_on_after(0.01):
            await anext(follower)
    feed(hub, "stdout", [b"0", b"1"])
    with anyio.CancelScope() as scope:
        scope.cancel()
        await anext(follower)
    hub.end()
    assert [entry.message async for entry in follower] == ["0", "1"]


# -- the Python logger -----------------------------------------------------------------


class Plain(logging.LogRecord):
    pass


class OwnLogger(logging.Logger):
    def makeRecord(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = super().makeRecord(*args, **kwargs)
        record.own = True
        return record


@pytest.fixture(params=["plain", "factory", "class"])
def made_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Who makes records: we, a factory of the program's, or its class of loggers."""
    if request.param == "factory":
        monkeypatch.setattr(logging, "_logRecordFactory", Plain)
    name = f"test.{request.param}"
    if request.param == "class":
        logger = OwnLogger(name)
        logger.parent = logging.getLogger()
        monkeypatch.setitem(logging.Logger.manager.loggerDict, name, logger)
    yield request.param, name


def test_a_record_carries_the_servers_time_and_level_and_the_entry(
    caplog: pytest.LogCaptureFixture, made_by: tuple[str, str]
) -> None:
    kind, name = made_by
    logging.getLogger(name).setLevel(1)
    hub = hub_of(python_logger=name)
    hostile = {"name": "x", "args": [1], "module": 5, "exc_info": True, "msg": "no"}
    feed(hub, "stdout", [line(message="100 % {sure} %s", level="TRACE", **hostile)])
    feed(hub, "stderr", [b"a traceback"])
    first, second = caplog.records
    assert first.getMessage() == "100 % {sure} %s"
    assert (first.levelname, first.levelno) == ("TRACE", 5)
    assert first.created == AT.timestamp()
    assert first.msecs == 413
    assert (first.name, first.module, first.args) == (name, "x", ())
    assert (first.pathname, first.filename, first.lineno) == (
        "crates/x.rs",
        "x.rs",
        759,
    )
    assert first.exc_info is None
    (entry, _) = hub.newest(2)
    assert first.stepflow == entry  # type: ignore[attr-defined]
    assert entry.extra["name"] == "x"
    assert (second.levelname, second.pathname) == ("WARNING", "(stderr)")
    assert isinstance(first, Plain) == (kind == "factory")
    assert hasattr(first, "own") == (kind == "class")


def test_records_have_what_ordinary_ones_have(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(1, "stepflow.server")
    hub = hub_of(python_logger="stepflow.server")
    feed(hub, "stdout", [line(), line(message="again")])
    logging.getLogger("stepflow.server").info("an ordinary one")
    first, again, ordinary = caplog.records
    for record in (first, again):
        # caplog's formatter has added some to all of them.
        assert record.__dict__.keys() - {"stepflow"} == ordinary.__dict__.keys()
        for name, value in ordinary.__dict__.items():
            assert isinstance(record.__dict__[name], type(value) | None), name
    assert again.relativeCreated == pytest.approx(first.relativeCreated, abs=0.01)
    assert ordinary.created - first.created == pytest.approx(
        (ordinary.relativeCreated - first.relativeCreated) / 1000, abs=0.001
    )
    assert (first.process, first.name) == (os.getpid(), "stepflow.server")


def test_levels_and_handlers_count_as_for_any_logger() -> None:
    class Handler(logging.Handler):
        def __init__(self, level: int = 0) -> None:
            super().__init__(level)
            self.seen: list[str] = []

        def emit(self, record: logging.LogRecord) -> None:
            self.seen.append(record.getMessage())

    parent, logger = logging.getLogger("test.tree"), logging.getLogger("test.tree.leaf")
    above, at, picky = Handler(), Handler(), Handler(logging.ERROR)
    parent.addHandler(above)
    logger.addHandler(at)
    logger.addHandler(picky)
    hub = hub_of(python_logger="test.tree.leaf")

    def seen(*levels: str) -> tuple[list[str], ...]:
        feed(hub, "stdout", [line(level=level, message=level) for level in levels])
        found = above.seen, at.seen, picky.seen
        above.seen, at.seen, picky.seen = [], [], []
        return found

    try:
        logger.setLevel(logging.WARNING)
        assert seen("INFO", "WARN", "ERROR") == (
            ["WARN", "ERROR"],
            ["WARN", "ERROR"],
            ["ERROR"],
        )
        logger.setLevel(5)
        logger.propagate = False
        assert seen("TRACE") == ([], ["TRACE"], [])
        logger.addFilter(lambda record: "E" in record.getMessage())
        assert seen("DEBUG", "INFO") == ([], ["DEBUG"], [])
        logging.disable(logging.DEBUG)
        assert seen("DEBUG", "ERROR") == ([], ["ERROR"], ["ERROR"])
    finally:
        logging.disable(logging.NOTSET)
        for each in (parent, logger):
            each.handlers.clear()
            each.filters.clear()


def test_a_handler_that_raises_is_reported_once_and_the_others_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Raising(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise SystemExit("of a handler")

    hub = hub_of(python_logger="test.raising")
    logger = logging.getLogger("test.raising")
    logger.handlers[:] = [Raising()]
    try:
        feed(hub, "stdout", [line(), line()])
        feed(hub, "stdout", [line(message="last")])
    finally:
        logger.handlers.clear()
    own = [r for r in caplog.records if r.name == "stepflow_runtime"]
    (message,) = messages_of(own)
    assert message.startswith("a handler or filter of the logger 'test.raising' raised")
    assert messages(hub.newest(3)) == ["Starting", "Starting", "last"]


def messages_of(records: Sequence[logging.LogRecord]) -> list[str]:
    return [record.getMessage() for record in records]


def test_a_program_without_logging_gets_nothing_on_stderr(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    hub = hub_of(python_logger="somewhere.else")
    feed(hub, "stdout", [line()])
    assert capfd.readouterr() == ("", "")


def test_a_logger_whose_class_was_patched_is_asked_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As Sentry's client does, to see every record."""
    seen: list[str] = []
    call_handlers = logging.Logger.callHandlers

    def patched(logger: logging.Logger, record: logging.LogRecord) -> None:
        seen.append(record.getMessage())
        call_handlers(logger, record)

    monkeypatch.setattr(logging.Logger, "callHandlers", patched)
    feed(hub_of(python_logger="test.patched"), "stdout", [line(level="ERROR")])
    assert seen == ["Starting"]


def test_records_take_turns_and_none_is_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(1, "stepflow.server")
    hub = hub_of(python_logger="stepflow.server")
    batch = hub.take("stdout", [line(message=str(number)) for number in range(5)])
    assert batch is not None
    turns = 1
    while not batch.work(until=0):
        turns += 1
    assert turns == 5
    assert messages_of(caplog.records) == ["0", "1", "2", "3", "4"]


def test_a_line_that_only_looks_like_the_servers_is_json_in_the_file(
    tmp_path: Any,
) -> None:
    hub = hub_of(file_path=tmp_path / "log")
    hub.open()
    broken = line()[:-1] + b'"\x07}'
    control = line(message="?2J").replace(b"?", b"\xc2\x9b")
    feed(hub, "stdout", [broken, line(), control, control.replace(b"\xc2", b"")])
    hub.close()
    first, second, third, fourth = (tmp_path / "log").read_bytes().split(b"\n")[:-1]
    assert json.loads(first)["message"] == broken.decode()
    assert second == line()
    assert b"\\u009b2J" in third
    assert json.loads(third) == json.loads(control)
    assert "\ufffd2J" in json.loads(fourth)["message"]


# -- redaction -------------------------------------------------------------------------


def test_what_is_redacted_nobody_sees(
    caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    def redact(entry: LogEntry) -> LogEntry | None:
        if "drop" in entry.message:
            return None
        if "raise" in entry.message:
            raise ValueError(f"cannot hide {entry.message}")
        if "wrong" in entry.message:
            return entry.message  # type: ignore[return-value]
        return msgspec.structs.replace(
            entry, message=entry.message.replace("s3cret", "***"), extra={}
        )

    caplog.set_level(1, "stepflow.server")
    path = tmp_path / "log"
    hub = hub_of(python_logger="stepflow.server", file_path=path, redact=redact)
    hub.open()
    feed(hub, "stdout", [line(message=f"{word} s3cret") for word in ("a", "drop", "b")])
    feed(hub, "stderr", [b"raise s3cret", b"wrong s3cret"])
    hub.close()
    assert messages(hub.newest(10)) == [
        "a ***",
        "b ***",
        "[withheld: log_config.redact raised ValueError]",
        "[withheld: log_config.redact raised TypeError]",
    ]
    assert hub.taken == 4
    assert len(caplog.records) == 5  # one report
    assert "s3cret" not in caplog.text
    assert "s3cret" not in path.read_text()
    assert len(path.read_text().splitlines()) == 4


# -- the pump --------------------------------------------------------------------------


class Plumbing:
    """A pipe with a pump at its end."""

    def __init__(
        self,
        take: Callable[[Sequence[bytes]], Any],
        capacity: int = 65536,
        **more: Any,
    ) -> None:
        reading, self.writing = os.pipe()
        self.pipe = Pipe(os.fdopen(reading, "rb", buffering=0), Bell(), capacity)
        self.pump = Pump(self.pipe, take, **more)

    def write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self.writing, data) :]

    def close(self) -> None:
        os.close(self.writing)
        self.writing = -1


@pytest.fixture
def plumb() -> Iterator[Callable[..., Plumbing]]:
    made: list[Plumbing] = []

    def make(*args: Any, **kwargs: Any) -> Plumbing:
        made.append(Plumbing(*args, **kwargs))
        return made[-1]

    yield make
    for each in made:
        each.pipe.close()
        if each.writing >= 0:
            each.close()
    wait_for_pumps()


def wait_for_pumps() -> None:
    for thread in threading.enumerate():
        if "log pump" in thread.name:
            thread.join(10)
            assert not thread.is_alive()


@pytest.mark.anyio
async def test_the_pump_reads_to_the_end_of_the_pipe(plumb: Any) -> None:
    lines: list[bytes] = []
    plumbing = plumb(lines.extend)

    def write() -> None:
        plumbing.write(b"".join(b"line %d\n" % number for number in range(30_000)))
        plumbing.write(b"x" * (MAX_LINE + 5) + b"\nlast")
        plumbing.close()

    plumbing.pump.start()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, write)
        await plumbing.pump.wait()
    assert lines[:30_000] == [b"line %d" % number for number in range(30_000)]
    assert lines[30_000:] == [b"x" * MAX_LINE + b" ... [5 more bytes dropped]", b"last"]


@pytest.mark.anyio
async def test_a_pump_that_is_to_finish_takes_what_is_there(plumb: Any) -> None:
    """Although somebody holds the other end."""
    lines: list[bytes] = []
    plumbing = plumb(lines.extend)
    plumbing.pump.start()
    plumbing.write(b"whole\nhalf")
    with anyio.move_on_after(0.05) as scope:
        await plumbing.pump.wait()
    assert scope.cancelled_caught
    plumbing.write(b" and more\nrest")
    plumbing.pump.finish()
    await plumbing.pump.wait()
    assert lines == [b"whole", b"half and more", b"rest"]


@pytest.mark.anyio
async def test_a_pipe_is_closed_by_the_last_who_uses_it(plumb: Any) -> None:
    plumbing = plumb(lambda lines: None)
    plumbing.pump.start()
    await anyio.sleep(0.02)
    plumbing.pipe.close()
    plumbing.pipe.close()
    await plumbing.pump.wait()
    with pytest.raises(BrokenPipeError):
        os.write(plumbing.writing, b"x")
    assert plumbing.pipe.read() == b""


def test_a_forked_child_closes_a_pipe_whatever_its_pump_was_at(plumb: Any) -> None:
    pipe = plumb(lambda lines: None).pipe
    with pipe._lock:
        pid = os.fork()
        if not pid:
            signal.alarm(5)
            pipe.forget()
            pipe.close()
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert pipe.read(0) is None  # the parent's is open


def test_a_file_that_is_opened_when_all_is_over_is_closed(tmp_path: Any) -> None:
    """The start was cancelled while the disk took its time."""
    hub = hub_of(file_path=tmp_path / "log")
    hub.close()
    hub.open()
    feed(hub, "stdout", [line()])
    assert (tmp_path / "log").read_bytes() == b""


@pytest.mark.anyio
async def test_the_announcement_is_not_a_line_of_the_log(plumb: Any) -> None:
    lines: list[bytes] = []
    heard: list[bytes] = []

    def hear(line: bytes) -> bool:
        heard.append(line)
        return line == b"port"

    plumbing = plumb(lines.extend, hear=hear)
    plumbing.write(b"one\nport\ntwo\nport\n")
    plumbing.close()
    plumbing.pump.start()
    await plumbing.pump.wait()
    assert lines == [b"one", b"two", b"port"]
    assert heard == [b"one", b"port"]


@pytest.mark.anyio
async def test_a_hearer_that_raises_does_not_stop_the_pump(
    plumb: Any, caplog: pytest.LogCaptureFixture
) -> None:
    lines: list[bytes] = []

    def hear(line: bytes) -> bool:
        raise RecursionError

    plumbing = plumb(lines.extend, hear=hear)
    plumbing.write(b"one\ntwo\n")
    plumbing.close()
    plumbing.pump.start()
    await plumbing.pump.wait()
    assert lines == [b"one", b"two"]
    assert messages_of(caplog.records) == ["a line could not be looked at"]


@pytest.mark.anyio
async def test_lines_gather_and_a_hurry_ends_the_gathering(
    plumb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepflow_runtime.server.platform.posix.FASTEST", 1)
    batches: list[Sequence[bytes]] = []
    plumbing = plumb(batches.append, capacity=600)
    plumbing.pump.start()
    plumbing.write(b"1\n")
    await until(lambda: batches)
    plumbing.write(b"2\n")
    plumbing.write(b"3\n")
    await anyio.sleep(0.05)
    assert batches == [[b"1"]]
    plumbing.pump.hurry()
    await until(lambda: len(batches) == 2)
    plumbing.write(b"4\n")
    plumbing.close()
    plumbing.pump.finish()
    await plumbing.pump.wait()
    assert batches == [[b"1"], [b"2", b"3"], [b"4"]]


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(10):
        while not condition():  # noqa: ASYNC110
            await anyio.sleep(0.001)


@pytest.mark.anyio
async def test_what_belongs_together_is_handed_on_when_no_more_comes(
    plumb: Any,
) -> None:
    texts: list[bytes] = []
    plumbing = plumb(texts.extend, grouper=Grouper())
    plumbing.pump.start()
    traceback = b"Traceback (most recent call last):\n  File x\n    y\nValueError: z"
    plumbing.write(b"before\n" + traceback + b"\n")
    await until(lambda: texts == [b"before", traceback])
    plumbing.write(traceback[:40])
    plumbing.close()
    await plumbing.pump.wait()
    assert texts[2] == traceback[:40]


@pytest.mark.anyio
async def test_a_taker_that_raises_does_not_stop_the_pump(
    plumb: Any, caplog: pytest.LogCaptureFixture
) -> None:
    lines: list[bytes] = []

    def take(batch: Sequence[bytes]) -> None:
        if batch[0].startswith(b"bad"):
            raise KeyboardInterrupt
        lines.extend(batch)

    plumbing = plumb(take)
    plumbing.pump.start()
    for batch in (b"1\n", b"bad\nworse\n", b"bad\n", b"2\n"):
        plumbing.write(batch)
        await anyio.sleep(0.03)
    plumbing.close()
    await plumbing.pump.wait()
    assert lines == [b"1", b"2"]
    assert messages_of(caplog.records) == ["log lines were lost"]


class Slow:
    """What else is to be done with lines, and takes its time."""

    def __init__(self, done: list[bytes], lines: Sequence[bytes], free: Any) -> None:
        self._done, self._lines, self._free = done, [*lines], free
        self.weight = sum(map(len, lines))

    def work(self, until: float) -> bool:
        if not self._free.wait(10 if until == math.inf else 0.01):
            return False
        self._done += self._lines
        return True


@pytest.mark.anyio
async def test_reading_comes_first(plumb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What else is to be done is done later, in order, and none of it is left out."""
    monkeypatch.setattr("stepflow_runtime.logs.pump.MOST_WAITING", 50_000_000)
    taken: list[bytes] = []
    done: list[bytes] = []
    free = threading.Event()

    def take(lines: Sequence[bytes]) -> Slow:
        taken.extend(lines)
        return Slow(done, lines, free)

    plumbing = plumb(take)
    plumbing.pump.start()
    many = [b"line %d" % number for number in range(100_000)]
    await anyio.to_thread.run_sync(plumbing.write, b"\n".join(many) + b"\n")
    await until(lambda: len(taken) == 100_000)
    assert done == []
    plumbing.close()
    with anyio.fail_after(10):
        await plumbing.pump.wait_read()
    free.set()
    await plumbing.pump.wait()
    assert taken == done == many


@pytest.mark.anyio
async def test_what_waits_is_bounded(
    plumb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler that is behind for good holds up the server in the end; nothing is lost."""
    monkeypatch.setattr("stepflow_runtime.logs.pump.MOST_WAITING", 100_000)
    taken: list[bytes] = []
    done: list[bytes] = []
    free = threading.Event()

    def take(lines: Sequence[bytes]) -> Slow:
        taken.extend(lines)
        return Slow(done, lines, free)

    plumbing = plumb(take)
    plumbing.pump.start()
    many = [b"x" * 99] * 20_000
    writer = threading.Thread(target=plumbing.write, args=(b"\n".join(many) + b"\n",))
    writer.start()
    await until(lambda: len(taken) * 100 > 100_000)
    await anyio.sleep(0.2)
    assert len(taken) * 100 <= 100_000 + READ_SIZE
    free.set()
    await until(lambda: len(done) == 20_000)
    await anyio.to_thread.run_sync(writer.join)


@each_backend
@pytest.mark.anyio
async def test_a_blocked_event_loop_holds_up_nothing(
    plumb: Any, blockbuster: BlockBuster
) -> None:
    blockbuster.deactivate()
    hub = hub_of()
    plumbing = plumb(partial(hub.take, "stdout"))
    plumbing.pump.start()
    many = (line() + b"\n") * 10_000  # more than any pipe holds
    writer = threading.Thread(target=plumbing.write, args=(many,))
    writer.start()
    deadline = time.monotonic() + 20
    while hub.taken < 10_000:  # a busy event loop
        assert time.monotonic() < deadline
    writer.join()


def test_an_ended_ring_wakes_those_who_follow_from_any_thread() -> None:
    ring = Ring(10)
    follower = LogFollower(ring, Filter(), 0)

    async def follow() -> list[LogEntry]:
        return [entry async for entry in follower]

    threading.Timer(0.05, ring.end).start()
    assert anyio.run(follow) == []
