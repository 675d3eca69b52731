"""Runtimes that share a store by etcd's leases: one is lost, another goes on with its runs."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest

from stepflow_runtime import LogConfig, RestartPolicy, RunStatus, StepflowRuntime
from stepflow_runtime.server.options import DEFAULT_CONFIG

from ..conftest import ASYNCIO, EXAMPLES, each_backend, wait_until
from ..etcd import Etcd
from ..etcd import etcd as _etcd
from .ledger import Account

pytestmark = pytest.mark.anyio

etcd = _etcd

MEMBER = EXAMPLES / "failover" / "member.py"
PATIENCE = 60

# Seconds that a lease lasts: as short as the server can have them, and longer than it
# takes to see that nobody waits for the end of one.
SHORT, LONG = 3, 15

# For tests that take long because leases do: what they show is the server's.
one_backend = pytest.mark.parametrize("anyio_backend", [ASYNCIO])

# Returns its input, after so many milliseconds.
NUMBER = {"$input": "$"}
NAP = {
    "steps": [
        {
            "id": "nap",
            "component": "/sleep",
            "input": {"duration_ms": NUMBER, "passthrough": NUMBER},
        }
    ],
    "output": {"$step": "nap", "path": "$.passthrough"},
}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "runs.db"


def member(store: Path, etcd: Etcd, ttl: int | None = None) -> StepflowRuntime:
    recovery = {} if ttl is None else {"recovery": {"leaseTtlSecs": ttl}}
    return StepflowRuntime.start(
        {**DEFAULT_CONFIG, **recovery},
        storage=store,
        lease=[etcd.url],
        restart_policy=RestartPolicy.ON_FAILURE,
        log_config=LogConfig(level="warn"),
    )


def asked(store: Path, question: str) -> list[Any]:
    with closing(sqlite3.connect(store)) as connection:
        return connection.execute(question).fetchall()


@contextmanager
def another_program(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    program = subprocess.Popen(
        [sys.executable, "-W", "error", str(MEMBER), *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        with program:
            yield program
    finally:
        program.kill()


def kill_whole(program: subprocess.Popen[str]) -> None:
    """Python, its guard, its server and their children, as when a machine is lost."""
    python = psutil.Process(program.pid)
    python.suspend()  # or it would replace the guard
    everybody = [python, *python.children(recursive=True)]
    assert len(everybody) >= 3
    for each in everybody:
        each.kill()
    program.wait()


async def results(runtime: StepflowRuntime, run_ids: Sequence[str]) -> Counter[Any]:
    found: Counter[Any] = Counter()

    async def wait(run_id: str) -> None:
        found[(await runtime.get_result(run_id)).unwrap()] += 1

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            for run_id in run_ids:
                tasks.start_soon(wait, run_id)
    return found


async def wait_taken_over(account: Account, store: Path, runs: int, owner: str) -> None:
    began = time.monotonic()

    def is_taken_over() -> bool:
        owners = asked(store, "SELECT orchestrator_id FROM runs")
        return owners == [(owner,)] * runs

    with anyio.fail_after(PATIENCE):
        while not is_taken_over():  # noqa: ASYNC110 - another process's doing
            await anyio.sleep(0.05)
    account.recoveries.append(time.monotonic() - began)


@one_backend
async def test_the_other_finishes_every_run_of_a_killed_runtime(
    account: Account, store: Path, etcd: Etcd
) -> None:
    """A whole runtime killed (SIGKILL), guard included, with 200 runs in flight."""
    runs = 200
    etcd.start()
    async with member(store, etcd) as runtime:
        with another_program(str(store), etcd.url, str(runs)) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "submitted\n"
            in_flight = await runtime.list_runs(status=RunStatus.RUNNING, limit=1000)
            assert len(in_flight) == runs
            kill_whole(other)
        account.injected += 1
        (owner,) = etcd.living().keys() - {each.orchestrator_id for each in in_flight}
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait_taken_over, account, store, runs, owner)
            found = await results(runtime, [each.run_id for each in in_flight])
    account.calls, account.lost = runs, runs - len(found)
    account.survived += 1
    assert found == Counter(map(float, range(runs)))
    assert asked(store, "SELECT status, count(*) FROM runs GROUP BY 1") == [
        ("completed", runs)
    ]


@one_backend
async def test_what_a_runtime_leaves_unfinished_is_taken_over_at_once(
    store: Path, etcd: Etcd
) -> None:
    """Its server gives the lease back: the others need not wait until it has run out."""
    etcd.start()
    async with member(store, etcd, LONG) as runtime:
        async with member(store, etcd, LONG) as other:
            run_ids = [await other.submit(NAP, 1500 + each) for each in range(5)]
            await wait_until(lambda: len(etcd.living()) == 2)
        assert len(etcd.living()) == 1
        (owner,) = etcd.living()
        found = await results(runtime, run_ids)
    assert len(found) == 5
    assert asked(store, "SELECT DISTINCT status, orchestrator_id FROM runs") == [
        ("completed", owner)
    ]


@each_backend
async def test_without_etcd_a_runtime_works_alone_until_there_is_one(
    store: Path, etcd: Etcd
) -> None:
    async with member(store, etcd, SHORT) as runtime:
        assert (await runtime.run(NAP, 10)).is_success
        etcd.start()
        await wait_until(lambda: len(etcd.living()) == 1)
        assert (await runtime.run(NAP, 11)).is_success


@one_backend
async def test_servers_that_etcd_was_away_from_are_replaced_before_their_leases_run_out(
    store: Path, etcd: Etcd
) -> None:
    """With its connection Stepflow 0.13 has lost the way to renew its lease."""
    etcd.start()
    async with member(store, etcd, 6) as runtime, member(store, etcd, 6) as other:
        await wait_until(lambda: len(etcd.living()) == 2)
        run_ids = [await runtime.submit(NAP, 1000)]
        etcd.end()
        run_ids.append(await runtime.submit(NAP, 5000))
        etcd.start()
        run_ids.append(await runtime.submit(NAP, 5001))
        before = etcd.living()
        await wait_until(lambda: all_renewed(before, etcd.living()))
        assert (runtime.recycles, other.recycles) == (1, 1)
        assert len(await results(runtime, run_ids)) == 3
    assert asked(store, "SELECT DISTINCT status FROM runs") == [("completed",)]


def all_renewed(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return before.keys() == after.keys() and all(
        after[each]["last_heartbeat"] > before[each]["last_heartbeat"]
        for each in before
    )


@each_backend
async def test_an_etcd_that_has_lost_its_data_costs_no_run(
    store: Path, etcd: Etcd
) -> None:
    etcd.start()
    async with (
        member(store, etcd, SHORT) as runtime,
        member(store, etcd, SHORT) as other,
    ):
        run_ids = [await runtime.submit(NAP, 1500 + each) for each in range(5)]
        etcd.end()
        etcd.lose_data()
        etcd.start()
        run_ids.append((await other.run(NAP, 10)).run_id)
        await wait_until(lambda: len(etcd.living()) == 2)
        assert (runtime.recycles, other.recycles) == (1, 1)
        assert len(await results(runtime, run_ids)) == 6
    assert asked(store, "SELECT status, count(*) FROM runs GROUP BY 1") == [
        ("completed", 6)
    ]


@each_backend
async def test_the_end_of_a_run_is_heard_of_by_a_runtime_that_has_it_not_in_hand(
    store: Path, etcd: Etcd
) -> None:
    """The server itself would keep the question until its time is over: 30 s."""
    etcd.start()
    async with member(store, etcd) as runtime, member(store, etcd) as other:
        run_id = await runtime.submit(NAP, 1500)
        with anyio.fail_after(15):
            assert (await other.get_result(run_id)).output == 1500
