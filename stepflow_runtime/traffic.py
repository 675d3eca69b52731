"""Calls under way on a server, and what they have left there.

Contract: a call holds the server for as long as it needs this one life of it, however many
requests that is. Where servers are recycled, a gate can be closed: then no call begins but
those about runs that were submitted before, and it can be waited for until none is under
way and no result is left to be fetched. Holding blocks nobody and takes no lock; it may be
done, and given back, in any thread, and by the garbage collector.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

from .arguments import as_server_writes
from .forks import forget_in_child
from .loops import Announcer, current_loop, has_ended

__all__ = ["FREE", "FreeTraffic", "Hold", "StoredBlob", "Traffic"]


class FreeTraffic:
    """Of a server that nobody recycles: calls come and go, and nobody counts."""

    def hold(self, run_id: str | None = None) -> FreeTraffic | Hold | None:
        """The server for one call, to be entered by ``with``; None if the gate is closed.

        :param run_id: the run that the call is about
        """
        return self

    async def wait_hold(self, run_id: str | None = None) -> FreeTraffic | Hold:
        """The same, when the gate is open."""
        return self

    def took(
        self, items: int, generation: int | None, submitted: str | None = None
    ) -> None:
        """Take note of a run that the server took.

        :param generation: the life of the server that has it
        :param submitted: its id, if somebody will ask for its result later
        """

    def fetched(self, run_id: str) -> None:
        """Take note that the result of a run that is over was handed out, or is not wanted."""

    def stored(self, blob: StoredBlob) -> None:
        """Take note of something that somebody may ask for by its id."""

    def open(self) -> None:
        """Have whoever waits go on; from any thread, more than once."""

    def release(self) -> None:
        """Give it back."""

    def __enter__(self) -> object:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


FREE: Final = FreeTraffic()


@dataclass(frozen=True)
class StoredBlob:
    """A blob that was stored through this library.

    :ivar kind: ``"flow"``, ``"data"`` (JSON) or ``"binary"``
    :ivar filename: the name that was given to it
    """

    blob_id: str
    kind: str
    filename: str | None = None


class Hold:
    """The server, held by one call. Made in :meth:`Traffic.hold`, and only there.

    :ivar loop: the event loop that the call is made in; None for what is made outside of one
    """

    # Each run makes one: an __init__ would cost as much as all that it does.
    __slots__ = ("_traffic", "loop")
    _traffic: Traffic
    loop: Any

    def release(self) -> None:
        """Give it back. A second time does nothing."""
        traffic = self._traffic
        traffic._holds.discard(self)
        if traffic._is_closed:
            traffic.changed.announce()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # As in `release`: each run passes here.
        traffic = self._traffic
        traffic._holds.discard(self)
        if traffic._is_closed:
            traffic.changed.announce()


class Traffic(FreeTraffic):
    """Of a server that is recycled.

    :ivar changed: tells of what a drain waits for
    :ivar keeps_results: whether what was submitted has to be fetched from this very server
    """

    def __init__(self) -> None:
        self.changed = Announcer()
        self.keeps_results = True
        self._is_closed = False
        self._is_awaited = False
        self._holds: set[Hold] = set()
        self._lock = threading.Lock()
        self._counter = itertools.count(1)
        self._runs = 0
        self._more = 0
        self._call_at: float = float("inf")
        self._unfetched: dict[str, int | None] = {}
        self._blobs: dict[str, StoredBlob] = {}
        forget_in_child(self)

    # -- calls ---------------------------------------------------------------------

    def hold(self, run_id: str | None = None) -> Hold | None:
        hold = Hold()
        hold._traffic = self
        hold.loop = current_loop()
        self._holds.add(hold)
        # Looked at last: who closed it sees us, or we see that it is closed.
        if self._is_closed and not self._is_unfetched(run_id):
            hold.release()
            return None
        return hold

    async def wait_hold(self, run_id: str | None = None) -> Hold:
        while (hold := self.hold(run_id)) is None:
            await self.changed.wait_until(lambda: not self._is_closed)
        return hold

    def _is_unfetched(self, run_id: str | None) -> bool:
        return run_id is not None and as_server_writes(run_id) in self._unfetched

    @property
    def under_way(self) -> int:
        """How many calls there are."""
        return len(self._holds)

    def close(self) -> None:
        """Let no call begin, but those about runs that were submitted and not fetched."""
        self._is_closed = True

    def open(self) -> None:
        self._is_closed = False
        self.changed.announce()

    async def wait_drained(self) -> None:
        """Wait until no call is under way, and all was fetched; the gate has to be closed."""
        await self.changed.wait_until(self._is_drained)

    def _is_drained(self) -> bool:
        # Twice: a call that was under way may have left something, which brings others.
        return not (self._holds or self._unfetched or self._holds)

    def reclaim(self) -> None:
        """Take back what is held by calls whose event loop was closed around them."""
        for hold in self._holds.copy():
            if hold.loop is not None and has_ended(hold.loop):
                hold.release()

    def forget(self) -> None:
        """In a forked child: nobody is there who would open the gate."""
        self._is_closed = False

    # -- what they leave behind ----------------------------------------------------

    @property
    def runs(self) -> int:
        """How many runs the server took, all its lives together; a batch counts its items."""
        return self._runs + self._more

    def call_at(self, runs: float) -> None:
        """Announce, from now on, when :attr:`runs` has come to so many."""
        self._call_at = runs

    def took(
        self, items: int, generation: int | None, submitted: str | None = None
    ) -> None:
        if submitted is not None and self.keeps_results:
            self._unfetched[submitted] = generation
        self._runs = runs = next(self._counter)
        if items != 1:
            with self._lock:
                self._more += items - 1
        if runs + self._more >= self._call_at:
            self.changed.announce()

    def fetched(self, run_id: str) -> None:
        self._unfetched.pop(run_id, None)
        if self._is_closed or self._is_awaited:
            self.changed.announce()

    def unfetched(self) -> list[str]:
        """The runs that were submitted, and whose results were not fetched yet."""
        return list(self._unfetched.copy())

    @property
    def is_waiting_for_results(self) -> bool:
        """True if it is for that, and nothing else, that it has not fallen still."""
        return bool(self._unfetched) and not self._holds

    def forget_unfetched(self, *, but_of: int) -> None:
        """What other lives of the server had is lost, and not waited for."""
        for run_id, generation in self._unfetched.copy().items():
            if generation != but_of:
                self._unfetched.pop(run_id, None)

    async def wait_fetched(self, run_ids: list[str]) -> None:
        """Wait until none of these is left to be fetched; takes the list to pieces."""

        def are_fetched() -> bool:
            while run_ids and run_ids[-1] not in self._unfetched:
                run_ids.pop()
            return not run_ids

        self._is_awaited = True
        try:
            await self.changed.wait_until(are_fetched)
        finally:
            self._is_awaited = False

    def stored(self, blob: StoredBlob) -> None:
        if self.keeps_results:
            self._blobs[blob.blob_id] = blob

    def forget_blob(self, blob_id: str) -> None:
        """It is not on the server any more."""
        self._blobs.pop(blob_id, None)

    @property
    def blobs(self) -> Mapping[str, StoredBlob]:
        """What somebody may ask for by its id."""
        return self._blobs.copy()
