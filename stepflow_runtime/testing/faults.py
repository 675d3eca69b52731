"""Faults, inflicted on the server of a runtime: the real one, or a fake one.

Contract: when a function returns, the server executes nothing any more (or again, after
:func:`thaw`); what the runtime makes of that follows, in its own time. Nothing here blocks.
Only the server's own process is hit: what becomes of its workers is the runtime's affair,
as with any crash.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ..runtime import StepflowRuntime

__all__ = [
    "crash",
    "freeze",
    "freeze_process",
    "thaw",
    "thaw_process",
    "wait_restarted",
]

# What ends a process without its having a say.
_KILL: Final = signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL


def crash(runtime: StepflowRuntime, signum: int | None = None) -> None:
    """Kill the server of a runtime, by SIGKILL or another signal.

    The runtime hears of it a moment later: calls find out by themselves what became of the
    server, and :func:`wait_restarted` waits until there is another one. May be called from
    any thread, in an event loop or not.

    :param signum: one that ends the process: SIGKILL (None), SIGABRT, SIGTERM. (A SIGSEGV or SIGBUS
        that is sent, the server's own handler takes, and lives on.)
    :raises RuntimeError: if there is no server just now
    """
    os.kill(_pid_of(runtime, "crash"), _KILL if signum is None else signum)


def freeze(runtime: StepflowRuntime) -> None:
    """Have the server of a runtime stand still, as a debugger or a starved machine does.

    It is alive, its port is open, and it answers nothing. A runtime takes it for hung after
    ``max_health_failures`` unanswered health requests, and kills it. The fixtures of the
    pytest plugin thaw what a test leaves frozen.

    :raises RuntimeError: if there is no server just now
    """
    freeze_process(_pid_of(runtime, "freeze"))


def thaw(runtime: StepflowRuntime) -> None:
    """Let the server go on after :func:`freeze`; nothing happens if it is not frozen."""
    if (pid := runtime.pid) is not None and _is_ours(pid):
        thaw_process(pid)


async def wait_restarted(runtime: StepflowRuntime, restarts: int = 1) -> None:
    """Wait until a runtime has restarted its server so often, in all, and is READY.

    It is what to wait for after :func:`crash`: ``wait_ready`` would be content with the state
    that the runtime is in before it has heard of the crash. Cancellation takes effect at
    once.

    :param restarts: how many, counted from the runtime's start as ``runtime.restarts`` is
    :raises ServerError: if it will not be READY any more; as ``runtime.wait_ready``
    """
    async for change in runtime.state_changes():
        if change.restarts >= restarts:
            break
    await runtime.wait_ready()


def freeze_process(pid: int) -> None:
    if sys.platform == "win32":
        import psutil

        psutil.Process(pid).suspend()
    else:
        os.kill(pid, signal.SIGSTOP)


def thaw_process(pid: int) -> None:
    if sys.platform == "win32":
        import psutil

        psutil.Process(pid).resume()
    else:
        os.kill(pid, signal.SIGCONT)


def _pid_of(runtime: StepflowRuntime, what: str) -> int:
    pid = runtime.pid
    if pid is None or not _is_ours(pid):
        raise RuntimeError(
            f"there is no server to {what}: the runtime is {runtime.state.value}"
        )
    return pid


def _is_ours(pid: int) -> bool:
    """False if it was reaped in this very moment: the number may be somebody else's."""
    if not hasattr(os, "waitid"):
        return True
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True
