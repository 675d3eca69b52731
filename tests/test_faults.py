"""Faults that users' tests inflict, on the real server."""

from __future__ import annotations

import os
import signal

import anyio
import psutil
import pytest

from stepflow_runtime import (
    RestartPolicy,
    RuntimeState,
    ServerCrashedError,
    StepflowRuntime,
)
from stepflow_runtime.testing import crash, freeze, thaw, wait_restarted

from .conftest import ECHO, each_backend

pytestmark = pytest.mark.anyio


@each_backend
async def test_each_crash_can_be_waited_for_until_there_is_another_server() -> None:
    async with StepflowRuntime.start(
        restart_policy=RestartPolicy.ON_FAILURE
    ) as runtime:
        pids = [runtime.pid]
        for count in (1, 2):
            crash(runtime)
            await wait_restarted(runtime)
            pids.append(runtime.pid)
            assert (runtime.state, runtime.restarts) == (RuntimeState.READY, count)
            assert (await runtime.run(ECHO, count)).output == count
        await wait_restarted(runtime, restarts=2)
        assert len({*pids}) == 3
        assert runtime.last_exit is not None
        assert runtime.last_exit.signal == "SIGKILL"


@each_backend
async def test_a_crash_can_be_by_another_signal() -> None:
    async with StepflowRuntime.start() as runtime:
        crash(runtime, signal.SIGABRT)
        with pytest.raises(ServerCrashedError, match="SIGABRT") as caught:
            await wait_restarted(runtime)
        assert caught.value.exit is not None
        assert caught.value.exit.signal == "SIGABRT"


@each_backend
async def test_a_frozen_server_is_taken_for_hung_and_replaced() -> None:
    async with StepflowRuntime.start(
        restart_policy=RestartPolicy.ON_FAILURE,
        health_interval=0.05,
        health_timeout=0.1,
        max_health_failures=2,
    ) as runtime:
        freeze(runtime)
        await wait_restarted(runtime)
        assert runtime.last_exit is not None
        assert runtime.last_exit.was_hung


@each_backend
async def test_a_frozen_server_does_nothing_and_a_thawed_one_goes_on() -> None:
    async with StepflowRuntime.start() as runtime:
        run_id = await runtime.submit(ECHO, 1)
        freeze(runtime)
        with anyio.move_on_after(0.2) as patience:
            await runtime.get_result(run_id)
        assert patience.cancelled_caught
        assert psutil.Process(runtime.pid).status() == psutil.STATUS_STOPPED
        thaw(runtime)
        thaw(runtime)  # it is not frozen any more
        assert (await runtime.get_result(run_id)).output == 1
        assert runtime.restarts == 0


async def test_there_has_to_be_a_server() -> None:
    runtime = StepflowRuntime.start()
    with pytest.raises(RuntimeError, match="no server to crash: the runtime is new"):
        crash(runtime)
    async with runtime:
        pass
    with pytest.raises(RuntimeError, match="to freeze: the runtime is stopped"):
        freeze(runtime)
    thaw(runtime)


def test_a_stop_that_another_thread_has_undone_is_not_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("stepflow_runtime.testing.faults._LONGEST_STOP", 0.1)
    with StepflowRuntime.start() as runtime, monkeypatch.context() as nothing_stops:
        nothing_stops.setattr(os, "kill", lambda pid, signum: None)
        freeze(runtime)  # and it returns
