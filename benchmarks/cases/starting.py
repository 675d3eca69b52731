"""Scripts, imports, starts, stops, and coming back after a crash."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import anyio

from stepflow_runtime import RestartPolicy, RuntimeState, StepflowRuntime

from .. import peers
from ..measure import (
    Case,
    Plan,
    Row,
    Sample,
    against,
    alone,
    in_turns,
    row,
    spread,
    timed,
)

__all__ = ["CASES"]

WORKER: Final = (
    Path(__file__).parents[2] / "docs/examples/python_worker/stepflow-config.yml"
)
BACKENDS: Final = ("asyncio", "trio")

OUR_SCRIPT: Final = """
import {backend}
from stepflow_runtime import LogConfig, StepflowRuntime

async def main():
    async with StepflowRuntime.start(log_config=LogConfig(level="error")) as runtime:
        result = await runtime.run({flow!r}, {{"n": 1}})
        assert result.unwrap() == {{"n": 1}}

{backend}.run({call})
"""
OFFICIAL_SCRIPT: Final = """
import asyncio
from stepflow_orchestrator import OrchestratorConfig, StepflowOrchestrator
from stepflow_py import StepflowClient

async def main():
    config = OrchestratorConfig(config={config!r}, log_level="error")
    async with StepflowOrchestrator.start(config) as orchestrator:
        async with StepflowClient.connect(orchestrator.url) as client:
            flow_id = (await client.store_flow({flow!r})).flow_id
            answer = await client.run(flow_id, {{"n": 1}})
            assert answer.summary.status == 2

asyncio.run(main())
"""
# What nobody can do without: a loop, and a server that comes and goes.
FLOOR_SCRIPT: Final = """
import subprocess
import anyio

async def main():
    server = subprocess.Popen(
        [{binary!r}, "--port", "0", "--log-level", "error"], stdout=subprocess.PIPE
    )
    while not server.stdout.readline().startswith(b'{{"port"'):
        pass
    server.kill()  # a SIGTERM at this moment can be lost
    server.wait()

