"""What happens in one thread, and is waited for in the event loop of another.

Contract: nothing in here blocks, whichever thread it is called from, a signal handler
included; and what waits can be cancelled at any moment. anyio's own ways from thread to
loop wait for an answer, and a loop that waits for another one can wait for itself.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import anyio

__all__ = [
    "Announcer",
    "Slot",
    "Slots",
    "Waker",
    "current_loop",
    "has_ended",
    "in_event_loop",
    "post",
]


# How often those who wait for a slot see whether one was lost with its event loop.
_LOOK_AGAIN: Final = 1.0


def current_loop() -> Any:
    """What stands for the event loop that runs in this thread; None if none does."""
    # What nobody has imported runs nowhere; and another thread may be just importing it.
    events: Any = getattr(sys.modules.get("asyncio"), "events", None)
    running_loop = getattr(events, "_get_running_loop", None)
    if running_loop is not None and (loop := running_loop()) is not None:
        return loop
    lowlevel: Any = getattr(sys.modules.get("trio"), "lowlevel", None)
    current_token = getattr(lowlevel, "current_trio_token", None)
    if current_token is not None:
        with suppress(RuntimeError):
            return current_token()
    return None


def in_event_loop() -> bool:
    """True in a thread that runs an event loop, and so must not be blocked."""
    return current_loop() is not None


def post(loop: Any, function: Callable[[], object]) -> bool:
    """Have ``function`` called in an event loop, soon; False if that loop has ended.

    :param loop: what :func:`current_loop` returned there
    """
    try:
        # asyncio's way, or that of a trio token.
        tell = getattr(loop, "call_soon_threadsafe", None) or loop.run_sync_soon
        tell(function)
    except RuntimeError:
        return False
    return True


def has_ended(loop: Any) -> bool:
    return not post(loop, _nothing)


def _nothing() -> None:
    pass


class Waker:
    """Wakes one task, that made it, once."""

    def __init__(self) -> None:
        self._loop = current_loop()
        self._event = anyio.Event()

    def wake(self) -> bool:
        """Wake the task, from any thread; False if its event loop has ended."""
        return post(self._loop, self._event.set)

    async def wait(self) -> None:
        await self._event.wait()


class _ThreadWaker:
    """Wakes one thread, that made it, once.

    A plain lock, and one for each wait: a signal handler may wait while the code that it
    interrupted waits for the same.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def wake(self) -> bool:
        with suppress(RuntimeError):  # awake already
            self._lock.release()
        return True

    def wait(self, timeout: float) -> None:
        self._lock.acquire(timeout=timeout)


class Announcer:
    """Tells tasks of any event loop, and threads, that they should look again."""

    def __init__(self) -> None:
        self._waiting: set[Waker | _ThreadWaker] = set()

    def announce(self) -> None:
        """Tell them, from any thread."""
        for waker in tuple(self._waiting):
            if not waker.wake():
                self._waiting.discard(waker)  # what waited ended with its loop

    async def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait until ``condition()`` is true; looks at it after each announcement."""
        while not condition():
            waker = Waker()
            self._waiting.add(waker)
            try:
                # Once more: it may have become true before anybody could wake us.
                if not condition():
                    await waker.wait()
            finally:
                self._waiting.discard(waker)

    def block_until(
        self, condition: Callable[[], object], timeout: float = math.inf
    ) -> bool:
        """Block the thread until ``condition()`` is true; False if time is up."""
        deadline = time.monotonic() + timeout
        while not condition():
            left = min(deadline - time.monotonic(), threading.TIMEOUT_MAX)
            if left <= 0:
                return False
            waker = _ThreadWaker()
            self._waiting.add(waker)
            try:
                if not condition():
                    waker.wait(left)
            finally:
                self._waiting.discard(waker)
        return True


class Slot:
    """The right to enter, for a task of one event loop.

    :ivar loop: that loop
    :ivar holds: whatever goes with the slot
    """

    __slots__ = ("_slots", "holds", "loop")

    def __init__(self, slots: Slots) -> None:
        self._slots: Slots | None = slots
        self.loop = current_loop()
        self.holds: Any = None

    def release(self) -> None:
        """Give it back. A second time, as after it was reclaimed, does nothing."""
        slots, self._slots = self._slots, None
        if slots is not None:
            slots._take_back(self)


class Slots:
    """So many may enter at once, tasks of whichever event loops.

    :param on_reclaim: called with the slot of a task whose loop has ended around it, and
        that will therefore never give it back
    """

    def __init__(self, number: int, *, on_reclaim: Callable[[Slot], object]) -> None:
        self._number = number
        self._on_reclaim = on_reclaim
        self._waiting: deque[_Claim] = deque()
        self._taken: set[Slot] = set()
        self._reclaimed_at = -math.inf
        # A task that is garbage may give its slot back wherever memory is asked for.
        self._lock = threading.RLock()

    @property
    def taken(self) -> tuple[Slot, ...]:
        return tuple(self._taken)

    def take(self) -> Slot | None:
        """Take a slot, if one is free; the caller has to release it."""
        slot = Slot(self)
        with self._lock:
            if len(self._taken) < self._number and not self._waiting:
                self._taken.add(slot)
                return slot
        return None

    async def acquire(self) -> Slot:
        """Take a slot; the caller has to release it. No checkpoint if one is free."""
        if (free := self.take()) is not None:
            return free
        slot = Slot(self)
        claim = _Claim(slot)
        with self._lock:
            self._waiting.append(claim)
        self._hand_out()
        try:
            while not claim.is_granted:
                self._reclaim()
                with anyio.move_on_after(_LOOK_AGAIN):
                    await claim.waker.wait()
        except BaseException:
            with self._lock:
                if claim in self._waiting:
                    self._waiting.remove(claim)
            slot.release()  # if it was handed over in the meantime
            raise
        return slot

    def _take_back(self, slot: Slot) -> None:
        with self._lock:
            self._taken.discard(slot)
        if self._waiting:
            self._hand_out()

    def _hand_out(self) -> None:
        """Give what is free to those who have waited longest."""
        while True:
            with self._lock:
                if not self._waiting or len(self._taken) >= self._number:
                    return
                claim = self._waiting.popleft()
                self._taken.add(claim.slot)
                claim.is_granted = True
            if not claim.waker.wake():
                with self._lock:
                    self._taken.discard(claim.slot)

    def _reclaim(self) -> None:
        """Take back what ended with its loop. Not by each of a crowd of waiters."""
        now = time.monotonic()
        if now - self._reclaimed_at < _LOOK_AGAIN / 2:
            return
        self._reclaimed_at = now
        loops = {id(slot.loop): slot.loop for slot in self.taken}
        ended = {key for key, loop in loops.items() if has_ended(loop)}
        for slot in self.taken:
            if id(slot.loop) in ended:
                self._on_reclaim(slot)
                slot.release()


class _Claim:
    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.waker = Waker()
        self.is_granted = False
