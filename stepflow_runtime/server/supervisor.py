"""The supervisor: it keeps a server READY for as long as somebody holds it.

Contract: inside :meth:`Supervisor.running` a server was READY; after it there is none,
however it was left. In between, a server that ends unasked is restarted or given up, as
``restart.decide`` says. The restart loop is a task; each turn of it is one
:class:`~.incarnation.Incarnation`. Stopping is nothing but cancelling that task: what has
to be done in order is done by those who own it.
"""

from __future__ import annotations

import enum
import inspect
import logging
import math
import os
import random
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from ..errors import (
    RunLostError,
    RuntimeStoppedError,
    ServerCrashedError,
    ServerError,
    ServerStartError,
)
from ..logs.own import report
from ..logs.sinks import LogHub
from ..threads import run_abandonable, run_blocking
from . import restart
from .binary import find_binary
from .diagnosis import last_words
from .groups import quiet_task_group
from .incarnation import Incarnation
from .options import ServerOptions
from .process import ServerExit

__all__ = ["Ready", "RuntimeState", "Supervisor"]

# A dying server closes its connections before its exit can be noticed; a connection that
# breaks while the server lives on is the rare case, and may wait.
_LOSS_NOTICE: Final = 1.0

# What shells say for a command that could not be executed.
_NOT_EXECUTED: Final = 127


class RuntimeState(enum.Enum):
    """Where a runtime is in its life."""

    NEW = "new"
    """Made by ``start()``, not entered yet."""
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    """The server ended unasked, and a new one is on its way."""
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"
    """The server did not start, or ended unasked and was given up."""


@dataclass(frozen=True)
class Ready:
    """A server that is there to be used.

    :ivar port: its port
    :ivar incarnation: which life of the server this is, counted from 1
    """

    port: int
    incarnation: int


