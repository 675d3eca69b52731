"""Stores that are checked, upgraded and copied: on real files, and with real servers."""

from __future__ import annotations

import asyncio
import builtins
import logging
import os
import resource
import shutil
import signal
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio
import pytest

from stepflow_runtime import (
    BackupError,
    LogConfig,
    RunStatus,
    ServerCrashedError,
    ServerStartError,
    StepflowRuntime,
    backup,
    backup_store,
)
from stepflow_runtime.server.schema import (
    MIGRATIONS,
    check_store,
    prepare_store,
    upgrade_store,
)

from .conftest import ECHO, SLEEP, each_backend, wait_until
from .executors import CONFIG

QUIET = LogConfig(level="error")


def rows(store: Path, question: str) -> list[tuple[Any, ...]]:
    uri = f"{store.as_uri()}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True)) as database:
        return database.execute(question).fetchall()


def write(store: Path, *statements: str) -> None:
    with closing(sqlite3.connect(store)) as database:
        for statement in statements:
            database.execute(statement)
        database.commit()


def beside(path: Path) -> dict[str, bytes]:
    """Whatever is in a file's directory."""
    return {
        each.name: each.read_bytes() for each in path.parent.iterdir() if each.is_file()
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a run in it, that its server has left in good order."""
    store = tmp_path_factory.mktemp("written") / "runs.db"
    with StepflowRuntime.start(storage=store, log_config=QUIET) as runtime:
        asyncio.run(runtime.run(ECHO, {"x": 1}))
    # Into one file, and out of the mode of a store in use: closing it removes the log.
    with closing(sqlite3.connect(store)) as database:
        database.execute("SELECT * FROM runs").fetchall()
    assert [each.name for each in store.parent.iterdir()] == ["runs.db"]
    return store


@pytest.fixture
def store(written: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    return Path(shutil.copy(written, tmp_path / "runs.db"))


# -- what a server could not use -------------------------------------------------------


def text(store: Path) -> None:
    store.write_text("This is no database.\n" * 100)


def short(store: Path) -> None:
    store.write_text("x")


def cut(store: Path) -> None:
    os.truncate(store, store.stat().st_size // 2)


def directory(store: Path) -> None:
    store.unlink()
    store.mkdir()


def pipe(store: Path) -> None:
    store.unlink()
    os.mkfifo(store)


def anothers(store: Path) -> None:
    store.unlink()
    write(store, "CREATE TABLE customers (name)")


def newer(store: Path) -> None:
    write(store, "INSERT INTO _stepflow_migrations (name) VALUES ('099_of_tomorrow')")


def ancient(store: Path) -> None:
    """As a server 0.11 leaves one."""
    write(
        store,
        "DELETE FROM _stepflow_migrations WHERE name > '007'",
        "DROP TABLE runs",
        "CREATE TABLE runs (id TEXT, created_at DATETIME DEFAULT CURRENT_TIMESTAMP)",
    )


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (text, "is no sqlite database, so it is no store; name another file"),
        (short, "is no sqlite database"),
        (cut, r"is damaged; repair it with sqlite's \.recover, or start from a backup"),
        (directory, "is a directory; a store is a file"),
        (pipe, "is no regular file"),
        (anothers, r"is the database of another application \(its tables: customers\)"),
        (newer, r"was written by a newer server than .*: 099_of_tomorrow\. Use the"),
        (ancient, r"was written by a server of version 0\.11 or older"),
    ],
)
def test_a_file_that_cannot_be_a_store_is_refused_and_left_alone(
    store: Path, real_binary: Path, spoil: Callable[[Path], None], words: str
) -> None:
    spoil(store)
    before = store.stat(), beside(store)
    for check in (check_store, prepare_store):
        with pytest.raises(ServerStartError, match=words) as caught:
            check(store, real_binary)
        assert str(caught.value).startswith(f"storage: {store} ")
    after = store.stat(), beside(store)
    assert after[1] == before[1]
    assert after[0].st_mtime_ns == before[0].st_mtime_ns


@pytest.mark.parametrize("spoil", [text, anothers, newer])
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.anyio
async def test_a_start_says_so_before_there_is_a_server(
    store: Path, spoil: Callable[[Path], None]
) -> None:
    """Which would wait for 30 s, add its tables, or take it for its own."""
    spoil(store)
    before = beside(store)
    with pytest.raises(ServerStartError, match="^storage: ") as caught:
        # A chosen id makes no difference.
        async with StepflowRuntime.start(storage=store, orchestrator_id="mine"):
            pass
    assert caught.value.exit is None
    assert beside(store) == before  # no lock, either


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_a_file_of_somebody_else_is_refused(store: Path, real_binary: Path) -> None:
    store.chmod(0o400)
    with pytest.raises(ServerStartError, match="is not readable and writable"):
        check_store(store, real_binary)


def test_a_store_that_somebody_keeps_locked_is_refused(
    store: Path, real_binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepflow_runtime.server.schema._BUSY_TIMEOUT", 0.05)
    with closing(sqlite3.connect(store)) as holder:
        holder.execute("PRAGMA locking_mode = EXCLUSIVE")
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(ServerStartError, match="is kept locked by another program"):
            check_store(store, real_binary)


@pytest.mark.parametrize("name", ["runs.db", "10% of 100?#.db", "r\u00e9sum\u00e9 .db"])
def test_a_store_is_one_whatever_its_name(
    written: Path, tmp_path: Path, real_binary: Path, name: str
) -> None:
    store = Path(shutil.copy(written, tmp_path / name))
    link = tmp_path / "link"
    link.symlink_to(store)
    check_store(store, real_binary)
    check_store(link, real_binary)
    newer(store)
    for path in (store, link):
        with pytest.raises(ServerStartError, match="newer server"):
            check_store(path, real_binary)


def test_where_there_is_nothing_yet_a_store_can_be_made(
    tmp_path: Path, real_binary: Path
) -> None:
    check_store(tmp_path / "new.db", real_binary)
    (tmp_path / "empty.db").touch()
    check_store(tmp_path / "empty.db", real_binary)
    # sqlite's empty database, with nobody's tables in it.
    write(tmp_path / "blank.db", "PRAGMA user_version = 1")
    check_store(tmp_path / "blank.db", real_binary)


def test_what_is_only_in_the_log_of_a_killed_server_is_seen(
    store: Path, tmp_path: Path, real_binary: Path
) -> None:
    with closing(sqlite3.connect(store)) as database:
        database.execute("PRAGMA wal_autocheckpoint = 0")
        database.execute("INSERT INTO _stepflow_migrations (name) VALUES ('099_new')")
        database.commit()
        for end in ("", "-wal"):  # as after SIGKILL
            shutil.copy(f"{store}{end}", tmp_path / f"killed.db{end}")
    killed = tmp_path / "killed.db"
    before = killed.read_bytes(), Path(f"{killed}-wal").read_bytes()
    with pytest.raises(ServerStartError, match="newer server.*099_new"):
        check_store(killed, real_binary)
    assert (killed.read_bytes(), Path(f"{killed}-wal").read_bytes()) == before


def test_a_binary_that_knows_more_may_use_more(
    store: Path, tmp_path: Path, real_binary: Path
) -> None:
    """A patch release, or a server of one's own; a script does not show what it knows."""
    newer(store)
    tomorrows = tmp_path / "tomorrows-server"
    tomorrows.write_bytes(real_binary.read_bytes() + b"099_of_tomorrow")
    check_store(store, tomorrows)
    script = tmp_path / "script"
    script.write_text(f"#!/bin/sh\nexec {real_binary} $*\n")
    check_store(store, script)
    write(store, "INSERT INTO _stepflow_migrations (name) VALUES ('100_later')")
    with pytest.raises(ServerStartError, match="newer server.*: 100_later"):
        check_store(store, tomorrows)


@pytest.fixture
def no_sqlite3(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Python that was built without it."""
    original = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name == "sqlite3":
            raise ImportError("No module named '_sqlite3'")
        return original(name, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", without)
        yield


@pytest.mark.usefixtures("no_sqlite3")
def test_without_sqlite3_less_is_checked_and_that_is_said(
    store: Path,
    tmp_path: Path,
    real_binary: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "stepflow_runtime")
    prepare_store(store, real_binary)
    assert "the store's schema is not checked" in caplog.text
    text(tmp_path / "text.db")
    with pytest.raises(ServerStartError, match="is no sqlite database"):
        prepare_store(tmp_path / "text.db", real_binary)
    with pytest.raises(ServerStartError, match="this Python has no sqlite3"):
        upgrade_store(store)
    with pytest.raises(BackupError, match="this Python has no sqlite3"):
        asyncio.run(backup_store(store, tmp_path / "copy.db"))
    assert not (tmp_path / "copy.db").exists()


def test_the_migrations_that_are_known_are_those_of_the_server(written: Path) -> None:
    done = {name for (name,) in rows(written, "SELECT name FROM _stepflow_migrations")}
    assert done == MIGRATIONS["0.13"]
    assert not upgrade_store(written)


# -- copies ----------------------------------------------------------------------------


def is_whole(copy: Path) -> bool:
    return rows(copy, "PRAGMA integrity_check") == [("ok",)]


class _Load:
    """Runs that are being made, one after the other, by several tasks."""

    def __init__(self, runtime: StepflowRuntime) -> None:
        self.runtime = runtime
        self.made: dict[str, int] = {}
        self._begun = 0

    async def make(self, tasks: int, until: int) -> None:
        async def work() -> None:
            while self._begun < until:
                self._begun += 1
                number = self._begun
                result = await self.runtime.run(ECHO, number)
                assert result.output == number
                self.made[result.run_id] = number

        async with anyio.create_task_group() as group:
            for _ in range(tasks):
                group.start_soon(work)

    async def wait_for(self, number: int) -> None:
        while len(self.made) < number:  # noqa: ASYNC110
            await anyio.sleep(0.005)


@pytest.mark.anyio
@each_backend
async def test_a_copy_made_under_load_is_one_moment_and_costs_nothing(
    tmp_path: Path,
) -> None:
    store, copies = tmp_path / "runs.db", [tmp_path / f"{n}.db" for n in range(3)]
    finished: list[dict[str, int]] = []
    with anyio.fail_after(120):
        async with StepflowRuntime.start(storage=store, log_config=QUIET) as runtime:
            await runtime.put_blob(os.urandom(20_000_000))  # it is to take a while
            load = _Load(runtime)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(load.make, 20, 500)
                for copy, number in zip(copies, (50, 200, 350), strict=True):
                    await load.wait_for(number)
                    finished.append(dict(load.made))
                    await backup_store(store, copy)
            assert len(load.made) == 500
        assert set(beside(store)) >= {"0.db", "1.db", "2.db"}
        assert not [name for name in beside(store) if name.endswith(".part")]
        for copy, before in zip(copies, finished, strict=True):
            assert stat.S_IMODE(copy.stat().st_mode) == 0o600
            assert is_whole(copy)
            async with StepflowRuntime.start(storage=copy, log_config=QUIET) as runtime:
                ended = await _outputs(runtime, before)
            assert ended == before
        assert len(copies[0].read_bytes()) > 20_000_000
        async with StepflowRuntime.start(storage=store, log_config=QUIET) as runtime:
            assert runtime.recovered_runs == ()
            assert await _outputs(runtime, load.made) == load.made


async def _outputs(runtime: StepflowRuntime, runs: dict[str, int]) -> dict[str, Any]:
    outputs: dict[str, Any] = {}

    async def ask(run: str) -> None:
        outputs[run] = (await runtime.get_result(run)).output

    async with anyio.create_task_group() as tasks:
        for run in runs:
            tasks.start_soon(ask, run)
    return outputs


@pytest.mark.anyio
@each_backend
async def test_a_server_on_a_copy_goes_on_with_what_was_unfinished_unless_told_otherwise(
    tmp_path: Path,
) -> None:
    store, copy = tmp_path / "runs.db", tmp_path / "copy.db"
    with anyio.fail_after(60):
        async with StepflowRuntime.start(storage=store, log_config=QUIET) as runtime:
            run = await runtime.submit(SLEEP, 400)
            await backup_store(store, copy)
            assert rows(copy, "SELECT id, status FROM runs") == [(run, "running")]
            still = {**CONFIG, "recovery": {"enabled": False, "maxStartupRecovery": 0}}
            async with StepflowRuntime.start(
                still, storage=copy, log_config=QUIET
            ) as other:
                assert (await runtime.get_result(run)).is_success
                assert (await other.get_run(run)).status is RunStatus.RUNNING
            async with StepflowRuntime.start(storage=copy, log_config=QUIET) as other:
                assert other.recovered_runs == (run,)
                assert (await other.get_result(run)).is_success


Interlude = Callable[[threading.Event], None]


@pytest.fixture
def between_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[[Interlude], None]:
    """Has something called between the steps of a copy, in its thread."""
    original = backup._go_on

    def set_up(interlude: Interlude) -> None:
        def go_on(is_given_up: threading.Event) -> None:
            interlude(is_given_up)
            original(is_given_up)

        monkeypatch.setattr(backup, "_PAGES", 1)
        monkeypatch.setattr(backup, "_go_on", go_on)

    return set_up


@pytest.mark.anyio
@each_backend
async def test_a_cancelled_copy_leaves_nothing(
    store: Path, between_steps: Callable[[Interlude], None]
) -> None:
    is_in_the_midst = threading.Event()

    def interlude(is_given_up: threading.Event) -> None:
        if not is_in_the_midst.is_set():
            is_in_the_midst.set()
            assert is_given_up.wait(15)

    between_steps(interlude)
    copy = store.with_name("copy.db")
    with anyio.fail_after(15):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(backup_store, store, copy)
            await wait_until(is_in_the_midst.is_set)
            (part,) = store.parent.glob(".copy.db.*.part")
            assert stat.S_IMODE(part.stat().st_mode) == 0o600
            tasks.cancel_scope.cancel()
    assert not [name for name in beside(store) if "copy" in name]
    await backup_store(store, copy)
    assert is_whole(copy)


def test_writes_neither_wait_for_a_copy_nor_make_it_begin_again(
    store: Path, between_steps: Callable[[Interlude], None]
) -> None:
    ((pages,),) = rows(store, "PRAGMA page_count")
    names = "SELECT name FROM _stepflow_migrations"
    before = rows(store, names)
    steps = 0

    def interlude(_: threading.Event) -> None:
        nonlocal steps
        steps += 1
        assert steps <= pages, "it begins again and again"
        with closing(sqlite3.connect(store, timeout=0)) as database:
            database.execute(f"INSERT INTO _stepflow_migrations VALUES ({steps}, '')")
            database.commit()

    between_steps(interlude)
    asyncio.run(backup_store(store, copy := store.with_name("copy.db")))
    assert pages / 2 < steps
    assert is_whole(copy)
    assert rows(copy, names) == before
    assert len(rows(store, names)) == len(before) + steps


def test_what_comes_to_be_there_meanwhile_is_not_replaced(
    store: Path, between_steps: Callable[[Interlude], None]
) -> None:
    copy = store.with_name("copy.db")

    def interlude(_: threading.Event) -> None:
        copy.write_text("a neighbour's")

    between_steps(interlude)
    with pytest.raises(FileExistsError, match="there is something at .* now"):
        asyncio.run(backup_store(store, copy))
    assert {name: v for name, v in beside(store).items() if "copy" in name} == {
        "copy.db": b"a neighbour's"
    }


def test_a_file_is_replaced_if_that_is_asked_for(store: Path) -> None:
    copy = store.with_name("copy.db")
    copy.write_text("yesterday's")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        asyncio.run(backup_store(store, copy))
    assert copy.read_text() == "yesterday's"
    asyncio.run(backup_store(store, copy, overwrite=True))
    assert is_whole(copy)
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600


@pytest.mark.anyio
@each_backend
async def test_a_store_in_use_is_never_replaced(store: Path) -> None:
    """sqlite would add its log to the copy. One that was in use is."""
    other = store.with_name("other.db")
    await backup_store(store, other)
    async with StepflowRuntime.start(storage=other, log_config=QUIET) as runtime:
        run = (await runtime.run(ECHO, 1)).run_id
        with pytest.raises(BackupError, match=r"it is in use as a store: .*other\.db-"):
            await backup_store(store, other, overwrite=True)
        assert (await runtime.get_result(run)).output == 1
        assert runtime.pid is not None
        os.kill(runtime.pid, signal.SIGKILL)
        with pytest.raises(ServerCrashedError):
            await runtime.get_run(run)
    assert "other.db-wal" in beside(store)
    await backup_store(store, other, overwrite=True)
    assert is_whole(other)
    assert run not in {each for (each,) in rows(other, "SELECT id FROM runs")}


def test_a_copy_is_not_put_beside_the_log_of_another(store: Path) -> None:
    target = store.with_name("other.db")
    Path(f"{target}-wal").write_text("what is not in the file yet")
    for overwrite in (False, True):
        with pytest.raises(BackupError, match=r"other\.db-wal is there"):
            asyncio.run(backup_store(store, target, overwrite=overwrite))
        assert not target.exists()


def unnamed(store: Path) -> None:
    store.unlink()


def unused(store: Path) -> None:
    store.write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "target", "error", "words"),
    [
        (unnamed, "copy.db", FileNotFoundError, r"runs\.db"),
        (directory, "copy.db", BackupError, "is no file, so it is no store"),
        (pipe, "copy.db", BackupError, "is no file, so it is no store"),
        (unused, "copy.db", BackupError, "is no store of a Stepflow server"),
        (anothers, "copy.db", BackupError, "is no store of a Stepflow server"),
        (text, "copy.db", BackupError, "cannot be copied: file is not a database"),
        (cut, "copy.db", BackupError, "cannot be copied: database disk image is"),
        (None, "no/copy.db", FileNotFoundError, "no/"),
        (None, ".", IsADirectoryError, "is a directory; name a file in it"),
        (None, "runs.db", BackupError, "is the store itself"),
        (None, "link.db", BackupError, "is the store itself"),
    ],
)
def test_what_cannot_be_copied_leaves_nothing(
    store: Path,
    spoil: Callable[[Path], None] | None,
    target: str,
    error: type[Exception],
    words: str,
) -> None:
    if spoil is not None:
        spoil(store)
    store.with_name("link.db").symlink_to(store)
    before = sorted(store.parent.iterdir())
    with pytest.raises(error, match=words):
        asyncio.run(backup_store(store, store.parent / target, overwrite=True))
    left = [path.name for path in store.parent.iterdir() if path not in before]
    # What sqlite makes where it looks.
    assert set(left) <= {"runs.db-wal", "runs.db-shm"}


def test_a_copy_that_does_not_fit_leaves_nothing(store: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        with pytest.raises(BackupError, match="cannot be copied: "):
            asyncio.run(backup_store(store, store.with_name("copy.db")))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [name for name in beside(store) if "copy" in name]


def test_from_a_program_without_an_event_loop(store: Path, tmp_path: Path) -> None:
    asyncio.run(backup_store(str(store), str(tmp_path / "copy.db")))
    assert rows(tmp_path / "copy.db", "SELECT status FROM runs") == [("completed",)]
