"""What signals do to a program with a runtime: whole programs, each in a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest

from .conftest import freeze_process, processes_left

# Each says READY and the server's pid when it is to be signalled. A `finally` that runs
# says so; what comes after the block must not be reached.
PROGRAMS = {
    "entered": """
        async def main():
            try:
                async with StepflowRuntime.start() as runtime:
                    try:
                        ready(runtime)
                        await anyio.sleep(60)
                    finally:
                        print("body unwound", runtime.state.value)
                print("after the block")
            finally:
                print("program unwound", runtime.state.value)
        anyio.run(main, backend=BACKEND)
    """,
    "nested": """
        async def main():
            async with StepflowRuntime.start() as outer:
                async with StepflowRuntime.start() as runtime:
                    try:
                        ready(outer)
                        await anyio.sleep(60)
                    finally:
                        print("body unwound", runtime.state.value)
                print("after the block")
            print("after the block")
        try:
            anyio.run(main, backend=BACKEND)
        finally:
            print("program unwound", "stopped")
    """,
    "overlapping": """
        async def live(*, task_status):
            async with StepflowRuntime.start() as runtime:
                task_status.started(runtime)
                try:
                    await anyio.sleep(60)
                finally:
                    print("body unwound", runtime.state.value)
        async def main():
            async with anyio.create_task_group() as tasks:
                first = await tasks.start(live)
                second = await tasks.start(live)
                ready(second)
        try:
            anyio.run(main, backend=BACKEND)
        finally:
            print("program unwound", "stopped")
    """,
    "served": """
        async def main():
            async with anyio.create_task_group() as tasks:
                runtime = await tasks.start(StepflowRuntime.start().serve)
                try:
                    ready(runtime)
                    await anyio.sleep(60)
                finally:
                    print("body unwound", "ready")
        try:
            anyio.run(main, backend=BACKEND)
        finally:
            print("program unwound", "stopped")
    """,
    "detached": """
        async def main():
            runtime = await StepflowRuntime.start_async()
            try:
                ready(runtime)
                await anyio.sleep(60)
            finally:
                print("body unwound", runtime.state.value)
        try:
            anyio.run(main, backend=BACKEND)
        finally:
            print("program unwound", "stopped")
    """,
    "sync": """
        try:
            with StepflowRuntime.start() as runtime:
                try:
                    ready(runtime)
                    time.sleep(60)
                finally:
                    print("body unwound", runtime.state.value)
            print("after the block")
        finally:
            print("program unwound", runtime.state.value)
    """,
    "sync around a loop": """
        async def main():
            try:
                ready(runtime)
                await anyio.sleep(60)
            finally:
                print("body unwound", runtime.state.value)
        try:
            with StepflowRuntime.start() as runtime:
                anyio.run(main, backend=BACKEND)
            print("after the block")
        finally:
            print("program unwound", runtime.state.value)
    """,
    "sync, never stopped": """
        runtime = StepflowRuntime.start()
        try:
            ready(runtime)
            time.sleep(60)
        finally:
            print("body unwound", runtime.state.value)
            print("program unwound", "stopped")
    """,
}
HEAD = """
import atexit, asyncio, signal, sys, time
atexit.register(lambda: print("atexit ran"))
import anyio
from stepflow_runtime import StepflowRuntime
BACKEND = sys.argv[1]
def ready(runtime):
    print("READY", runtime.pid, flush=True)
