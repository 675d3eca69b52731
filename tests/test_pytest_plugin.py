"""The pytest plugin, in sessions of pytest of its own: installed, as users have it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import psutil
import pytest

from .conftest import processes_left, wait_until

Session: TypeAlias = "Callable[..., subprocess.CompletedProcess[str]]"

HEAD = """
import asyncio, os, signal, subprocess, sys, time
from pathlib import Path
import pytest
from stepflow_runtime import LogConfig, RestartPolicy, RuntimeState, StepflowRuntime
from stepflow_runtime.testing import FakeServer, Life, crash, freeze, wait_restarted

FLOW = {
    "steps": [{"id": "a", "component": "/noop", "input": {"$input": "$"}}],
    "output": {"$step": "a"},
}
"""


@pytest.fixture
def session(tmp_path: Path) -> Session:
    """Runs a session of pytest on a file with these tests."""

    def run(tests: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        # Without it, pytest-asyncio warns.
        ini = "[pytest]\nasyncio_default_fixture_loop_scope = function\n"
        (tmp_path / "pytest.ini").write_text(ini)
        (tmp_path / "test_it.py").write_text(HEAD + tests)
        options = ("-p", "no:cacheprovider", "-o", "console_output_style=classic")
        return subprocess.run(
            [sys.executable, "-W", "error", "-m", "pytest", *options, *arguments],
            check=False,
            cwd=tmp_path,
            env={**os.environ, "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def summary(done: subprocess.CompletedProcess[str]) -> str:
    """The closing line, without its time."""
    lines = re.findall(r"^=+ (.* in) [\d.]+s.* =+$", done.stdout, re.MULTILINE)
    assert lines, done.stdout + done.stderr
    return str(lines[-1])


def test_the_fixtures_work_in_every_kind_of_test_and_have_their_scopes(
    session: Session,
) -> None:
    done = session("""
PIDS = {"own": set(), "module": set(), "session": set()}

@pytest.fixture
def runtimes(stepflow_runtime, stepflow_runtime_module, stepflow_runtime_session):
    found = stepflow_runtime, stepflow_runtime_module, stepflow_runtime_session
    for pids, runtime in zip(PIDS.values(), found, strict=True):
        assert runtime.state is RuntimeState.READY
        pids.add(runtime.pid)
    return found

async def all_of(runtimes):
    for runtime in runtimes:
        assert (await runtime.run(FLOW, 1)).output == 1

@pytest.mark.anyio
async def test_of_anyio(runtimes):  # under asyncio and trio
    await all_of(runtimes)

@pytest.mark.asyncio
async def test_of_pytest_asyncio(runtimes):
    await all_of(runtimes)

@pytest.mark.asyncio(loop_scope="module")
async def test_of_a_modules_loop(runtimes):
    await all_of(runtimes)

@pytest.mark.trio
async def test_of_pytest_trio(runtimes, nursery):
    await all_of(runtimes)

def test_of_no_loop(runtimes):
    asyncio.run(all_of(runtimes))

def test_the_scopes():
    assert [len(pids) for pids in PIDS.values()] == [6, 1, 1]
""")
    assert summary(done) == "7 passed in"


def test_each_process_of_xdist_has_its_own(session: Session, tmp_path: Path) -> None:
    done = session(
        """
@pytest.mark.parametrize("number", range(3))
def test_it(stepflow_runtime_session, worker_id, number):
    runtime = stepflow_runtime_session
    Path(f"{worker_id}-{runtime.pid}-{runtime.port}").touch()
    assert asyncio.run(runtime.run(FLOW, number)).output == number
""",
        *("-n", "2", "--dist", "each"),
    )
    assert summary(done) == "6 passed in"
    servers = [path.name.split("-") for path in tmp_path.glob("gw*")]
    assert sorted(worker for worker, *_ in servers) == ["gw0", "gw1"]
    assert len({port for _, _, port in servers}) == 2


LOGGING = """
IDS = []

async def run(runtime):
    result = await runtime.run(FLOW, 1)
    with open("ids", "a") as file:
        print(result.run_id, file=file)

def test_one_that_passes(stepflow_runtime_session):
    asyncio.run(run(stepflow_runtime_session))

def test_one_that_fails(stepflow_runtime_session):
    asyncio.run(run(stepflow_runtime_session))
    assert not "this"

async def with_its_own():
    async with StepflowRuntime.start() as runtime:
        await run(runtime)

def test_with_a_runtime_of_its_own():
    asyncio.run(with_its_own())
    assert not "that"

@pytest.fixture
def broken():
    with FakeServer(Life(fails="no such plugin")) as fake:
        StepflowRuntime.start(binary=fake.binary)

