"""Processes, sessions and signals: facts of the operating system, on real processes."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from weakref import WeakSet

import anyio
import anyio.to_thread
import psutil
import pytest
from blockbuster import BlockBuster

from stepflow_runtime.errors import ServerStartError
from stepflow_runtime.server import process as process_module
from stepflow_runtime.server.options import MAX_CONFIG, Command
from stepflow_runtime.server.platform import linux, spawn
from stepflow_runtime.server.process import ServerProcess

from .conftest import each_backend, open_descriptors, processes_left, wait_until

COMMAND = Command(argv=(), env={"PATH": os.environ["PATH"]}, stdin=None)

pytestmark = pytest.mark.anyio


def ready(process: ServerProcess) -> bool:
    """True once the script has written something."""
    if process.stdout.read(0):
        HEARD.add(process)
    return process in HEARD


HEARD: WeakSet[ServerProcess] = WeakSet()


@each_backend
async def test_standard_input_is_what_was_given(
    fake_server: Callable[[str], Path], tmp_path: Path
) -> None:
    """And when the server has read it, nothing is left for its workers to read."""
    for size in (0, 100, 300_000, MAX_CONFIG):  # a pipe holds 64 KiB, by itself
        content = os.urandom(size)
        command = Command(argv=(), env=COMMAND.env, stdin=content)
        script = fake_server(f"cat > {tmp_path}/copy; sh -c 'cat /proc/$PPID/fd/0'")
        process = await ServerProcess.spawn(script, command)
        await process.wait_exit()
        assert process.stdout.read() == b""
        assert await process.end(lambda: 0) == 0
        assert (tmp_path / "copy").read_bytes() == content
        process.close()


@each_backend
async def test_the_session_is_its_own_and_swept_whole(
    fake_server: Callable[[str], Path], tmp_path: Path
) -> None:
    """Children in groups of their own, one that forks on, one that was orphaned."""
    script = fake_server(
        "set -m\n"
        "sleep 100 &\n"
        "(sleep 100 &)\n"
        "sh -c 'trap \"\" TERM INT HUP; sleep 100 & wait' &\n"
        "echo ready\n"
        "wait"
    )
    process = await ServerProcess.spawn(script, COMMAND)
    assert os.getsid(process.pid) == process.pid != os.getsid(0)
    await wait_until(lambda: ready(process) and len(processes_left()) >= 5)
    os.kill(process.pid, signal.SIGKILL)
    await process.wait_exit()
    assert await process.end(lambda: 5) == -signal.SIGKILL
    assert processes_left() == []
    process.close()


@each_backend
async def test_a_fork_bomb_of_a_worker_is_swept_too(
    fake_server: Callable[[str], Path],
) -> None:
    script = fake_server("sh -c 'while :; do (sleep 100 &) ; sleep 0.01; done' &\nwait")
    process = await ServerProcess.spawn(script, COMMAND)
    await wait_until(lambda: len(processes_left()) > 10)
    assert await process.end(lambda: 0) == -signal.SIGKILL
    assert processes_left() == []
    process.close()


@each_backend
async def test_a_lost_sigterm_is_repeated(
    fake_server: Callable[[str], Path], tmp_path: Path
) -> None:
    """A server that is still putting its signal handling together loses the first ones."""
    script = fake_server(
        f"trap 'echo x >> {tmp_path}/terms; "
        f"[ $(wc -l < {tmp_path}/terms) = 5 ] && exit 0' TERM\n"
        "echo ready; while :; do sleep 0.01; done"
    )
    process = await ServerProcess.spawn(script, COMMAND)
    await wait_until(lambda: ready(process))
    assert await process.end(lambda: 30) == 0
    assert (tmp_path / "terms").read_text() == "x\n" * 5
    process.close()


@each_backend
async def test_ending_is_bounded_and_can_be_repeated(
    fake_server: Callable[[str], Path],
) -> None:
    script = fake_server("trap '' TERM; echo ready; while :; do sleep 0.01; done")
    process = await ServerProcess.spawn(script, COMMAND)
    await wait_until(lambda: ready(process))
    began = anyio.current_time()
    assert await process.end(lambda: 0.2) == -signal.SIGKILL
    assert anyio.current_time() - began >= 0.2
    assert await process.end(lambda: 0.2) == -signal.SIGKILL
    process.close()


@each_backend
async def test_a_stranger_that_reaped_our_child_costs_nobody_else_anything(
    fake_server: Callable[[str], Path],
) -> None:
    """Once reaped, the pid can be anybody's: it must not be signalled or swept."""
    process = await ServerProcess.spawn(fake_server("exit 3"), COMMAND)
    await process.wait_exit()
    os.waitpid(process.pid, os.WNOHANG)  # noqa: ASYNC222
    assert await process.end(lambda: 1) == 255  # the code is lost with the zombie
    process.close()


