"""Faults, inflicted on the server of a runtime: the real one, or a fake one.

Contract: when a function returns, the server executes nothing any more (or again, after
:func:`thaw`); what the runtime makes of that follows, in its own time. Nothing here blocks,
but for the moment in which the kernel stops a process.
Only the server's own process is hit: what becomes of its workers is the runtime's affair,
as with any crash.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from ..runtime import StepflowRuntime

__all__ = [
    "crash",
    "freeze",
    "freeze_process",
    "is_frozen",
    "thaw",
    "thaw_all",
    "thaw_process",
    "wait_restarted",
]

# What ends a process without its having a say.
_KILL: Final = signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL

# The server that was hit last, of each runtime: another one is to come in its place.
_hit: Final[WeakKeyDictionary[StepflowRuntime, int]] = WeakKeyDictionary()

_frozen: Final[set[int]] = set()

# Seconds. It takes a millisecond, on a busy machine some more.
_LONGEST_STOP: Final = 2.0


def crash(runtime: StepflowRuntime, signum: int | None = None) -> None:
    """Kill the server of a runtime, by SIGKILL or another signal.

    The runtime hears of it a moment later: calls find out by themselves what became of the
    server, and :func:`wait_restarted` waits until there is another one. May be called from
    any thread, in an event loop or not.

    :param signum: one that ends the process at once: SIGKILL (None), SIGABRT. (A SIGSEGV or
        SIGBUS that is sent, the server's own handler takes, and lives on.)
    :raises RuntimeError: if there is no server just now
    """
    pid = _hit[runtime] = _pid_of(runtime, "crash")
    os.kill(pid, _KILL if signum is None else signum)


def freeze(runtime: StepflowRuntime) -> None:
    """Have the server of a runtime stand still, as a debugger or a starved machine does.

    It is alive, its port is open, and it answers nothing. A runtime takes it for hung after
    ``max_health_failures`` unanswered health requests, and kills it. The pytest plugin thaws
    what a test leaves frozen.

    :raises RuntimeError: if there is no server just now
    """
    pid = _hit[runtime] = _pid_of(runtime, "freeze")
    freeze_process(pid)


def thaw(runtime: StepflowRuntime) -> None:
    """Let the server go on after :func:`freeze`; nothing happens if it is not frozen."""
    _hit.pop(runtime, None)
    if (pid := runtime.pid) is not None:
        thaw_process(pid)


async def wait_restarted(runtime: StepflowRuntime, restarts: int | None = None) -> None:
    """Wait until a runtime is READY with another server than the one that was hit.

    It is what to wait for after :func:`crash` or :func:`freeze`: ``wait_ready`` would be
    content with the state that the runtime is in before it has heard of that. Cancellation
    takes effect at once.

    :param restarts: wait instead until it has restarted so often, in all, as
        ``runtime.restarts`` counts; for crashes that come of something else. Where
        neither is said, once
    :raises ServerError: if it will not be READY any more; as ``runtime.wait_ready``
    """
    from ..server.state import RuntimeState  # not with each run of pytest

    hit = _hit.get(runtime) if restarts is None else None
    async for change in runtime.state_changes():
        is_another = (
            change.restarts >= (restarts or 1) if hit is None else change.pid != hit
        )
        if is_another and change.state is RuntimeState.READY:
            break
    await runtime.wait_ready()


def freeze_process(pid: int) -> None:
    _frozen.add(pid)
    if sys.platform == "win32":
        import psutil

        psutil.Process(pid).suspend()
    else:
        os.kill(pid, signal.SIGSTOP)
        _wait_stopped(pid)


def _wait_stopped(pid: int) -> None:
    """One of its threads has to take the signal first; the others go on until it has.

    Bounded: another thread may have let it go on again meanwhile.
    """
    if not hasattr(os, "waitid"):
        return
    deadline = time.monotonic() + _LONGEST_STOP
    events = os.WSTOPPED | os.WEXITED | os.WNOWAIT | os.WNOHANG
    with suppress(ChildProcessError):
        while os.waitid(os.P_PID, pid, events) is None and time.monotonic() < deadline:
            os.sched_yield()  # a sleep would block an event loop for longer than this takes


def thaw_process(pid: int) -> None:
    """Nothing happens if it is not there any more."""
    _frozen.discard(pid)
    if not _is_ours(pid):
        return
    if sys.platform == "win32":
        import psutil

        psutil.Process(pid).resume()
    else:
        os.kill(pid, signal.SIGCONT)


def is_frozen(pid: int) -> bool:
    """True if it was frozen here, and is there."""
    return pid in _frozen and _is_ours(pid)


def thaw_all() -> None:
    """Let all go on that were frozen here."""
    for pid in tuple(_frozen):
        thaw_process(pid)


def _pid_of(runtime: StepflowRuntime, what: str) -> int:
    pid = runtime.pid
    if pid is None or not _is_ours(pid):
        raise RuntimeError(
            f"there is no server to {what}: the runtime is {runtime.state.value}"
        )
    return pid


def _is_ours(pid: int) -> bool:
    """True if it is a child of ours that lives: another number may be somebody else's."""
    if not hasattr(os, "waitid"):
        return True
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False
