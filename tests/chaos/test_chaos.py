"""Faults at random moments, counted: what survived, what was left behind, what was lost.

``python -m pytest tests/chaos`` is the short form, and part of the tests;
``python -m pytest tests/chaos --chaos=long`` is the long one.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import anyio
import psutil
import pytest

from stepflow_runtime import (
    RestartPolicy,
    RunLostError,
    RuntimeState,
    StepflowError,
    StepflowRuntime,
)
from stepflow_runtime.server import restart

from ..conftest import (
    ECHO,
    EXAMPLES,
    SLEEP,
    each_backend,
    open_descriptors,
    processes_left,
    wait_until,
)
from .ledger import Account

Rounds = Callable[[int, int], int]

VICTIM = Path(__file__).with_name("victim.py")
WORKER_CONFIG = EXAMPLES / "python_worker" / "stepflow-config.yml"

# What the promise says of the processes of a Python that was killed.
GONE_AFTER = 3.0


@pytest.fixture
def after_a_minute_of_peace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each crash is the first of its series, and so repaired without a pause."""
    monkeypatch.setattr(restart, "FRESH_AFTER", 0.0)


# -- the server dies -------------------------------------------------------------------


class Load:
    """Callers that never pause, and what became of their calls."""

    def __init__(self, runtime: StepflowRuntime, account: Account) -> None:
        self._runtime = runtime
        self._account = account

    async def keep_calling(self, milliseconds: int | None) -> None:
        while True:
            self._account.calls += 1
            try:
                with anyio.fail_after(30):
                    if milliseconds is None:
                        result = await self._runtime.run(ECHO, 7)
                        assert result.output == 7
                    else:
                        await self._runtime.run(SLEEP, milliseconds)
            except RunLostError:
                self._account.told += 1
            except (StepflowError, TimeoutError, AssertionError) as exc:
                self._account.lost += 1
                raise AssertionError(f"a call came to {exc!r}") from exc


async def recover(runtime: StepflowRuntime, account: Account, restarts: int) -> None:
    """Wait until the server is READY anew; note how long it took."""
    began = time.perf_counter()
    with anyio.fail_after(30):
        async for change in runtime.state_changes():
            if change.state is RuntimeState.READY and change.restarts > restarts:
                break
    account.recoveries.append(time.perf_counter() - began)


@each_backend
@pytest.mark.anyio
@pytest.mark.usefixtures("after_a_minute_of_peace")
async def test_the_server_is_killed_under_load(
    account: Account, rounds: Rounds, chance: random.Random
) -> None:
    """Server killed (SIGKILL) under load."""
    async with StepflowRuntime.start(
        restart_policy=RestartPolicy.ON_FAILURE, max_restarts=10_000
    ) as runtime:
        port = runtime.port
        async with anyio.create_task_group() as tasks:
            load = Load(runtime, account)
            for _ in range(5):
                tasks.start_soon(load.keep_calling, None)
            for _ in range(5):
                tasks.start_soon(load.keep_calling, 50)
            for _ in range(rounds(20, 200)):
                await anyio.sleep(chance.uniform(0, 0.2))
                await runtime.wait_ready()
                restarts, pid = runtime.restarts, runtime.pid
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                account.injected += 1
                await recover(runtime, account, restarts)
                account.survived += 1
                assert runtime.port == port
            tasks.cancel_scope.cancel()
    account.left = len(processes_left())
    assert (account.left, account.lost) == (0, 0)


@each_backend
@pytest.mark.anyio
@pytest.mark.usefixtures("after_a_minute_of_peace")
async def test_the_server_hangs(
    account: Account, rounds: Rounds, chance: random.Random
) -> None:
    """Server frozen (SIGSTOP), found out and replaced."""
    async with StepflowRuntime.start(
        restart_policy=RestartPolicy.ALWAYS,
        max_restarts=10_000,
        health_interval=0.05,
        health_timeout=0.2,
        max_health_failures=2,
    ) as runtime:
        for _ in range(rounds(3, 30)):
            await runtime.wait_ready()
            await anyio.sleep(chance.uniform(0, 0.2))
            restarts = runtime.restarts
            psutil.Process(runtime.pid).suspend()
            account.injected += 1
            await recover(runtime, account, restarts)
            assert runtime.last_exit is not None and runtime.last_exit.was_hung
            account.survived += 1
    account.left = len(processes_left())
    assert account.left == 0


