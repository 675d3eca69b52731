"""Where log entries go: the ring of the newest ones, and a Python logger.

Contract: a sink that raises does not disturb the pump. It is reported once, on the
library's own logger, and its entry is skipped.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from .config import LogConfig
from .entry import LogEntry
from .own import report

__all__ = ["LogHub"]

TRACE: Final = 5
logging.addLevelName(TRACE, "TRACE")

# How many characters of messages are kept, however many entries: workers may print long
# lines.
MAX_KEPT: Final = 32 * 1024 * 1024

_LEVELS: Final = {
    "TRACE": TRACE,
    "DEBUG": logging.DEBUG,
    "INFO": logging.INFO,
    "WARN": logging.WARNING,
    "ERROR": logging.ERROR,
}


class LogHub:
    """Takes every entry and hands it to each sink."""

    def __init__(self, config: LogConfig) -> None:
        self._ring: deque[LogEntry] = deque()
        self._keep = config.keep
        self._kept = 0
        self._sinks: list[Callable[[LogEntry], None]] = []
        self._reported: set[Callable[[LogEntry], None]] = set()
        self.taken = 0
        if config.python_logger is not None:
            self._sinks.append(LoggerSink(config.python_logger))

    def take(self, entry: LogEntry) -> None:
        self.taken += 1
        self._ring.append(entry)
        self._kept += len(entry.message)
        while len(self._ring) > self._keep or self._kept > MAX_KEPT:
            self._kept -= len(self._ring.popleft().message)
        for sink in self._sinks:
            try:
                sink(entry)
            except (Exception, SystemExit) as exc:  # noqa: BLE001 - the users' handlers
                self._report(sink, exc)

    def newest(self, limit: int) -> list[LogEntry]:
        """Return the newest entries, the newest last."""
        return list(self._ring)[-limit:] if limit > 0 else []

    def since(self, taken: int) -> Sequence[LogEntry]:
        """Return what was taken after the first ``taken`` entries, as far as it is kept."""
        return self.newest(self.taken - taken)

    def _report(self, sink: Callable[[LogEntry], None], exc: BaseException) -> None:
        if sink not in self._reported:
            self._reported.add(sink)
            report(
                logging.ERROR, "%s raised; its log entries are skipped", sink, exc=exc
            )


class LoggerSink:
    """Makes each entry a record of a Python logger, with the server's own time stamp."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)
        if not self._logger.handlers and self._logger is not logging.getLogger():
            # Without this, a program that configures no logging gets warnings on stderr.
            self._logger.addHandler(logging.NullHandler())

    def __str__(self) -> str:
        return f"a handler or filter of the logger {self._logger.name!r}"

    def __call__(self, entry: LogEntry) -> None:
        level = _LEVELS.get(entry.level, logging.INFO)
        if self._logger.isEnabledFor(level):
            self._logger.handle(self._record(entry, level))

    def _record(self, entry: LogEntry, level: int) -> logging.LogRecord:
        record = self._logger.makeRecord(
            self._logger.name,
            level,
            entry.file or f"({entry.stream})",
            entry.line or 0,
            entry.message,
            (),
            None,
        )
        read_at = record.created
        record.created = entry.timestamp.timestamp()
        record.msecs = entry.timestamp.microsecond // 1000
        record.relativeCreated += (record.created - read_at) * 1000
        # The entry travels as one attribute: its own names (``message``, ``line``, ``file``)
        # would collide with those of the record.
        record.stepflow = entry
        return record
