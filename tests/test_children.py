"""What a server and its workers inherit from the program, and what not."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from stepflow_runtime import ServerStartError, StepflowRuntime
from stepflow_runtime.server.platform import launching

from .conftest import ECHO, EXAMPLES, each_backend

pytestmark = pytest.mark.anyio

WORKER = EXAMPLES / "python_worker"
SHOUT = WORKER / "shout.yaml"

# As `nohup`, a daemon, or a script's `&` start their programs; and a program may do it itself.
IGNORED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture
def ignoring() -> Iterator[None]:
    before = {number: signal.signal(number, signal.SIG_IGN) for number in IGNORED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def signals_of(pid: int, kind: str) -> set[int]:
    """What a process ignores (``SigIgn``) or blocks (``SigBlk``)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            mask = int(line.split()[1], 16)
            return {number for number in range(1, 65) if mask >> (number - 1) & 1}
    raise AssertionError(kind)


def files_of(pid: int) -> set[tuple[int, int]]:
    """Which files a process has open, as device and inode."""
    found = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            each = os.stat(f"/proc/{pid}/fd/{fd}")
        except OSError:
            continue
        found.add((each.st_dev, each.st_ino))
    return found


def environment_of(pid: int) -> dict[str, str]:
    text = Path(f"/proc/{pid}/environ").read_text()
    return dict(each.split("=", 1) for each in text.split("\0") if each)


def worker_of(runtime: StepflowRuntime) -> int:
    (worker,) = psutil.Process(runtime.pid).children()
    return worker.pid


@each_backend
async def test_nothing_of_this_process_is_handed_down_unasked(
    ignoring: None,
    worker_env: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("A_SECRET", "hush")
    for name in ("LC_ALL", "LC_CTYPE", "LANG"):  # Python's own start then sets one
        monkeypatch.delenv(name, raising=False)
    ours = os.open(tmp_path / "ours", os.O_RDWR | os.O_CREAT)
    os.set_inheritable(ours, True)
    handed_down = os.fstat(ours)
    try:
        async with StepflowRuntime.start(
            WORKER / "stepflow-config.yml",
            storage=tmp_path / "runs.db",
            env=worker_env,
            inherit_env=False,
        ) as runtime:
            assert runtime.pid is not None
            result = await runtime.run(SHOUT, {"text": "hi"})
            assert result.unwrap() == "HI!"
            server, worker = runtime.pid, worker_of(runtime)
            for pid in (server, worker):
                assert (handed_down.st_dev, handed_down.st_ino) not in files_of(pid)
                env = environment_of(pid)
                assert "A_SECRET" not in env
                assert env["HOME"] == os.environ["HOME"]
                assert signals_of(pid, "SigBlk") == set()
            assert "LC_CTYPE" not in environment_of(server)
            # Rust ignores SIGPIPE, and Python SIGXFSZ, too; each by itself.
            own = {signal.SIGPIPE, signal.SIGXFSZ}
            assert signals_of(server, "SigIgn") <= own
            assert signals_of(worker, "SigIgn") <= own
    finally:
        os.close(ours)


@each_backend
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x7fELF", "Exec format error"),
        (b"#!/nonexistent/sh\n", "does not exist here"),
    ],
)
async def test_a_binary_that_cannot_be_executed_is_told_as_ever(
    content: bytes, words: str, tmp_path: Path, ignoring: None
) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(content)
    binary.chmod(0o755)
    with pytest.raises(ServerStartError, match=words) as raised:
        async with StepflowRuntime.start(binary=binary):
            raise AssertionError
    for number in IGNORED:
        signal.signal(number, signal.SIG_DFL)
    with pytest.raises(ServerStartError) as without_launcher:
        async with StepflowRuntime.start(binary=binary):
            raise AssertionError
    assert str(raised.value) == str(without_launcher.value)


@each_backend
async def test_where_no_interpreter_is_to_be_had_it_is_started_all_the_same(
    ignoring: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(launching, "find_interpreter", lambda: None)
    async with StepflowRuntime.start() as runtime:
        assert runtime.pid is not None
        assert signal.SIGHUP in signals_of(runtime.pid, "SigIgn")
        assert (await runtime.run(ECHO, 1)).output == 1
    assert "ignore SIGHUP, SIGINT, SIGQUIT" in caplog.text
