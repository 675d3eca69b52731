"""Entries as records of a Python logger.

Contract: a record has the server's time stamp, level, source file and line, and the entry
itself as ``record.stepflow``: the entry's own names (``message``, ``line``, ``file``) would
collide with those of the record. What a program has set for making records has the say.
"""

from __future__ import annotations

import logging
import math
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from time import monotonic
from typing import Any, Final

from .entry import LogEntry, decode
from .ring import Kept

__all__ = ["TRACE", "LoggerSink"]

TRACE: Final = 5
logging.addLevelName(TRACE, "TRACE")

_LEVELS: Final = {
    "TRACE": TRACE,
    "DEBUG": logging.DEBUG,
    "INFO": logging.INFO,
    "WARN": logging.WARNING,
    "ERROR": logging.ERROR,
}


# So many places in the source; the server has some hundred.
_MOST_PATTERNS: Final = 1000


class LoggerSink:
    """Hands entries to the Python logger of the given name, where that is enabled."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)
        if not self._logger.handlers and self._logger is not logging.getLogger():
            # Without this, a program that configures no logging gets warnings on stderr.
            self._logger.addHandler(logging.NullHandler())
        self._patterns: dict[object, tuple[Any, ...]] = {}
        self._conditions: tuple[object, ...] = ()

    def __str__(self) -> str:
        return f"a handler or filter of the logger {self._logger.name!r}"

    def take(
        self,
        lines: Sequence[Kept],
        levels: Sequence[str],
        failed: Callable[[BaseException], None],
        until: float = math.inf,
    ) -> int:
        """Make records of the lines whose level is enabled; return how many lines are done.

        Each is decoded, handled and dropped before the next: twice as fast as decoding all
        of them first, since it stays in the processor's cache.

        :param levels: those of the lines
        :param failed: called with what a handler or filter raises; the others go on
        :param until: a time of ``time.monotonic()`` to leave off at; one is always done
        """
        logger = self._logger
        enabled = {
            name for name, level in _LEVELS.items() if logger.isEnabledFor(level)
        }
        if enabled.isdisjoint(levels):
            return len(lines)
        make = self._maker()
        handle = _handling(logger)
        for place, line in enumerate(lines):
            if levels[place] in enabled:
                entry = decode(line, "stdout") if isinstance(line, bytes) else line
                try:
                    handle(make(entry))
                except BaseException as exc:  # noqa: BLE001 - the users' handlers
                    failed(exc)
                if monotonic() >= until:
                    return place + 1
        return len(lines)

    def _maker(self) -> Callable[[LogEntry], logging.LogRecord]:
        """How records are made for a batch.

        To find out what is the same for all records takes ``LogRecord`` as long as
        everything else together; so it is asked once for each place in the server's source.
        """
        logger = self._logger
        if (
            logging.getLogRecordFactory() is not logging.LogRecord
            or not _is_loggings_own(type(logger).makeRecord)
        ):
            return partial(_ordinary, logger)
        conditions = (
            threading.get_ident(),
            *map(logging.getLevelName, _LEVELS.values()),
        )
        if conditions != self._conditions or len(self._patterns) > _MOST_PATTERNS:
            self._patterns, self._conditions = {}, conditions
        return _copier(logger, self._patterns)


def _handling(logger: logging.Logger) -> Callable[[logging.LogRecord], object]:
    """What to do with each record of a batch: what ``logger.handle`` would.

    It would look for the same handlers each time, up the tree of loggers.
    """
    handlers: list[logging.Handler] = []
    each: logging.Logger | None = logger
    while each is not None:
        handlers += each.handlers
        each = each.parent if each.propagate else None
    is_ordinary = _is_loggings_own(type(logger).handle) and _is_loggings_own(
        type(logger).callHandlers
    )
    if not is_ordinary or logger.filters or not handlers:
        return logger.handle
    if len(handlers) == 1 and not handlers[0].level:
        return handlers[0].handle

    def handle(record: logging.LogRecord) -> None:
        level = record.levelno
        for handler in handlers:
            if level >= handler.level:
                handler.handle(record)

    return handle


def _is_loggings_own(method: Any) -> bool:
    """False for one that was overridden; or replaced, as Sentry's client does."""
    return getattr(method, "__globals__", None) is vars(logging)


_HAS_TASK: Final = sys.version_info >= (3, 12)

# What a record has. Of a version of Python that adds to it, records are made as it does.
_KNOWN: Final = frozenset(
    [
        "name",
        "msg",
        "args",
        "levelname",
        "levelno",
        "pathname",
        "filename",
        "module",
        "exc_info",
        "exc_text",
        "stack_info",
        "lineno",
        "funcName",
        "created",
        "msecs",
        "relativeCreated",
        "thread",
        "threadName",
        "processName",
        "process",
        "stepflow",
    ]
    + ["taskName"] * _HAS_TASK
)


# What is the same for all records of a place in the source.
_same: Final = attrgetter(
    "name",
    "levelname",
    "levelno",
    "pathname",
    "filename",
    "module",
    "lineno",
    "thread",
    "threadName",
    "processName",
    "process",
)


def _copier(
    logger: logging.Logger, patterns: dict[object, tuple[Any, ...]]
) -> Callable[[LogEntry], logging.LogRecord]:
    """Makes records like the one that was made first for a place in the source.

    Attribute by attribute: an object keeps those of its class's other objects in a compact
    form, which takes half the time of a dictionary.
    """
    find = patterns.get
    kind = logging.LogRecord
    make_empty = kind.__new__

    def make(entry: LogEntry) -> logging.LogRecord:
        place = (entry.file, entry.line, entry.level, entry.stream)
        pattern = find(place)
        if pattern is None:
            first = _ordinary(logger, entry)
            if vars(first).keys() == _KNOWN:
                started = first.created - first.relativeCreated / 1000
                patterns[place] = (*_same(first), started)
            return first
        record = make_empty(kind)
        timestamp = entry.timestamp
        created = timestamp.timestamp()
        (
            record.name,
            record.levelname,
            record.levelno,
            record.pathname,
            record.filename,
            record.module,
            record.lineno,
            record.thread,
            record.threadName,
            record.processName,
            record.process,
            started,
        ) = pattern
        record.msg = entry.message
        record.args = ()
        record.exc_info = record.exc_text = record.stack_info = None
        record.funcName = None  # type: ignore[assignment]
        record.created = created
        record.msecs = timestamp.microsecond // 1000 + 0.0
        record.relativeCreated = (created - started) * 1000
        if _HAS_TASK:
            record.taskName = None
        record.stepflow = entry
        return record

    return make


def _ordinary(logger: logging.Logger, entry: LogEntry) -> logging.LogRecord:
    record = logger.makeRecord(
        logger.name,
        _LEVELS[entry.level],
        entry.file or f"({entry.stream})",
        entry.line or 0,
        entry.message,
        (),
        None,
    )
    read_at = record.created
    record.created = entry.timestamp.timestamp()
    record.msecs = float(entry.timestamp.microsecond // 1000)
    record.relativeCreated += (record.created - read_at) * 1000
    record.stepflow = entry
    return record
