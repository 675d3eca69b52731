"""LogEntry, and how a line of the server's output becomes one.

Contract: :func:`decode` never raises, and loses nothing. A line that is not one of the
server's JSON log lines (a worker's print, a panic, garbage) is an entry too, with the
line as its message; what a JSON log line has beyond the fields of an entry, or instead of
what they take, is in ``extra``.
"""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final, Literal, TypeAlias, TypeVar

import msgspec

from ..reprs import repr_of

__all__ = [
    "LEVELS",
    "LogEntry",
    "Stream",
    "check",
    "decode",
    "is_json",
    "plain",
    "told_level",
]

Stream: TypeAlias = Literal["stdout", "stderr"]

T = TypeVar("T")

LEVELS: Final = ("trace", "debug", "info", "warn", "error")


class LogEntry(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One line that the server or one of its workers wrote, or a traceback or panic.

    :ivar timestamp: when, as the server stamped it; for a line without a stamp, when it
        was read (aware, UTC)
    :ivar level: ``"TRACE"``, ``"DEBUG"``, ``"INFO"``, ``"WARN"`` or ``"ERROR"``. A line
        that tells none counts as ``"INFO"`` on stdout and as ``"WARN"`` on stderr, where
        panics and workers' tracebacks are
    :ivar message: the text
    :ivar stream: ``"stdout"`` or ``"stderr"``
    :ivar target: the server's module that logged it, or ``""``
    :ivar file: that module's source file, or None
    :ivar line: the line in it, or None
    :ivar run_id: the run it belongs to, or None. When runs overlap the server often names
        none, or the wrong one; a run that the message names has the say, and what is
        another run's is in ``extra``
    :ivar flow_id: the flow of that run, or None
    :ivar step_id: the step, or None
    :ivar trace_id: the OpenTelemetry trace, or None
    :ivar span_id: the OpenTelemetry span, or None
    :ivar extra: whatever else the line told, under its own names
    """

    timestamp: datetime
    level: str
    message: str
    stream: Stream
    target: str = ""
    file: str | None = None
    line: int | None = None
    run_id: str | None = None
    flow_id: str | None = None
    step_id: str | None = None
    trace_id: str | None = None
    span_id: str | None = None
    extra: dict[str, Any] = {}

    __repr__ = repr_of("level", "message", "target", "run_id", "step_id")

    def __hash__(self) -> int:
        return hash((self.timestamp, self.message, self.run_id))  # a dict has no hash

    def __str__(self) -> str:
        target = f"{self.target}: " if self.target else ""
        return f"{self.level:<5} {target}{self.message}"


def check(entry: object) -> None:
    """Refuse what is no proper entry, whoever made it.

    :raises TypeError: if it is not
    """
    if not isinstance(entry, LogEntry):
        raise TypeError(f"a LogEntry is wanted, not {type(entry).__name__}")
    try:
        _decode_entry(_encode(entry))
    except (msgspec.MsgspecError, TypeError, RecursionError) as exc:
        raise TypeError("a field of the LogEntry is of the wrong type") from exc
    if entry.level not in _LEVELS or entry.timestamp.tzinfo is None:
        raise TypeError("the level or the time stamp of the LogEntry is none")


_encode: Final = msgspec.json.Encoder().encode
_decode_entry: Final = msgspec.json.Decoder(LogEntry).decode


class _Diags(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    run_id: str | None = None
    flow_id: str | None = None
    step_id: str | None = None
    trace_id: str | None = None
    span_id: str | None = None
    sampled: bool | None = None


class _Line(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    timestamp: datetime
    level: Literal["TRACE", "DEBUG", "INFO", "WARN", "ERROR"]
    message: str
    target: str = ""
    file: str | None = None
    line: int | None = None
    diags: _Diags | None = None


_decode_line: Final = msgspec.json.Decoder(_Line).decode
_decode_object: Final = msgspec.json.Decoder(dict[str, Any]).decode
_decode_timestamp: Final = msgspec.json.Decoder(datetime).decode

_skim: Final = msgspec.json.Decoder(msgspec.Raw).decode

# How the server's lines begin, and where they have the time stamp, and after it the level.
_BEGIN: Final = b'{"timestamp":"'
_TIMESTAMP: Final = slice(13, 47)
_LEVEL: Final = slice(46, 61)
_TOLD: Final = {
    b'","level":"' + level.upper()[:4].encode(): level.upper() for level in LEVELS
}

_LEVELS: Final = frozenset(_TOLD.values())
_NAMES: Final = {"WARNING": "WARN", "CRITICAL": "ERROR", "FATAL": "ERROR"}
_NAMING: Final = " run_id="
_RUN_ID: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")
_IDS: Final = ("run_id", "flow_id", "step_id", "trace_id", "span_id")


def told_level(line: bytes) -> str | None:
    """The level of a line that looks like the server's, at a glance; else None."""
    if line[:14] == _BEGIN and line[-1:] == b"}":
        return _TOLD.get(line[_LEVEL])
    return None


def is_json(line: bytes) -> bool:
    """True if a line is one document of JSON."""
    try:
        _skim(line)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return False
    return True


def decode(line: bytes, stream: Stream) -> LogEntry:
    """Decode one line, without its newline; bytes that are not UTF-8 are replaced."""
    try:
        parsed = _decode_line(line)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return _decode_unusual(line, stream)
    if parsed.timestamp.tzinfo is None:
        return _decode_unusual(line, stream)
    message, diags = parsed.message, parsed.diags
    if diags is None:
        return LogEntry(
            timestamp=parsed.timestamp,
            level=parsed.level,
            message=message,
            stream=stream,
            target=parsed.target,
            file=parsed.file,
            line=parsed.line,
            run_id=_named_run(message),
        )
    run_id = diags.run_id
    if run_id is None or run_id not in message:
        named = _named_run(message)
        if named is not None and run_id is not None:
            return _decode_unusual(line, stream)
        run_id = named or run_id
    return LogEntry(
        timestamp=parsed.timestamp,
        level=parsed.level,
        message=message,
        stream=stream,
        target=parsed.target,
        file=parsed.file,
        line=parsed.line,
        run_id=run_id,
        flow_id=diags.flow_id,
        step_id=diags.step_id,
        trace_id=diags.trace_id,
        span_id=diags.span_id,
        extra={} if diags.sampled is None else {"diags": {"sampled": diags.sampled}},
    )


def _named_run(message: str) -> str | None:
    """The run that a message of the server names, if it does."""
    place = message.find(_NAMING)
    if place < 0:
        return None
    named = _RUN_ID.match(message, place + len(_NAMING))
    return None if named is None else named[0]


def _decode_unusual(line: bytes, stream: Stream) -> LogEntry:
    """A line of the server with more than usual, or with something unfit; or another."""
    try:
        fields = _decode_object(line)
        timestamp = msgspec.convert(fields.pop("timestamp"), datetime)
        message = fields.pop("message")
        level = fields.pop("level")
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, KeyError):
        return plain(line, stream)
    if not (timestamp.tzinfo and isinstance(message, str) and isinstance(level, str)):
        return plain(line, stream)
    known = _NAMES.get(level.upper(), level.upper())
    if known not in _LEVELS:
        fields["level"] = level
    if fields.get("stream") == stream:
        del fields["stream"]  # as we write it into a file
    if stream == "stderr" and isinstance(fields.get("exception"), str):
        # So a worker's own logging writes what others print after the message.
        message = f"{message}\n{fields.pop('exception')}"
    ids = _take_ids(fields, message)
    return LogEntry(
        timestamp=timestamp,
        level=known if known in _LEVELS else "INFO",
        message=message,
        stream=stream,
        target=_take(fields, "target", str) or "",
        file=_take(fields, "file", str),
        line=_take(fields, "line", int),
        **ids,
        extra=fields,
    )


