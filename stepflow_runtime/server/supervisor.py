"""The supervisor: it keeps a server READY for as long as somebody holds it.

Contract: inside :meth:`Supervisor.running` a server was READY; after it there is none,
however it was left. In between, a server that ends unasked is restarted or given up, as
``restart.decide`` says. The restart loop is a task; each turn of it is one
:class:`~.incarnation.Incarnation`. Stopping is nothing but cancelling that task: what has
to be done in order is done by those who own it.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
import random
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.lowlevel
import msgspec
from anyio.abc import TaskGroup

from .. import roster
from ..crew import Crew
from ..errors import (
    RunLostError,
    RuntimeStoppedError,
    ServerCrashedError,
    ServerError,
    ServerStartError,
)
from ..groups import quiet_task_group
from ..logs.own import report
from ..logs.sinks import LogHub
from ..loops import current_loop, has_ended
from ..private import create_private
from ..threads import run_abandonable, run_blocking
from ..traffic import FREE, FreeTraffic, Traffic
from . import keeper, restart
from .binary import find_binary
from .diagnosis import last_words
from .guard import MARK
from .incarnation import Incarnation
from .life import Life
from .options import Command, ServerOptions
from .port import LOOPBACK, HeldPort
from .process import LONGEST_KILL, ServerExit
from .state import MAY_FOLLOW, Journal, RuntimeState
from .storage import Keeping
from .store import Store

if TYPE_CHECKING:
    from .recycling import Recycler

__all__ = ["Ready", "Supervisor"]

# A dying server closes its connections before its exit can be noticed; a connection that
# breaks while the server lives on is the rare case, and may wait.
_LOSS_NOTICE: Final = 1.0

# What shells say for a command that could not be executed.
_NOT_EXECUTED: Final = 127


# A program whose threads are all busy lets a pump work now and then only.
_CATCH_UP_TIMEOUT: Final = 0.5

# The file of the log may be on a file server that does not answer any more.
_CLOSE_TIMEOUT: Final = 1.0


class Ready(msgspec.Struct, frozen=True):
    """A server that is there to be used.

    :ivar port: its port
    :ivar incarnation: which life of the server this is, counted from 1
    """

    port: int
    incarnation: int


class Supervisor:
    """Keeps one server.

    Its tasks live in one event loop. :meth:`ask_to_stop`, the properties and
    everything that waits may be used from any thread and any loop.

    :param crew: works as a task of the supervisor's
    :param on_stopping: called when no call may begin any more, before the server is ended
    :ivar traffic: to be told of the calls, if the server is to be recycled
    :ivar keeping: what becomes of runs when a server ends; known when it is READY
    :ivar store: where they are then
    """

    def __init__(
        self,
        options: ServerOptions,
        crew: Crew,
        *,
        on_stopping: Callable[[], object],
    ) -> None:
        self.logs = LogHub(options.log_config)
        self.journal = Journal()
        self._options = options
        self._crew = crew
        self._on_stopping = on_stopping
        # What only a file tells is known when the server is READY.
        self.keeping = options.keeping() if options.is_whole else Keeping()
        self.store = Store()
        self._orchestrator_id = ""
        self._directory: str | None = None
        self._recycler: Recycler | None = None
        self.traffic: FreeTraffic = FREE
        if (limits := options.limits()) is not None:
            from .recycling import Recycler

            self.traffic = traffic = Traffic()
            self._recycler = Recycler(
                limits, self, traffic, crew, options.health_interval
            )
        self._incarnations = 0
        self._retired = -1  # the last life that was asked to end; none yet
        self._last_end: ServerExit | None = None
        self._incarnation: Incarnation | None = None
        self._ready: Ready | None = None
        self._failure: Callable[[], ServerError] | None = None
        self._stop_within: float | None = None
        self._guard = _Guard()
        self._port = HeldPort()
        self._loop: Any = None
        self._has_loop_of_its_own = False
        self._calling_threads: set[int] = set()
        self._launch_trouble = ""
        self._telling: list[anyio.CancelScope] = []
        self._tell_until = math.inf
        roster.tell(self)

    @property
    def ready(self) -> Ready | None:
        """The server, if it is there to be used."""
        return self._ready if self._stop_within is None else None

    @property
    def state(self) -> RuntimeState:
        return self.journal.now.state

    @property
    def mark(self) -> str:
        """What its processes carry in the variable ``MARK``; empty if there never was one."""
        return self._guard.mark

    def begin(self) -> None:
        """Be STARTING, for whoever waits from now on.

        :raises RuntimeStoppedError: if this supervisor was used before, or asked to stop
        """
        if not self.journal.enter(RuntimeState.STARTING):
            raise RuntimeStoppedError(
                f"this runtime was used before (it is {self.state.value}); "
                "StepflowRuntime.start() makes a new one"
            )

    @asynccontextmanager
    async def running(self, *, in_loop_of_its_own: bool = False) -> AsyncIterator[None]:
        """Start the server; yield when it is READY; stop it.

        The body's exception leaves as itself. Cancellation, of the start too, leaves
        nothing behind.

        To be entered after :meth:`begin`.

        :raises ServerStartError: if the server does not become READY
        :raises RuntimeStoppedError: if it was asked to stop
        """
        self._loop = current_loop()
        self._has_loop_of_its_own = in_loop_of_its_own
        # What cancels the block does not end the server under it: first those who are in
        # there have their runs cancelled, which it would go on with in its next life.
        life = anyio.CancelScope(shield=self.keeping.may_outlive)
        try:
            async with quiet_task_group() as tasks:
                tasks.start_soon(self._live, tasks, life)
                tasks.start_soon(self._crew.work)
                try:
                    await self.wait_ready()
                    yield
                finally:
                    self._crew.dismiss()
                    life.cancel()
        finally:
            self.stop_serving()
            self._finish()
            self._loop = None

    def ask_to_stop(self, within: float | None = None) -> None:
        """Have the server stopped, soon; from any thread, and even a signal handler.

        :param within: seconds that the server has to end by itself; None: as the options
            say. Of several, the most impatient has the say.
        """
        seconds = self._options.shutdown_timeout if within is None else within
        before = self._stop_within
        self._stop_within = seconds if before is None else min(before, seconds)
        if self.journal.enter(RuntimeState.STOPPED, only_from=RuntimeState.NEW):
            self.logs.end()
        self.journal.announce()

    def is_calling(self) -> bool:
        """True in the supervisor's own event loop, and in a callback that it waits for."""
        loop = current_loop()
        return (loop is not None and loop is self._loop) or (
            threading.get_ident() in self._calling_threads
        )

    def give_up_start(self, error: ServerStartError) -> None:
        """Have everybody hear that it could not even be tried; or that it broke down."""
        if not self.state.is_final:
            self._fail(partial(_again, error))

    def block_until_over(self) -> None:
        """Wait until a stop that was asked for has come to its end. Blocks, but not for ever.

        Where our own thread is held up by a callback of the program's (a log handler, say),
        perhaps because that waits for the very thread that waits here, the server is killed
        from here.
        """
        if self.is_calling():
            return  # it is us who are waited for
        if (
            self._loop is not None
            and has_ended(self._loop)
            or not self.journal.block_until(self._is_over, self._longest_stop())
        ):
            self._kill_from_outside()

    async def wait_stopped(self) -> None:
        """The same in an event loop. Cancellation waits, asyncio's own too."""
        deadline = anyio.current_time() + self._longest_stop()
        interruption: BaseException | None = None
        if self._loop is not None and has_ended(self._loop):
            deadline = -math.inf
        while not self._is_over():
            try:
                with anyio.CancelScope(shield=True, deadline=deadline) as patience:
                    await self.journal.wait_until(self._is_over)
            except anyio.get_cancelled_exc_class() as exc:
                interruption = exc
                continue
            if patience.cancelled_caught:
                with anyio.CancelScope(shield=True):
                    await run_blocking(self._kill_from_outside)
                break
        if interruption is not None:
            raise interruption

    def _is_over(self) -> bool:
        return self.state.is_final

    def _kill_from_outside(self) -> None:
        report(logging.ERROR, "a stop was held up; the server is killed")
        if self._incarnation is not None:
            self._incarnation.kill_session()
        if self._loop is not None and has_ended(self._loop):
            # It was closed around the runtime: nobody is left to say so.
            self.store.give_back()
            self._finish()

    def _longest_stop(self) -> float:
        """Seconds after which a stop that was asked for must have come to its end."""
        return self._grace() + LONGEST_KILL

    def stop_serving(self) -> None:
        """Let no call begin any more: the first thing to do when the block ends."""
        self._limit_telling()
        self._withdraw_for_good()
        self._on_stopping()
        self.traffic.open()

    async def wait_ready(self) -> Ready:
        """Wait until the server is READY, and tell where.

        :raises ServerError: if it will not be any more: ``ServerStartError``,
            ``ServerCrashedError`` or ``RuntimeStoppedError``
        """
        while (ready := self.ready) is None:
            if (refusal := self._refusal()) is not None:
                # The cancellation that stopped the runtime may be the caller's, too: then
                # that is what it should hear of.
                await anyio.lowlevel.checkpoint()
                raise refusal
            await self.journal.wait_until(self._is_decided)
        return ready

    def block_until_ready(self) -> None:
        """The same for a thread without an event loop: blocks it."""
        self.journal.block_until(self._is_decided)
        if self.ready is None and (refusal := self._refusal()) is not None:
            raise refusal

    async def wait_over(self) -> None:
        """Wait until the server is gone, and will not come back.

        :raises ServerCrashedError: if it was lost for good
        """
        await self.journal.wait_until(self._is_over)
        if self._failure is not None:
            raise self._failure()

    async def explain_loss(self, incarnation: int) -> ServerError | None:
        """Tell why a connection to a server broke; None if that server is well.

        Waits until the server's end is examined: milliseconds, unless the program itself
        holds the supervisor up.
        """
        while self._serves(incarnation):
            with anyio.move_on_after(_LOSS_NOTICE) as patience:
                await self.journal.wait_until(lambda: not self._serves(incarnation))
            server = self._incarnation
            if patience.cancelled_caught and server and not await server.has_ended():
                return None
        await self.journal.wait_until(
            lambda: self._is_decided() or self.state is not RuntimeState.READY
        )
        if incarnation <= self._retired:
            await self.journal.wait_until(self._is_decided)
        await anyio.lowlevel.checkpoint()  # as in wait_ready
        if (refusal := self._refusal()) is not None:
            return refusal
        last_end = self._last_end
        assert last_end is not None
        return RunLostError(
            f"the Stepflow server {last_end} while this call was under way; its "
            "in-memory store died with it, and the run too. The server is being restarted.",
            exit=last_end,
        )

    # -- what those need who have it replaced --------------------------------------

    async def wait_life(self, after: int) -> Life:
        """Wait until a life later than that incarnation is READY."""
        while (ready := self.ready) is None or ready.incarnation <= after:
            await self.journal.wait_until(lambda: self._is_later(after))
        pid = self.journal.now.pid
        assert pid is not None
        return Life(ready.incarnation, pid, ready.port)

    async def wait_life_over(self, incarnation: int) -> None:
        """Wait until that life is not READY any more."""
        await self.journal.wait_until(lambda: not self._serves(incarnation))

    def replace(self, incarnation: int) -> bool:
        """Have it ended, and another one started; False if it is not READY any more."""
        server = self._incarnation
        if self._stop_within is not None or not self._serves(incarnation) or not server:
            return False
        self._ready = None
        self._retired = incarnation
        self.journal.enter(
            RuntimeState.RESTARTING, pid=None, recycles=self.journal.now.recycles + 1
        )
        server.retire()
        return True

    def _is_later(self, incarnation: int) -> bool:
        return self.ready is not None and self.ready.incarnation > incarnation

    # -- the restart loop ----------------------------------------------------------

    async def _live(self, tasks: TaskGroup, life: anyio.CancelScope) -> None:
        """Keep the server, until it is lost for good or a stop is asked for."""
        try:
            with life:
                async with quiet_task_group() as care:
                    care.start_soon(self._heed_stop, life)
                    if self._recycler is not None:
                        care.start_soon(self._recycler.work)
                    await self._supervise(tasks, care)
        finally:
            self.stop_serving()
            try:
                await self._clear_up()
            finally:
                self._finish()

    async def _clear_up(self) -> None:
        with anyio.CancelScope(shield=True):
            try:
                with anyio.move_on_after(_CLOSE_TIMEOUT):
                    await run_abandonable(self.logs.close)
            except RuntimeError:  # no thread to be had: it takes a millisecond
                self.logs.close()
            finally:  # asyncio's own cancellation stops at no shield
                await self._let_go()

    async def _let_go(self) -> None:
        """Of what is to be had until the server is gone."""

        def let_go() -> None:
            self.store.give_back()
            self._port.release()
            self._guard.dismiss()

        try:
            await run_blocking(let_go)
        except RuntimeError:
            let_go()

    async def _heed_stop(self, life: anyio.CancelScope) -> None:
        await self.journal.wait_until(lambda: self._stop_within is not None)
        self.stop_serving()
        life.cancel()

    def _grace(self) -> float:
        if self._stop_within is not None:
            return self._stop_within
        return self._options.shutdown_timeout

    async def _supervise(self, tasks: TaskGroup, care: TaskGroup) -> None:
        try:
            binary = await self._prepare()
            if (leases := self.keeping.leases) is not None and self.keeping.claims:
                from .lease import LeaseWatch  # most programs do without

                watch = LeaseWatch(leases, self._orchestrator_id, self)
                care.start_soon(watch.work)
            exit = await self._incarnate(binary)
        except ServerStartError as exc:
            await self._part_with_store()
            self._fail(partial(_again, exc))
            return
        series = 0
        uptime = 0.0  # since the last crash
        while True:
            self._last_end = exit
            uptime += exit.uptime
            if self._retired == self._incarnations:
                exit = await self._renew(binary)
                continue
            self._take_note_of(exit, tasks)
            if uptime >= restart.FRESH_AFTER:
                series = 0
            uptime = 0.0
            decision = restart.decide(
                self._options.restart_policy,
                exit_code=exit.code,
                restarts=series,
                max_restarts=self._options.max_restarts,
                chance=random.random(),
            )
            if isinstance(decision, restart.GiveUp):
                await self._part_with_store()
                self._give_up(exit, decision.reason)
                return
            self.journal.enter(
                RuntimeState.RESTARTING,
                pid=None,
                restarts=self.journal.now.restarts + 1,
                last_exit=exit,
            )
            await anyio.sleep(decision.delay)
            series += 1
            exit = await self._reincarnate(binary)

    async def _prepare(self) -> Path:
        """Ask the file system what has to be asked there; return the binary's path."""

        def prepare() -> tuple[ServerOptions, Path]:
            options = self._options.anchored()
            binary = find_binary(options.binary, os.environ)
            self._open_logs()
            if (port := options.wanted_port()) is not None:
                self._take_port(port)
            self._guard.engage()
            self.keeping = keeping = options.keeping()
            self.logs.hide(keeping.secrets | options.secrets())
            if keeping.is_relative:
                # A server that is restarted must find what its predecessor has kept.
                self._directory = os.getcwd()
            self._orchestrator_id = self._identity(options, keeping, binary)
            if isinstance(self.traffic, Traffic):
                self.traffic.keeps_results = not keeping.may_outlive
            return options, binary

        try:
            async with quiet_task_group() as tasks:
                tasks.start_soon(self._limit_wait_for_store)
                self._options, binary = await run_blocking(prepare)
                tasks.cancel_scope.cancel()
        except OSError as exc:
            raise ServerStartError(
                f"the working directory cannot be used: {exc}"
            ) from exc
        except RuntimeError as exc:  # no thread to be had
            raise ServerStartError(
                f"the Stepflow server cannot be started: {exc}"
            ) from exc
        except ServerStartError:
            # A wait that was cancelled has not failed.
            await anyio.lowlevel.checkpoint_if_cancelled()
            raise
        return binary

    async def _part_with_store(self) -> None:
        """Before anybody hears that the server is lost: who does may start another one."""
        if self.store.is_taken:
            with suppress(RuntimeError):  # no thread to be had: at the end, then
                await run_blocking(self.store.give_back)

    async def _limit_wait_for_store(self) -> None:
        """The wait is a thread's, for which a cancellation of the start would wait."""
        try:
            await anyio.sleep(self._options.startup_timeout)
        finally:
            self.store.give_up()

    def _identity(self, options: ServerOptions, keeping: Keeping, binary: Path) -> str:
        """Take the store; return as whom the server is to use it.

        A server recovers the runs of its own id. So it is the one that the store's
        unfinished runs have, wherever that was made; or else one made of its path.
        """
        path, name = keeping.path, options.owner()
        is_shared = keeping.leases is not None
        if path is not None:
            # Servers of names of their own, that leave each other's runs alone, get along
            # without leases; one that storage= was given for has it for itself.
            is_asked_for = options.storage is not None
            gets_along = name is not None and not (keeping.claims or is_asked_for)
            name = self.store.take(
                path,
                name=name,
                shared=is_shared or gets_along,
                create=is_asked_for,
                binary=binary,
            )
        for file in keeping.made:
            # The server would make them for all to read. If it cannot, it says so.
            with suppress(OSError):
                create_private(file)
        if name is not None:
            return name
        is_own = path is None or is_shared
        made = uuid.uuid4() if is_own else uuid.uuid5(uuid.NAMESPACE_URL, str(path))
        return f"stepflow-runtime-{made}"

    def _take_port(self, number: int) -> None:
        try:
            self._port.take(number)
        except OSError as exc:
            raise ServerStartError(
                f"no port of {LOOPBACK} is to be had: {exc}"
            ) from exc

    def _open_logs(self) -> None:
        try:
            self.logs.open()
        except (OSError, ValueError) as exc:
            raise ServerStartError(
                f"log_config.file_path: log lines cannot be written there: {exc}"
            ) from exc

    def hurry_logs(self) -> None:
        """Have what the server has written taken without delay."""
        if (incarnation := self._incarnation) is not None:
            incarnation.hurry_logs()

    async def catch_up_with_logs(self) -> None:
        """Wait until what the server has written by now is taken; bounded."""
        if (incarnation := self._incarnation) is not None:
            with anyio.move_on_after(_CATCH_UP_TIMEOUT):
                while not incarnation.is_log_up_to_date():
                    incarnation.hurry_logs()
                    await anyio.sleep(0.001)

    def block_until_logs_are_in(self) -> None:
        """The same for a thread without an event loop. Blocks it."""
        deadline = time.monotonic() + _CATCH_UP_TIMEOUT
        incarnation = self._incarnation
        while incarnation is not None and not incarnation.is_log_up_to_date():
            if time.monotonic() > deadline:
                return
            incarnation.hurry_logs()
            time.sleep(0.001)

    async def _incarnate(self, binary: Path) -> ServerExit:
        self._incarnations += 1
        self._launch_trouble = ""
        self._incarnation = Incarnation(
            self._options,
            self.logs,
            grace=self._grace,
            on_ready=self._serve,
            on_lost=self._withdraw,
        )
        command = self._options.command(
            os.environ,
            # After a restart the same port and id: clients and leases rely on them.
            port=self.journal.now.port or self._port.number,
            orchestrator_id=self._orchestrator_id,
        )
        command = replace(
            command,
            keep_fds=self.store.fds,
            directory=self._directory,
            port=self._port,
        )
        try:
            return await self._incarnation.live(binary, self._guard.marked(command))
        finally:
            self._port.keep()

    async def _reincarnate(self, binary: Path) -> ServerExit:
        """A failed launch counts as one more crash."""
        try:
            return await self._incarnate(binary)
        except ServerStartError as exc:
            self._launch_trouble = str(exc)
            return exc.exit or ServerExit(code=_NOT_EXECUTED, pid=0)

    async def _renew(self, binary: Path) -> ServerExit:
        """The same after a recycle, of which the message of a failed launch tells."""
        exit = await self._reincarnate(binary)
        if self._launch_trouble:
            self._launch_trouble = (
                "It was being recycled: the old one was stopped in good order, and this, the "
                f"fresh one, did not start. {self._launch_trouble}"
            )
        return exit

    def _take_note_of(self, exit: ServerExit, tasks: TaskGroup) -> None:
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
                told = await run_abandonable(self._call, on_crash, code)
                if told is not None:
                    await _wait_for(told, scope)
        except (Exception, SystemExit) as exc:  # noqa: BLE001 - the user's function
            report(logging.ERROR, "on_crash raised", exc=exc)
        finally:
            self._telling.remove(scope)

    def _call(
        self, on_crash: Callable[[int], Any], code: int
    ) -> Awaitable[object] | None:
        """Call it; return what is to be awaited in the supervisor's loop.

        That is the loop of the caller's, who may use what belongs to it; or else it is ours
        alone, and must not be blocked: then it is awaited here.
        """
        self._calling_threads.add(threading.get_ident())
        try:
            told = on_crash(code)
            if not inspect.isawaitable(told):
                return None
            if not self._has_loop_of_its_own:
                return told
            anyio.run(_wait_for, told, None)
        except BaseException as exc:  # noqa: BLE001 - the user's function
            report(logging.ERROR, "on_crash raised", exc=exc)
        finally:
            self._calling_threads.discard(threading.get_ident())
        return None

    # -- state ---------------------------------------------------------------------

    def _finish(self) -> None:
        self.logs.end()
        self._withdraw_for_good()
        self.journal.enter(RuntimeState.STOPPED, pid=None)

    def _withdraw_for_good(self) -> None:
        self._ready = None
        self.journal.enter(RuntimeState.STOPPING)

    def _is_left(self) -> bool:
        stopping = (RuntimeState.STOPPING, RuntimeState.STOPPED)
        return self._stop_within is not None or self.state in stopping

    def _serve(self, pid: int, port: int) -> None:
        self._port.keep()
        if not self._is_left():
            self._ready = Ready(port, self._incarnations)
            self.journal.enter(RuntimeState.READY, pid=pid, port=port)

    def _withdraw(self) -> None:
        self._ready = None
        self.journal.announce()

    def _limit_telling(self) -> None:
        self._tell_until = anyio.current_time() + self._options.shutdown_timeout
        for scope in self._telling:
            scope.deadline = self._tell_until

    def _give_up(self, exit: ServerExit, reason: str) -> None:
        words = self._launch_trouble or last_words(exit.recent_logs)
        message = f"the Stepflow server {exit}, and is not restarted: {reason}."
        if self.keeping.resumes:
            message += (
                f" Its runs are in {self._options.describe_storage()}, and a new runtime "
                "with that goes on with them."
            )
        message += f"\n{words}"
        self._fail(partial(ServerCrashedError, message, exit=exit), last_exit=exit)

    def _fail(self, failure: Callable[[], ServerError], **details: Any) -> None:
        if RuntimeState.FAILED not in MAY_FOLLOW[self.state]:
            return  # it is being left, and what it dies of does not matter any more
        self._ready = None
        self._failure = failure
        self.logs.end()
        self.journal.enter(RuntimeState.FAILED, pid=None, **details)

    def _is_decided(self) -> bool:
        return self.ready is not None or self._refusal() is not None

    def _serves(self, incarnation: int) -> bool:
        return self._ready is not None and self._ready.incarnation == incarnation

    def _refusal(self) -> ServerError | None:
        """Why there will be no READY any more; None if there may be."""
        if self._failure is not None:
            return self._failure()
        if self._is_left():
            return RuntimeStoppedError("this runtime is stopped")
        return None


