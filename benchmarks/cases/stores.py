"""What it costs to keep runs: the server's stores side by side, on this disk and on a slower one.

What ``docs/durability.md`` shows. Each arrangement has a server of its own, ours; its files are
where ``TMPDIR`` says, so that is the disk which is measured.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import anyio
from anyio.from_thread import BlockingPortal

from stepflow_runtime import FlowId, StepflowError, StepflowRuntime

from .. import disks, peers
from ..measure import Case, Plan, Row, Sample, against, in_turns, load, row

__all__ = ["ALL_KEPT", "CASES", "IN_MEMORY", "IN_SQL", "KEPT", "SQLITE", "UNSYNCED"]

LEVELS: Final = (1, 10, 50)
STEPS: Final = (1, 3, 10)
SLOW: Final = 2.0  # ms that a sync takes more: a disk of a cloud, or a cheap one
WORST: Final = 20.0  # a disk that turns, or one that others keep busy
WAITING: Final = 30
BURST: Final = 60
PATIENCE: Final = 25.0  # s; a server gives up on a connection of its pool after 30

MEMORY: Final = {"type": "inMemory"}


# -- arrangements ----------------------------------------------------------------------


def _sqlite(path: Path, parameters: str = "", **options: Any) -> dict[str, Any]:
    url = f"sqlite:{path}?mode=rwc{parameters}"
    return {"type": "sqlite", "databaseUrl": url, "autoMigrate": True, **options}


def _apart(folder: Path, **options: Any) -> dict[str, Any]:
    """Two files, so two commits at a time."""
    return {
        "metadata": _sqlite(folder / "runs.db", **options),
        "journal": _sqlite(folder / "journal.db", **options),
    }


Arrangement = Callable[[Path], dict[str, Any]]

IN_MEMORY: Final = "in memory"
SQLITE: Final = "sqlite"
IN_SQL: Final = "sqlite::memory:"
TMPFS: Final = "sqlite on tmpfs"
ONE: Final = "sqlite, 1 connection"
MANY: Final = "sqlite, 100 connections"
SHARED: Final = "sqlite, shared cache, 100 connections"
APART: Final = "sqlite, journal apart"
APART_ONE: Final = "sqlite, journal apart, 1 connection"
BLOBS: Final = "sqlite, blobs in files"
JOURNAL_IN_MEMORY: Final = "sqlite, journal in memory"
JOURNAL_IN_SQL: Final = "in memory, journal in sqlite"
UNSYNCED: Final = "sqlite, nothing synced"

STORES: Final[Mapping[str, Arrangement]] = {
    IN_MEMORY: lambda _: MEMORY,
    SQLITE: lambda folder: _sqlite(folder / "runs.db"),
    ONE: lambda folder: _sqlite(folder / "runs.db", maxConnections=1),
    "sqlite, 2 connections": lambda folder: _sqlite(
        folder / "runs.db", maxConnections=2
    ),
    "sqlite, 32 connections": lambda folder: _sqlite(
        folder / "runs.db", maxConnections=32
    ),
    MANY: lambda folder: _sqlite(folder / "runs.db", maxConnections=100),
    "sqlite, shared cache": lambda folder: _sqlite(folder / "runs.db", "&cache=shared"),
    SHARED: lambda folder: _sqlite(
        folder / "runs.db", "&cache=shared", maxConnections=100
    ),
    APART: _apart,
    APART_ONE: partial(_apart, maxConnections=1),
    BLOBS: lambda folder: {
        "metadata": _sqlite(folder / "runs.db"),
        "blobs": {"type": "filesystem", "directory": str(folder / "blobs")},
    },
    JOURNAL_IN_MEMORY: lambda folder: {
        "metadata": _sqlite(folder / "runs.db"),
        "journal": MEMORY,
    },
    JOURNAL_IN_SQL: lambda folder: {
        "metadata": MEMORY,
        "journal": _sqlite(folder / "journal.db"),
    },
    TMPFS: lambda folder: _sqlite(folder / "runs.db"),
    IN_SQL: lambda _: {"type": "sqlite", "databaseUrl": "sqlite::memory:"},
}


# What is left when the server is killed, and when the machine stops. Found out by experiment:
# docs/durability.md tells how.
ALL_KEPT: Final = ("all", "all")
NOTHING: Final = ("nothing", "nothing")
KEPT: Final[Mapping[str, tuple[str, str]]] = {
    IN_MEMORY: NOTHING,
    IN_SQL: NOTHING,
    JOURNAL_IN_SQL: NOTHING,
    BLOBS: ("all", "finished runs; of the others, those whose blobs reached the disk"),
    JOURNAL_IN_MEMORY: ("finished runs; the others fail",) * 2,
    TMPFS: ("all", "nothing"),
    UNSYNCED: ("all", "what reached the disk by chance; the file can be damaged"),
}


@contextmanager
def _options(
    arrangement: Arrangement, where: Path | None = None, **options: Any
) -> Iterator[dict[str, Any]]:
    """What a runtime with such a store is started with; its files go afterwards."""
    with TemporaryDirectory(dir=where) as folder:
        storage = arrangement(Path(folder))
        yield {"config_path": {**peers.CONFIG, "storageConfig": storage}, **options}


def _side(stack: ExitStack, arrangement: Arrangement, **options: Any) -> peers.Load:
    started = stack.enter_context(_options(arrangement, **options))
    return stack.enter_context(peers.in_lane("asyncio", partial(peers.ours, **started)))


@contextmanager
def _runtime(
    arrangement: Arrangement, **options: Any
) -> Iterator[tuple[BlockingPortal, StepflowRuntime]]:
    with ExitStack() as stack:
        portal = stack.enter_context(peers.lane("asyncio"))
        started = stack.enter_context(_options(arrangement, **options))
        block = StepflowRuntime.start(log_config=peers.QUIET, **started)
        yield portal, stack.enter_context(portal.wrap_async_context_manager(block))


# -- runs ------------------------------------------------------------------------------


def stores(plan: Plan) -> list[Row]:
    """Runs per second, all arrangements turn by turn; what a run of more steps takes."""
    rows = [row("stores, a sync", "this disk", "ms", [disks.sync_time()])]
    with ExitStack() as stack:
        sides = {
            name: _side(stack, arrangement, where=_where(name))
            for name, arrangement in STORES.items()
            if name != TMPFS or disks.MEMORY.is_dir()
        }
        if disks.can_pretend():
            sides[UNSYNCED] = _side(stack, STORES[SQLITE], env=disks.never())
        rows += _levels("stores", sides, plan)
    return [*rows, *_steps(plan)]


def _where(name: str) -> Path | None:
    return disks.MEMORY if name == TMPFS else None


def _levels(case: str, sides: Mapping[str, peers.Load], plan: Plan) -> list[Row]:
    """Each beside the plain file, and that beside memory."""
    rows: list[Row] = []
    for level in LEVELS:
        at_level = {
            name: partial(side, level, plan.seconds) for name, side in sides.items()
        }
        found = in_turns(at_level, plan.rounds_of_growth)
        rows += [
            row(f"{case} at {level}", name, "runs/s", samples, *_beside(found, name))
            for name, samples in found.items()
        ]
    return rows


def _beside(found: Mapping[str, Sequence[Sample]], name: str) -> Iterator[Any]:
    other = IN_MEMORY if name == SQLITE else SQLITE
    if other in found and name != IN_MEMORY:
        yield against(found, name, other)


def _steps(plan: Plan) -> list[Row]:
    """One run at a time."""
    rows: list[Row] = []
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(_runtime(STORES[name]))
            for name in (IN_MEMORY, SQLITE)
        }
        for steps in STEPS:
            found = in_turns(
                {
                    name: partial(portal.call, _run_of, runtime, steps, plan.seconds)
                    for name, (portal, runtime) in servers.items()
                },
                plan.rounds_of_growth,
            )
            rows += [
                row("stores, by steps", name, "ms a run", samples, x=steps)
                for name, samples in found.items()
            ]
    return rows


async def _run_of(runtime: StepflowRuntime, steps: int, seconds: float) -> Sample:
    run = partial(runtime.run, _chain(steps), peers.INPUT)
    return Sample((await load(run, 1, seconds)).also["p50 ms"])


def _chain(steps: int) -> dict[str, Any]:
    """A workflow whose steps each wait for the one before."""
    sources = [{"$input": "$"}, *({"$step": f"s{n}"} for n in range(steps - 1))]
    return {
        "name": f"chain of {steps}",
        "steps": [
            {"id": f"s{number}", "component": "/noop", "input": source}
            for number, source in enumerate(sources)
        ],
        "output": {"$step": f"s{steps - 1}"},
    }


# -- many at once ----------------------------------------------------------------------


def bulk(plan: Plan) -> list[Row]:
    """A batch and ``run_many``, from the call to the last result."""
    rows: list[Row] = []
    inputs = [{"n": number} for number in range(plan.batch_stored)]
    ways: dict[str, Callable[..., Awaitable[int]]] = {
        "batch": _batch,
        "run_many": _run_many,
    }
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(_runtime(STORES[name]))
            for name in (IN_MEMORY, SQLITE, SHARED, APART)
        }
        for way, make in ways.items():
            found = in_turns(
                {
                    name: partial(portal.call, _bulk, make, runtime, inputs)
                    for name, (portal, runtime) in servers.items()
                },
                plan.rounds_of_growth,
                warm=False,
            )
            rows += [
                row(
                    f"stores, {way} of {plan.batch_stored:,}",
                    name,
                    "items/s",
                    samples,
                    *_beside(found, name),
                )
                for name, samples in found.items()
            ]
    return rows


async def _bulk(
    make: Callable[..., Awaitable[int]], runtime: StepflowRuntime, inputs: list[Any]
) -> Sample:
    flow_id = await runtime.store_flow(peers.FLOW)
    began = time.perf_counter()
    assert await make(runtime, flow_id, inputs) == len(inputs)
    took = time.perf_counter() - began
    return Sample(len(inputs) / took, {"ms": 1e3 * took})


async def _batch(runtime: StepflowRuntime, flow_id: FlowId, inputs: list[Any]) -> int:
    batch_id = await runtime.submit_batch(flow_id, inputs)
    _, results = await runtime.get_batch(batch_id)
    return sum(
        result.output == given for result, given in zip(results, inputs, strict=True)
    )


async def _run_many(
    runtime: StepflowRuntime, flow_id: FlowId, inputs: list[Any]
) -> int:
    return sum(
        [
            result.output == inputs[index]
            async for index, result in runtime.run_many(flow_id, inputs)
        ]
    )


# -- slow disks ------------------------------------------------------------------------


def slow(plan: Plan) -> list[Row]:
    """The same on a disk that takes longer for a sync, and what a server says on a bad one."""
    if not disks.can_pretend():
        return []
    with ExitStack() as stack:
        sides = {
            name: _side(stack, STORES[name], env=disks.late(SLOW))
            for name in (SQLITE, ONE, MANY, SHARED, APART)
        }
        rows = _levels("stores, slow disk", sides, plan)
    if plan.slow_syncs:
        rows += _failures(plan)
    return rows


def _failures(plan: Plan) -> list[Row]:
    """What becomes of runs that a store cannot serve one after the other."""
    flows = {
        f"stores, sub-flows at {BURST}": (_mapping(), BURST, BURST, 0.0),
        f"stores, bad disk at {WAITING}": (peers.FLOW, plan.slow_syncs, WAITING, WORST),
    }
    rows: list[Row] = []
    for case, (flow, count, at_once, late) in flows.items():
        for name in (SQLITE, ONE, MANY, SHARED):
            with _runtime(STORES[name], env=disks.late(late)) as (portal, runtime):
                failed = portal.call(_count_failed, runtime, flow, count, at_once)
            rows.append(row(case, name, "% failed", [failed]))
    return rows


def _mapping() -> dict[str, Any]:
    """A run that makes another one: the smallest sub-flow."""
    over = {"workflow": {"$literal": peers.FLOW}, "items": [{"$input": "$"}]}
    return {
        "name": "map",
        "steps": [{"id": "a", "component": "/map", "input": over}],
        "output": {"$step": "a"},
    }


async def _count_failed(
    runtime: StepflowRuntime, flow: dict[str, Any], count: int, at_once: int
) -> Sample:
    """Each waits its turn, or is refused, or is not heard of for too long."""
    flow_id = await runtime.store_flow(flow)
    numbers, failed, longest = iter(range(count)), 0, 0.0

    async def work() -> None:
        nonlocal failed, longest
        for _ in numbers:
            began = time.perf_counter()
            try:
                (await runtime.run(flow_id, peers.INPUT, timeout=PATIENCE)).unwrap()
            except StepflowError:
                failed += 1
            longest = max(longest, time.perf_counter() - began)

    async with anyio.create_task_group() as tasks:
        for _ in range(at_once):
            tasks.start_soon(work)
    return Sample(100 * failed / count, {"longest, s": longest})


CASES: Final = (
    Case("stores", "the server's stores, in memory and in files", stores),
    Case("stores-bulk", "a batch and run_many, by store", bulk),
    Case("stores-slow", "stores on disks that sync slowly", slow),
)
