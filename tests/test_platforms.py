"""What can be tried on Linux of macOS and Windows, with stand-ins for what only they have.

The stand-in for a kqueue is an epoll descriptor that holds pidfds: it, too, can be waited
for like a pipe, and says when a process has ended. All else of ``macos`` runs as it is.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import importlib
import os
import select
import signal
import tempfile
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import psutil
import pytest
from blockbuster import BlockBuster

from stepflow_runtime.server import process as process_module
from stepflow_runtime.server.options import MAX_CONFIG, Command
from stepflow_runtime.server.process import ServerProcess

from .conftest import each_backend, processes_left, wait_until

# Not by name: mypy knows nothing of them here.
macos: Any = importlib.import_module("stepflow_runtime.server.platform.macos")
windows: Any = importlib.import_module("stepflow_runtime.server.platform.windows")

COMMAND = Command(argv=(), env={"PATH": os.environ["PATH"]}, stdin=None)

pytestmark = pytest.mark.anyio

# -- macOS -----------------------------------------------------------------------------


class FakeKqueue:
    """Knows one filter: a process that ends. As the kernel's, not one that has ended."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._pidfds: list[int] = []

    def control(self, changes: list[SimpleNamespace], max_events: int) -> None:
        assert max_events == 0  # an event that is taken out is gone
        (event,) = changes
        assert (event.filter, event.flags, event.fflags) == ("PROC", "ADD", "EXIT")
        if psutil.Process(event.ident).status() == psutil.STATUS_ZOMBIE:
            raise ProcessLookupError(errno.ESRCH, "No such process")
        pidfd = os.pidfd_open(event.ident)
        self._pidfds.append(pidfd)
        self._epoll.register(pidfd, select.EPOLLIN)

    def fileno(self) -> int:
        return self._epoll.fileno()

    def close(self) -> None:
        self._epoll.close()
        while self._pidfds:
            os.close(self._pidfds.pop())


@pytest.fixture
def on_macos(monkeypatch: pytest.MonkeyPatch, blockbuster: BlockBuster) -> None:
    def kevent(ident: int, **what: str) -> SimpleNamespace:
        return SimpleNamespace(ident=ident, **what)

    kernel = SimpleNamespace(
        kqueue=FakeKqueue,
        kevent=kevent,
        KQ_FILTER_PROC="PROC",
        KQ_EV_ADD="ADD",
        KQ_NOTE_EXIT="EXIT",
    )
    blockbuster.deactivate()  # here psutil reads files, on macOS it asks sysctl
    monkeypatch.setattr(macos, "select", kernel)
    monkeypatch.setattr(process_module, "spawn", macos.spawn)


async def test_macos_the_end_is_noticed_and_not_reaped(
    on_macos: None, fake_server: Callable[[str], Path]
) -> None:
    process = await ServerProcess.spawn(fake_server("sleep 0.2; exit 3"), COMMAND)
    with anyio.move_on_after(0.02) as waited:
        await process.wait_exit()
    assert waited.cancelled_caught
    with anyio.fail_after(10):
        await process.wait_exit()
        await process.wait_exit()
    assert ended(process.pid)
    assert await process.end(lambda: 1) == 3
    process.close()