@each_backend
@pytest.mark.anyio
async def test_the_server_is_starved(account: Account, rounds: Rounds) -> None:
    """Server starved (runs a tenth of the time): not to be killed."""
    async with StepflowRuntime.start(
        health_interval=0.02, health_timeout=0.1, max_health_failures=3
    ) as runtime:
        server = psutil.Process(runtime.pid)
        for _ in range(rounds(10, 100)):
            server.suspend()
            account.injected += 1
            await anyio.sleep(0.15)  # longer than one request may take
            server.resume()
            await anyio.sleep(0.015)
        account.calls += 1
        assert (await runtime.run(ECHO, 1)).output == 1
        assert runtime.state is RuntimeState.READY
        account.survived = account.injected


# -- cancellation ----------------------------------------------------------------------


@each_backend
@pytest.mark.anyio
async def test_cancelled_at_random_moments(
    account: Account, rounds: Rounds, chance: random.Random
) -> None:
    """Start, runs and stop cancelled."""

    async def live() -> None:
        async with (
            StepflowRuntime.start(restart_policy=RestartPolicy.ALWAYS) as runtime,
            anyio.create_task_group() as tasks,
        ):
            for _ in range(5):
                tasks.start_soon(runtime.run, SLEEP, 10)

    for _ in range(rounds(40, 400)):
        account.injected += 1
        with anyio.move_on_after(chance.uniform(0, 0.08)):
            await live()
        assert processes_left() == []
        account.survived += 1


# -- Python dies -----------------------------------------------------------------------


