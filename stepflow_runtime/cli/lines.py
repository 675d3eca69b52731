"""Inputs of a batch: JSON, one value a line, from a file or a pipe.

Contract: bounded memory, however many lines there are. A regular file is looked through before
anything is run, so that a line that is wrong is told in time; of a pipe that is not to be
had, and what comes before such a line is run. Empty lines count as lines and not as inputs.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any, Final, Self

import msgspec

from ..errors import StepflowError
from ..threads import run_abandonable

__all__ = ["InputLines", "WrongLineError"]

_LONGEST: Final = 64 * 2**20
_CHUNK: Final = 2**18


class WrongLineError(StepflowError):
    """A line of the inputs is no input."""


class InputLines:
    """:param name: the path of a file, or ``-`` for standard input

    :raises OSError: if it cannot be opened
    """

    def __init__(self, name: str) -> None:
        if name == "-":
            if sys.stdin is None:
                raise OSError("standard input is closed")
            self._fd, self._is_mine = sys.stdin.fileno(), False
            self._name = "standard input"
        else:
            # Without O_NONBLOCK: for the other end of a pipe it is right to wait.
            self._fd, self._is_mine = os.open(name, os.O_RDONLY), True
            self._name = name
        self._is_file = stat.S_ISREG(os.fstat(self._fd).st_mode)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._is_mine:
            with suppress(OSError):
                os.close(self._fd)

    async def count(self) -> int | None:
        """Look through all lines, if that is possible; return how many inputs they are.

        :raises WrongLineError: if one is wrong
        """
        return await run_abandonable(self._count) if self._is_file else None

    def _count(self) -> int:
        begin = os.lseek(self._fd, 0, os.SEEK_CUR)
        count = 0
        lines = _Lines(self._name)
        while True:
            data = os.read(self._fd, _CHUNK)
            for number, line in lines.feed(data):
                _check(line, f"{self._name}:{number}")
                count += 1
            if not data:
                break
        os.lseek(self._fd, begin, os.SEEK_SET)
        return count

    async def __aiter__(self) -> AsyncIterator[tuple[bytes, Any]]:
        """Each line as it stands there, and its value.

        :raises WrongLineError: if it has none
        """
        lines = _Lines(self._name)
        while True:
            data = await run_abandonable(os.read, self._fd, _CHUNK)
            for number, line in lines.feed(data):
                yield line, _check(line, f"{self._name}:{number}")
            if not data:
                return


def _check(line: bytes, place: str) -> Any:
    try:
        return msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise WrongLineError(f"{place}: not JSON: {exc}") from None


class _Lines:
    """Whole lines out of chunks, with their numbers."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._rest = bytearray()
        self._number = 0

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """The lines that are whole by now; no data is the end.

        :raises WrongLineError: if one is too long
        """
        if not data:
            data = b"\n" if self._rest else b""
        first, *others = data.split(b"\n")
        self._rest += first
        if len(self._rest) > _LONGEST:
            raise WrongLineError(
                f"{self._name}:{self._number + 1}: longer than {_LONGEST} bytes"
            )
        if not others:
            return
        whole = [bytes(self._rest), *others]
        self._rest = bytearray(whole.pop())
        for line in whole:
            self._number += 1
            if line := line.strip():
                yield self._number, line
