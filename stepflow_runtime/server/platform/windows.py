"""A process on Windows: a job object around it and its workers, and threads that wait.

CI does not run this: it was written from the documentation, and the tests on Linux see its
calls made to a stand-in for kernel32. What differs from POSIX systems:

- The session is a job object. Its processes cannot leave it, and the system ends them all
  when the last handle of the job is closed: so also when our process ends, however it does.
  The process is created suspended and runs only when it is in the job.
- Its pid is its own for as long as ``Popen`` has a handle of it, and nobody else can take
  its exit code.
- There are no signals and no negative exit codes: what we killed has the code 137
  (``KILLED``), what a CTRL+BREAK ended 3221225786 (``STATUS_CONTROL_C_EXIT``).
- To ask a process to end is to send CTRL+BREAK to its group, which needs a console that we
  share with it. Without one, it is killed. The server (0.13) listens to CTRL+C alone, which
  cannot be sent to a group: a CTRL+BREAK ends it at once, and the workers, too.
- A process that has ended leaves nothing to look at: exit codes of workers cannot be had.
- A pipe cannot be waited for together with anything else: it is looked at, again and again.
"""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import IO, Any, Final

import psutil

from ...threads import run_abandonable
from ..options import Command

__all__ = ["KILLED", "Job", "Pipe", "WindowsChild", "spawn"]

# The code with which we end processes: what shells make of a SIGKILL.
KILLED: Final = 137

# Written out, since Python has them on Windows only, and one of them nowhere.
_CREATE_SUSPENDED: Final = 0x00000004
_CREATE_NEW_PROCESS_GROUP: Final = 0x00000200
_CREATE_NO_WINDOW: Final = 0x08000000
_CTRL_BREAK_EVENT: Final = 1

_PROCESS_TERMINATE: Final = 0x0001
_PROCESS_SET_QUOTA: Final = 0x0100
_PROCESS_QUERY_LIMITED_INFORMATION: Final = 0x1000

_BASIC_ACCOUNTING_INFORMATION: Final = 1
_BASIC_PROCESS_ID_LIST: Final = 3
_EXTENDED_LIMIT_INFORMATION: Final = 9
_LIMIT_KILL_ON_JOB_CLOSE: Final = 0x00002000

# How long the sweep waits for those it killed before it looks again.
_SWEEP_PASS: Final = 0.01

_READ_SIZE: Final = 65536
_LOOK_AGAIN: Final = 0.01


class Pipe:
    """As the one of POSIX systems. A pipe cannot be waited for, so it is looked at."""

    def __init__(self, kernel32: Any, pipe: IO[bytes]) -> None:
        self._kernel32 = kernel32
        self._pipe = pipe
        self._lock = threading.Lock()
        self._hurry = threading.Lock()
        self._hurry.acquire()
        self._is_waiting = False
        self._is_finishing = False
        self._is_closed = False

    def read(self, timeout: float | None = None) -> bytes | None:
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            is_finishing = self._is_finishing
            with self._lock:
                if self._is_closed:
                    return b""
                if waiting := self._count_waiting():
                    return os.read(self._pipe.fileno(), min(waiting, _READ_SIZE))
            if waiting is None or is_finishing:
                return b""
            if time.monotonic() >= deadline:
                return None
            self._is_waiting = True
            self._hurry.acquire(timeout=_LOOK_AGAIN)
            self._is_waiting = False  # before anything is read

    def is_empty(self) -> bool:
        with self._lock:
            return self._is_closed or (self._is_waiting and not self._count_waiting())

    def rest(self) -> None:
        """It is looked at from time to time anyway."""

    def hurry(self) -> None:
        with suppress(RuntimeError):  # there is a hurry already
            self._hurry.release()

    def finish(self) -> None:
        self._is_finishing = True
        self.hurry()

    def close(self) -> None:
        self.finish()
        with self._lock:
            self._is_closed = True
            self._pipe.close()

    def _count_waiting(self) -> int | None:
        """How many bytes there are to read; None at the pipe's end."""
        waiting = ctypes.c_uint32()
        handle = _handle_of(self._pipe.fileno())
        try:
            self._kernel32.PeekNamedPipe(
                handle, None, 0, None, ctypes.byref(waiting), None
            )
        except OSError:  # nobody is left who could write
            return None
        return waiting.value