"""
WITHOUT_LOOP = ("sync", "sync, never stopped")
CASES = [
    pytest.param(name, backend, id=f"{name}-{backend}")
    for name in PROGRAMS
    for backend in ("asyncio", "trio")
    if backend == "asyncio" or name not in WITHOUT_LOOP
]


class Program:
    """A program with a runtime, in a process of its own."""

    def __init__(self, source: str, *args: str) -> None:
        source = HEAD + textwrap.dedent(source)
        self.process = subprocess.Popen(
            [sys.executable, "-c", source, *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("READY"):
            self.process.kill()
            pytest.fail(line + self.process.communicate()[1])
        self.server = psutil.Process(int(line.split()[1]))

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def finish(self) -> list[str]:
        """Wait for its end; return the lines that it printed."""
        try:
            out, self.errors = self.process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            pytest.fail("it does not end: " + "".join(self.process.communicate()))
        return out.splitlines()

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


# -- SIGTERM ---------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_sigterm_unwinds_the_program_which_then_dies_of_it(
    name: str, backend: str
) -> None:
    program = Program(PROGRAMS[name], backend)
    program.send(signal.SIGTERM)
    lines = program.finish()
    assert program.process.returncode == -signal.SIGTERM, program.errors
    assert "body unwound ready" in lines
    assert lines[-2] in ("program unwound stopped", "program unwound ready")
    assert lines[-1] == "atexit ran"
    assert "after the block" not in lines
    assert processes_left() == []


def test_a_second_sigterm_changes_nothing() -> None:
    """Some senders signal a process, and then its group."""
    program = Program(
        """
        with StepflowRuntime.start() as runtime:
            try:
                ready(runtime)
                time.sleep(60)
            finally:
                print("unwinding", flush=True)
                time.sleep(0.5)
                print("body unwound")
        """,
        "asyncio",
    )
    program.send(signal.SIGTERM)
    assert program.process.stdout is not None
    assert program.process.stdout.readline() == "unwinding\n"
    program.send(signal.SIGTERM)
    assert program.finish() == ["body unwound", "atexit ran"]
    assert program.process.returncode == -signal.SIGTERM


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_sigterm_during_the_start_ends_it(
    backend: str, fake_server: Callable[[str], Path]
) -> None:
    slow = fake_server("exec sleep 100")
    program = Program(
        f"""
        async def main():
            ready(type("Nobody", (), {{"pid": 1}}))
            async with StepflowRuntime.start(binary={str(slow)!r}):
                print("entered")
        anyio.run(main, backend=BACKEND)
        """,
        backend,
    )
    children = partial(psutil.Process(program.process.pid).children, recursive=True)
    while not any("sleep" in each.name() for each in children()):
        pass
    program.send(signal.SIGTERM)
    assert program.finish() == ["atexit ran"]
    assert program.process.returncode == -signal.SIGTERM, program.errors


def test_where_sigint_is_ignored_sigterm_unwinds_all_the_same() -> None:
    """As for what a shell starts in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which children inherit
    try:
        programs = [
            Program(PROGRAMS[name], "asyncio")
            for name in ("sync", "entered", "detached")
        ]
    finally:
        signal.signal(signal.SIGINT, before)
    for program in programs:
        program.send(signal.SIGTERM)
        assert "body unwound ready" in program.finish()
        assert program.process.returncode == -signal.SIGTERM, program.errors


def test_the_bodys_own_exception_is_seen_and_the_program_dies_of_sigterm() -> None:
    program = Program(
        """
        async def main():
            async with StepflowRuntime.start() as runtime:
                try:
                    ready(runtime)
                    await anyio.sleep(60)
                finally:
                    raise ValueError("of the body")
        anyio.run(main)
        """,
        "asyncio",
    )
    program.send(signal.SIGTERM)
    program.finish()
    assert "ValueError: of the body" in program.errors
    assert program.process.returncode == -signal.SIGTERM


STOPPING = {
    "sync": """
        try:
            with StepflowRuntime.start(shutdown_timeout=1) as runtime:
                ready(runtime)
                sys.stdin.readline()
                print("stopping", flush=True)
        finally:
            print("program unwound", flush=True)
    """,
    "detached": """
        runtime = StepflowRuntime.start(shutdown_timeout=1)
        try:
            ready(runtime)
            sys.stdin.readline()
            print("stopping", flush=True)
            runtime.stop()
        finally:
            print("program unwound", flush=True)
    """,
    "detached in a loop": """
        async def main():
            runtime = await StepflowRuntime.start_async(shutdown_timeout=1)
            try:
                ready(runtime)
                sys.stdin.readline()
                print("stopping", flush=True)
                await runtime.stop_async()
            finally:
                print("program unwound", flush=True)
        anyio.run(main, backend=BACKEND)
    """,
    "entered": """
        async def main():
            try:
                async with StepflowRuntime.start(shutdown_timeout=1) as runtime:
                    ready(runtime)
                    sys.stdin.readline()
                    print("stopping", flush=True)
            finally:
                print("program unwound", flush=True)
        anyio.run(main, backend=BACKEND)
    """,
    "forgotten": """
        runtime = StepflowRuntime.start(shutdown_timeout=1)
        ready(runtime)
        sys.stdin.readline()
        print("stopping", flush=True)
    """,
}


@pytest.mark.parametrize("name", STOPPING)
@pytest.mark.parametrize("times", [1, 2])
def test_sigterm_during_a_stop_waits_for_its_end(name: str, times: int) -> None:
    """The server hears nothing, so that the stop takes its time."""
    program = Program(STOPPING[name], "asyncio")
    freeze_process(program.server)
    assert program.process.stdin is not None
    program.process.stdin.write("\n")
    program.process.stdin.flush()
    assert program.hear() == "stopping"
    time.sleep(0.2)
    for _ in range(times):
        program.send(signal.SIGTERM)
        time.sleep(0.1)
    lines = program.finish()
    assert sorted(lines) == ["atexit ran", "program unwound"][: len(lines)]
    assert len(lines) == (1 if name == "forgotten" else 2), program.errors
    assert program.process.returncode == -signal.SIGTERM


