"""Runs through one server and through several, and what a client of several costs.

On one machine servers, their clients and the store share the cores, so more servers cannot be
expected to do more than one that has all of them. What they would do on machines of
their own follows from what a run costs whom: a server on k cores does at most
k / (its processor time for a run) runs per second, a Python process at most 1 / (its
own), and all servers together no more than what their store commits.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import psutil

from .. import peers
from ..measure import (
    CPU,
    Case,
    Plan,
    Row,
    Sample,
    against,
    in_turns,
    row,
    spread,
)

__all__ = ["CASES"]

NUMBERS: Final = (1, 2, 3)
AT_ONCE: Final = 50

# Of all servers together, for a run.
SERVERS_CPU: Final = "servers' CPU µs"

# Nobody listens there.
DEAD: Final = "http://127.0.0.1:1"

IN_MEMORY: Final = (
    "on cores of their own: {each:,.0f} runs/s for each core of a server, {caller:,.0f} for "
    "each Python process"
)
ON_ONE_STORE: Final = (
    "it has one writer at a time, so more servers do no more; a Python process could ask "
    "for {caller:,.0f} runs/s"
)


def through_servers(plan: Plan) -> list[Row]:
    return [
        *_rows("servers, in memory", _in_memory, IN_MEMORY, plan),
        *_rows("servers, one sqlite store", _on_one_store, ON_ONE_STORE, plan),
    ]


def of_several(plan: Plan) -> list[Row]:
    """The same server by the address, by a list, and by one that begins with a dead one."""
    with ExitStack() as stack:
        port, _ = stack.enter_context(peers.bare_server())
        url = f"http://127.0.0.1:{port}"
        urls: dict[str, str | list[str]] = {
            "one url": url,
            "a list": [url, DEAD],
            "a list, the first dead": [DEAD, url],
        }
        lanes = {
            name: stack.enter_context(
                peers.in_lane("asyncio", partial(peers.clients, each))
            )
            for name, each in urls.items()
        }
        found = in_turns(
            {name: partial(lane, 1, plan.seconds) for name, lane in lanes.items()},
            plan.rounds,
        )
    return [
        row(
            "client of several",
            name,
            "runs/s",
            samples,
            *([against(found, name, "one url")] if name != "one url" else []),
        )
        for name, samples in found.items()
    ]


Started = Sequence[tuple[int, int]]


def _rows(
    case: str, start: Callable[[ExitStack, int], Started], note: str, plan: Plan
) -> list[Row]:
    with ExitStack() as stack:
        sides: dict[str, Callable[[], Sample]] = {}
        for number in NUMBERS:
            servers = start(stack, number)
            for name, load in _loads(stack, servers):
                side = partial(_with_servers_cost, servers, load, plan.seconds)
                sides[f"{name}, {number}"] = side
        found = in_turns(sides, plan.rounds)
    return [
        row(
            case,
            name,
            "runs/s",
            samples,
            *_beside_one(found, name),
            note=_noted(note, samples) if name.startswith("ours") else "",
        )
        for name, samples in found.items()
    ]


def _beside_one(found: Mapping[str, Sequence[Sample]], name: str) -> Iterator[Any]:
    alone = f"{name.partition(',')[0]}, 1"
    if name != alone:
        yield against(found, name, alone)


def _noted(note: str, samples: Sequence[Sample]) -> str:
    servers, caller = (
        spread(each.also[of] for each in samples).median for of in (SERVERS_CPU, CPU)
    )
    return note.format(each=1e6 / servers, caller=1e6 / caller)


def _loads(stack: ExitStack, servers: Started) -> Iterator[tuple[str, peers.Load]]:
    """The load comes from this process, or from wrk: the least that a caller can cost."""
    urls = [f"http://127.0.0.1:{port}" for port, _ in servers]
    yield (
        "ours",
        stack.enter_context(
            peers.in_lane("asyncio", partial(peers.clients, *urls)),
        ),
    )
    if peers.has_wrk():
        yield "wrk", partial(_wrks, [(port, peers.store(port)) for port, _ in servers])


def _wrks(servers: Sequence[tuple[int, str]], at_once: int, seconds: float) -> Sample:
    """One for each server, all at the same time."""
    with ThreadPoolExecutor(len(servers)) as threads:
        each = at_once // len(servers)
        samples = [
            threads.submit(peers.wrk, port, flow_id, each, seconds)
            for port, flow_id in servers
        ]
        return Sample(sum(done.result().value for done in samples))


def _with_servers_cost(servers: Started, load: peers.Load, seconds: float) -> Sample:
    processes = [psutil.Process(pid) for _, pid in servers]
    before = sum(map(_cpu_seconds, processes))
    began = time.perf_counter()
    sample = load(AT_ONCE, seconds)
    runs = sample.value * (time.perf_counter() - began)
    cost = sum(map(_cpu_seconds, processes)) - before
    if CPU not in sample.also:  # wrk's own time is not measured
        return sample
    return Sample(sample.value, {**sample.also, SERVERS_CPU: 1e6 * cost / runs})


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _in_memory(stack: ExitStack, number: int) -> Started:
    return [stack.enter_context(peers.bare_server()) for _ in range(number)]


def _on_one_store(stack: ExitStack, number: int) -> Started:
    config = stack.enter_context(_on_disk())
    return [
        stack.enter_context(
            peers.bare_server(config=config, identity=f"server-{index}")
        )
        for index in range(number)
    ]


@contextmanager
def _on_disk() -> Iterator[dict[str, Any]]:
    """A store on disk; without a lease manager a server must look for no other's runs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "runs.db"
        yield {
            **peers.CONFIG,
            "storageConfig": {
                "type": "sqlite",
                "databaseUrl": f"sqlite:{path}?mode=rwc",
                "autoMigrate": True,
            },
            "recovery": {"enabled": False},
        }


CASES: Final = (
    Case("servers", "runs per second through 1, 2 and 3 servers", through_servers),
    Case("client-of-several", "what a list of servers costs a client", of_several),
)
