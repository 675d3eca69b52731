"""A lock on a store's file, which dies with those who hold it.

Contract: between :meth:`StoreLock.take` and :meth:`StoreLock.give_back` no other runtime has
the store, in this process, another one or a forked child. The lock is of the kernel's, on a
file beside the store, and the server inherits it: it is free when the runtime has given it
back, or when Python *and* its server are dead, so that a new runtime cannot meet the server
of one that was just killed. Those that share the store by leases hold it together.

Blocks: for a worker thread. The file is removed when the last one gives it back.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from ..forks import forget_in_child
from ..private import PRIVATE

__all__ = ["StoreLock", "StoreLockedError"]

_SUFFIX: Final = "-lock"

_PAUSE: Final = 0.02

# A link there could lead to a file that is somebody's, and would be written to.
_FLAGS: Final = (
    os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
)


class StoreLockedError(Exception):
    """Somebody else has it.

    :ivar holder: the process id of the Python that has it, if it tells
    """

    def __init__(self, holder: int | None) -> None:
        super().__init__(holder)
        self.holder = holder


class StoreLock:
    """The lock on one store.

    :param store: its file, as the file system knows it (no links)
    :param shared: whether others that share it may have it, too
    """

    def __init__(self, store: Path, *, shared: bool) -> None:
        self._path = store.with_name(store.name + _SUFFIX)
        self._shared = shared
        self._fd: int | None = None
        forget_in_child(self)

    @property
    def fds(self) -> tuple[int, ...]:
        """What the server has to inherit."""
        return () if self._fd is None or sys.platform == "win32" else (self._fd,)

    def take(self, patience: float, is_unwanted: threading.Event | None = None) -> None:
        """Take it.

        :param patience: for how many seconds to wait where its holder is dying: a Python
            that was killed, whose guard is about to end its server
        :param is_unwanted: ends the wait when it is set
        :raises StoreLockedError: if somebody else has it
        :raises OSError: if no file can be there
        """
        is_unwanted = is_unwanted or threading.Event()
        deadline = time.monotonic() + patience
        while not self._try():
            holder = self._holder()
            if time.monotonic() >= deadline or (holder and _is_there(holder)):
                raise StoreLockedError(holder)
            if is_unwanted.wait(_PAUSE):
                raise StoreLockedError(holder)

    def give_back(self) -> None:
        """Give it back, for those who have inherited it too; a second time does nothing."""
        fd, self._fd = self._fd, None
        if fd is None:
            return
        try:
            # Nobody else has it, unless it is shared; and who waits for it looks again.
            if not self._shared or _lock(fd, shared=False):
                with suppress(OSError):
                    self._path.unlink()
        finally:
            _unlock(fd)
            os.close(fd)

    def forget(self) -> None:
        """In a forked child: it is the parent's, and must not outlive it here."""
        fd, self._fd = self._fd, None
        if fd is not None:
            with suppress(OSError):
                os.close(fd)

    def _try(self) -> bool:
        fd = os.open(self._path, _FLAGS, PRIVATE)
        try:
            if not (_lock(fd, shared=self._shared) and self._is_at(fd)):
                os.close(fd)
                return False
            os.truncate(fd, 0)
            os.pwrite(fd, str(os.getpid()).encode(), 0)
        except BaseException:
            with suppress(OSError):
                os.close(fd)
            raise
        self._fd = fd
        return True

    def _is_at(self, fd: int) -> bool:
        """False if that file was removed meanwhile, by who gave the lock back."""
        try:
            return os.path.samestat(os.fstat(fd), self._path.stat())
        except OSError:
            return False

    def _holder(self) -> int | None:
        try:
            return int(self._path.read_bytes())
        except (OSError, ValueError):
            return None


def _is_there(pid: int) -> bool:
    import psutil  # takes some milliseconds to come, and most locks are free

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


if sys.platform == "win32":
    import msvcrt

    # A region is locked, not the file: one far beyond what is written there.
    _REGION: Final = 1 << 30

    def _lock(fd: int, *, shared: bool) -> bool:
        os.lseek(fd, _REGION, os.SEEK_SET)
        try:
            # Windows knows no shared ones here: with leases nobody is kept out.
            if not shared:
                msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _unlock(fd: int) -> None:
        os.lseek(fd, _REGION, os.SEEK_SET)
        with suppress(OSError):
            msvcrt.locking(fd, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock(fd: int, *, shared: bool) -> bool:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            # Of the open file, not of the process: so a second one in here is kept out,
            # and the server that inherits it holds it, too.
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_UN)