def _handle_of(fd: int) -> int:
    msvcrt: Any = import_module("msvcrt")  # there is one on Windows only
    handle: int = msvcrt.get_osfhandle(fd)
    return handle


def spawn(binary: Path, command: Command) -> WindowsChild:
    """Start ``binary`` in a job of its own. Blocks for the time that this takes.

    :raises OSError: if it cannot be executed
    """
    kernel32 = _load_kernel32()
    job = Job(kernel32)
    try:
        # With a console of its own it would not hear us, and without one where we have
        # none either, a window would open.
        has_console = kernel32.GetConsoleWindow() is not None
        process = _spawn_suspended(binary, command, has_console)
        try:
            job.add(process.pid)
            _resume(process.pid)
        except BaseException:
            with process:  # nobody owns it yet
                process.kill()
            raise
    except BaseException:
        job.close()
        raise
    return WindowsChild(process, job, has_console)


def _spawn_suspended(
    binary: Path, command: Command, has_console: bool
) -> subprocess.Popen[bytes]:
    flags = _CREATE_SUSPENDED | _CREATE_NEW_PROCESS_GROUP
    stdin = None if command.stdin is None else _fed_pipe(command.stdin)
    try:
        return subprocess.Popen(
            [str(binary), *command.argv],
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=dict(command.env),
            cwd=command.directory,
            creationflags=flags if has_console else flags | _CREATE_NO_WINDOW,
        )
    finally:
        if stdin is not None:
            os.close(stdin)


def _resume(pid: int) -> None:
    try:
        psutil.Process(pid).resume()
    except psutil.Error as exc:
        raise OSError(f"process {pid} cannot be set going: {exc}") from exc


def _fed_pipe(content: bytes) -> int:
    """The reading end of a pipe that a thread writes ``content`` to.

    The thread is there first: after the spawn nothing may fail before somebody owns the
    process. It ends when all is read, or nobody is left who could read it.
    """
    reading, writing = os.pipe()
    feeder = threading.Thread(
        target=_feed,
        args=(writing, content),
        daemon=True,
        name="stepflow-runtime stdin",
    )
    try:
        feeder.start()
    except BaseException:
        os.close(reading)
        os.close(writing)
        raise
    return reading


def _feed(fd: int, content: bytes) -> None:
    with suppress(OSError):
        while content:
            content = content[os.write(fd, content) :]
    os.close(fd)


