"""The runtimes of a test session: what they log during a test, and what is left of them.

Contract: no runtime lives longer for being watched, and the logs of a test's latest ones are
held until it is over. Nothing is asked of the system before there was a runtime, and nothing
is ended here.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from ..logs.rendering import as_text
from ..server.guard import MARK
from ..server.state import RuntimeState

if TYPE_CHECKING:
    import psutil

    from ..server.supervisor import Supervisor

__all__ = ["Watch"]

# Characters of an entry that a report shows.
_LONGEST: Final = 4_000

# So many runtimes of one test are held: each has a log, and a test may start thousands.
_MOST_HELD: Final = 20


class _Watched:
    """A runtime, seen from outside.

    :ivar origin: what was running when it was made
    :ivar shown: how many of its log entries were before, or shown already
    """

    def __init__(self, supervisor: Supervisor, origin: str) -> None:
        self.supervisor = weakref.ref(supervisor)
        self.origin = origin
        self.shown = 0


class Watch:
    """Watches all runtimes of this process that it hears of.

    :ivar origin: what to say of those that are made from now on
    """

    def __init__(self) -> None:
        self.origin = "the session"
        self._watched: list[_Watched] = []
        self._held: deque[Supervisor] = deque(maxlen=_MOST_HELD)
        self._marks: set[str] = set()
        self._lock = threading.Lock()

    def hear(self, supervisor: Supervisor) -> None:
        """Watch one more. For any thread."""
        with self._lock:
            if len(self._held) == _MOST_HELD:
                self._marks.add(self._held[0].mark)  # it may be gone when we ask
            self._held.append(supervisor)
            there = [watched for watched, _ in self._there()]
            self._watched = [*there, _Watched(supervisor, self.origin)]

    def begin(self, origin: str) -> None:
        """Begin with a test."""
        self.origin = origin
        for watched, supervisor in self._there():
            supervisor.block_until_logs_are_in()
            watched.shown = supervisor.logs.taken

    def end(self) -> None:
        """Let go of what only this test has used."""
        for _, supervisor in self._there():
            self._marks.add(supervisor.mark)
        self._held.clear()
        self._watched = [
            watched
            for watched, supervisor in self._there()
            if not supervisor.state.is_final
        ]

    def news(self, limit: int) -> Iterator[tuple[str, str]]:
        """What was logged since the test began, or since this was last asked.

        A title and a text for each runtime that has logged something: the newest ``limit``
        entries of it. Blocks, for milliseconds, until all is in.
        """
        for watched, supervisor in self._there():
            supervisor.block_until_logs_are_in()
            taken = supervisor.logs.taken
            if new := taken - watched.shown:
                entries = supervisor.logs.newest(min(new, limit))
                watched.shown = taken
                lines = [_cut(as_text(entry).decode()) for entry in entries]
                if missing := new - len(entries):
                    lines.insert(0, f"... {missing} earlier entries are not shown")
                yield _title(supervisor), "\n".join(lines)

    def left_behind(self) -> list[str]:
        """Return a line for each runtime and each process that is still there."""
        left = []
        sessions = set()
        for watched, supervisor in self._there():
            self._marks.add(supervisor.mark)
            now = supervisor.journal.now
            if not (now.state is RuntimeState.NEW or now.state.is_final):
                sessions.add(now.pid)
                left.append(
                    f"a runtime is still {now.state.value} (server pid {now.pid}, port "
                    f"{now.port}); it was started by {watched.origin}"
                )
        self._marks.discard("")
        if self._marks:
            left += [
                f"a process is still there: {process.pid} {_command(process)}; it comes of a "
                "server that a runtime of these tests had started"
                for process in _marked(self._marks)
                if _session(process) not in sessions
            ]
        return left

    def _there(self) -> list[tuple[_Watched, Supervisor]]:
        return [
            (watched, supervisor)
            for watched in self._watched
            if (supervisor := watched.supervisor()) is not None
        ]


def _cut(text: str) -> str:
    cut = len(text) - _LONGEST
    return text if cut <= 0 else f"{text[:_LONGEST]} ... ({cut} more characters)"


def _title(supervisor: Supervisor) -> str:
    now = supervisor.journal.now
    port = f"port {now.port}" if now.port is not None else "no port"
    ended = f"; its server last {now.last_exit}" if now.last_exit is not None else ""
    return f"stepflow server log ({port}, runtime {now.state.value}{ended})"


def _marked(marks: Iterable[str]) -> Iterator[psutil.Process]:
    """The processes that a server with one of these marks has started, or that are one."""
    import psutil

    wanted = frozenset(marks)
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) in wanted:
                yield process
        except (psutil.Error, OSError):
            continue  # another user's, or gone


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid) if hasattr(os, "getsid") else process.pid
    except OSError:
        return None


def _command(process: psutil.Process) -> str:
    import psutil

    try:
        return process.name()
    except psutil.Error:
        return ""
