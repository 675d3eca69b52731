"""Where a runtime is in its life, and who waits for it to go on.

Contract: there is one state, and every change of it is seen, in order, by everybody who
follows, in whichever event loop. Any thread may look, and make a change; but none that
:data:`MAY_FOLLOW` does not have, whoever comes too late.
"""

from __future__ import annotations

import enum
import math
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final

from ..loops import Announcer
from .process import ServerExit

__all__ = ["MAY_FOLLOW", "Follower", "Journal", "RuntimeState", "StateChange"]


class RuntimeState(enum.Enum):
    """Where a runtime is in its life."""

    NEW = "new"
    """Made by ``start()`` in an event loop, and not used yet."""
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    """The server ended unasked, or is being recycled; a new one is on its way."""
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"
    """The server did not start, or ended unasked and was given up."""

    @property
    def is_final(self) -> bool:
        """True if no other state will follow."""
        return self in (RuntimeState.STOPPED, RuntimeState.FAILED)


# docs/images/lifecycle.svg draws these. RESTARTING follows itself where a launch fails.
MAY_FOLLOW: Final[Mapping[RuntimeState, frozenset[RuntimeState]]] = {
    RuntimeState.NEW: frozenset({RuntimeState.STARTING, RuntimeState.STOPPED}),
    RuntimeState.STARTING: frozenset(
        {RuntimeState.READY, RuntimeState.STOPPING, RuntimeState.FAILED}
    ),
    RuntimeState.READY: frozenset(
        {RuntimeState.RESTARTING, RuntimeState.STOPPING, RuntimeState.FAILED}
    ),
    RuntimeState.RESTARTING: frozenset(
        {
            RuntimeState.READY,
            RuntimeState.RESTARTING,
            RuntimeState.STOPPING,
            RuntimeState.FAILED,
        }
    ),
    RuntimeState.STOPPING: frozenset({RuntimeState.STOPPED}),
    RuntimeState.STOPPED: frozenset(),
    RuntimeState.FAILED: frozenset(),
}


@dataclass(frozen=True, kw_only=True)
class StateChange:
    """A state that a runtime came into, and how it stood then.

    :ivar state: the state
    :ivar at: when it was entered, an aware datetime in UTC
    :ivar pid: the process id of the server, or None while there is none
    :ivar port: the server's port, or None if it never was READY
    :ivar restarts: how many times the server was restarted after it had ended unasked
    :ivar recycles: how many times it was replaced by a fresh one, by ``recycle_after_runs``
        or ``recycle_above_memory``
    :ivar last_exit: how the server last ended unasked, or None
    """

    state: RuntimeState
    at: datetime
    pid: int | None = None
    port: int | None = None
    restarts: int = 0
    recycles: int = 0
    last_exit: ServerExit | None = field(default=None, repr=False)


class _Link:
    """A change and the way to the next one: who follows, keeps what it has not seen."""

    def __init__(self, change: StateChange) -> None:
        self.change = change
        self.next: _Link | None = None


class Journal:
    """The changes of one runtime's state."""

    def __init__(self) -> None:
        self._announcer = Announcer()
        # A signal handler may ask for a stop in the middle of a change.
        self._lock = threading.RLock()
        self._newest = _Link(StateChange(state=RuntimeState.NEW, at=datetime.now(UTC)))

    @property
    def now(self) -> StateChange:
        return self._newest.change

    def enter(
        self,
        state: RuntimeState,
        *,
        only_from: RuntimeState | None = None,
        **details: Any,
    ) -> bool:
        """Go over to ``state``, and tell everybody.

        Return False if it may not follow, or it is not ``only_from``; nothing is changed.
        """
        with self._lock:
            before = self.now.state
            if only_from not in (None, before) or state not in MAY_FOLLOW[before]:
                return False
            change = replace(self.now, state=state, at=datetime.now(UTC), **details)
            link = _Link(change)
            self._newest.next, self._newest = link, link
        self.announce()
        return True

    def announce(self) -> None:
        """Have everybody look again, at what no state tells."""
        self._announcer.announce()

    async def wait_until(self, condition: Callable[[], object]) -> None:
        await self._announcer.wait_until(condition)

    def block_until(
        self, condition: Callable[[], object], timeout: float = math.inf
    ) -> bool:
        return self._announcer.block_until(condition, timeout)

    def follow(self) -> Follower:
        """Yield how it stands now, and then each change, up to the final one."""
        return Follower(self, self._newest)


class Follower(AsyncIterator[StateChange]):
    """No generator: those have to be closed, and this holds nothing that needs it."""

    def __init__(self, journal: Journal, first: _Link) -> None:
        self._journal = journal
        self._seen: _Link | None = None
        self._next: _Link | None = first

    async def __anext__(self) -> StateChange:
        if (seen := self._seen) is not None:
            if seen.change.state.is_final:
                raise StopAsyncIteration
            await self._journal.wait_until(lambda: seen.next)
            self._next = seen.next
        assert self._next is not None
        self._seen = self._next
        return self._seen.change
