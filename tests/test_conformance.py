"""What every executor does, however it was come by: embedded or a client, and each way."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
import anyio.to_thread
import pytest

from stepflow_runtime import (
    ConflictError,
    FlowFailedError,
    FlowId,
    FlowNotFoundError,
    FlowResult,
    FlowStatus,
    FlowSyntaxError,
    InvalidFlowError,
    InvalidRequestError,
    ItemCounts,
    NotFoundError,
    RunCompleted,
    RunCreated,
    RunEvent,
    RunInfo,
    RunStatus,
    RunTimeoutError,
    StepCompleted,
    StepflowClient,
    StepflowExecutor,
    StepflowRuntime,
    StepReady,
    StepsNeeded,
    StepStarted,
    SubRunCreated,
    UnrepresentableValueError,
    api,
)
from stepflow_runtime.api import ApiExecutor

from .conftest import (
    ECHO,
    EXAMPLES,
    SLEEP,
    each_backend,
    open_descriptors,
    processes_left,
    wait_until,
)
from .executors import (
    CONFIG,
    KINDS,
    SYNC,
    executor_of,
    most_at_a_time,
    server_by_hand,
    watch_traffic,
)

pytestmark = [pytest.mark.anyio, each_backend]

# No run of this long is waited for.
LONG = 60_000
UNKNOWN_RUN = "01a20912-0000-7000-8000-000000000000"
UNKNOWN_HASH = "0" * 64


@pytest.fixture(scope="module")
def server_url(real_binary: Path) -> Iterator[str]:
    """One server for all clients: they see each other's runs, and flows have names."""
    gc.collect()
    gc.freeze()  # what is there already need not be looked through after each test
    with server_by_hand(real_binary) as url:
        yield url
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _leave_nothing_behind(server_url: str, _prepared_process: None) -> Iterator[None]:
    """As everywhere; but the server for the clients stays."""
    stays = {each.split()[0] for each in processes_left()}
    before = open_descriptors()
    yield
    gc.collect()
    assert [each for each in processes_left() if each.split()[0] not in stays] == []
    deadline = time.monotonic() + 5
    while (threads := _our_threads()) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert threads == []
    after = open_descriptors()
    assert {fd: what for fd, what in after.items() if before.get(fd) != what} == {}


def _our_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("stepflow")]


@pytest.fixture
def sync_runtime(request: pytest.FixtureRequest) -> Iterator[StepflowRuntime | None]:
    """Started and stopped where no event loop runs."""
    if request.node.callspec.params["executor"] != SYNC:
        yield None
        return
    runtime = StepflowRuntime.start(CONFIG)
    try:
        yield runtime
    finally:
        runtime.stop()


@pytest.fixture(params=KINDS)
async def executor(
    request: pytest.FixtureRequest,
    anyio_backend: Any,
    sync_runtime: StepflowRuntime | None,
    server_url: str,
) -> AsyncIterator[StepflowExecutor]:
    if sync_runtime is not None:
        yield sync_runtime
        return
    async with executor_of(request.param, server_url) as made:
        yield made


# For tests that take long: one of each way that an executor's crew can live.
each_crew = pytest.mark.parametrize(
    "executor",
    ["embedded, entered", SYNC, "client, not entered", "client, with an httpx client"],
    indirect=True,
)


@pytest.fixture
def name() -> str:
    """The name of a flow that no other test knows."""
    return f"flow-{uuid4().hex}"


def named(flow: dict[str, Any], name: str) -> dict[str, Any]:
    return {**flow, "name": name}


def noop(input: Any, name: str = "noop") -> dict[str, Any]:
    """A flow of one step that returns what the flow says."""
    step = {"id": "a", "component": "/noop", "input": input}
    return {"name": name, "steps": [step], "output": {"$step": "a"}}


# Fails at once where the input has no x.
PICK = noop({"$input": "$.x"}, "pick")


def as_text(value: Any) -> str:
    """Tells 1 from 1.0 and from True, and -0.0 from 0."""
    return json.dumps(value, sort_keys=True)


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    """Wait for something that the server does, and that nothing tells us of."""
    with anyio.fail_after(15):
        while not await condition():  # noqa: ASYNC110
            await anyio.sleep(0.01)


async def only_run(executor: StepflowExecutor, name: str) -> RunInfo:
    """The run of the flow of this name, as soon as there is one."""
    await until(lambda: executor.list_runs(flow_name=name))
    (run,) = await executor.list_runs(flow_name=name)
    return run


async def is_cancelled(executor: StepflowExecutor, name: str) -> bool:
    runs = await executor.list_runs(flow_name=name)
    return [run.status for run in runs] == [RunStatus.CANCELLED]


async def collected(
    executor: StepflowExecutor, run_id: str, **options: Any
) -> list[RunEvent]:
    with anyio.fail_after(20):
        return [event async for event in executor.events(run_id, **options)]


