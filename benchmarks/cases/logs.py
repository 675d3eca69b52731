"""The log path, from the server's pipe to the ring and the logger.

In the place of the server there is a script: it starts as a server does, and on SIGUSR1
becomes ``cat``, which writes a real server's lines as fast as they are taken. The clock stops when
the runtime tells of its end, since everything that was written has been taken in by then.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Final

import anyio

from stepflow_runtime import LogConfig, RuntimeState, StepflowRuntime

from .. import peers
from ..measure import Case, Plan, Row, Sample, against, alone, in_turns, quantile, row

__all__ = ["CASES"]

LOGGER: Final = "benchmark.lines"

FLOODING_SERVER: Final = """#!{python} -S
import json, os, signal, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Health(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = b'{{"status":"healthy","timestamp":"2026-01-01T00:00:00Z"}}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

signal.signal(signal.SIGUSR1, lambda *_: os.execvp("cat", ["cat", {lines!r}]))
port = int(sys.argv[sys.argv.index("--port") + 1])
server = HTTPServer(("127.0.0.1", port), Health)
print(json.dumps({{"port": server.server_port}}), flush=True)
server.serve_forever()
"""


async def _write_real_lines(path: Path) -> None:
    """Have a server write what it logs of 200 runs into a file."""
    config = LogConfig(capture=False, file_path=path)
    async with StepflowRuntime.start(log_config=config) as runtime:
        for number in range(200):
            await runtime.run(peers.FLOW, number)


def _repeat(source: Path, target: Path, *, lines: int = 0, size: int = 0) -> int:
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


def _flooding_server(directory: Path, lines: Path) -> Path:
    path = directory / "server"
    path.write_text(FLOODING_SERVER.format(python=sys.executable, lines=str(lines)))
    path.chmod(0o755)
    return path


async def _flood(server: Path, waits: list[float] | None) -> float:
    """Seconds from the first line to the end of all; and what another task waited."""

    async def tick() -> None:
        assert waits is not None
        while True:
            began = time.perf_counter()
            await anyio.sleep(0.001)
            waits.append(time.perf_counter() - began - 0.001)

    config = LogConfig(python_logger=LOGGER)
    async with StepflowRuntime.start(binary=server, log_config=config) as runtime:
        assert runtime.pid is not None
        async with anyio.create_task_group() as tasks:
            if waits is not None:
                tasks.start_soon(tick)
            began = time.perf_counter()
            os.kill(runtime.pid, signal.SIGUSR1)
            async for change in runtime.state_changes():
                if change.state is RuntimeState.FAILED:
                    break
            took = time.perf_counter() - began
            tasks.cancel_scope.cancel()
        return took


def _ours(server: Path, count: int, level: int) -> Sample:
    """Lines per second, with a logger that takes them or does not."""
    logging.getLogger(LOGGER).setLevel(level)
    return Sample(count / anyio.run(_flood, server, None))


def _by_hand(lines: Path, count: int) -> Sample:
    """The loop that everybody would write."""
    logger = logging.getLogger(LOGGER)
    logger.setLevel(logging.INFO)
    levels = {"TRACE": 5, "DEBUG": 10, "INFO": 20, "WARN": 30, "ERROR": 40}
    began = time.perf_counter()
    with subprocess.Popen(["cat", lines], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            fields = json.loads(line)
            datetime.fromisoformat(fields["timestamp"])
            logger.log(levels[fields["level"]], fields["message"])
    return Sample(count / (time.perf_counter() - began))


@contextmanager
def _directory() -> Iterator[tuple[Path, Path]]:
    """A directory, and a file in it with a real server's lines; with a cheap handler."""
    logger = logging.getLogger(LOGGER)
    logger.propagate = False
    logger.handlers[:] = [logging.NullHandler()]
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "source"
        anyio.run(_write_real_lines, source)
        yield Path(name), source


def logs(plan: Plan) -> list[Row]:
    with _directory() as (directory, source):
        lines = directory / "lines"
        count = _repeat(source, lines, lines=plan.log_lines)
        server = _flooding_server(directory, lines)
        quiet, taken, by_hand = (
            "ours, logger disabled",
            "ours, logger enabled",
            "by hand",
        )
        found = in_turns(
            {
                quiet: partial(_ours, server, count, logging.WARNING),
                taken: partial(_ours, server, count, logging.INFO),
                by_hand: partial(_by_hand, lines, count),
            },
            plan.rounds,
        )
        _repeat(source, lines, size=plan.log_flood)
        latencies = [_latency_row(backend, server) for backend in ("asyncio", "trio")]
    values = [each.value for each in found[quiet]]
    return [
        row("logs", quiet, "lines/s", found[quiet], alone(values, "at least", 100_000)),
        row(
            "logs",
            taken,
            "lines/s",
            found[taken],
            against(found, taken, by_hand, "at least", 3.0),
        ),
        row(
            "logs",
            by_hand,
            "lines/s",
            found[by_hand],
            note="json.loads, datetime.fromisoformat, logger.log",
        ),
        *latencies,
    ]


def _latency_row(backend: str, server: Path) -> Row:
    """What another task waits meanwhile, with the logger enabled."""
    logging.getLogger(LOGGER).setLevel(logging.INFO)
    waits: list[float] = []
    anyio.run(_flood, server, waits, backend=backend)
    latency = 1e3 * quantile(waits, 0.99)
    also = {"p50 ms": 1e3 * quantile(waits, 0.5), "most ms": 1e3 * max(waits)}
    return row(
        "logs, another task's waits",
        f"ours, {backend}",
        "ms at p99",
        [Sample(latency, also)],
        alone([latency], "at most", 20),
    )


# -- a loop that is held up ------------------------------------------------------------


async def _completed(seconds: float, wait: Callable[[float], None] | None) -> int:
    """How many items of a batch are completed after a time, held up or not."""
    async with StepflowRuntime.start() as runtime:
        await runtime.run(peers.FLOW, 0)
        batch = await runtime.submit_batch(peers.FLOW, range(int(8000 * seconds)))
        if wait is None:
            await anyio.sleep(seconds)
        else:
            wait(seconds)
        return (await runtime.get_run(batch)).items.completed


def _work(seconds: float) -> None:
    """Hold up the event loop with Python code."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        sum(range(1000))


def blocked(plan: Plan) -> list[Row]:
    free, held_up = "ours, loop free", "ours, loop held up"
    sides = {
        held_up: lambda: Sample(anyio.run(_completed, plan.blocked, _work)),
        free: lambda: Sample(anyio.run(_completed, plan.blocked, None)),
    }
    found = in_turns(sides, 1, warm=False)
    unit = f"items in {plan.blocked:g} s"
    return [
        row("blocked", held_up, unit, found[held_up], against(found, held_up, free)),
        row("blocked", free, unit, found[free]),
    ]


CASES: Final = (
    Case("logs", "log lines, from the pipe to the ring and the logger", logs),
    Case("blocked", "a batch at info while the program's own code runs", blocked),
)
