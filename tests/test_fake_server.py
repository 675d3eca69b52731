"""FakeServer: what users test their own handling of a server's faults with."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepflow_runtime import (
    FlowResult,
    FlowStatus,
    LogConfig,
    NotFoundError,
    RestartPolicy,
    RunLostError,
    RunStatus,
    ServerCrashedError,
    ServerFaultError,
    ServerStartError,
    StepflowExecutor,
    StepflowRuntime,
)
from stepflow_runtime.testing import ECHO as AS_IT_CAME
from stepflow_runtime.testing import FakeServer, Life, crash, wait_restarted

from .conftest import ECHO, each_backend

ON_FAILURE = RestartPolicy.ON_FAILURE


@each_backend
@pytest.mark.anyio
async def test_a_crash_under_a_run_is_what_a_program_sees_of_a_real_one() -> None:
    lives = Life(crash_on_run=2), Life(output={"ok": True})
    with FakeServer(*lives) as fake:
        async with StepflowRuntime.start(
            binary=fake.binary, restart_policy=ON_FAILURE
        ) as runtime:
            assert (await runtime.run(ECHO, 1)).output == 1
            with pytest.raises(RunLostError):
                await runtime.run(ECHO, 2)
            assert (await runtime.run(ECHO, 3)).output == {"ok": True}
            assert runtime.restarts == 1
        assert (fake.starts, fake.inputs) == (2, [1, 2, 3])


@pytest.mark.parametrize("code", [0, 3, 255, -9, -15, -11, -6, -2])
def test_it_crashes_when_it_is_told_to_and_by_itself(code: int) -> None:
    lives = (
        Life(),
        Life(crash_on_run=1, exit_code=code),
        Life(crash_after=0.0, exit_code=code),
    )
    codes: list[int] = []
    with FakeServer(*lives) as fake:
        with StepflowRuntime.start(
            binary=fake.binary,
            restart_policy=RestartPolicy.ALWAYS,
            max_restarts=2,
            on_crash=codes.append,
        ) as runtime:
            fake.crash(code)
            asyncio.run(wait_restarted(runtime, 1))
            with pytest.raises(RunLostError):
                asyncio.run(runtime.run(ECHO, 1))
            with pytest.raises(ServerCrashedError):
                asyncio.run(wait_restarted(runtime, 3))
        assert codes == [code] * 3
        with pytest.raises(RuntimeError, match="it has ended"):
            fake.crash()


@each_backend
@pytest.mark.anyio
async def test_a_frozen_one_is_taken_for_hung() -> None:
    with FakeServer() as fake:
        async with StepflowRuntime.start(
            binary=fake.binary,
            restart_policy=ON_FAILURE,
            health_interval=0.05,
            health_timeout=0.1,
            max_health_failures=2,
        ) as runtime:
            fake.freeze()
            for order in (fake.freeze, fake.crash, partial(fake.flood, 1)):
                with pytest.raises(RuntimeError, match="frozen: thaw"):
                    order()
            await wait_restarted(runtime)
            assert runtime.last_exit is not None
            assert runtime.last_exit.was_hung
            fake.thaw()  # of what is gone
            fake.flood(1)


@each_backend
@pytest.mark.anyio
async def test_a_thawed_one_goes_on() -> None:
    with FakeServer() as fake:
        async with StepflowRuntime.start(binary=fake.binary) as runtime:
            fake.freeze()
            with anyio.move_on_after(0.2) as patience:
                await runtime.health()
            assert patience.cancelled_caught
            fake.thaw()
            assert (await runtime.health()).is_healthy
            assert fake.starts == 1


def test_a_flood_arrives_whole() -> None:
    with (
        FakeServer(Life(log_lines=3000)) as fake,
        StepflowRuntime.start(
            binary=fake.binary, log_config=LogConfig(keep=20_000)
        ) as runtime,
    ):
        fake.flood(5000, size=500)
        fake.flood(2000, stream="stderr")
        runtime.stop()
        entries = runtime.get_recent_logs(limit=20_000)
        streams = Counter(entry.stream for entry in entries)
        # And one that says that it is there.
        assert streams == {"stdout": 3000 + 1 + 5000, "stderr": 2000}
        there = next(
            place for place, entry in enumerate(entries) if "listening" in entry.message
        )
        assert there == 3000
        assert Counter(len(entry.message) for entry in entries[3001:]) == {
            500: 5000,
            100: 2000,
        }


def test_a_start_that_is_slow_or_fails_says_so() -> None:
    lives = Life(start_after=60), Life(is_healthy=False), Life(fails="no such plugin")
    with FakeServer(*lives) as fake:
        with pytest.raises(ServerStartError, match=r"announce its port: 0.3 s"):
            StepflowRuntime.start(binary=fake.binary, startup_timeout=0.3)
        with pytest.raises(ServerStartError, match="answered a health request"):
            StepflowRuntime.start(binary=fake.binary, startup_timeout=2)
        with pytest.raises(ServerStartError, match="no such plugin") as caught:
            StepflowRuntime.start(binary=fake.binary)
        assert caught.value.exit is not None
        assert caught.value.exit.code == 1


@pytest.mark.parametrize("ignores", [False, True])
def test_sigterm_ends_it_unless_it_is_to_be_ignored(ignores: bool) -> None:
    with FakeServer(Life(ignores_sigterm=ignores)) as fake:
        with StepflowRuntime.start(binary=fake.binary) as runtime:
            crash(runtime, signal.SIGTERM)
            if ignores:
                assert asyncio.run(runtime.health()).is_healthy
                runtime.stop(timeout=0.2)
            else:
                with pytest.raises(ServerCrashedError, match="exited with code 0"):
                    asyncio.run(wait_restarted(runtime))
        with pytest.raises(RuntimeError, match="there is no fake server"):
            fake.freeze()


@each_backend
@pytest.mark.anyio
async def test_runs_take_their_time_and_a_cancelled_one_is_over_at_once() -> None:
    with FakeServer(Life(run_seconds=1000)) as fake:
        async with StepflowRuntime.start(binary=fake.binary) as runtime:
            run_id = await runtime.submit(ECHO, 1)
            assert (await runtime.get_run(run_id)).status is RunStatus.RUNNING

            async def cancel() -> None:
                assert (await runtime.cancel(run_id)).status is RunStatus.CANCELLED

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(cancel)
                with anyio.fail_after(60):
                    assert (await runtime.get_result(run_id)).is_failed


def test_runs_fail_if_a_life_says_so() -> None:
    with (
        FakeServer(Life(error="out of stock")) as fake,
        StepflowRuntime.start(binary=fake.binary) as runtime,
    ):
        result = asyncio.run(runtime.run(ECHO, 1))
        assert result.is_failed
        assert result.error is not None
        assert (result.error.code, result.error.message) == (
            "COMPONENT_FAILED",
            "out of stock",
        )


def test_a_store_is_refused(tmp_path: Path) -> None:
    with FakeServer() as fake, pytest.raises(ServerStartError, match="in memory"):
        StepflowRuntime.start(binary=fake.binary, storage=tmp_path / "runs.db")


def test_where_temporary_files_are_may_have_a_long_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * 100)))
    with (
        FakeServer() as fake,
        StepflowRuntime.start(binary=fake.binary),
    ):
        fake.flood(1)


@pytest.fixture
def fake_runtime() -> Iterator[StepflowRuntime]:
    with FakeServer() as fake, StepflowRuntime.start(binary=fake.binary) as runtime:
        yield runtime


async def what_calls_come_to(executor: StepflowExecutor) -> list[Any]:
    """Results and errors, without what differs from run to run."""
    result = await executor.run(ECHO, {"x": [1, 2.5, None]})
    batch = await executor.submit_batch(ECHO, [1, "two"])
    details, results = await executor.get_batch(batch)
    runs = {run.run_id: run.status for run in await executor.list_runs()}
    with pytest.raises(NotFoundError):
        await executor.get_run("00000000-0000-0000-0000-000000000000")
    return [
        _told(result),
        [_told(each) for each in results],
        (details.status, details.items, details.has_ended),
        (await executor.get_result(result.run_id)).output,
        (await executor.cancel(result.run_id)).status,
        runs[result.run_id],
        runs[batch],
        (await executor.health()).status,
        (await executor.validate(ECHO)).is_valid,
    ]


def _told(result: FlowResult) -> tuple[FlowStatus, Any, int]:
    return result.status, result.output, result.item_index


@each_backend
@pytest.mark.anyio
async def test_it_answers_as_the_real_one(
    fake_runtime: StepflowRuntime,
) -> None:
    found = await what_calls_come_to(fake_runtime)
    async with StepflowRuntime.start() as real_runtime:
        assert found == await what_calls_come_to(real_runtime)
    assert found[5] is RunStatus.COMPLETED


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False, width=32)
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
    ),
    max_leaves=8,
)


def test_what_a_run_takes_is_what_it_gives(fake_runtime: StepflowRuntime) -> None:
    @given(value=json_values)
    def check(value: Any) -> None:
        assert asyncio.run(fake_runtime.run(ECHO, value)).output == value

    check()


def test_what_it_does_not_do_it_says(fake_runtime: StepflowRuntime) -> None:
    with pytest.raises(ServerFaultError, match="FakeServer does not do GET .*compon"):
        asyncio.run(fake_runtime.list_components())


@pytest.mark.parametrize(
    ("life", "words"),
    [
        ({"start_after": -1}, "start_after must be from 0 on"),
        ({"run_seconds": float("nan")}, "run_seconds must be from 0 on"),
        ({"log_lines": 1.5}, "log_lines must be a whole number from 0 on"),
        ({"crash_on_run": 0}, "crash_on_run must be a whole number from 1 on"),
        ({"exit_code": 256}, "exit_code must be an exit code"),
        ({"exit_code": -signal.SIGSTOP}, "exit_code must be .* signal that ends"),
        ({"output": {1, 2}}, "output cannot be sent as JSON"),
        ({"output": float("inf")}, "output cannot be sent as JSON"),
    ],
)
def test_a_life_that_cannot_be_is_refused_by_name(
    life: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        Life(**life)


def test_it_has_to_be_entered_and_leaves_no_files() -> None:
    fake = FakeServer()
    with pytest.raises(RuntimeError, match="has to be entered"):
        _ = fake.binary
    with fake:
        folder = fake.binary.parent
        assert folder.exists()
        with pytest.raises(RuntimeError, match="none is started yet"):
            fake.flood(1)
        with pytest.raises(ValueError, match="stream must be"):
            fake.flood(1, stream="std")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="lines must be a whole number"):
            fake.flood(-1)
    assert not folder.exists()
    assert repr(AS_IT_CAME) == "ECHO"
