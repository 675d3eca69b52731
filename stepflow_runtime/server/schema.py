"""Whether a server can use the store in a file, found out before it is started.

The server itself does not ask. It adds its tables to the database of another application;
a schema from a newer server it takes for its own; with a file that is no database it waits
for 30 seconds; and a store that 0.12 wrote it opens, and answers every question about a run
by "internal error".

Contract: :func:`check_store` looks and touches nothing. :func:`upgrade_store` changes how
columns are declared, and no row. What either of them raises names the option, the file,
what is wrong, and what to do. Without Python's ``sqlite3`` only what can be seen without is
checked, and that is reported once.

Everything blocks: for a worker thread. A check takes about a millisecond.
"""

from __future__ import annotations

import logging
import mmap
import os
import re
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..errors import ServerStartError
from ..logs.own import report

if TYPE_CHECKING:
    import sqlite3

__all__ = [
    "MIGRATIONS",
    "check_store",
    "is_store",
    "prepare_store",
    "sqlite_uri",
    "upgrade_store",
]

# What a fresh store of each version lists as done in its table _stepflow_migrations; the
# tests compare this with the servers. What none of these did is looked for in the binary,
# which carries the names of its own.
_0_12: Final = frozenset(
    {
        "001_create_blob_tables",
        "001_create_metadata_tables",
        "002_create_journal_tables",
        "003_add_step_statuses_to_run_items",
        "004_add_orchestrator_id_to_runs",
        "005_add_created_at_seqno_to_runs",
        "005_create_checkpoint_table",
        "006_add_finished_at_seqno_to_runs",
        "007_create_step_statuses_table",
    }
)
MIGRATIONS: Final = {
    "0.12": _0_12,
    "0.13": _0_12 | {"008_create_component_registrations_table"},
}
_KNOWN: Final = frozenset[str]().union(*MIGRATIONS.values())

# Every binary knows this one, if it shows what it knows at all: a script does not.
_ALWAYS_KNOWN: Final = b"001_create_blob_tables"

# Up to 0.11, what is in flight is journalled in another way, and recovery gives it up.
_SINCE_0_12: Final = "007_create_step_statuses_table"

_LEDGER: Final = "_stepflow_migrations"
_MAGIC: Final = b"SQLite format 3\0"
_SMALLEST: Final = 512  # sqlite's smallest page

# Up to 0.12, columns of times are declared DATETIME, which 0.13 refuses to read; in its own
# stores they are TEXT, with the same text in them, which 0.12 reads, too. No migration was
# made of that. In lower case it is the name of a function, in defaults.
_DATETIME: Final = re.compile(r"\bDATETIME\b")
_DATED: Final = frozenset(
    {
        _LEDGER,
        "blobs",
        "run_items",
        "runs",
        "step_info",
        "step_results",
        "step_statuses",
    }
)

# As long as the server itself would wait for whoever has locked it.
_BUSY_TIMEOUT: Final = 5.0

_BACKUP: Final = "or start from a backup"
_NO_DATABASE: Final = (
    f"is no sqlite database, so it is no store; name another file, {_BACKUP}"
)


@dataclass(frozen=True)
class _Schema:
    """What a database says of itself.

    :ivar tables: how each table was declared
    :ivar migrations: what a server has done to it, or None if none ever had it
    """

    tables: dict[str, str]
    migrations: frozenset[str] | None

    def is_dated(self) -> bool:
        return any(map(_DATETIME.search, self._dated().values()))

    def redeclared(self) -> dict[str, str]:
        """The tables that 0.13 could not read, as they are to be declared."""
        return {
            name: _DATETIME.sub("TEXT", sql)
            for name, sql in self._dated().items()
            if _DATETIME.search(sql)
        }

    def _dated(self) -> dict[str, str]:
        return {name: sql for name, sql in self.tables.items() if name in _DATED}


def prepare_store(path: Path, binary: Path) -> None:
    """Check a store, and upgrade it if a server before 0.13 wrote it.

    For who has the store to himself, or shares it with servers of the same version.

    :raises ServerStartError: if the server could not use it
    """
    schema = _checked(path, binary)
    if schema is not None and schema.is_dated():
        upgrade_store(path)


