"""Servers of other 0.x versions: older ones as they are, newer ones as they may become."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import httpx
import pytest
from anyio import to_thread
from anyio.abc import SocketAttribute, SocketStream
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflow_runtime import (
    FlowId,
    FlowStatus,
    FlowVariable,
    InvalidFlowError,
    InvalidRequestError,
    NotFoundError,
    RunCompleted,
    RunCreated,
    RunStatus,
    RunTimeoutError,
    ServerCrashedError,
    ServerFaultError,
    ServerStartError,
    StepCompleted,
    StepflowClient,
    StepflowExecutor,
    StepflowRuntime,
    StepStarted,
    SubRunCreated,
    UnknownEvent,
    UnsupportedServerError,
    backup_store,
    wire,
)
from stepflow_runtime.server.schema import MIGRATIONS, prepare_store, upgrade_store

from .conftest import each_backend, wait_until
from .executors import server_by_hand

OLD = "0.12.0"
TOO_OLD = "0.11.1"
INSTALLED = importlib.metadata.version("stepflow-orchestrator")


# -- servers of other versions ---------------------------------------------------------


def _cache() -> Path:
    """A directory of this user's for binaries: another's could hold anything."""
    path = Path(tempfile.gettempdir(), f"stepflow-runtime-tests-{os.getuid()}")
    path.mkdir(mode=0o700, exist_ok=True)
    assert path.stat().st_uid == os.getuid(), f"{path} belongs to another user"
    return path


@lru_cache
def downloaded(version: str) -> Path:
    """The server binary of a release, fetched once; several processes may ask at once."""
    cached = _cache() / version / "stepflow-server"
    if cached.exists():
        return cached
    with tempfile.TemporaryDirectory(dir=_cache()) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        command += ["--retries", "1", "--timeout", "20", "-d", folder]
        command += [f"stepflow-orchestrator=={version}"]
        try:
            done = subprocess.run(
                command, capture_output=True, check=False, text=True, timeout=180
            )
            trouble = done.stderr.strip() if done.returncode else ""
        except subprocess.TimeoutExpired as exc:
            trouble = str(exc)
        if trouble:
            pytest.skip(f"the registry gives no Stepflow {version}: {trouble[-500:]}")
        (wheel,) = Path(folder).glob("*.whl")
        made = Path(folder, "made")
        made.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            binary = archive.read("stepflow_orchestrator/bin/stepflow-server")
        (made / "stepflow-server").write_bytes(binary)
        (made / "stepflow-server").chmod(0o755)
        try:
            made.rename(cached.parent)
        except OSError:  # another process was first
            if not cached.exists():
                raise
    return cached


class Server(NamedTuple):
    """A version of the server, and what runs its built-in components."""

    version: str
    binary: Path
    config: dict[str, Any] | None


def _server(version: str, binary: Path) -> Server:
    route = "/builtin" if version == INSTALLED else "/builtin/{*component}"
    config = {
        "plugins": {"builtin": {"type": "builtin"}},
        "routes": {route: [{"plugin": "builtin"}]},
        # A built-in component that fails is tried again for 4 s, unless told otherwise.
        "retry": {"transportMaxRetries": 0},
    }
    return Server(version, binary, config)


@pytest.fixture(scope="session", params=[OLD, INSTALLED])
def server(request: pytest.FixtureRequest, real_binary: Path) -> Server:
    version = request.param
    return _server(version, real_binary if version == INSTALLED else downloaded(OLD))


@pytest.fixture(scope="session")
def old_server() -> Server:
    return _server(OLD, downloaded(OLD))


@pytest.fixture(scope="session")
def too_old_server() -> Server:
    return _server(TOO_OLD, downloaded(TOO_OLD))


@asynccontextmanager
async def running(server: Server, **options: Any) -> AsyncIterator[StepflowRuntime]:
    async with StepflowRuntime.start(
        server.config, binary=server.binary, **options
    ) as runtime:
        with anyio.fail_after(30):
            if server.version == OLD:
                await wait_until(lambda: _is_set_up(runtime))
            yield runtime


def _is_set_up(runtime: StepflowRuntime) -> bool:
    """0.12 takes connections before it can run anything, and a run kills its thread."""
    return any(
        # As it is by itself, and as it is with storage=.
        entry.message.startswith(
            ("Starting orphan claiming", "Periodic orphan claiming")
        )
        for entry in runtime.get_recent_logs(1000)
    )


# What 0.12 knows of built-in components has neither /noop nor /sleep.
CHAT = {
    "name": "chat",
    "description": "Makes a message of its input",
    "steps": [
        {
            "id": "a",
            "component": "/builtin/create_messages",
            "input": {"user_prompt": {"$input": "$.text"}},
        }
    ],
    "output": {
        "said": {"$step": "a", "path": "$.messages[0].content"},
        "input": {"$input": "$"},
        "whole": 5,
    },
}
READ = {
    "name": "read",
    "description": "Reads a file",
    "steps": [
        {
            "id": "a",
            "component": "/builtin/load_file",
            "input": {"path": {"$input": "$"}, "format": "json"},
        }
    ],
    "output": {"$step": "a", "path": "$.data"},
}
BROKEN = {
    "name": "broken",
    "description": "Refers to a variable that there is not",
    "steps": [
        {"id": "a", "component": "/builtin/eval", "input": {"$variable": "nothing"}}
    ],
    "output": {"$step": "a"},
}
CITY = {
    "name": "city",
    "description": "Returns a variable",
    "schemas": {
        "type": "object",
        "properties": {
            "variables": {
                "type": "object",
                "properties": {
                    "city": {
                        "type": "string",
                        "default": "Oslo",
                        "env_var": "VERSIONS_CITY",
                    }
                },
            }
        },
    },
    "steps": [],
    "output": {"$variable": "city"},
}


def said(text: str) -> dict[str, Any]:
    return {"said": text, "input": {"text": text}, "whole": 5}


class Gate:
    """A file that a step reads, and does not get to the end of until it is opened."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self._path = path
        self.path = str(path)

    async def open(self) -> None:
        descriptor = None
        with anyio.fail_after(15):
            while (descriptor := self._writer()) is None:  # noqa: ASYNC110
                await anyio.sleep(0.005)
        os.write(descriptor, b'{"read": 1}')
        os.close(descriptor)

    def _writer(self) -> int | None:
        try:
            return os.open(self._path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as exc:
            if exc.errno != errno.ENXIO:  # nobody reads it yet
                raise
            return None


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


# -- what is supported -----------------------------------------------------------------


@pytest.mark.anyio
@each_backend
async def test_the_server_says_how_it_is(server: Server) -> None:
    async with running(server) as runtime:
        health = await runtime.health()
    assert health.is_healthy
    assert health.timestamp is not None
    # No version, but the commit that it was built from.
    assert health.version is not None and int(health.version, 16)


@pytest.mark.anyio
@each_backend
async def test_a_short_run(server: Server) -> None:
    async with running(server) as runtime:
        result = await runtime.run(CHAT, {"text": "hi", "n": 3})
        assert result.unwrap() == {
            "said": "hi",
            "input": {"text": "hi", "n": 3},
            "whole": 5,
        }
        assert type(result.output["input"]["n"]) is int
        overrides = {"a": {"input": {"user_prompt": "other"}}}
        assert (await runtime.run(CHAT, {"text": "hi"}, overrides)).output["said"] == (
            "other"
        )
        with pytest.raises(InvalidRequestError, match="has no step 'b'; it has 'a'"):
            await runtime.run(CHAT, {"text": "hi"}, {"b": {"input": 1}})
        with pytest.raises(NotFoundError):
            await runtime.run(FlowId("0" * 64))


@pytest.mark.anyio
@each_backend
async def test_a_failed_run(server: Server) -> None:
    async with running(server) as runtime:
        result = await runtime.run(BROKEN)
        assert result.is_failed
        error = result.error
        assert error is not None
        assert (error.code, error.message) == (
            "EXPRESSION_FAILURE",
            "Undefined variable: nothing",
        )
        assert (error.step_id, error.component, error.attempts) == (
            "a",
            "/builtin/eval",
            1,
        )
        (step,) = await runtime.get_steps(result.run_id)
        assert step.status is RunStatus.FAILED
        assert step.error is not None
        assert step.error.message == "Undefined variable: nothing"
        unreachable = (await runtime.run(READ, "/there/is/no/such/file")).error
        assert unreachable is not None
        assert unreachable.code == "UNREACHABLE"


@pytest.mark.anyio
@each_backend
async def test_runs_that_outlast_the_first_request(
    server: Server, tmp_path: Path
) -> None:
    """Which lets the server wait for a second. One is given up after that."""

    async def run() -> None:
        outputs.append((await runtime.run(READ, gate.path)).unwrap())

    gate, other = Gate(tmp_path / "gate"), Gate(tmp_path / "other")
    outputs: list[Any] = []
    async with running(server) as runtime, anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        with pytest.raises(RunTimeoutError) as caught:
            await runtime.run(READ, other.path, timeout=1.1)
        assert outputs == []
        await gate.open()
        given_up = caught.value.run_id
        assert given_up is not None
        while not (await runtime.get_run(given_up)).has_ended:  # noqa: ASYNC110
            await anyio.sleep(0.01)
        assert (await runtime.get_run(given_up)).status is RunStatus.CANCELLED
        await other.open()
    assert outputs == [{"read": 1}]


@pytest.mark.anyio
@each_backend
async def test_a_submitted_run(server: Server, gate: Gate) -> None:
    async with running(server) as runtime:
        run_id = await runtime.submit(READ, gate.path)
        assert (await runtime.get_run(run_id)).status is RunStatus.RUNNING
        (info,) = await runtime.list_runs(status=RunStatus.RUNNING)
        assert (info.run_id, info.flow_name) == (run_id, "read")
        assert (info.items.total, info.items.running) == (1, 1)
        assert await runtime.list_runs(status=RunStatus.COMPLETED) == []
        with pytest.raises(RunTimeoutError, match="is not over yet"):
            await runtime.get_result(run_id, timeout=0.05)
        await gate.open()
        assert (await runtime.get_result(run_id)).unwrap() == {"read": 1}
        info = await runtime.get_run(run_id)
        assert info.status is RunStatus.COMPLETED
        assert info.created_at is not None and info.completed_at is not None
        assert info.created_at <= info.completed_at
        (step,) = await runtime.get_steps(run_id)
        assert (step.step_id, step.component) == ("a", "/builtin/load_file")
        assert step.output["data"] == {"read": 1}
        await runtime.delete_run(run_id)
        with pytest.raises(NotFoundError):
            await runtime.get_result("00000000-0000-7000-8000-000000000000")


@pytest.mark.anyio
@each_backend
async def test_a_batch(server: Server, gate: Gate) -> None:
    async with running(server) as runtime:
        batch = await runtime.submit_batch(
            CHAT, [{"text": "a"}, {}, {"text": "c"}], max_concurrent=2
        )
        info, results = await runtime.get_batch(batch)
        assert info.status is RunStatus.FAILED
        assert (info.items.completed, info.items.failed) == (2, 1)
        assert [each.item_index for each in results] == [0, 1, 2]
        assert results[0].unwrap() == said("a")
        assert results[2].unwrap() == said("c")
        assert results[1].error is not None
        assert (results[1].error.step_id, results[1].error.attempts) == ("a", 1)
        (step,) = await runtime.get_steps(batch, item_index=2)
        assert step.output["messages"][0]["content"] == "c"
        waiting = await runtime.submit_batch(READ, [gate.path])
        info, (result,) = await runtime.get_batch(waiting, wait=False)
        assert info.status is RunStatus.RUNNING
        assert result.is_running
        await gate.open()
        info, results = await runtime.get_batch(waiting, include_results=False)
        assert (info.status, results) == (RunStatus.COMPLETED, [])


@pytest.mark.anyio
@each_backend
async def test_many_runs(server: Server) -> None:
    inputs = [{"text": str(number)} for number in range(30)]
    async with running(server) as runtime:
        results = {
            index: result.unwrap()
            async for index, result in runtime.run_many(CHAT, inputs, 8)
        }
        assert len(await runtime.list_runs(flow_name="chat")) == 30
    assert results == {number: said(str(number)) for number in range(30)}


@pytest.mark.anyio
@each_backend
async def test_a_cancelled_run(server: Server, gate: Gate) -> None:
    async def wait() -> None:
        heard.append(await runtime.get_result(run_id))

    heard: list[Any] = []
    async with running(server) as runtime:
        run_id = await runtime.submit(READ, gate.path)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await anyio.sleep(0.05)
            assert heard == []
            assert (await runtime.cancel(run_id)).status is RunStatus.CANCELLED
        assert heard[0].error.code == "CANCELLED"
        assert (await runtime.list_runs(status=RunStatus.CANCELLED))[0].run_id == run_id
        await gate.open()
        ended = (await runtime.run(CHAT, {"text": ""})).run_id
        assert (await runtime.cancel(ended)).status is RunStatus.COMPLETED


@pytest.mark.anyio
@each_backend
async def test_runs_are_listed(server: Server) -> None:
    """With one that another has started."""
    outer = {
        "name": "outer",
        "description": "Runs another flow",
        "steps": [
            {
                "id": "a",
                "component": "/builtin/eval",
                "input": {"flow_id": {"$input": "$"}, "input": {"text": "inner"}},
            }
        ],
        "output": {"$step": "a", "path": "$.result.result"},
    }
    async with running(server) as runtime:
        inner_flow = await runtime.store_flow(CHAT)
        result = await runtime.run(outer, inner_flow)
        assert result.unwrap() == said("inner")
        alone = (await runtime.run(CHAT, {"text": "alone"})).run_id
        (inner,) = await runtime.list_runs(parent_run_id=result.run_id)
        assert (inner.flow_name, inner.flow_id) == ("chat", inner_flow)
        assert inner.root_run_id == inner.parent_run_id == result.run_id

        async def listed(**filters: Any) -> set[str]:
            return {run.run_id for run in await runtime.list_runs(**filters)}

        everything = {alone, inner.run_id, result.run_id}
        assert await listed() == everything
        assert await listed(root_run_id=result.run_id) == everything - {alone}
        assert await listed(roots_only=True) == everything - {inner.run_id}
        assert await listed(flow_name="outer") == {result.run_id}
        assert await listed(status=RunStatus.FAILED) == set()
        assert len(await listed(limit=2)) == 2
        assert len(await listed(limit=2, offset=2)) == 1
        events = [
            event
            async for event in runtime.events(result.run_id, include_sub_runs=True)
        ]
    (began,) = [event for event in events if isinstance(event, SubRunCreated)]
    assert (began.parent_run_id, began.flow_id) == (result.run_id, inner_flow)
    assert {event.run_id for event in events} >= {inner.run_id, result.run_id}
    assert not any(isinstance(event, UnknownEvent) for event in events)


@pytest.mark.anyio
@each_backend
async def test_a_run_is_followed(server: Server, gate: Gate) -> None:
    async with running(server) as runtime:
        run_id = await runtime.submit(READ, gate.path)
        events = []
        async for event in runtime.events(run_id, include_results=True):
            events.append(event)
            if isinstance(event, StepStarted):
                assert (event.step_id, event.attempt) == ("a", 1)
                await gate.open()
        again = [event async for event in runtime.events(run_id, since=2)]
        with pytest.raises(NotFoundError):
            async for _ in runtime.events("00000000-0000-7000-8000-000000000000"):
                pytest.fail("of a run that there is not")
    first, last = events[0], events[-1]
    assert isinstance(first, RunCreated) and isinstance(last, RunCompleted)
    assert first.item_count == 1
    assert last.status is RunStatus.COMPLETED
    (step,) = [event for event in events if isinstance(event, StepCompleted)]
    assert step.status is RunStatus.COMPLETED
    assert step.result["data"] == {"read": 1}
    assert not any(isinstance(event, UnknownEvent) for event in events)
    assert {event.run_id for event in events} == {run_id}
    assert [type(event) for event in again] == [
        type(event) for event in events if event.sequence_number >= 2
    ]


@pytest.mark.anyio
@each_backend
async def test_blobs(server: Server) -> None:
    async with running(server) as runtime:
        for data in ({"x": 1, "big": 2**60, "f": 1.5}, [None], "text", b"\x00\xff"):
            blob_id = await runtime.put_blob(data)
            assert await runtime.get_blob(blob_id) == data
            assert await runtime.put_blob(data, filename="name") == blob_id
        with pytest.raises(NotFoundError):
            await runtime.get_blob("0" * 64)


@pytest.mark.anyio
@each_backend
async def test_a_flow_is_looked_at(server: Server) -> None:
    wrong = {**READ, "output": {"$step": "zz"}}
    async with running(server) as runtime:
        assert (await runtime.validate(CITY)).diagnostics == ()
        assert (await runtime.validate(READ)).is_valid
        verdict = await runtime.validate(wrong)
        assert [(each.level, each.kind) for each in verdict.errors] == [
            ("fatal", "undefinedStepReference")
        ]
        assert not (await runtime.validate({"steps": 1})).is_valid
        with pytest.raises(InvalidFlowError, match="zz"):
            await runtime.run(wrong)
        flow_id = await runtime.store_flow(READ)
        assert (await runtime.validate(flow_id)).is_valid


@pytest.mark.anyio
@each_backend
async def test_variables(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERSIONS_CITY", "Bergen")
    async with running(server) as runtime:
        assert await runtime.get_flow_variables(CITY) == {
            "city": FlowVariable(default="Oslo", env_var="VERSIONS_CITY")
        }
        assert (await runtime.run(CITY)).unwrap() == "Oslo"
        given = {"city": "Rome"}
        assert (await runtime.run(CITY, variables=given)).unwrap() == "Rome"
        assert (await runtime.run(CITY, variables_from_env=True)).unwrap() == "Bergen"


@pytest.mark.anyio
@each_backend
async def test_components_are_listed(server: Server) -> None:
    async with running(server) as runtime:
        components = await runtime.list_components()
        bare = await runtime.list_components(include_schemas=False)
    assert components.is_complete
    by_path = {each.path: each for each in components}
    assert by_path.keys() >= {"/create_messages", "/eval", "/load_file", "/put_blob"}
    assert len(by_path) == len(components)
    eval_ = by_path["/eval"]
    assert eval_.description
    assert eval_.input_schema is not None and "properties" in eval_.input_schema
    assert {each.path for each in bare} == by_path.keys()
    assert all(each.input_schema is None for each in bare)


@pytest.mark.anyio
@each_backend
async def test_the_same_by_a_client(server: Server) -> None:
    async with running(server) as runtime, StepflowClient(runtime.url) as client:
        assert (await client.run(CHAT, {"text": "a"})).unwrap() == said("a")
        run_id = await client.submit(CHAT, {"text": "b"})
        assert (await client.get_result(run_id)).unwrap() == said("b")
        kinds = [type(event) async for event in client.events(run_id)]
        assert (kinds[0], kinds[-1]) == (RunCreated, RunCompleted)
        assert len(await client.list_runs(status=RunStatus.COMPLETED)) == 2
        assert (await client.run(BROKEN)).status is FlowStatus.FAILED


@pytest.mark.anyio
@each_backend
async def test_the_old_server_does_not_know_the_default_routes(
    old_server: Server,
) -> None:
    """It wants patterns for keys, which 0.13 refuses. What it says is in the error."""
    async with running(old_server._replace(config=None)) as runtime:
        result = await runtime.run(CHAT, {"text": "hi"})
    assert result.error is not None
    assert "No matching rule found for component: /builtin/create_messages" in str(
        result.error
    )


# -- stores ----------------------------------------------------------------------------


def asked(store: Path, question: str) -> list[Any]:
    with closing(sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True)) as database:
        return database.execute(question).fetchall()


def is_dated(store: Path) -> bool:
    """True if a server 0.13 could not read it."""
    columns = asked(store, "SELECT type FROM pragma_table_info('runs')")
    return ("DATETIME",) in columns


@dataclass
class Written:
    """What a server has been told to keep, and what it was killed over."""

    blob: str
    flow: FlowId
    outputs: dict[str, Any]
    batch: str
    failed: str
    unfinished: dict[str, Gate]


async def write(runtime: StepflowRuntime, tmp_path: Path, first: int = 0) -> Written:
    chat = await runtime.run(CHAT, {"text": "hi"})
    written = Written(
        blob=await runtime.put_blob({"x": [1, None]}),
        flow=await runtime.store_flow(CHAT),
        outputs={chat.run_id: said("hi")},
        batch=await runtime.submit_batch(CHAT, [{"text": str(n)} for n in range(20)]),
        failed=(await runtime.run(BROKEN)).run_id,
        unfinished={},
    )
    await runtime.get_batch(written.batch)
    for number in range(first, first + 3):
        gate = Gate(tmp_path / f"gate-{number}")
        written.unfinished[await runtime.submit(READ, gate.path)] = gate
    return written


async def see_that_all_is_there(runtime: StepflowRuntime, written: Written) -> None:
    for run, output in written.outputs.items():
        assert (await runtime.get_result(run)).output == output
    _, results = await runtime.get_batch(written.batch)
    assert [each.output for each in results] == [said(str(n)) for n in range(20)]
    error = (await runtime.get_result(written.failed)).error
    assert error is not None and error.message == "Undefined variable: nothing"
    assert await runtime.get_blob(written.blob) == {"x": [1, None]}
    assert (await runtime.run(written.flow, {"text": "again"})).output == said("again")
    assert (await runtime.get_run(written.batch)).created_at is not None
    events = [type(each) async for each in runtime.events(written.failed)]
    assert (events[0], events[-1]) == (RunCreated, RunCompleted)


async def see_that_the_rest_is_done(runtime: StepflowRuntime, written: Written) -> None:
    for run, gate in written.unfinished.items():
        assert (await runtime.get_run(run)).status is RunStatus.RUNNING
        await gate.open()
        assert (await runtime.get_result(run)).output == {"read": 1}


async def kill(runtime: StepflowRuntime) -> None:
    assert runtime.pid is not None
    os.kill(runtime.pid, signal.SIGKILL)
    with pytest.raises(ServerCrashedError):
        await runtime.get_run("0" * 32)


@pytest.mark.anyio
@each_backend
async def test_a_store_of_the_last_version_is_taken_over(
    old_server: Server, tmp_path: Path, real_binary: Path
) -> None:
    """Which the server of this version by itself cannot read."""
    store, now = tmp_path / "runs.db", _server(INSTALLED, real_binary)
    with anyio.fail_after(90):
        async with running(old_server, storage=store) as runtime:
            written = await write(runtime, tmp_path)
            await kill(runtime)
        done = {n for (n,) in asked(store, "SELECT name FROM _stepflow_migrations")}
        assert done == MIGRATIONS["0.12"]
        rows = "SELECT * FROM runs JOIN run_items ON run_id = id"
        before = asked(store, rows)

        async with running(now, storage=store) as runtime:
            assert set(runtime.recovered_runs) == set(written.unfinished)
            await see_that_all_is_there(runtime, written)
            await see_that_the_rest_is_done(runtime, written)
        assert asked(store, "PRAGMA integrity_check") == [("ok",)]
        # What was over is as it was, to the letter.
        over = [row for row in before if row[0] not in written.unfinished]
        assert len(over) == 22
        assert set(over) <= set(asked(store, rows))


@pytest.mark.anyio
@each_backend
async def test_the_server_of_this_version_by_itself_cannot_read_the_last_ones_store(
    old_server: Server, tmp_path: Path, real_binary: Path
) -> None:
    """If this fails, there is nothing to upgrade any more."""
    store, now = tmp_path / "runs.db", _server(INSTALLED, real_binary)
    async with running(old_server, storage=store) as runtime:
        run = (await runtime.run(CHAT, {"text": "hi"})).run_id
    stored = {"type": "sqlite", "databaseUrl": f"sqlite:{store}"}
    config = {**(now.config or {}), "storageConfig": stored}
    with server_by_hand(real_binary, config) as url:
        async with StepflowClient(url) as client:
            with pytest.raises(ServerFaultError):
                await client.get_run(run)


@pytest.mark.anyio
@each_backend
async def test_a_store_is_upgraded_under_a_server_and_can_be_given_back(
    old_server: Server, tmp_path: Path, real_binary: Path
) -> None:
    store, now = tmp_path / "runs.db", _server(INSTALLED, real_binary)
    copy = tmp_path / "copy.db"
    with anyio.fail_after(120):
        async with running(old_server, storage=store) as runtime:
            written = await write(runtime, tmp_path)
            await backup_store(store, copy)
            assert is_dated(store)
            assert await to_thread.run_sync(upgrade_store, store)
            assert not is_dated(store)
            assert not await to_thread.run_sync(upgrade_store, store)
            await see_that_all_is_there(runtime, written)
            await see_that_the_rest_is_done(runtime, written)
        async with running(now, storage=store) as runtime:
            await see_that_all_is_there(runtime, written)
            new = await write(runtime, tmp_path, 3)
            await kill(runtime)
        async with running(old_server, storage=store) as runtime:
            await see_that_all_is_there(runtime, written)
            await see_that_all_is_there(runtime, new)
            await see_that_the_rest_is_done(runtime, new)
        # A copy that was made before the upgrade is what it was.
        assert is_dated(copy)
        async with running(now, storage=copy) as runtime:
            await see_that_all_is_there(runtime, written)
            await see_that_the_rest_is_done(runtime, written)


def test_a_store_too_old_is_refused(
    too_old_server: Server, tmp_path: Path, real_binary: Path
) -> None:
    store = tmp_path / "runs.db"
    stored = {"type": "sqlite", "databaseUrl": f"sqlite:{store}?mode=rwc"}
    config = {**(too_old_server.config or {}), "storageConfig": stored}
    with server_by_hand(too_old_server.binary, config):
        pass
    with pytest.raises(ServerStartError, match=r"a server of version 0\.11 or older"):
        prepare_store(store, real_binary)


# -- what is not -----------------------------------------------------------------------


async def all_of(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


Call = Callable[[StepflowExecutor], Awaitable[Any]]
CALLS: dict[str, Call] = {
    "run": lambda e: e.run(CHAT, {"text": "a"}),
    "run a stored one": lambda e: e.run(FlowId("f" * 64), {"text": "a"}),
    "run with the environment": lambda e: e.run(CITY, variables_from_env=True),
    "submit": lambda e: e.submit(CHAT, {"text": "a"}),
    "submit_batch": lambda e: e.submit_batch(CHAT, [{"text": "a"}]),
    "run_many": lambda e: all_of(e.run_many(CHAT, [{"text": "a"}])),
    "get_result": lambda e: e.get_result(RUN),
    "get_batch": lambda e: e.get_batch(RUN),
    "events": lambda e: all_of(e.events(RUN)),
    "cancel": lambda e: e.cancel(RUN),
    "get_run": lambda e: e.get_run(RUN),
    "list_runs": lambda e: e.list_runs(status=RunStatus.COMPLETED),
    "get_steps": lambda e: e.get_steps(RUN),
    "delete_run": lambda e: e.delete_run(RUN),
    "validate": lambda e: e.validate(CHAT),
    "store_flow": lambda e: e.store_flow(CHAT),
    "get_flow_variables": lambda e: e.get_flow_variables(CITY),
    "put_blob": lambda e: e.put_blob({"x": 1}),
    "get_blob": lambda e: e.get_blob("0" * 64),
    "health": lambda e: e.health(),
    "list_components": lambda e: e.list_components(),
}
RUN = "01a2090d-f776-7ad2-89eb-b007d2650bbe"


@pytest.mark.anyio
@each_backend
async def test_a_server_too_old_elsewhere_is_refused_before_it_is_asked_for_anything(
    too_old_server: Server,
) -> None:
    with server_by_hand(too_old_server.binary, too_old_server.config) as url:
        for name, call in CALLS.items():
            async with StepflowClient(url) as client:
                with anyio.fail_after(10), pytest.raises(UnsupportedServerError) as e:
                    await call(client)
            assert f"its version is {TOO_OLD}; supported are Stepflow 0.12" in str(
                e.value
            ), name
        async with httpx.AsyncClient() as http:
            assert (await http.get(f"{url}/api/v1/runs")).json() == {"runs": []}


@pytest.mark.anyio
@each_backend
async def test_a_binary_too_old_is_not_started(too_old_server: Server) -> None:
    with pytest.raises(ServerStartError) as caught:
        async with running(too_old_server):
            pytest.fail("it was READY")
    words = f"its version is {TOO_OLD}; supported are Stepflow 0.12 and 0.13"
    assert words in str(caught.value)


# -- what may come ---------------------------------------------------------------------

SUMMARY: dict[str, Any] = {
    "runId": "r",
    "status": 3,
    "flowId": "f",
    "flowName": "n",
    "items": {"total": 2, "completed": 1, "running": 0, "failed": 1, "cancelled": 0},
    "createdAt": "2026-11-23T15:40:11.824941847Z",
    "completedAt": "2026-11-23T15:40:11.825282042Z",
    "rootRunId": "r",
    "parentRunId": "p",
    "orchestratorId": "o",
}
ITEMS: list[dict[str, Any]] = [
    {"itemIndex": 0, "status": 2, "output": {"x": 1.0}},
    {"itemIndex": 1, "status": 3, "errorMessage": "no", "errorCode": 3},
]
STEPS: list[dict[str, Any]] = [
    {
        "stepId": "a",
        "stepIndex": 1,
        "itemIndex": 1,
        "status": 3,
        "component": "/c",
        "errorMessage": "no",
        "errorCode": 3,
        "updatedAt": "2026-11-23T15:40:11Z",
    }
]
DIAGNOSTIC = {"kind": "k", "level": 2, "formatted": "text", "path": "$.steps"}
COMPONENT = {
    "path": "/c",
    "componentId": "/c",
    "plugin": "p",
    "description": "d",
    "inputSchema": {"type": "object"},
    "outputSchema": {"type": "object"},
}


def _event(kind: str, **body: Any) -> dict[str, Any]:
    return {
        "sequenceNumber": 3,
        "timestamp": "2026-11-23T15:40:11.825Z",
        "event": {kind: {"runId": "r", **body}},
    }


def _results(body: bytes) -> Any:
    answer = wire.decode_run(body)
    return [wire.flow_result(answer.summary, item) for item in answer.results]


# An answer of each kind, and how it is read.
ANSWERS: dict[str, tuple[dict[str, Any], Callable[[bytes], Any]]] = {
    "a run": (
        {"summary": SUMMARY, "steps": STEPS},
        lambda body: wire.run_info(wire.decode_summary(body).summary),
    ),
    "its results": ({"summary": SUMMARY, "results": ITEMS}, _results),
    "its details": (
        {"summary": SUMMARY, "steps": STEPS},
        lambda body: list(map(wire.step_info, wire.decode_run_details(body).steps)),
    ),
    "its items": ({"results": ITEMS}, wire.decode_run_items),
    "its steps": (
        {"steps": STEPS},
        lambda body: list(map(wire.step_info, wire.decode_run_steps(body).steps)),
    ),
    "runs": (
        {"runs": [SUMMARY, SUMMARY]},
        lambda body: list(map(wire.run_info, wire.decode_run_list(body).runs)),
    ),
    "a stored flow": (
        {
            "flowId": "f",
            "stored": False,
            "diagnostics": {"diagnostics": [DIAGNOSTIC]},
        },
        lambda body: (
            wire.decode_stored_flow(body).flow_id,
            wire.decode_stored_flow(body).findings(),
        ),
    ),
    "a stored blob": ({"blobId": "b"}, wire.decode_stored_blob),
    "a blob": ({"data": {"x": 1}, "blobType": "data"}, wire.decode_blob),
    "components": (
        {
            "components": [COMPONENT],
            "failedPlugins": [{"plugin": "q", "error": "gone"}],
        },
        lambda body: (
            list(found := wire.component_list(wire.decode_components(body))),
            found.failed_plugins,
        ),
    ),
    "variables": (
        {
            "variables": {
                "v": {
                    "required": True,
                    "defaultValue": 1.0,
                    "description": "d",
                    "envVar": "V",
                    "schema": {"type": "integer"},
                }
            }
        },
        lambda body: wire.flow_variables(wire.decode_flow_variables(body)),
    ),
    "health": (
        {
            "status": "healthy",
            "timestamp": "2026-11-23T15:40:11Z",
            "build": {"gitVersion": "abc"},
        },
        lambda body: wire.health(wire.decode_health(body)),
    ),
    "an error": (
        {"error": {"code": 404, "message": "m", "status": "NOT_FOUND"}},
        wire.fault_of,
    ),
    **{
        kind: (_event(kind, **body), lambda body: wire.event(wire.decode_event(body)))
        for kind, body in dict[str, dict[str, Any]](
            {
                "RunCreated": {"flowId": "f", "itemCount": 2},
                "StepsNeeded": {"itemIndex": 1, "stepIds": ["a"]},
                "StepReady": {"itemIndex": 1, "stepIndex": 2, "stepId": "a"},
                "StepStarted": {"itemIndex": 1, "stepId": "a", "attempt": 2},
                "StepCompleted": {"stepId": "a", "status": 2, "result": {"x": 1.0}},
                "ItemCompleted": {"itemIndex": 1, "result": [1.0]},
                "SubRunCreated": {"parentRunId": "p", "flowId": "f", "itemCount": 1},
                "RunCompleted": {"status": 2},
            }
        ).items()
    },
}
# What users or schemas have put there: nothing may be added in these.
FOREIGN = {"output", "data", "inputSchema", "outputSchema", "schema", "result"}
# Their keys are names that mean something.
NAMED = {"variables", "event"}

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner)
    ),
    max_leaves=6,
)
new_names = st.text(max_size=8).map(lambda text: f"new{text}") | st.sampled_from(
    ["", "$schema", "__class__", "Summary", "SUMMARY", "runid", "numFatal", "isPartial"]
)