@each_backend
async def test_macos_one_that_has_ended_before_it_could_be_watched(
    on_macos: None, fake_server: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_and_wait(*args: Any) -> Any:
        process = start(*args)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        return process

    start = macos.start
    monkeypatch.setattr(macos, "start", start_and_wait)
    process = await ServerProcess.spawn(fake_server("exit 3"), COMMAND)
    with anyio.fail_after(10):
        await process.wait_exit()
    assert await process.end(lambda: 1) == 3
    process.close()


@each_backend
async def test_macos_the_session_is_swept_whole(
    on_macos: None, fake_server: Callable[[str], Path]
) -> None:
    script = fake_server(
        "trap '' TERM\nset -m\nsleep 100 &\n(sleep 100 &)\nsleep 100 &\nwhile :; do sleep 0.01; done"
    )
    process = await ServerProcess.spawn(script, COMMAND)
    await wait_until(lambda: len(processes_left()) >= 4)
    assert await process.end(lambda: 0.2) == -signal.SIGKILL
    assert processes_left() == []
    process.close()


@each_backend
async def test_macos_a_stranger_that_reaped_our_child_takes_its_code(
    on_macos: None, fake_server: Callable[[str], Path]
) -> None:
    process = await ServerProcess.spawn(fake_server("exit 3"), COMMAND)
    await process.wait_exit()
    os.waitpid(process.pid, os.WNOHANG)  # noqa: ASYNC222
    assert await process.end(lambda: 1) == 255
    process.close()


@each_backend
async def test_macos_a_pid_that_was_given_away_is_not_signalled(
    on_macos: None, fake_server: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = await ServerProcess.spawn(fake_server("exec sleep 100"), COMMAND)
    with monkeypatch.context() as patch:
        # As if the one of that number had been created at another time.
        patch.setattr(psutil.Process, "__eq__", lambda self, other: False)
        patch.setattr(os, "kill", lambda pid, number: pytest.fail("signalled"))
        process.kill()
        process.kill_session()
    os.kill(process.pid, signal.SIGKILL)
    await wait_until(lambda: ended(process.pid))
    assert await process.end(lambda: 0) == -signal.SIGKILL
    process.close()


def ended(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@each_backend
@pytest.mark.parametrize("size", [0, 100, 300_000, MAX_CONFIG])
async def test_macos_standard_input_is_what_was_given(
    on_macos: None, fake_server: Callable[[str], Path], tmp_path: Path, size: int
) -> None:
    """Out of a file without a name, where a pipe does not hold it."""
    directory = tmp_path / "tmp"
    directory.mkdir()
    content = os.urandom(size)
    command = Command(argv=(), env=COMMAND.env, stdin=content)
    script = fake_server(f"stat -Lc %A%h /proc/$$/fd/0; cat > {tmp_path}/copy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(directory))
        process = await ServerProcess.spawn(script, command)
    await process.wait_exit()
    kind = b"-rw-------0\n" if size > 65536 else b"prw-------1\n"
    assert process.stdout.read() == kind
    assert await process.end(lambda: 0) == 0
    assert (tmp_path / "copy").read_bytes() == content
    assert list(directory.iterdir()) == []
    process.close()


def test_macos_a_process_that_cannot_be_watched_is_not_left_behind(
    on_macos: None, fake_server: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: FakeKqueue, changes: object, max_events: int) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(FakeKqueue, "control", refuse)
    with pytest.raises(OSError, match="Cannot allocate"):
        macos.spawn(fake_server("exec sleep 100"), COMMAND)


# -- Windows ---------------------------------------------------------------------------

JOB, FIRST_PROCESS = 1000, 2000


class FakeKernel32:
    """Processes in a job, as numbers; every handle is accounted for."""

    def __init__(self, members: tuple[int, ...] = (), failing: str = "") -> None:
        self.members = list(members)
        self.strangers = [77]
        self.calls: list[str] = []
        self.handles: set[int] = set()
        self.limits = 0
        self._failing = failing

    def _called(self, name: str) -> int:
        self.calls.append(name)
        if name == self._failing:
            raise OSError(5, "Access is denied")
        return 1

    def CreateJobObjectW(self, security: None, name: None) -> int:
        self._called("CreateJobObjectW")
        self.handles.add(JOB)
        return JOB

    def SetInformationJobObject(
        self, job: int, kind: int, pointer: Any, size: int
    ) -> int:
        assert (job, kind, size) == (JOB, 9, 144)
        self.limits = pointer._obj.BasicLimitInformation.LimitFlags
        return self._called("SetInformationJobObject")

    def OpenProcess(self, rights: int, inherit: bool, pid: int) -> int:
        self._called("OpenProcess")
        if pid not in [*self.members, *self.strangers]:
            raise OSError(87, "The parameter is incorrect")
        self.handles.add(FIRST_PROCESS + pid)
        return FIRST_PROCESS + pid

    def AssignProcessToJobObject(self, job: int, process: int) -> int:
        assert {job, process} <= self.handles
        self._called("AssignProcessToJobObject")
        self.strangers.remove(process - FIRST_PROCESS)
        self.members.append(process - FIRST_PROCESS)
        return 1

    def QueryInformationJobObject(
        self, job: int, kind: int, pointer: Any, size: int, length: None
    ) -> int:
        assert job in self.handles and size == ctypes.sizeof(pointer._obj)
        if kind == 1:
            assert size == 48
            pointer._obj.ActiveProcesses = len(self.members)
            return self._called("QueryInformationJobObject")
        assert kind == 3
        room = len(pointer._obj.ProcessIdList)
        listed = self.members[:room]
        pointer._obj.NumberOfAssignedProcesses = len(self.members)
        pointer._obj.NumberOfProcessIdsInList = len(listed)
        pointer._obj.ProcessIdList[: len(listed)] = listed
        if len(listed) < len(self.members):
            raise OSError(234, "More data is available")
        return 1

    def IsProcessInJob(self, process: int, job: int, pointer: Any) -> int:
        assert {job, process} <= self.handles
        pointer._obj.value = process - FIRST_PROCESS in self.members
        return self._called("IsProcessInJob")

    def TerminateProcess(self, process: int, code: int) -> int:
        assert process in self.handles and code == windows.KILLED
        self.members.remove(process - FIRST_PROCESS)
        return self._called("TerminateProcess")

    def TerminateJobObject(self, job: int, code: int) -> int:
        assert job in self.handles and code == windows.KILLED
        self.members.clear()
        return self._called("TerminateJobObject")

    def GenerateConsoleCtrlEvent(self, event: int, group: int) -> int:
        assert (event, group) == (1, 7)
        return self._called("GenerateConsoleCtrlEvent")

    def CloseHandle(self, handle: int) -> int:
        self.handles.remove(handle)
        return self._called("CloseHandle")


class FakePopen:
    """Process 7: alive as long as the job says so."""

    pid = 7
    stdout = stderr = SimpleNamespace(fileno=lambda: -1, close=lambda: None)

    def __init__(self, kernel32: FakeKernel32) -> None:
        self._kernel32 = kernel32

    def poll(self) -> int | None:
        return None if self.pid in self._kernel32.members else windows.KILLED


def windows_child(kernel32: FakeKernel32, has_console: bool = True) -> Any:
    child = windows.WindowsChild(
        FakePopen(kernel32), windows.Job(kernel32), has_console
    )
    kernel32.calls.clear()
    return child


@pytest.mark.parametrize("failing", ["", "AssignProcessToJobObject", "resume"])
@pytest.mark.parametrize("window", [None, 1])
def test_windows_it_runs_when_it_is_in_the_job(
    monkeypatch: pytest.MonkeyPatch, window: int | None, failing: str
) -> None:
    """Not before: or its first workers would not be in it."""

    class Suspended(FakePopen):
        def __init__(self, argv: list[str], **options: Any) -> None:
            super().__init__(kernel32)
            kernel32.calls.append(f"Popen {options['creationflags']:#x}")

        def __enter__(self) -> None:
            pass

        def __exit__(self, *exc_info: object) -> None:
            kernel32.calls.append("wait")

        def kill(self) -> None:
            kernel32.calls.append("kill")

    def resume() -> None:
        kernel32.calls.append("resume")
        if failing == "resume":
            raise psutil.AccessDenied(7)

    kernel32: Any = FakeKernel32(failing=failing)
    kernel32.strangers = [7]
    kernel32.GetConsoleWindow = lambda: window
    library = SimpleNamespace(Popen=Suspended, PIPE=-1, DEVNULL=-3)
    monkeypatch.setattr(windows, "subprocess", library)
    monkeypatch.setattr(windows, "_load_kernel32", lambda: kernel32)
    monkeypatch.setattr(psutil, "Process", lambda pid: SimpleNamespace(resume=resume))
    if failing:
        with pytest.raises(OSError, match="denied|set going"):
            windows.spawn(Path("server"), COMMAND)
        assert kernel32.calls[-3:] == ["kill", "wait", "CloseHandle"]
        assert kernel32.handles == set()
    else:
        windows.spawn(Path("server"), COMMAND)
        assert kernel32.calls[2:] == [
            "Popen 0x8000204" if window is None else "Popen 0x204",
            "OpenProcess",
            "AssignProcessToJobObject",
            "CloseHandle",
            "resume",
        ]


def test_windows_a_job_ends_with_its_last_handle() -> None:
    kernel32 = FakeKernel32()
    job = windows.Job(kernel32)
    job.add(77)
    assert kernel32.limits == 0x2000
    assert job.members() == [77]
    job.close()
    job.close()
    assert kernel32.calls == [
        "CreateJobObjectW",
        "SetInformationJobObject",
        "OpenProcess",
        "AssignProcessToJobObject",
        "CloseHandle",
        "CloseHandle",
    ]
    assert kernel32.handles == set()


def test_windows_a_job_that_cannot_be_made_leaves_no_handle() -> None:
    kernel32 = FakeKernel32(failing="SetInformationJobObject")
    with pytest.raises(OSError, match="denied"):
        windows.Job(kernel32)
    assert kernel32.handles == set()


def test_windows_a_process_that_cannot_be_added_leaves_no_handle() -> None:
    kernel32 = FakeKernel32(failing="AssignProcessToJobObject")
    job = windows.Job(kernel32)
    with pytest.raises(OSError, match="denied"):
        job.add(77)
    job.close()
    assert kernel32.handles == set()


def test_windows_only_members_are_killed() -> None:
    """Between the list and the kill a pid may have been given to somebody else."""
    kernel32 = FakeKernel32(members=(7,))
    job = windows.Job(kernel32)
    for pid in (77, 4711):  # a stranger; nobody
        job.kill(pid)
    assert "TerminateProcess" not in kernel32.calls
    job.kill(7)
    assert "TerminateProcess" in kernel32.calls
    assert kernel32.handles == {JOB}


def test_windows_a_sweep_takes_all_or_all_but_the_leader() -> None:
    kernel32 = FakeKernel32(members=(7, *range(5000, 6500)))  # more than one list holds
    child = windows_child(kernel32)
    assert child.sweep(spare_leader=True, timeout=5) == 0
    assert kernel32.members == [7]
    assert "TerminateJobObject" not in kernel32.calls
    assert child.sweep(spare_leader=False, timeout=5) == 0
    assert kernel32.members == []
    child.close()
    assert child.sweep(spare_leader=False, timeout=5) == 0
    assert kernel32.handles == set()


def test_windows_a_sweep_of_what_cannot_be_killed_is_bounded() -> None:
    kernel32 = FakeKernel32(members=(7, 8, 9), failing="IsProcessInJob")
    assert windows_child(kernel32).sweep(spare_leader=True, timeout=0.05) == 2


@pytest.mark.parametrize(
    ("has_console", "failing", "called", "killed"),
    [
        (True, "", "GenerateConsoleCtrlEvent", False),
        (True, "GenerateConsoleCtrlEvent", "TerminateProcess", True),
        (False, "", "TerminateProcess", True),
    ],
)
def test_windows_who_cannot_be_asked_is_killed(
    has_console: bool, failing: str, called: str, killed: bool
) -> None:
    kernel32 = FakeKernel32(members=(7, 8), failing=failing)
    child = windows_child(kernel32, has_console)
    child.terminate()
    assert called in kernel32.calls
    assert kernel32.members == ([8] if killed else [7, 8])
    assert child.reap() == (137 if killed else None)
    kernel32.members.clear()
    kernel32.calls.clear()
    child.terminate()
    child.kill()
    assert kernel32.calls == []


@pytest.fixture
def windows_pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Any]]:
    """Makes the Pipe of Windows for a descriptor, which stands for its handle, too."""
    made = []

    class Kernel32:
        def PeekNamedPipe(
            self, fd: int, buffer: None, size: int, read: None, waiting: Any, left: None
        ) -> int:
            count = array.array("i", [0])
            fcntl.ioctl(fd, termios.FIONREAD, count)
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            if not count[0] and any(what & select.POLLHUP for _, what in poll.poll(0)):
                raise OSError(109, "The pipe has been ended")
            waiting._obj.value = count[0]
            return 1

    def make(fd: int) -> Any:
        made.append(windows.Pipe(Kernel32(), os.fdopen(fd, "rb", buffering=0)))
        return made[-1]

    monkeypatch.setattr(windows, "_handle_of", lambda fd: fd)
    yield make
    for pipe in made:
        pipe.close()


def test_windows_pipes_are_filled_by_threads_and_looked_at(
    windows_pipe: Callable[[int], Any],
) -> None:
    content = os.urandom(MAX_CONFIG)
    pipe = windows_pipe(windows._fed_pipe(content))
    assert b"".join(iter(pipe.read, b"")) == content


def test_windows_a_hurry_makes_nobody_spin(
    windows_pipe: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    pipe = windows_pipe(reading)
    looks = 0
    count = pipe._count_waiting

    def look() -> int | None:
        nonlocal looks
        looks += 1
        waiting: int | None = count()
        return waiting

    monkeypatch.setattr(pipe, "_count_waiting", look)
    pipe.hurry()
    assert pipe.read(0.1) is None
    assert looks <= 15
    os.close(writing)


def test_windows_a_pipe_is_read_until_time_is_up_or_it_is_to_finish(
    windows_pipe: Callable[[int], Any],
) -> None:
    reading, writing = os.pipe()
    pipe = windows_pipe(reading)
    assert pipe.read(0.02) is None
    os.write(writing, b"x")
    assert pipe.read() == b"x"
    os.write(writing, b"last")
    pipe.finish()
    assert pipe.read() == b"last"
    assert pipe.read() == b""
    pipe.close()
    assert pipe.read() == b""
    os.close(writing)


@each_backend
async def test_windows_nobody_reads_what_was_to_be_handed_over() -> None:
    """The server has ended, or could not be started: the thread ends, too."""
    os.close(windows._fed_pipe(os.urandom(MAX_CONFIG)))
    await wait_until(lambda: "stepflow-runtime stdin" not in thread_names())


def thread_names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]