def check_store(path: Path, binary: Path) -> None:
    """Check that a server can use the store in a file, or make one there.

    :param binary: the server; newer ones than this library knows may know the store
    :raises ServerStartError: if it could not
    """
    _checked(path, binary)


def _checked(path: Path, binary: Path) -> _Schema | None:
    """The schema of the store, or None if there is none yet, or none that can be seen."""
    path = Path(os.path.realpath(path))  # its log is beside the file itself, not a link
    try:
        if not _look_at_file(path):
            return None
        with _translated(path):
            schema = _schema(path)
    except OSError as exc:
        raise ServerStartError(f"storage: {path} cannot be used: {exc}") from exc
    if schema is not None:
        _judge(path, schema, binary)
    return schema


def _look_at_file(path: Path) -> bool:
    """True if there is a database in it; False if one can be made there."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise ServerStartError(
            f"storage: {path} is {kind}; a store is a file, which is made if it is not there"
        )
    if status.st_size == 0:
        return False
    if (
        status.st_size < _SMALLEST
    ):  # of a single byte, sqlite would say that it is empty
        raise ServerStartError(f"storage: {path} {_NO_DATABASE}")
    if not os.access(path, os.R_OK | os.W_OK):
        raise ServerStartError(
            f"storage: {path} is not readable and writable for this user; a server has to "
            "write to its store, and to the directory that it is in"
        )
    return True


def _judge(path: Path, schema: _Schema, binary: Path) -> None:
    if schema.migrations is None:
        if schema.tables:
            names = ", ".join(sorted(schema.tables)[:5])
            raise ServerStartError(
                f"storage: {path} is the database of another application (its tables: "
                f"{names}); a server would add its own. Name another file"
            )
        return
    unknown = schema.migrations - _KNOWN
    if unknown and (beyond := _beyond(unknown, binary)):
        raise ServerStartError(
            f"storage: {path} was written by a newer server than {binary}, which does not "
            f"know what was done to it: {', '.join(beyond)}. Use the version of "
            f"stepflow-runtime, or the binary=, that wrote it, {_BACKUP} that was made "
            "before. It has not been touched"
        )
    if "runs" in schema.tables and schema.is_dated():
        _refuse_ancient(path, schema.migrations)


def _refuse_ancient(path: Path, migrations: frozenset[str]) -> None:
    if _SINCE_0_12 not in migrations:
        raise ServerStartError(
            f"storage: {path} was written by a server of version 0.11 or older, and stores "
            "can be taken over from 0.12 on. Read its results with the server that wrote "
            "it, and name another file here"
        )


def _beyond(migrations: frozenset[str], binary: Path) -> list[str]:
    """Those that a server does not know; none if it does not show what it knows."""
    try:
        with (
            binary.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as code,
        ):
            if code.find(_ALWAYS_KNOWN) < 0:
                return []
            return sorted(name for name in migrations if code.find(name.encode()) < 0)
    except (OSError, ValueError):  # ValueError: it is empty
        return []


# -- with sqlite -----------------------------------------------------------------------


def _schema(path: Path) -> _Schema | None:
    """What the database says of itself; None if this Python cannot ask it."""
    try:
        import sqlite3  # takes some milliseconds to come; not every Python has it
    except ImportError as exc:
        report(
            logging.WARNING,
            "the store's schema is not checked: this Python has no sqlite3 (%s)",
            exc,
        )
        _look_at_header(path)
        return None
    if os.path.exists(f"{path}-journal"):
        # A server was killed in its first milliseconds, before it had a log. To read that,
        # it would have to be rolled back, which is for the next server to do.
        return None
    # Read-only. The log of a server that is at work, or was killed, is read along, and stays
    # for a server to replay. If there is none, sqlite would make one, empty, and leave it: so
    # it is told that nobody writes, which is true of a server's database without a log.
    has_log = os.path.exists(f"{path}-wal")
    uri = sqlite_uri(path, "mode=ro" if has_log else "mode=ro&immutable=1")
    with closing(sqlite3.connect(uri, uri=True, timeout=_BUSY_TIMEOUT)) as database:
        return _read_schema(database)


def _look_at_header(path: Path) -> None:
    """For want of better. With sqlite3, closing the file would take away its locks."""
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ServerStartError(f"storage: {path} {_NO_DATABASE}")


def is_store(database: sqlite3.Connection) -> bool:
    """True if a server has made its tables there."""
    return _read_schema(database).migrations is not None


def _read_schema(database: sqlite3.Connection) -> _Schema:
    rows = database.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'")
    tables = {name: sql or "" for name, sql in rows if not name.startswith("sqlite_")}
    if _LEDGER not in tables:
        return _Schema(tables, None)
    # A name that is no text is none that anybody knows.
    done = database.execute(f"SELECT CAST(name AS TEXT) FROM {_LEDGER}")
    return _Schema(tables, frozenset(str(name) for (name,) in done))


def sqlite_uri(path: Path, query: str) -> str:
    """A file's URI for sqlite, whatever its name is made of."""
    return f"{path.absolute().as_uri()}?{query}"