def objects(value: Any, name: str = "") -> Iterator[dict[str, Any]]:
    """The objects in an answer that a newer server may add to."""
    if name in FOREIGN:
        return
    if isinstance(value, list):
        for each in value:
            yield from objects(each)
    elif isinstance(value, dict):
        if name not in NAMED:
            yield value
        for key, each in value.items():
            yield from objects(each, key)


@pytest.mark.parametrize("kind", ANSWERS)
@settings(max_examples=25)
@given(data=st.data())
def test_what_a_newer_server_adds_changes_nothing(
    kind: str, data: st.DataObject
) -> None:
    answer, read = ANSWERS[kind]
    expected = read(json.dumps(answer).encode())
    assert not isinstance(expected, UnknownEvent)
    padded = json.loads(json.dumps(answer))
    for each in list(objects(padded)):
        added = data.draw(st.dictionaries(new_names, anything, max_size=3))
        old = dict(each)
        if data.draw(st.booleans()):
            each.clear()  # the new ones first
        each.update({name: v for name, v in added.items() if name not in old})
        each.update(old)
    assert read(json.dumps(padded).encode()) == expected


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("StepStarted", "step_id"),
        ("StepStarted", "StepId"),
        ("StepStarted", "item_index"),
        ("RunCompleted", "run_id"),
        ("RunCompleted", "Status"),
    ],
)
def test_a_field_of_nearly_the_same_name_is_another(
    kind: str, name: str, first: bool
) -> None:
    answer, read = ANSWERS[kind]
    body = answer["event"][kind]
    padded = {name: "x", **body} if first else {**body, name: "x"}
    event = {**answer, "event": {kind: padded}}
    assert read(json.dumps(event).encode()) == read(json.dumps(answer).encode())


