"""A store that outlives its server: every run comes to its end once, whatever is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import anyio
import pytest
import yaml

from stepflow_runtime import LogConfig, RestartPolicy, StepflowRuntime
from stepflow_runtime.server import restart

from ..conftest import EXAMPLES, each_backend, processes_left
from .ledger import Account

Rounds = Callable[[int, int], int]
Kind = Callable[[StepflowRuntime, int], Awaitable[list[Any]]]

WORKER = EXAMPLES / "python_worker"

# A run's input is its number, and so is its output: nothing else proves whose it is.
NUMBER = {"$input": "$"}
PAUSE = {"component": "/sleep", "input": {"duration_ms": 40, "passthrough": NUMBER}}
NAP = {
    "name": "nap",
    "steps": [{"id": "nap", **PAUSE}],
    "output": {"$step": "nap", "path": "$.passthrough"},
}
FAN_OUT = {
    "name": "fan-out",
    "steps": [
        *({"id": name, **PAUSE} for name in ("a", "b", "c")),
        {
            "id": "join",
            "component": "/noop",
            "input": {name: {"$step": name} for name in ("a", "b", "c")},
        },
    ],
    "output": {"$step": "join", "path": "$.a.passthrough"},
}
WORK = {
    "name": "work",
    "steps": [
        {
            "id": "loud",
            "component": "/python/shout",
            "input": {"text": {"$input": "$"}},
        }
    ],
    "output": {"$step": "loud", "path": "$.text"},
}
BATCH = 4


async def nap(runtime: StepflowRuntime, number: int) -> list[Any]:
    return [(await runtime.run(NAP, number)).unwrap()]


async def fan_out(runtime: StepflowRuntime, number: int) -> list[Any]:
    return [(await runtime.run(FAN_OUT, number)).unwrap()]


async def work(runtime: StepflowRuntime, number: int) -> list[Any]:
    text = (await runtime.run(WORK, f"n{number}")).unwrap()
    return [int(text.removeprefix("N").removesuffix("!"))]


async def submit(runtime: StepflowRuntime, number: int) -> list[Any]:
    run_id = await runtime.submit(NAP, number)
    return [(await runtime.get_result(run_id)).unwrap()]


async def follow(runtime: StepflowRuntime, number: int) -> list[Any]:
    run_id = await runtime.submit(NAP, number)
    names = [type(event).__name__ async for event in runtime.events(run_id)]
    assert names[0] == "RunCreated" and len(set(names)) > 3
    return [(await runtime.get_result(run_id)).unwrap()]


async def batch(runtime: StepflowRuntime, number: int) -> list[Any]:
    numbers = [number + part / BATCH for part in range(BATCH)]
    details, results = await runtime.get_batch(await runtime.submit_batch(NAP, numbers))
    assert details.items.completed == BATCH
    assert [each.unwrap() for each in results] == numbers
    return [results[0].unwrap()]


async def many(runtime: StepflowRuntime, number: int) -> list[Any]:
    found = {}
    async for _, result in runtime.run_many(NAP, [number]):
        found[result.unwrap()] = True
    return list(found)


KINDS: tuple[Kind, ...] = (nap, fan_out, work, submit, follow, batch, many)


@asynccontextmanager
async def killed_again_and_again(
    runtime: StepflowRuntime, account: Account, chance: random.Random, kills: int
) -> AsyncIterator[anyio.Event]:
    """Kill the server while the block runs; the event tells that it was often enough."""
    enough = anyio.Event()

    async def kill() -> None:
        while account.injected < kills:
            await runtime.wait_ready()
            await anyio.sleep(chance.uniform(0.05, 0.6))
            if (pid := runtime.pid) is not None:
                os.kill(pid, signal.SIGKILL)
                account.injected += 1
        enough.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(kill)
        yield enough


@each_backend
@pytest.mark.anyio
async def test_no_run_is_lost_and_none_is_doubled(
    account: Account,
    rounds: Rounds,
    chance: random.Random,
    tmp_path: Path,
    worker_env: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Server killed (SIGKILL) under load, durable store."""
    monkeypatch.setattr(restart, "FRESH_AFTER", 0.0)
    config = yaml.safe_load((WORKER / "stepflow-config.yml").read_text())
    config["workingDirectory"] = str(WORKER)
    del config["retry"]  # that a worker died is no fault of the run
    runs, kills = rounds(500, 1000), rounds(10, 20)
    store = tmp_path / "runs.db"
    came: Counter[Any] = Counter()

    async def call(number: int) -> None:
        async with at_once:
            account.calls += 1
            came.update(await KINDS[number % len(KINDS)](runtime, number))

    at_once = anyio.CapacityLimiter(50)
    async with StepflowRuntime.start(
        config,
        storage=store,
        env=worker_env,
        restart_policy=RestartPolicy.ON_FAILURE,
        max_restarts=10_000,
        log_config=LogConfig(level="error"),
    ) as runtime:
        async with killed_again_and_again(runtime, account, chance, kills) as enough:
            async with anyio.create_task_group() as tasks:
                for number in range(runs):
                    tasks.start_soon(call, number)
            while not enough.is_set():  # the rest of the kills
                await call(runs + account.calls)
        survived = runtime.restarts
    account.survived = survived
    account.lost = account.calls - len(came)
    account.left = len(processes_left())
    assert (account.left, account.lost) == (0, 0)
    assert set(came.values()) == {1}
    assert stored(store) == {"completed": account.calls}
    assert survived == account.injected


def stored(path: Path) -> dict[str, int]:
    """How many runs there are in the store, by how they stand; each input but once."""
    with closing(sqlite3.connect(path)) as store:
        rows = store.execute(
            "SELECT runs.status, run_items.input_json, flow_name FROM runs "
            "JOIN run_items ON run_id = id WHERE id = root_run_id AND item_index = 0"
        ).fetchall()
    inputs = Counter((json.dumps(json.loads(given)), name) for _, given, name in rows)
    assert set(inputs.values()) == {1}, inputs.most_common(3)
    return dict(Counter(status for status, *_ in rows))