def test_a_program_that_goes_on_after_a_sigterm_hears_the_next_one() -> None:
    """It has caught the SystemExit, on purpose or not."""
    program = Program(
        """
        for number in range(3):
            try:
                with StepflowRuntime.start() as runtime:
                    ready(runtime)
                    time.sleep(60)
            except BaseException as exc:
                print(repr(exc), flush=True)
        """,
        "asyncio",
    )
    for _ in range(3):
        program.send(signal.SIGTERM)
        assert program.hear() == "SystemExit(143)"
        program.hear()  # READY again
    assert program.finish() == []
    assert program.process.returncode == -signal.SIGTERM


def test_a_second_sigterm_later_ends_a_blocked_event_loop() -> None:
    program = Program(
        """
        async def main():
            async with StepflowRuntime.start() as runtime:
                try:
                    ready(runtime)
                    time.sleep(60)
                finally:
                    print("unwound")
        anyio.run(main)
        """,
        "asyncio",
    )
    for _ in range(4):  # somebody who repeats it often is heard, too
        program.send(signal.SIGTERM)
        time.sleep(0.4)
    assert program.finish() == ["unwound", "atexit ran"]
    assert program.process.returncode == -signal.SIGTERM


def test_sigterm_while_the_loop_of_an_entered_runtime_does_not_run() -> None:
    """As between two cells of a notebook, or two tests."""
    program = Program(
        """
        loop = asyncio.new_event_loop()
        async def enter():
            await (runtime := StepflowRuntime.start()).__aenter__()
            return runtime
        runtime = loop.run_until_complete(enter())
        try:
            ready(runtime)
            time.sleep(60)
        finally:
            print("unwound")
        """,
        "asyncio",
    )
    program.send(signal.SIGTERM)
    assert program.finish() == ["unwound", "atexit ran"]
    assert program.process.returncode == -signal.SIGTERM
    # A block that was never left is the guard's affair.
    deadline = time.monotonic() + 15
    while processes_left():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_sigint_handler_of_the_programs_own_hears_of_no_sigterm() -> None:
    program = Program(
        """
        signal.signal(signal.SIGINT, lambda *args: print("mine"))
        async def main():
            runtime = await StepflowRuntime.start_async()
            ready(runtime)
            await anyio.sleep(60)
        anyio.run(main, backend="trio")
        """,
        "trio",
    )
    program.send(signal.SIGTERM)
    assert program.finish() == ["atexit ran"]
    assert program.process.returncode == -signal.SIGTERM


