"""Where cost grows: with concurrency, with the size of a batch, with the runs that were made.

The series that ``docs/performance.md`` shows.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio
import psutil

from stepflow_runtime import StepflowRuntime

from .. import peers
from ..measure import Case, Plan, Row, Sample, against, in_turns, row
from .bulk import our_batch, pair, their_batch

__all__ = ["CASES"]

AT_ONCE: Final = 50


# -- concurrency -----------------------------------------------------------------------


def concurrency(plan: Plan) -> list[Row]:
    rows: list[Row] = []
    with ExitStack() as stack:
        sides = _loads(stack)
        for level in plan.levels_of_growth:
            at_level = {
                name: partial(side, level, plan.seconds) for name, side in sides.items()
            }
            found = in_turns(at_level, plan.rounds_of_growth, warm=False)
            rows += _series("growth-concurrency", "runs/s", found, level)
    return rows


def _loads(stack: ExitStack) -> dict[str, peers.Load]:
    port, _ = stack.enter_context(peers.bare_server())
    sides = {
        "ours": stack.enter_context(peers.in_lane("asyncio", peers.ours)),
        "official": stack.enter_context(peers.in_lane("asyncio", peers.official)),
    }
    if peers.has_wrk():
        sides["limit"] = partial(peers.wrk, port, peers.store(port))
    return sides


def _series(
    case: str, unit: str, found: dict[str, list[Sample]], x: float
) -> list[Row]:
    checks = {
        "ours": [against(found, "ours", each) for each in found if each != "ours"]
    }
    return [
        row(case, name, unit, samples, *checks.get(name, ()), x=x)
        for name, samples in found.items()
    ]


# -- batches ---------------------------------------------------------------------------


def batches(plan: Plan) -> list[Row]:
    rows: list[Row] = []
    with pair() as both, peers.bare_server() as (port, _):
        call = both.portal.call
        flow_id = peers.store(port)
        for size in plan.batches:
            found = in_turns(
                {
                    "ours": partial(call, our_batch, both, size),
                    "official": partial(call, their_batch, both, size),
                    "limit": partial(_bare_batch, port, flow_id, size),
                },
                plan.rounds_of_growth,
            )
            rows += _series("growth-batch", "items/s", found, size)
    return rows


def _bare_batch(port: int, flow_id: str, size: int) -> Sample:
    """One request, made before the clock starts, and its answer's bytes, which nobody reads."""
    body = {
        "flowId": flow_id,
        "input": [{"n": number} for number in range(size)],
        "wait": True,
        "timeoutSecs": 60,
    }
    request = peers.post("/api/v1/runs", json.dumps(body).encode())
    with peers.connect(port) as connection:
        began = time.perf_counter()
        peers.exchange(connection, request)
        took = time.perf_counter() - began
    return Sample(size / took, {"ms": 1e3 * took})


# -- memory ----------------------------------------------------------------------------


def memory(plan: Plan) -> list[Row]:
    """What a server, and who talks to it, hold after so many runs."""
    rows = []
    for side, (enter, runs) in _sides(plan.memory).items():
        with enter() as (run, server):
            rows += _memory_series(side, run, server, runs)
    return rows


RunSome = Callable[[int], float]
Server = Callable[[], int]  # its pid, which is another one after a restart
Entered = tuple[RunSome, Server]