def test_what_a_server_leaves_out_has_a_default() -> None:
    info = wire.run_info(wire.decode_summary(b'{"summary":{"runId":"r"}}').summary)
    assert info.status is RunStatus.UNKNOWN
    assert not info.has_ended
    assert (info.flow_id, info.items.total, info.created_at) == (None, 0, None)
    (step,) = wire.decode_run_steps(b'{"steps":[{"stepId":"a"}]}').steps
    assert wire.step_info(step).status is RunStatus.UNKNOWN
    assert wire.step_info(step).error is None
    assert wire.decode_run_details(b'{"summary":{"runId":"r"}}').steps == ()
    assert wire.decode_run(b'{"summary":{"runId":"r"}}').results == ()
    assert wire.decode_run_items(b"{}").results == ()
    assert wire.decode_run_list(b"{}").runs == ()
    assert wire.flow_variables(
        wire.decode_flow_variables(b'{"variables":{"v":{}}}')
    ) == {"v": FlowVariable()}
    health = wire.health(wire.decode_health(b'{"status":"odd"}'))
    assert (health.is_healthy, health.version, health.timestamp) == (False, None, None)
    (component,) = wire.component_list(
        wire.decode_components(b'{"components":[{"path":"/c"}]}')
    )
    assert (component.plugin, component.input_schema) == ("", None)
    stored = wire.decode_stored_flow(b'{"flowId":"f"}')
    assert (stored.stored, stored.findings()) == (True, [])
    event = wire.event(wire.decode_event(b'{"event":{"StepStarted":{"runId":"r"}}}'))
    assert event == StepStarted(sequence_number=0, run_id="r")


