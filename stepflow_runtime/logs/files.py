"""Where bytes end: a file that lines are appended to, or our own standard error.

Contract: a write never raises. It leaves whole lines behind, also when the disk fills up in
the middle of one, and what it cannot write it counts: an outage is reported once, on
the library's own logger, and when it is over, the first line in the file says how many are
missing, and why. A file that was rotated away is left for the one that has its name.

Several processes may append to one file: each batch is one write to the end of it.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import stat
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from itertools import accumulate
from typing import Final, Literal, Protocol

from ..forks import forget_in_child
from ..private import PRIVATE, check_unplanted
from .entry import LogEntry
from .own import report
from .rendering import as_json, as_text

__all__ = ["LineSink", "LogFile", "ParentStderr"]

# Non-blocking: opening a FIFO that nobody reads would take for ever. Files take no notice.
# What there is not on Windows counts for nothing. Python itself adds O_CLOEXEC.
_OPEN: Final = (
    getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_BINARY", 0)
)
_APPEND: Final = _OPEN | os.O_WRONLY | os.O_APPEND | os.O_CREAT

# So many bytes go into a pipe at once, or not at all: those of other writers are not in
# the middle of them.
_PIPE_BUF: Final = getattr(select, "PIPE_BUF", 512)

# Who reads our FIFO or terminal can hold up the server so long before lines are dropped.
_PATIENCE: Final = 5.0

# A disk that fills up again and again is not news again and again.
_NEWS: Final = 60.0

_STDERR: Final = 2


class LineSink(Protocol):
    """Takes lines, one call at a time; the calls may come from several threads."""

    def open(self) -> None:
        """Make it ready.

        :raises OSError: if nothing can be written there
        """
        ...

    def write(self, lines: Sequence[bytes]) -> None:
        """Write lines, which come without their newlines. May block; never raises.

        A text of several lines counts as one: it is there as a whole or not at all.
        """
        ...

    def close(self) -> None:
        """End it. For any thread, also during a write; once or more often."""
        ...


class LogFile:
    """Appends lines to a file, which it makes if there is none.

    Before :meth:`open` and after :meth:`close`, lines are dropped.

    :param format: what the line is written in that tells of missing ones
    :param mode: of a new file, but for what the umask takes from it
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        format: Literal["json", "text"] = "json",
        mode: int = PRIVATE,
    ) -> None:
        self._path = os.fspath(path)
        self._render = as_json if format == "json" else as_text
        self._fd: int | None = None
        self._identity = (0, 0)
        self._is_file = True
        self._mode = mode
        # Of a line that was written to its half and could not be taken back, the other.
        self._rest: bytes | None = None
        self._outage = _Outage(f"The log file {self._path!r}")
        self._is_adrift = False
        self._turn = threading.Lock()
        self._is_closing = False

    def open(self) -> None:
        """Open the file; make it if there was none.

        :raises OSError: if it cannot be written to
        """
        if self._fd is None:
            self._is_closing = False
            # A program that changes its directory does not move its log.
            self._path = os.path.abspath(self._path)
            forget_in_child(self)
            self._open()

    def write(self, lines: Sequence[bytes]) -> None:
        with self._turn:
            if lines and self._fd is not None:
                self._write(self._fd, lines)
        if self._is_closing:
            self._close_in_turn()

    def close(self) -> None:
        """Close the file; if a write is held up, as soon as it is not.

        Somebody else may get the number of a descriptor that is closed, and would have
        the rest of that write.
        """
        self._is_closing = True
        self._close_in_turn()

    def forget(self) -> None:
        # In a forked child. The lock stays out of it: it may be held for ever there.
        fd, self._fd = self._fd, None
        if fd is not None:
            with suppress(OSError):
                os.close(fd)

    # -- opening -----------------------------------------------------------------------

    def _open(self) -> int:
        fd = self._descriptor()
        try:
            found = os.fstat(fd)
        except BaseException:
            os.close(fd)
            raise
        old, self._fd = self._fd, fd
        if old is not None:
            self._let_go(old)
        self._adopt(found)
        return fd

    def _descriptor(self) -> int:
        check_unplanted(self._path)
        try:
            return os.open(self._path, _APPEND, self._mode)
        except OSError as exc:
            if exc.errno == errno.ENXIO and stat.S_ISFIFO(os.stat(self._path).st_mode):
                reason = "Nobody has this FIFO open for reading"
                raise OSError(errno.ENXIO, reason, self._path) from None
            raise

    def _adopt(self, found: os.stat_result) -> None:
        """Remember what is written to from now on."""
        if self._rest:  # its half is in the file that is left
            self._outage.add(1)
        self._identity = (found.st_dev, found.st_ino)
        self._is_file = stat.S_ISREG(found.st_mode)
        # The file that takes its place is for the same people. Asked for now: once it was
        # moved, it may have been made read-only.
        self._mode = stat.S_IMODE(found.st_mode) & 0o777
        begins_anew = not self._is_file or _ends_in_newline(self._path, found.st_size)
        self._rest = None if begins_anew else b""

    def _follow(self, fd: int) -> tuple[int, int]:
        """Open the file anew if its name stands for another one, or for none, by now.

        If that fails, the old file is still the best place there is, as long as it has
        a name: it was renamed. If it has none, what is written to it is gone.

        :returns: the descriptor, and the size of the file
        :raises OSError: if there is no file any more
        """
        with suppress(OSError):
            found = os.stat(self._path)
            if (found.st_dev, found.st_ino) == self._identity:
                return fd, found.st_size
        try:
            fd = self._open()
        except OSError as exc:
            found = os.fstat(fd)
            if not found.st_nlink:
                raise
            self._report_adrift(exc)
            return fd, found.st_size
        if self._is_adrift:
            self._is_adrift = False
            report(logging.WARNING, "The log file %r is written again", self._path)
        return fd, os.fstat(fd).st_size

    def _report_adrift(self, exc: OSError) -> None:
        if not self._is_adrift:
            self._is_adrift = True
            report(
                logging.ERROR,
                "The log file %r was moved away, and cannot be opened anew: %s. Lines go "
                "on into the one that was moved",
                self._path,
                exc.strerror,
            )

    # -- writing -----------------------------------------------------------------------

    def _write(self, fd: int, lines: Sequence[bytes]) -> None:
        try:
            fd, size = self._follow(fd)
            size += self._complete(fd)
        except OSError as exc:
            self._outage.go_on(len(lines), exc)
            return
        has_notice = self._outage.lost > 0
        if has_notice:
            lines = [self._notice(), *lines]
        written, error = self._put(fd, lines)
        if error is None:
            self._outage.end()
            return
        kept = self._settle(fd, lines, written, size)
        if has_notice and kept:
            self._outage.lost = 0
        self._outage.go_on(len(lines) - max(kept, has_notice), error)

    def _put(self, fd: int, lines: Sequence[bytes]) -> tuple[int, OSError | None]:
        return _put(
            fd,
            [_joined(lines)] if self._is_file else _chunks(lines, _PIPE_BUF),
            patience=0 if self._outage.is_on else _PATIENCE,
        )

    def _complete(self, fd: int) -> int:
        """Write the other half of a line.

        :returns: how many bytes that took
        :raises OSError: if it is still not possible
        """
        if self._rest is None:
            return 0
        written, error = self._put(fd, [self._rest])
        if error is not None:
            self._rest = self._rest[written:]
            raise error
        self._rest = None
        return written

    def _notice(self) -> bytes:
        count = self._outage.lost
        what = "1 log line" if count == 1 else f"{count} log lines"
        return self._render(
            LogEntry(
                timestamp=datetime.now(UTC),
                level="WARN",
                message=f"{what} could not be written here: {self._outage.reason}",
                stream="stdout",
                target="stepflow_runtime",
            )
        )

    def _settle(self, fd: int, lines: Sequence[bytes], written: int, size: int) -> int:
        """After a write that broke off: leave whole lines behind.

        Later in an outage nothing of a batch is left unless all of it fits: what room
        a full disk has would go into notices.

        :returns: how many lines are written for good
        """
        if not written:
            return 0
        whole, length = _whole(lines, written)
        if self._outage.is_on and self._cut(fd, size, written, 0):
            return 0
        if written == length or self._cut(fd, size, written, length):
            return whole
        if not self._is_at_end(fd):
            return whole  # somebody else's line is behind that half
        self._rest = lines[whole][written - length :]
        return whole + 1

    def _cut(self, fd: int, size: int, written: int, keep: int) -> bool:
        """Take back what was ``written`` behind ``size``, but for ``keep`` bytes.

        Only if it is the end of the file, and all of it ours: others may append.
        """
        if not self._is_file:
            return False
        with suppress(OSError):  # append-only, or broken
            if os.lseek(fd, 0, os.SEEK_CUR) == size + written and self._is_at_end(fd):
                os.ftruncate(fd, size + keep)
                return True
        return False

    def _is_at_end(self, fd: int) -> bool:
        """True if nobody has written behind our last bytes."""
        if not self._is_file:
            return True
        with suppress(OSError):
            return os.lseek(fd, 0, os.SEEK_CUR) == os.fstat(fd).st_size
        return False

    # -- closing -----------------------------------------------------------------------

    def _close_in_turn(self) -> None:
        # If it is somebody's turn, he sees when it has ended that we are closing.
        if self._turn.acquire(blocking=False):
            try:
                self._close()
            finally:
                self._turn.release()

    def _close(self) -> None:
        if self._fd is not None and self._outage.is_on:
            self._write(self._fd, ())  # the notice, if there is room by now
        self._outage.give_up()
        fd, self._fd = self._fd, None
        if fd is not None:
            self._let_go(fd)

    def _let_go(self, fd: int) -> None:
        try:
            os.close(fd)
        except OSError as exc:  # a file server that only now says that its disk is full
            report(
                logging.ERROR, "The end of the log file %r is lost", self._path, exc=exc
            )


