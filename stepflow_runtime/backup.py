"""Copying a store, also while a server is at work on it.

Contract: the copy is the store at one moment, whole, and a file of its own. It appears
under its name when it is safe on the disk, or not at all; whatever else happens (an error,
a cancellation, a full disk) leaves nothing behind, except that a Python that is killed
leaves ``.<name>.<random>.part``. A server at work on the store is neither stopped nor kept
waiting.

How: one read transaction of sqlite's from the first page to the last. In a store's mode
(a write-ahead log) readers and writers do not wait for each other; while it lasts the log
only grows. Without that transaction, each write by the server would make sqlite's backup
begin again, and beside a busy server it would never end.
"""

from __future__ import annotations

import os
import stat
import tempfile
import threading
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio

from .errors import BackupError
from .server.schema import is_store, sqlite_uri
from .threads import run_abandonable, run_blocking

if TYPE_CHECKING:
    import sqlite3

__all__ = ["backup_store"]

# 8 MiB of sqlite's usual pages: how much is copied between two looks at whether it is to go
# on. Smaller steps make it no slower, down to 100 or so.
_PAGES: Final = 2048

# How long sqlite waits for somebody who has locked the whole store, as a server does in its
# first moments and its last.
_BUSY_TIMEOUT: Final = 5.0

# What sqlite keeps beside a database that is, or was, in use.
_COMPANIONS: Final = ("-wal", "-journal", "-shm")


async def backup_store(
    store: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> None:
    """Copy the store in a file to another one, also while a server is at work on it.

    Every run that was over when the copy began is in it with its results. Runs that were
    not are in it too, and a server that is started on the copy goes on with them, whatever
    the original's does.

    The copy can be read by this user alone (its mode is 0600). A cancellation leaves
    nothing of it, unless it comes when the copy is ready: then it is there, whole. Works in
    any event loop, with or without a runtime; in a program without one,
    ``asyncio.run(backup_store(...))``.

    :param store: the path of the store, as ``storage=`` has it
    :param target: the path of the copy, on whichever disk
    :param overwrite: whether a file of that name may be replaced
    :raises FileNotFoundError: if there is no store, or no directory for the copy
    :raises FileExistsError: if there is something at ``target`` already
    :raises OSError: if a file cannot be read or made
    :raises BackupError: if ``store`` is no store or damaged, ``target`` one in use, the
        disk full, or this Python without sqlite3
    """
    is_given_up = threading.Event()
    is_over = threading.Event()
    try:
        await run_abandonable(
            _back_up, Path(store), Path(target), overwrite, is_given_up, is_over
        )
    except anyio.get_cancelled_exc_class():
        is_given_up.set()
        with anyio.CancelScope(shield=True):
            await run_blocking(is_over.wait)
        raise


def _back_up(
    store: Path,
    target: Path,
    overwrite: bool,
    is_given_up: threading.Event,
    is_over: threading.Event,
) -> None:
    try:
        store, target = store.absolute(), target.absolute()
        _check_sqlite3()
        _check_target(store, target, overwrite)
        part = _new_part(target)
        try:
            _copy(store, part, is_given_up)
            _make_durable(part)
            if not is_given_up.is_set():
                _publish(part, target, overwrite)
                _make_durable(target.parent)
        finally:
            _remove(part)
    except _GivenUpError:
        pass  # nobody waits for an answer
    finally:
        is_over.set()


class _GivenUpError(Exception):
    """The copy is not wanted any more."""


# -- files -----------------------------------------------------------------------------


def _check_target(store: Path, target: Path, overwrite: bool) -> None:
    # Not opened to see whether it can be: closing it would take away the locks that sqlite
    # has on it in this process.
    if not stat.S_ISREG(os.stat(store).st_mode):
        raise BackupError(f"{store} is no file, so it is no store")
    if not os.access(store, os.R_OK):
        raise PermissionError(f"{store} is not readable for this user")
    if os.path.lexists(target):
        if os.path.exists(target) and os.path.samefile(store, target):
            raise BackupError(f"{target} is the store itself")
        if not overwrite:
            raise FileExistsError(
                f"there is something at {target} already: overwrite=True replaces it"
            )
        if target.is_dir():
            raise IsADirectoryError(f"{target} is a directory; name a file in it")
    if overwrite and _companions(target):
        _settle(target)
    if companions := _companions(target):
        # sqlite would take the log of the old file for one of the new.
        raise BackupError(
            f"{target} cannot be replaced, since it is in use as a store: {companions[0]} "
            "is there. Choose another name"
        )


def _companions(path: Path) -> list[str]:
    names = [f"{path}{end}" for end in _COMPANIONS]
    return [name for name in names if os.path.lexists(name)]


def _settle(target: Path) -> None:
    """Have sqlite clear up beside a file to be replaced; it does unless that is in use.

    A server leaves its log when it ends, in good order or not.
    """
    import sqlite3

    with suppress(sqlite3.Error), closing(_opened(target, "rw")) as database:
        database.execute("SELECT * FROM sqlite_master").fetchall()


def _new_part(target: Path) -> Path:
    """An empty file on the same disk, for this user alone."""
    fd, name = tempfile.mkstemp(
        prefix=f".{target.name}.", suffix=".part", dir=target.parent
    )
    os.close(fd)
    return Path(name)


def _publish(part: Path, target: Path, overwrite: bool) -> None:
    """Give it its name, at once; nobody's file is replaced unasked."""
    if overwrite:
        os.replace(part, target)
        return
    try:
        os.link(part, target)
    except FileExistsError:
        raise FileExistsError(f"there is something at {target} now") from None
    except OSError:  # a file system without hard links
        if os.path.lexists(target):
            raise FileExistsError(f"there is something at {target} now") from None
        os.rename(part, target)


def _make_durable(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # there are no directories to be synchronized
    fd = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(part: Path) -> None:
    for end in ("", *_COMPANIONS):
        with suppress(OSError):
            os.unlink(f"{part}{end}")


# -- with sqlite -----------------------------------------------------------------------


def _check_sqlite3() -> None:
    try:
        import sqlite3  # noqa: F401 - takes some milliseconds; not every Python has it
    except ImportError as exc:
        raise BackupError(
            f"this Python has no sqlite3 ({exc}), which copies a store. With nobody at work "
            "on it, copy the file together with those beside it: -wal and -shm"
        ) from exc


def _copy(store: Path, part: Path, is_given_up: threading.Event) -> None:
    import sqlite3

    try:
        with (
            closing(_opened(store, "ro")) as source,
            closing(_opened(part, "rw")) as copy,
        ):
            source.execute("BEGIN")
            if not is_store(
                source
            ):  # and with the first look the transaction has begun
                raise BackupError(f"{store} is no store of a Stepflow server")
            # It is made durable as a whole, when it is complete.
            copy.execute("PRAGMA synchronous = OFF")
            copy.execute("PRAGMA journal_mode = OFF")
            source.backup(copy, pages=_PAGES, progress=lambda *_: _go_on(is_given_up))
    except sqlite3.Error as exc:
        raise BackupError(f"{store} cannot be copied: {exc}") from exc


def _go_on(is_given_up: threading.Event) -> None:
    """Called between two steps."""
    if is_given_up.is_set():
        raise _GivenUpError


def _opened(path: Path, mode: str) -> sqlite3.Connection:
    import sqlite3

    uri = sqlite_uri(path, f"mode={mode}")
    return sqlite3.connect(uri, uri=True, timeout=_BUSY_TIMEOUT, isolation_level=None)
