"""A process on POSIX: a session of its own, a pidfd, and a sweep that spares nobody.

Contract, beyond that of ``Child``: a pid that may have been given to somebody else is
never signalled. The leader is reaped last, so that its pid, which is the session's id,
cannot be given away while we search for members; and a member is held by a pidfd before
its session is looked at a second time and it is killed through that.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO

import anyio
import anyio.to_thread
import psutil

from ..options import Command

__all__ = ["PosixChild", "spawn"]

_HAS_PIDFD = hasattr(os, "pidfd_open")

# How long a pass of the sweep waits for those it killed before it looks again.
_SWEEP_PASS = 0.1


def spawn(binary: Path, command: Command) -> PosixChild:
    """Start ``binary`` in a new session. Blocks for the time of a fork and exec.

    :raises OSError: if it cannot be executed
    """
    with _stdin_file(command.stdin) as stdin:
        process = subprocess.Popen(
            [str(binary), *command.argv],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=dict(command.env),
            start_new_session=True,
        )
    return PosixChild(process)


def _stdin_file(content: bytes | None) -> IO[bytes]:
    """A file to read ``content`` from: there is no pipe to fill, so nothing can block.

    In memory where there is such a thing, since a configuration can hold secrets.
    """
    if content is None:
        return open(os.devnull, "rb")
    file = _anonymous_file()
    file.write(content)
    file.seek(0)
    return file


def _anonymous_file() -> IO[bytes]:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("stepflow-config"), "w+b")
    return tempfile.TemporaryFile()


class PosixChild:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None and process.stderr is not None
        self._process = process
        self.pid = process.pid
        self.stdout = process.stdout.fileno()
        self.stderr = process.stderr.fileno()
        os.set_blocking(self.stdout, False)
        os.set_blocking(self.stderr, False)
        self._pidfd = _pidfd_of(process.pid)

    async def wait_exit(self) -> None:
        if self._process.returncode is not None:
            return
        if self._pidfd is not None:
            await anyio.wait_readable(self._pidfd)
        else:
            await anyio.to_thread.run_sync(self._wait_unreaped, abandon_on_cancel=True)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def sweep(self, *, spare_leader: bool, timeout: float) -> int:
        if not self._holds_its_pid():
            return 0
        deadline = time.monotonic() + timeout
        while members := self._members(spare_leader):
            killed = [
                fd for pid in members if (fd := self._kill_member(pid)) is not None
            ]
            remaining = deadline - time.monotonic()
            _wait_for_ends(killed, min(max(remaining, 0), _SWEEP_PASS))
            for fd in killed:
                os.close(fd)
            if remaining <= 0:
                break
        return len(members)

    def failed_worker(self) -> int | None:
        try:
            children = psutil.Process(self.pid).children()
        except psutil.Error:
            return None
        return next(filter(None, (_failure_of(child.pid) for child in children)), None)

    def reap(self) -> int | None:
        return self._process.poll()

    def close(self) -> None:
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    def _holds_its_pid(self) -> bool:
        """True as long as nobody has reaped the process, and so given its pid away."""
        if self._process.returncode is not None:
            return False
        try:
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        except ChildProcessError:
            return False  # somebody else has: SIGCHLD ignored, or a stray waitpid(-1)
        return True

    def _signal(self, number: signal.Signals) -> None:
        # Popen.send_signal would poll, and so reap, before the session is swept.
        if self._holds_its_pid():
            os.kill(self.pid, number)

    def _members(self, spare_leader: bool) -> list[int]:
        """The session's living processes; zombies only wait for their parents."""
        return [
            pid
            for pid in psutil.pids()
            if self._is_member(pid)
            and not (spare_leader and pid == self.pid)
            and _is_alive(pid)
        ]

    def _is_member(self, pid: int) -> bool:
        try:
            return os.getsid(pid) == self.pid
        except OSError:
            return False

    def _kill_member(self, pid: int) -> int | None:
        """Kill one member; return a pidfd that tells its end, where there is such."""
        fd = _pidfd_of(pid)
        try:
            if not self._is_member(pid):
                pass
            elif fd is not None:
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            else:
                os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        return fd

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


def _is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _failure_of(pid: int) -> int | None:
    """The exit code of a zombie; 0 and None for one that ended well, or lives."""
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