def test_blocked_signals_are_the_programs_and_not_the_servers() -> None:
    """As in programs that block SIGTERM, to wait for it in a thread of its own."""
    program = Program(
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        with StepflowRuntime.start() as runtime:
            ready(runtime)
            sys.stdin.readline()
        print(signal.pthread_sigmask(signal.SIG_BLOCK, ()) == {15, 2})
        """,
        "asyncio",
    )
    status = Path(f"/proc/{program.server.pid}/status").read_text()
    assert "SigBlk:\t0000000000000000" in status
    assert program.process.stdin is not None
    program.process.stdin.close()
    program.process.stdin = None
    assert program.finish() == ["True", "atexit ran"]


def test_a_handler_of_the_programs_own_is_called_and_stays() -> None:
    program = Program(
        """
        heard = []
        def mine(number, frame):
            heard.append("mine")
        signal.signal(signal.SIGTERM, mine)
        with StepflowRuntime.start() as runtime:
            assert signal.getsignal(signal.SIGTERM) is mine
            ready(runtime)
            while not heard:
                time.sleep(0.01)
            print(*heard)
            print(runtime.state.value)
        assert signal.getsignal(signal.SIGTERM) is mine
        """,
        "asyncio",
    )
    program.send(signal.SIGTERM)
    assert program.finish() == ["mine", "ready", "atexit ran"]
    assert program.process.returncode == 0, program.errors


def test_a_handler_of_asyncios_is_called_and_stays() -> None:
    program = Program(
        """
        async def main():
            over = asyncio.Event()
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
            async with StepflowRuntime.start() as runtime:
                ready(runtime)
                await over.wait()
                print(runtime.state.value)
        asyncio.run(main())
        """,
        "asyncio",
    )
    program.send(signal.SIGTERM)
    assert program.finish() == ["ready", "atexit ran"]
    assert program.process.returncode == 0, program.errors


RESTORING = """
def is_default():
    return signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
one = StepflowRuntime.start()
two = StepflowRuntime.start()
print(is_default())
one.stop()
print(is_default())
with StepflowRuntime.start():
    two.stop()
    print(is_default())
print(is_default())
# The program's own, set while ours was there: it stays.
with StepflowRuntime.start():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(signal.getsignal(signal.SIGTERM) == signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
with StepflowRuntime.start(handle_signals=False):
    print(is_default())
    async def main():
        async with StepflowRuntime.start(handle_signals=False):
            print(is_default())
    anyio.run(main)
"""


def run_to_its_end(source: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", HEAD + textwrap.dedent(source), "asyncio"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_handlers_are_restored_with_nested_and_overlapping_runtimes() -> None:
    ours, default = ["False"] * 3, ["True"] * 4
    assert run_to_its_end(RESTORING) == [*ours, *default, "atexit ran"]


def test_no_handler_is_touched_off_the_main_thread() -> None:
    source = """
    import threading
    def live():
        with StepflowRuntime.start():
            print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
        async def main():
            async with StepflowRuntime.start():
                print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
        anyio.run(main)
    thread = threading.Thread(target=live)
    thread.start()
    thread.join()
    """
    assert run_to_its_end(source) == ["True", "True", "atexit ran"]


def test_after_a_stop_in_another_thread_sigterm_kills_as_ever() -> None:
    """Only the main thread can take a handler away: until it does, ours does nothing."""
    program = Program(
        """
        import threading
        runtime = StepflowRuntime.start()
        pid = runtime.pid
        thread = threading.Thread(target=runtime.stop)
        thread.start()
        thread.join()
        ready(type("Nobody", (), {"pid": 1}))
        try:
            time.sleep(60)
        finally:
            print("unwound")
        """,
        "asyncio",
    )
    program.send(signal.SIGTERM)
    assert program.finish() == []
    assert program.process.returncode == -signal.SIGTERM


# -- SIGINT ----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_sigint_is_a_keyboard_interrupt_as_without_us(name: str, backend: str) -> None:
    program = Program(PROGRAMS[name], backend)
    program.send(signal.SIGINT)
    lines = program.finish()
    assert "KeyboardInterrupt" in program.errors
    assert "body unwound ready" in lines
    assert "after the block" not in lines
    assert lines[-1] == "atexit ran"
    assert processes_left() == []


def test_the_terminals_ctrl_c_does_not_reach_the_server() -> None:
    """It goes to the foreground process group; the server is not in ours."""
    program = Program(
        """
        heard = []
        signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
        with StepflowRuntime.start() as runtime:
            ready(runtime)
            while not heard:
                time.sleep(0.01)
            time.sleep(0.2)
            print(runtime.state.value)
        """,
        "asyncio",
    )
    os.killpg(program.process.pid, signal.SIGINT)
    assert program.finish() == ["ready", "atexit ran"]


# -- under web servers -----------------------------------------------------------------

ASGI = """
from contextlib import asynccontextmanager
@asynccontextmanager
async def lifespan():
    async with StepflowRuntime.start() as runtime:
        ready(runtime)
        yield
    print("lifespan ended", runtime.state.value, flush=True)
async def app(scope, receive, send):
    assert scope["type"] == "lifespan"
    await receive()
    async with lifespan():
        await send({"type": "lifespan.startup.complete"})
        await receive()
    await send({"type": "lifespan.shutdown.complete"})
"""
UVICORN = """
import uvicorn
uvicorn.run(app, port=0, log_level="info")
"""
HYPERCORN = """
from hypercorn.config import Config
from hypercorn.asyncio import serve
config = Config()
config.bind = ["127.0.0.1:0"]
asyncio.run(serve(app, config))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "server",
    [pytest.param(UVICORN, id="uvicorn"), pytest.param(HYPERCORN, id="hypercorn")],
)
def test_a_web_servers_own_handling_is_untouched(
    server: str, number: signal.Signals
) -> None:
    """It shuts down its own way, which ends the lifespan, and exits as it does without us."""
    without = Program(
        ASGI.replace("async with StepflowRuntime.start() as runtime:", "if 1:")
        .replace("ready(runtime)", 'ready(type("Nobody", (), {"pid": 1}))')
        .replace("runtime.state.value", '"stopped"')
        + server,
        "asyncio",
    )
    program = Program(ASGI + server, "asyncio")
    endings = []
    for each in (without, program):
        if server == UVICORN:  # it serves, and so has its handlers, when it says where
            assert each.process.stderr is not None
            for line in each.process.stderr:
                if "running on" in line:
                    break
        each.send(number)
        endings.append((each.finish(), each.process.returncode))
    assert endings[0] == endings[1], program.errors
    assert "lifespan ended stopped" in endings[1][0]
    assert processes_left() == []
