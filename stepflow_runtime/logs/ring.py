"""The ring of the newest lines, and who looks into it.

Contract: bounded in lines and in bytes; the oldest go first. For any thread. Lines that look
like the server's own are kept as they came, and decoded when somebody asks for them: mostly
nobody does. Who follows reads from the ring itself, so nobody has to wait for a slow
follower: what it did not come to in time is gone, and counted.
"""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final, Self, TypeAlias

import anyio.lowlevel

from ..forks import forget_in_child
from ..loops import Announcer
from .config import checked_level
from .entry import LEVELS, LogEntry, decode, told_level

__all__ = ["MAX_KEPT", "Filter", "Kept", "LogFollower", "Ring"]

# How many bytes are kept: workers may print long lines. A line of the server takes half of
# what there is for each, so that of those as many are kept as were asked for.
MAX_KEPT: Final = 32 * 1024 * 1024
_ROOM_FOR_EACH: Final = 1024

# A line of the server's standard output as it came, or an entry.
Kept: TypeAlias = bytes | LogEntry

_SEVERITY: Final = {level.upper(): place for place, level in enumerate(LEVELS)}

# Such an id stands in JSON as it is.
_PLAIN_ID: Final = re.compile(r"[\w.:/-]+", re.ASCII)


class Ring:
    """:param keep: how many lines it holds at most"""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._max_size = max(MAX_KEPT, keep * _ROOM_FOR_EACH)
        self._kept: deque[Kept] = deque()
        self._sizes: deque[int] = deque()
        self._size = 0
        self._taken = 0
        self._has_ended = False
        # A signal handler may look into it while the code that it interrupted does.
        self._lock = threading.RLock()
        self._announcer = Announcer()
        forget_in_child(self)

    @property
    def taken(self) -> int:
        """How many lines were ever added."""
        return self._taken

    @property
    def has_ended(self) -> bool:
        return self._has_ended

    def add(self, lines: Sequence[Kept], sizes: Sequence[int]) -> None:
        with self._lock:
            self._kept.extend(lines)
            self._sizes.extend(sizes)
            self._size += sum(sizes)
            self._taken += len(lines)
            while len(self._kept) > self._keep or self._size > self._max_size:
                self._kept.popleft()
                self._size -= self._sizes.popleft()
        self._announcer.announce()

    def end(self) -> None:
        """Let those who follow come to their end: nothing will be added any more."""
        self._has_ended = True
        self._announcer.announce()

    def forget(self) -> None:
        """Let a forked child look into it, whatever its pumps were at."""
        self._lock = threading.RLock()

    def newest(self, limit: int) -> list[Kept]:
        """The newest ones, the newest last."""
        with self._lock:
            return self._last(limit)

    def after(self, place: int) -> tuple[list[Kept], int]:
        """What was added after the first ``place``, and how much of it is gone."""
        with self._lock:
            wanted = self._taken - place
            found = self._last(wanted)
        return found, wanted - len(found)

    async def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait until ``condition()`` is true; asks after each change."""
        await self._announcer.wait_until(condition)

    def _last(self, limit: int) -> list[Kept]:
        found = list(islice(reversed(self._kept), max(limit, 0)))
        found.reverse()
        return found


@dataclass(frozen=True)
class Filter:
    """Which entries are asked for.

    :param level: the least severe level, or None for all
    :raises ValueError: if there is no such level
    :raises TypeError: if an id is no string
    """

    level: str | None = None
    run_id: str | None = None
    step_id: str | None = None

    def __post_init__(self) -> None:
        checked_level("level", self.level)
        for name in ("run_id", "step_id"):
            if not isinstance(getattr(self, name), str | None):
                raise TypeError(f"{name} must be a string, not {getattr(self, name)!r}")

    def pick(self, lines: Iterable[Kept]) -> Iterator[LogEntry]:
        """The entries that pass, in the order of ``lines``."""
        least = _SEVERITY[checked_level("level", self.level)]
        mentioned = _as_mentioned(self.run_id, self.step_id)
        for line in lines:
            if isinstance(line, bytes):
                # To look takes a fraction of the time of decoding.
                told = told_level(line)
                if told is not None and _SEVERITY[told] < least:
                    continue
                if not all(each in line for each in mentioned):
                    continue
                entry = decode(line, "stdout")
            else:
                entry = line
            if (
                _SEVERITY[entry.level] >= least
                and self.run_id in (None, entry.run_id)
                and self.step_id in (None, entry.step_id)
            ):
                yield entry


def _as_mentioned(*ids: str | None) -> list[bytes]:
    return [each.encode() for each in ids if each and _PLAIN_ID.fullmatch(each)]


class LogFollower(AsyncIterator[LogEntry]):
    """Log entries as they come: ``async for entry in runtime.logs()``.

    In any event loop, and as many as are wanted. To stop reading needs no closing.

    :ivar lost: how many entries it did not come to before they were no longer kept
        (``LogConfig.keep``), whether or not they would have passed its filter
    """

    def __init__(self, ring: Ring, wanted: Filter, recent: int) -> None:
        self.lost = 0
        self._ring = ring
        self._wanted = wanted
        # In one look: between two of them there could be news.
        kept, gone = ring.after(0) if recent else ([], ring.taken)
        self._place = gone + len(kept)
        found = list(wanted.pick(kept))
        self._ready = deque(found[-recent:] if recent else [])

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> LogEntry:
        """The next entry, when there is one. Cancellation loses none.

        :raises StopAsyncIteration: after the last one of a runtime that has ended
        """
        await anyio.lowlevel.checkpoint()
        while not self._ready:
            has_ended = self._ring.has_ended  # first: what comes last, comes before it
            if not self._has_news():
                if has_ended:
                    raise StopAsyncIteration
                await self._ring.wait_until(
                    lambda: self._has_news() or self._ring.has_ended
                )
            found, lost = self._ring.after(self._place)
            self._place += len(found) + lost
            self.lost += lost
            self._ready.extend(self._wanted.pick(found))
        return self._ready.popleft()

    def _has_news(self) -> bool:
        return self._ring.taken > self._place