class Supervisor:
    def __init__(self, options: ServerOptions) -> None:
        self.logs = LogHub(options.log_config)
        self.state = RuntimeState.NEW
        self.port: int | None = None
        self.pid: int | None = None
        self.restarts = 0
        self.last_exit: ServerExit | None = None
        self._options = options
        self._orchestrator_id = f"stepflow-runtime-{uuid.uuid4()}"
        self._incarnation = 0
        self._ready: Ready | None = None
        self._failure: Callable[[], ServerError] | None = None
        self._changed = anyio.Event()
        self._launch_trouble = ""
        self._telling: list[anyio.CancelScope] = []
        self._tell_until = math.inf

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start the server; yield when it is READY; stop it.

        The body's exception leaves as itself. Cancellation, of the start too, leaves
        nothing behind.

        :raises ServerStartError: if the server does not become READY
        :raises RuntimeStoppedError: if this supervisor was used before
        """
        self._begin()
        try:
            async with quiet_task_group() as tasks:
                tasks.start_soon(self._supervise, tasks)
                await self.wait_ready()
                yield
        finally:
            self.stop_serving()
            self._finish()

    def stop_serving(self) -> None:
        """Let no call begin any more: the first thing to do when the block ends."""
        self._limit_telling()
        if self.state not in (RuntimeState.STOPPED, RuntimeState.FAILED):
            self._ready = None
            self._enter(RuntimeState.STOPPING)

    async def wait_ready(self) -> Ready:
        """Wait until the server is READY, and tell where.

        :raises ServerError: if it will not be any more: ``ServerStartError``,
            ``ServerCrashedError`` or ``RuntimeStoppedError``
        """
        while self._ready is None:
            if (refusal := self._refusal()) is not None:
                # The cancellation that stopped the runtime may be the caller's, too: then
                # that is what it should hear of.
                await anyio.lowlevel.checkpoint()
                raise refusal
            await self._changed.wait()
        return self._ready

    async def wait_failed(self) -> None:
        """Wait until the server is lost for good, and raise why.

        :raises ServerCrashedError: then
        """
        while self._failure is None:
            await self._changed.wait()
        raise self._failure()

    async def explain_loss(self, incarnation: int) -> ServerError | None:
        """Tell why a connection to a server broke; None if that server is well.

        Waits until the server's end is examined: milliseconds, and bounded.
        """
        with anyio.move_on_after(_LOSS_NOTICE):
            while self._serves(incarnation):
                await self._changed.wait()
        if self._serves(incarnation):
            return None
        while self.state is RuntimeState.READY and self._ready is None:
            await self._changed.wait()
        await anyio.lowlevel.checkpoint()  # as in wait_ready
        if (refusal := self._refusal()) is not None:
            return refusal
        assert self.last_exit is not None
        return RunLostError(
            f"the Stepflow server {self.last_exit} while this call was under way; its "
            "in-memory store died with it, and the run too. The server is being restarted.",
            exit=self.last_exit,
        )

    # -- the restart loop ----------------------------------------------------------

    async def _supervise(self, tasks: TaskGroup) -> None:
        try:
            binary = await self._prepare()
            exit = await self._incarnate(binary)
        except ServerStartError as exc:
            self._fail(partial(_again, exc))
            return
        series = 0
        while True:
            self._take_note_of(exit, tasks)
            if exit.uptime >= restart.FRESH_AFTER:
                series = 0
            decision = restart.decide(
                self._options.restart_policy,
                exit_code=exit.code,
                restarts=series,
                max_restarts=self._options.max_restarts,
                chance=random.random(),
            )
            if isinstance(decision, restart.GiveUp):
                self._give_up(exit, decision.reason)
                return
            self._enter(RuntimeState.RESTARTING)
            await anyio.sleep(decision.delay)
            series += 1
            self.restarts += 1
            exit = await self._reincarnate(binary)

    async def _prepare(self) -> Path:
        """Ask the file system what has to be asked there; return the binary's path."""

        def prepare() -> tuple[ServerOptions, Path]:
            options = self._options.anchored()
            return options, find_binary(options.binary, os.environ)

        try:
            self._options, binary = await run_blocking(prepare)
        except OSError as exc:
            raise ServerStartError(
                f"the working directory cannot be used: {exc}"
            ) from exc
        return binary

    async def _incarnate(self, binary: Path) -> ServerExit:
        self._incarnation += 1
        self._launch_trouble = ""
        incarnation = Incarnation(
            self._options, self.logs, on_ready=self._serve, on_lost=self._withdraw
        )
        command = self._options.command(
            os.environ,
            # After a restart the same port and id: clients and leases rely on them.
            port=self.port or self._options.port or 0,
            orchestrator_id=self._orchestrator_id,
        )
        return await incarnation.live(binary, command)

    async def _reincarnate(self, binary: Path) -> ServerExit:
        """A failed launch counts as one more crash."""
        try:
            return await self._incarnate(binary)
        except ServerStartError as exc:
            self._launch_trouble = str(exc)
            return exc.exit or ServerExit(code=_NOT_EXECUTED, pid=0)

    def _take_note_of(self, exit: ServerExit, tasks: TaskGroup) -> None:
        self.last_exit = exit
        self.pid = None
        if self._launch_trouble:
            report(
                logging.WARNING,
                "the Stepflow server could not be restarted: %s",
                self._launch_trouble,
            )
        else:
            report(logging.WARNING, "the Stepflow server (pid %d) %s", exit.pid, exit)
        if self._options.on_crash is not None:
            tasks.start_soon(self._tell_of_crash, self._options.on_crash, exit.code)

    async def _tell_of_crash(self, on_crash: Callable[[int], Any], code: int) -> None:
        """Call the user's function where it can neither block nor break the supervision.

        Shielded: the crash that it is told of is often what makes the block end. Once
        that has ended, it gets ``shutdown_timeout`` to come to an end itself.
        """
        scope = anyio.CancelScope(shield=True, deadline=self._tell_until)
        self._telling.append(scope)
        try:
            with scope:
                told = await run_abandonable(on_crash, code)
                if inspect.isawaitable(told):
                    await told
        except Exception as exc:  # noqa: BLE001 - the user's function
            report(logging.ERROR, "on_crash raised", exc=exc)
        finally:
            self._telling.remove(scope)

    # -- state ---------------------------------------------------------------------

    def _begin(self) -> None:
        if self.state is not RuntimeState.NEW:
            raise RuntimeStoppedError(
                "this runtime was used before; StepflowRuntime.start() makes a new one"
            )
        self._enter(RuntimeState.STARTING)

    def _finish(self) -> None:
        self.pid = None
        if self.state is not RuntimeState.FAILED:
            self._enter(RuntimeState.STOPPED)

    def _serve(self, pid: int, port: int) -> None:
        self.pid, self.port = pid, port
        self._ready = Ready(port, self._incarnation)
        self._enter(RuntimeState.READY)

    def _withdraw(self) -> None:
        self._ready = None
        self._announce_change()

    def _limit_telling(self) -> None:
        self._tell_until = anyio.current_time() + self._options.shutdown_timeout
        for scope in self._telling:
            scope.deadline = self._tell_until

    def _give_up(self, exit: ServerExit, reason: str) -> None:
        words = self._launch_trouble or last_words(exit.recent_logs)
        message = (
            f"the Stepflow server {exit}, and is not restarted: {reason}.\n{words}"
        )
        self._fail(partial(ServerCrashedError, message, exit=exit))

    def _fail(self, failure: Callable[[], ServerError]) -> None:
        self._ready = None
        self._failure = failure
        self._enter(RuntimeState.FAILED)

    def _enter(self, state: RuntimeState) -> None:
        self.state = state
        self._announce_change()

    def _announce_change(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    def _serves(self, incarnation: int) -> bool:
        return self._ready is not None and self._ready.incarnation == incarnation

    def _refusal(self) -> ServerError | None:
        """Why there will be no READY any more; None if there may be."""
        if self._failure is not None:
            return self._failure()
        if self.state is RuntimeState.NEW:
            return RuntimeStoppedError(
                "this runtime is not started: enter it with `async with`, or host it with "
                "`await task_group.start(runtime.serve)`"
            )
        if self.state in (RuntimeState.STOPPING, RuntimeState.STOPPED):
            return RuntimeStoppedError("this runtime is stopped")
        return None


def _again(error: ServerStartError) -> ServerStartError:
    """A copy to raise: one object raised in many tasks would collect their tracebacks."""
    copy = type(error)(str(error), exit=error.exit, recent_logs=error.recent_logs)
    copy.__cause__ = error.__cause__
    return copy