@pytest.mark.parametrize("number", [7, 99, -1])
def test_a_number_without_a_name_is_kept_where_there_is_a_place_for_it(
    number: int,
) -> None:
    summary = {**SUMMARY, "status": number}
    body = json.dumps({"summary": summary}).encode()
    info = wire.run_info(wire.decode_summary(body).summary)
    assert info.status is RunStatus.UNKNOWN
    assert not info.has_ended
    step = {**STEPS[0], "status": number}
    (read,) = wire.decode_run_steps(json.dumps({"steps": [step]}).encode()).steps
    assert wire.step_info(read).status is RunStatus.UNKNOWN
    diagnostic = {**DIAGNOSTIC, "level": number}
    body = json.dumps(
        {"flowId": "f", "diagnostics": {"diagnostics": [diagnostic]}}
    ).encode()
    (found,) = wire.decode_stored_flow(body).findings()
    assert found.level == f"level {number}"
    event = wire.event(
        wire.decode_event(json.dumps(_event("RunCompleted", status=number)).encode())
    )
    assert isinstance(event, RunCompleted)
    assert event.status is RunStatus.UNKNOWN


@pytest.mark.parametrize("number", [11, 99, -1])
def test_an_error_code_without_a_name_carries_its_number(number: int) -> None:
    item = {**ITEMS[1], "errorCode": number}
    (result,) = _results(json.dumps({"summary": SUMMARY, "results": [item]}).encode())
    assert result.error.code == f"CODE_{number}"
    step = {**STEPS[0], "errorCode": number}
    (read,) = wire.decode_run_steps(json.dumps({"steps": [step]}).encode()).steps
    error = wire.step_info(read).error
    assert error is not None
    assert error.code == f"CODE_{number}"


