"""What ``doctor`` finds, on the installed binary and on others in its place."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepflow_runtime.cli import checks
from stepflow_runtime.cli.report import Finding, Redaction, State, as_text
from stepflow_runtime.server import provenance
from stepflow_runtime.server.provenance import (
    DamagedRecordError,
    Entry,
    Verdict,
    entry_of,
    examine,
    who_else_may_write,
)

from .conftest import each_backend, processes_left

NAME = "stepflow_orchestrator/bin/stepflow-server"


class Wheel:
    """A stepflow-orchestrator as an installer leaves it, with any file as its binary."""

    def __init__(self, site: Path, version: str = "0.13.0") -> None:
        self.site = site
        self.binary = site / NAME
        self.binary.parent.mkdir(parents=True)
        (site / "stepflow_orchestrator" / "__init__.py").touch()
        info = site / f"stepflow_orchestrator-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: stepflow-orchestrator\nVersion: {version}\n"
        )
        self.record = info / "RECORD"

    def install(self, content: bytes = b"#!/bin/sh\nexit 1\n") -> Wheel:
        self.binary.write_bytes(content)
        self.binary.chmod(0o755)
        self.record.write_text(f"{row(content)}\n{self.record.name},,\n")
        return self


def row(content: bytes, name: str = NAME) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest())
    return f"{name},sha256={digest.decode().rstrip('=')},{len(content)}"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    wheel = Wheel(tmp_path / "site").install()
    monkeypatch.syspath_prepend(str(wheel.site))
    return wheel


def doctor(
    *arguments: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("STEPFLOW_")}
    return subprocess.run(
        [sys.executable, "-m", "stepflow_runtime.cli", "doctor", *arguments],
        check=False,
        env={**clean, **(env or {})},
        capture_output=True,
        text=True,
        timeout=90,
    )


def findings(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    report = json.loads(done.stdout)
    found = {each["name"]: each for each in report["findings"]}
    assert list(found) == [check.name for check in checks.CHECKS]
    is_well = all(each["state"] != "problem" for each in found.values())
    assert (report["ok"], done.returncode) == (is_well, 0 if is_well else 1)
    assert "Traceback" not in done.stderr
    return found


# -- the binary and its RECORD ---------------------------------------------------------


def test_the_installed_binary_is_the_one_that_its_wheel_names(
    real_binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = examine(real_binary)
    assert found.verdict is Verdict.MATCHES
    assert found.found is not None
    assert found.found.size == real_binary.stat().st_size
    # The same, with its last byte another one: only the hash can tell.
    wheel = Wheel(tmp_path / "site")
    shutil.copy2(real_binary, wheel.binary)
    record = distribution("stepflow-orchestrator").read_text("RECORD")
    assert record is not None
    wheel.record.write_text(record)
    monkeypatch.syspath_prepend(str(wheel.site))
    assert examine(wheel.binary).verdict is Verdict.MATCHES
    with open(wheel.binary, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    changed = examine(wheel.binary)
    assert changed.verdict is Verdict.DIFFERS
    assert "not the hash" in changed.reason
    assert changed.found is not None
    assert changed.found.size == found.found.size


def cut(wheel: Wheel) -> None:
    os.truncate(wheel.binary, 3)


def without_record(wheel: Wheel) -> None:
    wheel.record.unlink()


def recorded(text: str) -> Callable[[Wheel], None]:
    def change(wheel: Wheel) -> None:
        wheel.record.write_text(text)

    return change


def undecodable(wheel: Wheel) -> None:
    wheel.record.write_bytes(b"\xff\xfe\0")


def gone(wheel: Wheel) -> None:
    wheel.binary.unlink()


def linked(wheel: Wheel) -> None:
    """As an installer leaves it that links into its cache."""
    cached = wheel.site.parent / "cached"
    wheel.binary.rename(cached)
    wheel.binary.symlink_to(cached)


@pytest.mark.parametrize(
    ("change", "verdict", "words"),
    [
        (cut, Verdict.DIFFERS, "it has 3 bytes, and RECORD says 17"),
        (linked, Verdict.MATCHES, "it is the one"),
        (without_record, Verdict.UNRECORDED, "no RECORD"),
        (recorded("a.pth,sha256=x,1\n"), Verdict.UNRECORDED, "no RECORD"),
        (recorded(f"{NAME},,\n"), Verdict.UNRECORDED, "without a hash"),
        (recorded(f"{NAME},md5=ab,17\n"), Verdict.UNRECORDED, "without a hash"),
        (undecodable, Verdict.DAMAGED_RECORD, "cannot be read"),
        (recorded(f"{NAME},sha256=abc,17\n"), Verdict.DAMAGED_RECORD, "damaged"),
        (recorded(f"{NAME},sha256=YWJj,17\n"), Verdict.DAMAGED_RECORD, "damaged"),
        (recorded(row(b"")[:-1] + "x\n"), Verdict.DAMAGED_RECORD, "damaged"),
        (recorded(NAME[:20]), Verdict.DAMAGED_RECORD, "does not name it"),
        (recorded(f"{row(b'')}\n{row(b'1')}"), Verdict.DAMAGED_RECORD, "not alike"),
        (gone, Verdict.UNREADABLE, "No such file"),
    ],
)
def test_what_is_known_of_a_binary(
    wheel: Wheel, change: Callable[[Wheel], None], verdict: Verdict, words: str
) -> None:
    change(wheel)
    found = examine(wheel.binary)
    assert found.verdict is verdict
    assert words in found.reason
    assert (found.target is not None) is (change is linked)


def test_a_binary_that_was_chosen_is_covered_only_if_it_leads_to_the_installed_one(
    wheel: Wheel, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(wheel.binary)
    assert examine(link, chosen=True).verdict is Verdict.MATCHES
    copy = tmp_path / "stepflow-server"
    shutil.copy2(wheel.binary, copy)
    found = examine(copy, chosen=True)
    assert found.verdict is Verdict.ELSEWHERE
    assert found.found == examine(wheel.binary).found


@given(record=st.text(alphabet=st.sampled_from('a,"\n\r\0=') | st.characters()))
def test_a_record_of_any_kind_is_read_or_is_damaged(record: str) -> None:
    try:
        entry = entry_of(record, lambda name: name == "a")
    except DamagedRecordError:
        return
    assert entry is None or isinstance(entry, Entry)


@pytest.mark.parametrize(
    ("mode", "uid", "gid", "words"),
    [
        (0o100755, None, 0, None),
        (0o100755, 0, 0, None),
        (0o100755, 54321, 0, "belongs to the unknown user 54321"),
        (0o120777, 54321, 0, "belongs to the unknown user 54321"),
        (0o100757, 0, 0, "can be written by everybody"),
        (0o040777, 0, 0, "can be written by everybody"),
        (0o041777, 0, 0, None),  # /tmp
        (0o120777, 0, 0, None),  # a symbolic link
        (0o100775, 0, 54321, "can be written by the group 54321"),
        (0o100755, 0, 54321, None),
    ],
)
def test_who_else_may_write(
    mode: int, uid: int | None, gid: int, words: str | None
) -> None:
    owner = os.geteuid() if uid is None else uid
    status = os.stat_result((mode, 0, 0, 1, owner, gid, 0, 0, 0, 0))
    assert provenance._who(status) == words


def test_a_directory_above_it_counts_and_so_does_where_a_link_leads(
    wheel: Wheel, tmp_path: Path
) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    target = open_to_all / "stepflow-server"
    wheel.binary.rename(target)
    wheel.binary.symlink_to(target)
    before = set(who_else_may_write(wheel.binary))
    open_to_all.chmod(0o777)
    wheel.binary.parent.chmod(0o777)
    assert set(who_else_may_write(wheel.binary)) - before == {
        f"{open_to_all} can be written by everybody",
        f"{wheel.binary.parent} can be written by everybody",
    }


# -- the command -----------------------------------------------------------------------


def test_all_is_told_of_a_machine_on_which_all_is_well(real_binary: Path) -> None:
    found = findings(doctor("--json", env={"STEPFLOW_PORT": "12345678"}))
    assert all(each["state"] != "problem" for each in found.values()), found
    assert found["binary"]["details"]["path"].endswith(NAME)
    with open(real_binary, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    details = found["provenance"]["details"]
    assert (details["verdict"], details["sha256"]) == ("matches", digest)
    assert found["environment"]["details"] == {"names": ["STEPFLOW_PORT"]}
    assert found["hello flow"]["state"] == "ok"
    assert found["hello flow"]["details"].keys() >= {"started", "ran", "stopped"}


def test_a_binary_that_was_replaced_is_not_executed(
    wheel: Wheel, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    wheel.binary.write_text(f"#!/bin/sh\ntouch {trace}\n")
    done = doctor("--json", env={"PYTHONPATH": str(wheel.site)})
    found = findings(done)
    assert found["provenance"]["state"] == "problem"
    assert found["provenance"]["details"]["verdict"] == "differs"
    assert "force-reinstall" in found["provenance"]["advice"]
    assert "not tried" in found["answers"]["what"]
    assert "not tried" in found["hello flow"]["what"]
    assert done.returncode == 1
    assert not trace.exists()


def test_without_a_binary_the_rest_is_looked_at(tmp_path: Path) -> None:
    done = doctor("--binary", str(tmp_path / "none"))
    assert done.returncode == 1
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    (binary,) = [line for line in lines if line.startswith("problem")]
    assert "there is no stepflow-server binary" in binary
    assert [line for line in lines if line.startswith("ok       loopback")]
    assert lines[-1].startswith("Problems: 1. ")
    assert "\x1b" not in done.stdout


def test_a_report_tells_no_secrets(
    fake_server: Callable[[str], Path], tmp_path: Path
) -> None:
    """Also not those that a server in its need prints."""
    binary = fake_server(
        'echo "$API_TOKEN $SETTING postgres://u:hunter2@db/x?sslpassword=hunter3" >&2\n'
        f"printf '{tmp_path}/plain \\033[31mred\\033]0;title\\007 \\001' >&2; exit 3"
    )
    env = {
        "API_TOKEN": "s3cr",
        "SETTING": "a value of some kind",
        "http_proxy": "http://me:hunter4@127.0.0.1:1",
        "STEPFLOW_SECRET": "hunter5",
        "HOME": str(tmp_path),
    }
    for arguments in (["--json"], []):
        done = doctor(*arguments, "--binary", str(binary), env=env)
        assert done.returncode == 1, done.stderr
        assert "$API_TOKEN $SETTING postgres://***@db/x?sslpassword=***" in done.stdout
        assert "~/plain red" in done.stdout
        assert "~/fake-server" in done.stdout
        for secret in ("s3cr", "of some kind", "hunter", str(tmp_path), "\x1b", "\x01"):
            assert secret not in done.stdout + done.stderr


def test_a_store_in_the_configuration_is_left_alone(tmp_path: Path) -> None:
    store = tmp_path / "runs.db"
    config = tmp_path / "stepflow.json"
    config.write_text(
        json.dumps(
            {
                "plugins": {"b": {"type": "builtin"}},
                "routes": {"/b": [{"plugin": "b"}]},
                "storageConfig": {
                    "type": "sqlite",
                    "databaseUrl": f"sqlite:{store}?mode=rwc",
                    "autoMigrate": True,
                },
            }
        )
    )
    found = findings(doctor("--json", "--config", str(config)))
    assert found["hello flow"]["state"] == "ok"
    assert "its store was left alone" in found["hello flow"]["what"]
    assert not store.exists()


@pytest.mark.parametrize(
    ("content", "state", "words"),
    [
        ("plugins: {}\nroutes: {}\n", "warning", "no plain route to /noop"),
        ("plugins: {b: {type: nosuch}}\nroutes: {}\n", "problem", "nosuch"),
        ("a: [", "problem", "flow node"),
        (None, "problem", "No such file"),
    ],
)
def test_what_a_configuration_comes_to(
    tmp_path: Path, content: str | None, state: str, words: str
) -> None:
    config = tmp_path / "stepflow.yml"
    if content is not None:
        config.write_text(content)
    finding = findings(doctor("--json", "--config", str(config)))["hello flow"]
    assert finding["state"] == state
    assert words in finding["what"] + finding["advice"]


def test_ctrl_c_ends_it_and_leaves_nothing_behind(
    fake_server: Callable[[str], Path],
) -> None:
    """In the middle of the start of a server that never says anything."""
    binary = fake_server('[ "$1" = --version ] || exec sleep 60')
    process = subprocess.Popen(
        [sys.executable, "-m", "stepflow_runtime.cli", "doctor"]
        + ["--binary", str(binary)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    while not any(map(_sleeps, psutil.Process(process.pid).children())):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out.startswith("ok       python")
    assert "Traceback" not in err
    assert processes_left() == []


def _sleeps(process: psutil.Process) -> bool:
    try:
        return process.name() == "sleep"
    except psutil.Error:
        return False


# -- its parts -------------------------------------------------------------------------


@pytest.mark.anyio
@each_backend
async def test_a_check_that_fails_or_hangs_is_a_finding_and_the_next_one_follows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def fail(case: checks.Case) -> Finding:
        raise KeyError("x")

    async def hang(case: checks.Case) -> Finding:
        await anyio.sleep_forever()
        raise AssertionError

    async def work(case: checks.Case) -> Finding:
        return Finding(name="", state=State.OK, what="well")

    made = (
        checks.Check("fails", fail),
        checks.Check("hangs", hang, 0.01),
        checks.Check("works", work),
    )
    monkeypatch.setattr(checks, "CHECKS", made)
    told: list[Finding] = []
    await checks.check_all(checks.Case(), told.append)
    assert [(each.name, each.state) for each in told] == [
        ("fails", State.PROBLEM),
        ("hangs", State.PROBLEM),
        ("works", State.OK),
    ]
    assert "KeyError: 'x'" in told[0].what


@pytest.mark.anyio
@each_backend
@pytest.mark.parametrize(
    "script",
    [
        "exec yes",
        "exec sleep 60",
        "sleep 60 & exec sleep 60",
        "exec >&- 2>&-; sleep 60",
    ],
)
async def test_a_binary_that_goes_on_for_ever_is_asked_for_a_moment(
    fake_server: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    monkeypatch.setattr(checks, "_PATIENCE", 0.2)
    code, said = await checks._asked(fake_server(script), dict(os.environ))
    assert code is None
    assert len(said) <= 200


@pytest.mark.anyio
@each_backend
async def test_what_cannot_be_executed_is_told(tmp_path: Path) -> None:
    binary = tmp_path / "stepflow-server"
    binary.write_bytes(b"\x7fELF of another machine")
    binary.chmod(0o755)
    finding = await checks._answers(checks.Case(binary=binary))
    assert finding.state is State.PROBLEM
    assert "is not a program for this platform" in finding.what


@pytest.mark.parametrize(
    ("release", "wanted", "is_in"),
    [
        ("0.13.0", ">=0.13,<0.14", True),
        ("0.13", ">=0.13.0,<0.14", True),
        ("0.12.9", ">=0.13,<0.14", False),
        ("0.14.0rc1", ">=0.13,<0.14", False),
        ("4.16.0", ">=4.9", True),
        ("5", "<5,>=4.16", False),
        ("1", "", True),
        ("odd", ">=1", False),
    ],
)
def test_whether_a_version_is_in_a_range(
    release: str, wanted: str, is_in: bool
) -> None:
    assert checks.is_within(release, wanted) is is_in


@pytest.mark.parametrize(
    ("routes", "path"),
    [
        ({"/": [{"plugin": "b"}]}, "/noop"),
        ({"/w": [{"plugin": "w"}], "/x": [{"plugin": "b"}]}, "/x/noop"),
        ({"/": [{"plugin": "b", "conditions": []}]}, None),
        ({"/": [{"plugin": "w"}, {"plugin": "b"}]}, None),
        ({"/": {}}, None),
        (None, None),
    ],
)
def test_a_route_to_a_component_that_every_server_has(
    routes: Any, path: str | None
) -> None:
    plugins = {"b": {"type": "builtin"}, "w": {"type": "grpc"}}
    assert checks.find_noop({"plugins": plugins, "routes": routes}) == path


def test_redaction_takes_out_what_is_meant_and_no_more() -> None:
    environ = {
        "A_KEY": "abcd",
        "LONG": "a longer value",
        "SHORT": "short",
        "P": "/p/" * 5,
    }
    redact = Redaction(environ, "/home/ada/")
    assert redact("abcd, a longer value, short, /p//p//p//p//p/") == (
        "$A_KEY, $LONG, short, /p//p//p//p//p/"
    )
    assert redact("/home/ada /home/ada/x /home/adam /mnt/home/ada (/home/ada)") == (
        "~ ~/x /home/adam /mnt/home/ada (~)"
    )
    assert redact("see https://u:p@h/x and a@b; token=t&x=1") == (
        "see https://***@h/x and a@b; token=***&x=1"
    )
    assert Redaction({}, "/")("/a \ud800") == "/a \N{REPLACEMENT CHARACTER}"
    finding = Finding(name="n", state=State.OK, what="w\nx", advice="a")
    assert as_text(finding).splitlines() == [
        "ok       n              w",
        "                        x",
        "                        -> a",
    ]
