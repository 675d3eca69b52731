"""The server's life under a supervisor: in a nursery, through crashes, hung, restarted."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from blockbuster import BlockBuster

from stepflow_runtime import (
    RestartPolicy,
    RunLostError,
    RuntimeState,
    RuntimeStoppedError,
    ServerCrashedError,
    ServerStartError,
    StepflowRuntime,
)

from .conftest import ECHO, SLEEP, each_backend, freeze, processes_left, wait_until

pytestmark = pytest.mark.anyio


def kill_server(runtime: StepflowRuntime, how: int = signal.SIGKILL) -> None:
    """Kill the server and wait for its death: a busy kernel takes its time."""
    assert runtime.pid is not None
    os.kill(runtime.pid, how)
    with suppress(ChildProcessError):
        os.waitid(os.P_PID, runtime.pid, os.WEXITED | os.WNOWAIT)


async def wait_begun(runtime: StepflowRuntime) -> None:
    """Wait until the server has begun with a run."""
    await wait_until(
        lambda: any(entry.run_id for entry in runtime.get_recent_logs(1000))
    )


async def wait_state(runtime: StepflowRuntime, state: RuntimeState) -> None:
    await wait_until(lambda: runtime.state is state)


# -- in a task group of the user's own -------------------------------------------------


async def test_serve_starts_in_a_task_group_and_ends_with_it() -> None:
    async with anyio.create_task_group() as tasks:
        runtime = await tasks.start(StepflowRuntime.start().serve)
        assert isinstance(runtime, StepflowRuntime)
        assert (await runtime.run(ECHO, 1)).output == 1
        tasks.cancel_scope.cancel()
    assert runtime.state is RuntimeState.STOPPED
    assert processes_left() == []


async def test_a_server_lost_for_good_ends_the_task_group_around_serve() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with anyio.create_task_group() as tasks:
            runtime = await tasks.start(StepflowRuntime.start().serve)
            kill_server(runtime)
            await anyio.sleep_forever()
    (error,) = caught.value.exceptions
    assert isinstance(error, ServerCrashedError)
    assert error.exit.signal == "SIGKILL"


@each_backend
async def test_serve_that_cannot_start_raises_why() -> None:
    async with anyio.create_task_group() as tasks:
        with pytest.raises(ServerStartError, match="Failed to read config file"):
            await tasks.start(StepflowRuntime.start("/nope.yml").serve)


@each_backend
async def test_two_runtimes_in_one_task_group_are_apart() -> None:
    async with anyio.create_task_group() as tasks:
        first = await tasks.start(StepflowRuntime.start().serve)
        second = await tasks.start(StepflowRuntime.start().serve)
        assert first.port != second.port
        assert (await first.run(ECHO, 1)).output == 1
        assert (await second.run(ECHO, 2)).output == 2
        tasks.cancel_scope.cancel()


@each_backend
async def test_cancelling_the_group_is_all_that_its_callers_hear_of() -> None:
    """Not that the runtime, cancelled along with them, is stopped."""
    async with anyio.create_task_group() as tasks:
        runtime = await tasks.start(StepflowRuntime.start().serve)

        async def call_again_and_again() -> None:
            while True:
                await runtime.run(ECHO, 1)

        for _ in range(10):
            tasks.start_soon(call_again_and_again)
        await wait_begun(runtime)
        tasks.cancel_scope.cancel()
        with pytest.raises(anyio.get_cancelled_exc_class()):
            with anyio.CancelScope(shield=True):
                await wait_state(runtime, RuntimeState.STOPPED)
            await runtime.run(ECHO, 1)


# -- crashes, with the policy NEVER ----------------------------------------------------


async def test_a_call_under_way_when_the_server_dies_says_so() -> None:
    async with StepflowRuntime.start() as runtime, anyio.create_task_group() as tasks:

        async def run() -> None:
            with pytest.raises(
                ServerCrashedError, match="was killed by SIGKILL"
            ) as caught:
                await runtime.run(SLEEP, 30_000)
            assert caught.value.exit.code == -signal.SIGKILL

        for _ in range(5):
            tasks.start_soon(run)
        await wait_begun(runtime)
        kill_server(runtime)


async def test_so_does_every_call_after_it_and_the_body_goes_on() -> None:
    async with StepflowRuntime.start() as runtime:
        await runtime.run(ECHO)
        kill_server(runtime)
        for _ in range(3):
            with pytest.raises(ServerCrashedError, match="the restart policy is NEVER"):
                await runtime.run(ECHO, 1)
        with pytest.raises(ServerCrashedError):
            await runtime.wait_ready()
        assert runtime.state is RuntimeState.FAILED
        assert runtime.last_exit is not None
        assert runtime.last_exit.signal == "SIGKILL"
        assert runtime.last_exit.uptime > 0
        assert runtime.last_exit.recent_logs
    assert runtime.state is RuntimeState.FAILED


@each_backend
async def test_a_call_under_way_when_the_runtime_stops_says_so() -> None:
    async with anyio.create_task_group() as tasks:

        async def run() -> None:
            with pytest.raises(RuntimeStoppedError):
                await runtime.run(SLEEP, 30_000)

        async with StepflowRuntime.start() as runtime:
            tasks.start_soon(run)
            await wait_begun(runtime)


@pytest.mark.parametrize("style", ["sync", "async", "sync raising", "async raising"])
@each_backend
async def test_on_crash_is_told_the_exit_code(
    style: str, caplog: pytest.LogCaptureFixture
) -> None:
    codes: list[int] = []

    def on_crash(code: int) -> None:
        codes.append(code)
        if "raising" in style:
            raise ValueError("of the user's function")

    async def on_crash_async(code: int) -> None:
        on_crash(code)

    callback: Callable[[int], Any] = on_crash if style[0] == "s" else on_crash_async
    async with StepflowRuntime.start(on_crash=callback) as runtime:
        kill_server(runtime)
        await wait_state(runtime, RuntimeState.FAILED)
        await wait_until(lambda: codes)
    assert codes == [-signal.SIGKILL]
    logged = [r for r in caplog.records if r.getMessage() == "on_crash raised"]
    assert len(logged) == ("raising" in style)


@pytest.mark.parametrize("hosting", ["entered", "served"])
@each_backend
async def test_on_crash_is_told_even_if_the_crash_ends_the_block(hosting: str) -> None:
    class Callback:
        async def __call__(self, code: int) -> None:
            await anyio.sleep(0.05)
            codes.append(code)

    codes: list[int] = []
    with pytest.raises((ServerCrashedError, ExceptionGroup)):
        if hosting == "entered":
            async with StepflowRuntime.start(on_crash=Callback()) as runtime:
                kill_server(runtime)
                await runtime.run(ECHO)
        else:
            async with anyio.create_task_group() as tasks:
                runtime = StepflowRuntime.start(on_crash=Callback())
                await tasks.start(runtime.serve)
                kill_server(runtime)
                await anyio.sleep_forever()
    assert codes == [-signal.SIGKILL]


@each_backend
async def test_on_crash_that_never_returns_delays_the_end_by_shutdown_timeout() -> None:
    async def on_crash(code: int) -> None:
        await anyio.sleep_forever()

    with anyio.fail_after(10):
        async with StepflowRuntime.start(
            on_crash=on_crash, shutdown_timeout=0.3
        ) as runtime:
            kill_server(runtime)
            await wait_state(runtime, RuntimeState.FAILED)


@each_backend
async def test_on_crash_is_not_told_of_a_stop() -> None:
    codes: list[int] = []
    async with StepflowRuntime.start(on_crash=codes.append):
        pass
    assert codes == []


# -- restarts --------------------------------------------------------------------------


async def test_a_crashed_server_comes_back_on_the_same_port() -> None:
    async with StepflowRuntime.start(
        restart_policy=RestartPolicy.ON_FAILURE, max_restarts=3
    ) as runtime:
        port, pid = runtime.port, runtime.pid
        await runtime.run(ECHO, 1)
        kill_server(runtime)
        await wait_state(runtime, RuntimeState.RESTARTING)
        # The call waits for the new server, and stores the flow there anew.
        assert (await runtime.run(ECHO, 2)).output == 2
        assert runtime.port == port
        assert runtime.pid != pid
        assert runtime.restarts == 1


def accepts_connections(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@each_backend
async def test_a_call_that_cannot_have_arrived_is_made_again(
    blockbuster: BlockBuster,
) -> None:
    """The server is gone, and nobody here has had the time to notice."""
    blockbuster.deactivate()
    async with StepflowRuntime.start(restart_policy=RestartPolicy.ALWAYS) as runtime:
        kill_server(runtime)
        while accepts_connections(runtime.port):
            time.sleep(0.001)  # noqa: ASYNC251 - no other task may run
        assert runtime.state is RuntimeState.READY
        assert (await runtime.run(ECHO, 1)).output == 1
        assert runtime.restarts == 1


@each_backend
async def test_a_run_that_died_with_the_store_is_lost() -> None:
    async with (
        StepflowRuntime.start(restart_policy=RestartPolicy.ALWAYS) as runtime,
        anyio.create_task_group() as tasks,
    ):

        async def run() -> None:
            with pytest.raises(RunLostError, match="in-memory store died with it"):
                await runtime.run(SLEEP, 30_000)

        tasks.start_soon(run)
        await wait_begun(runtime)
        kill_server(runtime)
        await wait_state(runtime, RuntimeState.RESTARTING)
        assert (await runtime.run(ECHO, 1)).output == 1


@each_backend
async def test_a_server_that_keeps_crashing_is_given_up() -> None:
    async with StepflowRuntime.start(
        restart_policy=RestartPolicy.ALWAYS, max_restarts=2
    ) as runtime:
        for _ in range(3):
            await runtime.wait_ready()
            kill_server(runtime)
            await wait_state_left(runtime)
        with pytest.raises(ServerCrashedError, match="restarted 2 times already"):
            await runtime.run(ECHO)
        assert runtime.restarts == 2


async def wait_state_left(runtime: StepflowRuntime) -> None:
    await wait_until(lambda: runtime.state is not RuntimeState.READY)


@each_backend
async def test_a_restart_that_fails_to_launch_counts_and_is_repeated(
    fake_server: Callable[[str], Path], real_binary: Path, tmp_path: Path
) -> None:
    """The second launch fails, the third works."""
    script = fake_server(
        f"echo x >> {tmp_path}/starts\n"
        f'[ $(wc -l < {tmp_path}/starts) = 2 ] && {{ echo "no luck" >&2; exit 9; }}\n'
        f'exec {real_binary} "$@"'
    )
    async with StepflowRuntime.start(
        binary=script, restart_policy=RestartPolicy.ON_FAILURE
    ) as runtime:
        kill_server(runtime)
        await wait_state_left(runtime)
        assert (await runtime.run(ECHO, 1)).output == 1
        assert runtime.restarts == 2
        assert runtime.last_exit is not None
        assert runtime.last_exit.code == 9


@each_backend
async def test_a_server_that_hangs_is_killed_and_counts_as_crashed() -> None:
    async with StepflowRuntime.start(
        health_interval=0.05, health_timeout=0.2, max_health_failures=2
    ) as runtime:
        await anyio.sleep(0.3)  # health requests that succeed do no harm
        assert runtime.state is RuntimeState.READY
        assert runtime.pid is not None
        freeze(runtime)
        with pytest.raises(ServerCrashedError, match="answered no health requests"):
            await runtime.run(ECHO)
        assert runtime.last_exit is not None and runtime.last_exit.was_hung


@each_backend
async def test_a_blocked_event_loop_does_not_make_the_server_look_hung() -> None:
    """Health requests time out, but because nobody here looked at the answers."""
    async with StepflowRuntime.start(
        health_interval=0.02, health_timeout=0.05, max_health_failures=1
    ) as runtime:
        for _ in range(15):
            time.sleep(0.15)  # noqa: ASYNC251 - that is the point
            await anyio.sleep(0.001)
        assert runtime.state is RuntimeState.READY
        assert (await runtime.run(ECHO, 1)).output == 1


@each_backend
async def test_a_crash_is_not_taken_for_a_hang() -> None:
    """Although health requests fail between the crash and its discovery."""
    for _ in range(5):
        async with StepflowRuntime.start(
            health_interval=0.001, max_health_failures=1
        ) as runtime:
            kill_server(runtime, signal.SIGABRT)
            with pytest.raises(ServerCrashedError, match="was killed by SIGABRT"):
                await runtime.run(ECHO, 1)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_on_crash_that_blocks_does_not_keep_the_program(backend: str) -> None:
    program = f"""