def test_a_process_that_cannot_be_executed_leaves_no_descriptor(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\x7fELF")
    (tmp_path / "x").chmod(0o755)
    for _ in range(3):
        with pytest.raises(OSError, match="Exec format"):
            spawn(tmp_path / "x", COMMAND)


@each_backend
async def test_descriptors_are_not_inherited_by_other_children(
    fake_server: Callable[[str], Path],
) -> None:
    before = open_descriptors()
    process = await ServerProcess.spawn(fake_server("exec sleep 100"), COMMAND)
    own = open_descriptors().keys() - before.keys()
    assert own and not any(os.get_inheritable(fd) for fd in own)
    assert await process.end(lambda: 1) == -signal.SIGTERM
    process.close()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("delay", [0.0, 0.05])
async def test_a_spawn_that_nobody_waits_for_any_more_is_undone(
    fake_server: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    delay: float,
) -> None:
    """asyncio's own cancellation does not wait for the thread that spawns."""

    def slow_spawn(binary: Path, command: Command) -> object:
        if delay:
            time.sleep(delay)
        child = spawn(binary, command)
        if not delay:
            time.sleep(0.05)
        spawned.append(child.pid)
        return child

    spawned: list[int] = []
    monkeypatch.setattr(process_module, "spawn", slow_spawn)
    task = asyncio.ensure_future(
        ServerProcess.spawn(fake_server("exec sleep 100"), COMMAND)
    )
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await wait_until(lambda: spawned and not processes_left())
    assert not psutil.pid_exists(spawned[0])


@each_backend
async def test_a_missing_binary_is_a_start_error(tmp_path: Path) -> None:
    with pytest.raises(ServerStartError, match="cannot be executed"):
        await ServerProcess.spawn(tmp_path / "nope", COMMAND)


@each_backend
async def test_without_pidfds_a_thread_waits(
    fake_server: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a kernel before 5.3."""
    monkeypatch.setattr(linux, "_HAS_PIDFD", False)
    script = fake_server(
        "sleep 100 & trap '' TERM; echo ready; while :; do sleep 0.01; done"
    )
    process = await ServerProcess.spawn(script, COMMAND)
    await wait_until(lambda: ready(process))
    with anyio.move_on_after(0.1) as waited:
        await process.wait_exit()
    assert waited.cancelled_caught
    assert await process.end(lambda: 0.2) == -signal.SIGKILL
    assert processes_left() == []
    process.close()


@each_backend
async def test_a_member_that_may_not_be_killed_does_not_save_the_others(
    fake_server: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that became another user (sudo)."""

    def refuse_once(pidfd: int, number: int) -> None:
        if not refused:
            refused.append(pidfd)
            raise PermissionError
        send(pidfd, number)

    refused: list[int] = []
    send = signal.pidfd_send_signal
    script = fake_server("sleep 100 & sleep 100 & sleep 100 & wait")
    process = await ServerProcess.spawn(script, COMMAND)
    await wait_until(lambda: len(processes_left()) >= 4)
    monkeypatch.setattr(signal, "pidfd_send_signal", refuse_once)
    await process.end(lambda: 0)
    assert refused
    assert processes_left() == []
    process.close()


@each_backend
async def test_a_program_out_of_descriptors_still_ends_its_server(
    fake_server: Callable[[str], Path],
) -> None:
    script = fake_server(
        "trap '' TERM; sleep 100 & echo ready; while :; do sleep 0.01; done"
    )
    process = await ServerProcess.spawn(script, COMMAND)
    await wait_until(lambda: ready(process))
    hoard = []
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                hoard.append(os.open(os.devnull, os.O_RDONLY))
        assert await process.end(lambda: 0.1) == -signal.SIGKILL
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in hoard:
            os.close(fd)
    assert processes_left() == []
    process.close()


@each_backend
async def test_a_program_out_of_threads_still_ends_its_server(
    fake_server: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    blockbuster: BlockBuster,
) -> None:
    async def no_thread(*args: object, **kwargs: object) -> None:
        raise RuntimeError("can't start new thread")

    blockbuster.deactivate()  # there is no other way left than to block
    script = fake_server("sleep 100 & wait")
    process = await ServerProcess.spawn(script, COMMAND)
    await wait_until(lambda: len(processes_left()) >= 2)
    monkeypatch.setattr(process_module, "run_blocking", no_thread)
    assert await process.end(lambda: 0) == -signal.SIGKILL
    assert processes_left() == []
    process.close()


@each_backend
async def test_the_programs_own_threads_do_not_delay_the_end(
    fake_server: Callable[[str], Path],
) -> None:
    """All threads of anyio's default limit are busy for as long as the test lasts."""
    free = threading.Event()
    limiter = anyio.to_thread.current_default_thread_limiter()
    async with anyio.create_task_group() as tasks:
        for _ in range(int(limiter.total_tokens)):
            tasks.start_soon(partial(anyio.to_thread.run_sync, free.wait))
        await anyio.wait_all_tasks_blocked()
        with anyio.fail_after(10):
            script = fake_server("exec sleep 100")
            process = await ServerProcess.spawn(script, COMMAND)
            assert await process.end(lambda: 1) == -signal.SIGTERM
            process.close()
        free.set()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("pause", [0.0, 0.01, 0.05])
async def test_an_end_that_is_interrupted_begins_again(
    fake_server: Callable[[str], Path], pause: float
) -> None:
    """No shield stops asyncio's own cancellation, however often it comes."""
    script = fake_server(
        "trap '' TERM; sleep 100 & echo ready; while :; do sleep 0.01; done"
    )
    process = await ServerProcess.spawn(script, COMMAND)
    await wait_until(lambda: ready(process))
    task = asyncio.ensure_future(process.end(lambda: 0.3))
    for _ in range(4):
        await asyncio.sleep(pause)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert processes_left() == []
    process.close()


IN_A_CONTAINER = """
import os, signal, sys, time
from stepflow_runtime import RestartPolicy, StepflowRuntime
from stepflow_runtime.server import restart
restart.FRESH_AFTER = 0
assert os.getpid() == 1
def others():
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and name != "1"]
with StepflowRuntime.start(
    binary=sys.argv[1], restart_policy=RestartPolicy.ALWAYS, max_restarts=9
) as runtime:
    for crashes in range(1, 4):
        os.kill(runtime.pid, signal.SIGKILL)
        while runtime.restarts < crashes or runtime.state.value != "ready":
            time.sleep(0.01)
    # The server, its four workers, and the guard: nobody of the earlier ones.
    print(len(others()))
print(len(others()))
"""


def test_the_first_process_of_a_container_reaps_what_falls_to_it(
    fake_server: Callable[[str], Path], real_binary: Path
) -> None:
    """Orphans become its children: swept, they would pile up as zombies."""
    unshare = ["unshare", "--pid", "--fork", "--mount-proc"]
    if os.getuid() != 0:
        unshare += ["--user", "--map-root-user"]
    if subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode:
        pytest.skip("a PID namespace cannot be made here")
    script = fake_server(
        "sleep 1000 & sh -c 'sleep 1000 & sleep 1000 & wait' &\n"
        f'exec {real_binary} "$@"'
    )
    program = [sys.executable, "-c", IN_A_CONTAINER, str(script)]
    done = subprocess.run(
        [*unshare, *program], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["6", "0"], done.stderr
