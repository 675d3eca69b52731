"""StepflowRuntime: the handle that a user holds.

Thin: it joins a supervisor, which sees to it that a server is there, and the calls of the
API. What it adds is where the supervisor lives (in a block of the caller's, or in a thread
of its own), and the meaning of a broken connection: never a bare connection error, but what
became of the server.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
import uuid
import warnings
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from datetime import datetime
from functools import partial
from types import TracebackType
from typing import Any, Final, Self, Unpack

import anyio
from anyio import AsyncContextManagerMixin
from anyio.abc import TaskStatus

from .api import ApiExecutor, SubmitMark, next_wait_among_several
from .arguments import check_count
from .crew import Crew, Kind
from .errors import (
    ConnectionLostError,
    RunLostError,
    RuntimeStoppedError,
    StepflowError,
    SubmitInterruptedError,
)
from .executor import FlowError
from .hosting.portal import Portal
from .hosting.signals import Watch, unwatch, unwinding_on_sigterm, watch
from .hosting.tasks import SameTask
from .logs.config import LogConfig, tells_ends_of_runs
from .logs.entry import LogEntry
from .logs.ring import Filter, LogFollower
from .loops import in_event_loop
from .server.diagnosis import Failures
from .server.options import Exposure, ServerOptions, StartOptions, check_seconds
from .server.process import ServerExit
from .server.restart import RestartPolicy
from .server.state import RuntimeState, StateChange
from .server.store import SUBMIT, UnreadableStoreError
from .server.supervisor import Ready, Supervisor
from .threads import run_abandonable
from .transport import NO_HEADERS, Heir, Response, ServerRestartedError, Stream
from .transport.direct import LOOPBACK, DirectTransport

__all__ = ["StepflowRuntime"]

# How long the end waits for runs to be cancelled whose callers have gone, if the store
# would take them up again later. A run that was just sent tells its id after a second.
_LAST_ERRANDS: Final = 2.0

# How many of the newest log entries are searched for what a failed run has to say, and for
# how many seconds. There need not be any.
_LOOK_BACK: Final = 5000
_LOG_PATIENCE: Final = 0.03


# The generation of all that is kept in a durable store, whichever server has it.
_KEPT: Final = 0


class StepflowRuntime(ApiExecutor, AsyncContextManagerMixin):
    """A Stepflow server inside this program.

    Made by :meth:`start`. In an event loop the server starts when the handle is entered::

        async with StepflowRuntime.start() as runtime:
            result = await runtime.run("workflow.yaml", {"x": 1})

    or hosted as a task, ``await task_group.start(runtime.serve)``, or else with the first
    call, in a background thread. Outside of one it is READY when :meth:`start` returns, in
    a background thread too::

        with StepflowRuntime.start() as runtime:
            result = asyncio.run(runtime.run("workflow.yaml", {"x": 1}))

    A handle may be used from any thread and any event loop, of asyncio and trio. When it
    is left or stopped, by whatever way, the server and everything it spawned is gone.
    """

    def __init__(self, options: ServerOptions) -> None:
        self._options = options
        self._crew = Crew()
        self._transports = _Transports(self._crew)
        self._supervisor = Supervisor(
            options, self._crew, on_stopping=self._transports.close
        )
        super().__init__(self._crew, self._supervisor.traffic)
        self._marks = uuid.uuid4().hex
        self._submits = itertools.count()
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._portal: Portal | None = None
        self._watch: Watch | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None

    @classmethod
    def start(
        cls,
        config_path: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        *,
        port: int | None = None,
        exposure: Exposure = "loopback",
        env: Mapping[str, str | None] | None = None,
        inherit_env: bool = True,
        log_config: LogConfig | None = None,
        restart_policy: RestartPolicy = RestartPolicy.NEVER,
        max_restarts: int = 3,
        startup_timeout: float = 30.0,
        shutdown_timeout: float = 5.0,
        health_interval: float = 5.0,
        health_timeout: float = 5.0,
        max_health_failures: int = 3,
        recycle_after_runs: int | None = None,
        recycle_above_memory: int | None = None,
        storage: str | os.PathLike[str] | None = None,
        lease: Sequence[str] | None = None,
        orchestrator_id: str | None = None,
        on_crash: Callable[[int], Any] | None = None,
        handle_signals: bool = True,
        binary: str | os.PathLike[str] | None = None,
        components: Sequence[Callable[..., Any]] | None = None,
    ) -> Self:
        """Start a server, and return its handle.

        In an event loop this only checks the options: the server starts when the handle
        is entered or served, or, in a background thread, with the first awaited call.
        Elsewhere it starts in a background thread, and is READY on return.

        :param config_path: the path of a Stepflow configuration file, or the configuration
            itself as a mapping (it goes through the server's standard input, never through
            a file). ``None``: the built-in components, as ``/builtin/x`` and as ``/x``
        :param port: the port to listen on; ``None``: one that is free
        :param exposure: who may reach that port. The server has no authentication, and
            asks for all network interfaces. ``"loopback"``: who is on this machine, on
            Linux; where that cannot be had, a warning says why, and what is open.
            ``"require-loopback"``: likewise, but then it is not started. ``"any"``: whoever
            reaches this machine
        :param env: environment variables for the server and its workers, over the inherited
            ones; None unsets one of those. A ``STEPFLOW_<FLAG>`` in here has the say about
            that flag of the server, unless an option here sets it
        :param inherit_env: whether the server inherits this process's environment, or only
            what programs need anywhere (``PATH``, ``HOME``, ``LANG``, ``TMPDIR`` ...). Its
            ``STEPFLOW_*`` variables are never inherited
        :param log_config: what the server logs, and where it goes
        :param restart_policy: what to do when the server ends unasked. The first start is
            never repeated: what fails there (a wrong configuration) fails again
        :param max_restarts: how many restarts in a row before the server is given up; the
            count starts anew after 60 s of READY
        :param startup_timeout: seconds until the server must be READY
        :param shutdown_timeout: seconds that the server has to end by itself when the
            runtime is left; after that it is killed
        :param health_interval: seconds between two health requests
        :param health_timeout: seconds that the server has to answer one
        :param max_health_failures: how many may fail in a row before the server counts as
            hung, and is killed
        :param recycle_after_runs: after how many runs (a batch counts its items) the server
            is replaced by a fresh one, on the same port; ``None``: never. Its in-memory
            store never gives memory back. It happens when no call and no run is under way,
            and, with an in-memory store, the result of each submitted run was fetched;
            calls that come meanwhile wait. What ``put_blob`` and ``store_flow`` stored is
            taken along. Whatever the restart policy; it does not count as a restart
        :param recycle_above_memory: likewise, when its resident memory has come above so
            many bytes (and twice what it had at first); looked at every
            ``health_interval``
        :param storage: where runs are kept: the path of an sqlite file, which is made if it
            is not there, for nobody but this user to read; or the URL of a PostgreSQL
            database, if ``binary`` can use one. ``None``: what the configuration says, or
            else in memory. Kept runs survive crashes: a call that waits for one goes on
            waiting while the server is restarted, and another runtime with this storage
            goes on with what it finds unfinished (:attr:`recovered_runs`). One runtime at a
            time can have a file, unless there is a ``lease``
        :param lease: the endpoints of an etcd, ``["http://127.0.0.1:2379"]``, by which
            several runtimes, or other servers, share one ``storage``: when one of them is
            lost, the others go on with its runs
        :param orchestrator_id: as whom the server has its runs. ``None``: as the one that
            has the store's unfinished runs, or else one made of its path; with a
            ``lease``, as one of its own
        :param on_crash: called with the exit code (negative: the signal) when the server
            ended unasked, in a thread. What it returns is awaited if it can be: in the loop
            that the runtime was entered in, or, if that has a background thread, in an
            asyncio loop of its own. What it raises is logged. When the runtime is left, it
            has ``shutdown_timeout`` left
        :param handle_signals: whether SIGTERM unwinds the program (``finally`` blocks run,
            servers are stopped) before it dies of it. Only if the runtime is started in
            the main thread, and the program has no handler of its own
        :param binary: the ``stepflow-server`` to use; ``None``: that of the environment
            variable ``STEPFLOW_SERVER_BINARY``, or else the installed one
        :param components: functions that workflows can call as ``/python/<name>``, beside
            what the configuration has; see :func:`component`. They run in a process of
            their own, which imports their modules
        :raises ServerStartError: if it was to start, and did not become READY
        :raises ValueError: naming the option, if a value cannot work
        :raises TypeError: naming the option, if a value is of the wrong kind
        """
        runtime = cls(
            ServerOptions.of(
                config_path,
                {
                    "port": port,
                    "exposure": exposure,
                    "env": env,
                    "inherit_env": inherit_env,
                    "log_config": log_config,
                    "restart_policy": restart_policy,
                    "max_restarts": max_restarts,
                    "startup_timeout": startup_timeout,
                    "shutdown_timeout": shutdown_timeout,
                    "health_interval": health_interval,
                    "health_timeout": health_timeout,
                    "max_health_failures": max_health_failures,
                    "recycle_after_runs": recycle_after_runs,
                    "recycle_above_memory": recycle_above_memory,
                    "storage": storage,
                    "lease": lease,
                    "orchestrator_id": orchestrator_id,
                    "on_crash": on_crash,
                    "handle_signals": handle_signals,
                    "binary": binary,
                    "components": components,
                },
            )
        )
        if not in_event_loop():
            runtime._start_in_thread()
        return runtime

    @classmethod
    async def start_async(
        cls,
        config_path: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        **options: Unpack[StartOptions],
    ) -> Self:
        """Start a server in a background thread, and return its handle when it is READY.

        Takes what :meth:`start` takes. The handle belongs to no task: it may be stopped, by
        :meth:`stop_async` or :meth:`stop`, in another task, thread or event loop. A
        cancelled start leaves nothing.

        :raises ServerStartError: if the server does not become READY
        """
        runtime = cls(ServerOptions.of(config_path, options))
        try:
            runtime._open_portal()
            await runtime._supervisor.wait_ready()
        except BaseException:
            await runtime.stop_async()
            raise
        return runtime

    def stop(self, timeout: float | None = None) -> None:
        """Stop the server, and wait until it is gone.

        To be called as often as one likes, from any thread, task, signal handler or
        ``atexit``. It blocks for the milliseconds, or seconds, that the server takes; in
        the event loop that the runtime was entered in, and in ``on_crash``, it only asks
        for the stop. A runtime inherited by a forked child is not the child's: nothing
        happens.

        :param timeout: seconds that the server has to end by itself, before it is killed;
            None: its ``shutdown_timeout``
        """
        if not self._may_stop(timeout):
            return
        try:
            if self._crew.has_errands and self._supervisor.keeping.may_outlive:
                self._crew.block_until_settled(self._time_for_errands(timeout))
            if self._portal is not None:
                self._portal.close(timeout)
            else:
                self._supervisor.ask_to_stop(timeout)
                self._supervisor.block_until_over()
        finally:
            self._let_go()

    async def stop_async(self, timeout: float | None = None) -> None:
        """Stop the server, and wait until it is gone, from any event loop.

        Cancellation waits for the end, which is bounded.

        :param timeout: as for :meth:`stop`
        """
        if not self._may_stop(timeout):
            return
        try:
            await self._settle(timeout)
        finally:  # asyncio's own cancellation stops at no shield
            try:
                if self._portal is not None:
                    await self._portal.aclose(timeout)
                else:
                    self._supervisor.ask_to_stop(timeout)
                    await self._supervisor.wait_stopped()
            finally:
                self._let_go()

    def __enter__(self) -> Self:
        if in_event_loop():
            raise RuntimeError(
                "`with` would block this event loop: use `async with`, or `await "
                "StepflowRuntime.start_async(...)` and `await runtime.stop_async()`"
            )
        self._refuse_in_child()
        self._start_in_thread()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def __asynccontextmanager__(self) -> AbstractAsyncContextManager[Self]:
        self._refuse_in_child()
        if self._portal is not None:
            return self._hosted()
        return SameTask(self._entered(), self._supervisor)

    @asynccontextmanager
    async def _entered(self) -> AsyncIterator[Self]:
        self._supervisor.begin()
        with unwinding_on_sigterm() if self._options.handle_signals else nullcontext():
            async with self._supervisor.running():
                try:
                    yield self
                finally:
                    await self._settle()
                    # Before the tasks are cancelled, so that no call begins any more.
                    self._supervisor.stop_serving()

    @asynccontextmanager
    async def _hosted(self) -> AsyncIterator[Self]:
        try:
            await self._supervisor.wait_ready()
            yield self
        finally:
            await self.stop_async()

    async def serve(
        self, *, task_status: TaskStatus[Self] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        """Run the server until the surrounding task group is cancelled.

        For a task group or nursery of your own::

            await nursery.start(runtime.serve)

        returns the handle when the server is READY. Cancellation stops the server. When it
        is stopped by :meth:`stop`, the task ends.

        :raises ServerStartError: if the server does not become READY
        :raises ServerCrashedError: if the server is lost for good; the task group then
            cancels the other tasks
        """
        async with self:
            task_status.started(self)
            await self._supervisor.wait_over()

    async def wait_ready(self) -> None:
        """Wait until the server is READY.

        :raises ServerStartError: if it does not start
        :raises ServerCrashedError: if it is lost for good
        :raises RuntimeStoppedError: if the runtime is not running
        """
        await self._wait_ready()

    def state_changes(self) -> AsyncIterator[StateChange]:
        """Follow the runtime's life: yield how it stands now, and then each change.

        In order, and none is left out, however slow the reader is. Ends after STOPPED or
        FAILED. Any number of readers may follow, in any event loop; to stop reading needs
        no closing.
        """
        return self._supervisor.journal.follow()

    def get_recent_logs(
        self,
        limit: int = 50,
        level: str | None = None,
        run_id: str | None = None,
        step_id: str | None = None,
    ) -> list[LogEntry]:
        """Return the newest log entries of the server and its workers, the newest last.

        How many are kept is ``LogConfig.keep``. They can be read after the runtime was
        left, too, and then all of them are there; before that, what the server has just
        written may take some 10 ms. What a worker prints names no run.

        :param limit: how many at most
        :param level: only those as severe as this level, or more: ``"warn"``, say
        :param run_id: only those that name this run
        :param step_id: only those that name this step
        :raises ValueError: if there is no such level, or the limit is negative
        """
        check_count("limit", limit, least=0)
        self._supervisor.hurry_logs()
        return self._supervisor.logs.newest(limit, Filter(level, run_id, step_id))

    def logs(
        self,
        *,
        level: str | None = None,
        run_id: str | None = None,
        step_id: str | None = None,
        recent: int = 0,
    ) -> LogFollower:
        """Follow the log: ``async for entry in runtime.logs(run_id=run_id): ...``.

        Ends when the runtime has stopped and everything was delivered. Any number may
        follow, in any event loop, and to stop needs no closing. Nobody waits for a slow
        follower: it loses the oldest entries, and ``follower.lost`` counts them.

        :param level: only entries as severe as this level, or more
        :param run_id: only those that name this run
        :param step_id: only those that name this step
        :param recent: begin with so many of the entries that are there already
        :raises ValueError: if there is no such level, or ``recent`` is negative
        """
        check_count("recent", recent, least=0)
        return self._supervisor.logs.follow(Filter(level, run_id, step_id), recent)

    @property
    def state(self) -> RuntimeState:
        """Where the runtime is in its life."""
        return self._supervisor.state

    @property
    def port(self) -> int:
        """The server's port. It stays the same over restarts and recycles.

        :raises RuntimeStoppedError: if the server was never READY
        """
        port = self._supervisor.journal.now.port
        if port is None:
            raise RuntimeStoppedError(
                "the server has no port yet: this runtime is not started"
            )
        return port

    @property
    def url(self) -> str:
        """The server's base URL, without a slash at the end.

        :raises RuntimeStoppedError: if the server was never READY
        """
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def pid(self) -> int | None:
        """The process id of the server, or None while there is none."""
        return self._supervisor.journal.now.pid

    @property
    def restarts(self) -> int:
        """How many times the server was restarted after it had ended unasked."""
        return self._supervisor.journal.now.restarts

    @property
    def recycles(self) -> int:
        """How many times the server was replaced by a fresh one, because it was due.

        That is, as ``recycle_after_runs`` or ``recycle_above_memory`` say; or, with a
        ``lease``, because it had lost that.
        """
        return self._supervisor.journal.now.recycles

    @property
    def recovered_runs(self) -> tuple[str, ...]:
        """The ids of the runs that were unfinished in the store when this runtime took it.

        The oldest first. The server goes on with them by itself; :meth:`get_result` and
        :meth:`get_batch` wait for them. Known when the server is READY; empty for a store
        that is in memory, or not a file of sqlite. Of one that is shared by a ``lease``,
        those of the ``orchestrator_id`` that was given.
        """
        return self._supervisor.store.recovered

    @property
    def last_exit(self) -> ServerExit | None:
        """How the server last ended unasked, or None if it never did."""
        return self._supervisor.journal.now.last_exit

    def __repr__(self) -> str:
        now = self._supervisor.journal.now
        where = f" at {self.url}" if now.port is not None else ""
        return f"<StepflowRuntime {now.state.value}{where}>"

    # -- calls ---------------------------------------------------------------------

    @property
    def _generation(self) -> int | None:
        ready = self._supervisor.ready
        if ready is None:
            return None
        return _KEPT if self._supervisor.keeping.resumes else ready.incarnation

    def _first_wait(self) -> int:
        keeping = self._supervisor.keeping
        may_be_unknown = keeping.resumes and keeping.path is None
        return 0 if may_be_unknown else super()._first_wait()

    def _next_wait(self, waited: float) -> int:
        if self._supervisor.keeping.leases is None:
            return super()._next_wait(waited)
        return next_wait_among_several(waited)

    async def _request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        headers: Mapping[str, str] = NO_HEADERS,
        held: float = 0.0,
        heir: Heir | None = None,
        repeatable: bool = False,
        generation: int | None = None,
    ) -> Response:
        keeping = self._supervisor.keeping
        while True:
            ready = self._supervisor.ready
            if ready is None or os.getpid() != self._owner:
                ready = await self._wait_ready()
                keeping = self._supervisor.keeping
            if generation is not None and not keeping.resumes:
                await self._refuse_if_lost(generation, ready)
            try:
                return await self._transports.of(ready).request(
                    method, path, body, headers=headers, heir=heir
                )
            except ConnectionLostError as exc:
                loss = await self._explain_loss(exc, ready, heir)
                if loss is None:
                    raise
                may_wait = repeatable or (exc.unsent and generation is None)
                if keeping.resumes:
                    may_wait = repeatable or exc.unsent or method == "GET"
                if not isinstance(loss, RunLostError):
                    raise loss from exc
                if not may_wait:
                    if keeping.resumes:
                        raise _SubmitLostError(str(exc), ready.incarnation) from exc
                    raise loss from exc
                # It waits for the next server, as a later request would.

    async def _explain_loss(
        self, exc: ConnectionLostError, ready: Ready, heir: Heir | None
    ) -> StepflowError | None:
        """Why the connection broke; whoever is cancelled meanwhile leaves an heir."""
        try:
            return await self._supervisor.explain_loss(ready.incarnation)
        except anyio.get_cancelled_exc_class():
            if heir is not None and not exc.unsent:
                self._crew.send(partial(heir, None), Kind.ERRAND)
            raise

    async def _open_stream(
        self, path: str, *, generation: int | None = None
    ) -> tuple[Stream, int | None]:
        while True:
            ready = await self._wait_ready()
            resumes = self._supervisor.keeping.resumes
            if generation is not None and not resumes:
                await self._refuse_if_lost(generation, ready)
            try:
                stream = await self._transports.of(ready).stream(path)
            except ConnectionLostError as exc:
                explained = await self._explained(exc, ready)
                if not isinstance(explained, ServerRestartedError):
                    raise explained from exc
            else:
                explain = partial(self._explained, ready=ready)
                return _SupervisedStream(stream, explain), ready.incarnation

    def _mark_submit(self) -> SubmitMark | None:
        keeping = self._supervisor.keeping
        if not keeping.resumes or keeping.path is None:
            return None
        value = f"{self._marks}-{next(self._submits)}"
        return SubmitMark(SUBMIT, value, time.time(), time.monotonic())

    async def _find_submitted(
        self, mark: SubmitMark | None, loss: ConnectionLostError | None
    ) -> str | None:
        if mark is None:
            return await super()._find_submitted(mark, loss)
        await self._wait_ready()
        # Of a life that is over: what it has not begun by now, it never will.
        life = loss.life if isinstance(loss, _SubmitLostError) else None
        store = self._supervisor.store
        try:
            # Whoever is cancelled meanwhile goes at once, and leaves an heir.
            found = await run_abandonable(store.find, mark.value, mark.began, life)
        except UnreadableStoreError as exc:
            raise SubmitInterruptedError(
                f"the Stepflow server died while a run was being submitted ({loss}), and "
                f"its store does not tell whether it has begun: {exc}"
            ) from loss
        if found is None and life is None:
            return await super()._find_submitted(mark, loss)
        return found

    @property
    def _is_gone(self) -> bool:
        return self.state.is_final

    def _gone(self) -> StepflowError:
        return RuntimeStoppedError("this runtime is not entered yet, or stopped")

    async def _refuse_if_lost(self, generation: int, ready: Ready) -> None:
        """What one life of the server had, died with it."""
        if generation != ready.incarnation:
            loss = await self._supervisor.explain_loss(generation)
            assert loss is not None
            raise loss

    async def _explained(self, exc: ConnectionLostError, ready: Ready) -> StepflowError:
        """What to raise for a connection that broke: what became of the server."""
        loss = await self._supervisor.explain_loss(ready.incarnation)
        if isinstance(loss, RunLostError) and self._supervisor.keeping.resumes:
            return ServerRestartedError(str(exc))
        return loss or exc

    async def _logs_of_failures(
        self, run_id: str, since: datetime | None, errors: Sequence[FlowError]
    ) -> list[tuple[LogEntry, ...]]:
        """They come by another way than the answer, and may be a moment behind it."""
        hub = self._supervisor.logs
        if any(error.code == "COMPONENT_FAILED" for error in errors):
            # Workers print before they report. One of several tracebacks with the same
            # words would look as if it were the only one.
            await self._supervisor.catch_up_with_logs()
        logs: list[tuple[LogEntry, ...]] = []
        with anyio.move_on_after(_LOG_PATIENCE):
            while True:
                self._supervisor.hurry_logs()
                seen = hub.taken
                failures = Failures(hub.about(run_id, _LOOK_BACK), run_id, since)
                logs = [failures.of(error) for error in errors]
                # A worker's standard error comes by yet another way.
                may_miss = any(
                    error.code == "COMPONENT_FAILED"
                    and not any(each.stream == "stderr" for each in found)
                    for error, found in zip(errors, logs, strict=True)
                )
                is_told = tells_ends_of_runs(self._options.log_config)
                if not may_miss and (failures.is_all or not is_told):
                    break
                await hub.wait_news(seen)
        return logs

    async def _logs_of_runs(
        self, run_ids: Sequence[str], limit: int
    ) -> Sequence[LogEntry]:
        await self._supervisor.catch_up_with_logs()
        return self._supervisor.logs.of_runs(run_ids, limit)

    async def _settle(self, timeout: float | None = None) -> None:
        """Let runs be cancelled whose callers have gone, where they would be taken up again.

        Bounded, and shielded: it is a part of the end.
        """
        if not self._supervisor.keeping.may_outlive:
            return
        with anyio.CancelScope(shield=True):
            # Callers who are cancelled together with us have their say in the next turn of
            # the loop, under trio before or after us.
            await anyio.lowlevel.checkpoint()
            await anyio.lowlevel.checkpoint()
            if self._crew.has_errands:
                await self._crew.settle(self._time_for_errands(timeout))

    def _time_for_errands(self, timeout: float | None) -> float:
        grace = self._options.shutdown_timeout if timeout is None else timeout
        return min(_LAST_ERRANDS, grace)

    # -- where the supervisor lives ------------------------------------------------

    async def _wait_ready(self) -> Ready:
        self._refuse_in_child()
        if (ready := self._supervisor.ready) is not None:
            return ready
        if self.state is RuntimeState.NEW:
            self._open_portal()
        return await self._supervisor.wait_ready()

    def _start_in_thread(self) -> None:
        try:
            self._open_portal()
            self._supervisor.block_until_ready()
        except BaseException:
            self.stop()
            raise

    def _open_portal(self) -> None:
        with self._lock:
            if self._portal is not None or self.state is not RuntimeState.NEW:
                return
            # Before it is opened: a KeyboardInterrupt in there must find all to undo it.
            self._portal = Portal(self._supervisor)
            if self._options.handle_signals:
                self._watch = watch()
            self._finalizer = weakref.finalize(
                self, _stop_forsaken, self._owner, self._supervisor, self._watch
            )
            # At the end of the program the portal sees to it, for all at a time.
            self._finalizer.atexit = False
            self._portal.open()

    def _may_stop(self, timeout: float | None) -> bool:
        """False if it is not this process's to stop."""
        if timeout is not None:
            check_seconds("timeout", timeout)
        if os.getpid() != self._owner:
            return False
        if self._watch is not None:
            self._watch.is_leaving = True
        return True

    def _let_go(self) -> None:
        """What has to stay until the server is gone: SIGTERM may come during a stop."""
        if self._finalizer is not None:
            self._finalizer.detach()
        if self._watch is not None:
            unwatch(self._watch)

    def _refuse_in_child(self) -> None:
        if os.getpid() != self._owner:
            raise RuntimeStoppedError(
                f"this runtime belongs to the process {self._owner}, which this one was "
                "forked from: start one of its own here, or start processes by "
                'multiprocessing\'s method "spawn"'
            )


