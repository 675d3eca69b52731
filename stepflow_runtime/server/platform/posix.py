"""What POSIX systems share: a child in a session of its own, signals, zombies, pipes.

Contract, beyond that of ``Child``: a pid that may have been given to somebody else is
never signalled. The leader is reaped last, so that its pid, which is the session's id,
cannot be given away while we search for members.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Final

from ...forks import forget_in_child
from ..options import Command
from .launching import popen

assert sys.platform != "win32"

__all__ = [
    "KILLED",
    "READ_SIZE",
    "Bell",
    "Pipe",
    "PosixChild",
    "all_pids",
    "filled_pipe",
    "is_alive",
    "nothing",
    "start",
    "two_bells",
]

KILLED: Final = -int(signal.SIGKILL)

# What we say of a process whose exit code somebody else took: a failure, for certain.
_UNKNOWN_EXIT: Final = 255

# How long a pass of the sweep waits for those it killed before it looks again.
_SWEEP_PASS: Final = 0.1

# The most that is read at once: some 600 lines of the server, a fraction of a millisecond
# of work.
READ_SIZE: Final = 256 * 1024

# So many bytes a second the server never writes: it makes some 25 MB at 10,000 runs.
FASTEST: Final = 100e6


class Bell:
    """A descriptor that becomes readable when it is rung, and stays so."""

    def __init__(self) -> None:
        self.fd, self._ringing = os.pipe()
        os.set_blocking(self._ringing, False)

    def ring(self) -> None:
        os.write(self._ringing, b"!")

    def close(self) -> None:
        os.close(self.fd)
        os.close(self._ringing)


class Pipe:
    """The reading end of one of the server's pipes, for a thread that may block.

    One thread reads. :meth:`finish`, :meth:`hurry` and :meth:`close` are for any thread, at
    any moment: nothing is closed while somebody waits for it.

    :param bell: becomes the pipe's own
    :param capacity: how many bytes it holds
    """

    def __init__(self, pipe: IO[bytes], bell: Bell, capacity: int = 0) -> None:
        self._pipe = pipe
        self._bell = bell
        self._capacity = capacity
        self._lock = threading.Lock()
        # Free while there is a hurry. A plain lock: a signal handler may be in a hurry, too.
        self._hurry = threading.Lock()
        self._hurry.acquire()
        self._is_waiting = False
        self._is_finishing = False
        self._is_in_use = False
        self._is_closed = False
        self._is_released = False
        os.set_blocking(pipe.fileno(), False)
        self._poll = select.poll()
        self._poll.register(pipe.fileno(), select.POLLIN)
        self._poll.register(bell.fd, select.POLLIN)

    def read(self, timeout: float | None = None) -> bytes | None:
        """Wait for something to read, and return it; ``b""`` at the end.

        After :meth:`finish` it waits no more, and what is there comes before the end.

        :param timeout: for how many seconds to wait at most; None: for ever
        :returns: None if nothing came in time
        """
        with self._lock:
            if self._is_closed:
                return b""
            self._is_in_use = True
        try:
            return self._read(timeout)
        finally:
            self._leave()

    def is_empty(self) -> bool:
        """True if nothing is there, and somebody waits for more."""
        with self._lock:
            if self._is_closed:
                return True
            poll = select.poll()
            poll.register(self._pipe.fileno(), select.POLLIN)
            return self._is_waiting and not poll.poll(0)

    def rest(self) -> None:
        """Let lines gather for a moment in which it cannot get full."""
        if not self._is_finishing:
            self._hurry.acquire(timeout=self._capacity / FASTEST)

    def hurry(self) -> None:
        """End a :meth:`rest`, this one or the next."""
        with suppress(RuntimeError):  # there is a hurry already
            self._hurry.release()

    def finish(self) -> None:
        """Wait for nothing any more."""
        with self._lock:
            if not (self._is_finishing or self._is_closed):
                self._is_finishing = True
                self._bell.ring()
        self.hurry()

    def close(self) -> None:
        """Close it, or have the thread that is reading close it on its way out."""
        self.finish()
        with self._lock:
            self._is_closed = True
            if not self._is_in_use:
                self._release()

    def forget(self) -> None:
        """Close it in a forked child: no thread is in here, whatever the locks say."""
        self._lock = threading.Lock()
        self._is_finishing = self._is_closed = True
        self._release()

    def _leave(self) -> None:
        with self._lock:
            self._is_in_use = False
            if self._is_closed:
                self._release()

    def _release(self) -> None:
        if not self._is_released:
            self._is_released = True
            self._pipe.close()
            self._bell.close()

    def _read(self, timeout: float | None) -> bytes | None:
        while True:
            is_finishing = self._is_finishing
            try:
                return os.read(self._pipe.fileno(), READ_SIZE)
            except BlockingIOError:
                if is_finishing:
                    return b""
            except OSError as exc:
                # EIO is a pseudo-terminal's way to say that it ended.
                if exc.errno == errno.EIO:
                    return b""
                raise
            self._is_waiting = True
            ready = self._poll.poll(None if timeout is None else timeout * 1000)
            self._is_waiting = False  # before anything is read
            if not ready:
                return None


def start(binary: Path, command: Command, stdin: int) -> subprocess.Popen[bytes]:
    """Start ``binary`` in a new session, and close ``stdin``.

    To be called in a thread of ours, since the process inherits its mask of signals: a
    program that blocks SIGTERM, to wait for it, must not have a server that never hears
    it. While that is put right here, one that arrives just now could strike the program.
    """
    blocked = signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        return popen(
            [str(binary), *command.argv],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=dict(command.env),
            cwd=command.directory,
            pass_fds=command.keep_fds,
            start_new_session=True,
        )
    finally:
        if blocked:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        os.close(stdin)


@contextmanager
def two_bells() -> Iterator[tuple[Bell, Bell]]:
    """For the pipes of a process: there before the process is, closed if it is not."""
    with ExitStack() as made:
        bells = []
        for _ in range(2):
            bells.append(Bell())
            made.callback(bells[-1].close)
        yield bells[0], bells[1]
        made.pop_all()


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


def all_pids() -> list[int]:
    """Of all processes there are.

    :raises OSError: if the system does not tell: without /proc, or a descriptor for it
    """
    import psutil

    try:
        return psutil.pids()
    except IndexError:  # psutil takes it for granted that there is one, at least
        raise OSError(errno.ENOENT, "no processes are to be seen (no /proc?)") from None


def is_alive(pid: int) -> bool:
    """False for a zombie, and for nobody."""
    import psutil

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

    def __init__(
        self, process: subprocess.Popen[bytes], bells: tuple[Bell, Bell]
    ) -> None:
        assert process.stdout is not None and process.stderr is not None
        self._process = process
        self.pid = process.pid
        self.stdout = self._pipe(process.stdout, bells[0])
        self.stderr = self._pipe(process.stderr, bells[1])
        forget_in_child(self)

    def _pipe(self, pipe: IO[bytes], bell: Bell) -> Pipe:
        return Pipe(pipe, bell)

    @abstractmethod
    async def wait_exit(self) -> None: ...

    @abstractmethod
    def ended_workers(self) -> list[int]: ...

    @property
    def exposed(self) -> str | None:
        return "only on Linux can that be done"

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
        self.stdout.close()
        self.stderr.close()

    def forget(self) -> None:
        # In a forked child this is nobody's process: unreapable, and not to be signalled.
        self._process.returncode = _UNKNOWN_EXIT
        self.stdout.forget()
        self.stderr.forget()
        self.close()

    def _signal(self, number: signal.Signals) -> None:
        # Popen.send_signal would poll, and so reap, before the session is swept.
        if self._holds_its_pid():
            os.kill(self.pid, number)

    def _members(self, spare_leader: bool) -> list[int]:
        """The session's living processes; zombies only wait for their parents."""
        return [
            pid
            for pid in all_pids()
            if self._is_member(pid)
            and not (spare_leader and pid == self.pid)
            and is_alive(pid)
        ]

    def _is_member(self, pid: int) -> bool:
        try:
            return os.getsid(pid) == self.pid
        except OSError:
            return False
