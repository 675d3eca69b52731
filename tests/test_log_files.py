"""The ends of the log's way: entries as bytes, and bytes in files, without a server."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepflow_runtime import LogEntry
from stepflow_runtime.logs import files
from stepflow_runtime.logs.entry import Stream, decode
from stepflow_runtime.logs.files import LogFile, ParentStderr
from stepflow_runtime.logs.rendering import as_json, as_text

from .test_forks import in_a_forked_child

# What the server writes with --log-format json, and for the same with text.
IN_A_RUN_JSON = (
    b'{"timestamp":"2026-11-23T18:19:59.834193+00:00","level":"DEBUG","target":"stepflow_'
    b'execution::step_runner","file":"crates/stepflow-execution/src/step_runner.rs","line":'
    b'293,"message":"Executing step: component=/noop","diags":{"trace_id":"01a209a2e3d9",'
    b'"span_id":"6911857800000002","sampled":true,"run_id":"01a209a2-e3d9","flow_id":'
    b'"d7b6842742f0","step_id":"a"}}'
)
IN_A_RUN_TEXT = (
    b"2026-11-23T18:19:59.834193+00:00  DEBUG stepflow_execution::step_runner: step_runner"
    b".rs:293 Executing step: component=/noop trace_id=01a209a2e3d9 span_id=69118578000000"
    b"02 sampled=true run_id=01a209a2-e3d9 flow_id=d7b6842742f0 step_id=a"
)
OUTSIDE_JSON = (
    b'{"timestamp":"2026-11-23T18:19:59.000000+00:00","level":"INFO","target":"stepflow_'
    b'server::startup","file":"crates/stepflow-server/src/startup.rs","line":166,"message":'
    b'"Stepflow server starting \xe2\x80\x94 on http://0.0.0.0:36393"}'
)
OUTSIDE_TEXT = (
    b"2026-11-23T18:19:59.000000+00:00   INFO stepflow_server::startup: startup.rs:166 Step"
    b"flow server starting \xe2\x80\x94 on http://0.0.0.0:36393"
)

STAMP = datetime(2026, 11, 23, 18, 19, 59, 123456, UTC)


def entry(message: str = "m", stream: Stream = "stdout", **fields: Any) -> LogEntry:
    fields = {"timestamp": STAMP, "level": "INFO", **fields}
    return LogEntry(message=message, stream=stream, **fields)


# -- entries as JSON -------------------------------------------------------------------


@pytest.mark.parametrize("line", [IN_A_RUN_JSON, OUTSIDE_JSON])
def test_an_entry_is_written_as_the_line_it_came_from(line: bytes) -> None:
    assert as_json(decode(line, "stdout")) == line


def essence(made: LogEntry) -> LogEntry:
    """An entry without the mark of standard error, and nulls, which say nothing."""
    extra = dict(made.extra)
    if extra.get("stream") == made.stream:
        del extra["stream"]
    if isinstance(extra.get("diags"), dict):
        extra["diags"] = without_nulls(extra["diags"], [*IDS, "sampled"])
    extra = without_nulls(extra, ["file", "line"])
    if not extra.get("diags", True):
        del extra["diags"]
    return msgspec.structs.replace(made, extra=extra)


def without_nulls(values: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if v is not None or k not in names}


IDS = ["run_id", "flow_id", "step_id", "trace_id", "span_id"]
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
    ),
    max_leaves=6,
)
offsets = st.integers(-1439, 1439).map(lambda n: timezone(timedelta(minutes=n)))
stamps = st.datetimes(timezones=st.just(UTC) | offsets)
levels = st.sampled_from(["TRACE", "INFO", "ERROR", "warning", "Notice", "\x85", ""])
diags = st.dictionaries(
    st.sampled_from(["trace_id", "run_id", "step_id", "sampled", "x"]) | texts,
    texts | values,
    max_size=5,
)
log_lines = st.fixed_dictionaries(
    {
        "timestamp": stamps.map(datetime.isoformat),
        "level": levels,
        "message": texts,
    },
    optional={
        "target": texts | values,
        "file": texts | values,
        "line": st.integers() | values,
        "diags": diags | values,
        "kvs": values,
        "extra": values,
        "\x85": values,
    },
)


@given(log_lines, st.sampled_from(["stdout", "stderr"]))
def test_what_was_decoded_is_the_same_when_it_is_decoded_again(
    fields: dict[str, Any], stream: Stream
) -> None:
    made = decode(json.dumps(fields, ensure_ascii=False).encode(), stream)
    line = as_json(made)
    assert essence(decode(line, stream)) == essence(made)
    assert b"\n" not in line
    assert as_text(made)


@given(st.binary(max_size=50), st.sampled_from(["stdout", "stderr"]))
def test_so_is_what_was_no_log_line(line: bytes, stream: Stream) -> None:
    made = decode(line, stream)
    assert essence(decode(as_json(made), stream)) == made


NAMES = st.sampled_from(
    ["timestamp", "level", "target", "file", "line", "message", "stream", "diags"]
    + ["run_id", "extra", "kvs"]
)
any_texts = st.text(max_size=20)
any_extras: st.SearchStrategy[dict[str, Any]] = st.dictionaries(
    NAMES | any_texts,
    values | any_texts | st.dictionaries(NAMES | any_texts, values | any_texts),
    max_size=5,
)
any_zones = st.none() | st.timedeltas(timedelta(hours=-23), timedelta(hours=23)).map(
    timezone
)
any_entries = st.builds(
    LogEntry,
    timestamp=st.datetimes(timezones=any_zones),
    level=levels | any_texts,
    message=any_texts,
    stream=st.sampled_from(["stdout", "stderr"]),
    target=any_texts,
    file=st.none() | any_texts,
    line=st.none() | st.integers(),
    run_id=st.none() | any_texts,
    flow_id=st.none() | any_texts,
    step_id=st.none() | any_texts,
    trace_id=st.none() | any_texts,
    span_id=st.none() | any_texts,
    extra=any_extras,
)


def sayable(text: str | None) -> str | None:
    return text and text.encode(errors="backslashreplace").decode()


@given(any_entries)
def test_no_extra_passes_for_a_field(made: LogEntry) -> None:
    line = as_json(made)
    assert b"\n" not in line
    found = decode(line, made.stream)
    assert found.timestamp.tzinfo is not None
    if made.timestamp.tzinfo is not None and 1 < made.timestamp.year < 9999:
        assert found.timestamp == made.timestamp
    for name in LogEntry.__struct_fields__:
        own = getattr(made, name)
        if isinstance(own, str):
            own = sayable(own)
        if name not in ("timestamp", "level", "extra"):
            assert getattr(found, name) == own
    if made.level in ("TRACE", "INFO", "ERROR"):
        assert found.level == made.level
    marked = json.loads(line).get("stream")
    assert marked == ("stderr" if made.stream == "stderr" else None)


def test_extra_that_claims_a_field_is_put_aside() -> None:
    claims = {"message": "fake", "level": "ERROR", "target": "fake", "stream": "stderr"}
    made = entry(
        run_id="r",
        extra={**claims, "extra": 1, "diags": {"run_id": "fake", "x": 1}},
    )
    assert json.loads(as_json(made)) == {
        "timestamp": "2026-11-23T18:19:59.123456+00:00",
        "level": "INFO",
        "message": "m",
        "diags": {"run_id": "r", "x": 1},
        "extra": {**claims, "extra": 1, "diags": {"run_id": "fake"}},
    }


def test_lines_of_standard_error_are_marked() -> None:
    line = as_json(entry("boom", "stderr", level="WARN"))
    assert line.endswith(b'"level":"WARN","message":"boom","stream":"stderr"}')


@pytest.mark.parametrize(
    "value", ["\udc80", {"\udc80": 1}, object(), {1, object()}, [[object()]], {None: 1}]
)
def test_what_json_cannot_say_is_said_as_far_as_it_goes(value: object) -> None:
    found = json.loads(as_json(entry("a\udc80b", run_id="\udc80", extra={"x": value})))
    assert found["message"] == "a\\udc80b"
    assert found["diags"] == {"run_id": "\\udc80"}
    assert "x" in found


def test_values_that_are_nested_too_deep_are_left_out() -> None:
    deep: list[object] = []
    for _ in range(1_000_000):  # Python 3.14 has the stack alone for a limit
        deep = [deep]
    made = entry(extra={"deep": deep})
    assert len(as_json(made)) < 1000
    assert len(as_text(made)) < 1000


@pytest.mark.parametrize(
    ("stamp", "text"),
    [
        (STAMP.replace(microsecond=0), "2026-11-23T18:19:59.000000+00:00"),
        (datetime.min.replace(tzinfo=UTC), "0001-01-01T00:00:00.000000+00:00"),
        (datetime.max.replace(tzinfo=UTC), "9999-12-31T23:59:59.999999+00:00"),
        (
            datetime.max.replace(tzinfo=timezone(timedelta(hours=-2))),
            "9999-12-31T23:59:59.999999-02:00",
        ),
        (
            datetime.max.replace(tzinfo=timezone(timedelta(seconds=-1))),
            "9999-12-31T23:59:59.999999+00:00",
        ),
        (
            STAMP.astimezone(timezone(timedelta(seconds=-1))),
            "2026-11-23T18:19:59.123456+00:00",
        ),
    ],
)
def test_every_time_is_written_in_the_servers_way(stamp: datetime, text: str) -> None:
    made = entry(timestamp=stamp)
    assert json.loads(as_json(made))["timestamp"] == text
    assert as_text(made).startswith(text.encode() + b" ")


# -- entries as text -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "text"),
    [(IN_A_RUN_JSON, IN_A_RUN_TEXT), (OUTSIDE_JSON, OUTSIDE_TEXT)],
)
def test_text_is_what_the_server_makes_of_it(line: bytes, text: bytes) -> None:
    assert as_text(decode(line, "stdout")) == text


def test_fields_of_the_call_come_before_the_run() -> None:
    made = entry(run_id="r", extra={"kvs": {"n": 1, "s": "t"}, "odd": [1, "ü"]})
    assert as_text(made).endswith(' m n=1 s=t odd=[1,"ü"] run_id=r'.encode())


def test_what_a_worker_printed_has_the_streams_name() -> None:
    text = "Traceback (most recent call last):\n\tfile\nKeyError: 'ü'"
    assert as_text(entry(text, "stderr", level="WARN")) == (
        f"2026-11-23T18:19:59.123456+00:00   WARN stderr: {text}".encode()
    )


def test_a_module_that_logs_to_standard_error_is_marked() -> None:
    assert as_text(entry(stream="stderr", target="t")).endswith(b" t: m stream=stderr")


def test_text_has_nothing_that_a_terminal_obeys() -> None:
    nasty = "\x1b[1mbold\x1b[22m \x1b]0;title\x07 \x1b\x1b[0m[2J \r\x9b2J\x7f"
    made = entry(nasty, target="a\nb", step_id="c\nd", extra={"k\n": nasty})
    text = as_text(made)
    assert text.count(b"\n") == 0
    shown = rb"bold \x1b]0;title\x07 \x1b[2J \r\x9b2J\x7f"
    assert b" a\\nb: " + shown in text
    assert b" k\\n=" + shown in text
    assert text.endswith(b" step_id=c\\nd")


def test_no_line_of_a_message_passes_for_another_entry() -> None:
    made = entry("one\n2026-11-24T00:00:00Z forged\n\x1b[0m2026-11-24 too\n2026")
    first, *others = as_text(made).split(b"\n")
    assert first.endswith(b" one")
    assert others == [b" 2026-11-24T00:00:00Z forged", b" 2026-11-24 too", b"2026"]


@given(any_entries)
def test_no_entry_makes_text_that_a_terminal_obeys(made: LogEntry) -> None:
    text = as_text(made).decode()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    assert text.count("\n") == made.message.count("\n")


@given(any_entries)
def test_nor_json(made: LogEntry) -> None:
    assert not re.search("[\x00-\x1f\x80-\x9f]", as_json(made).decode())


# -- the file --------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "server.log"


@contextmanager
def opened(path: str | os.PathLike[str], **options: Any) -> Iterator[LogFile]:
    log = LogFile(path, **options)
    log.open()
    try:
        yield log
    finally:
        log.close()


def lines_of(path: Path) -> list[bytes]:
    """The lines of a file, each of which has to be whole."""
    content = path.read_bytes()
    assert content.endswith(b"\n") or not content
    return content.split(b"\n")[:-1]


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


NOTICE = re.compile(rb"(\d+) log lines? could not be written here: ([^\"]*)")


def lost_in(line: bytes) -> int | None:
    found = NOTICE.search(line)
    return int(found[1]) if found is not None else None


def test_lines_are_appended(path: Path) -> None:
    path.write_bytes(b"old\n")
    with opened(path) as log:
        log.write([b"a", b"", b"two\nlines"])
        log.write([])
        log.write([b"b"])
    assert path.read_bytes() == b"old\na\n\ntwo\nlines\nb\n"


def test_a_line_that_somebody_left_without_its_end_is_ended(path: Path) -> None:
    path.write_bytes(b"old, and broken o")
    with opened(path) as log:
        log.write([b"a"])
    assert path.read_bytes() == b"old, and broken o\na\n"


def test_a_new_file_is_for_its_owner_alone(path: Path) -> None:
    with opened(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_file_of_others_keeps_its_mode_also_when_it_is_rotated(path: Path) -> None:
    path.touch()
    path.chmod(0o640)
    with opened(path) as log:
        path.rename(path.with_suffix(".1"))
        path.with_suffix(".1").chmod(0o400)
        log.write([b"a"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_programs_that_are_started_do_not_inherit_the_file(path: Path) -> None:
    with opened(path) as log:
        assert log._fd is not None and not os.get_inheritable(log._fd)


def test_a_forked_child_lets_go_of_the_file(path: Path) -> None:
    with opened(path) as log:

        def look() -> None:
            links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
            held = [os.readlink(link) for link in links if os.path.lexists(link)]
            assert str(path) not in held
            log.write([b"from the child"])
            log.close()

        assert in_a_forked_child(look) == ""
        log.write([b"a"])
    assert lines_of(path) == [b"a"]


def test_it_is_closed_as_often_as_one_likes(path: Path) -> None:
    log = LogFile(path)
    log.close()
    log.write([b"nobody opened it"])
    log.open()
    log.open()
    log.write([b"a"])
    log.close()
    log.close()
    log.write([b"too late"])
    log.open()
    log.write([b"b"])
    log.close()
    assert lines_of(path) == [b"a", b"b"]


@pytest.mark.parametrize(
    ("make", "number"),
    [
        (lambda path: None, errno.ENOENT),
        (lambda path: (path.parent.mkdir(), path.mkdir()), errno.EISDIR),
        (lambda path: path.parent.touch(), errno.ENOTDIR),
        (lambda path: (path.parent.mkdir(), path.symlink_to(path)), errno.ELOOP),
    ],
)
def test_what_cannot_be_written_to_cannot_be_opened(
    tmp_path: Path, make: Callable[[Path], object], number: int
) -> None:
    path = tmp_path / "directory" / "server.log"
    make(path)
    with pytest.raises(OSError) as caught:
        LogFile(path).open()
    assert caught.value.errno == number
    assert caught.value.filename == str(path)


def test_a_change_of_directory_does_not_move_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    with opened("server.log") as log:
        monkeypatch.chdir(elsewhere)
        log.write([b"a"])
    assert lines_of(tmp_path / "server.log") == [b"a"]
    assert not list(elsewhere.iterdir())


# -- rotation --------------------------------------------------------------------------


def test_a_file_that_was_moved_away_is_made_anew(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(path) as log:
        log.write([b"a"])
        path.rename(path.with_suffix(".1"))
        log.write([b"b"])
        path.unlink()
        log.write([b"c"])
    assert lines_of(path.with_suffix(".1")) == [b"a"]
    assert lines_of(path) == [b"c"]
    assert told(caplog) == []


def test_a_file_that_the_rotation_made_is_taken(path: Path) -> None:
    with opened(path) as log:
        log.write([b"a"])
        path.rename(path.with_suffix(".1"))
        path.write_bytes(b"rotated\n")
        log.write([b"b"])
    assert lines_of(path) == [b"rotated", b"b"]


def test_a_file_that_was_copied_and_truncated_begins_anew(path: Path) -> None:
    with opened(path) as log:
        log.write([b"a" * 100])
        os.truncate(path, 0)
        log.write([b"b"])
    assert path.read_bytes() == b"b\n"


def test_without_a_place_for_a_new_file_the_old_one_goes_on(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moved = tmp_path / "server.log.1"
    with opened(path) as log:
        path.rename(moved)
        path.mkdir()
        log.write([b"a"])
        log.write([b"b"])
        path.rmdir()
        log.write([b"c"])
    assert lines_of(moved) == [b"a", b"b"]
    assert lines_of(path) == [b"c"]
    away, back = told(caplog)
    assert "was moved away, and cannot be opened anew: Is a directory" in away
    assert "is written again" in back


def test_lines_for_a_deleted_file_and_directory_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "logs" / "server.log"
    path.parent.mkdir()
    with opened(path) as log:
        shutil.rmtree(path.parent)
        log.write([b"a"])
        log.write([b"b", b"c"])
        path.parent.mkdir()
        log.write([b"d"])
    notice, line = lines_of(path)
    assert lost_in(notice) == 3
    assert b"No such file or directory" in notice
    assert line == b"d"
    gone, back = told(caplog)
    assert "log lines are lost: No such file or directory" in gone
    assert "can be written to again; 3 log lines were lost" in back


# -- full disks ------------------------------------------------------------------------


def test_a_full_disk_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    with opened("/dev/full") as log:
        for _ in range(10):
            log.write([b"a", b"b"])
    full, end = told(caplog)
    assert "'/dev/full' cannot be written to, and log lines are lost: No space" in full
    assert "until its end; 20 log lines were lost" in end
    assert {record.name for record in caplog.records} == {"stepflow_runtime"}


def test_a_disk_that_fills_up_again_at_once_is_no_news(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(path) as log, injected(log) as script:
        for _ in range(5):
            script.append(errno.ENOSPC)
            log.write([b"a"])
            log.write([b"b"])
        assert len(told(caplog)) == 2
        # But one that lasts is.
        monkeypatch.setattr(files, "_NEWS", 0)
        script.append(errno.ENOSPC)
        log.write([b"a"])
        assert len(told(caplog)) == 3
        log.write([b"b"])
    assert told(caplog)[-1].endswith("can be written to again; 5 log lines were lost")


LIMITED = """
import logging, os, resource, sys
logging.basicConfig(format="%(message)s", stream=sys.stdout)
from stepflow_runtime.logs.files import LogFile
log = LogFile(sys.argv[1], sys.argv[2])
log.open()
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
for number in range(30):
    log.write([b"%d " % number + b"x" * 40 for _ in range(3)])
