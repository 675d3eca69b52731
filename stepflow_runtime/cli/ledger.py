"""Where the results of a batch go, a line each, in the order of the inputs.

Contract: a file that was written before is gone on with, and never changed: each line says by
its digest which input, workflow and variables it was made of, and one that was made of others
is refused before anything is run. What an interrupted write has left of a last line is taken
away, once it is known to be the beginning of the line that belongs there.

A line is in the file, by one write, when its result and all before it are there; so after
``kill -9`` what is missing is run, and nothing stands twice. For the loss of power, the file
is synchronized once a second, and at its end.
"""

from __future__ import annotations

import os
import stat
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Protocol, Self

import msgspec

from ..errors import StepflowError
from ..private import PRIVATE, check_unplanted
from ..threads import run_abandonable, run_blocking
from .output import describe, write_whole
from .text import harmless_json

__all__ = ["Ledger", "LedgerError", "Output", "Printer", "Seal", "failure", "line_of"]

# Between two fsyncs: they may take a tenth of a second and more.
_SYNC_INTERVAL: Final = 1.0

_encode: Final = msgspec.json.Encoder().encode


class LedgerError(StepflowError):
    """The file cannot be gone on with."""


class Seal:
    """Knows the beginning of each line: what it was made of.

    :param made_of: what all lines have in common: the workflow, the variables
    """

    def __init__(self, *made_of: bytes) -> None:
        self._common = sha256()
        for part in made_of:
            self._common.update(sha256(part).digest())

    def prefix(self, index: int, line: bytes) -> bytes:
        digest = self._common.copy()
        digest.update(line)
        return b'{"index":%d,"digest":"%s",' % (
            index,
            digest.hexdigest()[:16].encode(),
        )


def line_of(prefix: bytes, result: Any) -> bytes:
    return _sealed(prefix, describe(result))


def failure(prefix: bytes, code: str, message: str) -> bytes:
    """The line of an item that did not come to a run, or not to its end."""
    error = {"code": code, "message": message}
    return _sealed(prefix, {"outcome": "failed", "error": error})


def _sealed(prefix: bytes, described: dict[str, Any]) -> bytes:
    return prefix + harmless_json(_encode(described))[1:] + b"\n"


class Output(Protocol):
    def kept(self, prefix: bytes) -> bool | None:
        """Whether the next line, that begins so, is there and tells a failure; None: it
        is not there.

        :raises LedgerError: if another one is in its place
        """
        ...

    def check_end(self) -> None:
        """:raises LedgerError: if there are more lines than inputs"""
        ...

    async def write(self, lines: bytes) -> None: ...

    async def close(self) -> None: ...


class Printer:
    """Standard output."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def kept(self, prefix: bytes) -> bool | None:
        return None

    def check_end(self) -> None: ...

    async def write(self, lines: bytes) -> None:
        # Who reads may have stopped to; that must not keep the command from its end.
        await run_abandonable(write_whole, self._fd, lines)

    async def close(self) -> None: ...


class _Told(msgspec.Struct):
    outcome: str


_decode_told: Final = msgspec.json.Decoder(_Told).decode


class Ledger:
    """A file.

    :raises LedgerError: if it is not one, or another process is writing to it
    :raises OSError: if it cannot be opened
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        check_unplanted(path)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NONBLOCK", 0)
        # What reads it buffers; what writes to it does not.
        self._fd = os.open(path, flags, PRIVATE)
        try:
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise LedgerError(f"{path} is no regular file")
            _lock(self._fd, path)
            self._lines = open(self._fd, "rb", closefd=False)  # noqa: SIM115
        except BaseException:
            os.close(self._fd)
            raise
        self._is_read = False
        self._number = 0
        self._end = 0
        self._synced_at = time.monotonic()
        self._is_synced = True

    @classmethod
    async def open(cls, path: Path) -> Self:
        return await run_blocking(cls, path)

    def kept(self, prefix: bytes) -> bool | None:
        if self._is_read:
            return None
        line = self._lines.readline()
        self._number += 1
        if line.endswith(b"\n"):
            self._end += len(line)
            return self._outcome(line, prefix) != "success"
        self._cut(line.rstrip(b"\0"), prefix, len(line))
        return None

    def check_end(self) -> None:
        if not self._is_read and self._lines.readline():
            raise LedgerError(
                f"{self._path}:{self._number + 1}: there are more lines here than inputs"
            )

    async def write(self, lines: bytes) -> None:
        await run_blocking(self._write, lines)

    async def close(self) -> None:
        await run_blocking(self._close)

    def _outcome(self, line: bytes, prefix: bytes) -> str:
        if line.startswith(prefix):
            with suppress(msgspec.DecodeError, UnicodeDecodeError):
                return _decode_told(line).outcome
        raise self._foreign()

    def _cut(self, torn: bytes, prefix: bytes, length: int) -> None:
        """Take away what is no whole line, so that the next one can be written."""
        self._is_read = True
        self._lines.close()
        if not (torn.startswith(prefix) or prefix.startswith(torn)):
            raise self._foreign()
        if length:
            os.ftruncate(self._fd, self._end)

    def _foreign(self) -> LedgerError:
        return LedgerError(
            f"{self._path}:{self._number}: this line is not the result of that input with "
            "this workflow and these variables: name another file, or remove this one"
        )

    def _write(self, lines: bytes) -> None:
        write_whole(self._fd, lines)
        self._is_synced = False
        if time.monotonic() - self._synced_at >= _SYNC_INTERVAL:
            self._sync()

    def _sync(self) -> None:
        os.fsync(self._fd)
        self._is_synced = True
        self._synced_at = time.monotonic()

    def _close(self) -> None:
        try:
            if not self._is_synced:
                self._sync()
        finally:
            self._lines.close()
            os.close(self._fd)


def _lock(fd: int, path: Path) -> None:
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LedgerError(f"another process is writing to {path}") from None
