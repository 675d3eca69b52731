"""The pump: a thread that empties one of the server's pipes, line by line.

Contract: it reads until the pipe ends and never stops before, whatever is in the lines
and whatever becomes of them: a pipe that nobody reads freezes the server when it is full.
It is a thread, because an event loop can be held up for seconds by the program's own
work, and a batch should not stand still for that. Reading comes first: what else is to be
done with lines waits, up to ``MOST_WAITING`` bytes of them, so that slow log handlers hold
up neither the server nor the last words of one that has died. Memory is bounded: of a line
longer than ``MAX_LINE`` the rest is dropped, and the line says so.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from ..loops import Announcer
from .grouping import Grouper
from .own import report

__all__ = ["MAX_LINE", "MOST_WAITING", "Chore", "LineCutter", "Pipe", "Pump"]

# A line of the server is a few hundred bytes; a worker may print what it likes.
MAX_LINE: Final = 1024 * 1024

# Lines that are printed together arrive within microseconds of each other.
_PAUSE: Final = 0.005

# So many bytes at once are a flood, and no time to rest.
_FLOOD: Final = 64 * 1024


# How long we work before we see whether there is something to read; in a program whose
# threads are all busy, each of these can become several times as long.
_SLICE: Final = 0.02

# Of so many bytes the handlers may be behind.
MOST_WAITING: Final = 64 * 1024 * 1024


class Chore(Protocol):
    """What else is to be done with lines that were taken.

    :ivar weight: about how many bytes they take meanwhile
    """

    @property
    def weight(self) -> int: ...

    def work(self, until: float) -> bool:
        """Go on with it until a time of ``time.monotonic()``; True when all is done."""
        ...


class Pipe(Protocol):
    """The reading end of one of the server's pipes, for a thread that may block.

    One thread reads and rests; the others are for any thread, at any moment.
    """

    def read(self, timeout: float | None = None) -> bytes | None:
        """Wait for something to read, and return it; ``b""`` at the end.

        After :meth:`finish` it waits no more, and what is there comes before the end.

        :param timeout: for how many seconds to wait at most; None: for ever
        :returns: None if nothing came in time
        """
        ...

    def rest(self) -> None:
        """Let lines gather for a moment in which it cannot get full.

        So the thread takes the interpreter a hundred times a second from the program, and
        not for every line.
        """
        ...

    def is_empty(self) -> bool:
        """True if nothing is there, and somebody waits for more. For any thread."""
        ...

    def hurry(self) -> None:
        """End a :meth:`rest`, this one or the next."""
        ...

    def finish(self) -> None:
        """Have it wait for nothing any more."""
        ...

    def close(self) -> None:
        """Close it, or have the thread that is reading close it on its way out."""
        ...


class Pump:
    """Empties a pipe, from :meth:`start` until the pipe ends or :meth:`finish`.

    :param take: called, in the thread, with lines without their newlines; may return what
        else is to be done with them. What it raises is reported once
    :param hear: asked about each line first, until it has said True: that line is its own
    :param grouper: joins lines into texts that are taken in the place of lines
    """

    def __init__(
        self,
        pipe: Pipe,
        take: Callable[[Sequence[bytes]], Chore | None],
        *,
        hear: Callable[[bytes], bool] | None = None,
        grouper: Grouper | None = None,
    ) -> None:
        self._pipe = pipe
        self._take = take
        self._hear = hear
        self._grouper = grouper
        self._cutter = LineCutter()
        self._chores: deque[Chore] = deque()
        self._waiting = 0
        self._is_working = False
        self._may_rest = True
        self._has_read_all = False
        self._has_ended = False
        self._failure: BaseException | None = None
        self._has_reported = False
        self._announcer = Announcer()

    def start(self) -> None:
        """Start the thread.

        :raises RuntimeError: if no thread can be had
        """
        # A daemon: the interpreter must not wait for it at its end.
        threading.Thread(
            target=self._run, daemon=True, name="stepflow-runtime log pump"
        ).start()

    async def wait_read(self) -> None:
        """Wait until all is taken, whatever else is to be done with it."""
        await self._announcer.wait_until(lambda: self._has_read_all)

    async def wait(self) -> None:
        """Wait until all is done. Cancellation leaves the thread at work."""
        await self._announcer.wait_until(lambda: self._has_ended)
        if self._failure is not None:
            raise self._failure

    @property
    def is_held_up(self) -> bool:
        """True while a log handler, or the like, is at work."""
        return self._is_working

    @property
    def is_up_to_date(self) -> bool:
        """True if all that was written is taken, and nothing is held back."""
        return self._has_read_all or (
            self._pipe.is_empty() and not self._is_holding_back
        )

    def hurry(self) -> None:
        """Have it take now what is there; it comes soon, not at once."""
        self._pipe.hurry()

    def rush(self) -> None:
        """Have it rest no more: the server is gone."""
        self._may_rest = False
        self._pipe.hurry()

    def finish(self) -> None:
        """Have it take what is there, and end."""
        self._pipe.finish()

    def _run(self) -> None:
        try:
            self._pump()
        except BaseException as exc:  # noqa: BLE001 - raised where it is waited for
            self._failure = exc
        self._has_read_all = self._has_ended = True
        self._announcer.announce()

    def _pump(self) -> None:
        while (chunk := self._read()) != b"":
            if chunk:
                self._hand_on(self._lines(self._cutter.cut(chunk)))
            elif not self._chores and self._grouper is not None:
                self._hand_on(self._grouper.pause())
            self._work(time.monotonic() + _SLICE)
            is_flood = chunk is not None and len(chunk) >= _FLOOD
            has_more = is_flood or self._chores or self._hear is not None
            if self._may_rest and not has_more:
                self._pipe.rest()
        rest = self._cutter.rest()
        self._hand_on([*self._lines([rest] if rest else []), *self._held_back()])
        self._has_read_all = True
        self._announcer.announce()
        self._work(math.inf)

    def _read(self) -> bytes | None:
        """What is there; None if there is nothing, and something else to do."""
        if self._waiting > MOST_WAITING:
            return None
        if self._chores:
            return self._pipe.read(0)
        return self._pipe.read(_PAUSE if self._is_holding_back else None)

    def _work(self, until: float) -> None:
        """Go on with what is to be done."""
        self._is_working = True
        while self._chores:
            chore = self._chores[0]
            try:
                if not chore.work(until):
                    break
            except BaseException as exc:  # noqa: BLE001 - whatever it is, the pipe fills up
                self._report(exc)
            self._chores.popleft()
            self._waiting -= chore.weight
            if time.monotonic() >= until:
                break
        self._is_working = False

    def _lines(self, lines: list[bytes]) -> list[bytes]:
        """The lines, without the one that is meant for us, and grouped."""
        if self._hear is not None:
            lines = self._heard(self._hear, lines)
        if self._grouper is not None:
            lines = [text for line in lines for text in self._grouper.feed(line)]
        return lines

    def _heard(self, hear: Callable[[bytes], bool], lines: list[bytes]) -> list[bytes]:
        for place, line in enumerate(lines):
            if self._is_heard(hear, line):
                self._hear = None
                return [*lines[:place], *lines[place + 1 :]]
        return lines

    def _is_heard(self, hear: Callable[[bytes], bool], line: bytes) -> bool:
        try:
            return hear(line)
        except BaseException as exc:  # noqa: BLE001 - whatever it is, the pipe fills up
            self._report(exc, "a line could not be looked at")
            return False

    @property
    def _is_holding_back(self) -> bool:
        return self._grouper is not None and self._grouper.is_open

    def _held_back(self) -> list[bytes]:
        return self._grouper.flush() if self._grouper is not None else []

    def _hand_on(self, lines: Sequence[bytes]) -> None:
        if not lines:
            return
        self._is_working = True
        try:
            chore = self._take(lines)
        except BaseException as exc:  # noqa: BLE001 - whatever it is, the pipe fills up
            self._report(exc)
        else:
            if chore is not None:
                self._chores.append(chore)
                self._waiting += chore.weight
        self._is_working = False

    def _report(self, exc: BaseException, trouble: str = "log lines were lost") -> None:
        if not self._has_reported:
            self._has_reported = True
            report(logging.ERROR, trouble, exc=exc)


class LineCutter:
    """Cuts a stream of bytes into lines of bounded length."""

    def __init__(self, max_line: int = MAX_LINE) -> None:
        self._max_line = max_line
        self._begun: list[bytes] = []
        self._length = 0
        self._dropped = 0

    def cut(self, chunk: bytes) -> list[bytes]:
        """Return the lines that ``chunk`` completes, without their newlines."""
        lines = chunk.split(b"\n")
        begun = lines.pop()
        if len(chunk) > self._max_line:
            lines = [self._completed(line) for line in lines]
        elif lines:
            lines[0] = self._completed(lines[0])
        self._extend(begun)
        return lines

    def rest(self) -> bytes:
        """Return what follows the last newline."""
        return self._completed(b"")

    def _completed(self, part: bytes) -> bytes:
        if not self._begun and len(part) <= self._max_line:
            return part
        self._extend(part)
        line, dropped = b"".join(self._begun), self._dropped
        self._begun, self._length, self._dropped = [], 0, 0
        return line + b" ... [%d more bytes dropped]" % dropped if dropped else line

    def _extend(self, part: bytes) -> None:
        room = self._max_line - self._length
        taken = part[:room] if len(part) > room else part
        if taken:
            self._begun.append(taken)
            self._length += len(taken)
        self._dropped += len(part) - len(taken)