print(os.stat(sys.argv[1]).st_size)
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
log.write([b"after"])
log.close()
"""


@pytest.mark.parametrize("format", ["json", "text"])
def test_a_limit_in_the_middle_of_a_line_leaves_whole_lines(
    path: Path, format: str
) -> None:
    done = run_python(LIMITED, str(path), format)
    full, size, again = done.stdout.decode().splitlines()
    assert "log lines are lost: File too large" in full
    assert "can be written to again" in again
    *before, notice, after = lines_of(path)
    lost = lost_in(notice)
    assert int(size) == sum(len(line) + 1 for line in before) <= 1000
    assert all(re.fullmatch(rb"\d+ x{40}", line) for line in before)
    assert len(before) > 20
    assert lost is not None and len(before) + lost == 90
    assert after == b"after"
    parsed = decode(notice, "stdout")
    if format == "json":
        assert (parsed.level, parsed.target) == ("WARN", "stepflow_runtime")
    else:
        assert b"   WARN stepflow_runtime: " in notice


def run_python(
    program: str, *arguments: str, **options: Any
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        timeout=30,
        check=True,
        **options,
    )


Fault = int | float
"""An errno, or how large a part of the bytes is written; 0 is the answer of some devices."""


@contextmanager
def injected(
    log: LogFile, faults: Sequence[Fault] = (), *, may_cut: bool = True
) -> Iterator[list[Fault]]:
    """Let writes to the file go wrong, one after the other as the script says."""
    script = list(faults)
    write, ftruncate = os.write, os.ftruncate

    def faulty_write(fd: int, data: bytes) -> int:
        if fd != log._fd or not script:
            return write(fd, data)
        fault = script.pop(0)
        if fault == 0:
            return 0
        if isinstance(fault, float):
            return write(fd, data[: max(int(len(data) * fault), 1)])
        raise OSError(fault, os.strerror(fault))

    def faulty_truncate(fd: int, length: int) -> None:
        if not may_cut:
            raise PermissionError(errno.EPERM, "append-only")
        ftruncate(fd, length)

    with (
        mock.patch.object(os, "write", faulty_write),
        mock.patch.object(os, "ftruncate", faulty_truncate),
    ):
        yield script


faults = st.lists(
    st.sampled_from([errno.ENOSPC, errno.EDQUOT, errno.EIO, 0])
    | st.floats(0, 1, exclude_max=True),
    max_size=30,
)
batches = st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=4), max_size=12)


@given(batches, faults, st.booleans())
def test_whatever_is_not_in_the_file_is_counted_where_it_is_missing(
    tmp_path_factory: pytest.TempPathFactory,
    batches: list[list[int]],
    faults: list[Fault],
    may_cut: bool,
) -> None:
    path = tmp_path_factory.mktemp("x") / "server.log"
    written: list[bytes] = []
    with opened(path) as log:
        with injected(log, faults, may_cut=may_cut):
            for sizes in batches:
                batch = [
                    b"%d %s" % (number, b"x" * size)
                    for number, size in enumerate(sizes, len(written))
                ]
                written += batch
                log.write(batch)
                if may_cut:
                    lines_of(path)  # whole at every moment
        log.write([b"end"])
    written.append(b"end")
    place = 0
    for line in lines_of(path):
        lost = lost_in(line)
        if lost is None:
            assert line == written[place]
        place += lost or 1
    assert place == len(written)
    shutil.rmtree(path.parent)


def test_what_room_is_left_on_a_full_disk_is_not_filled_with_notices(
    path: Path,
) -> None:
    with opened(path) as log, injected(log) as script:
        script += [errno.ENOSPC]
        log.write([b"a"])
        for _ in range(5):
            script += [0.99, errno.ENOSPC]
            log.write([b"b", b"c"])
            assert path.read_bytes() == b""
        log.write([b"d"])
    notice, line = lines_of(path)
    assert (lost_in(notice), line) == (11, b"d")


def test_where_nothing_was_written_nothing_is_cut(path: Path) -> None:
    """Somebody else may append just then."""
    with opened(path) as log, injected(log, [errno.ENOSPC] * 3):
        with mock.patch.object(os, "ftruncate") as ftruncate:
            for _ in range(3):
                log.write([b"a"])
        assert not ftruncate.called


def test_what_follows_a_line_that_was_ended_is_cut_like_others(path: Path) -> None:
    path.write_bytes(b"old, and broken o")
    with opened(path) as log:
        with injected(log) as script:
            script += [1.0, 0.5, errno.ENOSPC]
            log.write([b"0123456789"])
        assert path.read_bytes() == b"old, and broken o\n"


def test_a_half_line_that_cannot_be_taken_back_is_completed(path: Path) -> None:
    faults = [0.5, errno.ENOSPC, errno.ENOSPC]
    with opened(path) as log, injected(log, faults, may_cut=False):
        log.write([b"0123456789"])
        assert path.read_bytes() == b"01234"
        log.write([b"lost"])
        log.write([b"a"])
    whole, notice, line = lines_of(path)
    assert (whole, lost_in(notice), line) == (b"0123456789", 1, b"a")


def test_what_others_appended_is_not_cut_off(path: Path) -> None:
    with opened(path) as log, injected(log, [0.5]) as script:
        write = os.write

        def append_theirs(fd: int, data: bytes) -> int:
            if not script:
                with path.open("ab") as file:
                    file.write(b"theirs\n")
                raise OSError(errno.ENOSPC, "full")
            return write(fd, data)

        with mock.patch.object(os, "write", append_theirs):
            log.write([b"0123456789"])
        log.write([b"a"])
    first, notice, line = lines_of(path)
    assert first == b"01234theirs"
    assert (lost_in(notice), line) == (1, b"a")


def test_nor_what_they_appended_between_two_parts_of_ours(path: Path) -> None:
    with opened(path) as log, injected(log, [0.5, 0.5]) as script:
        write = os.write

        def append_theirs(fd: int, data: bytes) -> int:
            if not script:
                raise OSError(errno.ENOSPC, "full")
            if len(script) == 1:
                with path.open("ab") as file:
                    file.write(b"theirs\n")
            return write(fd, data)

        with mock.patch.object(os, "write", append_theirs):
            log.write([b"0123456789"])
        log.write([b"a"])
    assert b"theirs" in path.read_bytes()
    assert lines_of(path)[-1] == b"a"


def test_closing_tells_of_what_is_missing_if_there_is_room_by_then(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(path) as log, injected(log, [errno.EDQUOT]):
        log.write([b"a"])
    (notice,) = lines_of(path)
    assert lost_in(notice) == 1
    assert told(caplog)[-1].endswith("can be written to again; 1 log lines were lost")


def test_a_half_line_in_a_file_that_was_rotated_is_counted(path: Path) -> None:
    with opened(path) as log:
        with injected(log, [0.5, errno.ENOSPC], may_cut=False):
            log.write([b"0123456789"])
        path.rename(path.with_suffix(".1"))
        log.write([b"a"])
    notice, line = lines_of(path)
    assert (lost_in(notice), line) == (1, b"a")


# -- what is no file -------------------------------------------------------------------


def test_a_fifo_without_a_reader_is_refused_at_once(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(OSError, match="Nobody has this FIFO open for reading"):
        LogFile(path).open()


def test_a_fifo_gets_every_line_that_its_reader_takes(path: Path) -> None:
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    found = bytearray()

    def read() -> None:
        while chunk := os.read(reader, 5000):
            found.extend(chunk)
            time.sleep(0.001)

    lines = [b"%d " % number + b"x" * (number % 9000) for number in range(0, 9000, 90)]
    with opened(path) as log:
        thread = threading.Thread(target=read)
        thread.start()
        log.write(lines)
    thread.join()
    os.close(reader)
    assert bytes(found).split(b"\n") == [*lines, b""]


def test_a_reader_that_stands_still_does_not_hold_up_everything(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wait = files._wait_writable
    waited = []

    def wait_writable(fd: int, seconds: float | None) -> bool:
        waited.append(seconds)
        return wait(fd, seconds)

    monkeypatch.setattr(files, "_PATIENCE", 0.05)
    monkeypatch.setattr(files, "_wait_writable", wait_writable)
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    lines = [b"%d " % number + b"x" * 5000 for number in range(20)]
    with opened(path) as log:
        for line in lines:
            log.write([line])
        # The first wait shows that nobody reads; then there is none.
        assert waited[:1] == [0.05] and set(waited[1:]) == {0}
        found = os.read(reader, 1_000_000)
        assert not found.endswith(b"\n")
        log.write([b"a"])
        found += os.read(reader, 1_000_000)
    os.close(reader)
    *whole, notice, last, end = found.split(b"\n")
    assert whole == lines[: len(whole)]
    assert lost_in(notice) == 20 - len(whole)
    assert (last, end) == (b"a", b"")
    assert "lines are lost: Resource temporarily unavailable" in told(caplog)[0]


def test_dev_stdout_is_a_file_like_others() -> None:
    program = """
