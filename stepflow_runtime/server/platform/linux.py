"""A process on Linux: a session of its own, a pidfd, and a sweep that spares nobody.

Contract, beyond that of ``posix``: a member of the session is held by a pidfd before its
session is looked at a second time and it is killed through that.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

import anyio

from ...forks import no_forks
from ...threads import run_abandonable
from ..confine import Confinement, Unconfined, confine
from ..options import Command

assert sys.platform == "linux"  # for mypy, which has to know that before the import

from .posix import (
    KILLED,
    Bell,
    Pipe,
    PosixChild,
    all_pids,
    filled_pipe,
    nothing,
    start,
    two_bells,
)

__all__ = ["KILLED", "LinuxChild", "spawn"]

_HAS_PIDFD = hasattr(os, "pidfd_open")

# What a pipe holds, unless it is told otherwise.
_PIPE_SIZE = 65536
_LOG_PIPE_SIZE = 1024 * 1024


def spawn(binary: Path, command: Command) -> LinuxChild:
    """Start ``binary`` in a new session. Blocks for the time of a fork and exec.

    In a thread that ends then: it may have given up the right to bind as it likes.

    :raises OSError: if it cannot be executed
    :raises CannotConfineError: if its port cannot be kept on loopback, and has to be
    """
    # A sweep reads /proc, and must be able to when the program is out of descriptors.
    # Opened first: after the spawn nothing may fail before somebody owns the process.
    spare = nothing()
    try:
        # A child that is forked meanwhile would not know what to close.
        with no_forks(), two_bells() as bells:
            confinement = confine(command.port, command.exposure)
            try:
                process = start(binary, command, _stdin(command.stdin))
            except BaseException:
                confinement.close()
                raise
            return LinuxChild(process, bells, spare, confinement)
    except BaseException:
        os.close(spare)
        raise


def _stdin(content: bytes | None) -> int:
    """A descriptor to read ``content`` from, once."""
    if content is None:
        return nothing()
    reading = filled_pipe(content, _make_room)
    if reading is None:
        raise OSError(errno.E2BIG, "the configuration does not fit into a pipe")
    return reading


def _widened(pipe: int) -> int:
    """Let it hold more, for the moments in which none of our threads can run.

    Returns how many bytes it holds.
    """
    with suppress(OSError):  # this user's pipes hold much already
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _LOG_PIPE_SIZE)
    try:
        return fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ)
    except OSError:
        return _PIPE_SIZE


def _make_room(pipe: int, size: int) -> None:
    if size > _PIPE_SIZE:
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, size)


class LinuxChild(PosixChild):
    def __init__(
        self,
        process: subprocess.Popen[bytes],
        bells: tuple[Bell, Bell],
        spare: int,
        confinement: Confinement | Unconfined,
    ) -> None:
        self._confinement = confinement
        self._pidfd = _pidfd_of(process.pid)
        self._spare: int | None = spare
        super().__init__(process, bells)

    def _pipe(self, pipe: IO[bytes], bell: Bell) -> Pipe:
        return Pipe(pipe, bell, _widened(pipe.fileno()))

    async def wait_exit(self) -> None:
        if self._process.returncode is not None:
            return
        if self._pidfd is not None:
            await anyio.wait_readable(self._pidfd)
        else:
            await run_abandonable(self._wait_unreaped)

    def sweep(self, *, spare_leader: bool, timeout: float) -> int:
        if not self._holds_its_pid():
            return 0
        self._free_spare()
        left = super().sweep(spare_leader=spare_leader, timeout=timeout)
        self._reap_adopted()
        return left

    @property
    def exposed(self) -> str | None:
        return self._confinement.trouble

    def ended_workers(self) -> list[int]:
        import psutil

        try:
            children = psutil.Process(self.pid).children()
        except (psutil.Error, OSError):
            return []
        codes = (_exit_code_of_zombie(child.pid) for child in children)
        return [code for code in codes if code is not None]

    def close(self) -> None:
        super().close()
        self._confinement.close()
        pidfd, self._pidfd = self._pidfd, None
        if pidfd is not None:
            os.close(pidfd)
        self._free_spare()

    def _free_spare(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            os.close(spare)

    def _holds_its_pid(self) -> bool:
        if self._process.returncode is not None:
            return False
        try:
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        except ChildProcessError:
            return False  # somebody else has: SIGCHLD ignored, or a stray waitpid(-1)
        return True

    def _kill_members(self, members: list[int], patience: float) -> None:
        pidfds: list[int] = []
        try:
            for pid in members:
                fd = _pidfd_of(pid)
                if fd is not None:
                    pidfds.append(fd)
                self._kill_member(pid, fd)
            _wait_for_ends(pidfds, patience)
        finally:
            for fd in pidfds:
                os.close(fd)

    def _kill_member(self, pid: int, pidfd: int | None) -> None:
        try:
            if not self._is_member(pid):
                pass
            elif pidfd is not None:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            else:
                os.kill(pid, signal.SIGKILL)
        except OSError:
            pass  # ended, or another user's (sudo): then it counts as left

    def _reap_adopted(self) -> None:
        """Reap the session's zombies that have become children of ours.

        As they do where we are the first process of a container: orphans fall to that, and
        nobody else would ever reap them.
        """
        for pid in all_pids():
            if pid != self.pid and self._is_member(pid):
                try:
                    os.waitpid(pid, os.WNOHANG)
                except ChildProcessError:
                    pass  # somebody else's child

    def _wait_unreaped(self) -> None:
        try:
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        except ChildProcessError:
            pass


def _pidfd_of(pid: int) -> int | None:
    if not _HAS_PIDFD:
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:  # ended in the meantime, or a kernel before 5.3
        return None


def _exit_code_of_zombie(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:  # gone, or a system without /proc
        return None
    # What follows the name, which can hold anything: proc_pid_stat(5), from field 3 on.
    state, *fields = stat.rpartition(b")")[2].split()
    return os.waitstatus_to_exitcode(int(fields[48])) if state == b"Z" else None


def _wait_for_ends(pidfds: list[int], timeout: float) -> None:
    if not pidfds:
        time.sleep(min(timeout, 0.005))
        return
    deadline = time.monotonic() + timeout
    waiting = select.poll()
    for fd in pidfds:
        waiting.register(fd, select.POLLIN)
    left = len(pidfds)
    while left and (remaining := deadline - time.monotonic()) > 0:
        for fd, _ in waiting.poll(remaining * 1000):
            waiting.unregister(fd)
            left -= 1
