"""What differs by operating system, a file each, behind one signature.

``spawn(binary, command)`` starts a process in a session of its own and returns a
:class:`Child`, with a :class:`Pipe` for each of its outputs; ``KILLED`` is the exit code of
one that we killed. What CI does not run says so: ``macos``, ``windows``. On other systems ``spawn``
fails.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Protocol

from ...logs.pump import Pipe
from ..options import Command

__all__ = ["KILLED", "Child", "spawn"]


class Child(Protocol):
    """A spawned process and its session (on Windows: its job).

    Only :meth:`sweep` and :meth:`ended_workers` block; they are for a worker thread.
    """

    pid: int

    @property
    def stdout(self) -> Pipe:
        """The reading end of its standard output."""
        ...

    @property
    def stderr(self) -> Pipe:
        """That of its standard error."""
        ...

    @property
    def exposed(self) -> str | None:
        """Why its port may be open to others, though it was not to be; None if it is not."""
        ...

    async def wait_exit(self) -> None:
        """Wait until it has ended. It is not reaped, so its pid is still its own."""
        ...

    def terminate(self) -> None:
        """Ask it to end (SIGTERM, CTRL+BREAK); nothing happens if it has ended."""
        ...

    def kill(self) -> None:
        """End it (SIGKILL, TerminateProcess), and it alone."""
        ...

    def sweep(self, *, spare_leader: bool, timeout: float) -> int:
        """Kill the session's processes; return how many are left after ``timeout``.

        Blocks, for ``timeout`` seconds at most. Does nothing after :meth:`reap`.

        :param spare_leader: leave the process itself alone, and kill the others
        """
        ...

    def ended_workers(self) -> list[int]:
        """Return the exit codes of the children of the process that have ended.

        So far as the system keeps them: Linux does.
        Blocks for the time of a look at the process list.
        """
        ...

    def reap(self) -> int | None:
        """Return its exit code (negative: the signal), or None if it has not ended.

        Windows knows no signals, and so no negative codes.
        255 if somebody else has reaped it: then nobody knows.
        """
        ...

    def close(self) -> None:
        """Close every descriptor. A pipe that is being read is closed by who reads it."""
        ...


if sys.platform == "linux":
    from .linux import KILLED, spawn
elif sys.platform == "darwin":
    from .macos import KILLED, spawn
elif sys.platform == "win32":
    from .windows import KILLED, spawn
else:
    from .posix import KILLED

    def spawn(binary: Path, command: Command) -> Child:
        raise OSError(
            f"stepflow-runtime cannot care for servers on {sys.platform}: it can on "
            "Linux, macOS and Windows"
        )