from stepflow_runtime.logs.files import LogFile
log = LogFile("/dev/stdout")
log.open()
log.write([b"a"])
log.write([b"b"])
log.close()
"""
    assert run_python(program).stdout == b"a\nb\n"


# -- several writers -------------------------------------------------------------------


APPENDING = """
import sys
from stepflow_runtime.logs.files import LogFile
log = LogFile(sys.argv[1])
log.open()
print("ready", flush=True)
sys.stdin.read()
for number in range(300):
    log.write([b"%s %d %d " % (sys.argv[2].encode(), number, n) + b"x" * n for n in range(50)])
log.close()
"""


def test_two_processes_can_append_to_one_file(path: Path) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", APPENDING, str(path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for name in "AB"
    ]
    for writer in writers:
        assert writer.stdout is not None
        with writer.stdout as ready:
            assert ready.readline() == b"ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.close()
    assert [writer.wait(30) for writer in writers] == [0, 0]
    lines = lines_of(path)
    for name in (b"A", b"B"):
        expected = [
            b"%s %d %d " % (name, number, n) + b"x" * n
            for number in range(300)
            for n in range(50)
        ]
        assert [line for line in lines if line.startswith(name)] == expected
    assert len(lines) == 2 * 300 * 50


def test_a_write_that_is_held_up_is_not_closed_under_its_hands(path: Path) -> None:
    """Its descriptor's number could be somebody else's by the time it goes on."""
    held, go_on = threading.Event(), threading.Event()
    write = os.write
    with opened(path) as log:
        fd = log._fd

        def slow_write(number: int, data: bytes) -> int:
            if number == fd:
                held.set()
                assert go_on.wait(15)
            return write(number, data)

        with mock.patch.object(os, "write", slow_write):
            thread = threading.Thread(target=log.write, args=([b"a"],))
            thread.start()
            assert held.wait(15)
            log.close()
            assert log._fd == fd
            go_on.set()
            thread.join()
        assert log._fd is None
    assert lines_of(path) == [b"a"]


# -- standard error --------------------------------------------------------------------


STDERR = """
import logging, os, sys
from stepflow_runtime.logs.files import ParentStderr
logging.basicConfig(format="%(message)s", stream=sys.stdout)
sink = ParentStderr()
sink.open()
"""


def test_lines_for_standard_error_go_there_as_they_are(
    capfd: pytest.CaptureFixture[str],
) -> None:
    sink = ParentStderr()
    sink.open()
    sink.write([b"a", b"\x1b[1mb"])
    sink.close()
    assert capfd.readouterr().err == "a\n\x1b[1mb\n"


def test_a_slow_reader_of_a_non_blocking_standard_error_gets_every_line() -> None:
    program = f"""{STDERR}