class WindowsChild:
    def __init__(
        self, process: subprocess.Popen[bytes], job: Job, has_console: bool
    ) -> None:
        assert process.stdout is not None and process.stderr is not None
        self._process = process
        self._job = job
        self._has_console = has_console
        self.pid = process.pid
        self.stdout = Pipe(job.kernel32, process.stdout)
        self.stderr = Pipe(job.kernel32, process.stderr)

    async def wait_exit(self) -> None:
        if self._process.poll() is None:
            await run_abandonable(self._process.wait)

    def terminate(self) -> None:
        if self._process.poll() is None and not self._break():
            self.kill()

    def kill(self) -> None:
        if self._process.poll() is None:
            self._job.kill(self.pid)

    def sweep(self, *, spare_leader: bool, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while left := self._kill_members(spare_leader):
            if time.monotonic() >= deadline:
                break
            time.sleep(_SWEEP_PASS)
        return left

    @property
    def exposed(self) -> str | None:
        return "only on Linux can that be done"

    def ended_workers(self) -> list[int]:
        return []

    def reap(self) -> int | None:
        return self._process.poll()

    def close(self) -> None:
        self._job.close()
        self.stdout.close()
        self.stderr.close()

    def _break(self) -> bool:
        return self._has_console and self._job.send_break(self.pid)

    def _kill_members(self, spare_leader: bool) -> int:
        """Kill them; return how many there were."""
        if not spare_leader:
            return self._job.kill_all()
        workers = [pid for pid in self._job.members() if pid != self.pid]
        for pid in workers:
            self._job.kill(pid)
        return len(workers)


class _BasicLimits(ctypes.Structure):
    _fields_ = (
        ("PerProcessUserTimeLimit", ctypes.c_int64),
        ("PerJobUserTimeLimit", ctypes.c_int64),
        ("LimitFlags", ctypes.c_uint32),
        ("MinimumWorkingSetSize", ctypes.c_size_t),
        ("MaximumWorkingSetSize", ctypes.c_size_t),
        ("ActiveProcessLimit", ctypes.c_uint32),
        ("Affinity", ctypes.c_size_t),
        ("PriorityClass", ctypes.c_uint32),
        ("SchedulingClass", ctypes.c_uint32),
    )


class _ExtendedLimits(ctypes.Structure):
    _fields_ = (
        ("BasicLimitInformation", _BasicLimits),
        ("IoInfo", ctypes.c_uint64 * 6),
        ("ProcessMemoryLimit", ctypes.c_size_t),
        ("JobMemoryLimit", ctypes.c_size_t),
        ("PeakProcessMemoryUsed", ctypes.c_size_t),
        ("PeakJobMemoryUsed", ctypes.c_size_t),
    )


class _Accounting(ctypes.Structure):
    _fields_ = (
        ("Times", ctypes.c_int64 * 4),
        ("TotalPageFaultCount", ctypes.c_uint32),
        ("TotalProcesses", ctypes.c_uint32),
        ("ActiveProcesses", ctypes.c_uint32),
        ("TotalTerminatedProcesses", ctypes.c_uint32),
    )


class _ProcessIds(ctypes.Structure):
    _fields_ = (
        ("NumberOfAssignedProcesses", ctypes.c_uint32),
        ("NumberOfProcessIdsInList", ctypes.c_uint32),
        # As many as one pass kills.
        ("ProcessIdList", ctypes.c_size_t * 1024),
    )


class Job:
    """A job object whose processes end with it. For any thread; empty when it is closed.

    :param kernel32: the library; its functions raise OSError when they fail
    """

    def __init__(self, kernel32: Any) -> None:
        self.kernel32 = kernel32
        # A number that was closed can be another job's: nobody uses it while it is closed.
        self._lock = threading.Lock()
        self._handle: int | None = kernel32.CreateJobObjectW(None, None)
        limits = _ExtendedLimits()
        limits.BasicLimitInformation.LimitFlags = _LIMIT_KILL_ON_JOB_CLOSE
        try:
            kernel32.SetInformationJobObject(
                self._handle,
                _EXTENDED_LIMIT_INFORMATION,
                ctypes.byref(limits),
                ctypes.sizeof(limits),
            )
        except BaseException:
            self.close()
            raise

    def add(self, pid: int) -> None:
        """Put a process into the job; its children will be in it, too.

        :raises OSError: if that fails
        """
        rights = _PROCESS_SET_QUOTA | _PROCESS_TERMINATE
        process = self.kernel32.OpenProcess(rights, False, pid)
        try:
            self.kernel32.AssignProcessToJobObject(self._handle, process)
        finally:
            self.kernel32.CloseHandle(process)

    def members(self) -> list[int]:
        """The pids of its processes, or of the first of them."""
        ids = _ProcessIds()
        with suppress(OSError):  # there are more
            self._query(_BASIC_PROCESS_ID_LIST, ids)
        return list(ids.ProcessIdList[: ids.NumberOfProcessIdsInList])

    def kill(self, pid: int) -> None:
        """Kill a process, if it is one of the job's."""
        rights = _PROCESS_TERMINATE | _PROCESS_QUERY_LIMITED_INFORMATION
        with self._lock, suppress(OSError):  # it has ended
            if self._handle is None:
                return
            # From here on the number is its own: a handle keeps it.
            process = self.kernel32.OpenProcess(rights, False, pid)
            try:
                is_member = ctypes.c_int(0)
                self.kernel32.IsProcessInJob(
                    process, self._handle, ctypes.byref(is_member)
                )
                if is_member.value:
                    self.kernel32.TerminateProcess(process, KILLED)
            finally:
                self.kernel32.CloseHandle(process)

    def kill_all(self) -> int:
        """Kill all its processes, which takes a moment; return how many there were."""
        accounting = _Accounting()
        self._query(_BASIC_ACCOUNTING_INFORMATION, accounting)
        with self._lock:
            if self._handle is not None and accounting.ActiveProcesses:
                self.kernel32.TerminateJobObject(self._handle, KILLED)
        return int(accounting.ActiveProcesses)

    def send_break(self, group: int) -> bool:
        """Send CTRL+BREAK to a process group of our console; False if that fails."""
        try:
            self.kernel32.GenerateConsoleCtrlEvent(_CTRL_BREAK_EVENT, group)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Let go of it, which ends those that are left in it."""
        with self._lock:
            handle, self._handle = self._handle, None
            if handle is not None:
                self.kernel32.CloseHandle(handle)

    def _query(self, kind: int, answer: ctypes.Structure) -> None:
        with self._lock:
            if self._handle is not None:
                self.kernel32.QueryInformationJobObject(
                    self._handle,
                    kind,
                    ctypes.byref(answer),
                    ctypes.sizeof(answer),
                    None,
                )


_HANDLE: Final = ctypes.c_void_p
_POINTER: Final = ctypes.c_void_p
_BOOL: Final = ctypes.c_int
_DWORD: Final = ctypes.c_uint32
_UINT: Final = ctypes.c_uint

# Without these, ctypes would cut handles and pointers to 32 bits.
_FALLIBLE: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "CreateJobObjectW": (_HANDLE, (_POINTER, ctypes.c_wchar_p)),
    "SetInformationJobObject": (_BOOL, (_HANDLE, _BOOL, _POINTER, _DWORD)),
    "QueryInformationJobObject": (_BOOL, (_HANDLE, _BOOL, _POINTER, _DWORD, _POINTER)),
    "PeekNamedPipe": (_BOOL, (_HANDLE, _POINTER, _DWORD, _POINTER, _POINTER, _POINTER)),
    "AssignProcessToJobObject": (_BOOL, (_HANDLE, _HANDLE)),
    "IsProcessInJob": (_BOOL, (_HANDLE, _HANDLE, _POINTER)),
    "TerminateJobObject": (_BOOL, (_HANDLE, _UINT)),
    "OpenProcess": (_HANDLE, (_DWORD, _BOOL, _DWORD)),
    "TerminateProcess": (_BOOL, (_HANDLE, _UINT)),
    "CloseHandle": (_BOOL, (_HANDLE,)),
    "GenerateConsoleCtrlEvent": (_BOOL, (_DWORD, _DWORD)),
}


def _load_kernel32() -> Any:
    """kernel32, with those of its functions that we call; they raise when they fail."""
    if sys.platform == "win32":
        kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
        for name, (restype, argtypes) in _FALLIBLE.items():
            function = getattr(kernel32, name)
            function.restype, function.argtypes = restype, argtypes
            function.errcheck = _check
        window = kernel32.GetConsoleWindow
        window.restype, window.argtypes = _HANDLE, ()
        return kernel32
    raise OSError("kernel32 is a library of Windows")


def _check(result: Any, function: Any, arguments: Any) -> Any:
    if sys.platform == "win32" and not result:
        raise ctypes.WinError(ctypes.get_last_error())
    return result
