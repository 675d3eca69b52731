"""Log entries as bytes: a JSON line, or text, both in the shape of the server's own.

Contract: neither raises, whatever text and whatever ``extra`` an entry has. From the
JSON line :func:`~stepflow_runtime.logs.entry.decode` makes the entry again that it made
from the first one; a line of standard error is marked with ``"stream":"stderr"``. What
``extra`` holds never passes for a field of the entry. What a terminal would obey comes out
as an escape: logs are read with ``cat``, and workers print what strangers send them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from .entry import LogEntry, decode

__all__ = ["as_json", "as_text", "is_harmless"]


class _Diags(msgspec.Struct, omit_defaults=True, kw_only=True, gc=False):
    trace_id: str | None = None
    span_id: str | None = None
    sampled: bool | None = None
    run_id: str | None = None
    flow_id: str | None = None
    step_id: str | None = None


class _Line(msgspec.Struct, omit_defaults=True, kw_only=True, gc=False):
    timestamp: str
    level: str
    target: str = ""
    file: str | None = None
    line: int | None = None
    message: str
    stream: str = "stdout"
    diags: _Diags | None = None


_NO_DIAGS: Final = _Diags()

_encode: Final = msgspec.json.Encoder().encode

# What ``decode`` would take for a field of the entry, by its name and type. ``extra`` may
# have such names all the same: a line can say ``"target":5``.
_IDS: Final = dict.fromkeys(
    ("trace_id", "span_id", "run_id", "flow_id", "step_id"), str
)
_FIELDS: Final = {
    "target": str,
    "file": str,
    "line": int,
    "diags": dict,
    "exception": str,
    **_IDS,
}

# Controls of the second block (U+0080 to U+009F), which JSON does not escape: terminals
# take U+009B for the beginning of a command.
_C1: Final = re.compile(rb"\xc2([\x80-\x9f])")

# Colours say nothing, and the server's reports of fatal errors are full of them. In one
# pattern with the controls, so that what is left of ``ESC ESC[0m [2J`` is no command.
_CONTROLS: Final = re.compile(r"\x1b\[[0-9;:]*m|[\x00-\x08\n-\x1f\x7f-\x9f]")
_CONTROLS_IN_TEXT: Final = re.compile(r"\x1b\[[0-9;:]*m|[\x00-\x08\x0b-\x1f\x7f-\x9f]")

# A line of a message that could pass for the first of another entry: it is indented.
_FORGED: Final = re.compile(r"\n(?=\d{4}-\d\d-\d\d)", re.ASCII)

# The bytes of no control. U+0080 to U+009F begin with C2, and so do some others.
_HARMLESS: Final = bytes({9, *range(32, 256)} - {0x7F, 0xC2})

_GROUPS: Final = ("kvs", "diags")
_SHORT: Final = {"\n": "\\n", "\r": "\\r"}

# Deeper than this, what the encoder refuses is left out.
_MAX_DEPTH: Final = 50

_STAMP_LENGTH: Final = len("2026-11-23T18:09:17.365811+00:00")
_ENCODED_LENGTH: Final = len('"2026-11-23T18:09:17.365811Z"')


def as_json(entry: LogEntry) -> bytes:
    """Render an entry as a line of JSON, without a newline.

    It reads back as another entry where JSON cannot say what the entry has (surrogates,
    which are written as their escapes; values in ``extra`` that are not JSON; a null,
    which is the same as nothing), and where ``extra`` claims what is the entry's own: such
    values are put under ``"extra"``.
    """
    sampled = _sampled(entry.extra)
    if entry.extra and sampled is None:
        return _escaped(_encode_anything(_fields(entry)))
    diags = _Diags(
        trace_id=entry.trace_id,
        span_id=entry.span_id,
        sampled=sampled,
        run_id=entry.run_id,
        flow_id=entry.flow_id,
        step_id=entry.step_id,
    )
    line = _Line(
        timestamp=_stamp(entry.timestamp),
        level=entry.level,
        target=entry.target,
        file=entry.file,
        line=entry.line,
        message=entry.message,
        stream=entry.stream,
        diags=None if diags == _NO_DIAGS else diags,
    )
    try:
        return _escaped(_encode(line))
    except UnicodeEncodeError:
        return _escaped(_encode_anything(_fields(entry)))


def as_text(entry: LogEntry) -> bytes:
    """Render an entry as the server does with ``--log-format text``, without a newline.

    A line that no module of the server logged has the stream's name in the place of the
    module's. The message keeps its newlines; a line of it that begins with a date, as
    entries do, is indented. Colours are left out, and other control characters are written
    as escapes, in everything.
    """
    head = f"{_stamp(entry.timestamp)} {entry.level:>6} {_origin(entry)} "
    tail = _tail(entry)
    line = f"{head}{entry.message}{tail}".encode(errors="backslashreplace")
    if not line.translate(None, _HARMLESS):
        return line
    message = _FORGED.sub("\n ", _CONTROLS_IN_TEXT.sub(_escape, entry.message))
    text = f"{_one_line(head)}{message}{_one_line(tail)}"
    return text.encode(errors="backslashreplace")


def _stamp(timestamp: datetime) -> str:
    """The time as the server writes it; in the offset that the line had."""
    if timestamp.tzinfo is UTC:
        # A third of the time that isoformat takes; but Z for the offset, and no zeros.
        encoded = _encode(timestamp)
        if len(encoded) == _ENCODED_LENGTH:
            return f"{encoded[1:-2].decode()}+00:00"
    stamp = timestamp.isoformat("T", "microseconds")
    return stamp if len(stamp) == _STAMP_LENGTH else _stamp_in_utc(timestamp)


def _stamp_in_utc(timestamp: datetime) -> str:
    try:
        utc = timestamp.astimezone(UTC)
    except (OverflowError, ValueError, OSError):  # at the ends of the calendar
        utc = timestamp.replace(tzinfo=UTC)
    return utc.isoformat("T", "microseconds")


# -- JSON ------------------------------------------------------------------------------


def _sampled(extra: Mapping[str, Any]) -> bool | None:
    """What every line of a run has beyond the fields, if ``extra`` has only that."""
    if len(extra) != 1:
        return None
    diags = extra.get("diags")
    if type(diags) is not dict or len(diags) != 1:
        return None
    sampled = diags.get("sampled")
    return sampled if type(sampled) is bool else None


def _fields(entry: LogEntry) -> dict[str, Any]:
    """Everything that an entry holds, ``extra`` where it came from."""
    extra = dict(entry.extra)
    fields = _told(
        timestamp=_stamp(entry.timestamp),
        level=extra.pop("level") if _is_told_by_extra(entry) else entry.level,
        target=entry.target or None,
        file=entry.file,
        line=entry.line,
        message=entry.message,
        stream="stderr" if entry.stream == "stderr" else None,
    )
    diags = _told(
        trace_id=entry.trace_id,
        span_id=entry.span_id,
        run_id=entry.run_id,
        flow_id=entry.flow_id,
        step_id=entry.step_id,
    )
    astray = {"stream": extra.pop("stream")} if "stream" in extra else {}
    if type(extra.get("diags")) is dict:
        astray_diags = _merge(diags, extra.pop("diags"), _IDS)
        if astray_diags:
            astray["diags"] = astray_diags
    if diags:
        fields["diags"] = diags
    astray |= _merge(fields, extra, _FIELDS)
    if astray:
        if "extra" in fields:
            astray["extra"] = fields["extra"]
        fields["extra"] = astray
    return fields


def _told(**values: object) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _merge(
    own: dict[str, Any], others: Mapping[str, Any], taken: Mapping[str, type]
) -> dict[str, Any]:
    """Add ``others`` to ``own``, but for those that would pass for the entry's; return these."""
    astray = {}
    for name, value in others.items():
        if name in own or type(value) is taken.get(name):
            astray[name] = value
        else:
            own[name] = value
    return astray