@given(name=st.text(min_size=1, max_size=12).filter(lambda name: name not in ANSWERS))
def test_an_event_of_a_new_name_is_unknown(name: str) -> None:
    body = json.dumps(_event(name, size=2.0, more={"x": [1]})).encode()
    event = wire.event(wire.decode_event(body))
    assert isinstance(event, UnknownEvent)
    assert (event.kind, event.run_id, event.sequence_number) == (name, "r", 3)
    assert event.data == {"runId": "r", "size": 2, "more": {"x": [1]}}
    assert event.timestamp is not None


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("StepStarted", {"runId": "r", "attempt": "two"}),
        ("StepStarted", {"runId": "r", "stepId": None}),
        ("StepStarted", {"stepId": "a"}),
        ("RunCompleted", {"runId": "r", "status": "completed"}),
        ("RunCreated", {"runId": 5}),
    ],
)
def test_an_event_of_another_shape_is_unknown(kind: str, data: dict[str, Any]) -> None:
    body = json.dumps({"sequenceNumber": 4, "event": {kind: data}}).encode()
    event = wire.event(wire.decode_event(body))
    assert isinstance(event, UnknownEvent)
    assert (event.kind, event.data, event.sequence_number) == (kind, data, 4)
    run_id = data.get("runId")
    assert event.run_id == (run_id if isinstance(run_id, str) else "")


