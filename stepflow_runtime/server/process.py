"""One process of the server: spawn, hear its port, stop, sweep its session, reap.

Contract: whoever spawned a :class:`ServerProcess` calls :meth:`ServerProcess.end`, which
is bounded in time and leaves nothing of the session; and then :meth:`~ServerProcess.close`.
"""

from __future__ import annotations

import errno
import logging
import math
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Final

import anyio
import msgspec

from .. import wire
from ..errors import ServerStartError
from ..logs.entry import LogEntry
from ..logs.own import report
from ..loops import Announcer
from ..threads import run_blocking
from .confine import CannotConfineError
from .options import Command
from .platform import KILLED, Child, spawn

__all__ = ["LONGEST_KILL", "NOT_CONFINED", "ServerExit", "ServerProcess"]

# A SIGTERM that arrives while the server is still putting its signal handling together
# is lost: rarely right after the port line, often on a busy machine. So it is repeated;
# a server that has heard one takes no notice of another.
_REPEAT_SIGTERM: Final = 0.1

# The server waits for its workers' open streams, for ever, and an idle worker does not
# react to SIGTERM. This long they may go on finishing; then they are killed, and the
# server, free of them, ends in good order.
_WORKERS_GRACE: Final = 0.5

# How often, during start-up, we look for a worker that failed.
_WORKER_WATCH: Final = 0.5

# After SIGKILL the kernel needs milliseconds. A process in uninterruptible sleep (a dead
# network file system) can take for ever, and must not take us along.
_KILL_TIMEOUT: Final = 2.0

# The most that an end takes beyond the grace: two sweeps and a wait.
LONGEST_KILL: Final = _WORKERS_GRACE + 2 * _KILL_TIMEOUT


@dataclass(frozen=True, kw_only=True)
class ServerExit:
    """How a process of the server ended.

    :ivar code: its exit code; negative: the number of the signal that killed it; 127 if
        it could not be executed at all; 255 also if another part of the program reaped it
        first, so that nobody knows
    :ivar pid: the process id it had; 0 if there was none
    :ivar uptime: for how many seconds it was READY; 0 if it never was
    :ivar was_hung: True if it answered no health requests any more, and so we killed it
    :ivar recent_logs: its last log entries, the newest last
    """

    code: int
    pid: int
    uptime: float = 0.0
    was_hung: bool = False
    recent_logs: Sequence[LogEntry] = field(default=(), repr=False)

    @property
    def signal(self) -> str | None:
        """The name of the signal that killed it (``"SIGKILL"``), or None."""
        if self.code >= 0:
            return None
        try:
            return signal.Signals(-self.code).name
        except ValueError:
            return f"signal {-self.code}"

    def __str__(self) -> str:
        if self.was_hung:
            return "answered no health requests any more and was killed"
        if self.signal is not None:
            return f"was killed by {self.signal}"
        return f"exited with code {self.code}"


_NOT_KILLED: Final = "%d processes of the server's session %d could not be killed"


NOT_CONFINED: Final = (
    'exposure="require-loopback": the port of the Stepflow server cannot be kept on '
    'loopback: {}. Without that (exposure="any") whoever reaches this machine could run '
    "workflows on it, and read files."
)


class _Announcement(msgspec.Struct, forbid_unknown_fields=True):
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]


_decode_announcement = msgspec.json.Decoder(_Announcement).decode


