"""Tasks that belong to an executor, and not to the call that they come from.

A caller that is cancelled goes at once; that its run is cancelled on the server, too, is
somebody else's task. Contract: jobs may be sent from any thread and any event loop, and
are done in one: that of whoever runs :meth:`Crew.work`, as child tasks of it; or, for a
crew that may hire, in a daemon thread that the first job starts. A job never outlives its
crew, and what it raises goes to whoever waits for it, or else nowhere. A crew works until it
is dismissed, shielded; its owner decides how long what is left behind may take.
"""

from __future__ import annotations

import enum
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, Generic, TypeVar

import anyio
from anyio.abc import TaskGroup

from .forks import forget_in_child
from .logs.own import report
from .loops import Announcer, current_loop, post

__all__ = ["Crew", "CrewGoneError", "Job", "Kind"]

T = TypeVar("T")

# Seconds that errands have, where nobody waits for them.
_LAST_ERRANDS: Final = 3.0


class Kind(enum.Enum):
    """Whose job it is."""

    CALL = enum.auto()
    """Somebody waits for it."""
    PART = enum.auto()
    """Of an iteration; it has no use without that."""
    ERRAND = enum.auto()
    """Left behind by somebody who has gone."""


class Job(Generic[T]):
    """Something that a crew does; see :meth:`Crew.send`."""

    def __init__(self, function: Callable[[], Awaitable[T]], kind: Kind) -> None:
        self.kind = kind
        self._function = function
        self._scope: anyio.CancelScope | None = None
        self._loop: Any = None
        self._is_cancelled = False
        self._ended = Announcer()
        self._outcome: Callable[[], T] | None = None
        self._when_ended: Callable[[], object] | None = None

    @property
    def has_ended(self) -> bool:
        return self._outcome is not None

    def cancel(self) -> None:
        """Have it cancelled, soon; from any thread."""
        self._is_cancelled = True
        scope = self._scope
        if scope is not None:
            post(self._loop, scope.cancel)

    def when_ended(self, function: Callable[[], object]) -> None:
        """Have ``function`` called when it has ended, in the loop of the crew; or now."""
        self._when_ended = function
        if self.has_ended:
            self._tell()

    async def wait(self) -> T:
        """Wait for its end, in any event loop; return what it returned.

        :raises CrewGoneError: if it was cancelled, or its crew was
        """
        await self._ended.wait_until(lambda: self.has_ended)
        assert self._outcome is not None
        return self._outcome()

    async def do(self) -> None:
        self._loop = current_loop()
        try:
            with anyio.CancelScope() as self._scope:
                if not self._is_cancelled:
                    value = await self._function()
                    self._end(lambda: value)
        except Exception as exc:  # noqa: BLE001 - raised where it is waited for
            error = exc
            self._end(lambda: _raise(error))
        finally:
            self.drop()

    def drop(self) -> None:
        """Tell whoever waits that it will not be done; does nothing if it was."""
        if not self.has_ended:
            self._end(lambda: _raise(CrewGoneError()))

    def _end(self, outcome: Callable[[], T]) -> None:
        self._outcome = outcome
        self._ended.announce()
        self._tell()

    def _tell(self) -> None:
        tell, self._when_ended = self._when_ended, None
        if tell is not None:
            tell()


class CrewGoneError(Exception):
    """A job was not done to its end."""


def _raise(exc: BaseException) -> Any:
    raise exc