@pytest.mark.parametrize(
    "event", [{"Ping": None}, {"Ping": [1]}, {"Ping": "x"}, "Ping"]
)
def test_an_event_that_carries_no_object_is_unknown(event: Any) -> None:
    """A new event without fields comes as its bare name, or with null."""
    body = json.dumps({"sequenceNumber": 4, "event": event}).encode()
    read = wire.event(wire.decode_event(body))
    assert isinstance(read, UnknownEvent)
    assert (read.kind, read.sequence_number) == ("Ping", 4)


# -- all of it through a client --------------------------------------------------------


def padded(value: Any, name: str = "") -> Any:
    """An answer as a newer server may give it."""
    copy = json.loads(json.dumps(value))
    for each in list(objects(copy, name)):
        old = dict(each)
        each.clear()
        each.update({"newer": {"status": 1, "runId": "x"}, **old, "newest": [None]})
    return copy


def newer_answer(method: str, path: str) -> tuple[str, str]:
    """The content type and the body that the server of the future has for a request."""
    resource = path.partition("?")[0].removeprefix("/api/v1")
    run = {**SUMMARY, "status": 2, "phase": 12, "items": {"total": 1, "queued": 0}}
    item = {"status": 2, "output": {"x": 1.0}, "cost": {"tokens": 5}}
    step = {**STEPS[0], "itemIndex": 0, "status": 99}
    answers: dict[str, Any] = {
        "POST /flows": {"flowId": "f", "diagnostics": {"diagnostics": []}},
        "POST /blobs": {"blobId": "f"},
        "POST /runs": {"summary": run, "results": [item]},
        "GET /runs": {"runs": [run, {**run, "status": 99}]},
        "GET /runs/r": {"summary": run, "steps": [step]},
        "GET /runs/r/items": {"results": [item]},
        "GET /runs/r/steps": {"steps": [step]},
        "POST /runs/r/cancel": {"summary": run},
        "GET /health": {"status": "healthy", "build": {"gitVersion": "0.14.0"}},
        "GET /components": {"components": [COMPONENT], "failedPlugins": []},
        "GET /flows/f/variables": {"variables": {"v": {"defaultValue": 1.0}}},
    }
    if resource == "/runs/r/events":
        events = [
            _event("RunCreated", itemCount=1),
            _event("RunPhaseChanged", phase=12),
            _event("StepStarted", attempt="one"),
            _event("RunCompleted", status=99),
        ]
        lines = [
            f"id: 1\nevent: run\ndata: {json.dumps(padded(each))}" for each in events
        ]
        return "text/event-stream", "retry: 1\n\n" + "\n\n".join(lines) + "\n\n"
    return "application/json", json.dumps(padded(answers[f"{method} {resource}"]))