os.set_blocking(2, False)
for number in range(0, 3000, 3):
    sink.write([b"%d " % n + b"x" * (n % 7000) for n in range(number, number + 3)])
sink.close()
"""
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)
    found = bytearray()
    assert process.stderr is not None
    with process.stderr as pipe:
        while chunk := os.read(pipe.fileno(), 50_000):
            found += chunk
            time.sleep(0.0005)
    assert process.wait(30) == 0
    expected = [b"%d " % n + b"x" * (n % 7000) for n in range(3000)]
    assert bytes(found).split(b"\n") == [*expected, b""]


def test_lines_of_a_shared_pipe_are_not_written_into_one_another() -> None:
    program = f"""{STDERR}
if os.fork():
    name = b"A"
else:
    name = b"B"
for number in range(200):
    sink.write([name + b" %d " % number + b"x" * 90 for _ in range(100)])
if name == b"A":
    os.wait()
"""
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)
    found = process.communicate(timeout=30)[1]
    lines = found.split(b"\n")[:-1]
    assert all(re.fullmatch(rb"[AB] \d+ x{90}", line) for line in lines)
    assert len(lines) == 2 * 200 * 100


def test_a_standard_error_that_was_closed_is_given_up(path: Path) -> None:
    program = f"""{STDERR}
