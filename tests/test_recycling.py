"""Recycling: a server that has done its share is replaced, and nobody notices."""

from __future__ import annotations

import asyncio
import gc
import inspect
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepflow_runtime import (
    ConnectionLostError,
    FlowId,
    LogConfig,
    NotFoundError,
    RestartPolicy,
    RunCompleted,
    RunTimeoutError,
    RuntimeState,
    RuntimeStoppedError,
    ServerCrashedError,
    StepflowClient,
    StepflowRuntime,
    StepStarted,
)
from stepflow_runtime.server import recycling
from stepflow_runtime.server.recycling import (
    LONGEST_PAUSE,
    PATIENCE,
    Limits,
    Obstacle,
    is_worth_telling,
    pause_after,
)
from stepflow_runtime.traffic import Traffic

from .conftest import (
    ECHO,
    SLEEP,
    each_backend,
    processes_left,
    wait_until,
)
from .steps import cancelling_at_step, in_a_task
from .test_forks import in_a_forked_child
from .test_life import kill_server

FAILING = {
    "steps": [{"id": "a", "component": "/sleep", "input": {"duration_ms": "soon"}}],
    "output": {"$step": "a"},
}
QUIET = LogConfig(level="error")


def start(**options: Any) -> StepflowRuntime:
    return StepflowRuntime.start(**{"recycle_after_runs": 5, **options})


async def run_some(runtime: StepflowRuntime, number: int = 5) -> None:
    for value in range(number):
        assert (await runtime.run(ECHO, value)).unwrap() == value


async def wait_recycled(runtime: StepflowRuntime, times: int = 1) -> None:
    await wait_until(
        lambda: runtime.recycles >= times and runtime.state is RuntimeState.READY
    )


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "stepflow_runtime"
    ]


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recycling, "PATIENCE", 0.1)
    monkeypatch.setattr(recycling, "pause_after", lambda failures, closed: 0.1 + closed)


# -- what is decided -------------------------------------------------------------------


@given(
    limit=st.none() | st.integers(1, 1000),
    above=st.none() | st.integers(1, 1000),
    runs=st.integers(0, 2000),
    memory=st.integers(0, 2000),
    fresh=st.integers(0, 2000),
)
def test_a_server_is_due_when_it_is_above_a_limit_and_a_fresh_one_would_not_be(
    limit: int | None, above: int | None, runs: int, memory: int, fresh: int
) -> None:
    is_due = Limits(runs=limit, memory=above).is_due(
        runs=runs, memory=memory, fresh_memory=fresh
    )
    by_runs = limit is not None and runs >= limit
    by_memory = above is not None and memory > above and memory > 2 * fresh
    assert is_due == (by_runs or by_memory)


@given(st.lists(st.floats(0, PATIENCE), min_size=1, max_size=50))
def test_however_often_it_fails_the_gate_is_closed_a_tenth_of_the_time_at_most(
    closed: list[float],
) -> None:
    pauses = [pause_after(number, each) for number, each in enumerate(closed, 1)]
    for each, pause in zip(closed, pauses, strict=True):
        assert each <= (each + pause) / 10 + 1e-9
        assert 0 < pause <= max(LONGEST_PAUSE, 9 * PATIENCE)


@given(st.floats(0, PATIENCE))
def test_drains_that_succeed_quickly_may_follow_each_other(closed: float) -> None:
    pause = pause_after(0, closed)
    assert (pause == 0) == (closed <= 0.1)
    assert closed - 0.1 <= (closed + pause) / 10 + 1e-9


@given(st.integers(1, 10_000), st.floats(0, PATIENCE))
def test_pauses_grow(failures: int, closed: float) -> None:
    assert pause_after(failures, closed) <= pause_after(failures + 1, closed)


@given(st.sampled_from(Obstacle), st.integers(1, 100))
def test_what_ends_by_itself_is_told_of_when_it_lasts(
    obstacle: Obstacle, failures: int
) -> None:
    ends_by_itself = obstacle in (Obstacle.CALLS, Obstacle.RUNS)
    is_told = is_worth_telling(obstacle, failures)
    assert is_told == (failures >= 3 or not ends_by_itself)


# -- the gate --------------------------------------------------------------------------


