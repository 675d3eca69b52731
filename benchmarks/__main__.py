"""``python -m benchmarks``: how we compare with the bare binary and the official client.

Prints ratios, measured side by side in one process, turn by turn. Needs the extra
``test`` (for ``stepflow-py``). More cases come with the work on speed.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import anyio

from stepflow_runtime import LogConfig, RestartPolicy, RuntimeState, StepflowRuntime
from stepflow_runtime.server import restart
from stepflow_runtime.server.binary import find_binary

ROUNDS = 15
RUNS = 2000
FLOW = {
    "name": "echo",
    "description": "Returns its input",
    "steps": [{"id": "a", "component": "/noop", "input": {"$input": "$"}}],
    "output": {"$step": "a"},
}
WORKER = Path("docs/examples/python_worker/stepflow-config.yml")
QUIET = LogConfig(level="error")


def bare_start() -> float:
    """Seconds from spawning the binary by hand to its port line."""
    began = time.perf_counter()
    arguments = ["--port", "0", "--log-level", "error"]
    with subprocess.Popen(
        [find_binary(None, {}), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as server:
        assert server.stdout is not None
        while not server.stdout.readline().startswith(b'{"port"'):
            pass
        took = time.perf_counter() - began
        server.kill()
    return took


async def our_start() -> tuple[float, float]:
    """Seconds from start() to READY, and from leaving the block to its end."""
    began = time.perf_counter()
    async with StepflowRuntime.start(log_config=QUIET):
        ready = time.perf_counter()
    return ready - began, time.perf_counter() - ready


async def our_start_hosted() -> tuple[float, float]:
    """The same in a background thread."""
    began = time.perf_counter()
    runtime = await StepflowRuntime.start_async(log_config=QUIET)
    ready = time.perf_counter()
    await runtime.stop_async()
    return ready - began, time.perf_counter() - ready


async def our_stop_with_worker() -> float:
    """Seconds from leaving the block to its end, with a connected Python worker."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    async with StepflowRuntime.start(WORKER, env={"PATH": path}):
        began = time.perf_counter()
    return time.perf_counter() - began


async def our_recovery() -> list[float]:
    """Seconds from kill -9 of the server to READY."""
    took = []
    async with StepflowRuntime.start(
        restart_policy=RestartPolicy.ALWAYS, log_config=QUIET
    ) as runtime:
        for restarts in range(ROUNDS):
            await anyio.sleep(0.05)
            assert runtime.pid is not None
            began = time.perf_counter()
            os.kill(runtime.pid, signal.SIGKILL)
            async for change in runtime.state_changes():
                if change.restarts > restarts and change.state is RuntimeState.READY:
                    break
            took.append(time.perf_counter() - began)
    return took


async def rate(run: Callable[[dict[str, int]], Awaitable[Any]], at_once: int) -> float:
    """Runs per second, with so many under way at a time."""

    async def work() -> None:
        for number in range(RUNS // at_once):
            await run({"n": number})

    began = time.perf_counter()
    async with anyio.create_task_group() as tasks:
        for _ in range(at_once):
            tasks.start_soon(work)
    return RUNS / (time.perf_counter() - began)


async def compare_rates() -> None:
    from stepflow_py import StepflowClient

    async with StepflowRuntime.start(log_config=QUIET) as runtime:
        client = StepflowClient.connect(f"127.0.0.1:{runtime.port}")
        flow_id = (await client.store_flow(FLOW)).flow_id
        ours = partial(runtime.run, FLOW)
        other = await StepflowRuntime.start_async(log_config=QUIET)
        in_thread = partial(other.run, FLOW)
        official = partial(client.run, flow_id)
        for at_once in (1, 10, 50, 200):
            rates = [
                (
                    await rate(ours, at_once),
                    await rate(in_thread, at_once),
                    await rate(official, at_once),
                )
                for _ in range(5)
            ]
            mine, hosted, theirs = (
                statistics.median(side) for side in zip(*rates, strict=True)
            )
            print(
                f"run(), {at_once:>3} at a time: {mine:6.0f} runs/s (runtime in a thread: "
                f"{hosted:6.0f}), official client {theirs:6.0f}: {mine / theirs:.2f} x"
            )
        await client.close()
        await other.stop_async()


async def compare_starts(
    name: str, our_start: Callable[[], Awaitable[tuple[float, float]]]
) -> None:
    bare, starts, stops = [], [], []
    for _ in range(ROUNDS):
        bare.append(await anyio.to_thread.run_sync(bare_start))
        start, stop = await our_start()
        starts.append(start)
        stops.append(stop)
    mine, theirs = statistics.median(starts), statistics.median(bare)
    print(
        f"start to READY, {name}: {mine * 1e3:.1f} ms, bare binary's port line "
        f"{theirs * 1e3:.1f} ms: {mine / theirs:.2f} x; stop {statistics.median(stops) * 1e3:.1f} ms"
    )


async def print_repairs() -> None:
    stops = [await our_stop_with_worker() for _ in range(3)]
    print(f"stop with a Python worker: {statistics.median(stops) * 1e3:.0f} ms")
    # Each kill the first of its series, as after a minute of peace.
    with patch.object(restart, "FRESH_AFTER", 0.0):
        took = await our_recovery()
    print(
        f"kill -9 of the server to READY: {statistics.median(took) * 1e3:.0f} ms, at most "
        f"{max(took) * 1e3:.0f} ms"
    )


def main() -> None:
    for backend in ("asyncio", "trio"):
        anyio.run(compare_starts, backend, our_start, backend=backend)
    anyio.run(compare_starts, "in a thread", our_start_hosted)
    anyio.run(print_repairs)
    anyio.run(compare_rates)


if __name__ == "__main__":
    main()
