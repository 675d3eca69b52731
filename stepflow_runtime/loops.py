"""What happens in one thread, and is waited for in the event loop of another.

Contract: nothing in here blocks, whichever thread it is called from, a signal handler
included; and what waits can be cancelled at any moment. anyio's own ways from thread to
loop wait for an answer, and a loop that waits for another one can wait for itself.
"""

from __future__ import annotations

import asyncio
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import anyio
import anyio.lowlevel

__all__ = ["Announcer", "Slots", "Waker", "in_event_loop", "post"]


def in_event_loop() -> bool:
    """True in a thread that runs an event loop, and so must not be blocked."""
    with suppress(RuntimeError):
        asyncio.get_running_loop()
        return True
    trio: Any = sys.modules.get("trio")
    return trio is not None and trio.lowlevel.in_trio_run()


def post(token: anyio.lowlevel.EventLoopToken, function: Callable[[], object]) -> bool:
    """Have ``function`` called in an event loop, soon; False if that loop has ended."""
    loop: Any = token.native_token
    try:
        if isinstance(loop, asyncio.AbstractEventLoop):
            loop.call_soon_threadsafe(function)
        else:
            loop.run_sync_soon(function)
    except RuntimeError:
        return False
    return True


class Waker:
    """Wakes one task, that made it, once."""

    def __init__(self) -> None:
        self._token = anyio.lowlevel.current_token()
        self._event = anyio.Event()

    def wake(self) -> bool:
        """Wake the task, from any thread; False if its event loop has ended."""
        return post(self._token, self._event.set)

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
            waker.wake()

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


class Slots:
    """So many may enter at once, tasks of whichever event loops."""

    def __init__(self, number: int) -> None:
        self._free = number
        self._waiting: deque[Waker] = deque()
        self._lock = threading.Lock()

    async def acquire(self) -> None:
        """Take a slot. No checkpoint if one is free."""
        with self._lock:
            if self._free:
                self._free -= 1
                return
            waker = Waker()
            self._waiting.append(waker)
        try:
            await waker.wait()
        except BaseException:
            with self._lock:
                was_handed_over = waker not in self._waiting
                if not was_handed_over:
                    self._waiting.remove(waker)
            if was_handed_over:
                self.release()
            raise

    def release(self) -> None:
        """Give a slot back: it is handed to the task that has waited longest."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._free += 1
                    return
                waker = self._waiting.popleft()
            if waker.wake():
                return
