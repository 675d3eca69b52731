"""In a notebook: a real kernel, driven as Jupyter drives it, and IPython in a terminal."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import anyio
import psutil
import pytest

from .conftest import ASYNCIO, processes_left, wait_until
from .kernels import running_kernel
from .test_docs import ROOT, blocks

BEGIN = """
import asyncio, time
from stepflow_runtime import StepflowClient, StepflowRuntime
runtime = StepflowRuntime.start()
FLOW = "docs/examples/greeting.yaml"
NAP = {
    "name": "nap",
    "steps": [{"id": "a", "component": "/sleep", "input": {"duration_ms": 60_000}}],
    "output": {"$step": "a"},
}

async def tell_of_run():
    while not (runs := await runtime.list_runs(flow_name="nap")):
        await asyncio.sleep(0.01)
    print("under way", runs[0].run_id)

async def wait_cancelled(run_id):
    while (await runtime.get_run(run_id)).status.name != "CANCELLED":
        await asyncio.sleep(0.01)
"""

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.parametrize("anyio_backend", [ASYNCIO]),
]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    return tmp_path


async def test_cells_await_and_show_what_they_get(directory: Path) -> None:
    async with running_kernel(directory) as kernel:
        assert (await kernel.cell(BEGIN)).error is None
        # A handle is the last line of a cell, before its server is there and after.
        told = await kernel.cell("runtime")
        assert told.shown["text/plain"] == "<StepflowRuntime new>"
        told = await kernel.cell('await runtime.run(FLOW, {"name": "Ada"})')
        assert told.shown["text/plain"].startswith("FlowResult(status=SUCCESS, run_id=")
        assert "&quot;to&quot;: &quot;Ada&quot;" in told.shown["text/html"]
        told = await kernel.cell("await runtime.list_components()")
        assert "/noop" in told.shown["text/html"]
        told = await kernel.cell("runtime")
        assert "ready at http://127.0.0.1:" in told.shown["text/plain"]
        told = await kernel.cell(
            "inputs = [{'name': 'a'}, {'name': 'b'}]\n"
            "async for index, result in runtime.run_many(FLOW, inputs):\n"
            "    print(index, result.output['to'])"
        )
        assert sorted(told.printed.splitlines()) == ["0 a", "1 b"]
        told = await kernel.cell(
            "async with StepflowRuntime.start() as two:\n"
            "    print(await two.run(FLOW, {'name': 'Bo'}))"
        )
        assert told.printed.startswith("FlowResult(status=SUCCESS")
        # `with` would hold the kernel up, and says what to do.
        told = await kernel.cell("with StepflowRuntime.start(): pass")
        assert told.error is not None and "start_async" in told.error
        # A stop may be called as in a script, with a call of another cell under way.
        server = psutil.Process(int(await kernel.value("runtime.pid")))
        call = "task = asyncio.create_task(runtime.run(NAP))\nawait asyncio.sleep(0)"
        assert (await kernel.cell(call)).error is None
        assert (await kernel.cell("runtime.stop()")).error is None
        assert not server.is_running()
        told = await kernel.cell("await task")
        assert told.error == "RuntimeStoppedError: this runtime is stopped"


async def test_an_interrupt_ends_what_a_cell_waits_for_and_nothing_else(
    directory: Path,
) -> None:
    """At once: by itself a kernel would be woken by the end of the run, a minute later."""
    async with running_kernel(directory) as kernel:
        assert (await kernel.cell(BEGIN)).error is None
        told = await kernel.cell(
            "asyncio.create_task(tell_of_run())\nawait runtime.run(NAP)",
            interrupt_at="under way",
        )
        assert told.error == "CancelledError: "
        run_id = told.printed.split()[-1]
        assert (await kernel.cell(f"await wait_cancelled('{run_id}')")).error is None
        more = "client = StepflowClient(runtime.url); two = StepflowRuntime.start()"
        assert (await kernel.cell(more)).error is None
        waits = [
            "await runtime.get_result(await runtime.submit(NAP))",
            "async for entry in runtime.logs(): pass",
            "async for event in runtime.events(await runtime.submit(NAP)): pass",
            "async with client: await client.get_result(await client.submit(NAP))",
            "async with two: await two.get_result(await two.submit(NAP))",
        ]
        for wait in waits:
            told = await kernel.cell(f"print('waiting')\n{wait}", "waiting")
            assert told.error == "CancelledError: ", wait
        assert await kernel.value("two.state.name, two.pid") == "STOPPED None"
        told = await kernel.cell("print('busy')\ntime.sleep(60)", "busy")
        assert told.error == "KeyboardInterrupt: "
        assert await kernel.value("runtime.state.name, runtime.restarts") == "READY 0"


def is_gone(process: psutil.Process) -> bool:
    processes_left()  # whose parent was killed is ours to reap
    return not process.is_running()


async def test_a_kernel_that_ends_or_is_killed_takes_its_server_along(
    directory: Path,
) -> None:
    begin = "runtime = await StepflowRuntime.start_async()\nruntime"
    async with running_kernel(directory) as kernel:
        for now in (False, True):
            assert (await kernel.cell(BEGIN + begin)).error is None
            server = psutil.Process(int(await kernel.value("runtime.pid")))
            await kernel.restart(now=now)
            await wait_until(partial(is_gone, server))
            told = await kernel.cell("runtime")
            assert told.error == "NameError: name 'runtime' is not defined"
        assert (await kernel.cell(BEGIN + begin)).error is None
        server = psutil.Process(int(await kernel.value("runtime.pid")))
    await wait_until(partial(is_gone, server))
    await wait_until(lambda: processes_left() == [])


async def test_the_cells_of_the_documentation_run_one_after_the_other(
    directory: Path,
) -> None:
    cells = blocks("docs/how-to/notebook.md", "ipython")
    assert len(cells) > 5
    last = None
    async with running_kernel(directory) as kernel:
        for cell in cells:
            last = await kernel.cell(cell)
            assert last.error is None, (cell, last.error)
    assert last is not None


async def test_ipython_in_a_terminal_awaits_at_top_level(directory: Path) -> None:
    cells = """
from stepflow_runtime import StepflowRuntime
runtime = StepflowRuntime.start()
runtime
(await runtime.run("docs/examples/greeting.yaml", {"name": "Ada"})).output["to"]
%autoawait trio
(await runtime.run("docs/examples/greeting.yaml", {"name": "Bo"})).output["to"]
two = await StepflowRuntime.start_async()
await runtime.stop_async(); runtime
%autoawait asyncio
await two.run("docs/examples/nested.yaml", {"value": 5})
"""
    arguments = ["--simple-prompt", "--no-banner", "--HistoryManager.enabled=False"]
    done = await anyio.run_process(
        [sys.executable, "-W", "error::ResourceWarning", "-m", "IPython", *arguments],
        input=cells.encode(),
        cwd=directory,
        env={**os.environ, "IPYTHONDIR": str(directory)},
    )
    told = done.stdout.decode()
    assert "ready at http://127.0.0.1:" in told
    assert "'Ada'" in told and "'Bo'" in told and "<StepflowRuntime stopped" in told
    assert "FlowResult(status=SUCCESS, run_id=" in told
    assert "Error" not in told + done.stderr.decode()