def _stop_forsaken(owner: int, supervisor: Supervisor, watch: Watch | None) -> None:
    """Stop the server of a handle that nobody holds any more."""
    if os.getpid() != owner:
        return
    if watch is not None:
        unwatch(watch)
    now = supervisor.journal.now
    if now.state.is_final:
        return
    supervisor.ask_to_stop()
    warnings.warn(
        f"a StepflowRuntime (server pid {now.pid}, port {now.port}) was never stopped",
        ResourceWarning,
        stacklevel=2,
    )


class _SubmitLostError(ConnectionLostError):
    """The server died before it answered a submit; the runs that it had live on.

    :ivar life: which life of the server it was
    """

    def __init__(self, message: str, life: int) -> None:
        super().__init__(message)
        self.life = life


class _SupervisedStream:
    """A stream whose end, if it is none, is explained by what became of the server."""

    def __init__(
        self,
        stream: Stream,
        explain: Callable[[ConnectionLostError], Awaitable[StepflowError]],
    ) -> None:
        self._stream = stream
        self._explain = explain
        self.status = stream.status
        self.content_type = stream.content_type
        self.close = stream.close

    async def receive(self) -> bytes:
        try:
            return await self._stream.receive()
        except ConnectionLostError as exc:
            raise await self._explain(exc) from exc


class _Transports:
    """The way to the server's present incarnation.

    Apart from the runtime, since the supervisor must not hold that: a handle that nobody
    holds is noticed so. Without a lock, since a signal handler that stops the runtime may
    have interrupted who holds it.
    """

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._by_incarnation: dict[int, DirectTransport] = {}
        self._is_closed = False

    def of(self, ready: Ready) -> DirectTransport:
        known = self._by_incarnation.get(ready.incarnation)
        if known is None:
            made = DirectTransport(
                ready.port, crew=self._crew, generation=ready.incarnation
            )
            known = self._by_incarnation.setdefault(ready.incarnation, made)
            self._close(until=ready.incarnation)
            if self._is_closed:  # in the meantime
                known.close()
        return known

    def close(self) -> None:
        self._is_closed = True
        self._close()

    def _close(self, until: float = math.inf) -> None:
        for incarnation in sorted(self._by_incarnation):
            if incarnation < until:
                known = self._by_incarnation.pop(incarnation, None)
                if known is not None:
                    known.close()
