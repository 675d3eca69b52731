"""In a nursery of a trio program, without anyio in sight."""

from __future__ import annotations

import os
import signal

import pytest
import trio

from stepflow_runtime import ServerCrashedError, StepflowRuntime

from .conftest import ECHO


@pytest.mark.trio
async def test_a_nursery_hosts_the_server(nursery: trio.Nursery) -> None:
    runtime = await nursery.start(StepflowRuntime.start().serve)
    assert (await runtime.run(ECHO, "x")).output == "x"
    nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_a_lost_server_cancels_its_siblings() -> None:
    with pytest.RaisesGroup(ServerCrashedError):
        async with trio.open_nursery() as nursery:
            runtime = await nursery.start(StepflowRuntime.start().serve)
            os.kill(runtime.pid, signal.SIGKILL)
            await trio.sleep_forever()


@pytest.mark.trio
async def test_a_fixture_can_hold_a_runtime(held_runtime: StepflowRuntime) -> None:
    assert (await held_runtime.run(ECHO, 1)).output == 1


@pytest.fixture
async def held_runtime(nursery: trio.Nursery) -> StepflowRuntime:
    runtime: StepflowRuntime = await nursery.start(StepflowRuntime.start().serve)
    return runtime
