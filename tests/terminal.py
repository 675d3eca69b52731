"""A terminal without a window, in which a command runs as at somebody's desk."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import pyte

__all__ = ["COMMAND", "Terminal", "masked"]

COMMAND: Final = str(Path(sys.executable).parent / "stepflow-runtime")
_PATIENCE: Final = 30.0
_UTF_8: Final = {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}


def masked(screen: str) -> str:
    """What is another time another time."""
    return re.sub(r" *\d+\.\d( s|/s)", r"  0.0\1", screen)


class Terminal:
    """:param env: what differs from a modern terminal; NO_COLOR, say"""

    def __init__(
        self,
        *arguments: str,
        columns: int = 80,
        lines: int = 24,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._screen: Any = pyte.Screen(columns, lines)
        self._stream: Any = pyte.ByteStream(self._screen)
        self.written = b""
        self.code: int | None = None
        environ = {**os.environ, **_UTF_8, **(env or {})}
        environ.pop("COLUMNS", None)
        environ.pop("LINES", None)
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            # The size has to be there before the first look at it.
            _resize(0, columns, lines)
            os.execve(COMMAND, [COMMAND, *arguments], environ)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.code is None:
            os.kill(self.pid, signal.SIGTERM)
            self.wait()
        os.close(self._fd)

    @property
    def text(self) -> str:
        """What is to be seen, without the blanks at the ends of lines and of the screen."""
        return "\n".join(line.rstrip() for line in self._screen.display).rstrip("\n")

    @property
    def shows_cursor(self) -> bool:
        return not self._screen.cursor.hidden

    def wait_for(self, condition: Callable[[str], object]) -> str:
        deadline = time.monotonic() + _PATIENCE
        while not condition(self.text):
            assert time.monotonic() < deadline, self.text
            assert self._read(), self.text
        return self.text

    def press(self, keys: bytes) -> None:
        os.write(self._fd, keys)

    def resize(self, columns: int, lines: int) -> None:
        self._screen.resize(lines, columns)
        _resize(self._fd, columns, lines)

    def wait(self) -> int:
        """Wait for the command's end; return its exit code."""
        deadline = time.monotonic() + _PATIENCE
        while self._read():
            assert time.monotonic() < deadline, self.text
        _, status = os.waitpid(self.pid, 0)
        self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def _read(self) -> bool:
        """Take in what there is; False at the end."""
        ready, _, _ = select.select([self._fd], [], [], 0.05)
        if not ready:
            return True
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # so Linux says that nobody has the terminal any more
            return False
        self.written += data
        self._stream.feed(data)
        return bool(data)


def _resize(fd: int, columns: int, lines: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