def _sides(runs: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """How each is entered, and how many runs it makes: a database is slow."""
    return {
        "ours, in memory": (_our_server, runs),
        "ours, recycled": (
            partial(_our_server, recycle_after_runs=max(runs // 5, 1)),
            runs,
        ),
        "ours, sqlite": (_our_sqlite, runs // 20),
        "official": (_theirs, runs),
        "limit": (_raw_server, runs),
    }


@contextmanager
def _our_server(
    config: dict[str, Any] | None = None, **options: Any
) -> Iterator[Entered]:
    with peers.lane("asyncio") as portal:
        start = StepflowRuntime.start(config, log_config=peers.QUIET, **options)
        with portal.wrap_async_context_manager(start) as runtime:
            run = partial(runtime.run, peers.FLOW, peers.INPUT)
            portal.call(run)
            yield partial(portal.call, _run_some, run), lambda: runtime.pid or 0


@contextmanager
def _our_sqlite() -> Iterator[Entered]:
    with _sqlite() as config, _our_server(config) as server:
        yield server


@contextmanager
def _sqlite() -> Iterator[dict[str, Any]]:
    """A configuration with a database in a file."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "stepflow.db"
        yield {
            **peers.CONFIG,
            "storageConfig": {
                "type": "sqlite",
                "databaseUrl": f"sqlite:{path}?mode=rwc",
                "autoMigrate": True,
            },
        }


@contextmanager
def _theirs() -> Iterator[Entered]:
    """The official client, on a server started by hand."""
    with peers.lane("asyncio") as portal, peers.bare_server() as (port, pid):
        client, flow_id = portal.call(_their_client, port)
        run = partial(client.run, flow_id, peers.INPUT)
        try:
            yield partial(portal.call, _run_some, run), lambda: pid
        finally:
            portal.call(client.close)


async def _their_client(port: int) -> tuple[Any, str]:
    from stepflow_py import StepflowClient

    client = StepflowClient.connect(f"127.0.0.1:{port}")
    return client, (await client.store_flow(peers.FLOW)).flow_id


@contextmanager
def _raw_server() -> Iterator[Entered]:
    """One socket, one run at a time, and nothing kept."""
    with peers.bare_server() as (port, pid), peers.connect(port) as connection:
        body = json.dumps(peers.run_body(peers.store(port))).encode()
        request = peers.post("/api/v1/runs", body)

        def run_some(count: int) -> float:
            began = time.perf_counter()
            for _ in range(count):
                peers.exchange(connection, request)
            return time.perf_counter() - began

        yield run_some, lambda: pid


async def _run_some(run: peers.Runs, count: int) -> float:
    numbers = iter(range(count))

    async def work() -> None:
        for _ in numbers:
            await run()

    began = time.perf_counter()
    async with anyio.create_task_group() as tasks:
        for _ in range(AT_ONCE):
            tasks.start_soon(work)
    return time.perf_counter() - began


def _memory_series(side: str, run: RunSome, server: Server, runs: int) -> list[Row]:
    """A row for each tenth: the server's RSS, and what this process has grown by."""
    me = psutil.Process()
    run(min(runs // 10, 500))
    mine, first = _rss(me.pid), _rss(server())
    rows = []
    for tenth in range(11):
        took = run(runs // 10) if tenth else 0.0
        made = tenth * (runs // 10)
        now = _rss(server())
        also = {"this process, MB grown": _rss(me.pid) - mine}
        if made:
            also |= {
                "KB/run": 1e3 * (now - first) / made,
                "runs/s": runs // 10 / took,
            }
        rows.append(
            row("growth-memory", side, "MB, server", [Sample(now, also)], x=made)
        )
    return rows


def _rss(pid: int) -> float:
    """In MB."""
    return float(psutil.Process(pid).memory_info().rss) / 1e6


# -- what a run costs ------------------------------------------------------------------


def costs(plan: Plan) -> list[Row]:
    """Memory of the server that a run, or an item, takes and never gives back."""
    count = plan.memory // 5
    ways: dict[str, tuple[Callable[..., Awaitable[object]], int]] = {
        "a run": (_make_runs, count),
        "a run, deleted": (_make_and_delete, count),
        "a run with 10 KB of input": (_make_large, count // 5),
        "an item of a batch": (_make_batch, count),
    }
    return [
        row("growth-costs", name, "KB", [_cost(way, number)])
        for name, (way, number) in ways.items()
    ]


def _cost(
    make: Callable[[StepflowRuntime, int], Awaitable[object]], count: int
) -> Sample:
    return Sample(anyio.run(_grow, make, count))


async def _grow(
    make: Callable[[StepflowRuntime, int], Awaitable[object]], count: int
) -> float:
    async with StepflowRuntime.start(log_config=peers.QUIET) as runtime:
        assert runtime.pid is not None
        await make(runtime, count // 10)
        before = _rss(runtime.pid)
        await make(runtime, count)
        return 1e3 * (_rss(runtime.pid) - before) / count


async def _make_runs(runtime: StepflowRuntime, count: int) -> None:
    await _run_some(partial(runtime.run, peers.FLOW, peers.INPUT), count)


async def _make_large(runtime: StepflowRuntime, count: int) -> None:
    await _run_some(partial(runtime.run, peers.FLOW, {"text": "x" * 10_000}), count)


async def _make_and_delete(runtime: StepflowRuntime, count: int) -> None:
    async def run() -> None:
        result = await runtime.run(peers.FLOW, peers.INPUT)
        await runtime.delete_run(result.run_id)

    await _run_some(run, count)


async def _make_batch(runtime: StepflowRuntime, count: int) -> None:
    inputs = [peers.INPUT] * count
    batch_id = await runtime.submit_batch(peers.FLOW, inputs)
    await runtime.get_batch(batch_id)


CASES: Final = (
    Case("growth-concurrency", "runs per second, by runs at a time", concurrency),
    Case("growth-batch", "items per second, by the size of a batch", batches),
    Case("growth-memory", "memory, by runs made", memory),
    Case("growth-costs", "what a run leaves in the server's memory", costs),
)
