"""Runs that outlive their server, and their Python: on the real server, in a real store."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest

from stepflow_runtime import (
    RestartPolicy,
    RunStatus,
    RunTimeoutError,
    RuntimeState,
    RuntimeStoppedError,
    ServerCrashedError,
    ServerStartError,
    StepflowClient,
    StepflowRuntime,
    SubmitInterruptedError,
)

from .conftest import ECHO, EXAMPLES, SLEEP, each_backend, processes_left, wait_until
from .executors import CONFIG

pytestmark = [each_backend, pytest.mark.anyio]

PATIENCE = 60


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "runs.db"


def kept(store: Path, **options: Any) -> StepflowRuntime:
    options = {"restart_policy": RestartPolicy.ON_FAILURE, **options}
    return StepflowRuntime.start(storage=store, **options)


def kill(runtime: StepflowRuntime) -> None:
    assert runtime.pid is not None
    os.kill(runtime.pid, signal.SIGKILL)


def is_above(runtime: StepflowRuntime, restarts: int) -> bool:
    return runtime.restarts > restarts


def asked(store: Path, question: str) -> list[Any]:
    with closing(sqlite3.connect(store)) as connection:
        return connection.execute(question).fetchall()


HOLD = """
import os, subprocess, sys
from pathlib import Path
from stepflow_runtime.server.lock import StoreLock

