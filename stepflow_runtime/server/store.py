"""The store of one runtime: held, looked into, and asked what became of a submit.

Contract: the store is held from before the server's start until after its end, so that no
second runtime can have it (:mod:`.lock`). It is the server's: we read what its API does not
tell, and write nothing. What cannot be read is not known, and never taken for nothing.

Everything blocks: for a worker thread.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from ..errors import ServerStartError
from ..logs.own import report
from ..private import check_unplanted, create_private
from .lock import StoreLock, StoreLockedError

if TYPE_CHECKING:
    import sqlite3

__all__ = ["SUBMIT", "Store", "UnreadableStoreError"]

# The variable that marks a submit. The server keeps a run's variables in its journal, and
# shows them to nobody but workflows that ask for one by its name.
SUBMIT: Final = "stepflow_runtime_submit"

# What stands beside a store, and is used if it is there.
_ENDS: Final = ("", "-wal", "-shm", "-journal", "-lock")

# A Python that was killed is noticed by its guard, which ends the server, in 0.2 s; on a
# busy machine in more.
_PATIENCE: Final = 5.0

# How long sqlite waits for a writer where it has to.
_BUSY_TIMEOUT: Final = 5.0

# How far a clock may be set back between a submit and the server's note of it.
_CLOCK_SLACK: Final = 60.0

_UNFINISHED: Final = """
    SELECT id, orchestrator_id FROM runs
    WHERE status NOT IN ('completed', 'failed', 'cancelled') AND id = root_run_id
    ORDER BY id
"""

# The server writes its journal first. A run that is only there, because the server died
# between the two, is none: it knows nothing of it, and never goes on with it. A run's id
# begins with its time, so that only the newest are looked at.
_SUBMITTED: Final = """
    SELECT json_extract(event_data, '$.variables.' || ?), runs.id
    FROM journal_entries JOIN runs ON runs.id = journal_entries.root_run_id
    WHERE runs.id >= ? AND sequence = 0
