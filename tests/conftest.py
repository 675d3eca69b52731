from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest
import sniffio
import uvloop
from blockbuster import BlockBuster, blockbuster_ctx
from hypothesis import settings

import stepflow_runtime
from stepflow_runtime.server.binary import find_binary

settings.register_profile("stepflow", deadline=None, max_examples=60)
settings.load_profile("stepflow")

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"

ECHO = {
    "name": "echo",
    "description": "Returns its input",
    "steps": [{"id": "a", "component": "/noop", "input": {"$input": "$"}}],
    "output": {"$step": "a"},
}
SLEEP = {
    "name": "sleep",
    "description": "Sleeps for as many milliseconds as its input says",
    "steps": [
        {"id": "a", "component": "/sleep", "input": {"duration_ms": {"$input": "$"}}}
    ],
    "output": {"$step": "a"},
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--chaos",
        choices=("short", "long"),
        default="short",
        help="how many faults tests/chaos injects",
    )
    parser.addoption(
        "--executors",
        choices=("all", "few"),
        default="all",
        help="in how many of its ways tests/test_conformance.py comes by an executor, and "
        "whether tests for all kinds of event loops leave out uvloop",
    )


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    if config.getoption("executors") == "all":
        return
    left_out = [item for item in items if not _is_of_the_few(item)]
    items[:] = [item for item in items if _is_of_the_few(item)]
    config.hook.pytest_deselected(items=left_out)


def _is_of_the_few(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    if callspec is None:
        return True
    kind = callspec.params.get("executor", FEW[0])
    return kind in FEW and "asyncio+uvloop" not in callspec.id


# One way of an embedded server, and one of a client.
FEW = ("embedded, entered", "client, entered")


def _eager_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined, unused-ignore]
    return loop


ASYNCIO = pytest.param(("asyncio", {}), id="asyncio")
TRIO = pytest.param(("trio", {}), id="trio")
FLAVOURS = [
    ASYNCIO,
    pytest.param(("asyncio", {"use_uvloop": True}), id="asyncio+uvloop"),
    pytest.param(
        ("asyncio", {"loop_factory": _eager_loop}),
        id="asyncio+eager",
        marks=pytest.mark.skipif(
            sys.version_info < (3, 12), reason="eager tasks came with Python 3.12"
        ),
    ),
    TRIO,
]
# For tests whose promise does not depend on the flavour of the loop, and that take long.
each_backend = pytest.mark.parametrize("anyio_backend", [ASYNCIO, TRIO])


@pytest.fixture(params=FLAVOURS)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


# The methods of FakeServer that ask the file system or a socket.
FAKE_SERVER = {"_order", "starts", "inputs", "__enter__", "__exit__"}


class _AnyAsyncLibrary:
    """Stands in for asyncio in blockbuster, which by itself does not know trio."""

    @staticmethod
    def get_running_loop() -> object:
        try:
            return asyncio.get_running_loop()
        except RuntimeError:
            pass
        try:
            return sniffio.current_async_library()
        except sniffio.AsyncLibraryNotFoundError:
            raise RuntimeError("nothing async is running in this thread") from None


@pytest.fixture(autouse=True)
def blockbuster(monkeypatch: pytest.MonkeyPatch) -> Iterator[BlockBuster]:
    """A blocking call of ours in async code fails the test, under trio too."""
    monkeypatch.setattr("blockbuster.blockbuster.asyncio", _AnyAsyncLibrary)
    with blockbuster_ctx(
        scanned_modules=[stepflow_runtime], excluded_modules=["logging"]
    ) as blocking:
        # A look at a file of which it is known that it waits for no other machine.
        blocking.functions["os.stat"].can_block_in(
            "stepflow_runtime/flows.py", "stat_key"
        )
        # Says so, and is meant for tests.
        for function in blocking.functions.values():
            function.can_block_in("stepflow_runtime/testing/fake.py", FAKE_SERVER)
        yield blocking


@pytest.fixture(scope="session", autouse=True)
def _prepared_process() -> None:
    """Make orphans our children, so that a worker whose server is gone is still seen.

    And let libuv open the pipe that it keeps for ever once a loop has run.
    """
    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)
    loop = uvloop.new_event_loop()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    # What is there already need not be looked through after each test.
    gc.collect()
    gc.freeze()


def processes_left() -> list[str]:
    left = []
    for child in psutil.Process().children(recursive=True):
        try:
            if child.status() == psutil.STATUS_ZOMBIE and child.ppid() == os.getpid():
                os.waitpid(child.pid, os.WNOHANG)  # an orphan that we adopted
            else:
                left.append(f"{child.pid} {child.status()} {child.cmdline()}")
        except (psutil.Error, ChildProcessError):
            continue
    return left


def open_descriptors() -> dict[int, str]:
    descriptors = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            descriptors[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the listing's own
    return descriptors


@pytest.fixture(autouse=True)
def _leave_nothing_behind(_prepared_process: None) -> Iterator[None]:
    """After each test: no process and no descriptor that was not there before."""
    before = open_descriptors()
    yield
    gc.collect()
    left = processes_left()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            child.kill()  # one failure is enough
    assert left == []
    # Threads of ours, and of libraries, need a moment to close what was theirs.
    deadline = time.monotonic() + 2
    while (kept := opened_since(before)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert kept == {}


def opened_since(before: dict[int, str]) -> dict[int, str]:
    after = open_descriptors()
    return {fd: what for fd, what in after.items() if before.get(fd) != what}


async def wait_until(condition: Callable[[], object]) -> None:
    """Wait for something that other processes do, and that nothing tells us of."""
    with anyio.fail_after(15):
        while not condition():  # noqa: ASYNC110
            await anyio.sleep(0.005)


def freeze(runtime: stepflow_runtime.StepflowRuntime) -> None:
    """Stop the server as a debugger does, and wait until it has stopped."""
    freeze_process(psutil.Process(runtime.pid))


def freeze_process(process: psutil.Process) -> None:
    process.suspend()
    deadline = time.monotonic() + 15
    while process.status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def fake_server(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a shell script that stands in for the server binary."""

    def make(script: str) -> Path:
        path = tmp_path / "fake-server"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    return make


@pytest.fixture(scope="session")
def real_binary() -> Path:
    return find_binary(None, {})


@pytest.fixture
def worker_env() -> dict[str, str]:
    """An environment in which ``python3`` is the interpreter that runs the tests."""
    return {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
