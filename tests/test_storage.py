"""What ``storage=`` and ``lease=`` become: pure, but for the lock on a store's file."""

from __future__ import annotations

import json
import multiprocessing
import os
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepflow_runtime.api import SubmitMark
from stepflow_runtime.errors import ServerStartError
from stepflow_runtime.logs.config import LogConfig
from stepflow_runtime.logs.sinks import LogHub
from stepflow_runtime.server import store as store_module
from stepflow_runtime.server.lock import StoreLock, StoreLockedError
from stepflow_runtime.server.options import DEFAULT_CONFIG, ServerOptions
from stepflow_runtime.server.secrecy import Secrets
from stepflow_runtime.server.storage import Keeping, Leases, Storage, merged
from stepflow_runtime.server.store import Store, UnreadableStoreError

SQLITE = {"type": "sqlite", "databaseUrl": "sqlite:/x.db?mode=rwc"}
MEMORY = {"type": "inMemory"}
ETCD = ["http://127.0.0.1:2379"]


def config_of(**options: Any) -> dict[str, Any]:
    """The configuration that a server is given by standard input."""
    command = (
        ServerOptions(**options).anchored().command({}, port=0, orchestrator_id="")
    )
    assert command.stdin is not None
    config: dict[str, Any] = json.loads(command.stdin)
    return config


# -- what becomes of them --------------------------------------------------------------


def test_a_path_is_an_sqlite_store_that_the_server_migrates(tmp_path: Path) -> None:
    config = config_of(storage=tmp_path / "runs.db")
    assert config["storageConfig"] == {
        "type": "sqlite",
        "databaseUrl": f"sqlite:{tmp_path}/runs.db?mode=rwc&cache=shared",
        "maxConnections": 100,
        "autoMigrate": True,
    }
    assert config["plugins"] == DEFAULT_CONFIG["plugins"]
    assert "leaseManager" not in config


def test_all_runs_are_recovered_at_once_and_by_the_start_alone() -> None:
    # The server's own: 100, and then 10 every 30 s; and it would take runs that have just
    # begun for orphans, and run them twice.
    recovery = config_of(storage="runs.db")["recovery"]
    assert recovery["maxStartupRecovery"] >= 100_000
    assert recovery["enabled"] is False
    shared = config_of(storage="runs.db", lease=ETCD)["recovery"]
    assert shared["enabled"] is True
    assert shared["maxClaimsPerCheck"] >= 100_000
    assert shared["leaseTtlSecs"] > 5  # sqlite's own patience with a writer


def test_what_the_configuration_says_of_recovery_stays() -> None:
    given = {**DEFAULT_CONFIG, "recovery": {"checkpointInterval": 7, "enabled": True}}
    recovery = config_of(config_path=given, storage="runs.db")["recovery"]
    assert recovery["checkpointInterval"] == 7
    assert recovery["enabled"] is True
    assert recovery["maxStartupRecovery"] >= 100_000


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1))
def test_every_path_comes_back_out_of_its_url(name: str) -> None:
    path = Path("/d") / f"x{name}"
    url = Storage(path=path).config()["databaseUrl"]
    assert unquote(url.removeprefix("sqlite:").partition("?")[0]) == str(path)
    assert (
        Keeping.of({"storageConfig": {"type": "sqlite", "databaseUrl": url}}).path
        == path
    )


def test_a_relative_path_is_one_of_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real.db")
    monkeypatch.chdir(tmp_path)
    url = config_of(storage="link")["storageConfig"]["databaseUrl"]
    assert url == f"sqlite:{os.path.realpath(tmp_path)}/real.db?mode=rwc&cache=shared"


def test_a_database_elsewhere_is_passed_on_and_in_no_repr() -> None:
    url = "postgresql://user:hush@db.example.org/runs"
    config = config_of(storage=url)
    assert config["storageConfig"]["type"] == "postgres"
    assert config["storageConfig"]["databaseUrl"] == url
    options = ServerOptions(storage=url)
    assert "hush" not in repr(options) + repr(Storage.of(url))
    assert "hush" not in options.describe_storage()


def test_leases_are_of_etcd(tmp_path: Path) -> None:
    config = config_of(storage=tmp_path / "runs.db", lease=ETCD)
    assert config["leaseManager"] == {"type": "etcd", "endpoints": ETCD}
    given = {**DEFAULT_CONFIG, "storageConfig": SQLITE}
    assert config_of(config_path=given, lease=ETCD)["storageConfig"] == SQLITE


