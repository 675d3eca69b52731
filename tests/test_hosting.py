"""Runtimes in a background thread: sync, detached, from many loops; and how they stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import psutil
import pytest
import trio
from blockbuster import BlockBuster

from stepflow_runtime import (
    LogConfig,
    LogEntry,
    RestartPolicy,
    RunLostError,
    RuntimeState,
    RuntimeStoppedError,
    ServerCrashedError,
    ServerStartError,
    StepflowRuntime,
)
from stepflow_runtime.loops import post

from .conftest import (
    ECHO,
    EXAMPLES,
    SLEEP,
    each_backend,
    freeze,
    processes_left,
    wait_until,
)


@contextmanager
def held_up(runtime: StepflowRuntime, blockbuster: BlockBuster) -> Iterator[None]:
    """Hold up the thread that the runtime lives in."""
    blockbuster.deactivate()
    stuck, free = threading.Event(), threading.Event()

    def hold_up() -> None:
        stuck.set()
        free.wait(60)

    post(runtime._supervisor._loop, hold_up)
    assert stuck.wait(15)
    try:
        yield
    finally:
        free.set()


def our_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("stepflow")]


def threads_left() -> list[str]:
    """What is there after the moment that a thread takes to end when its work is done."""
    deadline = time.monotonic() + 5
    while our_threads() and time.monotonic() < deadline:
        time.sleep(0.001)
    return our_threads()


@pytest.fixture(autouse=True)
def _leave_no_thread() -> Iterator[None]:
    yield
    assert threads_left() == []


def kill_server(runtime: StepflowRuntime) -> None:
    assert runtime.pid is not None
    psutil.Process(runtime.pid).kill()


def run_program(
    program: str, *args: str, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "dev", "-c", program, *args],
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


# -- without an event loop -------------------------------------------------------------


def test_outside_a_loop_start_returns_a_ready_server() -> None:
    runtime = StepflowRuntime.start()
    states = [runtime.state]
    assert asyncio.run(runtime.run(ECHO, 1)).output == 1
    runtime.stop()
    assert [*states, runtime.state] == [RuntimeState.READY, RuntimeState.STOPPED]
    assert processes_left() == []


def test_a_with_block_stops_the_server_at_its_end() -> None:
    with StepflowRuntime.start() as runtime:
        assert asyncio.run(runtime.run(ECHO, 1)).output == 1
    assert runtime.state is RuntimeState.STOPPED
    assert processes_left() == []


def test_a_with_block_lets_its_exception_through() -> None:
    with pytest.raises(KeyError, match="mine"), StepflowRuntime.start():
        raise KeyError("mine")
    assert processes_left() == []


def test_a_start_that_fails_raises_at_once_and_leaves_nothing() -> None:
    with pytest.raises(ServerStartError, match="Failed to read config file"):
        StepflowRuntime.start("/nope.yml")
    assert processes_left() == []


def test_a_start_that_is_interrupted_leaves_nothing(
    fake_server: Callable[[str], Path],
) -> None:
    """As by Ctrl-C, while the main thread waits."""
    threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGALRM]).start()

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            StepflowRuntime.start(binary=fake_server("exec sleep 100"))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert processes_left() == []


def test_starts_interrupted_at_random_moments_leave_nothing() -> None:
    """A KeyboardInterrupt may come in the middle of whatever a start does."""
    program = """
import os, random, signal, sys, threading, time
from stepflow_runtime import StepflowRuntime
interrupted = 0
def interrupt():
    time.sleep(random.uniform(0, 0.05))
    os.kill(os.getpid(), signal.SIGINT)
for _ in range(60):
    thread = threading.Thread(target=interrupt)
    try:
        thread.start()
        runtime = StepflowRuntime.start()
        runtime.stop()
        time.sleep(0.1)
    except KeyboardInterrupt:
        interrupted += 1
    runtime = None
    thread.join()
deadline = time.monotonic() + 10
names = [1]
while names and time.monotonic() < deadline:
    names = [t.name for t in threading.enumerate() if t.name.startswith("stepflow")]
    time.sleep(0.01)
