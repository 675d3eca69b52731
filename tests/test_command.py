"""The ``stepflow-runtime`` command, as a user runs it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import psutil
import pytest

from stepflow_runtime import LogEntry, RunStatus, StepflowClient
from stepflow_runtime.cli.logs import logs
from stepflow_runtime.cli.output import write_private
from stepflow_runtime.logs.rendering import as_json

from .conftest import EXAMPLES, processes_left
from .terminal import COMMAND
from .test_terminal import documented

NESTED = str(EXAMPLES / "nested.yaml")


def command(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).parent / "stepflow-runtime"), *arguments],
        check=False,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
    )


def unwrapped(text: str) -> str:
    """A message without the box that it is shown in."""
    return " ".join(text.replace("│", " ").split())


def test_run_prints_the_result_as_json() -> None:
    done = command("run", str(EXAMPLES / "greeting.yaml"), "--input", '{"name":"Ada"}')
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["outcome"] == "success"
    assert result["result"]["to"] == "Ada"


@pytest.mark.parametrize("file", [True, False])
def test_the_input_can_come_from_a_file_or_a_pipe(tmp_path: Path, file: bool) -> None:
    (tmp_path / "in.json").write_text('{"value": 3}')
    origin = str(tmp_path / "in.json") if file else "-"
    done = command(
        "run",
        str(EXAMPLES / "nested.yaml"),
        "--input-file",
        origin,
        stdin='{"value": 3}',
    )
    assert json.loads(done.stdout)["result"] == {"inner": {"wrapped": 3}}


def test_variables_and_a_configuration(tmp_path: Path) -> None:
    config = tmp_path / "c.json"
    config.write_text(
        '{"plugins":{"b":{"type":"builtin"}},"routes":{"/":[{"plugin":"b"}]}}'
    )
    done = command(
        *("run", str(EXAMPLES / "variables.yaml"), "-c", str(config)),
        *("-v", "city=Oslo", "-v", 'units="imperial"'),
    )
    result = json.loads(done.stdout)["result"]
    assert result == {"city": "Oslo", "units": "imperial"}


def test_a_failed_flow_is_a_result_too_and_exits_with_1() -> None:
    done = command("run", str(EXAMPLES / "variables.yaml"))
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"] == {
        "code": "EXPRESSION_FAILURE",
        "message": "Undefined variable: city",
    }


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nope.yaml"], 2, "cannot read the workflow file nope.yaml"),
        (["x", "--input", "{"], 2, "--input is not JSON"),
        (["x", "--input", "1", "--input-file", "y"], 2, "not both"),
        (["x", "--input-file", "/nope"], 2, "cannot read /nope"),
        (["x", "-v", "city"], 2, "NAME=VALUE"),
        (["x", "--log-level", "loud"], 2, "level must be one of"),
        (["-", "--input-file", "-"], 2, "cannot both be on stdin"),
        (["x", "--remote", "http://h", "--storage", "s.db"], 2, "not with --remote"),
        (["x", "--remote", "h"], 2, "url must begin with http://"),
        (["x", "--remote", "http://h", "--header-env", "NO_VAR"], 2, "is not set"),
        (["x", "--remote", "http://127.0.0.1:1"], 2, "the workflow file x"),
        ([NESTED, "-c", "/nope.yml"], 3, "Failed to read config file: /nope.yml"),
    ],
)
def test_what_is_wrong_is_told_on_stderr(
    arguments: list[str], code: int, words: str
) -> None:
    done = command("run", *arguments)
    assert done.returncode == code
    assert done.stdout == ""
    assert words in unwrapped(done.stderr)
    assert "Traceback" not in done.stderr


def test_the_flow_can_come_from_a_pipe_and_takes_no_longer_than_it_may() -> None:
    step = {"id": "a", "component": "/sleep", "input": {"duration_ms": 60_000}}
    flow = {"steps": [step], "output": {"$step": "a"}}
    done = command("run", "-", "-q", "--timeout", "0.5", stdin=json.dumps(flow))
    assert (done.returncode, done.stdout) == (4, "")
    assert "not over after 0.5 s, and is cancelled" in done.stderr
    done = command("run", "-", "-q", stdin=f"x: {'y' * 7_000_000}")
    assert done.returncode == 2
    assert "no more are read" in done.stderr


def test_a_report_is_a_page_for_nobody_else(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = command("run", NESTED, "-i", '{"value": 1}', "-q", "--report", str(page))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["runId"] in page.read_text()
    assert page.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [page]


def test_what_is_there_is_replaced_as_a_whole_and_stays_open_to_others(
    tmp_path: Path,
) -> None:
    page, link = tmp_path / "page.html", tmp_path / "link"
    page.write_bytes(b"an older one")
    page.chmod(0o644)
    link.symlink_to(page)
    with page.open("rb") as reader:
        write_private(link, b"new")
        assert reader.read() == b"an older one"
    assert (page.read_bytes(), page.stat().st_mode & 0o777) == (b"new", 0o644)
    assert link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [link, page]
    done = command("run", NESTED, "-q", "--report", str(tmp_path / "no" / "page"))
    assert done.returncode == 2
    assert json.loads(done.stdout)["outcome"] == "failed"  # which it tells all the same


def test_a_failed_flow_says_why_on_stderr(tmp_path: Path) -> None:
    """The result itself says "error routing component", and not which."""
    flow = tmp_path / "flow.yaml"
    flow.write_text("steps: [{id: a, component: /nooop}]\noutput: {$step: a}\n")
    done = command("run", str(flow))
    assert done.returncode == 1
    assert "No matching component for path: /nooop" in done.stderr
    assert "backtrace" not in done.stderr


@pytest.mark.parametrize("file", [True, False])
def test_input_that_is_not_utf_8_is_refused(tmp_path: Path, file: bool) -> None:
    (tmp_path / "in.json").write_bytes(b'"\xe9"')
    option = ("--input-file", str(tmp_path / "in.json")) if file else ("-i", '"\udce9"')
    done = command("run", "x", *option)
    assert done.returncode == 2
    assert "is not JSON" in unwrapped(done.stderr)


def test_findings_are_shown_where_they_are(tmp_path: Path) -> None:
    flow = tmp_path / "flow.yaml"
    flow.write_text(
        "name: n\nsteps:\n  - id: shout\n    component: /noop\n    input:\n"
        "      x: { $step: fetch }\noutput: { $step: shout }\n"
    )
    (tmp_path / "syntax.yaml").write_text("steps: [1,\n  \t'\x1b[2J\n")
    (tmp_path / "list.json").write_text("[]")
    files = [str(tmp_path / name) for name in ("flow.yaml", "syntax.yaml", "list.json")]
    done = command("validate", *files, NESTED)
    assert done.returncode == 1, done.stderr
    assert (
        documented("references undefined step").replace("flow.yaml", str(flow))
        in done.stdout
    )
    assert "syntax.yaml:" in done.stdout
    assert "\x1b" not in done.stdout
    assert "list.json:1:1: fatal: a workflow is a mapping" in done.stdout
    assert "4 files, 3 errors, " in done.stderr
    findings = json.loads(command("validate", "--json", *files).stdout)
    (found,) = (each for each in findings if each["kind"] == "undefinedStepReference")
    assert (found["line"], found["column"], found["path"]) == (
        6,
        10,
        "$.steps[0].input.x",
    )
    done = command("validate", "-", "/nope", stdin="{}")
    assert (done.returncode, done.stdout) == (2, "")


def test_components_are_listed_with_schemas_for_programs() -> None:
    done = command("components")
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("/map "))
    assert line.split()[1:3] == ["builtin", "Apply"]
    found = json.loads(command("components", "--json").stdout)
    (component,) = (each for each in found if each["path"] == "/map")
    assert component["inputSchema"]["type"] == "object"


def lines_of_a_log() -> list[bytes]:
    entry = LogEntry(
        timestamp=datetime(2026, 11, 23, tzinfo=UTC),
        level="INFO",
        message="old",
        stream="stdout",
        run_id="r",
    )
    replace = msgspec.structs.replace
    now = datetime.now(UTC)
    entries = [
        entry,
        replace(entry, level="WARN", message="new \x1b[2J", timestamp=now, step_id="s"),
        replace(entry, level="ERROR", message="other", timestamp=now, run_id="q"),
    ]
    return [as_json(each) + b"\n" for each in entries]


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ({}, ["old", "new \x1b[2J", "other", "no JSON"]),
        ({"level": "warn"}, ["new \x1b[2J", "other"]),
        ({"run": "r", "since": "1h"}, ["new \x1b[2J"]),
        ({"step": "s", "since": "2026-11-23T00:00:00Z"}, ["new \x1b[2J"]),
    ],
)
def test_a_log_file_is_filtered(
    options: dict[str, str],
    messages: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "log"
    file.write_bytes(b"".join([*lines_of_a_log(), b"no JSON"]))
    nothing = dict.fromkeys(("level", "run", "step", "since"))
    logs(str(file), **{**nothing, **options}, follow=False, format="")
    lines = capfd.readouterr().out.splitlines()
    assert [json.loads(line)["message"] for line in lines] == messages


def test_a_log_file_is_followed_over_its_rotation(tmp_path: Path) -> None:
    file = tmp_path / "log"
    old, new, other = lines_of_a_log()
    file.write_bytes(old + new[:20])
    process = subprocess.Popen(
        [COMMAND, "logs", str(file), "--follow", "--format", "text"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert b"old run_id=r" in process.stdout.readline()
    with file.open("ab") as opened:
        opened.write(new[20:])
    assert rb"new \x1b[2J" in process.stdout.readline()
    file.rename(tmp_path / "log.1")
    file.write_bytes(other)
    assert b"ERROR" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == (b"", b"")
    assert process.returncode == 130


OFFLINE = """
import ctypes, fcntl, os, socket, struct, sys
CLONE_NEWUSER, CLONE_NEWNET, SIOCSIFFLAGS, IFF_UP = 0x10000000, 0x40000000, 0x8914, 1
if ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET):
    sys.exit(77)
