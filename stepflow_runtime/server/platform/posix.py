"""What POSIX systems share: a child in a session of its own, signals, zombies, pipes.

Contract, beyond that of ``Child``: a pid that may have been given to somebody else is
never signalled. The leader is reaped last, so that its pid, which is the session's id,
cannot be given away while we search for members.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Final

import anyio
import psutil

from ...forks import forget_in_child
from ..options import Command

assert sys.platform != "win32"

__all__ = [
    "KILLED",
    "PosixChild",
    "filled_pipe",
    "is_alive",
    "nothing",
    "read",
    "start",
]

KILLED: Final = -int(signal.SIGKILL)

# What we say of a process whose exit code somebody else took: a failure, for certain.
_UNKNOWN_EXIT: Final = 255

# How long a pass of the sweep waits for those it killed before it looks again.
_SWEEP_PASS: Final = 0.1

# What a pipe of Linux holds by default: one read empties it.
_READ_SIZE: Final = 65536


async def read(fd: int) -> bytes:
    """Read what is there of a non-blocking pipe, or wait for it; ``b""`` at its end."""
    while True:
        # Always wait first: the checkpoint is what gives other tasks their turn.
        await anyio.wait_readable(fd)
        try:
            return os.read(fd, _READ_SIZE)
        except BlockingIOError:
            continue
        except OSError as exc:
            if exc.errno == errno.EIO:  # a pseudo-terminal's way to say that it ended
                return b""
            raise


def start(binary: Path, command: Command, stdin: int) -> subprocess.Popen[bytes]:
    """Start ``binary`` in a new session, and close ``stdin``.

    To be called in a thread of ours, since the process inherits its mask of signals: a
    program that blocks SIGTERM, to wait for it, must not have a server that never hears
    it. While that is put right here, one that arrives just now could strike the program.
    """
    blocked = signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        return subprocess.Popen(
            [str(binary), *command.argv],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=dict(command.env),
            start_new_session=True,
        )
    finally:
        if blocked:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        os.close(stdin)


def nothing() -> int:
    """A descriptor that there is nothing to read from."""
    return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


def filled_pipe(
    content: bytes, make_room: Callable[[int, int], object] = lambda fd, size: None
) -> int | None:
    """The reading end of a pipe with ``content`` in it; None if it does not hold that.

    Filled beforehand: nobody has to be there to write, and when the server has read it,
    there is nothing left in it for the workers, who inherit it.

    :param make_room: called with the writing end and the size that is needed
    """
    reading, writing = os.pipe()
    written = 0
    try:
        make_room(writing, len(content))
        os.set_blocking(writing, False)
        try:
            written = os.write(writing, content)
        except BlockingIOError:
            pass  # it holds nothing of it
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    if written < len(content):
        os.close(reading)
        return None
    return reading


def is_alive(pid: int) -> bool:
    """False for a zombie, and for nobody."""
    try:
        process = psutil.Process(pid)
        # One whose main thread has ended looks like a zombie while its others run.
        return process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, OSError):
        return True  # it does not tell; a signal too many does no harm to a zombie


class PosixChild(ABC):
    """What of ``Child`` is the same everywhere.

    A system adds how the end of the process is noticed, how to tell that nobody has reaped
    it, and how a member of its session is killed and no stranger.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None and process.stderr is not None
        self._process = process
        self.pid = process.pid
        self.stdout = process.stdout.fileno()
        self.stderr = process.stderr.fileno()
        os.set_blocking(self.stdout, False)
        os.set_blocking(self.stderr, False)
        forget_in_child(self)

    @abstractmethod
    async def wait_exit(self) -> None: ...

    @abstractmethod
    def ended_workers(self) -> list[int]: ...

    @abstractmethod
    def _holds_its_pid(self) -> bool:
        """True as long as nobody has reaped the process, and so given its pid away."""

    @abstractmethod
    def _kill_members(self, members: list[int], patience: float) -> None:
        """Kill them, and wait for so many seconds at most until they are gone."""

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def sweep(self, *, spare_leader: bool, timeout: float) -> int:
        if not self._holds_its_pid():
            return 0
        deadline = time.monotonic() + timeout
        while members := self._members(spare_leader):
            remaining = deadline - time.monotonic()
            self._kill_members(members, min(max(remaining, 0), _SWEEP_PASS))
            if remaining <= 0:
                break
        return len(members)

    def reap(self) -> int | None:
        process = self._process
        if process.returncode is None:
            # Not Popen.poll: what somebody else has reaped it would make a 0, a good end.
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                process.returncode = _UNKNOWN_EXIT
            else:
                if pid:
                    process.returncode = os.waitstatus_to_exitcode(status)
        return process.returncode

    def close(self) -> None:
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def forget(self) -> None:
        # In a forked child this is nobody's process: unreapable, and not to be signalled.
        self._process.returncode = _UNKNOWN_EXIT
        self.close()

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
            and is_alive(pid)
        ]

    def _is_member(self, pid: int) -> bool:
        try:
            return os.getsid(pid) == self.pid
        except OSError:
            return False