async def serve_newer(stream: SocketStream) -> None:
    async with stream:
        received = b""
        while True:
            while b"\r\n\r\n" not in received:
                try:
                    received += await stream.receive()
                except (anyio.EndOfStream, anyio.BrokenResourceError):
                    return
            head, _, received = received.partition(b"\r\n\r\n")
            first, *fields = head.decode().split("\r\n")
            headers = dict(field.lower().split(": ", 1) for field in fields)
            length = int(headers.get("content-length", 0))
            while len(received) < length:
                received += await stream.receive()
            received = received[length:]
            method, path, _ = first.split()
            kind, body = newer_answer(method, path)
            answer = (
                "HTTP/1.1 200 OK\r\nX-Newer: 1\r\n"
                f"Content-Type: {kind}; charset=utf-8; v=14\r\n"
                f"Content-Length: {len(body.encode())}\r\n\r\n{body}"
            )
            await stream.send(answer.encode())


@pytest.mark.anyio
@each_backend
async def test_a_client_understands_a_newer_server() -> None:
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    url = f"http://127.0.0.1:{listener.extra(SocketAttribute.local_port)}"
    with anyio.fail_after(30):
        async with listener, anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, serve_newer)
            async with StepflowClient(url) as client:
                result = await client.run(CHAT, {"text": "a"})
                assert (result.run_id, result.unwrap()) == ("r", {"x": 1})
                run_id = await client.submit(CHAT, {"text": "a"})
                assert (await client.get_result(run_id)).unwrap() == {"x": 1}
                info, (item,) = await client.get_batch(run_id)
                assert (info.status, info.items.total) == (RunStatus.COMPLETED, 1)
                assert item.unwrap() == {"x": 1}
                assert [each.status for each in await client.list_runs()] == [
                    RunStatus.COMPLETED,
                    RunStatus.UNKNOWN,
                ]
                (step,) = await client.get_steps(run_id)
                assert (step.step_id, step.status) == ("a", RunStatus.UNKNOWN)
                assert (await client.cancel(run_id)).status is RunStatus.COMPLETED
                assert (await client.health()).version == "0.14.0"
                assert [each.path for each in await client.list_components()] == ["/c"]
                variables = await client.get_flow_variables(CHAT)
                assert variables == {"v": FlowVariable(default=1)}
                events = [event async for event in client.events(run_id)]
            tasks.cancel_scope.cancel()
    first, second, third, last = events
    assert isinstance(first, RunCreated)
    assert isinstance(second, UnknownEvent)
    assert (second.kind, second.data["phase"]) == ("RunPhaseChanged", 12)
    assert isinstance(third, UnknownEvent)
    assert (third.kind, third.data["attempt"]) == ("StepStarted", "one")
    assert isinstance(last, RunCompleted)
    assert last.status is RunStatus.UNKNOWN
