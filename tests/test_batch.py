"""``stepflow-runtime batch``: lines in, lines out, and what an interruption leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from .conftest import EXAMPLES, processes_left
from .terminal import COMMAND
from .test_command import command, unwrapped

SLOW = {
    "name": "slow",
    "description": "Returns its input, after a while",
    "steps": [
        {
            "id": "a",
            "component": "/sleep",
            "input": {
                "duration_ms": {"$input": "$.ms"},
                "passthrough": {"$input": "$.n"},
            },
        }
    ],
    "output": {"$step": "a", "path": "$.passthrough"},
}


@pytest.fixture
def flow(tmp_path: Path) -> str:
    (tmp_path / "flow.json").write_text(json.dumps(SLOW))
    return str(tmp_path / "flow.json")


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    return tmp_path / "in.jsonl"


def items(count: int, ms: int = 20) -> str:
    return "".join(f'{{"n": {n}, "ms": {ms}}}\n' for n in range(count))


def decoded(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_results_come_in_order_and_failures_are_lines(flow: str, inputs: Path) -> None:
    inputs.write_text('{"n":0,"ms":300}\n\n{"n":1,"ms":0}\n{"ms":0}')
    done = command("batch", flow, "--inputs", str(inputs))
    assert done.returncode == 1
    lines = decoded(done.stdout)
    assert [line["index"] for line in lines] == [0, 1, 2]
    assert [line.get("result") for line in lines] == [0, 1, None]
    assert lines[2]["outcome"] == "failed"
    assert lines[2]["error"]["code"] == "EXPRESSION_FAILURE"
    assert "3 items, 1 failed" in done.stderr


def test_an_item_that_takes_too_long_or_cannot_be_sent_has_failed(flow: str) -> None:
    text = f'{{"n":0,"ms":60000}}\n{{"n":{2**60},"ms":0}}\n{{"n":2,"ms":0}}\n'
    done = command(
        *("batch", flow, "--inputs", "-", "--timeout", "1", "-n", "2", "-q"), stdin=text
    )
    assert done.returncode == 1
    lines = decoded(done.stdout)
    codes = [line.get("error", {}).get("code") for line in lines]
    assert codes == ["TIMEOUT", "INVALID_INPUT", None]
    assert done.stderr == ""


@pytest.mark.parametrize("is_file", [True, False])
def test_a_wrong_line_is_told_with_its_number(
    flow: str, inputs: Path, is_file: bool
) -> None:
    """Of a file before anything is run; of a pipe when it comes."""
    text = items(2) + "\n{nope\n" + items(1)
    inputs.write_text(text)
    done = command(
        *("batch", flow, "-q", "--inputs", str(inputs) if is_file else "-"),
        stdin="" if is_file else text,
    )
    assert done.returncode == 2
    assert ":4: not JSON" in done.stderr
    assert [line["result"] for line in decoded(done.stdout)] == (
        [] if is_file else [0, 1]
    )


def test_killed_at_any_moment_and_started_again_it_writes_the_same_file(
    flow: str, inputs: Path, tmp_path: Path
) -> None:
    count, output = 400, tmp_path / "out.jsonl"
    inputs.write_text(items(count))
    call = [
        COMMAND,
        "batch",
        flow,
        "--inputs",
        str(inputs),
        "-o",
        str(output),
        "-n",
        "20",
    ]
    sizes = [0]
    for more in (1, 8000, 16000):
        process = subprocess.Popen(call, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while not (output.exists() and output.stat().st_size >= sizes[-1] + more):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
        process.wait()
        sizes.append(output.stat().st_size)
    # As a write that broke off leaves it; on a file system that lost its power, too.
    os.truncate(output, sizes[-1] - 30)
    os.truncate(output, sizes[-1] - 10)
    kept = output.read_bytes().rpartition(b"\n")[0]
    done = command(*call[1:])
    assert done.returncode == 0, done.stderr
    assert output.read_bytes().startswith(kept)
    lines = decoded(output.read_text())
    assert [(line["index"], line["result"]) for line in lines] == [
        (n, n) for n in range(count)
    ]
    assert f"{len(kept.splitlines())} were there already" in done.stderr
    assert output.stat().st_mode & 0o777 == 0o600
    # And once more: there is nothing left to do.
    whole = output.read_bytes()
    assert command(*call[1:], "-q").returncode == 0
    assert output.read_bytes() == whole
    wait_for_guards()


def wait_for_guards() -> None:
    """What was killed has left a guard, that sees to its server."""
    deadline = time.monotonic() + 10
    while processes_left():
        assert time.monotonic() < deadline, processes_left()
        time.sleep(0.02)


def test_a_file_that_is_of_something_else_is_left_alone(
    flow: str, inputs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    inputs.write_text(items(2, ms=0))
    call = ["batch", flow, "--inputs", str(inputs), "-o", str(output), "-q"]
    assert command(*call).returncode == 0
    ours = output.read_bytes()

    def check(line: int, *more: str) -> None:
        before = output.read_bytes()
        done = command(*call, *more)
        assert done.returncode == 2
        assert f"out.jsonl:{line}: th" in done.stderr
        assert output.read_bytes() == before

    check(1, "-v", "x=1")
    inputs.write_text(items(1, ms=0))
    check(2)
    inputs.write_text(items(1, ms=0) + items(1, ms=1))
    check(2)
    output.write_bytes(ours.rpartition(b'"runId"')[0][:-3] + b"\n")
    inputs.write_text(items(2, ms=0))
    check(2)
    output.write_text("my notes, of one line")
    check(1)


def test_a_reader_that_has_seen_enough_ends_it_without_a_word(
    flow: str, inputs: Path
) -> None:
    inputs.write_text(items(5000, ms=1))
    line = f"{COMMAND} batch {flow} -q --inputs {inputs} | head -n 2; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line], check=False, capture_output=True, text=True, timeout=60
    )
    *lines, code = done.stdout.splitlines()
    assert ([json.loads(each)["index"] for each in lines], code) == ([0, 1], "141")
    assert done.stderr == ""
    assert processes_left() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_keeps_what_it_has_and_leaves_nothing(
    number: signal.Signals, flow: str
) -> None:
    """Also while it waits for more of its input."""
    process = subprocess.Popen(
        [sys.executable, "-m", "stepflow_runtime.cli", "batch", flow, "--inputs", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write('{"n":0,"ms":0}\n{"n":1,"ms":60000}\n')
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["result"] == 0
    process.send_signal(number)
    _, told = process.communicate(timeout=20)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGTERM)
    assert "Traceback" not in told
    assert processes_left() == []


def test_one_process_at_a_time_writes_to_a_file(
    flow: str, inputs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    call = ("batch", flow, "-o", str(output), "--inputs", "-")
    first = subprocess.Popen([COMMAND, *call], stdin=subprocess.PIPE)
    while not output.exists():
        time.sleep(0.01)
    time.sleep(0.1)
    done = command(*call)
    assert (done.returncode, "another process" in done.stderr) == (2, True)
    first.communicate(timeout=20)
    assert first.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-", "--inputs", "-"], "cannot both be on stdin"),
        (["x", "--inputs", "/nope"], "cannot read the workflow file x"),
        ([str(EXAMPLES / "nested.yaml"), "--inputs", "/nope"], "/nope"),
        (
            [str(EXAMPLES / "nested.yaml"), "--inputs", "-", "-o", "/dev/null"],
            "regular",
        ),
        (["x", "--inputs", "-", "--header-env", "X"], "--header-env needs --remote"),
    ],
)
def test_what_is_wrong_is_told_before_anything_starts(
    arguments: list[str], words: str
) -> None:
    done = command("batch", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in unwrapped(done.stderr)
    assert "Traceback" not in done.stderr
