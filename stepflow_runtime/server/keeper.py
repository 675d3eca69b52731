"""Our side of the guard process: there is one for as long as anybody needs it.

Contract: between :func:`acquire` and :func:`release` a guard process watches us, and if we
are killed it ends every process that carries the mark that ``acquire`` returned (see
``guard.py``). A guard that was killed itself is replaced, with the same mark. After the
last ``release`` nothing of it is left: no process, no thread, no descriptor. Where no guard
can be had, that is logged once, and everything goes on without.

``acquire`` and ``release`` block, for milliseconds; they are for a worker thread. A forked
child begins anew.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Final

from ..forks import forget_in_child, no_forks
from ..logs.own import report
from .guard import MARK
from .interpreter import find_interpreter

__all__ = ["acquire", "forget", "release"]

_PROGRAM: Final = Path(__file__).with_name("guard.py")

# A shell waits in the guard's place until there is something to do: it takes a tenth of
# the memory, and at a server's start nothing of the processor that starts it.
_WAITING: Final = (
    "/bin/sh",
    "-c",
    # `killall` of whatever is meant for our Python, which the guard has to outlive.
    'trap "" HUP INT TERM; read -r line; exec "$@"',
    "sh",
)

_THREAD: Final = "stepflow-runtime-guard"

_UNGUARDED: Final = (
    "no guard process: should this Python process be killed (SIGKILL, out of memory), its "
    "Stepflow servers are left behind, because %s"
)

# A guard that ends sooner than this was not just killed by somebody: it cannot work here.
_SOON: Final = 1.0
_MOST_SOON: Final = 6
_BACKOFF: Final = 0.2

# After SIGKILL the kernel needs a millisecond. More than this we do not wait for anything.
_PATIENCE: Final = 2.0


class _NoGuardError(Exception):
    """Why no guard can be had."""


class _Keeper:
    def __init__(self) -> None:
        self._pipe: int | None = None
        self.forget()
        forget_in_child(self)

    def forget(self) -> None:
        """Begin anew, in a child that was just forked: the guard is its parent's."""
        if self._pipe is not None:
            with suppress(OSError):
                os.close(self._pipe)  # it tells of the parent's end
        self._pipe = None
        self._pid: int | None = None
        self._lock = threading.Lock()
        self._users = 0
        self._mark = ""
        self._over = threading.Event()
        self._watcher: threading.Thread | None = None
        self._warned = False

    def acquire(self) -> str:
        """Have a guard, from now on; return the mark that servers carry in ``MARK``."""
        problem = None
        with self._exclusive():
            if self._users == 0:
                self._mark = uuid.uuid4().hex
                self._over = threading.Event()
            self._users += 1
            mark = self._mark
            # On Windows a job object does what a guard does elsewhere.
            if sys.platform != "win32" and not (self._pid or self._watcher):
                try:
                    self._begin()
                except _NoGuardError as exc:
                    problem = exc
        self._warn(problem)
        return mark

    def release(self) -> None:
        """Need the guard no longer: one call for each :meth:`acquire`."""
        with self._exclusive():
            if self._users == 0:
                return  # a forked child ends what it inherited
            self._users -= 1
            if self._users > 0:
                return
            self._over.set()
            self._end()
            watcher, self._watcher = self._watcher, None
        if watcher is not None and not sys.is_finalizing():
            watcher.join(_PATIENCE)

    def _exclusive(self) -> AbstractContextManager[object]:
        # Once the interpreter is ending nobody else runs, but a thread of ours that was
        # stopped for good there may have the lock.
        return nullcontext() if sys.is_finalizing() else self._lock

    def _begin(self) -> None:
        watcher = threading.Thread(
            target=self._watch, args=(self._over,), name=_THREAD, daemon=True
        )
        # Before the spawn: both beginning at the same time costs milliseconds. Without a
        # thread there is a guard all the same, but not a second one; nor is there on macOS
        # before Python 3.13, where to wait for the guard's end would give its pid away.
        with suppress(RuntimeError):
            if hasattr(os, "waitid") and not sys.is_finalizing():
                watcher.start()
                self._watcher = watcher
        try:
            self._spawn()
        except _NoGuardError:
            self._watcher = None  # it finds no guard, and ends
            raise

    def _spawn(self) -> int:
        _check_possible()
        try:
            with no_forks():
                self._pid, self._pipe = _spawn_guard(self._mark)
        except Exception as exc:  # OSError, or the interpreter is ending
            raise _NoGuardError(f"it cannot be started: {exc!r}") from exc
        return self._pid

    def _end(self) -> None:
        """End the guard. The pipe is closed last, so that it never sees that happen."""
        pid, self._pid = self._pid, None
        pipe, self._pipe = self._pipe, None
        if pid is not None:
            _kill_and_reap(pid)
        if pipe is not None:
            os.close(pipe)

    def _watch(self, over: threading.Event) -> None:
        """Replace the guard whenever it ends, until it is ``over``."""
        with self._lock:
            pid = None if over.is_set() else self._pid
        soon = 0
        while pid is not None:
            began = time.monotonic()
            _wait_unreaped(pid)
            soon = soon + 1 if time.monotonic() - began < _SOON else 0
            if over.wait(max(0, soon - 1) * _BACKOFF):
                return
            pid = self._replace(pid, over, soon)

    def _replace(self, pid: int, over: threading.Event, soon: int) -> int | None:
        with self._lock:
            if over.is_set() or self._pid != pid:
                return None
            self._end()
            try:
                if soon >= _MOST_SOON:
                    raise _NoGuardError(f"it ended at once, {soon} times")
                return self._spawn()
            except _NoGuardError as exc:
                self._watcher = None
                problem = exc
        self._warn(problem)
        return None

    def _warn(self, problem: _NoGuardError | None) -> None:
        # Never under the lock: what a handler does is the user's affair.
        if problem is not None and not self._warned:
            self._warned = True
            report(logging.WARNING, _UNGUARDED, problem)


def _check_possible() -> None:
    if find_interpreter() is None:
        raise _NoGuardError(
            f"no Python interpreter is there to run it, but {sys.executable!r}"
        )
    if not _PROGRAM.is_file():
        raise _NoGuardError(f"{_PROGRAM} is not a file")


def _spawn_guard(mark: str) -> tuple[int, int]:
    """Start a guard; return its pid, and the end of the pipe that stands for our life."""
    reading, writing = os.pipe()
    try:
        process = subprocess.Popen(
            [
                *(_WAITING if os.access(_WAITING[0], os.X_OK) else ()),
                *(sys.executable, "-I", "-S", str(_PROGRAM), mark, str(os.getpid())),
            ],
            stdin=reading,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            # The mark of a guard further out: it must not kill those that guard us.
            env={k: v for k, v in os.environ.copy().items() if k != MARK},
            start_new_session=True,
        )
    except BaseException:
        os.close(writing)
        raise
    finally:
        os.close(reading)
    # We reap it, and under our lock: so it is never signalled when its pid is not its own.
    process.returncode = 0
    return process.pid, writing


def _wait_unreaped(pid: int) -> None:
    # It is not ours any more where SIGCHLD is ignored, or after a stray waitpid(-1).
    with suppress(ChildProcessError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def _kill_and_reap(pid: int) -> None:
    deadline = time.monotonic() + _PATIENCE
    with suppress(ChildProcessError, ProcessLookupError):
        while os.waitpid(pid, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:
            os.kill(pid, signal.SIGKILL)
            time.sleep(0.0003)


_keeper: Final = _Keeper()
acquire: Final = _keeper.acquire
release: Final = _keeper.release
forget: Final = _keeper.forget
