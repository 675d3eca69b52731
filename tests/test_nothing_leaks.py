"""However the block is left: its exception is itself, and nothing stays behind.

That no process and no descriptor stays is asserted after each test (conftest).
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import psutil
import pytest
from blockbuster import BlockingError

import stepflow_runtime
from stepflow_runtime import (
    LogConfig,
    RuntimeStoppedError,
    ServerStartError,
    StepflowRuntime,
)

from .conftest import ECHO, EXAMPLES, SLEEP, each_backend, processes_left, wait_until
from .steps import cancelling_at_step, in_a_task

pytestmark = pytest.mark.anyio


class BodyError(Exception):
    pass


@pytest.fixture(autouse=True)
async def _leave_no_task_behind() -> AsyncIterator[None]:
    yield
    assert our_tasks() == []


def our_tasks() -> list[str]:
    names = [str(task.name) for task in anyio.get_running_tasks()]
    return [name for name in names if name.startswith("stepflow_runtime")]


async def start_run_and_stop() -> None:
    async with StepflowRuntime.start(log_config=LogConfig(level="error")) as runtime:
        assert (await runtime.run(ECHO, 1)).output == 1
        assert any("Incarnation._own_pump" in name for name in our_tasks())


async def test_an_exception_of_the_body_leaves_as_itself() -> None:
    error = BodyError("mine")
    with pytest.raises(BodyError) as caught:
        async with StepflowRuntime.start():
            raise error
    assert caught.value is error
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, BaseExceptionGroup])
@each_backend
async def test_so_does_one_that_is_no_ordinary_exception(kind: type) -> None:
    error = kind("mine", [BodyError()]) if kind is BaseExceptionGroup else kind("mine")
    caught: BaseException | None = None
    try:
        async with StepflowRuntime.start():
            raise error
    except BaseException as exc:  # noqa: BLE001 - compared below
        caught = exc
    assert caught is error


async def test_the_body_can_be_left_by_return_and_break() -> None:
    async def returns() -> int:
        async with StepflowRuntime.start() as runtime:
            return (await runtime.run(ECHO, 7)).unwrap()  # type: ignore[no-any-return]

    assert await returns() == 7
    for _ in range(2):
        async with StepflowRuntime.start():
            break


async def test_an_exception_of_the_body_survives_a_cancellation_while_stopping() -> (
    None
):
    with pytest.raises(BodyError):
        with anyio.CancelScope() as scope:
            async with StepflowRuntime.start():
                scope.cancel()
                raise BodyError


async def test_the_scope_around_can_be_cancelled() -> None:
    with anyio.CancelScope() as scope:
        async with StepflowRuntime.start() as runtime:
            scope.cancel()
            await runtime.run(SLEEP, 10_000)
        pytest.fail("cancellation did not get through")
    assert scope.cancelled_caught
    assert processes_left() == []


async def test_a_scope_inside_can_time_a_run_out_and_the_next_run_works() -> None:
    async with StepflowRuntime.start() as runtime:
        with anyio.move_on_after(0.05) as scope:
            await runtime.run(SLEEP, 10_000)
        assert scope.cancelled_caught
        assert (await runtime.run(ECHO, 1)).output == 1


async def test_many_cancelled_runs_leave_the_others_alone() -> None:
    async with StepflowRuntime.start() as runtime:
        results = []

        async def run(number: int) -> None:
            with anyio.move_on_after(0.001 * (number % 7) if number % 2 else None):
                results.append((await runtime.run(ECHO, number)).output == number)

        async with anyio.create_task_group() as tasks:
            for number in range(200):
                tasks.start_soon(run, number)
        assert all(results)
        assert len(results) >= 100


@pytest.mark.parametrize("milliseconds", [*range(50), 60, 80, 120])
@each_backend
async def test_cancelling_after_some_milliseconds_leaves_nothing(
    milliseconds: int,
) -> None:
    async def rest_of_life() -> None:
        async with StepflowRuntime.start() as runtime:
            while True:
                await runtime.run(ECHO, 1)

    with anyio.move_on_after(milliseconds / 1000) as scope:
        await rest_of_life()
    assert scope.cancelled_caught
    assert processes_left() == []


async def serve_run_and_stop() -> None:
    runtime = StepflowRuntime.start(log_config=LogConfig(level="error"))
    async with anyio.create_task_group() as tasks:
        await tasks.start(runtime.serve)
        assert (await runtime.run(ECHO, 1)).output == 1
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("life", [start_run_and_stop, serve_run_and_stop])
@each_backend
async def test_cancelling_at_each_step_of_any_task_leaves_nothing(
    life: Callable[[], Coroutine[Any, Any, None]],
) -> None:
    number, finished = 0, False
    while not finished:
        with anyio.CancelScope() as scope:
            with cancelling_at_step(number, scope.cancel) as counter:
                await in_a_task(life)
        assert processes_left() == [], f"after a cancellation at step {number}"
        finished = not counter.fired
        number += 1
    # Fewer would mean that the script misses tasks: start, run and stop take more.
    assert number > 30


@each_backend
async def test_an_exception_of_the_body_survives_a_cancellation_around_it() -> None:
    with pytest.raises(KeyError, match="mine"), anyio.CancelScope() as scope:
        async with StepflowRuntime.start():
            scope.cancel()
            try:
                await anyio.sleep_forever()
            finally:
                raise KeyError("mine")


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_so_does_asyncios_own_cancellation() -> None:
    """It stops at no shield, and reaches the task only once."""
    number, finished = 0, False
    while not finished:
        task: asyncio.Task[None] | None = None

        def cancel() -> None:
            if task is not None:  # noqa: B023 - called within this turn of the loop
                task.cancel()  # noqa: B023

        with cancelling_at_step(number, cancel) as counter:
            task = asyncio.ensure_future(start_run_and_stop())
            await asyncio.wait([task])
        if not task.cancelled():
            task.result()
        assert processes_left() == [], f"after a cancellation at step {number}"
        finished = not counter.fired
        number += 1
    assert number > 30


# A task that is cancelled before its first step never starts its coroutine: asyncio's way.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("milliseconds", range(0, 60, 3))
async def test_so_does_cancelling_every_task_there_is(milliseconds: int) -> None:
    """What a program in a hurry does: not even our own tasks are spared."""
    bystanders = asyncio.all_tasks()
    task = asyncio.ensure_future(start_run_and_stop())
    await asyncio.sleep(milliseconds / 1000)
    while not task.done():
        for each in asyncio.all_tasks() - bystanders:
            each.cancel()
        await asyncio.sleep(0.001)
    assert task.cancelled() or task.exception() is None
    # A thread that was just spawning the server undoes that by itself.
    await wait_until(lambda: processes_left() == [])


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_asyncio_timeout_and_wait_for_work_as_they_should() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            async with StepflowRuntime.start() as runtime:
                await runtime.run(SLEEP, 10_000)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(StepflowRuntime.start().serve(), 0.01)


@each_backend
async def test_a_worker_goes_with_the_server(worker_env: dict[str, str]) -> None:
    """The server waits for its workers, and an idle worker does not mind SIGTERM."""
    config = EXAMPLES / "python_worker" / "stepflow-config.yml"
    # Far more patience than it may take: the worker is not waited for until that is over.
    runtime = StepflowRuntime.start(config, env=worker_env, shutdown_timeout=600)
    with anyio.fail_after(60):
        async with runtime:
            assert runtime.pid is not None
            workers = psutil.Process(runtime.pid).children()
            assert len(workers) == 1
            await runtime.run(config.parent / "shout.yaml", {"text": "x"})
    assert not workers[0].is_running() or workers[0].status() == psutil.STATUS_ZOMBIE
    messages = [entry.message for entry in runtime.get_recent_logs(2000)]
    assert any("Graceful shutdown complete" in message for message in messages)


@each_backend
async def test_a_worker_left_by_a_graceful_exit_is_swept(
    fake_server: Callable[[str], Path], real_binary: Path
) -> None:
    """A session member that the server knows nothing of, and that ignores SIGTERM."""
    script = fake_server(
        f'sh -c \'trap "" TERM; while :; do sleep 1; done\' &\nexec {real_binary} "$@"'
    )
    async with StepflowRuntime.start(binary=script) as runtime:
        assert (await runtime.run(ECHO, 1)).output == 1
        assert len(processes_left()) >= 2
    assert processes_left() == []


@each_backend
async def test_a_server_that_ignores_sigterm_is_killed_in_time(tmp_path: Path) -> None:
    async with StepflowRuntime.start(shutdown_timeout=0.3) as runtime:
        assert runtime.pid is not None
        psutil.Process(runtime.pid).suspend()
    assert processes_left() == []


@each_backend
async def test_a_grandchild_that_left_the_session_with_a_pipe_does_not_hang_us(
    fake_server: Callable[[str], Path], real_binary: Path, tmp_path: Path
) -> None:
    script = fake_server(
        f"setsid sh -c 'echo $$ > {tmp_path}/pid; exec sleep 60' &\n"
        f'exec {real_binary} "$@"'
    )
    with anyio.fail_after(20):
        async with StepflowRuntime.start(binary=script) as runtime:
            assert (await runtime.run(ECHO, 1)).output == 1
    grandchild = psutil.Process(int((tmp_path / "pid").read_text()))
    grandchild.kill()
    grandchild.wait()


async def test_a_generator_that_is_closed_early_stops_the_server() -> None:
    async def outputs() -> AsyncIterator[int]:
        async with StepflowRuntime.start() as runtime:
            while True:
                yield (await runtime.run(ECHO, 1)).output

    generator = outputs()
    async for output in generator:
        assert output == 1
        break
    await generator.aclose()  # type: ignore[attr-defined]
    assert processes_left() == []


@each_backend
async def test_fifty_lives_in_a_row_leave_no_threads_or_tasks() -> None:
    await start_run_and_stop()
    threads = psutil.Process().num_threads()
    for _ in range(50):
        await start_run_and_stop()
    gc.collect()
    assert psutil.Process().num_threads() <= threads + 1
    assert our_tasks() == []


async def test_a_blocking_call_of_ours_would_be_noticed() -> None:
    """Or the tests would show nothing about it."""
    source = "import time\ndef block(): time.sleep(0)"
    code: dict[str, Any] = {}
    exec(compile(source, stepflow_runtime.__file__, "exec"), code)  # noqa: S102
    with pytest.raises(BlockingError, match=r"time\.sleep"):
        code["block"]()
    await anyio.to_thread.run_sync(code["block"])


@each_backend
async def test_calls_that_race_with_the_end_leave_no_connection() -> None:
    async def call() -> None:
        with suppress(RuntimeStoppedError):
            while True:
                await runtime.run(ECHO, 1)

    for _ in range(5):
        async with (
            anyio.create_task_group() as tasks,
            StepflowRuntime.start() as runtime,
        ):
            for _ in range(8):
                tasks.start_soon(call)
            await anyio.sleep(0.05)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_closing_many_connections_survives_asyncios_own_cancellation() -> None:
    async def life() -> None:
        async with StepflowRuntime.start() as runtime:
            async with anyio.create_task_group() as tasks:
                for number in range(20):
                    tasks.start_soon(runtime.run, ECHO, number)
            leaving.set()

    for ticks in range(12):
        leaving = anyio.Event()
        task = asyncio.ensure_future(life())
        await leaving.wait()
        for _ in range(ticks):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])


@each_backend
async def test_a_working_directory_that_is_gone_is_a_start_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(ServerStartError, match="working directory") as caught:
        async with StepflowRuntime.start("config.yml"):
            pytest.fail("it started")
    assert isinstance(caught.value.__cause__, FileNotFoundError)
