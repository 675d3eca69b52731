"""``python -m benchmarks.logs``: the log path, from the pipe to the ring and the logger.

The lines are a real server's, of its startup and of runs. Ratios are measured turn by turn;
every measurement reads the same lines through a pipe that another process fills.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path

import anyio

from stepflow_runtime import LogConfig, StepflowRuntime
from stepflow_runtime.logs.pump import Pump
from stepflow_runtime.logs.sinks import LogHub
from stepflow_runtime.server.platform.linux import _widened
from stepflow_runtime.server.platform.posix import Bell, Pipe

FLOW = {
    "steps": [{"id": "a", "component": "/noop", "input": {"$input": "$"}}],
    "output": {"$step": "a"},
}
ROUNDS = 7
LINES = 200_000
FLOOD = 100_000_000
BATCH = 30_000
BLOCKED = 5.0


class Nothing(logging.Handler):
    """The cheapest handler there is."""

    def emit(self, record: logging.LogRecord) -> None:
        pass


async def real_lines(path: Path) -> None:
    """Have a server write what it logs of 200 runs into a file."""
    config = LogConfig(capture=False, file_path=path)
    async with StepflowRuntime.start(log_config=config) as runtime:
        for number in range(200):
            await runtime.run(FLOW, number)


def repeated(source: Path, target: Path, *, lines: int = 0, size: int = 0) -> int:
    """Write the lines again and again, until there are so many; return how many."""
    original = source.read_bytes().splitlines(keepends=True)
    count = written = 0
    with target.open("wb") as file:
        while count < lines or written < size:
            line = original[count % len(original)]
            file.write(line)
            count += 1
            written += len(line)
    return count


@contextmanager
def piped(path: Path) -> Iterator[int]:
    """The reading end of a pipe that another process fills with a file."""
    reading, writing = os.pipe()
    _widened(reading)
    with subprocess.Popen(["cat", path], stdout=writing):
        os.close(writing)
        yield reading


def ours(path: Path, *, with_ticks: str | None = None) -> tuple[float, list[float]]:
    """Seconds from the pipe to the ring (and logger); and what another task waited."""
    hub = LogHub(LogConfig(python_logger="benchmark"))
    waits: list[float] = []

    async def tick() -> None:
        while True:
            began = time.perf_counter()
            await anyio.sleep(0.001)
            waits.append(time.perf_counter() - began - 0.001)

    async def measure() -> float:
        async with anyio.create_task_group() as tasks:
            if with_ticks is not None:
                tasks.start_soon(tick)
            began = time.perf_counter()
            pump.start()
            await pump.wait()
            took = time.perf_counter() - began
            tasks.cancel_scope.cancel()
        return took

    with piped(path) as reading:
        pipe = Pipe(os.fdopen(reading, "rb", buffering=0), Bell(), 1024 * 1024)
        pump = Pump(pipe, partial(hub.take, "stdout"))
        took = anyio.run(measure, backend=with_ticks or "asyncio")
        pipe.close()
    return took, waits


def naive(path: Path) -> float:
    """Seconds of the loop that everybody would write."""
    logger = logging.getLogger("benchmark")
    levels = {"TRACE": 5, "DEBUG": 10, "INFO": 20, "WARN": 30, "ERROR": 40}
    with piped(path) as reading, os.fdopen(reading, "rb") as lines:
        began = time.perf_counter()
        for line in lines:
            fields = json.loads(line)
            datetime.fromisoformat(fields["timestamp"])
            logger.log(levels[fields["level"]], fields["message"])
        return time.perf_counter() - began


def compare(path: Path, count: int) -> None:
    logger = logging.getLogger("benchmark")
    logger.propagate = False
    logger.handlers[:] = [Nothing()]

    logger.setLevel(logging.WARNING)
    rates = sorted(count / ours(path)[0] for _ in range(ROUNDS))
    print_rate("logger disabled for the level", rates, "promise: 100,000")

    logger.setLevel(logging.INFO)
    ratios, own, other = [], [], []
    for _ in range(ROUNDS):
        own.append(count / ours(path)[0])
        other.append(count / naive(path))
        ratios.append(own[-1] / other[-1])
    print_rate("logger enabled", sorted(own), "")
    print_rate("json.loads, fromisoformat, logger.log", sorted(other), "")
    print(
        f"{'ratio':<40} {statistics.median(ratios):>10.2f} x       "
        f"({min(ratios):.2f} to {max(ratios):.2f})  promise: 3"
    )


def print_rate(what: str, rates: list[float], note: str) -> None:
    print(
        f"{what:<40} {statistics.median(rates):>10,.0f} lines/s "
        f"({rates[0]:,.0f} to {rates[-1]:,.0f})  {note}"
    )


def print_latencies(path: Path) -> None:
    """What other tasks wait while 100 MB come in, with the logger enabled."""
    for backend in ("asyncio", "trio"):
        took, waits = ours(path, with_ticks=backend)
        waits.sort()
        print(
            f"another task meanwhile, {backend:<16} {1e3 * quantile(waits, 0.5):>10.2f} ms "
            f"at p50, {1e3 * quantile(waits, 0.99):.2f} at p99, {1e3 * waits[-1]:.2f} at "
            f"most; {took:.1f} s in all  promise: 20 at p99"
        )


def quantile(ordered: list[float], part: float) -> float:
    return ordered[min(int(len(ordered) * part), len(ordered) - 1)]


async def completed_in(seconds: float, wait: Callable[[float], None] | None) -> int:
    """How many items of a batch are completed after a time, blocked or not."""
    async with StepflowRuntime.start() as runtime:
        await runtime.run(FLOW, 0)
        batch = await runtime.submit_batch(FLOW, range(BATCH))
        if wait is None:
            await anyio.sleep(seconds)
        else:
            wait(seconds)
        return (await runtime.get_run(batch)).items.completed


def work(seconds: float) -> None:
    """Hold up the event loop with Python code."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        sum(range(1000))


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        source, path = Path(directory) / "source", Path(directory) / "lines"
        anyio.run(real_lines, source)
        compare(path, repeated(source, path, lines=LINES))
        repeated(source, path, size=FLOOD)
        print_latencies(path)
    free = anyio.run(completed_in, BLOCKED, None)
    blocked = anyio.run(completed_in, BLOCKED, work)
    print(
        f"a batch of {BATCH:,} while the event loop is blocked for {BLOCKED:g} s: "
        f"{blocked:,} items completed; not blocked: {free:,}"
    )


if __name__ == "__main__":
    main()
