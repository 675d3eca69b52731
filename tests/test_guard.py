"""When Python is killed, the guard ends its servers; and else it leaves nothing behind.

On real processes: programs that spawn marked ones and are killed in the middle of it.
"""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepflow_runtime.server import guard, keeper
from stepflow_runtime.server.guard import MARK, Process, condemn, victims

from .conftest import open_descriptors

T = TypeVar("T")

PRELUDE = """
import os, signal, subprocess, sys, threading, time
from stepflow_runtime.server import keeper
from stepflow_runtime.server.guard import MARK

def spawn(mark, *argv, **options):
    env = {**os.environ, MARK: mark}
    return subprocess.Popen(argv, env=env, start_new_session=True, **options)

def say(*words):
    print(*words, flush=True)
"""

# A worker; one with a clean environment; one in a process group of its own; and one in
# a session of its own; then the server itself.
SERVER = (
    "sleep 1001 & env -i sleep 1002 & sh -c 'set -m; sleep 1003 & wait' & setsid sleep 1004 & "
    "exec sleep 1000"
)

SERVE = f"""
mark = keeper.acquire()
spawn(mark, "sh", "-c", {SERVER!r})
say(mark)
"""

FOREVER = "\nsys.stdin.read()\n"


class Program:
    """A Python program, until the test ends."""

    def __init__(self, source: str, *options: str) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, *options, "-c", PRELUDE + source],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.process = psutil.Process(self.popen.pid)

    def hear(self) -> str:
        assert self.popen.stdout is not None
        line = b""
        while not line.endswith(b"\n"):  # by bytes: select knows of no buffer
            assert select.select([self.popen.stdout], [], [], 15)[0]
            byte = os.read(self.popen.stdout.fileno(), 1)
            assert byte, "it has ended"
            line += byte
        return line.decode().strip()

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()

    def descendants(self) -> list[psutil.Process]:
        return list(self.process.children(recursive=True))

    def guard(self) -> psutil.Process:
        return until(lambda: [*filter(is_guard, self.descendants())])[0]

    def sleepers(self, *seconds: int) -> list[psutil.Process]:
        """Those of its descendants that sleep so long, once all are there."""

        def all_of_them() -> list[psutil.Process]:
            found = [
                each
                for each in self.descendants()
                if words(each) in [["sleep", str(number)] for number in seconds]
            ]
            return found if len(found) == len(seconds) else []

        return until(all_of_them)

    def server(self) -> list[psutil.Process]:
        return self.sleepers(1000, 1001, 1002, 1003, 1004)


@pytest.fixture
def run() -> Iterator[Callable[..., Program]]:
    programs: list[Program] = []

    def start(source: str, *options: str) -> Program:
        programs.append(Program(source, *options))
        return programs[-1]

    yield start
    for program in programs:
        program.kill()
    until(_kill_descendants)  # they hold the ends of the pipes
    for program in programs:
        program.popen.communicate()


def _kill_descendants() -> bool:
    left = [each for each in psutil.Process().children(recursive=True) if alive(each)]
    for each in left:
        with suppress(psutil.Error):
            each.kill()
    return not left


def until(condition: Callable[[], T]) -> T:
    deadline = time.monotonic() + 15
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
    return value