class Crew:
    """Does jobs in one event loop.

    :param may_hire: whether a job may start a thread for the crew, where nobody runs
        :meth:`work`
    """

    def __init__(self, *, may_hire: bool = False) -> None:
        self._may_hire = may_hire
        self._lock = threading.RLock()
        self._loop: Any = None
        self._tasks: TaskGroup | None = None
        self._waiting: deque[Job[Any]] = deque()
        self._doing: set[Job[Any]] = set()
        self._arrived = Announcer()
        self._changed = Announcer()
        self._thread: threading.Thread | None = None
        self._is_dismissed = False
        forget_in_child(self)

    @property
    def loop(self) -> Any:
        """The event loop that it works in, or None."""
        return self._loop

    @property
    def has_errands(self) -> bool:
        """True if somebody has left something behind, or will by being stopped."""
        jobs = (*self._doing, *self._waiting)
        return any(job.kind is not Kind.CALL for job in jobs)

    async def wait_errands_done(self) -> None:
        """Wait until nothing is left to do that somebody has left behind."""
        await self._changed.wait_until(lambda: not self._is_on_errands())

    def send(
        self, function: Callable[[], Awaitable[T]], kind: Kind = Kind.CALL
    ) -> Job[T] | None:
        """Have ``function`` called and awaited; from any thread.

        :return: the job; None if there is nobody to do it
        """
        job = Job(function, kind)
        with self._lock:
            if self._is_dismissed:
                return None
            if self._loop is None and not self._hire():
                return None
            self._waiting.append(job)
        # Its own task begins it: tasks cannot be started from a callback, as of a thread.
        self._arrived.announce()
        return job

    async def work(self) -> None:
        """Do what is sent, until it is dismissed.

        A cancellation around it waits for that: who has been cancelled, too, may have left
        something behind.
        """
        try:
            with anyio.CancelScope(shield=True):
                await self._work()
        finally:
            self._drop_all()

    async def _work(self) -> None:
        async with anyio.create_task_group() as tasks:
            with self._lock:
                if self._is_dismissed:
                    return
                self._loop, self._tasks = current_loop(), tasks
            self._changed.announce()
            try:
                while True:
                    await self._arrived.wait_until(lambda: self._waiting)
                    self._begin_waiting(tasks)
            finally:
                # What is sent from now on would not be begun.
                with self._lock:
                    self._loop = self._tasks = None

    async def wait_at_work(self) -> None:
        """Wait until :meth:`work` has begun."""
        await self._changed.wait_until(lambda: self._tasks is not None)

    async def settle(self, within: float) -> None:
        """Stop iterations, and wait until all errands are done, or time is up."""
        self._stop_parts()
        with anyio.move_on_after(within):
            await self._changed.wait_until(lambda: not self.has_errands)

    def block_until_settled(self, within: float) -> None:
        """The same for a thread: blocks it."""
        self._stop_parts()
        if self._loop is None or self._loop is not current_loop():
            self._changed.block_until(lambda: not self.has_errands, within)

    def dismiss(self) -> None:
        """Have it stop working, and take no more jobs; from any thread."""
        with self._lock:
            self._is_dismissed = True
            loop, tasks = self._loop, self._tasks
        if tasks is not None:
            if loop is current_loop():
                tasks.cancel_scope.cancel()
            else:
                post(loop, tasks.cancel_scope.cancel)

    def retire(self, then: Callable[[], object]) -> None:
        """Have it end by itself, once it has done its errands; from any thread.

        :param then: called last
        """
        if self._loop is None or not self.has_errands:
            then()
            self.dismiss()
        else:
            self.send(partial(self._settle_and_end, then))

    async def _settle_and_end(self, then: Callable[[], object]) -> None:
        await self.settle(_LAST_ERRANDS)
        then()
        self.dismiss()

    def _is_on_errands(self) -> bool:
        return any(job.kind is Kind.ERRAND for job in (*self._doing, *self._waiting))

    def _stop_parts(self) -> None:
        for job in (*self._waiting, *self._doing):
            if job.kind is Kind.PART:
                job.cancel()

    def forget(self) -> None:
        """In a forked child: whoever worked is not there."""
        self._lock = threading.RLock()
        self._loop = self._tasks = self._thread = None
        self._waiting.clear()
        self._doing.clear()

    def _hire(self) -> bool:
        if not self._may_hire:
            return False
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(
                target=self._work_alone, name="stepflow-runtime crew", daemon=True
            )
            self._thread.start()
        return True

    def _work_alone(self) -> None:
        try:
            anyio.run(self.work)
        except BaseException as exc:  # noqa: BLE001 - nobody else would hear of it
            report(logging.ERROR, "the crew of a client broke down", exc=exc)

    def _begin_waiting(self, tasks: TaskGroup) -> None:
        while self._waiting:
            job = self._waiting.popleft()
            self._doing.add(job)
            tasks.start_soon(self._do, job)

    async def _do(self, job: Job[Any]) -> None:
        try:
            await job.do()
        finally:
            self._end(job)

    def _end(self, job: Job[Any]) -> None:
        job.drop()
        self._doing.discard(job)
        self._changed.announce()

    def _drop_all(self) -> None:
        while self._waiting:
            self._waiting.popleft().drop()
        for job in tuple(self._doing):
            self._end(job)