def _take_ids(fields: dict[str, Any], message: str) -> dict[str, str | None]:
    """Take the ids out of ``fields``: the server has them in its diags, workers outside.

    When runs overlap, the server's diags are those of another run, or there are none.
    A run that the message names is right; then all that is another's stays where it is.
    """
    diags = fields.get("diags")
    within = diags if isinstance(diags, dict) else {}
    named = _named_run(message)
    if named is not None and within.get("run_id") not in (None, named):
        return {"run_id": named}
    ids = {name: _take(within, name, str) for name in _IDS}
    if diags == {}:
        del fields["diags"]
    for name in _IDS:
        if ids[name] is None:
            ids[name] = _take(fields, name, str)
    if ids["run_id"] is None:
        ids["run_id"] = named
    return ids


def _take(fields: dict[str, Any], name: str, kind: type[T]) -> T | None:
    """Take a value out of ``fields``; one of another kind stays there, but for a null."""
    value = fields.get(name)
    if value is not None and type(value) is not kind:
        return None
    fields.pop(name, None)
    return value


def plain(line: bytes, stream: Stream) -> LogEntry:
    """The entry of a line that is not one of the server's log lines."""
    message = line.decode(errors="replace")
    return LogEntry(
        timestamp=_stamp(line),
        level=(line[:14] == _BEGIN and _TOLD.get(line[_LEVEL]))
        or ("WARN" if stream == "stderr" else "INFO"),
        message=message,
        stream=stream,
        # As it will be read from our own log file.
        run_id=_named_run(message),
    )


def _stamp(line: bytes) -> datetime:
    """When a line was written, if it begins as the server's do, or else now."""
    if line[:14] == _BEGIN:
        with suppress(msgspec.DecodeError):
            return _decode_timestamp(line[_TIMESTAMP])
    return datetime.now(UTC)
