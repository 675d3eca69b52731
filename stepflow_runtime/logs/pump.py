"""The pump: bytes from one of the server's pipes, cut into lines, each handed on.

Contract: it reads until the pipe ends and never stops before, whatever is in the lines
and whatever becomes of them: a pipe that nobody reads freezes the server after 64 KiB.
Memory is bounded: of a line longer than ``MAX_LINE`` the rest is dropped, and the line
says so.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

__all__ = ["LineCutter", "pump"]

# A line of the server is a few hundred bytes; a worker may print what it likes.
MAX_LINE: Final = 1024 * 1024


async def pump(
    fd: int,
    hand_on: Callable[[bytes], object],
    read: Callable[[int], Awaitable[bytes]],
) -> None:
    """Read the pipe ``fd`` to its end with ``read``; call ``hand_on`` with each line.

    A line comes without its newline. What follows the last newline comes as a line too,
    also if the pump is cancelled: nothing that was read is lost. Cancellation ends it at
    any moment. ``fd`` stays open.
    """
    cutter = LineCutter()
    try:
        while chunk := await read(fd):
            for line in cutter.cut(chunk):
                hand_on(line)
    finally:
        if rest := cutter.rest():
            hand_on(rest)


class LineCutter:
    """Cuts a stream of bytes into lines of bounded length."""

    def __init__(self, max_line: int = MAX_LINE) -> None:
        self._max_line = max_line
        self._begun = b""
        self._dropped = 0

    def cut(self, chunk: bytes) -> list[bytes]:
        """Return the lines that ``chunk`` completes, without their newlines."""
        *ended, begun = chunk.split(b"\n")
        lines = []
        for part in ended:
            self._extend(part)
            lines.append(self._take())
        self._extend(begun)
        return lines

    def rest(self) -> bytes:
        """Return what follows the last newline."""
        return self._take()

    def _extend(self, part: bytes) -> None:
        room = self._max_line - len(self._begun)
        self._begun += part[:room]
        self._dropped += max(len(part) - room, 0)

    def _take(self) -> bytes:
        line, dropped = self._begun, self._dropped
        self._begun, self._dropped = b"", 0
        return line + b" ... [%d more bytes dropped]" % dropped if dropped else line