"""


class UnreadableStoreError(Exception):
    """The store does not tell; the message says why."""


# A run that is unfinished, and the id of the server that had it, if one had.
_Left: TypeAlias = tuple[str, str | None]


class Store:
    """A store, as one runtime holds it.

    :ivar recovered: the runs that were unfinished when it was taken, the oldest first
    """

    def __init__(self) -> None:
        self.recovered: tuple[str, ...] = ()
        self._guard = threading.Lock()
        self._lock: StoreLock | None = None
        self._is_unwanted = threading.Event()
        self._path: Path | None = None
        # Not the guard: whoever looks up may have to wait for sqlite, and the end must not.
        self._looking_up = threading.Lock()
        self._submits: dict[str, str] | UnreadableStoreError = {}
        self._submits_of: tuple[int, float] | None = None

    @property
    def is_taken(self) -> bool:
        return self._lock is not None

    @property
    def fds(self) -> tuple[int, ...]:
        """The descriptors that the server has to inherit."""
        lock = self._lock
        return () if lock is None else lock.fds

    def take(
        self, path: Path, *, name: str | None, shared: bool, create: bool, binary: Path
    ) -> str | None:
        """Take the store in a file; return as whom a server goes on with its runs.

        :param name: as whom the server is to use it, if that was chosen
        :param shared: whether others may have it at the same time
        :param create: whether it may have to be made
        :param binary: the server that is to use it
        :return: the name, or else that of who has the unfinished runs; None if nobody has
        :raises ServerStartError: if it is somebody else's, or no file can be there
        """
        _check_place(path)
        path = Path(os.path.realpath(path))
        with self._guard:
            if self._is_unwanted.is_set():  # the start was given up
                return None
            self._lock = self._locked(path, shared)
            self._path = path
        from .schema import prepare_store  # most programs do without

        prepare_store(path, binary)
        try:
            if create:
                _create(path)
        except OSError as exc:
            raise ServerStartError(f"storage: a store cannot be made: {exc}") from exc
        if shared and name is None:
            return None  # what is unfinished may be a neighbour's, and under way
        left = _left(path)
        name = name or next((owner for _, owner in left if owner), None)
        self.recovered = tuple(run for run, owner in left if owner in (name, None))
        if not shared:
            _warn_of_others(left, name)
        return name

    def give_up(self) -> None:
        """Have :meth:`take` wait no more for one who dies; from any thread."""
        self._is_unwanted.set()

    def give_back(self) -> None:
        """Let others have it, once the server is gone."""
        self.give_up()
        with self._guard:
            lock, self._lock = self._lock, None
        if lock is not None:
            lock.give_back()

    def find(self, submit: str, since: float, life: int | None) -> str | None:
        """The id of the run that a submit has begun; None if it has begun none.

        :param submit: what its variable ``SUBMIT`` was
        :param since: when it was sent, as ``time.time`` says
        :param life: a life of the server that is over, so that nothing changes any more in
            what it was asked for; None if that is not known
        :raises UnreadableStoreError: if nobody knows
        """
        if self._path is None:
            raise UnreadableStoreError("the store is not a file of sqlite")
        with self._looking_up:
            known = self._submits_of
            if known is None or known[0] != life or known[1] > since:
                self._look_up(self._path, since, life)
            if isinstance(self._submits, UnreadableStoreError):
                raise UnreadableStoreError(str(self._submits))
            return self._submits.get(submit)

    def _look_up(self, path: Path, since: float, life: int | None) -> None:
        try:
            self._submits = _submits(path, since)
        except UnreadableStoreError as exc:
            # For all who ask for this life: each of them would wait as long for nothing.
            self._submits = exc
        self._submits_of = None if life is None else (life, since)

    def _locked(self, path: Path, shared: bool) -> StoreLock:
        lock = StoreLock(path, shared=shared)
        try:
            lock.take(_PATIENCE, self._is_unwanted)
        except StoreLockedError as exc:
            raise ServerStartError(_in_use(path, exc.holder)) from exc
        except OSError as exc:
            raise ServerStartError(
                f"storage: {path} cannot be used: {exc}. Its directory has to exist, and "
                "to be writable"
            ) from exc
        return lock


def _check_place(path: Path) -> None:
    """Refuse a store that a stranger has prepared, or may have a part of. Blocks.

    :raises ServerStartError: if it is one
    """
    try:
        for end in _ENDS:
            check_unplanted(f"{path}{end}")
    except PermissionError as exc:
        raise ServerStartError(f"storage: {path} cannot be used: {exc}") from exc


def _in_use(path: Path, holder: int | None) -> str:
    if holder == os.getpid():
        who = "another runtime of this process"
    else:
        who = "another runtime" + (f" (in process {holder})" if holder else "")
    return (
        f"storage: {path} is in use by {who}. Two servers on one store would run its "
        "workflows twice: use that runtime, by StepflowClient(runtime.url) from another "
        "process, or give both of them lease= and an etcd, by which they share it"
    )


def _create(path: Path) -> None:
    """Make an empty one that is nobody else's to read: runs have secrets in them."""
    try:
        create_private(path)
    except FileExistsError:
        if path.is_dir():
            raise IsADirectoryError(
                errno.EISDIR, os.strerror(errno.EISDIR), str(path)
            ) from None
        if not os.access(path, os.R_OK | os.W_OK):
            raise PermissionError(
                errno.EACCES, os.strerror(errno.EACCES), str(path)
            ) from None


def _left(path: Path) -> list[_Left]:
    """What is unfinished; nothing if it cannot be read, for then no name would help."""
    try:
        if path.stat().st_size == 0:
            return []
        with _opened(path) as store:
            return store.execute(_UNFINISHED).fetchall()
    except (OSError, UnreadableStoreError):
        return []


def _warn_of_others(left: list[_Left], name: str | None) -> None:
    others = sorted({owner for _, owner in left if owner} - {name})
    if others:
        report(
            logging.WARNING,
            "the store has unfinished runs of other servers (%s), with which this one will "
            "not go on: they are for a server with that orchestrator_id",
            ", ".join(others),
        )


def _submits(path: Path, since: float) -> dict[str, str]:
    first = f"{max(int((since - _CLOCK_SLACK) * 1000), 0):012x}"
    with _opened(path) as store:
        rows = store.execute(_SUBMITTED, (SUBMIT, f"{first[:8]}-{first[8:]}"))
        return {submit: run for submit, run in rows if isinstance(submit, str)}


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """The store, to be read. A server may be at work on it, or have been killed in it.

    :raises UnreadableStoreError: in the block too, if it cannot be read
    """
    try:
        import sqlite3  # takes some milliseconds to come; not every Python has it

        from .schema import sqlite_uri
    except ImportError as exc:
        raise UnreadableStoreError(f"this Python has no sqlite3: {exc}") from exc
    try:
        # Not read-only: the log of a server that was killed has to be replayed first.
        uri = sqlite_uri(path, "mode=rw")
        connection: Any = sqlite3.connect(uri, uri=True, timeout=_BUSY_TIMEOUT)
        with closing(connection):
            connection.execute("PRAGMA query_only = ON")
            yield connection
    except sqlite3.Error as exc:
        raise UnreadableStoreError(str(exc)) from exc
