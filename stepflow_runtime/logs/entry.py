"""LogEntry, and how a line of the server's output becomes one.

Contract: :func:`decode` never raises. A line that is not one of the server's JSON log
lines (a worker's print, a panic, garbage) is an entry too, with the line as its message.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal, TypeAlias

import msgspec

__all__ = ["LogEntry", "Stream", "decode"]

Stream: TypeAlias = Literal["stdout", "stderr"]


class LogEntry(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One line that the server or one of its workers wrote.

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
    :ivar run_id: the run it belongs to, or None. When runs overlap the server can name
        the wrong one
    :ivar flow_id: the flow of that run, or None
    :ivar step_id: the step, or None
    :ivar trace_id: the OpenTelemetry trace, or None
    :ivar span_id: the OpenTelemetry span, or None
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

    def __str__(self) -> str:
        target = f"{self.target}: " if self.target else ""
        return f"{self.level:<5} {target}{self.message}"


class _Diags(msgspec.Struct, frozen=True, gc=False):
    run_id: str | None = None
    flow_id: str | None = None
    step_id: str | None = None
    trace_id: str | None = None
    span_id: str | None = None


class _Line(msgspec.Struct, gc=False):
    timestamp: datetime
    level: str
    message: str
    target: str = ""
    file: str | None = None
    line: int | None = None
    diags: _Diags = _Diags()


_decode_line = msgspec.json.Decoder(_Line).decode


def decode(line: bytes, stream: Stream) -> LogEntry:
    """Decode one line, without its newline; bytes that are not UTF-8 are replaced."""
    try:
        parsed = _decode_line(line)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return _plain(line, stream)
    if parsed.timestamp.tzinfo is None:
        return _plain(line, stream)
    diags = parsed.diags
    return LogEntry(
        timestamp=parsed.timestamp,
        level=parsed.level,
        message=parsed.message,
        stream=stream,
        target=parsed.target,
        file=parsed.file,
        line=parsed.line,
        run_id=diags.run_id,
        flow_id=diags.flow_id,
        step_id=diags.step_id,
        trace_id=diags.trace_id,
        span_id=diags.span_id,
    )


def _plain(line: bytes, stream: Stream) -> LogEntry:
    return LogEntry(
        timestamp=datetime.now(UTC),
        level="WARN" if stream == "stderr" else "INFO",
        message=line.decode(errors="replace"),
        stream=stream,
    )
