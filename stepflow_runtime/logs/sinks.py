"""The hub: takes what the pumps bring, and hands it to all who want it.

Contract: everything is in the ring before anything else happens to it. What ``redact``
leaves out or replaces is seen by nobody, nor is what is to be hidden. A sink that raises
does not disturb the others, nor the pumps: it is reported once, on the library's own
logger, and what it was given is skipped.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import Final, Protocol, cast

from .config import LogConfig
from .entry import LogEntry, Stream, check, decode, is_json, told_level
from .files import LineSink, LogFile, ParentStderr
from .own import report
from .records import LoggerSink
from .rendering import as_json, as_text, is_harmless
from .ring import Filter, Kept, LogFollower, Ring

__all__ = ["LogHub"]

# To close the file, we wait so long for a handler that holds everything up.
_CLOSE_PATIENCE: Final = 0.5

_NO_FILTER: Final = Filter()

_FIRST_LOOK: Final = 1000

# For the lines of several runs, which takes some microseconds a line.
_LOOK_BACK: Final = 100_000

_OF_RETRY: Final = "Retrying step "


class Hiding(Protocol):
    """Knows what is to be hidden; false if that is nothing."""

    def __bool__(self) -> bool: ...

    def starred(self, lines: Sequence[bytes]) -> Sequence[bytes]:
        """The lines without it."""
        ...


# What an entry takes beyond the bytes of its line.
_ENTRY: Final = 256

# What a value of ``extra`` takes beyond its bytes: ``[[],[],[]]`` takes 20 times as much.
_VALUE: Final = 64
_BEFORE_VALUES: Final = (b",", b"[", b"{")
_SHORT: Final = 1024


class LogHub:
    """Takes every line. For any thread."""

    def __init__(self, config: LogConfig) -> None:
        self._ring = Ring(config.keep)
        self._redact = config.redact
        self._logger = _logger_of(config)
        self._lines = _line_sink_of(config)
        self._is_raw = not config.capture
        is_text = config.format == "text"
        self._render = self._render_text if is_text else self._render_json
        self._decodes_all = config.redact is not None or (
            is_text and config.capture and self._lines is not None
        )
        self._starred: Callable[[Sequence[bytes]], Sequence[bytes]] | None = None
        self._is_closed = False
        self._reported: set[str] = set()
        # One batch at a time: there is a pump for each of the server's outputs. A handler
        # that is stuck with one keeps the other out of its own turn, but not of the ring.
        self._reading = threading.Lock()
        self._turn = threading.Lock()

    @property
    def taken(self) -> int:
        """How many entries were ever taken."""
        return self._ring.taken

    def open(self) -> None:
        """Open the file, if there is one to write.

        :raises OSError: if it cannot be written to
        """
        if self._lines is not None:
            self._lines.open()
            if self._is_closed:  # the start was given up meanwhile
                self._lines.close()

    def hide(self, secrets: Hiding) -> None:
        """Let stars stand for these from now on, whoever prints them."""
        self._starred = secrets.starred if secrets else None

    def end(self) -> None:
        """Let those who follow come to their end: nothing comes any more."""
        self._ring.end()

    def close(self) -> None:
        """Close the file, if there is one. What comes all the same is kept."""
        self._is_closed = True
        if self._lines is None:
            return
        has_turn = self._turn.acquire(timeout=_CLOSE_PATIENCE)
        try:
            self._lines.close()
        finally:
            if has_turn:
                self._turn.release()

    def take(self, stream: Stream, lines: Sequence[bytes]) -> _Batch | None:
        """Take a batch of lines, or of texts of several lines, into the ring.

        Returns what else is to be done with them.
        """
        if (starred := self._starred) is not None:
            lines = starred(lines)
        with self._reading:
            kept, levels, sizes = self._read(stream, lines)
            self._ring.add(kept, sizes)
        if self._logger is None and self._lines is None:
            return None
        # Empty lines weigh something, too, while they wait.
        weight = sum(sizes) + (0 if kept is lines else _ENTRY * len(kept))
        return _Batch(partial(self._pass_on, lines, kept, levels), weight)

    def _pass_on(
        self,
        lines: Sequence[bytes],
        kept: Sequence[Kept],
        levels: Sequence[str],
        done: int,
        until: float,
    ) -> int | None:
        """Pass the lines on, after the first ``done``; return how many are, or None."""
        with self._turn:
            if not done and self._lines is not None:
                self._write(self._lines, lines, kept)
            if self._logger is None:
                return None
            report = self._report_logger
            done += self._logger.take(kept[done:], levels[done:], report, until)
        return done if done < len(kept) else None

    def follow(self, wanted: Filter, recent: int) -> LogFollower:
        return LogFollower(self._ring, wanted, recent)

    def newest(self, limit: int, wanted: Filter = _NO_FILTER) -> list[LogEntry]:
        """Return the newest entries that are wanted, the newest last."""
        if wanted == _NO_FILTER:
            return list(wanted.pick(self._ring.newest(limit)))
        # Mostly they are among the newest lines, of which a ring can have a million.
        size = max(limit, _FIRST_LOOK)
        while True:
            kept = self._ring.newest(size)
            found = list(wanted.pick(kept))
            if len(found) >= limit or len(kept) < size:
                return found[-limit:] if limit else []
            size *= 8

    async def wait_news(self, taken: int) -> None:
        """Wait until more than the first ``taken`` were taken."""
        await self._ring.wait_until(lambda: self._ring.taken > taken)

    def since(self, taken: int, limit: int) -> list[LogEntry]:
        """Return what came after the first ``taken``, the newest of it, as far as kept."""
        return self.newest(min(self._ring.taken - taken, limit))

    def about(self, run_id: str, limit: int) -> list[LogEntry]:
        """Return what may tell of a run: what names it, and what names none."""
        mentioned = run_id.encode()
        return [
            _entry_of(line)
            for line in self._ring.newest(limit)
            if not (isinstance(line, bytes) and mentioned not in line)
        ]

    def of_runs(self, run_ids: Sequence[str], limit: int) -> list[LogEntry]:
        """Return the newest entries that name one of these runs, the newest last.

        And those of retries: the server names no run in them, or any.
        """
        mentioned = [_OF_RETRY.encode(), *(each.encode() for each in run_ids)]
        found = (
            _entry_of(line)
            for line in reversed(self._ring.newest(_LOOK_BACK))
            if not isinstance(line, bytes) or any(each in line for each in mentioned)
        )
        wanted = (
            each
            for each in found
            if each.run_id in run_ids or each.message.startswith(_OF_RETRY)
        )
        newest = islice(wanted, limit)
        return list(newest)[::-1]

    def _read(
        self, stream: Stream, lines: Sequence[bytes]
    ) -> tuple[Sequence[Kept], Sequence[str], Sequence[int]]:
        """What stands for the lines from here on; their levels; and their weights."""
        if stream == "stdout" and not self._decodes_all:
            told = [*map(told_level, lines)]
            if None not in told:
                return lines, cast(list[str], told), [*map(len, lines)]
        read = [
            (entry, _weight(entry, line))
            for line in lines
            if (entry := self._entry(stream, line)) is not None
        ]
        return (
            [entry for entry, _ in read],
            [entry.level for entry, _ in read],
            [size for _, size in read],
        )

    def _entry(self, stream: Stream, line: bytes) -> LogEntry | None:
        entry = decode(line, stream)
        return entry if self._redact is None else self._redacted(self._redact, entry)

    def _redacted(
        self, redact: Callable[[LogEntry], LogEntry | None], entry: LogEntry
    ) -> LogEntry | None:
        try:
            redacted = redact(entry)
            if redacted is not None:
                check(redacted)
            return redacted
        except BaseException as exc:  # noqa: BLE001 - the user's function
            # Its traceback is not shown: the exception may quote what was to be hidden.
            self._report(
                "redact",
                "log_config.redact raised %s; the entry is withheld",
                type(exc).__name__,
            )
            return LogEntry(
                timestamp=entry.timestamp,
                level=entry.level,
                message=f"[withheld: log_config.redact raised {type(exc).__name__}]",
                stream=entry.stream,
            )

    def _render_json(self, lines: Iterable[Kept]) -> list[bytes]:
        return [
            line
            if isinstance(line, bytes) and is_json(line) and is_harmless(line)
            else as_json(_entry_of(line))
            for line in lines
        ]

    def _render_text(self, lines: Iterable[Kept]) -> list[bytes]:
        return [as_text(_entry_of(line)) for line in lines]

    def _write(
        self, sink: LineSink, lines: Sequence[bytes], kept: Sequence[Kept]
    ) -> None:
        try:
            sink.write(lines if self._is_raw else self._render(kept))
        except BaseException as exc:  # noqa: BLE001 - the pump must go on
            self._report("lines", "writing log lines failed", exc=exc)

    def _report_logger(self, exc: BaseException) -> None:
        message = "%s raised; its log entries are skipped"
        self._report("logger", message, self._logger, exc=exc)

    def _report(
        self, what: str, message: str, *args: object, exc: BaseException | None = None
    ) -> None:
        if what not in self._reported:
            self._reported.add(what)
            report(logging.ERROR, message, *args, exc=exc)


class _Batch:
    """What else is to be done with a batch of lines."""

    def __init__(
        self, pass_on: Callable[[int, float], int | None], weight: int
    ) -> None:
        self.weight = weight
        self._pass_on = pass_on
        self._done = 0

    def work(self, until: float = math.inf) -> bool:
        """Go on with it until a time of ``time.monotonic()``; True when all is done."""
        done = self._pass_on(self._done, until)
        if done is not None:
            self._done = done
        return done is None


def _weight(entry: LogEntry, line: bytes) -> int:
    """About how many bytes an entry takes; of most, it is those of the line."""
    if not entry.extra or len(line) <= _SHORT:
        return len(line)
    return len(line) + _VALUE * sum(map(line.count, _BEFORE_VALUES))


def _entry_of(line: Kept) -> LogEntry:
    return decode(line, "stdout") if isinstance(line, bytes) else line


def _logger_of(config: LogConfig) -> LoggerSink | None:
    if not config.capture or config.python_logger is None:
        return None
    return LoggerSink(config.python_logger)


def _line_sink_of(config: LogConfig) -> LineSink | None:
    if config.file_path is not None:
        return LogFile(config.file_path, config.format, config.file_mode)
    return None if config.capture else ParentStderr()