print(interrupted, names)
"""
    done = run_program(program)
    interrupted, names = done.stdout.split(" ", 1)
    assert int(interrupted) > 30
    assert names.strip() == "[]", done.stderr
    assert processes_left() == []


def test_bad_options_are_refused_before_a_thread_is_made() -> None:
    with pytest.raises(ValueError, match="startup_timeout"):
        StepflowRuntime.start(startup_timeout=-1)
    with StepflowRuntime.start() as runtime, pytest.raises(ValueError, match="timeout"):
        runtime.stop(timeout=-1)


def test_no_thread_to_be_had_is_a_failed_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    with pytest.raises(ServerStartError, match="no thread"):
        StepflowRuntime.start()


def test_a_loop_that_cannot_be_made_is_a_failed_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_loop(*args: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("stepflow_runtime.hosting.portal.anyio.run", no_loop)
    with pytest.raises(ServerStartError, match="Too many open files"):
        StepflowRuntime.start()


# -- from event loops ------------------------------------------------------------------


def test_calls_work_from_several_loops_in_a_row_and_from_threads_at_once() -> None:
    """Warnings are errors here, so that an unclosed socket would fail this."""

    async def several(number: int) -> list[Any]:
        results: list[Any] = []

        async def one(value: int) -> None:
            results.append((await runtime.run(ECHO, value)).output)

        async with anyio.create_task_group() as tasks:
            for value in range(20):
                tasks.start_soon(one, number * 100 + value)
        return sorted(results)

    with StepflowRuntime.start() as runtime:
        for number in range(3):
            expected = list(range(number * 100, number * 100 + 20))
            assert asyncio.run(several(number)) == expected
            assert trio.run(several, number) == expected
            gc.collect()
        backends = ["asyncio", "trio"] * 4
        with ThreadPoolExecutor(8) as threads:
            futures = [
                threads.submit(partial(anyio.run, several, number, backend=backend))
                for number, backend in enumerate(backends)
            ]
            for number, future in enumerate(futures):
                assert future.result(60) == list(range(number * 100, number * 100 + 20))


@pytest.mark.anyio
async def test_in_a_loop_start_does_nothing_yet_and_the_first_call_starts() -> None:
    """As in a notebook: ``start()`` in one cell, ``await run()`` in the next."""
    runtime = StepflowRuntime.start()
    states = [runtime.state]
    assert processes_left() == []
    assert (await runtime.run(ECHO, 1)).output == 1
    assert our_threads() != []
    await runtime.stop_async()
    assert [*states, runtime.state] == [RuntimeState.NEW, RuntimeState.STOPPED]


@pytest.mark.anyio
async def test_of_first_calls_made_together_one_starts_the_server() -> None:
    runtime = StepflowRuntime.start()
    outputs: list[Any] = []

    async def call(value: int) -> None:
        outputs.append((await runtime.run(ECHO, value)).output)

    async with anyio.create_task_group() as tasks:
        for value in range(10):
            tasks.start_soon(call, value)
    assert sorted(outputs) == list(range(10))
    assert our_threads().count("stepflow-runtime") == 1
    await runtime.stop_async()


@pytest.mark.anyio
async def test_start_async_returns_a_ready_server() -> None:
    runtime = await StepflowRuntime.start_async(restart_policy=RestartPolicy.ALWAYS)
    assert runtime.state is RuntimeState.READY
    assert (await runtime.run(ECHO, 1)).output == 1
    await runtime.stop_async()
    await runtime.stop_async()
    runtime.stop()


@each_backend
@pytest.mark.anyio
async def test_start_async_that_fails_or_is_cancelled_leaves_nothing(
    fake_server: Callable[[str], Path],
) -> None:
    with pytest.raises(ServerStartError, match="Failed to read config file"):
        await StepflowRuntime.start_async("/nope.yml")
    with anyio.move_on_after(0.2) as scope:
        await StepflowRuntime.start_async(binary=fake_server("exec sleep 100"))
    assert scope.cancelled_caught
    assert threads_left() == []
    assert processes_left() == []


@pytest.mark.parametrize("milliseconds", [0, 1, 2, 5, 10, 20, 30])
@each_backend
@pytest.mark.anyio
async def test_start_async_cancelled_at_any_moment_leaves_nothing(
    milliseconds: int,
) -> None:
    with anyio.move_on_after(milliseconds / 1000):
        runtime = await StepflowRuntime.start_async()
        await runtime.stop_async()
    assert threads_left() == []
    assert processes_left() == []


@each_backend
@pytest.mark.anyio
async def test_a_hosted_runtime_can_be_entered_and_served() -> None:
    runtime = await anyio.to_thread.run_sync(StepflowRuntime.start)
    async with runtime:
        assert (await runtime.run(ECHO, 1)).output == 1
    assert runtime.state is RuntimeState.STOPPED
    runtime = await anyio.to_thread.run_sync(StepflowRuntime.start)
    async with anyio.create_task_group() as tasks:
        assert await tasks.start(runtime.serve) is runtime
        assert (await runtime.run(ECHO, 1)).output == 1
        tasks.cancel_scope.cancel()
    assert runtime.state is RuntimeState.STOPPED


@each_backend
@pytest.mark.anyio
async def test_a_sync_block_in_a_loop_is_refused() -> None:
    with (
        pytest.raises(RuntimeError, match="use `async with`"),
        StepflowRuntime.start(),
    ):
        pytest.fail("entered")


@each_backend
@pytest.mark.anyio
async def test_a_cancelled_call_leaves_the_hosted_server_alone() -> None:
    runtime = await StepflowRuntime.start_async()
    with anyio.move_on_after(0.1) as scope:
        await runtime.run(SLEEP, 30_000)
    assert scope.cancelled_caught
    assert (await runtime.run(ECHO, 1)).output == 1
    await runtime.stop_async()


@each_backend
@pytest.mark.anyio
@pytest.mark.parametrize("call", ["get_result", "get_batch"])
async def test_what_a_server_had_is_not_asked_of_the_next_one(call: str) -> None:
    """The answer comes while the loop is busy, and the server dies before it is read.

    The next one answers that the run, which it does not know, has no items.
    """

    async def ask() -> None:
        with pytest.raises(RunLostError):
            await getattr(runtime, call)(run_id)

    runtime = await StepflowRuntime.start_async(restart_policy=RestartPolicy.ALWAYS)
    run_id = await runtime.submit(SLEEP, 400)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        await anyio.sleep(0.2)
        time.sleep(0.4)  # noqa: ASYNC251 - a busy event loop
        assert runtime.pid is not None
        os.kill(runtime.pid, signal.SIGKILL)
        while not (runtime.restarts and runtime.state is RuntimeState.READY):
            time.sleep(0.005)  # noqa: ASYNC251
    await runtime.stop_async()


@each_backend
@pytest.mark.anyio
async def test_more_calls_than_connections_wait_for_each_other() -> None:
    runtime = await StepflowRuntime.start_async()
    outputs: list[Any] = []

    async def call(value: int) -> None:
        outputs.append((await runtime.run(ECHO, value)).output)

    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            for value in range(600):
                tasks.start_soon(call, value)
    assert sorted(outputs) == list(range(600))
    await runtime.stop_async()


# -- crashes ---------------------------------------------------------------------------


def test_a_hosted_server_is_restarted_while_no_loop_runs() -> None:
    with StepflowRuntime.start(restart_policy=RestartPolicy.ON_FAILURE) as runtime:
        assert asyncio.run(runtime.run(ECHO, 1)).output == 1
        kill_server(runtime)
        deadline = time.monotonic() + 15
        while runtime.restarts < 1 or runtime.state is not RuntimeState.READY:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert asyncio.run(runtime.run(ECHO, 2)).output == 2


@pytest.mark.anyio
async def test_calls_under_way_in_other_loops_hear_of_a_crash() -> None:
    runtime = await StepflowRuntime.start_async()

    async def call() -> None:
        with pytest.raises(ServerCrashedError, match="was killed by SIGKILL"):
            await runtime.run(SLEEP, 30_000)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call)
        for backend in ("asyncio", "trio"):
            tasks.start_soon(
                partial(anyio.to_thread.run_sync, partial(anyio.run, backend=backend)),
                call,
            )
        await wait_until(
            lambda: len({e.run_id for e in runtime.get_recent_logs(999)}) > 3
        )
        kill_server(runtime)
    assert runtime.state is RuntimeState.FAILED
    await wait_until(lambda: our_threads() == [])  # nothing is left to be done
    await runtime.stop_async()


@pytest.mark.parametrize("style", ["sync", "async"])
def test_on_crash_may_stop_the_runtime(style: str) -> None:
    """It is called by the very supervisor that the stop is asked of."""
    stopped = threading.Event()

    def on_crash(code: int) -> None:
        runtime.stop()
        stopped.set()

    async def on_crash_async(code: int) -> None:
        await runtime.stop_async()
        stopped.set()

    with StepflowRuntime.start(
        on_crash=on_crash if style == "sync" else on_crash_async,
        restart_policy=RestartPolicy.ALWAYS,
        shutdown_timeout=30,
    ) as runtime:
        kill_server(runtime)
        assert stopped.wait(15)
    assert runtime.state is RuntimeState.STOPPED


@pytest.mark.parametrize("style", ["sync", "async"])
@pytest.mark.parametrize("hosting", ["hosted", "entered"])
@each_backend
@pytest.mark.anyio
async def test_on_crash_that_exits_is_reported_and_breaks_nothing(
    style: str, hosting: str, caplog: pytest.LogCaptureFixture
) -> None:
    def on_crash(code: int) -> None:
        sys.exit(1)

    async def on_crash_async(code: int) -> None:
        sys.exit(1)

    callback = on_crash if style == "sync" else on_crash_async
    options: Any = {"restart_policy": RestartPolicy.ALWAYS, "on_crash": callback}
    if hosting == "hosted":
        runtime = await StepflowRuntime.start_async(**options)
    else:
        runtime = StepflowRuntime.start(**options)
    async with runtime:
        kill_server(runtime)
        await wait_until(lambda: runtime.restarts == 1)
        assert (await runtime.run(ECHO, 1)).output == 1
        await wait_until(lambda: "on_crash raised" in caplog.text)


@pytest.mark.parametrize("hosting", ["hosted", "entered"])
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.anyio
async def test_on_crash_that_waits_for_a_cancelled_task_breaks_nothing(
    hosting: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def on_crash(code: int) -> None:
        raise asyncio.CancelledError

    options: Any = {"restart_policy": RestartPolicy.ALWAYS, "on_crash": on_crash}
    if hosting == "hosted":
        runtime = await StepflowRuntime.start_async(**options)
    else:
        runtime = StepflowRuntime.start(**options)
    async with runtime:
        kill_server(runtime)
        await wait_until(lambda: runtime.restarts == 1)
        assert (await runtime.run(ECHO, 1)).output == 1
        await wait_until(lambda: "on_crash raised" in caplog.text)


def test_an_async_on_crash_that_blocks_does_not_hold_up_the_restart() -> None:
    free = threading.Event()

    async def on_crash(code: int) -> None:
        free.wait(60)

    with StepflowRuntime.start(
        restart_policy=RestartPolicy.ALWAYS, on_crash=on_crash
    ) as runtime:
        kill_server(runtime)
        deadline = time.monotonic() + 15
        while runtime.restarts < 1 or runtime.state is not RuntimeState.READY:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        free.set()


def test_a_crash_while_the_supervisor_is_held_up_is_a_crash(
    blockbuster: BlockBuster,
) -> None:
    """The server dies meanwhile: no bare broken connection comes of it."""

    async def call_and_kill() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call)
            await wait_until(lambda: any(e.run_id for e in runtime.get_recent_logs()))
            with held_up(runtime, blockbuster):
                kill_server(runtime)
                await anyio.sleep(0.1)
                tasks.start_soon(call)
                await anyio.sleep(2.5)

    async def call() -> None:
        with pytest.raises(ServerCrashedError, match="SIGKILL"):
            await runtime.run(SLEEP, 30_000)

    with StepflowRuntime.start() as runtime:
        asyncio.run(call_and_kill())


# -- state changes ---------------------------------------------------------------------


@pytest.mark.anyio
async def test_state_changes_are_seen_by_all_in_order_and_none_is_missed() -> None:
    runtime = StepflowRuntime.start(restart_policy=RestartPolicy.ALWAYS)
    seen: dict[int, list[RuntimeState]] = {1: [], 2: []}
    exits: list[int] = []

    async def follow(number: int) -> None:
        async for change in runtime.state_changes():
            seen[number].append(change.state)
            if change.state is RuntimeState.RESTARTING:
                assert change.last_exit is not None
                exits.append(change.last_exit.code)
                await anyio.sleep(0.3)  # a slow reader misses nothing

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(follow, 1)
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(
            partial(anyio.to_thread.run_sync, anyio.run, follow, 2)
        )  # in a loop of its own
        async with runtime:
            kill_server(runtime)
            await wait_until(lambda: runtime.restarts == 1)
            await runtime.wait_ready()
    all_states = ["new", "starting", "ready", "restarting", "ready"]
    all_states += ["stopping", "stopped"]
    assert [state.value for state in seen[1]] == all_states
    # The second may have come a little later.
    assert [state.value for state in seen[2]] == all_states[-len(seen[2]) :]
    assert exits == [-signal.SIGKILL] * 2


@each_backend
@pytest.mark.anyio
async def test_state_changes_tell_how_it_stands_at_once() -> None:
    async with StepflowRuntime.start() as runtime:
        async for change in runtime.state_changes():
            assert change.state is RuntimeState.READY
            assert (change.pid, change.port) == (runtime.pid, runtime.port)
            assert change.at.tzinfo is not None
            break
    assert [c.state async for c in runtime.state_changes()] == [RuntimeState.STOPPED]


# -- stop ------------------------------------------------------------------------------


def test_stop_is_idempotent_and_may_come_from_many_threads() -> None:
    runtime = StepflowRuntime.start()
    with ThreadPoolExecutor(8) as threads:
        for future in [threads.submit(runtime.stop) for _ in range(8)]:
            future.result(30)
    runtime.stop()
    with pytest.raises(RuntimeStoppedError, match="is stopped"):
        asyncio.run(runtime.run(ECHO))


@pytest.mark.anyio
async def test_a_runtime_never_started_can_be_stopped() -> None:
    for stop in (StepflowRuntime.stop_async, anyio_stop):
        runtime = StepflowRuntime.start()
        await stop(runtime)
        assert runtime.state is RuntimeState.STOPPED
        with pytest.raises(RuntimeStoppedError):
            await runtime.run(ECHO)
        with pytest.raises(RuntimeStoppedError):
            async with runtime:
                pytest.fail("entered")


async def anyio_stop(runtime: StepflowRuntime) -> None:
    await anyio.to_thread.run_sync(runtime.stop)


@pytest.mark.anyio
async def test_an_entered_runtime_can_be_stopped_from_elsewhere() -> None:
    """The block goes on; what it asks of the runtime raises."""
    for stop in (StepflowRuntime.stop_async, anyio_stop):
        async with StepflowRuntime.start() as runtime:
            await stop(runtime)
            assert runtime.state is RuntimeState.STOPPED
            assert processes_left() == []
            with pytest.raises(RuntimeStoppedError):
                await runtime.run(ECHO)


@each_backend
@pytest.mark.anyio
async def test_stop_in_the_loop_of_an_entered_runtime_only_asks() -> None:
    async with StepflowRuntime.start() as runtime:
        runtime.stop()
        await wait_until(lambda: runtime.state is RuntimeState.STOPPED)


@each_backend
@pytest.mark.anyio
async def test_a_served_runtime_that_is_stopped_ends_its_task() -> None:
    async with anyio.create_task_group() as tasks:
        runtime = await tasks.start(StepflowRuntime.start().serve)
        await runtime.stop_async()
    assert runtime.state is RuntimeState.STOPPED


@pytest.mark.anyio
async def test_calls_under_way_at_a_stop_say_so() -> None:
    runtime = await StepflowRuntime.start_async()

    async def call() -> None:
        with pytest.raises(RuntimeStoppedError):
            await runtime.run(SLEEP, 30_000)

    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(call)
        await wait_until(lambda: any(e.run_id for e in runtime.get_recent_logs()))
        await runtime.stop_async()


def test_stop_is_bounded_for_a_server_that_hears_nothing() -> None:
    runtime = StepflowRuntime.start()
    freeze(runtime)
    began = time.monotonic()
    runtime.stop(timeout=0.3)
    assert 0.3 <= time.monotonic() - began < 10
    assert processes_left() == []


def test_a_stop_that_is_held_up_kills_the_server(
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    blockbuster: BlockBuster,
) -> None:
    """Its thread may be waiting for a lock that is held by whoever waits for the stop."""
    monkeypatch.setattr("stepflow_runtime.server.supervisor.LONGEST_KILL", 0.5)
    runtime = StepflowRuntime.start(shutdown_timeout=0.2)
    server = psutil.Process(runtime.pid)
    with held_up(runtime, blockbuster):
        runtime.stop()
        # Who would reap it is held up, too.
        assert server.status() == psutil.STATUS_ZOMBIE
        assert "a stop was held up" in caplog.text
    runtime.stop()
    assert runtime.state is RuntimeState.STOPPED


@pytest.mark.parametrize("name", ["stepflow.server", "redact"])
def test_a_log_handler_that_blocks_holds_up_no_stop(
    caplog: pytest.LogCaptureFixture, name: str, blockbuster: BlockBuster
) -> None:
    stuck, free = threading.Event(), threading.Event()

    def block() -> None:
        stuck.set()
        free.wait(60)

    class Stuck(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            block()

    def redact(entry: LogEntry) -> LogEntry:
        if entry.run_id is not None:
            block()
        return entry

    config = LogConfig(redact=redact if name == "redact" else None)
    logger = logging.getLogger("stepflow.server")
    handler = Stuck()
    runtime = StepflowRuntime.start(log_config=config)
    caplog.set_level("INFO", logger.name)
    if name != "redact":
        logger.addHandler(handler)
    try:
        asyncio.run(runtime.run(ECHO, 1))
        assert stuck.wait(15)
        runtime.stop()
        assert runtime.state is RuntimeState.STOPPED
        assert processes_left() == []
        assert "held up" not in caplog.text
    finally:
        logger.removeHandler(handler)
        free.set()


def test_of_several_stops_the_most_impatient_has_the_say() -> None:
    runtime = StepflowRuntime.start(shutdown_timeout=600)
    freeze(runtime)
    patient = threading.Thread(target=runtime.stop)
    patient.start()
    time.sleep(0.2)
    runtime.stop(timeout=0.1)
    patient.join(5)
    assert not patient.is_alive()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.anyio
async def test_asyncios_own_cancellation_of_a_stop_waits_for_its_end() -> None:
    runtime = await StepflowRuntime.start_async()
    freeze(runtime)
    task = asyncio.ensure_future(runtime.stop_async(timeout=0.5))
    for _ in range(4):
        await asyncio.sleep(0.05)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert runtime.state is RuntimeState.STOPPED
    assert processes_left() == []


def test_a_runtime_whose_loop_was_closed_around_it_can_be_stopped() -> None:
    """Nobody is left there to end the server in good order: it is killed."""
    program = """
