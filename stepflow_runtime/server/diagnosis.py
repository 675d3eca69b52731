"""Why a server did not start, or a run failed: pure functions of log entries.

The server's fatal errors are reports for terminals: ANSI codes, source locations, box
drawing, a backtrace. What a user needs of them is the chain of causes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Final

import msgspec

from ..executor import FlowError
from ..logs.entry import LogEntry
from ..wire import NO_REASON

__all__ = ["Failures", "advice", "causes", "last_words", "without_ansi"]

# ECMA-48 control sequences, and operating system commands (titles, links); and in the same
# pattern single controls, so that what is left of ``ESC ESC[0m [2J`` is no command.
_ANSI: Final = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])"
    r"|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)"
)
_BOX: Final = re.compile(r"^[\s│├╰┌└─╴▶]+")
_LOCATION: Final = re.compile(r"^at \S+:\d+(?::\d+)?$")
_BACKTRACE: Final = re.compile(r"^backtrace(?: \(\d+\)| no\. \d+)$")
_RULE: Final = re.compile(r"^━+$")
_PREFIX: Final = "Server error: "

# A Python worker prints this, then the message, and the traceback.
_WORKER_FAILURE: Final = re.compile(r"Component (\S+) failed: ?")
_TRACEBACK: Final = re.compile(
    r"\s*(?:\+ Exception Group )?Traceback \(most recent call last\):"
)
_MOST_ENTRIES: Final = 60
_MOST_ALIKE: Final = 10

# What servers say that were built without a feature.
_FEATURES: Final = {
    "PostgreSQL support was not compiled in": "PostgreSQL",
    "requires the `nats` feature": "NATS",
}

_STDERR_LINES: Final = 60
_LOG_LINES: Final = 10
_LINE_LENGTH: Final = 500


def without_ansi(text: str) -> str:
    """``text`` without escape sequences and other controls, but for tabs and newlines."""
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
    stderr = _last_lines(
        (each.message for each in reversed(entries) if each.stream == "stderr"),
        _STDERR_LINES,
    )
    parts = []
    if fatal:
        parts.append(_block("the server's error", causes(fatal[-1].message)))
    if stderr:
        title = "standard error (server and workers)"
        parts.append(_block(title, stderr))
    if not fatal:
        logged = [str(each) for each in entries if each.stream == "stdout"]
        if logged:
            parts.append(_block("the last log lines", logged[-_LOG_LINES:]))
    return "\n".join(parts) or "It printed nothing."


def advice(entries: Iterable[LogEntry]) -> str:
    """What to do about a server that cannot do what its configuration asks for."""
    for entry in entries:
        if entry.level == "ERROR":
            for words, name in _FEATURES.items():
                if words in entry.message:
                    return (
                        f"\nThis stepflow-server was built without {name}, as the one from "
                        "PyPI is: give one that has it (binary=, or the environment "
                        "variable STEPFLOW_SERVER_BINARY), or let a server elsewhere run "
                        "the workflows (StepflowClient)."
                    )
    return ""


class Failures:
    """What was logged of the failures of one run, in one look at the log.

    That is what the server says of the run at the levels WARN and ERROR (of a failed step,
    where it names one), in plain words; and the tracebacks that Python workers printed, an
    entry each, with the very words of an error. Those name their component, but no run.

    :param since: when the run began; what was printed earlier is not of it
    """

    def __init__(
        self, entries: Iterable[LogEntry], run_id: str, since: datetime | None
    ) -> None:
        self._told: list[LogEntry] = []
        self._printed: list[LogEntry] = []
        self.is_all = False
        for each in entries:
            if each.stream == "stderr" and each.run_id not in (None, run_id):
                continue
            if each.stream == "stderr" and not _is_told(each):
                if since is None or each.timestamp >= since:
                    self._printed.append(each)
            elif each.run_id == run_id and each.level in ("WARN", "ERROR"):
                self._told.append(_in_plain_words(each))
            elif "execution completed" in each.message and run_id in each.message:
                # The server's last word on a run, at the level INFO or below.
                self.is_all = True
        self._starts: dict[str, list[int]] = {}
        for place, each in enumerate(self._printed):
            if (failure := _WORKER_FAILURE.match(each.message)) is not None:
                words = each.message[failure.end() :].partition("\n")[0]
                self._starts.setdefault(words.strip(), []).append(place)

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
        message = "" if error.message == NO_REASON else error.message
        words = _lines(message.removesuffix("\n"))
        places = self._starts.get(words[0].strip(), ())[-_MOST_ALIKE:]
        reports = [self._report_at(place, error, words) for place in reversed(places)]
        found = [each for each in reports if each]
        texts = {"\n".join(entry.message.rstrip() for entry in each) for each in found}
        return found[0] if len(texts) == 1 else ()

    def _report_at(
        self, place: int, error: FlowError, words: list[str]
    ) -> Sequence[LogEntry]:
        """What a worker printed of a failure, if it is the one with these words."""
        text = self._printed[place].message
        failure = _WORKER_FAILURE.match(text)
        if failure is None or not _is_of(error.component, failure[1]):
            return ()
        lines = _lines(text[failure.end() :])
        if lines[: len(words)] != words:
            return ()
        rest = lines[len(words) :]
        if not rest:
            # A pause came between, and the traceback is an entry of its own.
            report = self._printed[place : place + 2]
            return report if _TRACEBACK.match(report[-1].message) else ()
        # Unless the traceback comes next, it is another message that goes on there; or a
        # cause that was never raised.
        is_it = _TRACEBACK.match(rest[0]) or _ends_with(rest, words)
        return self._printed[place : place + 1] if is_it else ()


def _in_plain_words(entry: LogEntry) -> LogEntry:
    if entry.stream == "stderr":  # a function's own
        return entry
    message = "\n".join(causes(entry.message))
    return msgspec.structs.replace(entry, message=message)


def _is_told(entry: LogEntry) -> bool:
    """True for what a function has logged in a run, by its worker's account."""
    return entry.run_id is not None and not _WORKER_FAILURE.match(entry.message)


def _is_of(component: str | None, name: str) -> bool:
    return component is None or component == name or component.endswith(f"/{name}")


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.split("\n")]


def _ends_with(lines: list[str], words: list[str]) -> bool:
    """True if the last lines are those of an exception with this message."""
    first, *others = lines[-len(words) :]
    return first.endswith(f": {words[0]}") and others == words[1:]


def _last_lines(texts: Iterable[str], limit: int) -> list[str]:
    """The last lines of texts, the last text of which comes first."""
    lines: list[str] = []
    for text in texts:
        lines = [*(text.splitlines() or [""]), *lines][-limit:]
        if len(lines) == limit:
            break
    return lines


def _block(title: str, lines: Iterable[str]) -> str:
    return "\n".join([f"{title}:", *(f"  {_one_line(line)}" for line in lines)])


def _one_line(text: str) -> str:
    text = without_ansi(text[: 2 * _LINE_LENGTH])
    line = next(iter(text.splitlines()), "")
    return line if len(line) <= _LINE_LENGTH else line[:_LINE_LENGTH] + " ..."
