"""Why a server did not start, or a run failed: pure functions of log entries.

The server's fatal errors are reports for terminals: ANSI codes, source locations, box
drawing, a backtrace. What a user needs of them is the chain of causes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec

from ..executor import FlowError
from ..logs.entry import LogEntry
from ..wire import NO_REASON

__all__ = [
    "causes",
    "entries_of_failure",
    "is_all_logged",
    "last_words",
    "without_ansi",
]

# ECMA-48 control sequences, and operating system commands (titles, links).
_ANSI: Final = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])"
)
_BOX: Final = re.compile(r"^[\s│├╰┌└─╴▶]+")
_LOCATION: Final = re.compile(r"^at \S+:\d+(?::\d+)?$")
_BACKTRACE: Final = re.compile(r"^backtrace(?: \(\d+\)| no\. \d+)$")
_RULE: Final = re.compile(r"^━+$")
_PREFIX: Final = "Server error: "

# A Python worker prints this, and the traceback after it.
_WORKER_FAILURE: Final = re.compile(r"Component \S+ failed: ?(.*)")
_MOST_ENTRIES: Final = 60

_STDERR_LINES: Final = 60
_LOG_LINES: Final = 10
_LINE_LENGTH: Final = 500


def without_ansi(text: str) -> str:
    """``text`` without escape sequences."""
    return _ANSI.sub("", text)


def causes(report: str) -> list[str]:
    """The chain of causes in one of the server's error reports, outermost first."""
    chain = []
    for raw in without_ansi(report).splitlines():
        if _RULE.match(raw.strip()):
            break  # below the rule stand the backtraces
        line = _BOX.sub("", raw).strip().removeprefix(_PREFIX)
        if line and not _LOCATION.match(line) and not _BACKTRACE.match(line):
            chain.append(line)
    return chain


def last_words(entries: Sequence[LogEntry]) -> str:
    """What the server and its workers said about their end, for an error message."""
    fatal = [
        each for each in entries if each.level == "ERROR" and each.stream == "stdout"
    ]
    stderr = [each.message for each in entries if each.stream == "stderr"]
    parts = []
    if fatal:
        parts.append(_block("the server's error", causes(fatal[-1].message)))
    if stderr:
        title = "standard error (server and workers)"
        parts.append(_block(title, stderr[-_STDERR_LINES:]))
    if not fatal:
        logged = [str(each) for each in entries if each.stream == "stdout"]
        if logged:
            parts.append(_block("the last log lines", logged[-_LOG_LINES:]))
    return "\n".join(parts) or "It printed nothing."


def is_all_logged(entries: Iterable[LogEntry], run_id: str) -> bool:
    """True if the server's last word on a run is there (at the level INFO or below)."""
    return any(
        "execution completed" in each.message and run_id in each.message
        for each in entries
    )


def entries_of_failure(
    entries: Sequence[LogEntry], run_id: str, error: FlowError
) -> tuple[LogEntry, ...]:
    """What was logged of a failure at the levels WARN and ERROR, in order, in plain words.

    That is what the server says of the run (of its failed step, where it names one), and the
    traceback that a Python worker printed with the very words of the error; it says which
    component, but not which run.
    """
    told = [
        each
        for each in entries
        if each.level in ("WARN", "ERROR")
        and each.stream == "stdout"
        and each.run_id == run_id
        and error.step_id in (None, each.step_id or error.step_id)
    ]
    found = [
        msgspec.structs.replace(each, message="\n".join(causes(each.message)))
        for each in told
    ]
    found += _traceback(
        [each for each in entries if each.stream == "stderr"], error.message
    )
    return tuple(sorted(found, key=lambda each: each.timestamp)[-_MOST_ENTRIES:])


def _traceback(lines: Sequence[LogEntry], message: str) -> Sequence[LogEntry]:
    """The newest one that a worker printed for an exception with this message."""
    words = [""] if message == NO_REASON else message.splitlines()
    for start in range(len(lines) - 1, -1, -1):
        failure = _WORKER_FAILURE.fullmatch(lines[start].message)
        if failure is not None and failure[1].strip() == words[0].strip():
            first = start + len(words)  # the message stands there first, whole
            printed = [each.message for each in lines[first : first + _MOST_ENTRIES]]
            return lines[start : first + _length_of_traceback(printed, words)]
    return ()


def _length_of_traceback(lines: Sequence[str], words: Sequence[str]) -> int:
    """How many lines it takes, together with those of its causes and contexts."""
    place = 0
    while place < len(lines) and "Traceback (most recent call last)" in lines[place]:
        is_of_group = lines[place].startswith(" ")
        place = _skip(lines, place + 1, lambda line: line.startswith(" "))
        if not is_of_group:
            # The exception itself, outside of the frames. What it says may have more lines.
            place += 1 + (lines[place + 1 : place + len(words)] == words[1:]) * (
                len(words) - 1
            )
        link = _skip(lines, place, lambda line: not line.strip())
        if link >= len(lines) or not lines[link].startswith(_LINKS):
            break
        place = _skip(lines, link + 1, lambda line: not line.strip())
    return min(place, len(lines))


def _skip(lines: Sequence[str], place: int, what: Callable[[str], bool]) -> int:
    while place < len(lines) and what(lines[place]):
        place += 1
    return place


_LINKS: Final = ("The above exception was", "During handling of the above")


def _block(title: str, lines: Iterable[str]) -> str:
    return "\n".join([f"{title}:", *(f"  {_one_line(line)}" for line in lines)])


def _one_line(text: str) -> str:
    text = without_ansi(text[: 2 * _LINE_LENGTH]).replace("\x1b", "")
    line = next(iter(text.splitlines()), "")
    return line if len(line) <= _LINE_LENGTH else line[:_LINE_LENGTH] + " ..."
