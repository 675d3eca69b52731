"""A process on macOS: a session of its own, a kqueue, and psutil's look at processes.

CI does not run this: it was written from the documentation and from the kernel's sources,
and its tests put a stand-in for the kqueue on Linux. What differs from Linux:

- No pidfd. That a pid is still the process it was is told by when that was created, to
  the microsecond; a moment is left between the look at it and the signal.
- ``os.waitid`` came with Python 3.13, so nothing shows for certain that nobody else has
  reaped the process, other than to reap it. Until then the same pid with the same time of
  creation is taken for it. The exit code is certain: ``reap`` asks the kernel, and says 255
  where that knows no such child.
- The exit codes of workers cannot be had: one that fails while the server starts is
  noticed by the server, or by ``startup_timeout``.
- A pipe holds 64 KiB at most. A configuration that is larger is handed over as a file
  without a name, which only its owner could have opened, and so does touch the disk.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio
import psutil

from ..options import Command

# For mypy, which has to know that before the import; the tests import this on Linux.
assert sys.platform == "darwin" or not TYPE_CHECKING

from .posix import (
    KILLED,
    Bell,
    PosixChild,
    filled_pipe,
    is_alive,
    nothing,
    start,
    two_bells,
)

__all__ = ["KILLED", "MacChild", "spawn"]

# How soon to look again for what the kernel tells nobody of.
_PAUSE: Final = 0.005


def spawn(binary: Path, command: Command) -> MacChild:
    """Start ``binary`` in a new session. Blocks for the time of a fork and exec.

    :raises OSError: if it cannot be executed
    """
    kqueue = select.kqueue()
    try:
        with two_bells() as bells:
            process = start(binary, command, _stdin(command.stdin))
            try:
                return MacChild(process, bells, kqueue)
            except BaseException:
                with process:  # nobody owns it yet
                    process.kill()
                raise
    except BaseException:
        kqueue.close()
        raise


def _stdin(content: bytes | None) -> int:
    """A descriptor to read ``content`` from."""
    if content is None:
        return nothing()
    # What it holds depends on how much memory the kernel has left for pipes: try.
    reading = filled_pipe(content)
    return reading if reading is not None else _nameless_file(content)


def _nameless_file(content: bytes) -> int:
    with tempfile.TemporaryFile() as file:  # with mode 0600, and unlinked at once
        file.write(content)
        file.seek(0)
        return os.dup(file.fileno())


class MacChild(PosixChild):
    def __init__(
        self,
        process: subprocess.Popen[bytes],
        bells: tuple[Bell, Bell],
        kqueue: select.kqueue,
    ) -> None:
        self._kqueue = kqueue
        self._identity = _identity_of_child(process.pid)
        self._will_be_told = _ask_to_be_told(kqueue, process.pid)
        super().__init__(process, bells)

    async def wait_exit(self) -> None:
        if self._process.returncode is not None:
            return
        if self._will_be_told:
            # The event is never taken out, so the queue stays readable for ever.
            await anyio.wait_readable(self._kqueue.fileno())
        # The notice, and ESRCH in its place, come a moment before it can be reaped.
        while self._holds_its_pid() and is_alive(self.pid):  # noqa: ASYNC110
            await anyio.sleep(_PAUSE)

    def ended_workers(self) -> list[int]:
        return []

    def close(self) -> None:
        super().close()
        # A forked child inherits no kqueue, and before Python 3.12 the object does not know.
        with suppress(OSError):
            self._kqueue.close()

    def _holds_its_pid(self) -> bool:
        return (
            self._process.returncode is None
            and self._identity is not None
            and self._identity.is_running()  # so is a zombie
        )

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):  # it is just ending
            super()._signal(number)

    def _kill_members(self, members: list[int], patience: float) -> None:
        for pid in members:
            self._kill_member(pid)
        time.sleep(min(patience, _PAUSE))

    def _kill_member(self, pid: int) -> None:
        try:
            process = psutil.Process(pid)  # takes down when it was created
            if self._is_member(pid):
                process.kill()  # looks at that once more
        except (psutil.Error, OSError):
            pass  # ended, or another user's (sudo): then it counts as left


def _identity_of_child(pid: int) -> psutil.Process | None:
    """Our child of that number, as what it can be told from later ones; None if gone."""
    try:
        process = psutil.Process(pid)
        return process if process.ppid() == os.getpid() else None
    except psutil.NoSuchProcess:
        return None  # SIGCHLD is ignored, or a stray waitpid(-1) was faster
    except psutil.Error as exc:
        raise OSError(f"process {pid} cannot be looked at: {exc}") from exc


def _ask_to_be_told(kqueue: select.kqueue, pid: int) -> bool:
    """Have ``kqueue`` become readable when the process ends; False if that was before."""
    event = select.kevent(
        pid,
        filter=select.KQ_FILTER_PROC,
        flags=select.KQ_EV_ADD,
        fflags=select.KQ_NOTE_EXIT,
    )
    try:
        kqueue.control([event], 0)
    except ProcessLookupError:
        return False
    return True