class _Guard:
    """A runtime's share in the guard process, taken and given back once.

    Each is done in a thread, that a cancellation may leave alone: so the one may come
    before the other has ended.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.mark = ""
        self._is_engaged = False
        self._is_dismissed = False

    def engage(self) -> None:
        with self._lock:
            if not self._is_dismissed:
                self.mark = keeper.acquire()
                self._is_engaged = True

    def dismiss(self) -> None:
        with self._lock:
            was_engaged, self._is_engaged = self._is_engaged, False
            self._is_dismissed = True
        if was_engaged:
            keeper.release()

    def marked(self, command: Command) -> Command:
        """The command with the mark by which the guard knows its processes."""
        return replace(command, env={**command.env, MARK: self.mark})


async def _wait_for(told: Awaitable[object], scope: anyio.CancelScope | None) -> None:
    try:
        await told
    except anyio.get_cancelled_exc_class() as exc:
        # Ours, if its time is up; or one that it has come by itself, from a cancelled
        # task that it waited for: that must not pass for a cancellation of ours.
        if scope is not None and scope.cancel_called:
            raise
        report(logging.ERROR, "on_crash raised", exc=exc)


def _again(error: ServerStartError) -> ServerStartError:
    """A copy to raise: one object raised in many tasks would collect their tracebacks."""
    copy = type(error)(str(error), exit=error.exit, recent_logs=error.recent_logs)
    copy.__cause__ = error.__cause__
    return copy
