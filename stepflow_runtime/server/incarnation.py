"""One incarnation of the server: a process, its two pumps, its start-up, its health.

Contract: :meth:`Incarnation.live` returns when the process is gone, with everything it
wrote taken in; when it is retired, or cancelled, the process is stopped first. Its tasks are
children of one task group: the process task, a pump for each pipe, the health monitor.
The process task owns the process; the pumps are shielded and outlive it, since the last
lines of a dying server are the ones that matter, until the pipes end or a deadline.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import anyio
from anyio.abc import TaskGroup

from .. import wire
from ..errors import ConnectionLostError, ServerStartError
from ..groups import quiet_task_group
from ..logs.grouping import Grouper
from ..logs.pump import Pump
from ..logs.sinks import LogHub
from ..transport import Transport
from ..transport.direct import DirectTransport
from .confine import warn_of_exposure
from .diagnosis import advice, last_words
from .options import Command, ServerOptions
from .platform import KILLED
from .process import NOT_CONFINED, ServerExit, ServerProcess

__all__ = ["Incarnation"]

# With the session swept the pipes end at once. Only a process that left the session, and
# took a pipe along, makes us wait this long.
_DRAIN_TIMEOUT: Final = 0.5

# And this long for log handlers to come to the end: one may be stuck for ever.
_HANDLERS_TIMEOUT: Final = 1.0

# The server accepts connections before it announces its port; a retry is for the odd one.
_FIRST_HEALTH_RETRY: Final = 0.05

# How many of the last entries a ServerExit keeps.
_LAST_ENTRIES: Final = 100


class Incarnation:
    """One life of the server.

    :param grace: how many seconds the server has to end by itself when it is stopped
    :param on_ready: called with pid and port when the server is READY
    :param on_lost: called when the process has ended unasked, before its logs are in
    """

    def __init__(
        self,
        options: ServerOptions,
        logs: LogHub,
        *,
        grace: Callable[[], float],
        on_ready: Callable[[int, int], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._options = options
        self._logs = logs
        self._logs_before = logs.taken
        self._grace_now = grace
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._service = anyio.CancelScope()
        self._spawned = anyio.Event()
        self._ended = anyio.Event()
        self._gone = anyio.Event()
        self._pumps: tuple[Pump, ...] = ()
        self._pump_scopes: list[anyio.CancelScope] = []
        self._drained_by = math.inf
        self._process: ServerProcess | None = None
        self._code = 0
        self._ready_since: float | None = None
        self._ready_until = 0.0
        self._was_hung = False
        self._health_trouble = ""
        self._health = b""
        self._worker_trouble = ""
        self._exposure_trouble = ""

    async def live(self, binary: Path, command: Command) -> ServerExit:
        """Spawn the server, see it through start-up and life, and tell how it ended.

        :raises ServerStartError: if it did not become READY
        """
        deadline = anyio.current_time() + self._options.startup_timeout
        try:
            async with quiet_task_group() as tasks:
                # Not tasks.start: that waits for ever for a task that is cancelled, by
                # asyncio's own cancellation, before its first step.
                tasks.start_soon(self._own_process, binary, command, tasks)
                await self._spawned.wait()
                process = self._process
                assert process is not None
                port, failure = await self._start_up(process, deadline)
                if port is not None:
                    self._become_ready(process, port)
                    tasks.start_soon(self._watch_health, process, port)
                    await self._gone.wait()
        finally:
            for pump in self._pumps:
                pump.finish()
            if self._process is not None:
                self._process.close()
        # The pumps have come to their end: only now is all in the log that there is.
        exit = self._exit()
        if port is None:
            raise ServerStartError(
                self._explained(failure, exit), exit=exit, recent_logs=exit.recent_logs
            )
        return exit

    def retire(self) -> None:
        """Have the process stopped, soon; :meth:`live` then returns."""
        self._service.cancel()

    def kill_session(self) -> None:
        """Kill the process and its session, from any thread. Blocks until they are dead."""
        if self._process is not None:
            self._process.kill_session()

    def hurry_logs(self) -> None:
        """Have what is in the pipes taken without delay."""
        for pump in self._pumps:
            pump.hurry()

    def is_log_up_to_date(self) -> bool:
        """True if all that was written by now is in the log."""
        return all(pump.is_up_to_date for pump in self._pumps)

    async def has_ended(self) -> bool:
        """True if the process is gone, also if its own task has not noticed yet."""
        return self._process is None or await self._process.has_ended()

    def _become_ready(self, process: ServerProcess, port: int) -> None:
        self._ready_since = anyio.current_time()
        self._on_ready(process.pid, port)

    # -- the process task ----------------------------------------------------------

    async def _own_process(
        self,
        binary: Path,
        command: Command,
        tasks: TaskGroup,
    ) -> None:
        process = await ServerProcess.spawn(binary, command)
        # No await until the try: from there on, its finally owns the process's end.
        try:
            self._process = process
            take = self._logs.take
            self._pumps = (
                Pump(process.stdout, partial(take, "stdout"), hear=process.hear),
                Pump(process.stderr, partial(take, "stderr"), grouper=Grouper()),
            )
            for pump in self._pumps:
                self._start_pump(pump)
                tasks.start_soon(self._own_pump, pump)
            self._spawned.set()
            # In the shadow of the server's own start.
            await process.get_ready_to_end()
            with self._service:
                await process.wait_exit()
                self._ended.set()
                self._note_end()
                self._on_lost()
        finally:
            self._note_end()
            try:
                self._code = await process.end(self._grace)
            finally:
                self._let_pumps_drain()
                self._gone.set()

    def _grace(self) -> float:
        """A server that never was READY owes nothing to anybody: it is killed."""
        return self._grace_now() if self._ready_since is not None else 0.0

    def _note_end(self) -> None:
        self._ready_until = self._ready_until or anyio.current_time()

    # -- the pumps -----------------------------------------------------------------

    def _start_pump(self, pump: Pump) -> None:
        try:
            pump.start()
        except RuntimeError as exc:
            raise ServerStartError(
                f"the Stepflow server's output cannot be read: {exc}"
            ) from exc

    async def _own_pump(self, pump: Pump) -> None:
        """A pump's thread works on until its pipe ends, or nobody is left who matters."""
        interruption: BaseException | None = None
        while True:
            scope = anyio.CancelScope(shield=True, deadline=self._drained_by)
            self._pump_scopes.append(scope)
            try:
                with scope:
                    await pump.wait_read()
                break
            except anyio.get_cancelled_exc_class() as exc:
                # asyncio's own cancellation stops at no shield, and a server that is still
                # ending has something to say.
                interruption = exc
            finally:
                self._pump_scopes.remove(scope)
        pump.finish()
        # If a stranger holds the pipe, what is in there by now is still taken.
        with anyio.CancelScope(shield=True) as patience:
            patience.deadline = anyio.current_time() + _HANDLERS_TIMEOUT
            await pump.wait()
        if interruption is not None:
            raise interruption

    def _let_pumps_drain(self) -> None:
        for pump in self._pumps:
            pump.rush()
        self._drained_by = anyio.current_time() + _DRAIN_TIMEOUT
        for scope in self._pump_scopes:
            scope.deadline = self._drained_by

    # -- start-up ------------------------------------------------------------------

    async def _start_up(
        self, process: ServerProcess, deadline: float
    ) -> tuple[int | None, str]:
        """See the server become healthy; return its port, or None and why it did not.

        Readiness, the end of the process and the deadline race: whichever comes first.
        """
        limit = anyio.CancelScope(deadline=deadline)
        phase, port = "it could announce its port", None
        with limit:
            async with quiet_task_group() as tasks:
                tasks.start_soon(self._cancel_when_ended, limit)
                tasks.start_soon(self._cancel_when_worker_failed, process, limit)
                announced = await process.wait_port()
                self._exposure_trouble = self._look_at_exposure(process, announced)
                if self._exposure_trouble:
                    limit.cancel()
                phase = f"it answered a health request on port {announced}"
                await self._wait_healthy(announced)
                port = announced
        if self._ended.is_set():
            return None, f"ended before {phase}"
        if port is not None:
            if (version := wire.outdated_version(self._health)) is None:
                return port, ""
            trouble = f"it says that its version is {version}; supported are "
            return None, f"was given up: {trouble}{wire.SUPPORTED}"
        if self._exposure_trouble:
            return None, f"was given up: {self._exposure_trouble}"
        if self._worker_trouble:
            return None, f"was given up before {phase}: {self._worker_trouble}"
        trouble = self._health_trouble
        if 0 in await process.ended_workers():
            trouble = "; a worker that it started has ended with exit code 0"
        if port is None and (other := process.foreign_port) is not None:
            trouble += f"; port {other} was announced, and it was told to take another"
        if any(pump.is_held_up for pump in self._pumps):
            trouble += (
                "; its output waits for a log handler, log_config.redact or a file"
            )
        timeout = self._options.startup_timeout
        return (
            None,
            f"was given up before {phase}: {timeout:g} s (startup_timeout){trouble}",
        )

    def _look_at_exposure(self, process: ServerProcess, port: int) -> str:
        """Warn if the port is open to others; return why that is not to be borne."""
        exposure, trouble = self._options.exposure, process.exposed
        if exposure == "any" or trouble is None:
            return ""
        if exposure == "loopback":
            warn_of_exposure(port, trouble)
            return ""
        return NOT_CONFINED.format(trouble)

    async def _cancel_when_ended(self, scope: anyio.CancelScope) -> None:
        await self._ended.wait()
        scope.cancel()

    async def _cancel_when_worker_failed(
        self, process: ServerProcess, scope: anyio.CancelScope
    ) -> None:
        """Spare the user the 30 s that the server waits for a worker that is dead."""
        code = await process.wait_worker_failed()
        self._worker_trouble = f"a worker that it started failed with exit code {code}"
        scope.cancel()

    async def _wait_healthy(self, port: int) -> None:
        transport = DirectTransport(port, max_connections=1)
        try:
            # Nothing tells us when a server that refuses now will not any more.
            while not await self._is_healthy(transport):  # noqa: ASYNC110
                await anyio.sleep(_FIRST_HEALTH_RETRY)
        finally:
            await transport.aclose()

    async def _is_healthy(self, transport: Transport) -> bool:
        try:
            response = await transport.request("GET", wire.HEALTH)
        except ConnectionLostError as exc:
            self._health_trouble = f"; {exc}"
            return False
        self._health_trouble = f"; it answered {response.status}"
        self._health = response.body
        return response.status == 200

    # -- health --------------------------------------------------------------------

    async def _watch_health(self, process: ServerProcess, port: int) -> None:
        """Kill the server when it is alive, but answers no health requests any more."""
        transport = DirectTransport(
            port, max_connections=self._options.max_health_failures
        )
        try:
            while True:
                await anyio.sleep(self._options.health_interval)
                if await self._is_hung(transport):
                    break
        finally:
            await transport.aclose()
        if self._ended.is_set():
            return
        self._was_hung = True
        process.kill()

    async def _is_hung(self, transport: Transport) -> bool:
        """Ask how the server is; True if there is no good answer, however often we ask.

        A request that was not answered in time is repeated, and goes on waiting: a late
        answer shows as much life as a prompt one, and a starved server gives no other.
        """
        healthy = anyio.Event()

        async def ask() -> None:
            if await self._is_healthy(transport):
                healthy.set()

        failures = 0
        async with quiet_task_group() as tasks:
            tasks.start_soon(ask)
            while True:
                with anyio.move_on_after(self._options.health_timeout) as patience:
                    await healthy.wait()
                    return False
                if self._was_late(patience.deadline):
                    continue
                failures += 1
                if failures == self._options.max_health_failures:
                    return True
                tasks.start_soon(ask)

    def _was_late(self, deadline: float) -> bool:
        """True if it was our own event loop that was held up, and not the server.

        A blocked loop (CPU work in async code, a debugger) lets a time-out fire late, and
        what the server answered in the meantime was not even looked at.
        """
        return anyio.current_time() - deadline > self._options.health_timeout / 10

    # -- the end -------------------------------------------------------------------

    def _exit(self) -> ServerExit:
        since = self._ready_since
        return ServerExit(
            code=self._code,
            pid=self._process.pid if self._process else 0,
            uptime=self._ready_until - since if since is not None else 0.0,
            # Unless it came to another end just before we killed it.
            was_hung=self._was_hung and self._code == KILLED,
            recent_logs=tuple(self._logs.since(self._logs_before, _LAST_ENTRIES)),
        )

    def _explained(self, failure: str, exit: ServerExit) -> str:
        ended = f" It {exit}." if self._ended.is_set() else ""
        return (
            f"the Stepflow server {failure}.{ended}\n"
            f"It was started with {self._options.describe_config()}.\n"
            f"{last_words(exit.recent_logs)}{self._options.describe_logs()}"
            f"{advice(exit.recent_logs)}"
        )