lock = StoreLock(Path(sys.argv[1]), shared=False)
lock.take(0)
nothing = subprocess.DEVNULL
heir = subprocess.Popen(
    ["sleep", "60"], pass_fds=lock.fds, stdout=nothing, stderr=nothing
)
print(heir.pid, flush=True)
os._exit(0)
"""


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def move(store: Path, to: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        if (part := Path(f"{store}{suffix}")).exists():
            part.rename(f"{to}{suffix}")


# -- one argument ----------------------------------------------------------------------


async def test_runs_are_kept_from_one_runtime_to_the_next(store: Path) -> None:
    async with kept(store) as runtime:
        assert mode_of(store) == 0o600
        assert runtime.recovered_runs == ()
        result = await runtime.run(ECHO, {"x": 1})
        batch_id = await runtime.submit_batch(ECHO, [1, 2])
        await runtime.get_batch(batch_id)
    async with kept(store) as runtime:
        assert runtime.recovered_runs == ()
        assert (await runtime.get_result(result.run_id)).output == {"x": 1}
        _, results = await runtime.get_batch(batch_id)
        assert [each.output for each in results] == [1, 2]
        assert {each.run_id for each in await runtime.list_runs()} == {
            result.run_id,
            batch_id,
        }
    assert not store.with_name("runs.db-lock").exists()
    assert len(asked(store, "SELECT DISTINCT orchestrator_id FROM runs")) == 1


async def test_a_configuration_file_keeps_its_workers_directory(
    store: Path, worker_env: dict[str, str]
) -> None:
    folder = EXAMPLES / "python_worker"
    async with StepflowRuntime.start(
        folder / "stepflow-config.yml", storage=store, env=worker_env
    ) as runtime:
        result = await runtime.run(folder / "shout.yaml", {"text": "hello"})
        assert result.output == "HELLO!"
    assert asked(store, "SELECT status FROM runs") == [("completed",)]


async def test_a_second_runtime_is_refused_while_the_first_has_the_store(
    store: Path,
) -> None:
    async with kept(store) as runtime:
        link = store.with_name("link.db")
        link.symlink_to(store)
        for same in (store, link):
            with pytest.raises(ServerStartError, match=r"in use by .* this process"):
                async with kept(same):
                    pass
        config = {
            **CONFIG,
            "storageConfig": {"type": "sqlite", "databaseUrl": f"sqlite:{store}"},
        }
        with pytest.raises(ServerStartError, match="in use by"):
            async with StepflowRuntime.start(config):
                pass
        # What the message says to do.
        async with StepflowClient(runtime.url) as client:
            assert (await client.run(ECHO, 1)).output == 1
    async with kept(store):
        pass


async def test_a_start_that_failed_holds_no_store(store: Path) -> None:
    with pytest.raises(ServerStartError):
        async with kept(store, config_path={"plugins": {}, "routes": 7}):
            pass
    with anyio.move_on_after(0.01):
        async with kept(store):
            await anyio.sleep_forever()
    assert not store.with_name("runs.db-lock").exists()
    async with kept(store) as runtime:
        assert (await runtime.run(ECHO, 1)).is_success


@contextmanager
def held_by_a_dead_one(store: Path) -> Iterator[None]:
    """As if the server of a Python that was killed would not die."""
    done = subprocess.run(
        [sys.executable, "-c", HOLD, str(store)], stdout=subprocess.PIPE, check=True
    )
    try:
        yield
    finally:
        os.kill(int(done.stdout), signal.SIGKILL)


@pytest.mark.parametrize("way", ["cancelled", "stopped", "timeout"])
async def test_a_start_that_waits_for_a_dying_holder_can_be_given_up(
    store: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr("stepflow_runtime.server.store._PATIENCE", 30)
    timeout = 0.2 if way == "timeout" else 30
    runtime = kept(store, startup_timeout=timeout)

    async def start() -> None:
        error = ServerStartError if way == "timeout" else RuntimeStoppedError
        with pytest.raises(error):
            async with runtime:
                pass

    with held_by_a_dead_one(store), anyio.fail_after(15):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(start)
            await anyio.sleep(0.2)
            if way == "cancelled":
                tasks.cancel_scope.cancel()
            elif way == "stopped":
                await runtime.stop_async()
    assert runtime.state.is_final


@pytest.mark.parametrize("name", ["no/runs.db", "."])
async def test_where_no_store_can_be(tmp_path: Path, name: str) -> None:
    with pytest.raises(ServerStartError, match="storage: .*"):
        async with kept(tmp_path / name):
            pass


async def test_a_binary_without_postgresql_says_what_to_do() -> None:
    with pytest.raises(ServerStartError) as failed:
        async with StepflowRuntime.start(storage="postgresql://me:hush@127.0.0.1/db"):
            pass
    words = str(failed.value)
    assert "without PostgreSQL" in words
    assert "binary=" in words and "StepflowClient" in words
    assert "hush" not in words


async def test_a_url_that_the_server_cannot_use_is_told_without_its_password() -> None:
    url = "mysql://me:hush@127.0.0.1/db"
    config = {**CONFIG, "storageConfig": {"type": "postgres", "databaseUrl": url}}
    runtime = StepflowRuntime.start(config)
    with pytest.raises(
        ServerStartError, match=r"mysql://me:\*\*\*@127\.0\.0\.1"
    ) as failed:
        async with runtime:
            pass
    told = [*failed.value.recent_logs, *runtime.get_recent_logs()]
    assert "hush" not in str(failed.value) + repr(told)


# -- the server dies -------------------------------------------------------------------


async def test_a_run_that_is_waited_for_comes_to_its_end(store: Path) -> None:
    async with kept(store) as runtime:
        results: list[Any] = []

        async def wait(run_id: str) -> None:
            results.append(await runtime.get_result(run_id))

        async def run() -> None:
            results.append(await runtime.run(SLEEP, 700))

        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait, await runtime.submit(SLEEP, 700))
                # One whose id nobody knows yet: the answer to its submit is on its way.
                tasks.start_soon(run)
                await anyio.sleep(0.4)
                kill(runtime)
        assert runtime.restarts == 1
        assert [each.output for each in results] == [{"duration_ms": 700}] * 2
    assert asked(store, "SELECT status FROM runs") == [("completed",)] * 2


async def test_a_submit_that_never_arrived_is_sent_again(store: Path) -> None:
    async with kept(store) as runtime:
        flow = await runtime.store_flow(ECHO)
        await runtime.run(flow, 0)
        psutil.Process(runtime.pid).suspend()
        results: list[Any] = []

        async def run() -> None:
            results.append(await runtime.run(flow, 1))

        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(run)
                await anyio.sleep(0.1)
                kill(runtime)
        assert results[0].output == 1
    assert asked(store, "SELECT status FROM runs") == [("completed",)] * 2


async def test_where_nobody_can_tell_a_submit_is_not_repeated_unasked(
    tmp_path: Path,
) -> None:
    # The journal has a file of its own, which is not where we look.
    def sqlite(name: str) -> dict[str, str]:
        url = f"sqlite:{tmp_path / name}?mode=rwc"
        return {"type": "sqlite", "databaseUrl": url}

    config = {
        **CONFIG,
        "storageConfig": {"metadata": sqlite("runs.db"), "journal": sqlite("log.db")},
    }
    outcomes: dict[str, Any] = {}
    async with StepflowRuntime.start(
        config, restart_policy=RestartPolicy.ON_FAILURE
    ) as runtime:
        flow = await runtime.store_flow(ECHO)

        async def run(on_unknown: Any) -> None:
            try:
                outcomes[on_unknown] = await runtime.run(flow, 1, on_unknown=on_unknown)
            except SubmitInterruptedError as exc:
                outcomes[on_unknown] = exc

        psutil.Process(runtime.pid).suspend()
        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(run, "raise")
                tasks.start_soon(run, "resubmit")
                await anyio.sleep(0.1)
                kill(runtime)
        assert isinstance(outcomes["raise"], SubmitInterruptedError)
        assert outcomes["resubmit"].output == 1
    with pytest.raises(ValueError, match="on_unknown"):
        await runtime.run(ECHO, 1, on_unknown="repeat")  # type: ignore[arg-type]


async def test_who_is_cancelled_in_the_crash_has_the_run_cancelled(store: Path) -> None:
    async with kept(store) as runtime:
        flow = await runtime.store_flow(SLEEP)

        async def run() -> None:
            await runtime.run(flow, 20_000)

        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(run)
                await anyio.sleep(0.3)
                kill(runtime)
                # Neither the run's id nor whether it has begun is known by now.
                await wait_until(lambda: runtime.state is not RuntimeState.READY)
                tasks.cancel_scope.cancel()
            await runtime.wait_ready()

            while not await runtime.list_runs(status=RunStatus.CANCELLED):  # noqa: ASYNC110
                await anyio.sleep(0.02)
            assert len(await runtime.list_runs()) == 1


@pytest.mark.parametrize("is_killed", [False, True])
async def test_who_is_cancelled_with_the_runtime_has_the_runs_cancelled(
    store: Path, is_killed: bool
) -> None:
    async def run() -> None:
        await runtime.run(SLEEP, 20_000)

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks, kept(store) as runtime:
            await runtime.store_flow(SLEEP)
            for _ in range(5):
                tasks.start_soon(run)
            while len(await runtime.list_runs()) < 5:  # noqa: ASYNC110
                await anyio.sleep(0.01)
            if is_killed:
                kill(runtime)
            tasks.cancel_scope.cancel()
    assert asked(store, "SELECT DISTINCT status FROM runs") == [("cancelled",)]


@pytest.mark.parametrize("is_file", [False, True])
async def test_a_relative_store_stays_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_file: bool
) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(here)
    store = {"type": "sqlite", "databaseUrl": "sqlite:runs.db?mode=rwc"}
    config: Any = {**CONFIG, "storageConfig": store}
    if is_file:
        (elsewhere / "config.json").write_text(json.dumps(config))
        config = elsewhere / "config.json"
    async with StepflowRuntime.start(
        config, restart_policy=RestartPolicy.ON_FAILURE
    ) as runtime:
        run_id = (await runtime.run(ECHO, 1)).run_id
        monkeypatch.chdir(elsewhere)
        kill(runtime)
        await wait_until(partial(is_above, runtime, 0))
        assert (await runtime.get_result(run_id)).output == 1
    assert not (elsewhere / "runs.db").exists()


async def test_a_time_limit_that_ends_in_the_crash_has_the_run_cancelled(
    store: Path,
) -> None:
    async with kept(store) as runtime:
        flow = await runtime.store_flow(SLEEP)
        timed_out: list[int] = []

        async def run(number: int) -> None:
            try:
                await runtime.run(flow, 20_000 + number, timeout=0.3 + number / 50)
            except RunTimeoutError:
                timed_out.append(number)

        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as tasks:
                for number in range(10):
                    tasks.start_soon(run, number)
                await anyio.sleep(0.35)
                kill(runtime)
            assert sorted(timed_out) == list(range(10))
            cancelled = partial(runtime.list_runs, status=RunStatus.CANCELLED)
            while len(await cancelled()) < 10:  # noqa: ASYNC110
                await anyio.sleep(0.02)
        assert len(await runtime.list_runs()) == 10


async def test_events_go_on_and_none_comes_twice(store: Path) -> None:
    flow = {
        "steps": [
            {
                "id": f"s{n}",
                "component": "/sleep",
                "input": {
                    # More fields than one, whose order a server need not keep.
                    "passthrough": {"z": 1, "a": 2, "m": [{"y": 1, "b": 2}], "k": n},
                    "duration_ms": 300,
                    **({"after": {"$step": f"s{n - 1}"}} if n else {}),
                },
            }
            for n in range(4)
        ],
        "output": {"$step": "s3"},
    }
    async with kept(store) as runtime:
        run_id = await runtime.submit(flow, 0)
        seen: list[Any] = []
        with anyio.fail_after(PATIENCE):
            async for event in runtime.events(run_id, include_results=True):
                seen.append(event)
                if type(event).__name__ == "StepCompleted" and runtime.restarts < 2:
                    restarts = runtime.restarts
                    kill(runtime)
                    await wait_until(partial(is_above, runtime, restarts))
        # As one reader has them who comes when all is over.
        whole = [each async for each in runtime.events(run_id, include_results=True)]
        assert seen == whole
        ends = Counter(
            each.step_id for each in seen if type(each).__name__ == "StepCompleted"
        )
        assert set(ends) == {"s0", "s1", "s2", "s3"} and set(ends.values()) == {1}


async def test_a_server_that_is_not_restarted_leaves_its_runs_in_the_store(
    store: Path,
) -> None:
    async with kept(store, restart_policy=RestartPolicy.NEVER) as runtime:
        run_id = await runtime.submit(SLEEP, 300)
        kill(runtime)
        with pytest.raises(ServerCrashedError, match=r"Its runs are in .*runs\.db"):
            await runtime.get_result(run_id)
        # It holds nothing any more, though its block goes on.
        async with kept(store) as another:
            assert another.recovered_runs == (run_id,)
            assert (await another.get_result(run_id)).is_success


async def test_a_run_with_sub_runs_is_given_up_and_says_so(store: Path) -> None:
    """Stepflow 0.13 does not store the inner workflow of ``/map``, and misses it then."""
    flow = {
        "steps": [
            {
                "id": "map",
                "component": "/map",
                "input": {"workflow": {"$literal": SLEEP}, "items": {"$input": "$"}},
            }
        ],
        "output": {"$step": "map"},
    }
    async with kept(store) as runtime:
        run_id = await runtime.submit(flow, [800, 800])
        with anyio.fail_after(PATIENCE):
            while len(await runtime.list_runs()) < 2:  # noqa: ASYNC110
                await anyio.sleep(0.02)
            await anyio.sleep(0.2)
            kill(runtime)
            result = await runtime.get_result(run_id)
    assert result.is_failed and result.error is not None
    assert result.error.code == "ORCHESTRATOR_ERROR"
    assert "after a restart" in result.error.message


async def test_many_runs_with_sub_runs_do_not_wait_for_each_other(store: Path) -> None:
    """With as few connections as the server takes by itself they do, for 30 s, and fail."""
    flow = {
        "steps": [
            {
                "id": "map",
                "component": "/map",
                "input": {"workflow": {"$literal": ECHO}, "items": {"$input": "$"}},
            }
        ],
        "output": {"$step": "map", "path": "$.successful"},
    }
    async with kept(store) as runtime:
        with anyio.fail_after(25):
            inputs = [[number, number] for number in range(40)]
            async for _, result in runtime.run_many(flow, inputs, max_concurrent=40):
                assert result.unwrap() == 2


# -- Python dies -----------------------------------------------------------------------

VICTIM = """
import os, signal, sys
from stepflow_runtime import StepflowRuntime
from tests.conftest import ECHO, SLEEP
import anyio

