"""The ``stepflow-runtime`` command, as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from .conftest import EXAMPLES, processes_left


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
    assert done.stderr == ""
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
        (["x", "-c", "/nope.yml"], 3, "Failed to read config file: /nope.yml"),
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


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    flow = tmp_path / "sleep.json"
    step = {"id": "a", "component": "/sleep", "input": {"duration_ms": 60_000}}
    flow.write_text(json.dumps({"steps": [step], "output": {"$step": "a"}}))
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