def _is_told_by_extra(entry: LogEntry) -> bool:
    """True if the line told a level that there is none of, which counts as INFO."""
    level = entry.extra.get("level")
    if entry.level != "INFO" or not isinstance(level, str):
        return False
    line = {"timestamp": "2026-01-01T00:00:00Z", "level": level, "message": ""}
    return "level" in decode(_encode_anything(line), "stdout").extra


def _encode_anything(value: object) -> bytes:
    try:
        return _encode(value)
    except Exception:  # noqa: BLE001 - whatever it was, a surrogate or a user's object
        return _encode(_encodable(value, _MAX_DEPTH))


def _encodable(value: object, depth: int) -> object:
    """The nearest to a value that JSON can say."""
    if isinstance(value, str):
        return _without_surrogates(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if depth and isinstance(value, dict):
        return {
            _without_surrogates(str(name)): _encodable(item, depth - 1)
            for name, item in value.items()
        }
    if depth and isinstance(value, (list, tuple)):
        return [_encodable(item, depth - 1) for item in value]
    return f"({type(value).__name__})"


def _without_surrogates(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def is_harmless(line: bytes) -> bool:
    """True if a line of JSON is fit to be written as it is: UTF-8, and no controls."""
    if line.isascii():
        return True  # with controls of ASCII it would not be JSON
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return _C1.search(line) is None


def _escaped(line: bytes) -> bytes:
    """The same JSON, without controls: the encoder escapes those of ASCII already."""
    return line if line.isascii() else _C1.sub(_json_escape, line)


def _json_escape(control: re.Match[bytes]) -> bytes:
    return b"\\u%04x" % control[1][0]


# -- text ------------------------------------------------------------------------------


def _origin(entry: LogEntry) -> str:
    """Where it was logged, as in ``stepflow_server::startup: startup.rs:323``."""
    module = entry.target or entry.stream
    file = entry.file
    if file is None:
        return f"{module}:"
    # Of the system that the server was built on, whichever that was.
    name = file[max(file.rfind("/"), file.rfind("\\")) + 1 :]
    return f"{module}: {name}:{entry.line or 0}"


def _tail(entry: LogEntry) -> str:
    """What follows the message: what its line told besides, and then the run."""
    tail = ""
    sampled = _sampled(entry.extra)
    if entry.extra and sampled is None:
        tail = "".join(_pairs(entry.extra))
    if entry.trace_id is not None:
        tail += f" trace_id={entry.trace_id}"
    if entry.span_id is not None:
        tail += f" span_id={entry.span_id}"
    if sampled is not None:
        tail += " sampled=true" if sampled else " sampled=false"
    if entry.run_id is not None:
        tail += f" run_id={entry.run_id}"
    if entry.flow_id is not None:
        tail += f" flow_id={entry.flow_id}"
    if entry.step_id is not None:
        tail += f" step_id={entry.step_id}"
    if entry.target and entry.stream == "stderr":
        tail += " stream=stderr"
    return tail


def _pairs(extra: Mapping[str, Any]) -> Iterator[str]:
    for name, value in extra.items():
        # These two the server prints flat: they are its groups, not names of its users.
        group = value if name in _GROUPS and type(value) is dict else {name: value}
        for key, item in group.items():
            yield f" {key}={_value(item)}"


def _value(value: object) -> str:
    return value if isinstance(value, str) else _encode_anything(value).decode()


def _one_line(text: str) -> str:
    return _CONTROLS.sub(_escape, text)


def _escape(control: re.Match[str]) -> str:
    found = control[0]
    if len(found) > 1:
        return ""  # a colour
    return _SHORT.get(found) or f"\\x{ord(found):02x}"