def words(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return list(process.cmdline())
    return []


def is_guard(process: psutil.Process) -> bool:
    return str(keeper._PROGRAM) in words(process)


def is_at_its_post(process: psutil.Process) -> bool:
    """True when a guard's interpreter is up, and it ignores what it has to."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    ignored = int(status.split("SigIgn:")[1].split()[0], 16)
    return bool(ignored >> (signal.SIGTERM - 1) & 1)


def alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def assert_gone(processes: list[psutil.Process], within: float = 10) -> None:
    deadline = time.monotonic() + within
    while left := [each for each in processes if alive(each)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.005)


def marked_processes(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if alive(process) and process.environ().get(MARK) == mark:
                found.append(process)
    return found


@pytest.fixture
def sleeper() -> Iterator[psutil.Process]:
    """Somebody else: an unmarked process, in a session of its own."""
    popen = subprocess.Popen(["sleep", "2000"], start_new_session=True)
    yield psutil.Process(popen.pid)
    popen.kill()
    popen.wait()


# -- Python is gone --------------------------------------------------------------------


def test_a_killed_program_leaves_nothing_of_its_servers(
    run: Callable[..., Program], sleeper: psutil.Process
) -> None:
    program = run(
        SERVE
        + """
subprocess.Popen(["sleep", "3001"])
subprocess.Popen(["sleep", "3002"], start_new_session=True)
spawn("another mark", "sleep", "3003")
spawn(mark + "0", "sleep", "3004")
"""
        + FOREVER
    )
    program.hear()
    server = program.server()
    clean = next(each for each in server if words(each)[1] == "1002")
    assert clean.environ() == {}
    assert len({os.getsid(each.pid) for each in server}) == 2
    bystanders = program.sleepers(3001, 3002, 3003, 3004)
    watching = program.guard()
    program.kill()
    assert_gone([*server, watching], within=5)
    assert all(map(alive, [*bystanders, sleeper]))


@pytest.mark.parametrize("how", ["os._exit(3)", "os.abort()", "sys.exit()", ""])
def test_so_does_one_that_ends_otherwise(run: Callable[..., Program], how: str) -> None:
    program = run(SERVE + "sys.stdin.readline()\n" + how)
    program.hear()
    server = program.server()
    program.popen.communicate("\n")
    assert_gone(server)


def test_killed_while_it_spawns(run: Callable[..., Program]) -> None:
    """Whatever moment it is, nobody who was being spawned is left."""
    for _ in range(2):
        program = run(
            """
mark = keeper.acquire()
def storm():
    while True:
        spawn(mark, "sh", "-c", "sleep 1 & env -i sleep 1005 & exec sleep 1000")
for _ in range(4):
    threading.Thread(target=storm, daemon=True).start()
say(mark)
"""
            + FOREVER
        )
        mark = program.hear()
        watching = program.guard()
        time.sleep(random.uniform(0.01, 0.1))
        program.kill()
        assert_gone([watching], within=20)
        assert marked_processes(mark) == []
        orphans = psutil.Process().children(recursive=True)
        assert [each for each in orphans if alive(each)] == []


def test_a_child_that_had_not_executed_its_program_yet(
    run: Callable[..., Program],
) -> None:
    program = run(
        """
mark = keeper.acquire()
if os.fork() == 0:
    os.setsid()
    say(os.getpid())
    time.sleep(0.5)
    os.execvpe("sleep", ["sleep", "1000"], {**os.environ, MARK: mark})
"""
        + FOREVER,
        "-Wignore",
    )
    child = psutil.Process(int(program.hear()))
    program.kill()
    assert_gone([child])


def test_a_program_that_executes_another_one(run: Callable[..., Program]) -> None:
    program = run(
        SERVE + "sys.stdin.readline()\n" + 'os.execvp("sleep", ["sleep", "1009"])\n'
    )
    program.hear()
    server = program.server()
    assert program.popen.stdin is not None
    program.popen.stdin.write("\n")
    program.popen.stdin.flush()
    assert_gone(server)
    assert words(program.process) == ["sleep", "1009"]


@pytest.mark.parametrize(
    "custom",
    [
        pytest.param("", id="a child of os.fork"),
        # Without a shell the guard's Python waits itself, and for more than the pipe.
        pytest.param(
            "keeper._WAITING = ('/no/shell',)\nos.dup(keeper._keeper._pipe)\n",
            id="a child that no hook reached, and no shell",
        ),
    ],
)
def test_a_forked_child_delays_nothing(
    run: Callable[..., Program], custom: str
) -> None:
    program = run(
        custom.partition("\n")[0]
        + SERVE
        + custom.partition("\n")[2]
        + """
if os.fork() == 0:
    say(os.getpid())
"""
        + FOREVER,
        "-Wignore",
    )
    program.hear()
    forked = psutil.Process(int(program.hear()))
    server = program.server()
    program.kill()
    assert_gone(server)
    assert alive(forked)


def test_each_guard_minds_its_own(run: Callable[..., Program]) -> None:
    first, second = run(SERVE + FOREVER), run(SERVE + FOREVER)
    assert first.hear() != second.hear()
    server, other_server = first.server(), second.server()
    watching = first.guard()
    first.kill()
    assert_gone([*server, watching])
    assert all(map(alive, [*other_server, second.guard()]))
    second.kill()
    assert_gone(other_server)


def test_a_program_inside_of_a_server(run: Callable[..., Program]) -> None:
    """Its guard does not carry the outer mark, and so can do its work."""
    inner = PRELUDE + SERVE + FOREVER
    program = run(
        "mark = keeper.acquire()\n"
        f"spawn(mark, sys.executable, '-c', {inner!r}, stdin=subprocess.PIPE)\n"
        + FOREVER
    )
    program.hear()
    server = program.server()
    until(lambda: len([*filter(is_guard, program.descendants())]) == 2)
    guards = [*filter(is_guard, program.descendants())]
    program.kill()
    assert_gone(server)
    assert_gone(guards)


def test_a_worker_whose_main_thread_has_ended(run: Callable[..., Program]) -> None:
    """It looks like a zombie, and shows no environment; but it goes on."""
    worker = (
        "import ctypes, threading, time\n"
        "threading.Thread(target=time.sleep, args=(1000,)).start()\n"
        "ctypes.CDLL(None).pthread_exit(None)"
    )
    program = run(
        "mark = keeper.acquire()\n"
        f"member = [sys.executable, '-c', {worker!r}]\n"
        "spawn(mark, 'sh', '-c', '\"$@\" & exec sleep 1000', 'sh', *member)\n" + FOREVER
    )
    [server] = program.sleepers(1000)
    [member] = until(server.children)
    until(lambda: member.status() == psutil.STATUS_ZOMBIE)
    assert member.num_threads() == 2
    tasks = Path(f"/proc/{member.pid}/task")
    program.kill()
    until(lambda: not tasks.exists() or len(os.listdir(tasks)) < 2)


def test_a_guard_that_is_too_late(sleeper: psutil.Process) -> None:
    """Its Python was gone before it could look, and somebody holds the pipe."""
    mark = uuid.uuid4().hex
    marked = subprocess.Popen(
        ["sleep", "1000"], env={MARK: mark}, start_new_session=True
    )
    late = subprocess.Popen(
        [sys.executable, "-IS", str(keeper._PROGRAM), mark, str(sleeper.pid)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    assert marked.wait(5) == -signal.SIGKILL
    late.communicate()
    assert late.returncode == 0
    assert alive(sleeper)


def test_a_guard_that_runs_under_its_own_mark() -> None:
    """It neither kills itself nor its session."""
    mark = uuid.uuid4().hex
    end = subprocess.run(
        [sys.executable, "-IS", str(keeper._PROGRAM), mark, str(os.getpid())],
        stdin=subprocess.DEVNULL,
        env={MARK: mark},
        start_new_session=True,
        timeout=10,
        check=False,
    )
    assert end.returncode == 0


def test_a_pid_that_is_somebody_elses_by_now(sleeper: psutil.Process) -> None:
    [seen] = guard._look("", sleeper.pid)
    assert (seen.pid, seen.session) == (sleeper.pid, sleeper.pid)
    assert seen.alive and not seen.marked
    earlier = Process(seen.pid, seen.session, "earlier", seen.alive, seen.marked)
    guard._kill(earlier, "")
    time.sleep(0.05)
    assert alive(sleeper)
    guard._kill(seen, "")
    assert_gone([sleeper])


def test_without_pidfds(
    monkeypatch: pytest.MonkeyPatch, sleeper: psutil.Process
) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    [seen] = guard._look("", sleeper.pid)
    guard._kill(seen, "")
    assert_gone([sleeper])


# -- the guard is gone -----------------------------------------------------------------


@pytest.mark.parametrize(
    "custom",
    [
        "",
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
        """
def reap_all():
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            time.sleep(0.001)
threading.Thread(target=reap_all, daemon=True).start()
""",
    ],
    ids=["", "SIGCHLD ignored", "stray waitpid"],
)
def test_a_killed_guard_is_replaced(run: Callable[..., Program], custom: str) -> None:
    program = run(custom + SERVE + FOREVER)
    mark = program.hear()
    server = program.server()
    for _ in range(3):
        watching = program.guard()
        assert mark in words(watching)
        watching.kill()
        assert_gone([watching])
    watching = program.guard()
    assert mark in words(watching)
    program.kill()
    assert_gone([*server, watching])


def test_a_guard_outlives_killall(run: Callable[..., Program]) -> None:
    program = run(SERVE + FOREVER)
    program.hear()
    server = program.server()
    watching = program.guard()
    until(lambda: is_at_its_post(watching))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        watching.send_signal(number)
    program.process.terminate()
    program.popen.wait()
    assert_gone(server)
    assert_gone([watching])


def test_a_guard_that_cannot_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    program = tmp_path / "guard.py"
    program.write_text("raise SystemExit")
    monkeypatch.setattr(keeper, "_PROGRAM", program)
    monkeypatch.setattr(keeper, "_WAITING", ("/no/shell",))
    monkeypatch.setattr(keeper, "_BACKOFF", 0.01)
    ours = keeper._Keeper()
    mark = ours.acquire()
    until(lambda: caplog.records)
    assert ours._pid is None
    assert ours.acquire() == mark  # tries again, in vain
    until(lambda: ours._watcher is None)
    ours.release()
    ours.release()
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "it ended at once" in record.getMessage()


def _no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "_PROGRAM", Path("/archive.zip/guard.py"))


def _no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/there/is/no/python3")


def _no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "")


def _another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/usr/bin/uwsgi")


def _frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)


@pytest.mark.parametrize(
    "prevent",
    [
        _no_program,
        _no_process,
        _no_interpreter,
        _another_program,
        _frozen,
    ],
)
def test_where_no_guard_can_be_had(
    prevent: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ours = keeper._Keeper()
    with monkeypatch.context() as patch:
        prevent(patch)
        mark = ours.acquire()
        assert ours.acquire() == mark
    assert len(mark) == 32
    [record] = caplog.records
    assert "are left behind, because" in record.getMessage()
    assert ours.acquire() == mark  # it can be had again
    assert ours._pid is not None
    for _ in range(3):
        ours.release()
    assert ours._pid is None


def test_without_a_thread_there_is_a_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    ours = keeper._Keeper()
    ours.acquire()
    pid = ours._pid
    assert pid is not None
    ours.release()
    assert not psutil.pid_exists(pid)


# -- nobody needs it any more ----------------------------------------------------------


def our_guards() -> list[psutil.Process]:
    return [each for each in psutil.Process().children() if alive(each)]


def test_there_is_one_as_long_as_anybody_needs_it() -> None:
    mark = keeper.acquire()
    [watching] = our_guards()
    assert keeper.acquire() == mark
    keeper.release()
    assert our_guards() == [watching]
    keeper.release()
    assert our_guards() == []
    keeper.release()  # one too many
    assert keeper.acquire() != mark
    keeper.release()


def test_a_stopped_guard_ends_too() -> None:
    keeper.acquire()
    [watching] = our_guards()
    watching.suspend()
    keeper.release()
    assert our_guards() == []


def test_fifty_times_leave_nothing() -> None:
    threads, descriptors = threading.enumerate(), open_descriptors()
    for _ in range(50):
        keeper.acquire()
        keeper.release()
        assert threading.enumerate() == threads
        assert psutil.Process().children() == []
    assert open_descriptors() == descriptors


def test_from_many_threads() -> None:
    threads, descriptors = threading.enumerate(), open_descriptors()

    def use(_: int) -> None:
        mark = keeper.acquire()
        assert any(mark in words(each) for each in our_guards())
        assert keeper.acquire() == mark
        keeper.release()
        keeper.release()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(200)))
    until(lambda: threading.enumerate() == threads)
    assert open_descriptors() == descriptors
    assert psutil.Process().children() == []


def test_a_release_while_guards_are_being_killed() -> None:
    over = threading.Event()

    def kill_guards() -> None:
        while not over.is_set():
            for each in our_guards():
                with suppress(psutil.Error):
                    each.kill()

    threads = threading.enumerate()
    killer = threading.Thread(target=kill_guards)
    killer.start()
    try:
        for _ in range(50):
            keeper.acquire()
            time.sleep(random.uniform(0, 0.02))
            keeper.release()
    finally:
        over.set()
        killer.join()
    assert threading.enumerate() == threads
    assert psutil.Process().children() == []


def test_a_guard_that_ends_just_as_it_is_released_is_not_replaced() -> None:
    ours = keeper._Keeper()
    ours.acquire()
    pid, over = ours._pid, ours._over
    assert pid is not None
    ours.release()
    assert ours._replace(pid, over, 0) is None
    ours.acquire()
    assert ours._replace(pid, over, 0) is None  # nor is the next one touched
    assert len(our_guards()) == 1
    ours.release()


@pytest.mark.parametrize(
    "late",
    [
        "keeper.acquire()",
        "keeper.acquire(); atexit.register(keeper.release)",
        "atexit.register(keeper.acquire)",
        "atexit.register(lambda: (keeper.acquire(), keeper.release()))",
        "keeper.acquire(); held = Held()",
        "held = Held(); held.use = (keeper.acquire, keeper.release)",
    ],
)
def test_the_end_of_the_interpreter(run: Callable[..., Program], late: str) -> None:
    program = run(
        """
import atexit
class Held:
    use = (keeper.release,)
    def __del__(self):
        for function in self.use:
            function()
"""
        + late,
        "-Xdev",
    )
    _, errors = program.popen.communicate(timeout=15)
    assert program.popen.returncode == 0
    assert errors == ""


# -- a fork ----------------------------------------------------------------------------


def test_a_forked_child_begins_anew(run: Callable[..., Program]) -> None:
    program = run(
        """
mark = keeper.acquire()
pipe = os.stat(keeper._keeper._pipe).st_ino
child = os.fork()
if child == 0:
    keeper.forget()
    held = [os.fstat(int(fd)).st_ino for fd in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{fd}")]
    assert pipe not in held
    keeper.release()  # what it inherited
    assert keeper.acquire() != mark
    own = keeper._keeper._pid
    assert own is not None
    keeper.release()
    assert keeper._keeper._pid is None
    assert not os.path.exists(f"/proc/{own}")
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
assert keeper.acquire() == mark
assert len(keeper._keeper._mark) == 32
os.kill(keeper._keeper._pid, 0)
keeper.release()
keeper.release()
""",
        "-Xdev",
        "-Wignore::DeprecationWarning",
    )
    _, errors = program.popen.communicate(timeout=15)
    assert errors == ""
    assert program.popen.returncode == 0


# -- who is killed ---------------------------------------------------------------------

OWN = 7


def process(
    pid: int,
    session: int,
    *,
    born: str = "1",
    alive: bool = True,
    marked: bool = False,
) -> Process:
    return Process(pid, session, born, alive, marked)


def killed(processes: list[Process], condemned: dict[int, str]) -> list[int]:
    return [each.pid for each in victims(processes, condemned, OWN)]


def test_a_session_is_condemned_with_its_leader() -> None:
    processes = [process(2, 2, marked=True), process(3, 2), process(4, 4)]
    condemned = condemn(processes, {})
    assert condemned == {2: "1"}
    assert killed(processes, condemned) == [2, 3]


@pytest.mark.parametrize(
    "leader", [[], [process(2, 2, alive=False)], [process(2, 2)]], ids=len
)
def test_it_stays_condemned_when_the_leader_is_gone(leader: list[Process]) -> None:
    """Gone; a zombie; or just dying, when it cannot show its mark any more."""
    assert condemn([*leader, process(3, 2)], {2: "1"}) == {2: "1"}


def test_it_does_not_when_its_number_is_given_to_another() -> None:
    assert condemn([process(2, 2, born="9"), process(3, 2)], {2: "1"}) == {}
    assert condemn([process(9, 9)], {2: "1"}) == {}  # empty: so it can be given


def test_a_server_with_the_number_of_another() -> None:
    again = [process(2, 2, born="9", marked=True), process(3, 2)]
    assert condemn(again, {2: "1"}) == {2: "9"}


def test_a_server_that_has_crashed_before() -> None:
    """The marked worker tells whose session it is."""
    assert condemn([process(3, 2, marked=True), process(4, 2)], {}) == {2: ""}
    zombie = process(2, 2, alive=False)
    assert condemn([zombie, process(3, 2, marked=True)], {}) == {2: "1"}


def test_a_marked_process_in_somebody_elses_session() -> None:
    processes = [process(2, 2), process(3, 2, marked=True), process(4, 2)]
    assert condemn(processes, {}) == {}
    assert killed(processes, {}) == [3]


def test_the_session_whose_leader_is_out_of_sight() -> None:
    processes = [process(3, 0, marked=True), process(4, 0)]
    assert condemn(processes, {}) == {}
    assert killed(processes, {}) == [3]


processes_ = st.lists(
    st.builds(
        Process,
        st.integers(1, 9),
        st.integers(0, 9),
        st.sampled_from(["1", "2"]),
        st.booleans(),
        st.booleans(),
    ),
    max_size=9,
    unique_by=lambda each: each.pid,
)


@given(st.lists(processes_, min_size=1, max_size=4))
def test_nobody_else_is_ever_killed(looks: list[list[Process]]) -> None:
    condemned: dict[int, str] = {}
    ever: set[int] = set()
    for processes in looks:
        before, condemned = condemned, condemn(processes, condemned)
        ever |= {each.session for each in processes if each.marked}
        sessions = {each.session for each in processes}
        leaders = {each.pid: each for each in processes if each.pid == each.session}
        chosen = victims(processes, condemned, OWN)
        assert set(condemned) <= ever & sessions - {0}
        for each in chosen:
            assert each.alive
            assert each.session != OWN
            assert each.marked or each.session in condemned
        for each in processes:
            if each.marked and each.alive and each.session != OWN:
                assert each in chosen
        for session in condemned:
            leader = leaders.get(session)
            if leader is not None and leader.alive and not leader.marked:
                assert before.get(session) == leader.born
