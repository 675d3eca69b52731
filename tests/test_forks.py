"""Forked children: what they inherit, and what they may do with it."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import psutil
import pytest

from stepflow_runtime import RuntimeState, RuntimeStoppedError, StepflowRuntime

from .conftest import ECHO, each_backend, open_descriptors, processes_left

# Python 3.12 warns of forks in programs with threads, which is what is tried here.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


def in_a_forked_child(function: Callable[[], object]) -> str:
    """Call ``function`` in a child; return what went wrong there, or "" if nothing did."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                function()
        except BaseException:  # noqa: BLE001 - told to the parent
            os.write(writing, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        trouble = pipe.read().decode()
    os.waitpid(pid, 0)
    return trouble


@pytest.fixture
def runtime() -> Iterator[StepflowRuntime]:
    with StepflowRuntime.start() as runtime:
        asyncio.run(runtime.run(ECHO, 0))  # a connection for the pool
        yield runtime


def test_using_an_inherited_handle_is_refused(runtime: StepflowRuntime) -> None:
    async def use() -> None:
        with pytest.raises(RuntimeStoppedError, match="was forked from"):
            await runtime.run(ECHO, 1)
        with pytest.raises(RuntimeStoppedError, match="was forked from"):
            await runtime.wait_ready()
        with pytest.raises(RuntimeStoppedError, match="was forked from"):
            async with runtime:
                pass

    def child() -> None:
        anyio.run(use)
        with pytest.raises(RuntimeStoppedError, match="was forked from"), runtime:
            pass

    assert in_a_forked_child(child) == ""
    assert asyncio.run(runtime.run(ECHO, 1)).output == 1


def test_a_child_that_ends_leaves_the_parents_server_alone(
    runtime: StepflowRuntime,
) -> None:
    """Although it unwinds the parent's blocks, and stops what it has inherited."""

    def child() -> None:
        runtime.stop()
        anyio.run(runtime.stop_async)
        runtime.__exit__(None, None, None)

    assert in_a_forked_child(child) == ""
    assert runtime.state is RuntimeState.READY
    assert asyncio.run(runtime.run(ECHO, 1)).output == 1


def test_a_child_holds_no_pipe_and_no_connection(runtime: StepflowRuntime) -> None:
    """Of what it inherits, it keeps only what was there before the runtime."""

    def child() -> None:
        assert runtime.pid is not None
        server = {os.readlink(f"/proc/{runtime.pid}/fd/{fd}") for fd in (0, 1, 2)}
        held = open_descriptors()
        assert not [fd for fd, what in held.items() if what in server]
        assert not [fd for fd, what in held.items() if "pidfd" in what]
        assert psutil.Process().net_connections() == []

    assert in_a_forked_child(child) == ""


def test_a_child_may_have_a_runtime_of_its_own(runtime: StepflowRuntime) -> None:
    def child() -> None:
        with StepflowRuntime.start() as own:
            assert own.port != runtime.port
            assert asyncio.run(own.run(ECHO, 1)).output == 1
        assert psutil.Process().children() == []

    assert in_a_forked_child(child) == ""
    assert asyncio.run(runtime.run(ECHO, 1)).output == 1


@each_backend
@pytest.mark.anyio
async def test_a_child_forked_inside_the_block_leaves_the_server_alone() -> None:
    async with StepflowRuntime.start() as runtime:
        await runtime.run(ECHO, 1)
        assert in_a_forked_child(runtime.stop) == ""
        assert (await runtime.run(ECHO, 1)).output == 1


def test_a_child_that_unwinds_the_whole_program_leaves_the_server_alone() -> None:
    """``os.fork`` in the middle of a block, and an ordinary exit in the child."""
    program = """
import asyncio, os, sys
from stepflow_runtime import StepflowRuntime
with StepflowRuntime.start() as runtime:
    if (pid := os.fork()) == 0:
        sys.exit(7)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    print(asyncio.run(runtime.run({"output": 1})).output)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["7", "1"]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_child_that_unwinds_an_async_block_leaves_it_alone(backend: str) -> None:
    program = """
import anyio, os, sys
from stepflow_runtime import StepflowRuntime
async def main():
    async with StepflowRuntime.start() as runtime:
        if (pid := os.fork()) == 0:
            await runtime.__aexit__(None, None, None)
            runtime.stop()
            os._exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        print((await runtime.run({"output": 1})).output)
anyio.run(main, backend=sys.argv[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", program, backend],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["7", "1"]


def test_forks_during_starts_hold_nothing_up() -> None:
    """A child that lives on must not keep an end of a pipe that was just being made."""
    program = """
import os, threading, time, warnings
from stepflow_runtime import StepflowRuntime
warnings.simplefilter("ignore")
over = threading.Event()
children = []
def fork_again_and_again():
    while not over.is_set():
        if (pid := os.fork()) == 0:
            time.sleep(60)
            os._exit(0)
        children.append(pid)
        time.sleep(0.002)
thread = threading.Thread(target=fork_again_and_again)
thread.start()
try:
    for _ in range(6):
        StepflowRuntime.start(startup_timeout=10).stop()
finally:
    over.set()
    thread.join()
    for pid in children:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
print("started")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "started\n", done.stderr


def _child_of_multiprocessing(path: str) -> None:
    Path(path).write_text(str(len(psutil.Process().children())))


def test_multiprocessing_by_fork_leaves_the_server_alone(
    runtime: StepflowRuntime, tmp_path: Path
) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=_child_of_multiprocessing, args=(str(tmp_path / "said"),)
    )
    process.start()
    process.join(30)
    assert (tmp_path / "said").read_text() == "0"
    assert asyncio.run(runtime.run(ECHO, 1)).output == 1


def test_a_child_that_lives_on_does_not_keep_the_servers_pipes_open() -> None:
    """The server ends, its pipes with it, and the stop takes no longer than ever."""
    runtime = StepflowRuntime.start()
    if (pid := os.fork()) == 0:
        try:
            os.execvp("sleep", ["sleep", "100"])  # inherits only what it should
        finally:
            os._exit(1)
    runtime.stop()
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    assert processes_left() == []


def test_descriptors_are_not_inherited_by_other_programs() -> None:
    def held() -> set[str]:
        listing = subprocess.run(
            ["ls", "-l", "/proc/self/fd"],
            close_fds=False,
            capture_output=True,
            text=True,
            check=True,
        )
        return {
            line.split(" -> ")[0].split()[-1] for line in listing.stdout.splitlines()
        }

    before = held()
    with StepflowRuntime.start() as runtime:
        asyncio.run(runtime.run(ECHO, 0))
        assert held() == before