def test_a_file_gets_the_store_and_its_workers_their_directory(tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    path.write_text("plugins: {b: {type: builtin}}\nroutes: {/: [{plugin: b}]}\n")
    config = config_of(config_path=path, storage=tmp_path / "runs.db")
    assert config["plugins"] == {"b": {"type": "builtin"}}
    assert config["workingDirectory"] == str(tmp_path)
    path.write_text(path.read_text() + "workingDirectory: /elsewhere\n")
    config = config_of(config_path=path, storage=tmp_path / "runs.db")
    assert config["workingDirectory"] == "/elsewhere"


@pytest.mark.parametrize(
    "text", ["storageConfig: {type: inMemory}", "- a", "a: [", "a: !!timestamp x"]
)
def test_a_file_that_it_cannot_be_merged_into(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yml"
    path.write_text(text)
    with pytest.raises(ServerStartError, match=r"config\.yml"):
        config_of(config_path=path, storage="runs.db")
    with pytest.raises(ServerStartError, match=r"none\.yml"):
        config_of(config_path=tmp_path / "none.yml", storage="runs.db")


# -- what is refused -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"storage": 7}, TypeError, "storage"),
        ({"storage": b"runs.db"}, TypeError, "storage"),
        ({"storage": ""}, ValueError, "storage"),
        ({"storage": ":memory:"}, ValueError, "None"),
        ({"storage": "sqlite:runs.db"}, ValueError, "path"),
        ({"storage": "mysql://user:hush@host/db"}, ValueError, "postgresql://"),
        ({"storage": "postgresql://a b"}, ValueError, "storage"),
        ({"storage": "a\0b"}, ValueError, "storage"),
        ({"storage": "a\udc80"}, ValueError, "Unicode"),
        ({"lease": ETCD}, ValueError, "lease.*storage="),
        ({"storage": "x", "lease": "http://127.0.0.1:2379"}, TypeError, "lease"),
        ({"storage": "x", "lease": []}, ValueError, "lease"),
        ({"storage": "x", "lease": [7]}, TypeError, r"lease\[0\]"),
        ({"storage": "x", "lease": [*ETCD, "etcd:1"]}, ValueError, r"lease\[1\]"),
        ({"storage": "x", "lease": ["https://h:2379"]}, ValueError, "TLS"),
        ({"storage": "x", "lease": ["http://h:x"]}, ValueError, r"lease\[0\]"),
        ({"storage": "x", "lease": ["http://u:hush@h"]}, ValueError, "password"),
        ({"storage": "x", "env": {"STEPFLOW_CONFIG": "y"}}, ValueError, "CONFIG"),
        ({"orchestrator_id": ""}, ValueError, "orchestrator_id"),
        ({"orchestrator_id": "a\n"}, ValueError, "orchestrator_id"),
        ({"orchestrator_id": 1}, TypeError, "orchestrator_id"),
    ],
)
def test_what_cannot_work_is_refused_by_its_name(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as refused:
        ServerOptions(**options)
    assert "hush" not in str(refused.value)


@pytest.mark.parametrize("store", [SQLITE, MEMORY])
def test_a_configuration_that_names_a_store_is_not_overruled(
    store: dict[str, str],
) -> None:
    given = {**DEFAULT_CONFIG, "storageConfig": store}
    with pytest.raises(ValueError, match="storage: .*storageConfig"):
        ServerOptions(config_path=given, storage="runs.db")
    given = {**DEFAULT_CONFIG, "leaseManager": {"type": "noOp"}}
    with pytest.raises(ValueError, match="lease: .*leaseManager"):
        ServerOptions(config_path=given, storage="runs.db", lease=ETCD)


@pytest.mark.parametrize(
    "recovery", [{"leaseTtlSecs": 2}, {"checkIntervalSecs": 0}, {"enabled": False}]
)
def test_what_would_break_the_servers_own_loop(recovery: dict[str, Any]) -> None:
    given = {**DEFAULT_CONFIG, "recovery": recovery}
    with pytest.raises(ValueError, match=f"recovery.{next(iter(recovery))}"):
        ServerOptions(config_path=given, storage="runs.db", lease=ETCD)
    ServerOptions(config_path=given, storage="runs.db")


# -- what becomes of runs --------------------------------------------------------------


@pytest.mark.parametrize(
    ("storage", "may_outlive", "resumes", "path"),
    [
        (None, False, False, None),
        (MEMORY, False, False, None),
        (SQLITE, True, True, "/x.db"),
        ({"type": "sqlite", "databaseUrl": "sqlite::memory:"}, True, False, None),
        ({"type": "sqlite", "databaseUrl": "sqlite://a%20b"}, True, True, "a b"),
        ({"type": "postgres", "databaseUrl": "postgresql://h"}, True, True, None),
        ({"type": "nosuch"}, True, False, None),
        ("nonsense", True, False, None),
        ({"metadata": SQLITE}, True, True, "/x.db"),
        ({"metadata": SQLITE, "journal": MEMORY}, True, False, None),
        ({"metadata": SQLITE, "blobs": MEMORY}, True, False, "/x.db"),
        ({"metadata": MEMORY, "journal": SQLITE}, True, False, None),
        ({"metadata": SQLITE, "blobs": {"type": "filesystem"}}, True, False, "/x.db"),
        (
            {"metadata": SQLITE, "blobs": {"type": "filesystem", "directory": "/b"}},
            True,
            True,
            "/x.db",
        ),
    ],
)
def test_how_long_runs_live_is_known_from_the_configuration(
    storage: object, may_outlive: bool, resumes: bool, path: str | None
) -> None:
    keeping = Keeping.of({"storageConfig": storage})
    assert (keeping.may_outlive, keeping.resumes) == (may_outlive, resumes)
    assert keeping.path == (Path(path) if path else None)
    assert keeping.leases is None


@pytest.mark.parametrize(
    ("url", "password"),
    [
        ("postgresql://me:hush@host/db", "hush"),
        ("postgresql://me:hush@host/db?application_name=a@b", "hush"),
        # Wrong, and so the server prints it.
        ("postgresql://me:hu/sh@host/db", "hu/sh"),
        ("postgresql://me:hu@sh@host/db", "hu@sh"),
        ('postgresql://me:"h\u00fcsh@host/db', "h\u00fcsh"),
        ("postgresql://host/db?user=me&password=hush&sslmode=off", "hush"),
    ],
)
def test_what_a_server_prints_of_a_password_is_hidden(url: str, password: str) -> None:
    stores = {"metadata": MEMORY, "journal": {"type": "postgres", "databaseUrl": url}}
    keeping = Keeping.of({"storageConfig": stores})
    assert password not in repr(keeping)
    hub = LogHub(LogConfig(python_logger=None))
    hub.hide(keeping.secrets)
    line = json.dumps({"message": f"no {url}"}, ensure_ascii=False)
    hub.take("stderr", [f"no {url}".encode(), line.encode()])
    for entry in hub.newest(2):
        assert "***" in entry.message
        assert password not in entry.message


def test_without_a_password_nothing_is_hidden() -> None:
    url = "postgresql://host:5432/db?application_name=a"
    for store in (SQLITE, {"type": "postgres", "databaseUrl": url}, MEMORY, None):
        assert Keeping.of({"storageConfig": store}).secrets == Secrets()


def test_a_server_that_recovers_nothing_resumes_nothing() -> None:
    config = {"storageConfig": SQLITE, "recovery": {"maxStartupRecovery": 0}}
    assert not Keeping.of(config).resumes
    leases = Keeping.of(merged({}, Storage.of("x"), ETCD)).leases
    assert leases is not None and leases.endpoints == tuple(ETCD)


def test_endpoints_that_only_the_server_can_ask_are_left_to_it() -> None:
    endpoints = ["etcd:2379", "http://etcd:2379", "https://etcd:2379", "http://", 7]
    leases = Leases.of({"leaseManager": {"type": "etcd", "endpoints": endpoints}})
    assert leases is not None
    assert leases.endpoints == ("http://etcd:2379", "http://etcd:2379")


# -- the lock --------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "runs.db"


Locks = Callable[..., StoreLock]


@pytest.fixture
def lock_of(store: Path) -> Any:
    made: list[StoreLock] = []

    def lock(shared: bool = False) -> StoreLock:
        made.append(StoreLock(store, shared=shared))
        return made[-1]

    yield lock
    for each in made:
        each.give_back()


def test_one_has_the_store_and_nothing_is_left_of_the_lock(
    store: Path, lock_of: Locks
) -> None:
    first, second = lock_of(), lock_of()
    first.take(0)
    (lock,) = store.parent.iterdir()
    assert stat.S_IMODE(lock.stat().st_mode) == 0o600
    with pytest.raises(StoreLockedError) as refused:
        second.take(10)  # at once: we are alive
    assert refused.value.holder == os.getpid()
    first.give_back()
    first.give_back()
    assert list(store.parent.iterdir()) == []
    second.take(0)


def test_those_with_leases_share_it_and_nobody_else(lock_of: Locks) -> None:
    first, second, alone = lock_of(True), lock_of(True), lock_of()
    first.take(0)
    second.take(0)
    first.give_back()
    with pytest.raises(StoreLockedError):
        alone.take(0)
    second.give_back()
    alone.take(0)
    with pytest.raises(StoreLockedError):
        lock_of(True).take(0)


HOLD = """
import os, subprocess, sys
from pathlib import Path
from stepflow_runtime.server.lock import StoreLock

lock = StoreLock(Path(sys.argv[1]), shared=False)
lock.take(0)
heir = subprocess.Popen(["sleep", "60"], pass_fds=lock.fds)
print(heir.pid, flush=True)
sys.stdin.read()
"""


def test_it_dies_with_its_holder_and_the_holders_server(
    store: Path, lock_of: Locks
) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout is not None
        server = int(holder.stdout.readline())
        with pytest.raises(StoreLockedError) as refused:
            lock_of().take(10)
        assert refused.value.holder == holder.pid
        holder.kill()
        holder.wait()
        # Its server is about to be killed, too: that is waited for, but not for ever.
        with pytest.raises(StoreLockedError):
            lock_of().take(0.1)
        os.kill(server, 9)
        lock_of().take(10)


WRITE = """
import sqlite3, sys
sqlite3.connect(sys.argv[1], timeout=0).execute("BEGIN EXCLUSIVE")
"""


def test_what_the_program_has_locked_in_a_store_stays_locked(
    store: Path, real_binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The database of the test is no server's.
    monkeypatch.setattr("stepflow_runtime.server.schema.prepare_store", print)
    # Whoever closes a file undoes all locks that its process has on it.
    with closing(sqlite3.connect(store)) as reader:
        reader.execute("CREATE TABLE t (x)")
        reader.execute("INSERT INTO t VALUES (1), (2), (3)")
        reader.commit()
        reading = reader.execute("SELECT * FROM t")
        reading.fetchone()
        held = Store()
        held.take(store, name=None, shared=False, create=True, binary=real_binary)
        held.give_back()
        done = subprocess.run(
            [sys.executable, "-c", WRITE, str(store)], check=False, capture_output=True
        )
        assert b"database is locked" in done.stderr
        reading.close()


def test_a_link_in_the_place_of_the_lock_is_not_followed(
    store: Path, lock_of: Locks
) -> None:
    precious = store.with_name("precious")
    precious.write_text("words")
    store.with_name("runs.db-lock").symlink_to(precious)
    with pytest.raises(OSError, match="runs.db-lock"):
        lock_of().take(0)
    assert precious.read_text() == "words"


def _sleep_in_child(has_begun: Any, may_end: Any) -> None:
    has_begun.set()
    may_end.wait(30)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_does_not_keep_it(lock_of: Locks) -> None:
    forking = multiprocessing.get_context("fork")
    has_begun, may_end = forking.Event(), forking.Event()
    lock = lock_of()
    lock.take(0)
    child = forking.Process(target=_sleep_in_child, args=(has_begun, may_end))
    child.start()
    assert has_begun.wait(30)
    # As the kernel does it for a holder that was killed: it closes, and unlocks nothing.
    lock.forget()
    lock_of().take(5)
    may_end.set()
    child.join()


# -- what became of a submit -----------------------------------------------------------


def test_a_clock_that_is_set_back_hides_no_submit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mark = SubmitMark("name", "value", time.time(), time.monotonic())
    assert mark.began <= mark.made_at
    hour_ago = time.time() - 3600
    monkeypatch.setattr(time, "time", lambda: hour_ago)
    assert mark.began <= hour_ago


def test_a_store_that_does_not_tell_is_asked_once_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> dict[str, str]:
        asked.append(args)
        raise UnreadableStoreError("it is locked")

    asked: list[Any] = []
    monkeypatch.setattr(store_module, "_submits", fail)
    kept = Store()
    path = tmp_path / "runs.db"
    kept.take(path, name=None, shared=False, create=True, binary=tmp_path)
    try:
        for submit in ("a", "b", "c"):
            with pytest.raises(UnreadableStoreError, match="locked"):
                kept.find(submit, 2.0, 1)
        assert len(asked) == 1
        with pytest.raises(UnreadableStoreError):
            kept.find("a", 2.0, 2)  # of another life
        assert len(asked) == 2
        monkeypatch.setattr(store_module, "_submits", lambda *_: {"d": "run"})
        assert kept.find("d", 2.0, 3) == "run"
        assert kept.find("e", 2.0, 3) is None
    finally:
        kept.give_back()