async def main():
    async with StepflowRuntime.start(storage=sys.argv[1]) as runtime:
        done = (await runtime.run(ECHO, "done")).run_id
        run = await runtime.submit(SLEEP, 800)
        batch = await runtime.submit_batch(SLEEP, [400 + i for i in range(15)])
        print(done, run, batch, flush=True)
        await anyio.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)

anyio.run(main)
"""


async def test_a_new_python_goes_on_where_a_killed_one_was(store: Path) -> None:
    done = await anyio.run_process(
        [sys.executable, "-c", VICTIM, str(store)],
        check=False,
        stderr=subprocess.STDOUT,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == -signal.SIGKILL, done.stdout.decode()
    finished, run, batch = done.stdout.decode().split()
    # At once: the server of the dead one is just being killed by its guard.
    async with kept(store) as runtime:
        assert runtime.recovered_runs == (run, batch)
        with anyio.fail_after(PATIENCE):
            assert (await runtime.get_result(run)).output == {"duration_ms": 800}
            details, results = await runtime.get_batch(batch)
            assert (await runtime.get_result(finished)).output == "done"
        assert details.items.completed == 15
        assert [each.output["duration_ms"] for each in results] == [
            400 + i for i in range(15)
        ]
    assert len(asked(store, "SELECT id FROM runs")) == 3
    await wait_until(lambda: not processes_left())  # the guard of the dead one


async def test_runs_of_another_orchestrator_are_gone_on_with(store: Path) -> None:
    """A store that was moved, or that a server by hand has begun."""
    async with kept(store, orchestrator_id="first") as runtime:
        run_id = await runtime.submit(SLEEP, 600)
    moved = store.with_name("moved.db")
    move(store, moved)
    async with kept(moved) as runtime:
        assert runtime.recovered_runs == (run_id,)
        with anyio.fail_after(PATIENCE):
            assert (await runtime.get_result(run_id)).is_success
    assert asked(moved, "SELECT orchestrator_id FROM runs") == [("first",)]
