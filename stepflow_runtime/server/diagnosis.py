"""Why a server did not start, or a run failed: pure functions of log entries.

The server's fatal errors are reports for terminals: ANSI codes, source locations, box
drawing, a backtrace. What a user needs of them is the chain of causes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Final

import msgspec

from ..executor import FlowError
from ..logs.entry import LogEntry
from ..wire import NO_REASON

__all__ = ["Failures", "causes", "last_words", "without_ansi"]

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
_WORKER_FAILURE: Final = re.compile(r"Component (\S+) failed: ?(.*)")
_MOST_ENTRIES: Final = 60
_LONGEST: Final = 60
_MOST_ALIKE: Final = 10

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


class Failures:
    """What was logged of the failures of one run, in one look at the log.

    That is what the server says of the run at the levels WARN and ERROR (of a failed step,
    where it names one), in plain words; and the tracebacks that Python workers printed, with
    the very words of an error. Those name their component, but no run.

    :param since: when the run began; what was printed earlier is not of it
    """

    def __init__(
        self, entries: Iterable[LogEntry], run_id: str, since: datetime | None
    ) -> None:
        self._told: list[LogEntry] = []
        self._printed: list[LogEntry] = []
        self.is_all = False
        for each in entries:
            if each.stream == "stderr":
                if since is None or each.timestamp >= since:
                    self._printed.append(each)
            elif each.run_id == run_id and each.level in ("WARN", "ERROR"):
                message = "\n".join(causes(each.message))
                self._told.append(msgspec.structs.replace(each, message=message))
            elif "execution completed" in each.message and run_id in each.message:
                # The server's last word on a run, at the level INFO or below.
                self.is_all = True
        self._starts: dict[str, list[int]] = {}
        for place, each in enumerate(self._printed):
            if (failure := _WORKER_FAILURE.fullmatch(each.message)) is not None:
                self._starts.setdefault(failure[2].strip(), []).append(place)

    def of(self, error: FlowError) -> tuple[LogEntry, ...]:
        """The entries on one of its failures, in order."""
        found = [
            each
            for each in self._told
            if error.step_id in (None, each.step_id or error.step_id)
        ]
        found += self._traceback(error)
        return tuple(sorted(found, key=lambda each: each.timestamp)[-_MOST_ENTRIES:])

    def _traceback(self, error: FlowError) -> Sequence[LogEntry]:
        """The newest one that fits; none if there are several that are not alike."""
        words = [""] if error.message == NO_REASON else error.message.splitlines()
        found: list[Sequence[LogEntry]] = []
        for start in reversed(self._starts.get(words[0].strip(), ())[-_MOST_ALIKE:]):
            failure = _WORKER_FAILURE.fullmatch(self._printed[start].message)
            first = start + len(words)  # the message stands there first, whole
            lines = [each.message for each in self._printed[first : first + _LONGEST]]
            told = [each.message for each in self._printed[start + 1 : first]]
            if failure and _is_of(error.component, failure[1]) and told == words[1:]:
                length = _length_of_traceback(lines, words)
                found.append(self._printed[start : first + length])
        texts = {tuple(line.message for line in each) for each in found}
        return found[0] if len(texts) == 1 else ()


def _is_of(component: str | None, name: str) -> bool:
    return component is None or component == name or component.endswith(f"/{name}")


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