anyio.run(main, backend={backend!r})
"""
IMPORT: Final = """
import time
began = time.perf_counter()
{statement}
print(time.perf_counter() - began)
"""


def python(script: str) -> str:
    """Run a script in a new interpreter; return what it prints."""
    return subprocess.run(
        [sys.executable, "-c", script],
        env=peers.environment(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout


def cold(plan: Plan) -> list[Row]:
    official = OFFICIAL_SCRIPT.format(config=peers.CONFIG, flow=peers.FLOW)
    scripts = {
        "ours, asyncio": OUR_SCRIPT.format(
            backend="asyncio", call="main()", flow=peers.FLOW
        ),
        "ours, trio": OUR_SCRIPT.format(backend="trio", call="main", flow=peers.FLOW),
        "official": official,
    }
    for backend in BACKENDS:
        scripts[f"floor, {backend}"] = FLOOR_SCRIPT.format(
            binary=str(peers.BINARY), backend=backend
        )
    found = in_turns(
        {name: partial(timed, partial(python, text)) for name, text in scripts.items()},
        plan.starts,
    )
    return [
        *(_cold_row(found, backend) for backend in BACKENDS),
        row("cold", "official", "ms", found["official"]),
        *(
            row("cold", floor, "ms", found[floor], against(found, floor, "official"))
            for floor in (f"floor, {backend}" for backend in BACKENDS)
        ),
    ]


def _cold_row(found: Mapping[str, Sequence[Sample]], backend: str) -> Row:
    side, floor = f"ours, {backend}", f"floor, {backend}"
    share = against(found, floor, "official").measured.median
    least = spread(each.value for each in found[floor]).median
    reason = (
        f"the floor, a script that only starts the loop and the binary and ends them, takes "
        f"{least:.0f} ms, {share:.2f} of the official pair"
    )
    if share > 0.6:
        reason += ": what was promised is below what is possible"
    check = against(found, side, "official", "at most", 0.6, reason)
    return row("cold", side, "ms", found[side], check, against(found, side, floor))


def imports(plan: Plan) -> list[Row]:
    statements = (
        "import stepflow_runtime",
        "from stepflow_runtime import StepflowRuntime",
        # Nothing of it can be left out, however little there is around it.
        "import anyio, httptools, logging, msgspec, subprocess",
        "import stepflow_py",
    )
    found = in_turns(
        {each: partial(_import_time, each) for each in statements}, plan.starts
    )
    *mine, floor, official = statements
    least = spread(each.value for each in found[floor]).median
    reason = f"{least:.0f} ms of it are what it stands on"
    return [
        *(
            row(
                "import",
                each,
                "ms",
                found[each],
                against(found, each, official, "at most", 0.6, reason),
            )
            for each in mine
        ),
        row("import", floor, "ms", found[floor], against(found, floor, official)),
        row("import", official, "ms", found[official]),
    ]


def _import_time(statement: str) -> Sample:
    return Sample(1e3 * float(python(IMPORT.format(statement=statement))))


# -- starts and stops ------------------------------------------------------------------


async def entered() -> tuple[float, float]:
    """Seconds from start() to READY, and from leaving the block to its end."""
    began = time.perf_counter()
    async with StepflowRuntime.start(log_config=peers.QUIET):
        ready = time.perf_counter()
    return ready - began, time.perf_counter() - ready


async def hosted() -> tuple[float, float]:
    """The same in a background thread."""
    began = time.perf_counter()
    runtime = await StepflowRuntime.start_async(log_config=peers.QUIET)
    ready = time.perf_counter()
    await runtime.stop_async()
    return ready - began, time.perf_counter() - ready


async def official() -> tuple[float, float]:
    """The same of the official launcher."""
    from stepflow_orchestrator import OrchestratorConfig, StepflowOrchestrator

    config = OrchestratorConfig(config=peers.CONFIG, log_level="error")
    began = time.perf_counter()
    async with StepflowOrchestrator.start(config):
        ready = time.perf_counter()
    return ready - began, time.perf_counter() - ready


def _life(
    backend: str, live: Callable[[], Awaitable[tuple[float, float]]], phase: int
) -> Sample:
    return Sample(1e3 * anyio.run(live, backend=backend)[phase])


OURS: Final = {
    "ours, asyncio": ("asyncio", entered),
    "ours, trio": ("trio", entered),
    "ours, hosted from asyncio": ("asyncio", hosted),
    "ours, hosted from trio": ("trio", hosted),
}
LIVES: Final = {**OURS, "official": ("asyncio", official)}


def bare_start() -> Sample:
    """From spawning the binary by hand to its port line."""
    began = time.perf_counter()
    with subprocess.Popen(
        [peers.BINARY, "--port", "0", "--log-level", "error"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as server:
        assert server.stdout is not None
        while not server.stdout.readline().startswith(b'{"port"'):
            pass
        took = time.perf_counter() - began
        server.kill()
    return Sample(1e3 * took)


def start(plan: Plan) -> list[Row]:
    bare = "bare binary's port line"
    sides: dict[str, Callable[[], Sample]] = {bare: bare_start}
    sides |= {name: partial(_life, *life, 0) for name, life in LIVES.items()}
    found = in_turns(sides, plan.starts)
    checks = {name: [against(found, name, bare, "at most", 1.25)] for name in OURS}
    checks["official"] = [against(found, "official", bare)]
    return [
        *(row("start", name, "ms", found[name], *checks[name]) for name in LIVES),
        row("start", bare, "ms", found[bare]),
    ]


def stop(plan: Plan) -> list[Row]:
    idle = in_turns(
        {name: partial(_life, *life, 1) for name, life in LIVES.items()}, plan.starts
    )
    worker = "ours, with a Python worker"
    slow = in_turns({worker: _stop_with_worker}, plan.slow_starts, warm=False)
    return [
        *(_bounded("stop", name, idle[name], 50) for name in OURS),
        row("stop", "official", "ms", idle["official"]),
        _bounded("stop", worker, slow[worker], 1000),
    ]


def _bounded(case: str, side: str, samples: Sequence[Sample], most: float) -> Row:
    values = [each.value for each in samples]
    return row(case, side, "ms", samples, alone(values, "at most", most))


def _stop_with_worker() -> Sample:
    return Sample(1e3 * anyio.run(_leave_with_worker))


async def _leave_with_worker() -> float:
    """Seconds from leaving the block to its end, with a worker connected."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    async with StepflowRuntime.start(WORKER, env={"PATH": path}):
        began = time.perf_counter()
    return time.perf_counter() - began


def crash(plan: Plan) -> list[Row]:
    sides = {f"ours, {each}": partial(_recovery, each) for each in BACKENDS}
    found = in_turns(sides, plan.starts)
    return [_bounded("crash", name, samples, 250) for name, samples in found.items()]


def _recovery(backend: str) -> Sample:
    return Sample(1e3 * anyio.run(_recover, backend=backend))


async def _recover() -> float:
    """Seconds from kill -9 of the server to READY: of a first crash, not of a series."""
    async with StepflowRuntime.start(
        restart_policy=RestartPolicy.ALWAYS, log_config=peers.QUIET
    ) as runtime:
        assert runtime.pid is not None
        began = time.perf_counter()
        os.kill(runtime.pid, signal.SIGKILL)
        async for change in runtime.state_changes():
            if change.restarts and change.state is RuntimeState.READY:
                break
        return time.perf_counter() - began


CASES: Final = (
    Case("cold", "a whole script: start, one run, stop", cold),
    Case("import", "in new interpreters, compiled modules present", imports),
    Case("start", "from start() to READY", start),
    Case("stop", "from leaving the block to its end", stop),
    Case("crash", "from kill -9 of the server to READY", crash),
)