with socket.socket() as any_socket:
    fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_nothing_is_downloaded_at_run_time() -> None:
    """In a network name space of its own there is nowhere to download from."""
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, sys.executable, "-m", "stepflow_runtime.cli"]
        + ["run", str(EXAMPLES / "nested.yaml"), "-i", '{"value": 1}'],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if done.returncode == 77:
        pytest.skip("network name spaces are not to be had here")
    assert json.loads(done.stdout)["outcome"] == "success", done.stderr


SLEEP_LONG = {
    "steps": [{"id": "a", "component": "/sleep", "input": {"duration_ms": 60_000}}],
    "output": {"$step": "a"},
}


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    flow = tmp_path / "sleep.json"
    flow.write_text(json.dumps(SLEEP_LONG))
    process = subprocess.Popen(
        [sys.executable, "-m", "stepflow_runtime.cli", "run", str(flow)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 20
    while len(psutil.Process(process.pid).children()) == 0:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert out == b""
    assert b"Traceback" not in err
    assert processes_left() == []


@contextmanager
def serving(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "stepflow_runtime.cli", "serve", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.terminate()
        process.communicate(timeout=20)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_elsewhere_is_cancelled_there(
    number: signal.Signals, tmp_path: Path
) -> None:
    flow = tmp_path / "sleep.json"
    flow.write_text(json.dumps(SLEEP_LONG))
    with serving() as (server, url), StepflowClient(url) as client:
        process = subprocess.Popen(
            [COMMAND, "run", str(flow), "-q"],
            env={**os.environ, "STEPFLOW_RUNTIME_REMOTE": url},
        )
        deadline = time.monotonic() + 20
        while not (runs := asyncio.run(client.list_runs())):
            assert time.monotonic() < deadline
        process.send_signal(number)
        process.wait(20)
        # To a shell, 143 and a death by SIGTERM are the same.
        ended = (130,) if number == signal.SIGINT else (143, -number)
        assert process.returncode in ended
        run = asyncio.run(client.get_run(runs[0].run_id))
        assert run.status is RunStatus.CANCELLED
        server.send_signal(number)
        assert server.wait(20) in ended
    assert processes_left() == []


def test_serve_ends_with_3_when_its_server_is_lost_for_good(tmp_path: Path) -> None:
    with serving("--max-restarts", "1") as (server, url):
        killed: set[int] = set()
        deadline = time.monotonic() + 20
        while server.poll() is None:
            assert time.monotonic() < deadline
            for each in servers_of(server):
                with suppress(psutil.Error):
                    each.kill()
                    killed.add(each.pid)
        assert server.returncode == 3
        assert len(killed) == 2  # it was restarted, once
        assert url.startswith("http://127.0.0.1:")
    assert processes_left() == []


def servers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        children = psutil.Process(process.pid).children()
        return [each for each in children if each.name() == "stepflow-server"]
    except psutil.Error:  # it is ending
        return []


def test_without_its_extra_the_command_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError(name='typer')")
    done = subprocess.run(
        [sys.executable, "-m", "stepflow_runtime.cli"],
        check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "pip install 'stepflow-runtime[cli]'" in done.stderr