import asyncio, os, psutil
from stepflow_runtime import RuntimeStoppedError, StepflowRuntime
from stepflow_runtime.server import supervisor
supervisor.LONGEST_KILL = 0.2
async def enter():
    return await StepflowRuntime.start(shutdown_timeout=0.1).__aenter__()
loop = asyncio.new_event_loop()
runtime = loop.run_until_complete(enter())
loop.close()
server = psutil.Process(runtime.pid)
runtime.stop()
print(server.status())
try:
    asyncio.run(runtime.run({"output": 1}))
except RuntimeStoppedError:
    print("stopped", flush=True)
os._exit(0)
"""
    assert run_program(program).stdout.split() == ["zombie", "stopped"]
    deadline = time.monotonic() + 15
    while processes_left():  # the guard makes sure of it
        assert time.monotonic() < deadline
        time.sleep(0.05)


@each_backend
@pytest.mark.anyio
async def test_a_stop_that_is_held_up_kills_the_server_in_a_loop_too(
    monkeypatch: pytest.MonkeyPatch, blockbuster: BlockBuster
) -> None:
    monkeypatch.setattr("stepflow_runtime.server.supervisor.LONGEST_KILL", 0.2)
    runtime = await StepflowRuntime.start_async(shutdown_timeout=0.1)
    server = psutil.Process(runtime.pid)
    with held_up(runtime, blockbuster):
        await runtime.stop_async()
        assert server.status() == psutil.STATUS_ZOMBIE
        with pytest.raises(RuntimeStoppedError):
            await runtime.run(ECHO, 1)
    await runtime.stop_async()


def test_stop_in_a_signal_handler_that_interrupts_a_stop() -> None:
    runtime = StepflowRuntime.start()
    other = StepflowRuntime.start()
    freeze(runtime)

    def stop_both(number: int, frame: Any) -> None:
        other.stop()
        runtime.stop()

    before = signal.signal(signal.SIGALRM, stop_both)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        runtime.stop(timeout=0.5)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert runtime.state is other.state is RuntimeState.STOPPED


def test_a_handle_that_nobody_holds_is_stopped_with_a_warning() -> None:
    runtime = StepflowRuntime.start()
    pid = runtime.pid
    assert pid is not None
    handles = [runtime]
    del runtime
    with pytest.warns(ResourceWarning, match="was never stopped"):
        handles.clear()
    deadline = time.monotonic() + 15
    while psutil.pid_exists(pid) or our_threads():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -- programs that end -----------------------------------------------------------------

FORGETFUL = """
import sys, threading, time
from stepflow_runtime import StepflowRuntime
import asyncio, atexit
runtime = StepflowRuntime.start()
other = StepflowRuntime.start()
atexit.register(runtime.stop)
asyncio.run(runtime.run({"output": 1}))
print(runtime.pid, other.pid, flush=True)
"""


def test_a_program_that_forgets_to_stop_ends_and_leaves_nothing() -> None:
    done = run_program(FORGETFUL, timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for pid in done.stdout.split():
        assert not psutil.pid_exists(int(pid))


def test_so_does_one_with_a_worker(worker_env: dict[str, str]) -> None:
    config = EXAMPLES / "python_worker" / "stepflow-config.yml"
    source = "import sys\nfrom stepflow_runtime import StepflowRuntime\n"
    source += f"runtime = StepflowRuntime.start({str(config)!r}, env={worker_env!r})\n"
    source += "print('last line', flush=True)"
    done = run_program(source, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert processes_left() == []


def test_threads_of_the_program_that_go_on_keep_their_server() -> None:
    """The main thread's end is not the program's."""
    program = FORGETFUL + (
        "def later():\n"
        "    time.sleep(0.5)\n"
        "    print(asyncio.run(other.run({'output': 1})).output)\n"
        "threading.Thread(target=later).start()\n"
    )
    done = run_program(program, timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "1"


def test_a_program_that_ends_by_an_exception_leaves_nothing() -> None:
    done = run_program(FORGETFUL + "raise SystemExit(7)", timeout=30)
    assert done.returncode == 7
    for pid in done.stdout.split():
        assert not psutil.pid_exists(int(pid))


# -- tasks -----------------------------------------------------------------------------


async def _entered() -> AsyncIterator[StepflowRuntime]:
    async with StepflowRuntime.start() as runtime:
        yield runtime


async def _hosted() -> AsyncIterator[StepflowRuntime]:
    runtime = await StepflowRuntime.start_async()
    yield runtime
    await runtime.stop_async()


async def _next(fixture: AsyncIterator[StepflowRuntime]) -> StepflowRuntime | None:
    return await anext(fixture, None)


def test_entered_in_one_task_and_left_in_another_stops_and_says_so() -> None:
    """As pytest-asyncio does with a fixture that is an async generator."""
    with asyncio.Runner() as runner:
        fixture = _entered()
        runtime = runner.run(_next(fixture))
        assert runtime is not None
        assert runner.run(runtime.run(ECHO, 1)).output == 1
        with pytest.raises(RuntimeError, match=r"StepflowRuntime\.start_async"):
            runner.run(_next(fixture))
        assert runtime.state is RuntimeState.STOPPED
        assert processes_left() == []
        gc.collect()
        runner.run(asyncio.sleep(0.01))


def test_hosted_in_one_task_and_stopped_in_another_just_works() -> None:
    with asyncio.Runner() as runner:
        fixture = _hosted()
        runtime = runner.run(_next(fixture))
        assert runtime is not None
        assert runner.run(runtime.run(ECHO, 1)).output == 1
        assert runner.run(_next(fixture)) is None
    assert runtime.state is RuntimeState.STOPPED


# -- many ------------------------------------------------------------------------------


def test_fifty_at_once() -> None:
    with ThreadPoolExecutor(10) as threads:
        runtimes = list(threads.map(lambda _: StepflowRuntime.start(), range(50)))
    with ExitStack() as stack:
        for runtime in runtimes:
            stack.enter_context(runtime)
        assert len({runtime.port for runtime in runtimes}) == 50
        for number, runtime in enumerate(runtimes):
            assert asyncio.run(runtime.run(ECHO, number)).output == number
    assert processes_left() == []