def test_whose_setup_fails(broken):
    pass

@pytest.mark.stepflow(restart_policy=RestartPolicy.ON_FAILURE)
def test_of_two_lives(stepflow_runtime):
    crash(stepflow_runtime)
    asyncio.run(wait_restarted(stepflow_runtime))
    assert not "these"
"""


def sections(output: str) -> dict[str, str]:
    """What the report of each failed test says of servers' logs."""
    head = r"^_+ (?:ERROR at setup of )?(test_\w+) _+$"
    reports = re.split(head, output, flags=re.MULTILINE)
    return {
        name: "".join(text.partition("stepflow server log")[1:]).partition("\n===")[0]
        for name, text in zip(reports[1::2], reports[2::2], strict=True)
    }


def test_a_failed_test_shows_what_servers_logged_in_its_time(
    session: Session, tmp_path: Path
) -> None:
    done = session(LOGGING)
    assert summary(done) == "3 failed, 1 passed, 1 error in"
    _, shared, own = (tmp_path / "ids").read_text().split()
    shown = sections(done.stdout)
    assert sorted(shown) == [
        "test_of_two_lives",
        "test_one_that_fails",
        "test_whose_setup_fails",
        "test_with_a_runtime_of_its_own",
    ]
    ids = {
        name: set(re.findall(r"run_id=([0-9a-f-]{36})", shown[name])) for name in shown
    }
    # That of the test before is not, though they share the server.
    assert ids["test_one_that_fails"] == {shared}
    assert ids["test_with_a_runtime_of_its_own"] == {own}
    assert "runtime ready) during call" in shown["test_one_that_fails"]
    assert "Starting Stepflow server" not in shown["test_one_that_fails"]
    assert "runtime stopped) during call" in shown["test_with_a_runtime_of_its_own"]
    assert (
        "ERROR stepflow_fake: stand_in.py:1 no such plugin"
        in shown["test_whose_setup_fails"]
    )
    assert "runtime failed) during setup" in shown["test_whose_setup_fails"]
    assert "its server last was killed by SIGKILL" in shown["test_of_two_lives"]
    assert shown["test_of_two_lives"].count("Starting Stepflow server") == 2


def test_how_much_is_shown_can_be_chosen(session: Session) -> None:
    arguments = ("-k", "own", "-o", "stepflow_log_lines=2", "-n", "1")
    done = session(LOGGING, *arguments, "--show-capture=no")
    assert "stepflow server log" not in done.stdout
    shown = sections(session(LOGGING, *arguments).stdout)
    lines = shown["test_with_a_runtime_of_its_own"].splitlines()
    assert re.match(r"\.\.\. \d+ earlier entries are not shown", lines[1])
    assert len(lines) == 4


OPTIONS = """
pytestmark = pytest.mark.stepflow(max_restarts=1)

@pytest.fixture(scope="session")
def stepflow_options():
    return {"log_config": LogConfig(level="error"), "max_restarts": 0}

def test_of_the_session(stepflow_runtime_session):
    assert stepflow_runtime_session.get_recent_logs() == []
    assert stepflow_runtime_session._options.max_restarts == 0

def test_of_the_module(stepflow_runtime_module):
    assert stepflow_runtime_module._options.max_restarts == 1

@pytest.mark.stepflow(max_restarts=2, log_config=LogConfig(level="info"))
def test_of_one(stepflow_runtime):
    assert stepflow_runtime.get_recent_logs() != []
    assert stepflow_runtime._options.max_restarts == 2

@pytest.mark.stepflow(max_restarts=3)
class TestOfAClass:
    def test_it(self, stepflow_runtime):
        assert stepflow_runtime._options.max_restarts == 3

@pytest.mark.stepflow("config.yml")
def test_that_is_wrong(stepflow_runtime):
    pass

@pytest.mark.stepflow(prot=1)
def test_that_is_wrong_too(stepflow_runtime):
    pass
"""


def test_options_come_from_a_fixture_and_markers(session: Session) -> None:
    done = session(OPTIONS, "--strict-markers")
    assert summary(done) == "4 passed, 2 errors in"
    assert "takes the options of StepflowRuntime.start by their names" in done.stdout
    assert "unexpected keyword argument 'prot'" in done.stdout


