"""The guard process: ends the servers of a Python process that is gone.

Run by path: ``python -I -S guard.py <mark> <parent pid>``; its standard input is the
reading end of a pipe that only its Python holds the writing end of.

Contract: once that Python is gone, however it went, every process that carries the mark
in its environment is killed, and the rest of its session, too; then the guard exits. A
server was given the mark when it was spawned, so nothing has to be announced, and one that
was just being spawned is found as well. A pid that may have been given to somebody else is
never signalled.

As few imports as possible: there is one such process for each program that runs a server.
"""

from __future__ import annotations

import os
import select
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
else:
    # What `signal` is made of; its enums would cost 1 MB and a third of the start.
    import _signal as signal

__all__ = ["MARK", "Process", "condemn", "victims"]

MARK = "_STEPFLOW_RUNTIME_GUARD"

# A server that was forked when Python died shows its mark only when its exec is through.
_SETTLE = 1.5

# What cannot be killed for so long (a dead network file system, another user's) stays.
_LIMIT = 30.0

_PAUSE = 0.02


class Process:
    """What one look at a process tells.

    :ivar born: with the pid, what tells a process from a later one of the same number
    :ivar alive: False for a zombie, which only keeps its number
    :ivar marked: whether its environment has the mark, so far as it can be read
    """

    def __init__(
        self, pid: int, session: int, born: str, alive: bool, marked: bool
    ) -> None:
        self.pid = pid
        self.session = session
        self.born = born
        self.alive = alive
        self.marked = marked


def condemn(processes: list[Process], before: dict[int, str]) -> dict[int, str]:
    """The sessions to end: of each, its number and when its leader was born, if known.

    :param before: those of the last look. They stay condemned, since members outlive
        their leader, until they are empty: then the number can be somebody else's.
    """
    leaders = {each.pid: each for each in processes if each.pid == each.session}
    condemned = {}
    for process in processes:
        session, leader = process.session, leaders.get(process.session)
        born = leader.born if leader is not None else ""
        # By its birth, not by its mark: one that is just dying cannot show that any more.
        known = session in before and (leader is None or born == before[session])
        # A marked process without a leader: whoever led it was a server, or came of one.
        marked = process.marked and (
            leader is None or leader.marked or not leader.alive
        )
        # 0 is the session of all those whose leader is out of sight (containers).
        if session > 0 and (known or marked):
            condemned[session] = before[session] if known else born
    return condemned


def victims(
    processes: list[Process], condemned: dict[int, str], own_session: int
) -> list[Process]:
    """Whom to kill: the marked ones, and those in condemned sessions."""
    return [
        each
        for each in processes
        if each.alive
        and each.session != own_session
        and (each.marked or each.session in condemned)
    ]


def _look_in_proc(mark: str, only: int | None = None) -> list[Process]:
    entry = f"\0{MARK}={mark}\0".encode()
    pids = [str(only)] if only is not None else os.listdir("/proc")
    processes = []
    for pid in filter(str.isdigit, pids):
        # What follows the name, which can hold anything: proc_pid_stat(5), from field 3 on.
        stat = _content(f"/proc/{pid}/stat").rpartition(b")")[2].split()
        if not stat:
            continue  # gone
        # A main thread that has ended looks like a zombie, whatever the others do.
        alive = stat[0] not in b"ZX" or int(stat[17]) > 1
        environ = _content(f"/proc/{pid}/environ") if alive else b""
        marked = entry in b"\0" + environ
        processes.append(
            Process(int(pid), int(stat[3]), stat[19].decode(), alive, marked)
        )
    return processes


def _content(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError:  # gone, or another user's
        return b""


def _look_by_ps(mark: str, only: int | None = None) -> list[Process]:
    """The same for macOS, by its ps(1), which cannot tell an argument from a variable."""
    import subprocess  # macOS only, and only when Python is gone

    which = ["-p", str(only)] if only is not None else ["-ax"]
    columns = "pid=,state=,lstart=,command="  # its `sess` is no session id
    listing = subprocess.run(
        ["/bin/ps", *which, "-wwE", "-o", columns],
        env={"LC_ALL": "C"},
        stdout=subprocess.PIPE,
        check=False,  # it fails where there is nobody to show
    ).stdout.decode(errors="replace")
    processes = []
    for line in listing.splitlines():
        pid, state, *born, command = f"{line} -".split(maxsplit=7)
        try:
            session = os.getsid(int(pid))
        except OSError:
            continue  # gone
        alive, marked = state[0] != "Z", f"{MARK}={mark}" in command.split()
        processes.append(Process(int(pid), session, " ".join(born), alive, marked))
    return processes


_look = _look_by_ps if sys.platform == "darwin" else _look_in_proc


def _pidfd_of(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):  # gone, or a system that has none
        return None


def _kill(victim: Process, mark: str) -> None:
    # The second look comes when the pidfd holds the process: whoever it shows is killed.
    pidfd = _pidfd_of(victim.pid)
    try:
        if [vars(each) for each in _look(mark, victim.pid)] != [vars(victim)]:
            pass  # gone, or changing just now: the next pass sees it as it is
        elif pidfd is not None:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        else:
            os.kill(victim.pid, signal.SIGKILL)
    except OSError:
        pass  # gone, or another user's
    finally:
        if pidfd is not None:
            os.close(pidfd)


def _wait_for_end_of(parent: int) -> None:
    waiting = select.poll()
    waiting.register(0, select.POLLIN)
    # The pipe alone does not do: a child that Python forked can hold it open, too.
    pidfd = _pidfd_of(parent)
    if pidfd is not None:
        waiting.register(pidfd, select.POLLIN)
    while os.getppid() == parent:
        for fd, _ in waiting.poll(1000 if pidfd is None else None):
            if fd == pidfd or not os.read(0, 1):
                return


def _end_servers(mark: str) -> None:
    """Kill in passes, until the time to settle is over and nobody is found."""
    own_session = os.getsid(0)
    condemned: dict[int, str] = {}
    began = time.monotonic()
    while True:
        pass_began = time.monotonic()
        processes = _look(mark)
        condemned = condemn(processes, condemned)
        found = victims(processes, condemned, own_session)
        for victim in found:
            _kill(victim, mark)
        now = time.monotonic()
        age = now - began
        if age > _LIMIT or (age > _SETTLE and not found):
            return
        # Not more than half of a processor, where a look takes long.
        time.sleep(max(_PAUSE, age / 30, now - pass_began))


def _main(mark: str, parent: int) -> None:
    # `killall python3` is meant for its Python, which it has to outlive.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _wait_for_end_of(parent)
    _end_servers(mark)


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