class ServerProcess:
    """A process of the server, spawned.

    :param port: the port that it was told to take; 0 if it is to choose
    :ivar foreign_port: another one that was announced, by whomever
    """

    def __init__(self, child: Child, port: int = 0) -> None:
        self._child = child
        self._port = port
        self.pid = child.pid
        self.stdout = child.stdout
        self.stderr = child.stderr
        self.announced_port: int | None = None
        self.foreign_port: int | None = None
        self._announcer = Announcer()

    @classmethod
    async def spawn(cls, binary: Path, command: Command) -> ServerProcess:
        """Start the server. Cancellation waits for the spawn, then takes effect later.

        The caller must own the process at once: no ``await`` may come between this one
        and the ``try`` whose ``finally`` calls :meth:`end`.

        :raises ServerStartError: if the binary cannot be executed
        """
        handover = _Handover()
        try:
            # A thread, since a fork and exec takes milliseconds; and since what keeps the
            # port on loopback is a thread's, and what that starts.
            child = await run_blocking(handover.spawn, binary, command)
            return cls(child, command.port.number)
        except CannotConfineError as exc:
            raise ServerStartError(NOT_CONFINED.format(exc)) from exc
        except (OSError, RuntimeError) as exc:  # RuntimeError: no thread to be had
            raise ServerStartError(_why_not_executed(binary, exc)) from exc
        except BaseException:
            # asyncio's own cancellation does not wait for the thread, as anyio's does.
            handover.abandon()
            raise

    def hear(self, line: bytes) -> bool:
        """Take a line of standard output; True if it was the announcement of the port.

        Of another port than it was told to take, it is none: somebody else wrote that, who
        has inherited its standard output. For any thread.
        """
        if self.announced_port is not None or not line.startswith(b'{"port"'):
            return False
        try:
            port = _decode_announcement(line).port
        except wire.NOT_UNDERSTOOD:
            return False
        if port != (self._port or port):
            self.foreign_port = port
            return False
        self.announced_port = port
        self._announcer.announce()
        return True

    @property
    def exposed(self) -> str | None:
        """Why its port may be open to others, though it was not to be; None if it is not."""
        return self._child.exposed

    async def wait_port(self) -> int:
        """Wait until the server has announced its port."""
        await self._announcer.wait_until(lambda: self.announced_port is not None)
        assert self.announced_port is not None
        return self.announced_port

    async def wait_exit(self) -> None:
        """Wait until the process has ended."""
        await self._child.wait_exit()

    async def wait_worker_failed(self) -> int:
        """Wait until a child of the process has failed; return its exit code.

        Looks at the process list from time to time: nothing tells us of a grandchild.
        """
        before = None
        while True:
            await anyio.sleep(_WORKER_WATCH)
            code = next(filter(None, await self.ended_workers()), None)
            if code is not None and code == before:
                return code
            # Seen once, it can be a helper that the server is about to reap.
            before = code

    async def ended_workers(self) -> list[int]:
        """Return the exit codes of the children of the process that have ended."""
        return await run_blocking(self._child.ended_workers)

    def kill(self) -> None:
        """Kill the process, and it alone; :meth:`end` does the rest."""
        self._child.kill()

    def kill_session(self) -> None:
        """Kill the process and its session. For any thread; blocks until they are dead."""
        self._child.sweep(spare_leader=False, timeout=_KILL_TIMEOUT)

    async def get_ready_to_end(self) -> None:
        """Load what the end needs, while there are descriptors for it."""
        if "psutil" not in sys.modules:
            await run_blocking(import_module, "psutil")

    async def has_ended(self) -> bool:
        """Ask the system, from any event loop: nobody here may have noticed yet."""
        try:
            return await run_blocking(_has_ended, self.pid)
        except (OSError, RuntimeError):
            return False  # no descriptor or thread to ask with: it is not known to have

    async def end(self, grace: Callable[[], float]) -> int:
        """End the process and its whole session, and return the exit code.

        Asks first, and waits for ``grace()`` seconds at most, which may become less in
        the meantime; with 0 it does not ask. Bounded, in all, by that and some seconds
        that only a process that the kernel cannot kill would use. Runs to its end although
        the caller is cancelled.
        """
        began = anyio.current_time()
        interruption: BaseException | None = None
        while True:
            try:
                with anyio.CancelScope(shield=True):
                    await self._end(lambda: began + grace())
                break
            except anyio.get_cancelled_exc_class() as exc:
                # No shield stops asyncio's own cancellation, and a program in a hurry
                # cancels every task there is. Begin again: each step can be repeated.
                interruption = exc
        code = self._child.reap()
        if interruption is not None:
            raise interruption
        if code is None:
            report(logging.ERROR, _NOT_KILLED, 1, self.pid)
            return KILLED
        return code

    def close(self) -> None:
        """Close the pipes and whatever else stands for the process."""
        self._child.close()

    async def _end(self, ask_until: Callable[[], float]) -> None:
        await self._ask_to_end(ask_until)
        await self._sweep(spare_leader=False, timeout=_KILL_TIMEOUT)
        # Should the sweep have failed: this needs neither a descriptor nor a thread.
        self._child.kill()
        with anyio.move_on_after(_KILL_TIMEOUT):
            await self.wait_exit()

    async def _ask_to_end(self, until: Callable[[], float]) -> None:
        now = anyio.current_time()
        workers_until = min(now + _WORKERS_GRACE, (now + until()) / 2)
        while now < until():
            self._child.terminate()
            turn = min(now + _REPEAT_SIGTERM, workers_until, until())
            with anyio.CancelScope(deadline=turn):
                await self.wait_exit()
                return
            now = anyio.current_time()
            if now >= workers_until:
                await self._sweep(spare_leader=True, timeout=_WORKERS_GRACE)
                workers_until = math.inf
                now = anyio.current_time()

    async def _sweep(self, *, spare_leader: bool, timeout: float) -> None:
        """Sweep the session; a program that is out of everything gets the best there is."""
        sweep = partial(self._child.sweep, spare_leader=spare_leader, timeout=timeout)
        try:
            left = await run_blocking(sweep)
        except RuntimeError:  # no thread to be had: to block is better than to leak
            left = sweep()
        except OSError as exc:
            report(logging.ERROR, "sweeping session %d failed", self.pid, exc=exc)
            return
        if left:
            report(logging.ERROR, _NOT_KILLED, left, self.pid)


class _Handover:
    """Sees to it that a spawned child has an owner, whichever side goes away first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: Child | None = None
        self._abandoned = False

    def spawn(self, binary: Path, command: Command) -> Child:
        child = spawn(binary, command)
        with self._lock:
            self._child = child
            abandoned = self._abandoned
        if abandoned:
            _discard(child)
        return child

    def abandon(self) -> None:
        with self._lock:
            self._abandoned = True
            child = self._child
        if child is not None:
            # Not here: it blocks. Not a task: that could be cancelled like this one.
            threading.Thread(target=_discard, args=(child,)).start()


def _discard(child: Child) -> None:
    """End a child that nobody owns. Blocks for the milliseconds that a kill takes."""
    child.sweep(spare_leader=False, timeout=_KILL_TIMEOUT)
    child.reap()
    child.close()


def _has_ended(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def _why_not_executed(binary: Path, exc: OSError | RuntimeError) -> str:
    number = exc.errno if isinstance(exc, OSError) else None
    if number == errno.ENOEXEC:
        return (
            f"{binary} is not a program for this platform (Exec format error). Install the "
            "wheel of stepflow-orchestrator for this platform, or name another binary with "
            "binary= or STEPFLOW_SERVER_BINARY."
        )
    if number == errno.ENOENT:
        return (
            f"{binary} cannot be executed: it, or the loader that it was linked for, does "
            "not exist here (a binary for another C library?). Name another binary with "
            "binary= or STEPFLOW_SERVER_BINARY."
        )
    return f"{binary} cannot be executed: {exc}"
