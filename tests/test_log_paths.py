"""Where the lines of a real server go, under every LogConfig, and in every end."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from blockbuster import BlockBuster

from stepflow_runtime import (
    LogConfig,
    LogEntry,
    RestartPolicy,
    RunStatus,
    RuntimeState,
    ServerStartError,
    StepflowRuntime,
)
from stepflow_runtime.logs.entry import decode
from stepflow_runtime.logs.files import LogFile
from stepflow_runtime.server import supervisor

from .conftest import ECHO, SLEEP, each_backend, freeze, wait_until

pytestmark = pytest.mark.anyio


async def live(config: LogConfig) -> tuple[list[LogEntry], str]:
    """One life of a server, with a run in it; return its recent logs and the run's id."""
    async with StepflowRuntime.start(log_config=config) as runtime:
        result = await runtime.run(ECHO, 1)
        # A server that is stopped in its first moments ends without a word.
        await anyio.sleep(0.5)
    return runtime.get_recent_logs(10_000), result.run_id


def is_last_of(run_id: str) -> Callable[[str], bool]:
    return lambda text: f"Items execution completed: run_id={run_id}" in text


# -- the table of the ways -------------------------------------------------------------


@each_backend
async def test_captured_lines_are_entries_and_records_and_nothing_is_printed(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(1, "stepflow.server")
    began = datetime.now(UTC)
    entries, run_id = await live(LogConfig(level="trace"))
    last = [entry for entry in entries if is_last_of(run_id)(entry.message)]
    (of_run,) = last
    assert of_run.level == "INFO"
    assert of_run.run_id == run_id
    assert of_run.target.startswith("stepflow_")
    assert of_run.file is not None and of_run.file.endswith(".rs")
    assert of_run.line is not None
    (begun,) = (e for e in entries if e.message.startswith("Starting items execution"))
    assert begun.run_id == run_id
    assert None not in (begun.flow_id, begun.trace_id, begun.span_id)
    assert begun.extra == {"diags": {"sampled": True}}
    assert timedelta(0) <= of_run.timestamp - began < timedelta(minutes=1)
    assert {"TRACE", "DEBUG", "INFO"} <= {entry.level for entry in entries}
    records = [r for r in caplog.records if r.name == "stepflow.server"]
    assert [r.stepflow for r in records] == entries  # type: ignore[attr-defined]
    assert {r.levelname for r in records} >= {"TRACE", "DEBUG", "INFO"}
    assert capfd.readouterr() == ("", "")


async def test_the_level_is_the_servers() -> None:
    entries, _ = await live(LogConfig(level="error", python_logger=None))
    assert entries == []
    entries, _ = await live(LogConfig(level="warn", python_logger=None))
    assert {entry.level for entry in entries} <= {"WARN", "ERROR"}


@each_backend
async def test_captured_lines_are_written_to_the_file_as_json(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "server.log"
    path.write_text('{"message":"of an earlier life"}\n')
    entries, run_id = await live(LogConfig(file_path=path))
    earlier, *lines = path.read_bytes().splitlines()
    assert json.loads(earlier) == {"message": "of an earlier life"}
    assert [decode(line, "stdout") for line in lines] == entries
    assert any(is_last_of(run_id)(line.decode()) for line in lines)
    assert capfd.readouterr() == ("", "")


async def test_captured_lines_are_written_to_the_file_as_text(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    entries, run_id = await live(LogConfig(file_path=path, format="text"))
    lines = path.read_text().splitlines()
    assert len(lines) == len(entries)
    for line, entry in zip(lines, entries, strict=True):
        assert re.match(rf"\d{{4}}-\d\d-\d\dT\S+ +{entry.level} {entry.target}: ", line)
        assert entry.message in line
    assert entries[0].run_id is None and entries[0].target == "stepflow_server"
    assert any(is_last_of(run_id)(line) for line in lines)


@pytest.mark.parametrize("kind", ["json", "text"])
@each_backend
async def test_lines_that_are_not_captured_go_to_standard_error_as_they_are(
    kind: Any, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(1, "stepflow.server")
    entries, run_id = await live(LogConfig(capture=False, format=kind))
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert any(is_last_of(run_id)(line) for line in lines)
    assert not any('"port"' in line for line in lines)  # that one was for us
    if kind == "json":
        assert all(json.loads(line)["timestamp"] for line in lines)
        assert [decode(line.encode(), "stdout") for line in lines] == entries
    else:
        assert all(re.match(r"\d{4}-\d\d-\d\dT\S+ +[A-Z]+ ", line) for line in lines)
        # What error messages quote.
        assert [entry.message for entry in entries] == lines
    assert [r for r in caplog.records if r.name == "stepflow.server"] == []


@pytest.mark.parametrize("kind", ["json", "text"])
async def test_lines_that_are_not_captured_go_to_the_file_if_there_is_one(
    kind: Any,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(1, "stepflow.server")
    path = tmp_path / "server.log"
    _, run_id = await live(LogConfig(capture=False, format=kind, file_path=path))
    lines = path.read_text().splitlines()
    assert any(is_last_of(run_id)(line) for line in lines)
    assert all(line.startswith("{") == (kind == "json") for line in lines)
    assert capfd.readouterr() == ("", "")
    assert [r for r in caplog.records if r.name == "stepflow.server"] == []


@pytest.mark.parametrize(
    "where", ["a missing directory", "a directory", "a file below"]
)
@each_backend
async def test_a_file_that_cannot_be_written_is_an_error_at_start(
    tmp_path: Path, where: str
) -> None:
    """The server would start, and log nothing."""
    (tmp_path / "file").touch()
    path = {
        "a missing directory": tmp_path / "missing" / "log",
        "a directory": tmp_path,
        "a file below": tmp_path / "file" / "log",
    }[where]
    with pytest.raises(ServerStartError, match="log_config.file_path") as caught:
        async with StepflowRuntime.start(log_config=LogConfig(file_path=path)):
            pytest.fail("started")
    assert str(path) in str(caught.value)
    assert caught.value.exit is None


async def test_a_disk_that_is_full_is_reported_once_and_stops_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with StepflowRuntime.start(
        log_config=LogConfig(file_path="/dev/full")
    ) as runtime:
        for number in range(20):
            assert (await runtime.run(ECHO, number)).output == number
            await anyio.sleep(0.005)
    own = [r for r in caplog.records if r.name == "stepflow_runtime"]
    outage, end = (record.getMessage() for record in own)
    assert "'/dev/full' cannot be written to" in outage
    assert "No space left on device" in outage
    assert re.search(r"until its end; \d+ log lines were lost", end)
    assert runtime.state is RuntimeState.STOPPED
    assert len(runtime.get_recent_logs(1000)) > 100


async def test_a_file_that_was_rotated_away_is_opened_anew(tmp_path: Path) -> None:
    path, old = tmp_path / "server.log", tmp_path / "server.log.1"
    async with StepflowRuntime.start(log_config=LogConfig(file_path=path)) as runtime:
        first = await runtime.run(ECHO, 1)
        await wait_until(lambda: is_last_of(first.run_id)(path.read_text()))
        path.rename(old)
        second = await runtime.run(ECHO, 2)
        await wait_until(path.exists)
        await wait_until(lambda: is_last_of(second.run_id)(path.read_text()))
    assert first.run_id not in path.read_text()
    assert len(old.read_text().splitlines() + path.read_text().splitlines()) == len(
        runtime.get_recent_logs(10_000)
    )


@each_backend
async def test_a_file_that_cannot_be_closed_holds_up_no_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file server does not answer any more."""
    close, free, closed = LogFile.close, threading.Event(), threading.Event()

    def hang(file: LogFile) -> None:
        free.wait(60)
        close(file)
        closed.set()

    monkeypatch.setattr(LogFile, "close", hang)
    monkeypatch.setattr(supervisor, "_CLOSE_TIMEOUT", 0.1)
    with anyio.fail_after(20):
        async with StepflowRuntime.start(
            log_config=LogConfig(file_path=tmp_path / "x")
        ):
            pass
    free.set()
    await wait_until(closed.is_set)


async def test_a_relative_path_is_where_the_start_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "later").mkdir()
    monkeypatch.chdir(tmp_path)
    config = LogConfig(file_path="server.log")
    async with StepflowRuntime.start(log_config=config) as runtime:
        monkeypatch.chdir(tmp_path / "later")
        result = await runtime.run(ECHO, 1)
        log = tmp_path / "server.log"
        await wait_until(lambda: is_last_of(result.run_id)(log.read_text()))
    assert list((tmp_path / "later").iterdir()) == []


# -- looking and following -------------------------------------------------------------


@each_backend
async def test_a_run_can_be_followed_live() -> None:
    async with StepflowRuntime.start() as runtime:
        other = await runtime.run(ECHO, 0)
        follower = runtime.logs(run_id=None)
        run_id = await runtime.submit(SLEEP, 300)
        seen = []
        with anyio.fail_after(20):
            async for entry in runtime.logs(run_id=run_id, recent=1000):
                seen.append(entry)
                if is_last_of(run_id)(entry.message):
                    break
        assert {entry.run_id for entry in seen} == {run_id}
        assert "Starting items execution" in seen[0].message
        assert seen == runtime.get_recent_logs(1000, run_id=run_id)
        assert runtime.get_recent_logs(run_id=other.run_id)
        steps = runtime.get_recent_logs(run_id=run_id, step_id="a")
        assert all(entry.step_id == "a" for entry in steps)
    # It ends with the runtime, and has had everything since it began.
    followed = [entry async for entry in follower]
    assert follower.lost == 0
    assert followed == runtime.get_recent_logs(len(followed))
    assert any("Graceful shutdown" in entry.message for entry in followed)


async def test_those_who_follow_a_runtime_that_never_starts_come_to_an_end() -> None:
    runtime = StepflowRuntime.start(binary="/nonexistent")
    with pytest.raises(ServerStartError):
        async with runtime:
            pass
    assert [entry async for entry in runtime.logs()] == []
    stopped = StepflowRuntime.start()
    stopped.stop()
    assert [entry async for entry in stopped.logs(recent=5)] == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"limit": -1}, "limit must be"),
        ({"limit": 1.5}, "limit must be"),
        ({"level": "loud"}, "level must be one of trace"),
    ],
)
def test_what_cannot_be_asked_of_the_log_is_refused(
    wrong: dict[str, Any], message: str
) -> None:
    with StepflowRuntime.start() as runtime:
        with pytest.raises((ValueError, TypeError), match=message):
            runtime.get_recent_logs(**wrong)
        renamed = {"recent" if name == "limit" else name: wrong[name] for name in wrong}
        with pytest.raises(
            (ValueError, TypeError), match=message.replace("limit", "recent")
        ):
            runtime.logs(**renamed)


# -- held up, flooded, killed ----------------------------------------------------------


@each_backend
async def test_a_blocked_event_loop_does_not_stall_a_batch(
    blockbuster: BlockBuster,
) -> None:
    """The server writes some ten times of what a pipe holds meanwhile."""
    blockbuster.deactivate()
    async with StepflowRuntime.start() as runtime:
        batch = await runtime.submit_batch(ECHO, range(5000))
        deadline = time.monotonic() + 60
        while not any(  # a busy event loop, as it would be with work of the user's
            is_last_of(batch)(entry.message)
            for entry in runtime.get_recent_logs(50, run_id=batch)
        ):
            assert time.monotonic() < deadline
        # Its counts can be twice the items, right after the end.
        assert (await runtime.get_run(batch)).status is RunStatus.COMPLETED


FLOOD = """
import os, sys, time
line = b'{"timestamp":"2026-11-23T18:09:17.046463+00:00","level":"INFO","message":"%d"}\\n'
out = sys.stdout.buffer
out.write(b'{"port":%d}\\n' % int(sys.argv[1]))
out.flush()
for number in range(300_000):
    out.write(line % number)
out.flush()
time.sleep(600)
"""


@each_backend
async def test_other_tasks_have_their_turn_while_a_flood_comes_in(
    fake_server: Callable[[str], Path], tmp_path: Path
) -> None:
    """24 MB, of which the ring keeps the newest lines."""
    (tmp_path / "flood.py").write_text(FLOOD)
    async with StepflowRuntime.start() as real:
        # Somebody has to answer the health requests.
        flood = f"exec {sys.executable} {tmp_path}/flood.py {real.port}"
        turns = 0
        async with StepflowRuntime.start(
            binary=fake_server(flood), port=real.port
        ) as runtime:
            while not any(e.message == "299999" for e in runtime.get_recent_logs(1)):
                await anyio.sleep(0.001)
                turns += 1
            kept = [int(e.message) for e in runtime.get_recent_logs(2000)]
    assert kept == [*range(298_000, 300_000)]
    assert turns > 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGABRT])
@each_backend
async def test_the_lines_of_a_dying_server_are_there_before_on_crash(
    number: signal.Signals,
) -> None:
    """Everything that reached the pipe: while the server is frozen nothing is added."""
    seen: list[LogEntry] = []

    def on_crash(code: int) -> None:
        seen.extend(runtime.get_recent_logs(100_000))

    config = LogConfig(level="trace", keep=100_000)
    async with StepflowRuntime.start(
        on_crash=on_crash, log_config=config, health_interval=600
    ) as runtime:
        runs = [(await runtime.run(ECHO, each)).run_id for each in range(50)]
        assert runtime.pid is not None
        if number is signal.SIGKILL:
            freeze(runtime)
        os.kill(runtime.pid, number)
        await wait_until(lambda: seen)
        assert runtime.last_exit is not None
        tail = list(runtime.last_exit.recent_logs)
    assert seen == runtime.get_recent_logs(100_000)
    assert tail == seen[-100:]
    for run_id in runs:
        assert any(is_last_of(run_id)(entry.message) for entry in seen)
    if number is signal.SIGTERM:
        assert any("Received SIGTERM" in entry.message for entry in seen)


@each_backend
async def test_a_grandchild_that_keeps_the_pipe_open_does_not_hang_us(
    fake_server: Callable[[str], Path], real_binary: Path, tmp_path: Path
) -> None:
    """It has left the session, and has both pipes."""
    leaver = f"setsid sleep 600 & echo $! > {tmp_path}/pid"
    binary = fake_server(f'{leaver}\nexec {real_binary} "$@"')
    codes: list[int] = []
    try:
        async with StepflowRuntime.start(
            binary=binary, on_crash=codes.append
        ) as runtime:
            result = await runtime.run(ECHO, 1)
            assert runtime.pid is not None
            os.kill(runtime.pid, signal.SIGKILL)
            with anyio.fail_after(10):
                await wait_until(lambda: codes)
    finally:
        stranger = int((tmp_path / "pid").read_text())
        os.kill(stranger, signal.SIGKILL)
        os.waitpid(stranger, 0)  # noqa: ASYNC222 - an orphan, our child
    entries = runtime.get_recent_logs(1000)
    assert any(is_last_of(result.run_id)(entry.message) for entry in entries)


# -- secrets ---------------------------------------------------------------------------


async def test_values_of_the_environment_and_of_variables_are_in_no_message_of_ours(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(1, "stepflow_runtime")
    secret = "s3cr3t-value"
    told: list[object] = []
    runtime = StepflowRuntime.start(
        env={"API_KEY": secret}, restart_policy=RestartPolicy.ON_FAILURE
    )
    async with runtime:
        await runtime.run(ECHO, 1, variables={"token": secret})
        for bad in ({"token": secret, "n": object()}, {"n": math.nan, "s": secret}):
            with pytest.raises((ValueError, TypeError)) as caught:
                await runtime.run(ECHO, 1, variables=bad)
            told.append(caught.value)
        assert runtime.pid is not None
        os.kill(runtime.pid, signal.SIGKILL)
        await wait_until(lambda: runtime.restarts == 1)
        await runtime.wait_ready()
        told += [runtime, runtime.last_exit]
    for options in (
        {"config_path": tmp_path / "missing.yml"},
        {"binary": "/bin/false"},
        {"binary": tmp_path / "missing"},
    ):
        with pytest.raises(ServerStartError) as failed:
            async with StepflowRuntime.start(env={"API_KEY": secret}, **options):
                pass
        told.append(failed.value)
    with pytest.raises((ValueError, TypeError)) as refused:
        StepflowRuntime.start(env={"API_KEY": secret + "\0"})
    told.append(refused.value)
    shown = "".join(f"{each}{each!r}" for each in told) + caplog.text
    assert secret not in shown