class Victims:
    """Programs with runtimes, to be killed; and all the processes that come of them."""

    def __init__(self) -> None:
        self._mark = f"CHAOS_{uuid.uuid4().hex}"
        self._programs: list[subprocess.Popen[bytes]] = []

    def spawn(self, *args: str, env: dict[str, str]) -> subprocess.Popen[bytes]:
        program = subprocess.Popen(
            [sys.executable, str(VICTIM), *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **env, self._mark: "1"},
        )
        self._programs.append(program)
        return program

    def alive(self) -> list[str]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if self._mark in process.environ():
                    found.append(" ".join([str(process.pid), *process.cmdline()]))
        return found

    def wait_gone(self, seconds: float) -> list[str]:
        deadline = time.monotonic() + seconds
        while (alive := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return alive

    def close(self) -> None:
        for program in self._programs:
            program.kill()
            program.wait()
            assert program.stdout is not None
            program.stdout.close()


@pytest.fixture
def victims() -> Iterator[Victims]:
    victims = Victims()
    yield victims
    victims.close()


def kill_at(
    program: subprocess.Popen[bytes],
    moment: str,
    delay: float,
    number: signal.Signals = signal.SIGKILL,
) -> None:
    """Kill so many seconds after it has said that it comes to that moment."""
    assert program.stdout is not None
    listen_for(program.stdout, moment)
    time.sleep(delay)
    program.send_signal(number)
    program.wait(30)


def listen_for(pipe: IO[bytes], moment: str) -> None:
    for line in pipe:
        if moment in ("any", line.decode().strip()):
            return


MOMENTS = {
    # What it has said last, and for how many seconds the moment lasts.
    "start": 0.05,
    "crash": 0.06,
    "stop": 0.02,
    "any": 0.6,
}
WAYS = ["asyncio", "trio", "hosted", "twice"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_python_is_killed(
    moment: str,
    account: Account,
    rounds: Rounds,
    chance: random.Random,
    victims: Victims,
    worker_env: dict[str, str],
) -> None:
    """Python killed (SIGKILL)."""
    for _ in range(rounds(1, 7)):
        programs = [victims.spawn(way, env=worker_env) for way in WAYS * 2]
        killers = [
            threading.Thread(
                target=kill_at, args=(each, moment, chance.uniform(0, MOMENTS[moment]))
            )
            for each in programs
        ]
        for killer in killers:
            killer.start()
        for killer in killers:
            killer.join()
        left = victims.wait_gone(GONE_AFTER)
        account.injected += len(programs)
        account.survived += len(programs) - len(left)
        account.left += len(left)
        assert left == []


def test_python_is_killed_with_workers(
    account: Account,
    rounds: Rounds,
    chance: random.Random,
    victims: Victims,
    worker_env: dict[str, str],
) -> None:
    """Python killed (SIGKILL), with workers."""
    for _ in range(rounds(1, 7)):
        programs = [
            victims.spawn(way, str(WORKER_CONFIG), env=worker_env) for way in WAYS[:3]
        ]
        killers = [
            threading.Thread(
                target=kill_at, args=(each, "start", chance.uniform(0.05, 4))
            )
            for each in programs
        ]
        for killer in killers:
            killer.start()
        for killer in killers:
            killer.join()
        left = victims.wait_gone(GONE_AFTER)
        account.injected += len(programs)
        account.survived += len(programs) - len(left)
        account.left += len(left)
        assert left == []


def test_python_is_terminated(
    account: Account,
    rounds: Rounds,
    chance: random.Random,
    victims: Victims,
    worker_env: dict[str, str],
) -> None:
    """Python terminated (SIGTERM)."""
    for _ in range(rounds(1, 10)):
        for way in ("asyncio", "trio", "hosted"):
            program = victims.spawn(way, env=worker_env)
            kill_at(program, "start", chance.uniform(0.0, 0.3), signal.SIGTERM)
            account.injected += 1
            assert program.returncode == -signal.SIGTERM
            assert program.stdout is not None
            assert program.stdout.read().endswith(b"unwound\n")
            left = victims.wait_gone(GONE_AFTER)
            account.left += len(left)
            assert left == []
            account.survived += 1


def guard_of(program: subprocess.Popen[bytes]) -> psutil.Process:
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        for child in psutil.Process(program.pid).children():
            with contextlib.suppress(psutil.Error):  # a server that crashed just now
                if "guard.py" in " ".join(child.cmdline()):
                    return child
    raise AssertionError("it has no guard")


def test_the_guard_is_killed_and_then_python(
    account: Account,
    rounds: Rounds,
    chance: random.Random,
    victims: Victims,
    worker_env: dict[str, str],
) -> None:
    """Guard killed, and Python after it."""
    for _ in range(rounds(2, 20)):
        program = victims.spawn("hosted", env=worker_env)
        assert program.stdout is not None
        listen_for(program.stdout, "crash")
        guard_of(program).kill()
        account.injected += 1
        time.sleep(0.1)  # it takes milliseconds until there is another one
        kill_at(program, "any", chance.uniform(0, 0.1))
        left = victims.wait_gone(GONE_AFTER)
        account.left += len(left)
        assert left == []
        account.survived += 1


# -- again and again -------------------------------------------------------------------


def test_three_hundred_lives_leave_no_trace(
    account: Account, rounds: Rounds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started and stopped: growth of the program."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # the usual place is everybody's
    monkeypatch.setattr("tempfile.tempdir", None)
    # The pytest plugin holds the logs of a test's runtimes.
    monkeypatch.setattr("stepflow_runtime.roster._listeners", ())
    lives = rounds(60, 300)
    for number in range(lives):
        if number == lives // 3:  # by then, all that is made once is made
            before = measure()
        with StepflowRuntime.start():
            pass
        account.injected += 1
        assert processes_left() == []
        account.survived += 1
    after = measure()
    assert after["descriptors"] == before["descriptors"]
    assert after["threads"] == before["threads"]
    assert after["temporary files"] == before["temporary files"]
    # What a leak of one small object a life would come to; caches may still fill up.
    assert after["traced"] - before["traced"] < 1000 * lives
    assert after["resident"] - before["resident"] < 8 * 2**20


def measure() -> dict[str, int]:
    if not tracemalloc.is_tracing():
        tracemalloc.start()
    gc.collect()
    return {
        "descriptors": len(open_descriptors()),
        "threads": threading.active_count(),
        "temporary files": len(os.listdir(tempfile.gettempdir())),
        "traced": tracemalloc.get_traced_memory()[0],
        "resident": psutil.Process().memory_info().rss,
    }


@pytest.fixture(autouse=True)
def _stop_tracing() -> Iterator[None]:
    yield
    tracemalloc.stop()


@each_backend
@pytest.mark.anyio
async def test_three_hundred_lives_leave_no_task(rounds: Rounds) -> None:
    from anyio import get_running_tasks

    before = len(get_running_tasks())
    for _ in range(rounds(20, 300)):
        async with StepflowRuntime.start() as runtime:
            await runtime.run(ECHO, 1)
        assert len(get_running_tasks()) == before
    await wait_until(lambda: processes_left() == [])