def test_nobody_is_inside_once_the_gate_was_closed_and_nobody_under_way() -> None:
    traffic = Traffic()
    inside: set[int] = set()
    is_over = False

    def call_again_and_again() -> None:
        me = threading.get_ident()
        while not is_over:
            if (hold := traffic.hold()) is not None:
                with hold:
                    inside.add(me)
                    inside.discard(me)

    threads = [threading.Thread(target=call_again_and_again) for _ in range(3)]
    for thread in threads:
        thread.start()
    looks = 0
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        traffic.close()
        if traffic.under_way == 0:
            looks += 1
            assert not any(inside.copy() for _ in range(1000))
        traffic.open()
    is_over = True
    for thread in threads:
        thread.join()
    assert looks
    assert traffic.under_way == 0


async def call(traffic: Traffic) -> None:
    with traffic.hold() or await traffic.wait_hold():
        await asyncio.sleep(60)


@pytest.fixture
def forsaken() -> Iterator[asyncio.AbstractEventLoop]:
    """A loop that ends before its tasks do."""
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda loop, context: None)
    yield loop
    loop.close()
    gc.collect()


def test_a_call_that_is_garbage_gives_its_hold_back(
    forsaken: asyncio.AbstractEventLoop,
) -> None:
    traffic = Traffic()
    task = forsaken.create_task(call(traffic))
    forsaken.run_until_complete(asyncio.sleep(0))
    assert traffic.under_way == 1
    forsaken.close()
    del task
    gc.collect()
    assert traffic.under_way == 0


def test_what_a_call_holds_whose_loop_was_closed_is_reclaimed(
    forsaken: asyncio.AbstractEventLoop,
) -> None:
    traffic = Traffic()
    task = forsaken.create_task(call(traffic))
    forsaken.run_until_complete(asyncio.sleep(0))
    traffic.reclaim()
    assert traffic.under_way == 1  # the loop may go on
    forsaken.close()
    traffic.reclaim()
    assert traffic.under_way == 0
    del task


def test_runs_are_counted_from_many_threads() -> None:
    traffic = Traffic()

    def take() -> None:
        for _ in range(1000):
            traffic.took(1, 1)
            traffic.took(3, 1)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    traffic.took(1, 1)
    assert traffic.runs == 16_001


# -- options ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["recycle_after_runs", "recycle_above_memory"])
@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-1, ValueError), (True, TypeError), (1.5, TypeError)],
)
def test_a_limit_is_a_whole_number_above_0(
    name: str, value: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match=name):
        StepflowRuntime.start(**{name: value})


# -- on the real server ----------------------------------------------------------------


