"""Runtimes in other people's processes: web servers, workers of queues, containers.

What docs/how-to/fastapi.md, celery.md and containers.md say is tried with the programs that
they tell of.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import psutil
import pytest

from stepflow_runtime import RunInfo, RunStatus, StepflowClient

from .conftest import EXAMPLES, processes_left

HOW_TO = EXAMPLES.parent / "how-to"
TITLED = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


class Host:
    """A program of somebody else's, with runtimes in it, and what it prints."""

    def __init__(self, *arguments: str, cwd: Path, **env: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=cwd,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []

    def wait_said(self, pattern: str, times: int = 1) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.search(pattern, line):
                times -= 1
                if times == 0:
                    return found[found.re.groups]
        pytest.fail(f"ended without {pattern!r}: {''.join(self.lines)}")

    def servers(self) -> list[psutil.Process]:
        """The Stepflow servers in there, the oldest first."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return sorted(
            (each for each in children if each.name() == "stepflow-server"),
            key=psutil.Process.create_time,
        )

    def end(self, number: signal.Signals = signal.SIGTERM) -> str:
        """Send a signal, wait for the end, and return all that was printed."""
        self.process.send_signal(number)
        self.lines.append(self.process.communicate(timeout=30)[0])
        return "".join(self.lines)


@contextmanager
def hosted(*arguments: str, cwd: Path, **env: str) -> Iterator[Host]:
    host = Host(*arguments, cwd=cwd, **env)
    try:
        yield host
    finally:
        with host.process:
            host.process.kill()


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_over(process: psutil.Process) -> bool:
    processes_left()  # reaps it, if it is an orphan, which we have adopted
    return not process.is_running()


def nothing_is_left() -> bool:
    return processes_left() == []


@pytest.mark.parametrize(
    ("page", "folder"),
    [("fastapi.md", "fastapi_app"), ("celery.md", "celery_app")],
)
def test_the_page_shows_the_files_as_they_are(page: str, folder: str) -> None:
    shown = dict(TITLED.findall((HOW_TO / page).read_text(encoding="utf-8")))
    files = {
        each.name: each.read_text(encoding="utf-8")
        for each in (EXAMPLES / folder).iterdir()
        if each.is_file()
    }
    assert shown == files


# -- web servers -----------------------------------------------------------------------

APP = EXAMPLES / "fastapi_app"
UVICORN = ("-m", "uvicorn", "app:app", "--port", "0")
HYPERCORN = ("-m", "hypercorn", "app:app", "--bind", "127.0.0.1:0", "-k")


def runs_of(server: psutil.Process) -> list[RunInfo]:
    port = server.cmdline()[server.cmdline().index("--port") + 1]

    async def ask() -> list[RunInfo]:
        async with StepflowClient(f"http://127.0.0.1:{port}") as client:
            return list(await client.list_runs())

    return anyio.run(ask)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(UVICORN, id="uvicorn"),
        pytest.param((*HYPERCORN, "trio"), id="hypercorn-trio"),
    ],
)
def test_a_web_application_answers_streams_and_cancels(
    command: tuple[str, ...],
) -> None:
    with hosted(*command, cwd=APP) as host:
        url = host.wait_said(r"[Rr]unning on (http://[\d.:]+)")
        with httpx.Client(base_url=url, timeout=15) as client:
            answer = client.post("/naps", json={"name": "Ada"})
            assert answer.json() == {"rested": {"who": "Ada", "where": "bed"}}
            assert client.get("/ready").json() == {"state": "ready"}

            long = {"name": "Bo", "duration_ms": 60_000}
            run_id = client.post("/runs", json=long).json()["run_id"]
            with client.stream("GET", f"/runs/{run_id}/events") as stream:
                lines = stream.iter_lines()
                assert "event: StepStarted" in iter(
                    lines.__next__, "event: RunCompleted"
                )
                (server,) = host.servers()
                with pytest.raises(httpx.ReadTimeout):
                    client.post("/naps", json=long, timeout=0.3)
                eventually(
                    lambda: RunStatus.CANCELLED in [r.status for r in runs_of(server)]
                )
        printed = host.end()
        assert "Traceback" not in printed
    eventually(nothing_is_left)


def test_a_web_application_outlives_its_server() -> None:
    with hosted(*UVICORN, cwd=APP) as host, ExitStack() as stack:
        url = host.wait_said(r"running on (http://[\d.:]+)")
        client = stack.enter_context(httpx.Client(base_url=url, timeout=15))
        answers: list[httpx.Response] = []

        def take_a_long_nap() -> None:
            nap = {"name": "Bo", "duration_ms": 60_000}
            answers.append(client.post("/naps", json=nap))

        thread = threading.Thread(target=take_a_long_nap)
        thread.start()
        (server,) = host.servers()
        eventually(lambda: runs_of(server))
        server.kill()
        thread.join()
        assert answers[0].status_code == 503
        assert client.post("/naps", json={"name": "Bo"}).status_code == 200
        host.end(signal.SIGINT)
    eventually(nothing_is_left)


def test_each_process_of_a_web_server_has_a_server_of_its_own() -> None:
    """And a killed process takes its own along, and no other."""
    with hosted(*UVICORN, "--workers", "2", cwd=APP) as host:
        url = host.wait_said(r"running on (http://[\d.:]+)")
        host.wait_said("startup complete", times=2)
        first, second = host.servers()
        parent = first.parent()
        assert parent is not None
        parent.kill()
        host.wait_said("startup complete")
        eventually(lambda: is_over(first))
        assert httpx.post(f"{url}/naps", json={"name": "Cy"}).status_code == 200
        assert second.is_running()
        assert len(host.servers()) == 2
        host.end()
    eventually(nothing_is_left)


def test_the_applications_own_tests_pass() -> None:
    arguments: list[Any] = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    # What Starlette says of its test client is its own affair.
    arguments += ["-W", "error", "-W", "ignore:Using `httpx`", APP / "test_app.py"]
    done = subprocess.run(
        [sys.executable, *arguments],
        check=False,
        cwd=APP,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# -- workers of queues -----------------------------------------------------------------

CELERY_APP = EXAMPLES / "celery_app"
CELERY = [*("-m", "celery", "-A", "tasks", "worker", "--concurrency", "2")]
CELERY += ("--without-gossip", "--without-mingle", "--without-heartbeat")
CALLER = """
import celery.exceptions, tasks

print([each.get(timeout=30) for each in [tasks.nap.delay("Ada") for _ in range(5)]])
stuck = tasks.nap.apply_async(("Bo", 60_000), time_limit=1)
try:
    stuck.get(timeout=30)
except celery.exceptions.TimeLimitExceeded:
    print("killed")
print(tasks.nap.delay("Cy").get(timeout=30))
"""


def test_celerys_children_have_servers_that_end_with_them(tmp_path: Path) -> None:
    """Also with a child that Celery kills, at its hard time limit."""
    folder = str(tmp_path)
    with hosted(*CELERY, cwd=CELERY_APP, CELERY_FOLDER=folder) as host:
        caller = Host("-c", CALLER, cwd=CELERY_APP, CELERY_FOLDER=folder)
        assert caller.wait_said(r"(\{.*\})") == ", ".join(5 * ["{'rested': 'Ada'}"])
        eventually(lambda: len(host.servers()) == 2)
        before = host.servers()
        caller.wait_said("killed")
        caller.wait_said("{'rested': 'Cy'}")
        caller.process.communicate(timeout=30)
        eventually(lambda: any(map(is_over, before)) and len(host.servers()) == 2)
        assert not all(map(is_over, before))
        host.end()
    eventually(nothing_is_left)


# -- containers ------------------------------------------------------------------------

# As far as it goes without an engine and without root: the first process of its own
# namespace, under a user id without rights, with a root file system that is read-only.
IN_THERE = 'exec unshare --user --map-user=10001 --map-group=10001 env -i "$@"'
CONTAINER = [*("unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork")]
CONTAINER += ("--mount-proc", "--kill-child")
CONTAINER += ("sh", "-c", f"mount -o remount,bind,ro / && {IN_THERE}", "sh")
CONTAINER += (sys.executable, "-c")
CONTAINED = """
import asyncio, os, psutil, time
from stepflow_runtime import StepflowRuntime

print(os.getpid(), os.getuid(), os.access("/", os.W_OK), "HOME" in os.environ)
try:
    with StepflowRuntime.start(exposure="require-loopback") as runtime:
        print(asyncio.run(runtime.run({"output": 7})).output, flush=True)
        time.sleep(60)
finally:
    print("left", len(psutil.pids()) - 1, flush=True)
"""


def test_what_a_container_has_is_enough_and_sigterm_ends_it_in_good_order() -> None:
    if subprocess.run([*CONTAINER, "pass"], check=False).returncode != 0:
        pytest.skip("no namespaces are to be had here")
    command = [*CONTAINER, CONTAINED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = iter(process.stdout)
        assert next(lines) == "1 10001 False False\n"
        assert next(lines) == "7\n"
        (first,) = psutil.Process(process.pid).children()
        first.terminate()
        assert next(lines) == "left 0\n"
    assert process.returncode == 128 + signal.SIGTERM
