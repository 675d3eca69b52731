"""A process on Linux: a session of its own, a pidfd, and a sweep that spares nobody.

Contract, beyond that of ``Child``: a pid that may have been given to somebody else is
never signalled. The leader is reaped last, so that its pid, which is the session's id,
cannot be given away while we search for members; and a member is held by a pidfd before
its session is looked at a second time and it is killed through that.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import subprocess
import time
from pathlib import Path

import anyio
import psutil

from ...forks import forget_in_child
from ...threads import run_abandonable
from ..options import Command

__all__ = ["LinuxChild", "spawn"]

_HAS_PIDFD = hasattr(os, "pidfd_open")

# What a pipe holds, unless it is told otherwise.
_PIPE_SIZE = 65536

# What we say of a process whose exit code somebody else took: a failure, for certain.
_UNKNOWN_EXIT = 255

# How long a pass of the sweep waits for those it killed before it looks again.
_SWEEP_PASS = 0.1


def spawn(binary: Path, command: Command) -> LinuxChild:
    """Start ``binary`` in a new session. Blocks for the time of a fork and exec.

    :raises OSError: if it cannot be executed
    """
    # A sweep reads /proc, and must be able to when the program is out of descriptors.
    # Opened first: after the spawn nothing may fail before somebody owns the process.
    spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        stdin = _stdin(command.stdin)
        try:
            process = subprocess.Popen(
                [str(binary), *command.argv],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                env=dict(command.env),
                start_new_session=True,
            )
        finally:
            os.close(stdin)
    except BaseException:
        os.close(spare)
        raise
    return LinuxChild(process, spare)


def _stdin(content: bytes | None) -> int:
    """A descriptor to read ``content`` from, once.

    A pipe that is filled beforehand: nobody has to be there to write, and when the
    server has read it, there is nothing left in it for the workers, who inherit it.
    """
    if content is None:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    reading, writing = os.pipe()
    try:
        if len(content) > _PIPE_SIZE:
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, len(content))
        os.set_blocking(writing, False)
        if os.write(writing, content) < len(content):
            raise OSError(errno.E2BIG, "the configuration does not fit into a pipe")
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    return reading


class LinuxChild:
    def __init__(self, process: subprocess.Popen[bytes], spare: int) -> None:
        assert process.stdout is not None and process.stderr is not None
        self._process = process
        self.pid = process.pid
        self.stdout = process.stdout.fileno()
        self.stderr = process.stderr.fileno()
        os.set_blocking(self.stdout, False)
        os.set_blocking(self.stderr, False)
        self._pidfd = _pidfd_of(process.pid)
        self._spare: int | None = spare
        forget_in_child(self)

    async def wait_exit(self) -> None:
        if self._process.returncode is not None:
            return
        if self._pidfd is not None:
            await anyio.wait_readable(self._pidfd)
        else:
            await run_abandonable(self._wait_unreaped)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def sweep(self, *, spare_leader: bool, timeout: float) -> int:
        if not self._holds_its_pid():
            return 0
        self._free_spare()
        deadline = time.monotonic() + timeout
        while members := self._members(spare_leader):
            remaining = deadline - time.monotonic()
            self._kill_members(members, min(max(remaining, 0), _SWEEP_PASS))
            if remaining <= 0:
                break
        self._reap_adopted()
        return len(members)

    def ended_workers(self) -> list[int]:
        try:
            children = psutil.Process(self.pid).children()
        except (psutil.Error, OSError):
            return []
        codes = (_exit_code_of_zombie(child.pid) for child in children)
        return [code for code in codes if code is not None]

    def reap(self) -> int | None:
        if self._process.returncode is None and not self._holds_its_pid():
            # Popen would make it a 0, and so a good end.
            self._process.returncode = _UNKNOWN_EXIT
        return self._process.poll()

    def close(self) -> None:
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        self._free_spare()

    def forget(self) -> None:
        # In a forked child this is nobody's process: unreapable, and not to be signalled.
        self._process.returncode = _UNKNOWN_EXIT
        self.close()

    def _free_spare(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            os.close(spare)

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

    def _kill_members(self, members: list[int], patience: float) -> None:
        """Kill them, and wait for so many seconds at most until they are gone."""
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
        for pid in psutil.pids():
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


def _is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, OSError):
        return True  # it does not tell; a signal too many does no harm to a zombie


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