import anyio, os, signal, time
from stepflow_runtime import ServerCrashedError, StepflowRuntime

async def main():
    runtime = StepflowRuntime.start(on_crash=lambda code: time.sleep(600), shutdown_timeout=0.2)
    try:
        async with runtime:
            os.kill(runtime.pid, signal.SIGKILL)
            while True:
                await runtime.run({{"output": 1}})
    except ServerCrashedError:
        print("left")

anyio.run(main, backend={backend!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "left\n"


@each_backend
async def test_stopping_while_a_restart_waits_is_prompt() -> None:
    async with StepflowRuntime.start(
        restart_policy=RestartPolicy.ALWAYS, max_restarts=100
    ) as runtime:
        for _ in range(3):
            await runtime.wait_ready()
            kill_server(runtime)
            await wait_state_left(runtime)
        await wait_state(runtime, RuntimeState.RESTARTING)
    assert runtime.state is RuntimeState.STOPPED


# -- a logger of the user's that raises ------------------------------------------------


@each_backend
async def test_a_log_handler_that_raises_is_reported_once_and_disturbs_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            raise OSError("disk full")

    logger = logging.getLogger("stepflow.server")
    handler = Broken()
    caplog.set_level("INFO", logger.name)
    logger.addHandler(handler)
    try:
        async with StepflowRuntime.start() as runtime:
            for number in range(100):
                assert (await runtime.run(ECHO, number)).output == number
    finally:
        logger.removeHandler(handler)
    reports = [r for r in caplog.records if r.name == "stepflow_runtime"]
    assert len(reports) == 1
    assert "stepflow.server" in reports[0].getMessage()
    assert len(runtime.get_recent_logs(5000)) >= 400  # 4 lines a run


@each_backend
async def test_a_handler_on_the_root_logger_that_raises_disturbs_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It raises when its own failure is reported, too, and when a crash is."""

    class Broken(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            raise OSError("disk full")

    caplog.set_level(1)
    handler = Broken()
    logging.getLogger().addHandler(handler)
    try:
        async with StepflowRuntime.start(
            restart_policy=RestartPolicy.ALWAYS
        ) as runtime:
            assert (await runtime.run(ECHO, 1)).output == 1
            kill_server(runtime)
            await wait_state_left(runtime)
            assert (await runtime.run(ECHO, 2)).output == 2
    finally:
        logging.getLogger().removeHandler(handler)


@each_backend
async def test_where_children_are_not_waited_for_a_crash_is_still_a_failure() -> None:
    """SIGCHLD ignored: the kernel reaps, and nobody learns the exit code."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        async with StepflowRuntime.start(
            restart_policy=RestartPolicy.ON_FAILURE
        ) as runtime:
            kill_server(runtime)
            await wait_state_left(runtime)
            assert (await runtime.run(ECHO, 1)).output == 1
            assert runtime.last_exit is not None
            assert runtime.last_exit.code == 255
    finally:
        signal.signal(signal.SIGCHLD, before)


@each_backend
async def test_restarts_that_cannot_even_be_launched_are_given_up(
    real_binary: Path, tmp_path: Path
) -> None:
    link = tmp_path / "server"
    link.symlink_to(real_binary)
    async with StepflowRuntime.start(
        binary=link, restart_policy=RestartPolicy.ALWAYS, max_restarts=2
    ) as runtime:
        link.unlink()
        kill_server(runtime)
        await wait_state_left(runtime)
        with pytest.raises(ServerCrashedError, match="cannot be executed") as caught:
            await runtime.run(ECHO)
        assert caught.value.exit.code == 127
        assert runtime.restarts == 2