def upgrade_store(path: Path) -> bool:
    """Have the columns of times declared so that a server 0.13 can read them.

    No row is changed, and a server 0.12 can go on with the store. Takes milliseconds,
    however much there is in it, and happens wholly or not at all.

    :return: whether there was something to do
    :raises ServerStartError: if it cannot be done
    """
    with _translated(path):
        import sqlite3

        uri = sqlite_uri(path, "mode=rw")
        with closing(sqlite3.connect(uri, uri=True, timeout=_BUSY_TIMEOUT)) as database:
            database.isolation_level = None  # transactions are ours to begin
            is_changed = _redeclare(database)
    if is_changed:
        report(
            logging.INFO,
            "%s was written by a server 0.12, and is declared as by 0.13 now",
            path,
        )
    return is_changed


def _redeclare(database: sqlite3.Connection) -> bool:
    """sqlite's own recipe for changes that concern no row (lang_altertable.html)."""
    database.execute("BEGIN IMMEDIATE")  # undone when the database is closed
    # Read again, now that nobody else can write: a neighbour may have done it.
    redeclared = _read_schema(database).redeclared()
    if not redeclared:
        return False
    (version,) = database.execute("PRAGMA schema_version").fetchone()
    database.execute("PRAGMA writable_schema = ON")
    database.executemany(
        "UPDATE sqlite_master SET sql = ? WHERE type = 'table' AND name = ?",
        [(sql, name) for name, sql in redeclared.items()],
    )
    # Whoever has it open reads the schema anew.
    database.execute(f"PRAGMA schema_version = {version + 1}")
    database.execute("PRAGMA writable_schema = RESET")
    _check_readable(database, list(redeclared))
    database.execute("COMMIT")
    return True


def _check_readable(database: sqlite3.Connection, tables: list[str]) -> None:
    """See that sqlite understands what was written, before that is for good."""
    for table in tables:
        columns: list[Any] = database.execute(f"PRAGMA table_info({table})").fetchall()
        if not columns or any(kind == "DATETIME" for _, _, kind, *_ in columns):
            raise ServerStartError(
                f"storage: the table {table} cannot be declared anew; use the server that "
                "wrote the store, by binary="
            )


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Errors of sqlite's as what they mean for a start."""
    try:
        yield
    except ImportError as exc:
        raise ServerStartError(
            f"storage: {path} was written by a server 0.12, and this Python has no sqlite3 "
            f"to upgrade it with ({exc}); start it once with a Python that has"
        ) from exc
    except ServerStartError:
        raise
    except Exception as exc:
        if not (words := _words(exc)):
            raise
        raise ServerStartError(f"storage: {path} {words}: {exc}") from exc


def _words(exc: Exception) -> str:
    """What an error of sqlite's means for a store; nothing if it is none."""
    import sqlite3

    if not isinstance(exc, sqlite3.Error):
        return ""
    # The low byte is the primary code.
    code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return "is kept locked by another program"
    if code == sqlite3.SQLITE_NOTADB:
        return _NO_DATABASE
    if code == sqlite3.SQLITE_CORRUPT:
        return f"is damaged; repair it with sqlite's .recover, {_BACKUP}"
    return "cannot be used as a store"
