"""Why a server did not start, or a run failed: pure functions of log entries.

The server's fatal errors are reports for terminals: ANSI codes, source locations, box
drawing, a backtrace. What a user needs of them is the chain of causes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from ..executor import FlowError
from ..logs.entry import LogEntry

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
_WORKER_FAILURE: Final = re.compile(r"Component \S+ failed: (.*)", re.DOTALL)
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
    words = message.splitlines()[0] if message else ""
    for start in range(len(lines) - 1, -1, -1):
        failure = _WORKER_FAILURE.fullmatch(lines[start].message)
        if failure is not None and failure[1] == words:
            return lines[start : _end_of_traceback(lines, start, words)]
    return ()


def _end_of_traceback(lines: Sequence[LogEntry], start: int, words: str) -> int:
    has_begun = False
    for place in range(start + 1, min(len(lines), start + _MOST_ENTRIES)):
        line = lines[place].message
        if line.startswith("Traceback "):
            has_begun = True
        elif has_begun and not line.startswith(" ") and line.endswith(words):
            return place + 1
        elif not has_begun:
            break
    return start + (_MOST_ENTRIES if has_begun else 1)


def _block(title: str, lines: Iterable[str]) -> str:
    return "\n".join([f"{title}:", *(f"  {_one_line(line)}" for line in lines)])


def _one_line(text: str) -> str:
    text = without_ansi(text[: 2 * _LINE_LENGTH]).replace("\x1b", "")
    line = next(iter(text.splitlines()), "")
    return line if len(line) <= _LINE_LENGTH else line[:_LINE_LENGTH] + " ..."