class ParentStderr:
    """Writes lines to the standard error of this process, as they are.

    That belongs to the program: nothing of it is opened, changed or closed here. Who does
    not read it holds up the server, as if it had been started in a shell.
    """

    def __init__(self) -> None:
        self._outage = _Outage("Standard error")
        self._is_gone = False

    def open(self) -> None: ...

    def write(self, lines: Sequence[bytes]) -> None:
        if self._is_gone:
            return
        written, error = self._put(lines)
        if error is None:
            self._outage.end()
            return
        self._outage.go_on(len(lines) - _whole(lines, written)[0], error)
        # Once it is closed, whatever gets its number next is not meant for us.
        self._is_gone = error.errno == errno.EBADF

    def _put(self, lines: Sequence[bytes]) -> tuple[int, OSError | None]:
        if sys.__stderr__ is None:
            # Python was started without one: the number is a file of somebody else's.
            return 0, OSError(errno.EBADF, os.strerror(errno.EBADF))
        return _put(_STDERR, _chunks(lines, _PIPE_BUF), patience=None)

    def close(self) -> None: ...


class _Outage:
    """What cannot be written, for how long, and who was told."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._missing = 0
        self._is_reported = False
        self._reported_at = float("-inf")
        self.is_on = False
        self.lost = 0
        self.reason = ""

    def add(self, lines: int) -> None:
        self.lost += lines
        self._missing += lines

    def go_on(self, lines: int, error: OSError) -> None:
        """So many lines were lost, now or still."""
        self.is_on = True
        self.add(lines)
        self.reason = error.strerror or str(error)
        now = time.monotonic()
        if not self._is_reported and now - self._reported_at >= _NEWS:
            self._is_reported, self._reported_at = True, now
            report(
                logging.ERROR,
                "%s cannot be written to, and log lines are lost: %s",
                self._what,
                self.reason,
            )

    def end(self) -> None:
        """Everything was written."""
        if self.is_on:
            self._end("%s can be written to again; %d log lines were lost")

    def give_up(self) -> None:
        if self.is_on:
            self._end(
                "%s could not be written to until its end; %d log lines were lost"
            )

    def _end(self, message: str) -> None:
        self.is_on = False
        self.lost = 0
        if self._is_reported:
            self._is_reported = False
            report(logging.WARNING, message, self._what, self._missing)
            self._missing = 0


# -- bytes -----------------------------------------------------------------------------


def _put(
    fd: int, pieces: Iterable[bytes], *, patience: float | None
) -> tuple[int, OSError | None]:
    """Write everything, as far as it goes.

    :param patience: for how many seconds to wait for a reader at a time; None: for ever
    :returns: how many bytes were written, and what kept us from the rest
    """
    done = 0
    for piece in pieces:
        written, error = _put_piece(fd, piece, patience)
        done += written
        if error is not None:
            return done, error
    return done, None


def _put_piece(
    fd: int, piece: bytes, patience: float | None
) -> tuple[int, OSError | None]:
    written = 0
    while written < len(piece):
        try:
            step = os.write(fd, piece[written:])
        except BlockingIOError as exc:
            if not _wait_writable(fd, patience):
                return written, exc
            continue
        except OSError as exc:
            return written, exc
        if step == 0:  # some devices' way to say that they are full
            return written, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written += step
    return written, None


def _wait_writable(fd: int, seconds: float | None) -> bool:
    if not hasattr(select, "poll"):  # Windows, whose descriptors always block
        return False
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(None if seconds is None else seconds * 1000))


def _joined(lines: Sequence[bytes]) -> bytes:
    return b"\n".join([*lines, b""])


def _chunks(lines: Iterable[bytes], size: int) -> Iterator[bytes]:
    """The lines in pieces of at most ``size`` bytes, if no line alone is longer."""
    chunk: list[bytes] = []
    room = size
    for line in lines:
        room -= len(line) + 1
        if room < 0 and chunk:
            yield _joined(chunk)
            chunk, room = [], size - len(line) - 1
        chunk.append(line)
    if chunk:
        yield _joined(chunk)


def _whole(lines: Sequence[bytes], written: int) -> tuple[int, int]:
    """How many lines are whole within so many bytes, and how long these are."""
    ends = list(accumulate((len(line) + 1 for line in lines), initial=0))
    whole = bisect_right(ends, written) - 1
    return whole, ends[whole]


def _ends_in_newline(path: str, size: int) -> bool:
    """True too if it is empty, or does not tell."""
    if not size:
        return True
    with suppress(OSError):
        fd = os.open(path, _OPEN | os.O_RDONLY)
        try:
            os.lseek(fd, size - 1, os.SEEK_SET)
            return os.read(fd, 1) in (b"\n", b"")
        finally:
            os.close(fd)
    return True
