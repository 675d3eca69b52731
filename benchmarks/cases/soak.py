"""Very many runs: what grows in this process, and what becomes slower.

In a process of its own, where no other case has left anything.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from array import array
from typing import Any, Final

import anyio
import psutil

from stepflow_runtime import StepflowRuntime

from .. import peers
from ..measure import Case, Plan, Row, Sample, alone, quantile, row

__all__ = ["CASES", "main"]

AT_ONCE: Final = 50
WARM_UP: Final = 5_000
HEALTH_INTERVAL: Final = 0.5
SERVER_NOTE: Final = (
    "the server's own store grows by what it keeps of each run: see growth"
)


def soak(plan: Plan) -> list[Row]:
    script = f"from {__name__} import main; main({plan.soak})"
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, check=True
    )
    found = json.loads(done.stdout)
    case = f"soak, {plan.soak:,} runs"
    return [
        _row(case, "RSS of this process", "MB grown", found["rss"], 5),
        _row(case, "descriptors", "more", found["descriptors"], 0),
        _row(case, "p99, last tenth beside first", "x", found["drift"], 1.2),
        row(case, "runs", "runs/s", [Sample(found["rate"])]),
        row(
            case,
            "RSS of the server",
            "MB grown",
            [Sample(found["server"])],
            note=SERVER_NOTE,
        ),
    ]


def _row(case: str, side: str, unit: str, value: float, most: float) -> Row:
    return row(case, side, unit, [Sample(value)], alone([value], "at most", most))


async def _soak(runs: int) -> dict[str, Any]:
    # Touched here, so that it is no growth.
    latencies = array("d", [1.0]) * runs
    async with StepflowRuntime.start(
        log_config=peers.QUIET, health_interval=HEALTH_INTERVAL
    ) as runtime:
        await _run(runtime, array("d", [0.0]) * WARM_UP, AT_ONCE)
        # The first health request opens a connection that stays: it counts as there.
        await anyio.sleep(2 * HEALTH_INTERVAL)
        me, server = psutil.Process(), psutil.Process(runtime.pid)
        before = me.memory_info().rss, me.num_fds(), server.memory_info().rss
        began = time.perf_counter()
        await _run(runtime, latencies, AT_ONCE)
        took = time.perf_counter() - began
        after = me.memory_info().rss, me.num_fds(), server.memory_info().rss
    tenth = runs // 10
    first, last = latencies[:tenth], latencies[-tenth:]
    return {
        "rss": (after[0] - before[0]) / 1e6,
        "descriptors": after[1] - before[1],
        "drift": quantile(last, 0.99) / quantile(first, 0.99),
        "rate": runs / took,
        "server": (after[2] - before[2]) / 1e6,
    }


async def _run(runtime: StepflowRuntime, latencies: array[float], at_once: int) -> None:
    """As many runs as there are places, some at a time."""
    numbers = iter(range(len(latencies)))

    async def work() -> None:
        for number in numbers:
            began = time.perf_counter()
            await runtime.run(peers.FLOW, {"n": number})
            latencies[number] = time.perf_counter() - began

    async with anyio.create_task_group() as tasks:
        for _ in range(at_once):
            tasks.start_soon(work)


def main(runs: int) -> None:
    """What the new process does."""
    print(json.dumps(anyio.run(_soak, runs)))


CASES: Final = (Case("soak", "what very many runs leave behind", soak),)