@pytest.mark.anyio
@each_backend
class TestRecycling:
    async def test_thousands_of_runs_do_not_notice(self) -> None:
        inputs = iter(range(5000))

        async def work() -> None:
            for value in inputs:
                assert (await runtime.run(ECHO, value)).unwrap() == value

        codes: list[int] = []
        async with start(
            recycle_after_runs=500, log_config=QUIET, on_crash=codes.append
        ) as runtime:
            port = runtime.port
            async with anyio.create_task_group() as tasks:
                for _ in range(20):
                    tasks.start_soon(work)
            assert runtime.recycles >= 8
            assert runtime.port == port
            assert (runtime.restarts, runtime.last_exit, codes) == (0, None, [])

    async def test_its_states_are_those_of_a_restart(self) -> None:
        async with start() as runtime:
            changes, pid = runtime.state_changes(), runtime.pid
            await run_some(runtime)
            await wait_recycled(runtime)
            assert runtime.pid != pid
        seen = [(change.state.value, change.recycles) async for change in changes]
        assert seen[:3] == [("ready", 0), ("restarting", 1), ("ready", 1)]

    async def test_a_batch_counts_its_items(self) -> None:
        async with start() as runtime:
            batch = await runtime.submit_batch(ECHO, range(5))
            _, results = await runtime.get_batch(batch)
            assert [each.output for each in results] == list(range(5))
            await wait_recycled(runtime)

    async def test_its_memory_is_given_back(self) -> None:
        def memory() -> int:
            return int(psutil.Process(runtime.pid).memory_info().rss)

        limit = 32 * 1024 * 1024
        async with StepflowRuntime.start(
            recycle_above_memory=limit, health_interval=0.05, log_config=QUIET
        ) as runtime:
            fresh = memory()
            while not runtime.recycles:
                async for _, result in runtime.run_many(ECHO, range(500)):
                    result.unwrap()
            await wait_recycled(runtime)
            assert memory() < (fresh + limit) / 2

    async def test_a_long_run_is_neither_lost_nor_in_everybodys_way(
        self, short_pauses: None
    ) -> None:
        async with start() as runtime, anyio.create_task_group() as tasks:

            async def run_long() -> None:
                assert (await runtime.run(SLEEP, 1500)).is_success
                ended.set()

            ended = anyio.Event()
            tasks.start_soon(run_long)
            waits = []
            while not ended.is_set():
                began = time.perf_counter()
                await run_some(runtime, 1)
                waits.append(time.perf_counter() - began)
            assert runtime.recycles == 0
            assert sum(wait for wait in waits if wait > 0.05) < 0.8
            await wait_recycled(runtime)

    async def test_results_that_nobody_fetched_yet_survive(
        self, caplog: pytest.LogCaptureFixture, short_pauses: None
    ) -> None:
        async with start() as runtime:
            single = await runtime.submit(ECHO, "single")
            batch = await runtime.submit_batch(ECHO, ["first", "second"])
            unwanted = await runtime.submit(ECHO)
            await run_some(runtime, 10)
            await wait_until(lambda: warnings_of(caplog))
            (warning,) = warnings_of(caplog)
            assert "get_result() or get_batch()" in warning
            _, results = await runtime.get_batch(batch)
            assert [each.output for each in results] == ["first", "second"]
            assert (await runtime.get_result(single)).output == "single"
            await run_some(runtime)
            assert runtime.recycles == 0
            await runtime.delete_run(unwanted.upper())
            await wait_recycled(runtime)
        assert len(warnings_of(caplog)) == 1

    async def test_where_all_submit_and_fetch_all_the_time_it_falls_still_too(
        self,
    ) -> None:
        """At the gate, those who fetch go on, and those who submit wait."""

        async def submit_and_fetch() -> None:
            while not runtime.recycles:
                run_id = await runtime.submit(ECHO, 1)
                await anyio.sleep(0.005)
                assert (await runtime.get_run(run_id)).run_id == run_id
                assert (await runtime.get_result(run_id)).output == 1

        async with start() as runtime, anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(submit_and_fetch)
            with anyio.fail_after(3):
                await wait_recycled(runtime)

    async def test_the_wait_at_the_gate_counts_for_the_time_limit(self) -> None:
        async with start() as runtime:
            await run_some(runtime, 1)
            traffic = runtime._supervisor.traffic
            assert isinstance(traffic, Traffic)
            traffic.close()
            with anyio.fail_after(1), pytest.raises(RunTimeoutError):
                await runtime.run(ECHO, timeout=0.05)
            with anyio.fail_after(1), pytest.raises(RunTimeoutError, match="run x"):
                await runtime.get_result("x", timeout=0.05)

    async def test_results_of_a_server_that_crashed_are_not_waited_for(self) -> None:
        async with start(restart_policy=RestartPolicy.ALWAYS) as runtime:
            await runtime.submit(ECHO)
            kill_server(runtime)
            await wait_until(lambda: runtime.restarts)
            await run_some(runtime)
            await wait_recycled(runtime)
            assert runtime.restarts == 1

    async def test_a_durable_store_keeps_results(self, tmp_path: Path) -> None:
        config = {
            "plugins": {"builtin": {"type": "builtin"}},
            "routes": {"/": [{"plugin": "builtin"}]},
            "storageConfig": {
                "type": "sqlite",
                "databaseUrl": f"sqlite:{tmp_path}/db?mode=rwc",
                "autoMigrate": True,
            },
        }
        async with start(config_path=config) as runtime:
            run_id = await runtime.submit(ECHO, "kept")
            await run_some(runtime, 4)
            await wait_recycled(runtime)
            assert (await runtime.get_result(run_id)).output == "kept"

    async def test_runs_of_other_clients_survive(self, short_pauses: None) -> None:
        async with start() as runtime, StepflowClient(runtime.url) as stranger:
            run_id = await stranger.submit(SLEEP, 500)
            await run_some(runtime)
            result = await stranger.get_result(run_id)
            assert result.is_success
            assert runtime.recycles == 0
            await wait_recycled(runtime)

    async def test_a_cancelled_callers_errand_is_done_first(self) -> None:
        async with start() as runtime:
            await run_some(runtime, 4)
            with anyio.move_on_after(0.3):
                await runtime.run(SLEEP, 30_000)
            await run_some(runtime, 1)
            await wait_recycled(runtime)
            assert runtime.restarts == 0

    async def test_a_failed_run_keeps_its_reasons(self) -> None:
        async def fail() -> None:
            for _ in range(3):
                error = (await runtime.run(FAILING)).error
                assert error is not None
                assert (error.step_id, error.component) == ("a", "/sleep")

        config = {
            "plugins": {"builtin": {"type": "builtin"}},
            "routes": {"/": [{"plugin": "builtin"}]},
            "retry": {"transportMaxRetries": 0},
        }
        async with (
            start(config_path=config, recycle_after_runs=2) as runtime,
            anyio.create_task_group() as tasks,
        ):
            for _ in range(5):
                tasks.start_soon(fail)
        assert runtime.recycles

    async def test_a_follower_is_not_interrupted_nor_in_the_way_of_its_own_body(
        self, short_pauses: None
    ) -> None:
        """The body's runs wait at the gate that only the follower's end could open."""
        async with start() as runtime:
            run_id = await runtime.submit(SLEEP, 500)
            seen = []
            async for event in runtime.events(run_id):
                seen.append(event)
                await run_some(runtime, 6)
            assert isinstance(seen[-1], RunCompleted)
            assert any(isinstance(each, StepStarted) for each in seen)
            assert runtime.recycles == 0
            assert (await runtime.get_result(run_id)).is_success
            await wait_recycled(runtime)

    async def test_a_follower_that_nobody_reads_any_more_is_not_waited_for(
        self, short_pauses: None
    ) -> None:
        async with start() as runtime:
            run_id = await runtime.submit(ECHO)
            await runtime.get_result(run_id)
            events = runtime.events(run_id)
            await anext(events)
            await run_some(runtime)
            del events
            gc.collect()
            await wait_recycled(runtime)

    async def test_run_many_with_a_slow_reader_goes_on(self) -> None:
        async with start() as runtime:
            seen = {}
            async for index, result in runtime.run_many(ECHO, range(30), 4):
                seen[index] = result.unwrap()
                await anyio.sleep(0.02)
            assert seen == {number: number for number in range(30)}
            assert runtime.recycles >= 3

    async def test_what_was_stored_by_its_id_is_taken_along(self) -> None:
        async with start() as runtime:
            flow_id = await runtime.store_flow(ECHO)
            blobs = {
                await runtime.put_blob(data, filename=filename): data
                for data, filename in [
                    ({"pi": 5.477225575051661, "big": 2**63}, "Zoë.json"),
                    (b"\0\xff", "raw.bin"),
                    ("text", None),
                ]
            }
            for times in range(1, 4):
                for _ in range(5):
                    result = await runtime.run(FlowId(flow_id), 1)
                    assert result.output == 1
                await wait_recycled(runtime, times)
                for blob_id, data in blobs.items():
                    assert await runtime.get_blob(blob_id) == data

    async def test_more_than_can_be_taken_along_keeps_the_server(
        self,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(recycling, "MOST_BYTES", 1000)
        async with start() as runtime:
            blob_id = await runtime.put_blob("x" * 2000)
            await run_some(runtime)
            await wait_until(lambda: warnings_of(caplog))
            assert "put_blob() and store_flow()" in warnings_of(caplog)[0]
            assert await runtime.get_blob(blob_id) == "x" * 2000
            assert runtime.recycles == 0

    @pytest.mark.parametrize("is_for_good", [False, True])
    async def test_a_fresh_server_that_cannot_be_reached_is_tried_again(
        self,
        is_for_good: bool,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """But calls wait for what is taken along only so long."""

        def unpack(packed: Any, transport: Any) -> Any:
            if is_for_good or next(attempts) < 3:
                raise ConnectionLostError("out of descriptors")
            return real(packed, transport)

        attempts = itertools.count()
        real = recycling._Packed.unpack
        monkeypatch.setattr(recycling._Packed, "unpack", unpack)
        monkeypatch.setattr(recycling, "UNPACKING_TIMEOUT", 0.5)
        async with start() as runtime:
            blob_id = await runtime.put_blob("kept")
            await run_some(runtime, 6)
            await wait_recycled(runtime)
            if is_for_good:
                with pytest.raises(NotFoundError):
                    await runtime.get_blob(blob_id)
                assert "did not take 1 of the blobs" in warnings_of(caplog)[0]
            else:
                assert await runtime.get_blob(blob_id) == "kept"

    async def test_calls_of_every_kind_wait_at_the_gate(self) -> None:
        """But what only makes an iterator, or looks at what is here."""
        calls: dict[str, tuple[Any, ...]] = {
            "run": (ECHO,),
            "submit": (ECHO,),
            "get_result": ("x",),
            "submit_batch": (ECHO, [1]),
            "get_batch": ("x",),
            "cancel": ("x",),
            "get_run": ("x",),
            "list_runs": (),
            "get_steps": ("x",),
            "delete_run": ("x",),
            "validate": (ECHO,),
            "store_flow": (ECHO,),
            "get_flow_variables": (ECHO,),
            "list_components": (),
            "put_blob": (1,),
            "get_blob": ("x",),
            "health": (),
            "timeline": ("x",),
        }
        others = {"serve", "start_async", "stop_async", "wait_ready"}
        public = {
            name
            for name, value in inspect.getmembers(
                StepflowRuntime, inspect.iscoroutinefunction
            )
            if not name.startswith("_")
        }
        assert public == {*calls, *others}
        async with start() as runtime:
            await run_some(runtime, 1)
            traffic = runtime._supervisor.traffic
            assert isinstance(traffic, Traffic)
            traffic.close()
            for name, arguments in calls.items():
                with anyio.move_on_after(0.02) as scope:
                    await getattr(runtime, name)(*arguments)
                assert scope.cancelled_caught, name
            with anyio.move_on_after(0.02) as scope:
                await anext(runtime.events("x"))
            assert scope.cancelled_caught
            assert traffic.under_way == 0

    @pytest.mark.parametrize("policy", RestartPolicy)
    async def test_a_crash_in_the_middle_of_draining_is_a_crash(
        self, policy: RestartPolicy
    ) -> None:
        async with (
            start(restart_policy=policy) as runtime,
            anyio.create_task_group() as tasks,
        ):

            async def run_long() -> None:
                with pytest.raises(ServerCrashedError, match="was killed by SIGKILL"):
                    await runtime.run(SLEEP, 30_000)

            async def wait_at_the_gate() -> None:
                if policy is RestartPolicy.NEVER:
                    with pytest.raises(ServerCrashedError):
                        await runtime.run(ECHO)
                else:
                    await run_some(runtime, 1)

            tasks.start_soon(run_long)
            await wait_until(
                lambda: any(entry.run_id for entry in runtime.get_recent_logs(1000))
            )
            await run_some(runtime)
            await wait_until(lambda: is_closed(runtime))
            tasks.start_soon(wait_at_the_gate)
            await anyio.sleep(0.01)
            kill_server(runtime)
        assert runtime.recycles == 0
        assert runtime.restarts == (policy is not RestartPolicy.NEVER)

    async def test_crashes_between_recycles_are_no_row_of_crashes(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The server was well for long; only each of its lives was short."""
        monkeypatch.setattr("stepflow_runtime.server.restart.FRESH_AFTER", 0.2)
        async with start(
            restart_policy=RestartPolicy.ALWAYS, max_restarts=1
        ) as runtime:
            for _ in range(3):
                recycles = runtime.recycles
                for times in range(1, 4):
                    await anyio.sleep(0.07)
                    await run_some(runtime)
                    await wait_recycled(runtime, recycles + times)
                restarts = runtime.restarts
                kill_server(runtime)
                await wait_until(lambda: runtime.restarts > restarts)  # noqa: B023
                await runtime.wait_ready()
            assert runtime.restarts == 3

    @pytest.mark.parametrize("policy", RestartPolicy)
    async def test_a_fresh_server_that_does_not_start(
        self, policy: RestartPolicy, real_binary: Path, tmp_path: Path
    ) -> None:
        codes: list[int] = []
        link = tmp_path / "server"
        link.symlink_to(real_binary)
        async with start(
            binary=link,
            restart_policy=policy,
            max_restarts=1,
            on_crash=codes.append,
        ) as runtime:
            link.unlink()
            await run_some(runtime)
            await wait_until(lambda: runtime.state is RuntimeState.FAILED)
            with pytest.raises(
                ServerCrashedError, match="cannot be executed"
            ) as caught:
                await runtime.run(ECHO)
            is_told = "It was being recycled" in str(caught.value)
            assert is_told == (policy is RestartPolicy.NEVER)
            assert runtime.recycles == 1
            assert runtime.restarts == (policy is not RestartPolicy.NEVER)
            await wait_until(lambda: len(codes) == 1 + runtime.restarts)

    async def test_a_fresh_server_whose_port_was_taken(
        self, fake_server: Callable[[str], Path], real_binary: Path, tmp_path: Path
    ) -> None:
        """By somebody who gives it back: it is launched once more."""
        flag = tmp_path / "taken"
        script = fake_server(
            f'[ -e {flag} ] && rm {flag} && exec {real_binary} "$@" --config /nope\n'
            f'exec {real_binary} "$@"'
        )
        async with start(
            binary=script, restart_policy=RestartPolicy.ON_FAILURE
        ) as runtime:
            port = runtime.port
            flag.touch()
            await run_some(runtime, 6)
            await wait_until(lambda: runtime.restarts)
            await run_some(runtime, 1)
            assert runtime.port == port
            assert (runtime.recycles, runtime.restarts) == (1, 1)

    async def test_a_stop_while_calls_wait_at_the_gate_is_prompt(self) -> None:
        with anyio.fail_after(5):
            async with anyio.create_task_group() as tasks:
                async with start() as runtime:

                    async def call() -> None:
                        with pytest.raises(RuntimeStoppedError):
                            await runtime.run(SLEEP, 30_000)

                    tasks.start_soon(call)
                    await wait_until(lambda: runtime.get_recent_logs())
                    await run_some(runtime)
                    await wait_until(lambda: is_closed(runtime))
                    tasks.start_soon(call)
                    await anyio.sleep(0.01)
                assert runtime.state is RuntimeState.STOPPED

    async def test_cancelled_at_whatever_step_it_leaves_nothing(self) -> None:
        """The runs before it are not looked at: their steps are others' to test."""
        fired = True
        for number in itertools.count(0, 2):
            if not fired:
                break
            fired = await recycle_cancelled_at(number)
        assert number > 20

    @pytest.mark.parametrize("hosting", ["served", "hosted"])
    async def test_it_is_the_same_wherever_the_runtime_lives(
        self, hosting: str
    ) -> None:
        if hosting == "served":
            async with anyio.create_task_group() as tasks:
                runtime = await tasks.start(start().serve)
                await recycle_in_tasks(runtime)
                tasks.cancel_scope.cancel()
        else:
            runtime = await StepflowRuntime.start_async(recycle_after_runs=5)
            try:
                await recycle_in_tasks(runtime)
            finally:
                await runtime.stop_async()


def is_closed(runtime: StepflowRuntime) -> bool:
    traffic = runtime._supervisor.traffic
    assert isinstance(traffic, Traffic)
    return traffic._is_closed


async def recycle_in_tasks(runtime: StepflowRuntime) -> None:
    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(run_some, runtime, 20)
    assert runtime.recycles >= 2


async def recycle_cancelled_at(number: int) -> bool:
    """Cancel before the n-th step after a recycle was due; False if there is none."""
    async with anyio.create_task_group() as tasks:

        async def recycle() -> None:
            async with start(recycle_after_runs=1) as runtime:
                result = await runtime.run(ECHO, 1)
                assert result.output == 1
                counter.steps = 0
                await wait_recycled(runtime)
                counter.steps = -1_000_000

        def cancel() -> None:
            tasks.cancel_scope.cancel()

        with cancelling_at_step(number, cancel) as counter:
            counter.steps = -1_000_000
            with anyio.fail_after(20):
                await in_a_task(recycle)
    assert processes_left() == []
    return tasks.cancel_scope.cancel_called


def test_without_an_event_loop_and_from_many_threads() -> None:
    def work() -> None:
        async def main() -> None:
            await run_some(runtime, 25)

        asyncio.run(main())

    with start() as runtime:
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert runtime.recycles >= 3


def test_a_call_whose_loop_was_closed_around_it_is_not_waited_for(
    short_pauses: None, forsaken: asyncio.AbstractEventLoop
) -> None:
    with start() as runtime:
        forgotten = forsaken.create_task(runtime.run(SLEEP, 500))
        forsaken.run_until_complete(asyncio.sleep(0.2))
        forsaken.close()
        asyncio.run(run_some(runtime))
        asyncio.run(wait_recycled(runtime))
        assert not forgotten.done()
        del forgotten


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child_does_not_wait_at_the_gate() -> None:
    def child() -> None:
        with pytest.raises(RuntimeStoppedError, match="was forked from"):
            asyncio.run(runtime.run(ECHO))

    with start() as runtime:
        asyncio.run(run_some(runtime, 1))
        traffic = runtime._supervisor.traffic
        assert isinstance(traffic, Traffic)
        traffic.close()
        assert in_a_forked_child(child) == ""
