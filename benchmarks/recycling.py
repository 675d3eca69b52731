"""What recycling costs and brings: ``python -m benchmarks.recycling [RUNS] [BACKEND]``.

The same runs with and without, one after the other: the server's memory, how long calls
waited, and how long each recycle took.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from typing import Any

import anyio
import psutil

from stepflow_runtime import LogConfig, RuntimeState, StepflowRuntime

FLOW = {
    "steps": [{"id": "a", "component": "/noop", "input": {"$input": "$"}}],
    "output": {"$step": "a"},
}
AT_ONCE = 20
MIB = 1024 * 1024


async def measure(runs: int, **options: Any) -> None:
    waits: list[float] = []
    memory: list[int] = []
    recycles: list[float] = []
    values = iter(range(runs))

    async def work(runtime: StepflowRuntime) -> None:
        for value in values:
            began = time.perf_counter()
            result = await runtime.run(FLOW, value)
            waits.append(time.perf_counter() - began)
            assert result.unwrap() == value

    async def watch_memory(runtime: StepflowRuntime) -> None:
        while True:
            if (pid := runtime.pid) is not None:
                memory.append(psutil.Process(pid).memory_info().rss)
            await anyio.sleep(0.05)

    async def watch_recycles(runtime: StepflowRuntime) -> None:
        began = 0.0
        async for change in runtime.state_changes():
            if change.state is RuntimeState.RESTARTING:
                began = time.perf_counter()
            elif began and change.state is RuntimeState.READY:
                recycles.append(time.perf_counter() - began)

    quiet = LogConfig(level="error")
    async with (
        StepflowRuntime.start(log_config=quiet, **options) as runtime,
        anyio.create_task_group() as watchers,
    ):
        watchers.start_soon(watch_memory, runtime)
        watchers.start_soon(watch_recycles, runtime)
        began = time.perf_counter()
        async with anyio.create_task_group() as workers:
            for _ in range(AT_ONCE):
                workers.start_soon(work, runtime)
        seconds = time.perf_counter() - began
        watchers.cancel_scope.cancel()
    waits.sort()
    p50, p99, p999 = (waits[int(len(waits) * q)] * 1000 for q in (0.5, 0.99, 0.999))
    print(f"{options or 'no recycling'}: {runs / seconds:,.0f} runs/s")
    print(
        f"  memory: {memory[0] / MIB:.0f} MiB at first, {max(memory) / MIB:.0f} at most"
    )
    print(
        f"  calls: p50 {p50:.1f} ms, p99 {p99:.1f}, p99.9 {p999:.1f}, "
        f"longest {waits[-1] * 1000:.1f}"
    )
    if recycles:
        recycles.sort()
        middle, last = recycles[len(recycles) // 2] * 1000, recycles[-1] * 1000
        print(f"  {len(recycles)} recycles: p50 {middle:.0f} ms, longest {last:.0f}")


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    for backend in sys.argv[2:] or ["asyncio", "trio"]:
        print(f"{backend}, {runs:,} runs, {AT_ONCE} at once")
        for after in (None, 10_000):
            options = {} if after is None else {"recycle_after_runs": after}
            anyio.run(partial(measure, runs, **options), backend=backend)


if __name__ == "__main__":
    main()