@pytest.fixture
def known_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first answer comes without waiting: the id of a run is known from the start."""
    monkeypatch.setattr(api, "_FIRST_WAIT", 0)


# -- what it is --------------------------------------------------------------------------


async def shouted(executor: StepflowExecutor, text: str) -> Any:
    return (await executor.run(ECHO, text.upper())).unwrap()


async def test_a_type_checker_takes_both_for_an_executor(server_url: str) -> None:
    async with StepflowRuntime.start() as runtime, StepflowClient(server_url) as client:
        assert await shouted(runtime, "x") == await shouted(client, "x") == "X"
        executors: list[StepflowExecutor] = [runtime, client]
        assert [isinstance(each, StepflowExecutor) for each in executors] == [True] * 2


async def test_it_is_an_executor_and_its_server_is_healthy(
    executor: StepflowExecutor,
) -> None:
    assert isinstance(executor, StepflowExecutor)
    health = await executor.health()
    assert health.is_healthy and health.status == "healthy"
    assert health.version
    assert health.timestamp is not None and health.timestamp.tzinfo is not None


async def test_it_can_be_used_from_another_event_loop_in_a_thread(
    executor: StepflowExecutor,
) -> None:
    async def elsewhere() -> None:
        outputs.append((await executor.run(ECHO, 1)).output)
        outputs.extend(
            [result.output async for _, result in executor.run_many(ECHO, [2])]
        )
        run_id = await executor.submit(ECHO, 3)
        outputs.append((await executor.get_result(run_id)).output)
        outputs.append(len([event async for event in executor.events(run_id)]))

    outputs: list[Any] = []
    with anyio.fail_after(20):
        for backend in ("asyncio", "trio"):
            in_loop = partial(anyio.run, elsewhere, backend=backend)
            await anyio.to_thread.run_sync(in_loop)
        assert (await executor.run(ECHO, 4)).output == 4
    assert outputs == [1, 2, 3, 5, 1, 2, 3, 5]


# -- values ------------------------------------------------------------------------------

VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    2**53,
    -(2**53),
    1.5,
    1e300,
    5e-324,
    "",
    'a\0b\n"\\',
    "\U0001f600 ä \u2028",
    [],
    {},
    [1, [2, [None, {"a": [{}]}]]],
    {"": 1, "a b": 2, "\0": 3, "\U0001f600": 4},
    {"$step": "a"},
    {"$input": "$.x"},
    {"$variable": "v"},
    {"$literal": {"$step": "a"}},
]


async def test_values_arrive_and_come_back_as_they_are(
    executor: StepflowExecutor,
) -> None:
    for value in [*VALUES, VALUES, {"values": VALUES}]:
        before = copy.deepcopy(value)
        result = await executor.run(ECHO, value)
        assert as_text(result.unwrap()) == as_text(value)
        assert as_text(value) == as_text(before)
    batch = await executor.submit_batch(ECHO, VALUES)
    _, results = await executor.get_batch(batch)
    assert as_text([each.output for each in results]) == as_text(VALUES)
    # The one exception, which the docstring tells.
    whole = (await executor.run(ECHO, 1.0)).output
    assert type(whole) is int


async def test_overrides_and_variables_reach_the_flow(
    executor: StepflowExecutor,
) -> None:
    flow = noop({"v": {"$variable": "v"}})
    for value in VALUES:
        result = await executor.run(flow, variables={"v": value})
        assert as_text(result.unwrap()) == as_text({"v": value})
    # The server merges what is inside of a property (RFC 7396).
    overrides = {"a": {"input": {"v": 1, "w": [1, 2.5, None]}}}
    overridden = {"v": 1, "w": [1, 2.5, None]}
    assert (await executor.run(flow, 0, overrides)).unwrap() == overridden
    run_id = await executor.submit(flow, 0, overrides)
    assert (await executor.get_result(run_id)).output == overridden
    batch = await executor.submit_batch(flow, [0, 0], None, overrides)
    _, results = await executor.get_batch(batch)
    assert [each.output for each in results] == [overridden] * 2
    many = executor.run_many(flow, [0], variables={"v": 1})
    assert [result.output async for _, result in many] == [{"v": 1}]


async def test_wrong_overrides_and_variables_are_explained(
    executor: StepflowExecutor,
) -> None:
    with pytest.raises(InvalidRequestError, match="no step 'b'; it has 'a'"):
        await executor.run(ECHO, 0, {"b": {"input": 1}})
    with pytest.raises(TypeError, match=r"overrides\['a'\] must be a mapping"):
        await executor.run(ECHO, 0, {"a": 1})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="variables must be a mapping"):
        await executor.submit(ECHO, 0, variables=[1])  # type: ignore[arg-type]


async def test_variables_come_from_the_environment_if_the_flow_says_so(
    executor: StepflowExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {
        "given": "from the environment",
        "json": '{"a": [1, null]}',
        "number": "7",
        "long_number": "12345678901234567890",
        "text": "neither: [json",
    }
    properties: dict[str, Any] = {
        name: {"env_var": f"CONFORMANCE_{name.upper()}"} for name in [*texts, "unset"]
    }
    properties["unset"]["default"] = "default"
    flow = noop({name: {"$variable": name} for name in properties})
    flow["schemas"] = {
        "properties": {"variables": {"type": "object", "properties": properties}}
    }
    for name, text in texts.items():
        monkeypatch.setenv(f"CONFORMANCE_{name.upper()}", text)
    monkeypatch.delenv("CONFORMANCE_UNSET", raising=False)
    expected = {
        "given": "explicitly",
        "json": {"a": [1, None]},
        "number": 7,
        "long_number": "12345678901234567890",
        "text": "neither: [json",
        "unset": "default",
    }
    given = {"given": "explicitly"}
    result = await executor.run(flow, variables=given, variables_from_env=True)
    assert result.unwrap() == expected
    # What is in the environment counts at the time of the call.
    monkeypatch.setenv("CONFORMANCE_NUMBER", "8")
    run_id = await executor.submit(flow, variables=given, variables_from_env=True)
    assert (await executor.get_result(run_id)).unwrap() == {**expected, "number": 8}
    without = await executor.run(flow, variables=given)
    assert without.error is not None
    assert without.error.message.startswith("Undefined variable")
    declared = await executor.get_flow_variables(flow)
    assert {name: each.env_var for name, each in declared.items()} == {
        name: f"CONFORMANCE_{name.upper()}" for name in properties
    }


async def test_what_would_not_arrive_as_it_is_is_refused_before_anything_is_sent(
    executor: StepflowExecutor,
) -> None:
    async def many(input: Any) -> None:
        async for _ in executor.run_many(ECHO, [input]):
            pytest.fail("it ran")

    assert isinstance(executor, ApiExecutor)
    traffic = watch_traffic(executor)
    cycle: list[Any] = []
    cycle.append(cycle)
    for bad in (float("nan"), float("inf"), 2**53 + 1, "\ud800", b"x", {1: 2}, cycle):
        calls: list[Callable[[], Awaitable[object]]] = [
            partial(executor.run, ECHO, {"x": [bad]}),
            partial(executor.submit, ECHO, {"x": [bad]}),
            partial(executor.submit_batch, ECHO, [1, {"x": [bad]}]),
            partial(many, {"x": [bad]}),
            partial(executor.run, ECHO, 1, {"a": {"x": [bad]}}),
            partial(executor.run, ECHO, 1, variables={"x": [bad]}),
        ]
        if bad != 2**53 + 1:
            calls.append(partial(executor.put_blob, {"x": [bad]}))
        for call in calls:
            with pytest.raises(UnrepresentableValueError) as caught:
                await call()
            assert ".x[0]" in caught.value.path
    for big in (2**64, -(2**63) - 1):
        with pytest.raises(UnrepresentableValueError):
            await executor.put_blob([big])
    assert traffic.requests == []


# -- how it ends -------------------------------------------------------------------------


async def test_a_failed_flow_is_a_result_and_unwrap_raises(
    executor: StepflowExecutor,
) -> None:
    expression = await executor.run(PICK, {})
    component = await executor.run(SLEEP, "no number")
    submitted = await executor.get_result(await executor.submit(PICK, {}))
    for result in (expression, component, submitted):
        assert result.status is FlowStatus.FAILED and result.is_failed
        assert result.output is None
        assert result.error is not None
        assert (result.error.step_id, result.error.attempts) == ("a", 1)
        with pytest.raises(FlowFailedError, match=result.run_id) as caught:
            result.unwrap()
        assert caught.value.result is result
        assert result.error.message in str(caught.value)
    for result in (expression, submitted):
        assert result.error is not None
        assert result.error.code == "EXPRESSION_FAILURE"
        assert result.error.message == "Input path $.x not found"
        assert result.error.component == "/noop"
    assert component.error is not None
    assert component.error.code == "UNREACHABLE"
    assert component.error.component == "/sleep"


async def test_a_flow_can_be_a_file_a_mapping_or_an_id(
    executor: StepflowExecutor, tmp_path: Path, name: str
) -> None:
    flow = named(ECHO, name)
    path = tmp_path / "flow.yaml"
    path.write_text(json.dumps(flow, indent=2))
    flow_id = await executor.store_flow(path)
    assert isinstance(flow_id, FlowId)
    assert await executor.store_flow(flow) == flow_id
    assert await executor.store_flow(copy.deepcopy(flow)) == flow_id
    assert await executor.store_flow(flow_id) == flow_id
    assert await executor.store_flow({**flow, "description": "other"}) != flow_id
    for source in (path, str(path), flow, flow_id, FlowId(str(flow_id))):
        result = await executor.run(source, [1])
        assert result.unwrap() == [1]
        assert (await executor.get_run(result.run_id)).flow_id == flow_id
    assert len(await executor.list_runs(flow_name=name)) == 5


async def test_a_flow_that_cannot_be_run_is_refused(
    executor: StepflowExecutor, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("steps: [\n")
    ahead = {"steps": [{"id": "a", "component": "/noop"}], "output": {"$step": "b"}}
    for call in (executor.run, executor.submit, executor.store_flow):
        with pytest.raises(FlowNotFoundError, match="nowhere.yaml"):
            await call(tmp_path / "nowhere.yaml")
        with pytest.raises(FlowSyntaxError) as syntax:
            await call(broken)
        assert syntax.value.source == str(broken)
        with pytest.raises(InvalidFlowError) as invalid:
            await call(ahead)
        assert "fatal" in [each.level for each in invalid.value.diagnostics]
        with pytest.raises(InvalidFlowError):
            await call({"steps": 3})
        with pytest.raises(TypeError, match="flow must be"):
            await call(3)  # type: ignore[arg-type]
    with pytest.raises(NotFoundError) as unknown:
        await executor.run(FlowId(UNKNOWN_HASH))
    assert unknown.value.flow_id == UNKNOWN_HASH


async def test_a_run_can_be_submitted_and_its_result_fetched(
    executor: StepflowExecutor,
) -> None:
    run_id = await executor.submit(ECHO, {"x": 1})
    for _ in range(2):
        result = await executor.get_result(run_id)
        assert result == FlowResult(
            status=FlowStatus.SUCCESS, run_id=run_id, output={"x": 1}
        )
    one = await executor.submit_batch(ECHO, ["x"])
    assert (await executor.get_result(one)).output == "x"
    batch = await executor.submit_batch(ECHO, [1, 2, 3])
    with pytest.raises(ValueError, match=f"run {batch} is a batch of 3 items"):
        await executor.get_result(batch)
    for unknown in (executor.get_result, executor.get_batch):
        with pytest.raises(NotFoundError) as caught:
            await unknown(UNKNOWN_RUN)
        assert caught.value.run_id == UNKNOWN_RUN


@each_crew
async def test_a_run_goes_on_when_the_patience_for_its_result_is_over(
    executor: StepflowExecutor,
) -> None:
    run_id = await executor.submit(SLEEP, LONG)
    for wait in (executor.get_result, executor.get_batch):
        with pytest.raises(RunTimeoutError, match="is not over yet") as caught:
            await wait(run_id, timeout=0.02)
        assert caught.value.run_id == run_id
    with anyio.move_on_after(0.02) as scope:
        await executor.get_result(run_id)
    assert scope.cancelled_caught
    assert (await executor.get_run(run_id)).status is RunStatus.RUNNING
    await executor.cancel(run_id)
    run_id = await executor.submit(SLEEP, 200)
    with pytest.raises(RunTimeoutError):
        await executor.get_result(run_id, timeout=0.01)
    with anyio.fail_after(20):
        assert (await executor.get_result(run_id)).unwrap() == {"duration_ms": 200}
    assert (await executor.get_run(run_id)).status is RunStatus.COMPLETED


async def test_a_timeout_that_cannot_be_is_refused(executor: StepflowExecutor) -> None:
    for call in (executor.run, executor.submit):
        for wrong in (0, -1, float("nan")):
            with pytest.raises(ValueError, match="timeout must be more than 0"):
                await call(ECHO, 1, timeout=wrong)
        for kind in ("1", True):
            with pytest.raises(TypeError, match="timeout must be a number"):
                await call(ECHO, 1, timeout=kind)  # type: ignore[arg-type]
    assert (await executor.run(ECHO, 1, timeout=20)).output == 1


@each_crew
async def test_a_run_given_up_before_its_id_is_known_is_cancelled_on_the_server(
    executor: StepflowExecutor, name: str
) -> None:
    async def time_out() -> None:
        with pytest.raises(RunTimeoutError, match="being cancelled") as caught:
            await executor.run(named(SLEEP, f"{name}-1"), LONG, timeout=0.4)
        assert caught.value.run_id is None

    async def move_on() -> None:
        with anyio.move_on_after(0.4) as scope:
            await executor.run(named(SLEEP, f"{name}-2"), LONG)
        assert scope.cancelled_caught

    for number in (1, 2):
        await executor.store_flow(named(SLEEP, f"{name}-{number}"))
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(time_out)
            tasks.start_soon(move_on)
    for number in (1, 2):
        await until(partial(is_cancelled, executor, f"{name}-{number}"))


async def test_a_run_given_up_when_its_id_is_known_is_cancelled_on_the_server(
    executor: StepflowExecutor, name: str, known_at_once: None
) -> None:
    flow = named(SLEEP, name)
    await executor.store_flow(flow)

    async def time_out() -> None:
        with pytest.raises(RunTimeoutError) as caught:
            await executor.run(flow, LONG, timeout=0.4)
        timed_out.append(caught.value)

    async def move_on() -> None:
        with anyio.move_on_after(0.4) as scope:
            await executor.run(other, LONG)
        assert scope.cancelled_caught

    other = named(SLEEP, f"{name}-2")
    await executor.store_flow(other)
    timed_out: list[RunTimeoutError] = []
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(time_out)
            tasks.start_soon(move_on)
    run = await only_run(executor, name)
    assert timed_out[0].run_id == run.run_id
    assert run.run_id in str(timed_out[0])
    await until(partial(is_cancelled, executor, name))
    await until(partial(is_cancelled, executor, f"{name}-2"))


@each_crew
async def test_a_run_that_outlasts_what_the_server_waits_is_waited_for(
    executor: StepflowExecutor, known_at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "_NEXT_WAIT", 0)
    assert isinstance(executor, ApiExecutor)
    await executor.store_flow(SLEEP)
    traffic = watch_traffic(executor)
    with anyio.fail_after(20):
        assert (await executor.run(SLEEP, 200)).unwrap() == {"duration_ms": 200}
    run_id = traffic.requests[1].rpartition("/")[2]
    waits = [each for each in traffic.requests if each.endswith(f"/runs/{run_id}")]
    assert len(waits) > 1


@pytest.mark.parametrize("executor", ["client, entered"], indirect=True)
async def test_a_run_of_seconds_is_waited_for_second_by_second(
    executor: StepflowExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "_NEXT_WAIT", 1)
    with anyio.fail_after(20):
        assert (await executor.run(SLEEP, 2500)).unwrap() == {"duration_ms": 2500}


async def test_a_short_run_of_a_known_flow_is_one_request(
    executor: StepflowExecutor, tmp_path: Path
) -> None:
    path = tmp_path / "flow.yaml"
    path.write_text(json.dumps(ECHO))
    assert isinstance(executor, ApiExecutor)
    for flow in (ECHO, path):
        await executor.run(flow, 1)
        traffic = watch_traffic(executor)
        assert (await executor.run(flow, 2)).output == 2
        assert traffic.requests[0] == "POST /api/v1/runs"
        # A server of several may be lost with its answer: they are not let wait with that.
        are_several = isinstance(executor, StepflowClient) and len(executor.urls) > 1
        assert len(traffic.requests) == (3 if are_several else 1)


async def test_runs_at_the_same_time_each_get_their_own_result(
    executor: StepflowExecutor,
) -> None:
    async def run(number: int) -> None:
        results[number] = (await executor.run(ECHO, number)).output

    results: dict[int, Any] = {}
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            for number in range(30):
                tasks.start_soon(run, number)
    assert results == {number: number for number in range(30)}


# -- cancelling --------------------------------------------------------------------------


async def test_who_waits_for_a_run_hears_that_it_was_cancelled(
    executor: StepflowExecutor, name: str
) -> None:
    async def run() -> None:
        results.append(await executor.run(named(SLEEP, name), LONG))

    async def wait(run_id: str) -> None:
        results.append(await executor.get_result(run_id))

    results: list[FlowResult] = []
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            run_id = (await only_run(executor, name)).run_id
            tasks.start_soon(wait, run_id)
            info = await executor.cancel(run_id)
    assert (info.run_id, info.status) == (run_id, RunStatus.CANCELLED)
    assert info.has_ended
    assert len(results) == 2
    for result in results:
        assert (result.run_id, result.is_failed) == (run_id, True)
        assert result.error is not None
        assert result.error.code == "CANCELLED"
    assert (await executor.cancel(run_id)).status is RunStatus.CANCELLED


async def test_a_run_that_is_over_is_not_cancelled(executor: StepflowExecutor) -> None:
    done = await executor.run(ECHO, 1)
    failed = await executor.run(PICK, {})
    for result, status in ((done, RunStatus.COMPLETED), (failed, RunStatus.FAILED)):
        assert (await executor.cancel(result.run_id)).status is status
        assert (await executor.get_run(result.run_id)).status is status
    assert (await executor.get_result(done.run_id)).output == 1
    with pytest.raises(NotFoundError):
        await executor.cancel(UNKNOWN_RUN)


# -- batches -----------------------------------------------------------------------------


async def test_a_batch_has_one_result_for_each_input_in_their_order(
    executor: StepflowExecutor,
) -> None:
    inputs = [{"x": n} if n % 3 else {} for n in range(8)]
    batch = await executor.submit_batch(PICK, (each for each in inputs))
    with anyio.fail_after(20):
        info, results = await executor.get_batch(batch)
    assert (info.run_id, info.status) == (batch, RunStatus.FAILED)
    assert info.items == ItemCounts(total=8, completed=5, failed=3)
    assert [each.item_index for each in results] == list(range(8))
    assert {each.run_id for each in results} == {batch}
    assert [each.output for each in results] == [None, 1, 2, None, 4, 5, None, 7]
    for each in results:
        if each.item_index % 3:
            assert each.is_success and each.error is None
        else:
            assert each.error is not None
            assert each.error.code == "EXPRESSION_FAILURE"
            assert each.error.message == "Input path $.x not found"
            assert (each.error.step_id, each.error.attempts) == ("a", 1)
            with pytest.raises(FlowFailedError, match="Input path"):
                each.unwrap()
    alone, nothing = await executor.get_batch(batch, include_results=False)
    # The server adds some of the rest (times, numbers) a moment after the end.
    assert (alone.run_id, alone.status, nothing) == (batch, info.status, [])
    assert (alone.items, alone.created_at) == (info.items, info.created_at)


async def test_a_batch_can_be_looked_at_while_it_runs(
    executor: StepflowExecutor,
) -> None:
    batch = await executor.submit_batch(SLEEP, [LONG] * 3)
    with anyio.fail_after(20):
        info, results = await executor.get_batch(batch, wait=False)
        assert (info.run_id, info.status) == (batch, RunStatus.RUNNING)
        assert not info.has_ended and info.items.total == 3
        assert [each.status for each in results] == [FlowStatus.RUNNING] * 3
        assert [each.item_index for each in results] == [0, 1, 2]
        assert all(each.is_running and each.error is None for each in results)
        with pytest.raises(FlowFailedError, match="not over yet"):
            results[1].unwrap()
        info, nothing = await executor.get_batch(batch, False, wait=False)
        assert (info.status, nothing) == (RunStatus.RUNNING, [])
        with pytest.raises(RunTimeoutError) as caught:
            await executor.get_batch(batch, False, timeout=0.02)
        assert caught.value.run_id == batch
        await executor.cancel(batch)
        info, results = await executor.get_batch(batch)
    assert info.status is RunStatus.CANCELLED
    assert [each.item_index for each in results] == [0, 1, 2]
    codes = [each.error.code for each in results if each.error is not None]
    assert codes == ["CANCELLED"] * 3


@each_crew
async def test_no_more_items_of_a_batch_are_under_way_than_may_be(
    executor: StepflowExecutor,
) -> None:
    batches = [
        await executor.submit_batch(SLEEP, [40] * 3, max_concurrent=most)
        for most in (1, 2, None)
    ]
    with anyio.fail_after(20):
        for batch in batches:
            await executor.get_batch(batch, False)
    found = [most_at_a_time(await collected(executor, batch)) for batch in batches]
    assert found == [1, 2, 3]


async def test_a_batch_that_cannot_be_is_refused(executor: StepflowExecutor) -> None:
    assert isinstance(executor, ApiExecutor)
    traffic = watch_traffic(executor)
    nothing: list[Any]
    for nothing in ([], ()):  # type: ignore[assignment]
        with pytest.raises(ValueError, match="inputs is empty"):
            await executor.submit_batch(ECHO, nothing)
    for number in (0, -1, 2**32):
        with pytest.raises(ValueError, match="max_concurrent must be from 1 to"):
            await executor.submit_batch(ECHO, [1], number)
        with pytest.raises(ValueError, match="max_concurrent must be from 1 to"):
            executor.run_many(ECHO, [1], number)
    kind: Any
    for kind in (True, 1.0, "1"):
        with pytest.raises(TypeError, match="max_concurrent must be a whole number"):
            await executor.submit_batch(ECHO, [1], kind)
        with pytest.raises(TypeError, match="max_concurrent must be a whole number"):
            executor.run_many(ECHO, [1], kind)
    for kind in ("text", b"bytes", {"a": 1}, 3, None):
        with pytest.raises(TypeError, match="inputs must be a list of inputs"):
            await executor.submit_batch(ECHO, kind)
        with pytest.raises(TypeError, match="inputs must be a list of inputs"):
            executor.run_many(ECHO, kind)
    assert traffic.requests == []


# -- many runs ---------------------------------------------------------------------------


async def test_many_runs_give_each_index_once_with_its_result(
    executor: StepflowExecutor,
) -> None:
    results: dict[int, FlowResult] = {}
    inputs = ({"x": n} if n % 10 else {} for n in range(80))
    with anyio.fail_after(20):
        async for index, result in executor.run_many(PICK, inputs, 8):
            assert index not in results
            results[index] = result
        assert sorted(results) == list(range(80))
        for index, result in results.items():
            assert result.is_failed if index % 10 == 0 else result.output == index
        assert [pair async for pair in executor.run_many(ECHO, [])] == []
        iterator = executor.run_many(ECHO, ["x"])
        ((index, result),) = [pair async for pair in iterator]
        assert (index, result.output) == (0, "x")
        with pytest.raises(StopAsyncIteration):
            await anext(iterator)


async def test_inputs_are_taken_when_there_is_room_for_them(
    executor: StepflowExecutor,
) -> None:
    """However slow the reader is: an endless generator must not fill the memory."""
    taken = seen = 0
    ahead = set()

    def inputs() -> Iterator[int]:
        nonlocal taken
        for number in count():
            taken += 1
            yield number

    with anyio.fail_after(20):
        iterator = executor.run_many(ECHO, inputs(), 3)
        assert taken == 0
        async for index, result in iterator:
            assert result.output == index
            ahead.add(taken - seen)
            seen += 1
            ahead.add(taken - seen)
            if seen == 20:
                break
            if seen > 10:
                await anyio.sleep(0.01)
    del iterator
    after = taken
    await anyio.sleep(0.05)
    assert taken == after
    assert max(ahead) <= 4  # three under way, and the one in our hand
    assert min(ahead) > 0


async def test_a_loop_left_early_takes_no_more_and_cancels_what_is_under_way(
    executor: StepflowExecutor, name: str, known_at_once: None
) -> None:
    def inputs() -> Iterator[int]:
        for _ in range(5):
            yield 0
        yield from iter(lambda: LONG, 0)

    async def statuses() -> list[RunStatus]:
        runs = await executor.list_runs(flow_name=name, limit=100)
        return [run.status for run in runs]

    async def some_are_running() -> bool:
        return RunStatus.RUNNING in await statuses()

    async def none_is_running() -> bool:
        return not await some_are_running()

    seen = 0
    with anyio.fail_after(20):
        many = executor.run_many(named(SLEEP, name), inputs(), 2)
        async with contextlib.aclosing(many):
            async for _ in many:
                seen += 1
                if seen == 5:
                    await until(some_are_running)
                    break
        await until(none_is_running)
        found = await statuses()
        assert found.count(RunStatus.COMPLETED) == 5
        assert 0 < found.count(RunStatus.CANCELLED) <= 2
        with pytest.raises(StopAsyncIteration):
            await anext(many)
        assert await statuses() == found


async def test_what_goes_wrong_in_many_runs_comes_out(
    executor: StepflowExecutor, name: str
) -> None:
    def inputs() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("mine")

    seen = []
    with anyio.fail_after(20):
        with pytest.raises(KeyError, match="mine"):
            async for index, _ in executor.run_many(ECHO, inputs(), 1):
                seen.append(index)
        assert seen in ([0], [0, 1])
        with pytest.raises(UnrepresentableValueError):
            async for _ in executor.run_many(ECHO, [1, float("nan")]):
                pass
        with pytest.raises(FlowNotFoundError):
            async for _ in executor.run_many("/no/such/flow.yaml", [1]):
                pass
        with pytest.raises(RunTimeoutError):
            async for _ in executor.run_many(ECHO, [1], timeout=1e-9):
                pass
        with pytest.raises(KeyError, match="of the loop"):
            async for _ in executor.run_many(ECHO, count(), 2):
                raise KeyError("of the loop")


# -- what the server knows ---------------------------------------------------------------


async def test_a_run_can_be_looked_up(executor: StepflowExecutor, name: str) -> None:
    flow = named(ECHO, name)
    flow_id = await executor.store_flow(flow)
    result = await executor.run(flow, 1)
    run = await executor.get_run(result.run_id)
    assert (run.run_id, run.root_run_id) == (result.run_id, result.run_id)
    assert (run.flow_id, run.flow_name) == (flow_id, name)
    assert run.parent_run_id is None
    assert run.status is RunStatus.COMPLETED and run.has_ended
    assert run.items == ItemCounts(total=1, completed=1)
    assert run.orchestrator_id
    assert run.created_at is not None and run.completed_at is not None
    assert run.created_at.tzinfo == UTC
    assert run.created_at <= run.completed_at
    running = await executor.get_run(await executor.submit(SLEEP, LONG))
    assert running.status is RunStatus.RUNNING and not running.has_ended
    assert running.completed_at is None
    await executor.cancel(running.run_id)
    with pytest.raises(NotFoundError) as caught:
        await executor.get_run(UNKNOWN_RUN)
    assert (caught.value.status, caught.value.code) == (404, "NOT_FOUND")
    assert caught.value.run_id == UNKNOWN_RUN


async def test_runs_are_listed_by_name_and_status(
    executor: StepflowExecutor, name: str
) -> None:
    async def ids(**filters: Any) -> list[str]:
        runs = await executor.list_runs(flow_name=name, **filters)
        assert all(run.flow_name == name for run in runs)
        return [run.run_id for run in runs]

    flow = named(SLEEP, name)
    assert await ids() == []
    completed = (await executor.run(flow, 0)).run_id
    failed = (await executor.run(flow, "no number")).run_id
    cancelled = await executor.submit(flow, LONG)
    await executor.cancel(cancelled)
    running = await executor.submit(flow, LONG)
    newest_first = [running, cancelled, failed, completed]
    assert await ids() == newest_first
    assert await ids(status=RunStatus.COMPLETED) == [completed]
    assert await ids(status=RunStatus.FAILED) == [failed]
    assert await ids(status=RunStatus.CANCELLED) == [cancelled]
    assert await ids(status=RunStatus.RUNNING) == [running]
    assert await ids(status=RunStatus.PAUSED) == []
    assert await ids(limit=2) == newest_first[:2]
    assert await ids(limit=2, offset=1) == newest_first[1:3]
    assert await ids(limit=100, offset=3) == newest_first[3:]
    assert await ids(offset=100) == []
    assert await ids(limit=1, status=RunStatus.FAILED) == [failed]
    assert len(await executor.list_runs(limit=3)) == 3
    with pytest.raises(TypeError, match="status must be a RunStatus"):
        await executor.list_runs(status="completed")  # type: ignore[arg-type]
    for wrong in ("limit", "offset"):
        with pytest.raises(ValueError, match=f"{wrong} must be from 0"):
            await ids(**{wrong: -1})
        with pytest.raises(TypeError, match=f"{wrong} must be a whole number"):
            await ids(**{wrong: "1"})
    await executor.cancel(running)


async def test_no_runs_are_listed_if_none_are_wanted(
    executor: StepflowExecutor, name: str
) -> None:
    await executor.run(named(ECHO, name), 1)
    assert await executor.list_runs(flow_name=name, limit=0) == []


async def test_runs_are_listed_by_what_started_them(executor: StepflowExecutor) -> None:
    async def ids(**filters: Any) -> set[str]:
        runs = await executor.list_runs(**filters)
        return {run.run_id for run in runs}

    result = await executor.run(EXAMPLES / "nested.yaml", {"value": [1]})
    root = result.run_id
    assert result.output == {"inner": {"wrapped": [1]}}
    (child,) = await executor.list_runs(parent_run_id=root)
    assert (child.parent_run_id, child.root_run_id) == (root, root)
    assert child.flow_name == "inner"
    assert await ids(root_run_id=root) == {root, child.run_id}
    assert await ids(root_run_id=root, roots_only=True) == {root}
    assert await ids(root_run_id=root, roots_only=False) == {root, child.run_id}
    assert await ids(parent_run_id=root, flow_name="nested") == set()
    assert await ids(parent_run_id=UNKNOWN_RUN) == set()
    assert child.run_id not in await ids(roots_only=True, limit=50)
    assert (await executor.get_result(child.run_id)).output == {"wrapped": [1]}


async def test_steps_tell_how_they_stand(executor: StepflowExecutor) -> None:
    batch = await executor.submit_batch(PICK, [{"x": 1}, {}, {"x": 2.5}])
    await executor.get_batch(batch)
    steps = sorted(await executor.get_steps(batch), key=lambda each: each.item_index)
    assert [each.item_index for each in steps] == [0, 1, 2]
    assert {(each.step_id, each.step_index) for each in steps} == {("a", 0)}
    assert {each.component for each in steps} == {"/noop"}
    assert as_text([each.output for each in steps]) == as_text([1, None, 2.5])
    assert [each.status.name for each in steps] == ["COMPLETED", "FAILED", "COMPLETED"]
    assert [each.error is None for each in steps] == [True, False, True]
    error = steps[1].error
    assert error is not None
    assert (error.code, error.step_id) == ("EXPRESSION_FAILURE", "a")
    assert error.message == "Input path $.x not found"
    assert all(each.updated_at is not None for each in steps)
    for index in range(3):
        assert await executor.get_steps(batch, item_index=index) == [steps[index]]
    assert await executor.get_steps(batch, item_index=3) == []
    with pytest.raises(ValueError, match="item_index must be from 0"):
        await executor.get_steps(batch, item_index=-1)
    for index_or_none in (None, 0):
        with pytest.raises(NotFoundError) as caught:
            await executor.get_steps(UNKNOWN_RUN, item_index=index_or_none)
        assert caught.value.run_id == UNKNOWN_RUN


async def test_a_run_that_is_over_can_be_deleted(
    executor: StepflowExecutor, name: str
) -> None:
    flow = named(SLEEP, name)
    running = await executor.submit(flow, LONG)
    with pytest.raises(ConflictError) as conflict:
        await executor.delete_run(running)
    assert conflict.value.run_id == running
    await executor.cancel(running)
    done = await executor.run(flow, 0)
    await executor.delete_run(done.run_id)
    with pytest.raises(NotFoundError):
        await executor.delete_run(UNKNOWN_RUN)


async def test_components_are_listed_with_or_without_their_schemas(
    executor: StepflowExecutor,
) -> None:
    components = await executor.list_components()
    assert components.is_complete and components.failed_plugins == {}
    by_path = {each.path: each for each in components}
    assert {"/noop", "/sleep", "/eval", "/put_blob"} <= {
        path.removeprefix("/builtin") for path in by_path
    }
    assert {each.plugin for each in components} == {"builtin"}
    assert any(each.input_schema for each in components)
    assert any(each.output_schema for each in components)
    assert all(each.description for each in components)
    without = await executor.list_components(include_schemas=False)
    assert {each.path for each in without} == set(by_path)
    assert not any(each.input_schema or each.output_schema for each in without)


# -- events ------------------------------------------------------------------------------


async def test_events_tell_all_of_a_run_in_order_and_end_by_themselves(
    executor: StepflowExecutor,
) -> None:
    flow_id = await executor.store_flow(EXAMPLES / "nested.yaml")
    run_id = (await executor.run(flow_id, {"value": 1})).run_id
    events = await collected(executor, run_id)
    assert [type(event) for event in events] == [
        RunCreated,
        StepsNeeded,
        StepStarted,
        StepCompleted,
        StepReady,
        StepStarted,
        StepCompleted,
        RunCompleted,
    ]
    created, needed, started, completed, ready, *_, last_step, last = events
    assert {event.run_id for event in events} == {run_id}
    numbers = [event.sequence_number for event in events]
    assert numbers == sorted(numbers)
    times = [event.timestamp for event in events if event.timestamp is not None]
    assert len(times) == len(events) and times == sorted(times)
    assert times[0].tzinfo == UTC
    assert isinstance(created, RunCreated)
    assert (created.flow_id, created.item_count) == (flow_id, 1)
    assert isinstance(needed, StepsNeeded)
    assert set(needed.step_ids) == {"inner", "evaluate"}
    assert isinstance(started, StepStarted)
    assert (started.step_id, started.step_index, started.attempt) == ("inner", 0, 1)
    assert isinstance(completed, StepCompleted)
    assert (completed.step_id, completed.result) == ("inner", None)
    assert isinstance(ready, StepReady)
    assert (ready.step_id, ready.step_index) == ("evaluate", 1)
    assert isinstance(last_step, StepCompleted)
    assert last_step.status is RunStatus.COMPLETED
    assert isinstance(last, RunCompleted) and last.status is RunStatus.COMPLETED
    # The numbers are those of a journal, and are not shared here.
    for place, number in [*enumerate(numbers)][::3]:
        assert await collected(executor, run_id, since=number) == events[place:]

    detailed = await collected(
        executor, run_id, include_results=True, include_sub_runs=True
    )
    of_sub_run = [event for event in detailed if event.run_id != run_id]
    assert [type(event) for event in of_sub_run] == [
        SubRunCreated,
        StepsNeeded,
        StepStarted,
        StepCompleted,
        RunCompleted,
    ]
    beginning, *_, wrapped, _ = of_sub_run
    assert isinstance(beginning, SubRunCreated)
    assert (beginning.parent_run_id, beginning.item_count) == (run_id, 1)
    assert isinstance(wrapped, StepCompleted)
    assert as_text(wrapped.result) == '{"wrapped": 1}'
    assert detailed[-1] == last


async def test_events_tell_of_the_items_of_a_batch(executor: StepflowExecutor) -> None:
    batch = await executor.submit_batch(PICK, [{"x": 0}, {}, {"x": 2}])
    events = await collected(executor, batch, include_results=True)
    assert isinstance(events[0], RunCreated) and events[0].item_count == 3
    needed = [e.item_index for e in events if isinstance(e, StepsNeeded)]
    assert sorted(needed) == [0, 1, 2]
    steps = {e.item_index: e for e in events if isinstance(e, StepCompleted)}
    assert [steps[index].status for index in range(3)] == [
        RunStatus.COMPLETED,
        RunStatus.FAILED,
        RunStatus.COMPLETED,
    ]
    assert (steps[0].result, steps[2].result) == (0, 2)
    last = events[-1]
    assert isinstance(last, RunCompleted) and last.status is RunStatus.FAILED
    without = await collected(executor, batch)
    assert len(without) == len(events)
    assert {e.result for e in without if isinstance(e, StepCompleted)} == {None}


@each_crew
async def test_events_come_while_the_run_goes_on(executor: StepflowExecutor) -> None:
    run_id = await executor.submit(SLEEP, LONG)
    with anyio.fail_after(20):
        async for event in executor.events(run_id):
            if isinstance(event, StepStarted):
                break
        assert (await executor.get_run(run_id)).status is RunStatus.RUNNING
    await executor.cancel(run_id)
    events = await collected(executor, await executor.submit(SLEEP, 100))
    assert [type(event) for event in events[-2:]] == [StepCompleted, RunCompleted]


async def test_to_stop_reading_events_closes_the_connection(
    executor: StepflowExecutor,
) -> None:
    run_id = await executor.submit(SLEEP, LONG)
    assert isinstance(executor, ApiExecutor)
    traffic = watch_traffic(executor)
    with anyio.fail_after(20):
        async for event in executor.events(run_id):
            assert isinstance(event, RunCreated)
            assert traffic.open_streams == 1
            break
        gc.collect()
        assert traffic.open_streams == 0
        following = executor.events(run_id)
        async with contextlib.aclosing(following):
            assert isinstance(await anext(following), RunCreated)
            assert traffic.open_streams == 1
        assert traffic.open_streams == 0
        with pytest.raises(StopAsyncIteration):
            await anext(following)
        following = executor.events(run_id)
        kinds = [type(await anext(following)) for _ in range(3)]
        with anyio.move_on_after(0.05) as scope:
            await anext(following)
        assert scope.cancelled_caught
        del following
        # Until then the event loop has the cancellation, and so the frames it went through.
        await anyio.sleep(0.001)
        assert kinds == [RunCreated, StepsNeeded, StepStarted]
        gc.collect()
        assert traffic.open_streams == 0
    await executor.cancel(run_id)


async def test_events_of_what_is_not_known_raise(executor: StepflowExecutor) -> None:
    with anyio.fail_after(20):
        with pytest.raises(NotFoundError) as caught:
            await anext(executor.events(UNKNOWN_RUN))
        assert caught.value.run_id == UNKNOWN_RUN
    with pytest.raises(ValueError, match="since must be from 0"):
        executor.events(UNKNOWN_RUN, since=-1)
    with pytest.raises(TypeError, match="since must be a whole number"):
        executor.events(UNKNOWN_RUN, since="1")  # type: ignore[arg-type]


# -- flows and blobs ---------------------------------------------------------------------


async def test_a_flow_can_be_validated_and_is_not_stored(
    executor: StepflowExecutor, tmp_path: Path, name: str
) -> None:
    async def id_of(flow: dict[str, Any]) -> FlowId:
        """The id that the server would give it."""
        assert isinstance(executor, ApiExecutor)
        body = json.dumps({"flow": flow, "dryRun": True}).encode()
        answer = await executor._request("POST", "/api/v1/flows", body)
        return FlowId(json.loads(answer.body)["flowId"])

    flow = named(ECHO, name)
    valid = await executor.validate(flow)
    assert valid.is_valid and valid.errors == ()
    flow_id = await id_of(flow)
    with pytest.raises(NotFoundError):
        await executor.run(flow_id, 1)
    with pytest.raises(NotFoundError):
        await executor.validate(flow_id)
    assert await executor.store_flow(flow) == flow_id
    assert await executor.validate(flow_id) == valid

    step = {"id": "a", "component": "/noop", "input": {"$step": "ahead"}}
    wrong = {"name": name, "steps": [step]}
    invalid = await executor.validate(wrong)
    assert not invalid.is_valid
    assert [each.kind for each in invalid.errors] == ["undefinedStepReference"]
    assert invalid.errors[0].level == "fatal"
    assert "ahead" in invalid.errors[0].message
    assert invalid.errors[0].path is not None
    assert invalid.errors[0].path.startswith("$.steps[0]")
    with pytest.raises(NotFoundError):
        await executor.run(await id_of(wrong), 1)

    unreadable = await executor.validate({"steps": 3})
    assert not unreadable.is_valid
    assert [each.level for each in unreadable.errors] == ["fatal"]
    path = tmp_path / "flow.yaml"
    with pytest.raises(FlowNotFoundError):
        await executor.validate(path)
    path.write_text("steps: [\n")
    with pytest.raises(FlowSyntaxError):
        await executor.validate(path)
    path.write_text(json.dumps(flow))
    assert await executor.validate(path) == valid
    with pytest.raises(NotFoundError):
        await executor.validate(FlowId(UNKNOWN_HASH))


async def test_the_variables_of_a_flow_are_told(executor: StepflowExecutor) -> None:
    path = EXAMPLES / "variables.yaml"
    for source in (path, await executor.store_flow(path)):
        variables = await executor.get_flow_variables(source)
        assert sorted(variables) == ["city", "units"]
        city, units = variables["city"], variables["units"]
        assert (city.required, city.default, city.env_var) == (True, None, None)
        assert (units.required, units.default) == (False, "metric")
    assert await executor.get_flow_variables(ECHO) == {}
    with pytest.raises(NotFoundError):
        await executor.get_flow_variables(FlowId(UNKNOWN_HASH))


async def test_blobs_come_back_as_they_were_put(executor: StepflowExecutor) -> None:
    salt = os.urandom(8)
    values = [
        *(value for value in VALUES if value is not None),
        -0.0,
        2**63,
        2**64 - 1,
        -(2**63),
        [1.0, 1, 2**60],
    ]
    for value in values:
        blob_id = await executor.put_blob(value)
        assert as_text(await executor.get_blob(blob_id)) == as_text(value)
        assert await executor.put_blob(copy.deepcopy(value)) == blob_id
    for data in (
        b"",
        salt,
        bytes(range(256)) * 1000,
        bytearray(salt),
        memoryview(salt),
    ):
        blob_id = await executor.put_blob(data)
        found = await executor.get_blob(blob_id)
        assert type(found) is bytes and found == bytes(data)
    assert await executor.put_blob(salt) == await executor.put_blob(bytearray(salt))
    for named_data in (salt + b"x", {"salt": salt.hex()}):
        blob_id = await executor.put_blob(named_data, filename="a name.txt")
        assert await executor.get_blob(blob_id) == named_data


async def test_blobs_that_cannot_be_are_refused(executor: StepflowExecutor) -> None:
    with pytest.raises(UnrepresentableValueError, match="null") as none:
        await executor.put_blob(None)
    assert none.value.path == "$"
    for data in (b"x", {"x": 1}):
        with pytest.raises(ValueError, match="filename is empty"):
            await executor.put_blob(data, filename="")
        with pytest.raises(TypeError, match="filename must be a string"):
            await executor.put_blob(data, filename=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="filename: .*printable ASCII"):
        await executor.put_blob(b"x", filename="a\r\nb")
    with pytest.raises(NotFoundError) as caught:
        await executor.get_blob(UNKNOWN_HASH)
    assert caught.value.blob_id == UNKNOWN_HASH


# -- ids ---------------------------------------------------------------------------------


async def test_an_id_that_is_none_is_refused_and_nothing_else_happens(
    executor: StepflowExecutor,
) -> None:
    async def first_event(run_id: str) -> object:
        return await anext(executor.events(run_id))

    async def flow_of(flow_id: str) -> object:
        return await executor.get_flow_variables(FlowId(flow_id))

    async def run_of(flow_id: str) -> object:
        return await executor.run(FlowId(flow_id))

    calls: list[Any] = [
        executor.get_run,
        executor.get_result,
        executor.get_batch,
        executor.cancel,
        executor.get_steps,
        executor.delete_run,
        executor.get_blob,
        first_event,
        flow_of,
        run_of,
    ]
    ids = ("", "../x", "a b", "x" * 10_000, "..", ".", "a/b", "é", "\0", "a?b#c", "%2e")
    wrong = []
    for bad in ids:
        for call in calls:
            try:
                with anyio.fail_after(10):
                    wrong.append((call.__name__, bad, await call(bad)))
            except (ValueError, InvalidRequestError):
                pass
            except Exception as exc:  # noqa: BLE001
                wrong.append((call.__name__, bad, exc))
    assert wrong == []
    kind: Any
    for kind in (3, None, b"x", ["x"]):
        for call in calls[:-2]:
            with pytest.raises(TypeError, match=r"_id must be a string, not"):
                await call(kind)
    assert (await executor.health()).is_healthy


async def test_nothing_is_left_to_do_when_all_is_done(
    executor: StepflowExecutor,
) -> None:
    """Neither results nor errors keep an executor's crew at work."""
    await executor.run(ECHO, 1)
    await executor.run(PICK, {})
    async for _ in executor.run_many(ECHO, range(5)):
        pass
    assert isinstance(executor, StepflowRuntime | StepflowClient)
    await wait_until(lambda: not executor._crew.has_errands)