def test_what_is_left_behind_fails_the_session_and_is_told(session: Session) -> None:
    tests = """
def test_that_forgets():
    global runtime
    runtime = StepflowRuntime.start()

def test_that_does_not(stepflow_runtime):
    StepflowRuntime.start().stop()
"""
    for arguments in ((), ("-n", "1")):
        done = session(tests, *arguments)
        assert summary(done) == "2 passed in"
        assert done.returncode == 1
        told = done.stdout[done.stdout.index("left behind by stepflow-runtime") :]
        assert re.search(
            r"a runtime is still ready \(server pid \d+, port \d+\); it was started by "
            r"test_it.py::test_that_forgets",
            told,
        )
        assert told.count(" is still ") == 1
    for choice, is_told in (("warn", True), ("ignore", False)):
        done = session(tests, "-k", "forgets", "-o", f"stepflow_leaks={choice}")
        assert (done.returncode, "left behind" in done.stdout) == (0, is_told)


def test_a_daemon_of_a_worker_is_told_of(
    session: Session, fake_server: Callable[[str], Path], real_binary: Path
) -> None:
    fake_server(
        f'setsid sleep 1000 </dev/null >/dev/null 2>&1 &\nexec {real_binary} "$@"'
    )
    done = session("""
@pytest.mark.stepflow(binary="fake-server")
def test_it(stepflow_runtime):
    pass
""")
    assert done.returncode == 1
    (pid,) = re.findall(r"a process is still there: (\d+) sleep", done.stdout)
    daemon = psutil.Process(int(pid))
    daemon.kill()
    daemon.wait(15)


def test_an_option_that_cannot_be_is_refused_by_name(
    pytestconfig: pytest.Config,
) -> None:
    for option in ("stepflow_leaks=maybe", "stepflow_log_lines=few"):
        config = pytest.Config.fromdictargs({}, ["-o", option])
        words = f"the ini option {option.split('=')[0]} must be"
        with pytest.raises(pytest.UsageError, match=words):
            config._do_configure()
        config._ensure_unconfigure()


def test_what_a_test_leaves_frozen_is_thawed(session: Session) -> None:
    done = session("""
@pytest.mark.stepflow(shutdown_timeout=1000)
def test_of_its_own(stepflow_runtime):
    freeze(stepflow_runtime)

def test_of_all(stepflow_runtime_session):
    freeze(stepflow_runtime_session)

def test_after_it(stepflow_runtime_session):
    assert asyncio.run(stepflow_runtime_session.run(FLOW, 1)).output == 1
    assert stepflow_runtime_session.restarts == 0
""")
    assert summary(done) == "3 passed in"


def test_nothing_is_kept_of_runtimes_that_are_over(session: Session) -> None:
    done = session("""
import gc, weakref
KNOWN = []

def test_some(stepflow_runtime):
    with StepflowRuntime.start() as other:
        KNOWN.extend(weakref.ref(each._supervisor) for each in (stepflow_runtime, other))

def test_the_next():
    deadline = time.monotonic() + 30
    while any(each() for each in KNOWN):  # their threads have a last breath
        assert time.monotonic() < deadline
        gc.collect()
""")
    assert summary(done) == "2 passed in"


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_sigterm_ends_pytest_at_once_and_the_server_with_it(
    session: Session,
) -> None:
    done = session("""
def test_it(stepflow_runtime):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
""")
    assert done.returncode == -signal.SIGTERM
    await wait_until(lambda: processes_left() == [])


def test_pytest_may_be_started_in_an_event_loop(tmp_path: Path) -> None:
    """As notebooks do."""
    test = "def test_it(stepflow_runtime): assert stepflow_runtime.pid"
    (tmp_path / "test_it.py").write_text(test)
    code = (
        "import asyncio, pytest\n"
        "async def main(): return pytest.main(['-q', '-p', 'no:cacheprovider',"
        " '-p', 'no:asyncio'])\n"
        "raise SystemExit(asyncio.run(main()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0, done.stdout


def test_it_costs_nothing_where_nobody_uses_it() -> None:
    """It is loaded with every session of pytest where the package is installed."""
    code = (
        "import json, os, pytest, sys\n"
        "with open(os.devnull, 'w') as sys.stdout:\n"
        "    pytest.main(['-p', 'no:cacheprovider', '-p', 'no:asyncio', os.devnull])\n"
        "print(json.dumps([*sys.modules]), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    loaded = json.loads(done.stderr.splitlines()[-1])
    assert {name for name in loaded if name.startswith("stepflow_runtime")} == {
        "stepflow_runtime",
        "stepflow_runtime.roster",
        "stepflow_runtime.server",
        "stepflow_runtime.server.interpreter",
        "stepflow_runtime.testing",
        "stepflow_runtime.testing.fake",
        "stepflow_runtime.testing.faults",
        "stepflow_runtime.testing.plugin",
    }
    assert not {"psutil", "msgspec", "httptools"} & {*loaded}