os.close(2)
sink.write([b"a", b"b"])
assert os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY) == 2
sink.write([b"not for this file"])
"""
    (told,) = run_python(program, str(path)).stdout.decode().splitlines()
    assert told == (
        "Standard error cannot be written to, and log lines are lost: Bad file descriptor"
    )
    assert path.read_bytes() == b""


def test_what_has_the_number_of_a_standard_error_that_never_was_is_left_alone(
    path: Path,
) -> None:
    program = f"""{STDERR}
fds = [os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY) for _ in range(3)]
sink.write([b"a"])
print(2 in fds)
"""
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh"]
    command += [sys.executable, "-c", program, str(path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=30, check=True)
    told, had_the_number = done.stdout.decode().splitlines()
    assert "Bad file descriptor" in told
    assert had_the_number == "True"
    assert path.read_bytes() == b""


def test_a_standard_error_that_nobody_reads_any_more_is_reported_once() -> None:
    program = f"""{STDERR}
r, w = os.pipe()
os.dup2(w, 2)
os.close(r)
for _ in range(5):
    sink.write([b"a", b"b"])
os.dup2(os.open("/dev/null", os.O_WRONLY), 2)
sink.write([b"c"])
"""
    broken, again = run_python(program).stdout.decode().splitlines()
    assert broken.endswith("log lines are lost: Broken pipe")
    assert again == "Standard error can be written to again; 10 log lines were lost"
