"""Why a server did not start, in words: pure functions from log entries to text.

The server's fatal errors are reports for terminals: ANSI codes, source locations, box
drawing, a backtrace. What a user needs of them is the chain of causes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

from ..logs.entry import LogEntry

__all__ = ["causes", "last_words", "without_ansi"]

# ECMA-48 control sequences, and operating system commands (titles, links).
_ANSI: Final = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])"
)
_BOX: Final = re.compile(r"^[\s│├╰┌└─╴▶]+")
_LOCATION: Final = re.compile(r"^at \S+:\d+(?::\d+)?$")
_BACKTRACE: Final = re.compile(r"^backtrace(?: \(\d+\)| no\. \d+)$")
_RULE: Final = re.compile(r"^━+$")
_PREFIX: Final = "Server error: "

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


def _block(title: str, lines: Iterable[str]) -> str:
    return "\n".join([f"{title}:", *(f"  {_one_line(line)}" for line in lines)])


def _one_line(text: str) -> str:
    text = without_ansi(text[: 2 * _LINE_LENGTH]).replace("\x1b", "")
    line = next(iter(text.splitlines()), "")
    return line if len(line) <= _LINE_LENGTH else line[:_LINE_LENGTH] + " ..."
