"""With what exists: flows of the official builder, runs of the official client, its workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, timedelta
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import msgspec
import pytest
import stepflow_py
from stepflow_py.proto import common_pb2, runs_pb2
from stepflow_py.worker import FlowBuilder, OnErrorDefault, OnErrorRetry, Value

from stepflow_runtime import (
    FlowError,
    FlowFailedError,
    FlowId,
    FlowVariable,
    RunCompleted,
    RunCreated,
    RunInfo,
    RunStatus,
    StepCompleted,
    StepflowClient,
    StepflowExecutor,
    StepflowRuntime,
    StepStarted,
)

from .conftest import ASYNCIO, ECHO, EXAMPLES, SLEEP, each_backend

pytestmark = pytest.mark.anyio

# The official client is made of grpc.aio, which knows asyncio only.
asyncio_only = pytest.mark.parametrize("anyio_backend", [ASYNCIO])

CONFIG = {
    "plugins": {"builtin": {"type": "builtin"}},
    "routes": {"/": [{"plugin": "builtin"}]},
    # A built-in component that fails is tried again for 4 s, unless told otherwise.
    "retry": {"transportMaxRetries": 0},
}
# Longer than any test: what does it is cancelled.
LONG = 60_000


@pytest.fixture(scope="session", autouse=True)
def _grpc_is_awake() -> None:
    """Make grpc open the descriptors that it keeps for ever."""

    async def connect() -> None:
        async with stepflow_py.StepflowClient.connect("127.0.0.1:1") as client:
            assert not await client.is_healthy(timeout=0.2)

    asyncio.run(connect())


@asynccontextmanager
async def executing(kind: str) -> AsyncIterator[StepflowExecutor]:
    """An embedded server, or a client of one."""
    async with StepflowRuntime.start(CONFIG) as runtime:
        with anyio.fail_after(30):
            if kind == "embedded":
                yield runtime
            else:
                async with StepflowClient(runtime.url) as client:
                    yield client


each_executor = pytest.mark.parametrize("kind", ["embedded", "client"])


# -- flows of the official builder -----------------------------------------------------


def built() -> Any:
    """A flow with all that the builder can express."""
    builder = FlowBuilder(name="built", description="All kinds of values", version="1")
    builder.set_input_schema(
        {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0}}}
    )
    builder.set_output_schema({"type": "object"})
    builder.set_variables_schema(
        {
            "type": "object",
            "properties": {
                "city": {"type": "string", "default": "Oslo", "env_var": "IT_CITY"},
                "limit": {"type": "integer"},
            },
            "required": ["limit"],
        }
    )
    builder.set_metadata({"revision": 3})
    first = builder.add_step(
        id="first",
        component="/noop",
        input_data={
            "n": Value.input.add_path("n"),
            "whole": 7,
            "literal": Value.literal({"$step": "no reference", "whole": 8}),
            "list": [1, 2.5, None, True, {"deep": Value.input.add_path("list")[1]}],
        },
    )
    builder.add_step(
        id="second",
        component="/noop",
        input_data={
            "of_first": first.n,
            "of_list": first["list"][0],
            "all": Value.step("first"),
            "city": Value.variable("city"),
            "limit": Value.variable("limit"),
            "again": Value.variable("city", default="Rome"),
        },
        metadata={"note": 1},
    )
    builder.add_step(
        id="caught",
        component="/load_file",
        input_data={"path": "/there/is/no/such/file"},
        on_error=OnErrorDefault(defaultValue={"data": 9}),
    )
    builder.add_step(
        id="tried",
        component="/noop",
        input_data=Value.input(),
        on_error=OnErrorRetry(maxRetries=2),
        must_execute=True,
    )
    builder.add_output_field("second", Value.step("second"))
    builder.add_output_field("caught", Value.step("caught", "$.data"))
    builder.add_output_field("input", Value.input())
    builder.add_output_field("whole", 10)
    return builder.build()


INPUT: dict[str, Any] = {"n": 3, "list": ["a", "b"]}
FIRST = {
    "n": 3,
    "whole": 7,
    "literal": {"$step": "no reference", "whole": 8},
    "list": [1, 2.5, None, True, {"deep": "b"}],
}
OUTPUT = {
    "second": {
        "of_first": 3,
        "of_list": 1,
        "all": FIRST,
        "city": "Oslo",
        "limit": 4,
        "again": "Oslo",
    },
    "caught": 9,
    "input": INPUT,
    "whole": 10,
}


@each_executor
@each_backend
async def test_a_built_flow_runs_as_it_is(kind: str) -> None:
    async with executing(kind) as executor:
        result = await executor.run(built(), INPUT, variables={"limit": 4})
        assert result.unwrap() == OUTPUT
        steps = {step.step_id: step for step in await executor.get_steps(result.run_id)}
        assert steps["first"].output == FIRST
        assert steps["tried"].status is RunStatus.COMPLETED
        (info,) = await executor.list_runs(flow_name="built")
        assert info.run_id == result.run_id


@each_executor
@each_backend
async def test_a_built_flow_is_submitted_and_run_with_many_inputs(kind: str) -> None:
    async with executing(kind) as executor:
        run_id = await executor.submit(built(), INPUT, variables={"limit": 4})
        assert (await executor.get_result(run_id)).unwrap() == OUTPUT
        batch = await executor.submit_batch(
            built(), [dict(INPUT, n=n) for n in range(3)], variables={"limit": 4}
        )
        _, results = await executor.get_batch(batch)
        assert [each.unwrap()["second"]["of_first"] for each in results] == [0, 1, 2]
        many = {
            index: result.unwrap()["second"]["limit"]
            async for index, result in executor.run_many(
                built(), [INPUT, INPUT], variables={"limit": 6}
            )
        }
        assert many == {0: 6, 1: 6}


@each_executor
@each_backend
async def test_whole_numbers_of_a_built_flow_arrive_as_integers(kind: str) -> None:
    """The official client's own way makes a 10.0 of them, and /sleep refuses that."""
    async with executing(kind) as executor:
        for duration in (10, Value.literal(10)):
            builder = FlowBuilder()
            step = builder.add_step(
                id="a", component="/sleep", input_data={"duration_ms": duration}
            )
            builder.set_output(step.duration_ms)
            result = await executor.run(builder.build())
            assert result.unwrap() == 10
            assert type(result.output) is int


@each_executor
@each_backend
async def test_a_built_flow_is_the_same_as_its_document(kind: str) -> None:
    flow = built()
    document = msgspec.to_builtins(flow)
    assert isinstance(document, dict)
    async with executing(kind) as executor:
        flow_id = await executor.store_flow(flow)
        assert await executor.store_flow(document) == flow_id
        verdict = await executor.validate(flow)
        assert verdict.is_valid
        of_document = await executor.validate(document)
        assert sorted(map(str, of_document.diagnostics)) == sorted(
            map(str, verdict.diagnostics)
        )
        assert (
            await executor.run(flow_id, INPUT, variables={"limit": 4})
        ).unwrap() == (OUTPUT)


@each_executor
@each_backend
async def test_the_variables_of_a_built_flow(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IT_CITY", "Bergen")
    async with executing(kind) as executor:
        variables = await executor.get_flow_variables(built())
        result = await executor.run(
            built(), INPUT, variables={"limit": 4}, variables_from_env=True
        )
    assert variables.keys() == {"city", "limit"}
    assert variables["city"].default == "Oslo"
    assert variables["city"].env_var == "IT_CITY"
    assert not variables["city"].required
    assert variables["limit"] == FlowVariable(required=True)
    assert result.unwrap()["second"]["city"] == "Bergen"


@each_executor
@each_backend
async def test_what_is_wrong_with_a_built_flow_is_told(kind: str) -> None:
    builder = FlowBuilder(name="wrong", description="Refers to what is not there")
    builder.add_step(id="a", component="/noop", input_data=Value.step("zz"))
    builder.set_output(Value.step("a"))
    async with executing(kind) as executor:
        verdict = await executor.validate(builder.build())
    assert [each.kind for each in verdict.errors] == ["undefinedStepReference"]
    assert verdict.errors[0].path == "$.steps[0].input"


# -- runs of the official client -------------------------------------------------------


@asynccontextmanager
async def both() -> AsyncIterator[tuple[StepflowRuntime, Any]]:
    """An embedded server, and the official client of it."""
    async with StepflowRuntime.start(CONFIG) as runtime:
        target = f"127.0.0.1:{runtime.port}"
        async with stepflow_py.StepflowClient.connect(target) as official:
            with anyio.fail_after(30):
                yield runtime, official


async def running(runtime: StepflowRuntime, number: int) -> list[RunInfo]:
    """The runs, once so many are under way."""
    runs: list[RunInfo] = []
    while len(runs) < number:
        runs = await runtime.list_runs(status=RunStatus.RUNNING)
        await anyio.sleep(0.01)
    return runs


@asyncio_only
async def test_a_run_that_the_official_client_started_is_seen_and_awaited() -> None:
    async with both() as (runtime, official):
        stored = await official.store_flow(SLEEP)
        began = await official.submit(stored.flow_id, [200])
        run_id = began.summary.run_id
        info = await runtime.get_run(run_id)
        assert (info.run_id, info.flow_id) == (run_id, stored.flow_id)
        assert (info.flow_name, info.items.total) == ("sleep", 1)
        assert [each.run_id for each in await runtime.list_runs()] == [run_id]
        result = await runtime.get_result(run_id)
        assert result.unwrap() == {"duration_ms": 200}
        assert [each.output for each in await runtime.get_steps(run_id)] == [
            {"duration_ms": 200}
        ]
        completed = await runtime.list_runs(status=RunStatus.COMPLETED)
        assert [each.run_id for each in completed] == [run_id]


@asyncio_only
async def test_a_batch_that_the_official_client_started_is_read() -> None:
    step = {"id": "a", "component": "/noop", "input": {"$input": "$.x"}}
    flow = {"name": "x", "description": "x", "steps": [step], "output": {"$step": "a"}}
    async with both() as (runtime, official):
        stored = await official.store_flow(flow)
        began = await official.submit(stored.flow_id, [{"x": 1}, {}, {"x": "b"}])
        info, results = await runtime.get_batch(began.summary.run_id)
        with pytest.raises(ValueError, match="is a batch of 3 items"):
            await runtime.get_result(began.summary.run_id)
        assert (info.status, info.items.total) == (RunStatus.FAILED, 3)
        assert [each.item_index for each in results] == [0, 1, 2]
        assert [each.is_success for each in results] == [True, False, True]
        assert [each.output for each in results] == [1, None, "b"]
        assert results[1].error is not None
        assert (results[1].error.step_id, results[1].error.attempts) == ("a", 1)
        steps = await runtime.get_steps(began.summary.run_id, item_index=2)
        assert [each.output for each in steps] == ["b"]


@asyncio_only
async def test_a_run_that_the_official_client_started_is_followed() -> None:
    async with both() as (runtime, official):
        stored = await official.store_flow(SLEEP)
        began = await official.submit(stored.flow_id, [100])
        run_id = began.summary.run_id
        ours = [event async for event in runtime.events(run_id, include_results=True)]
        theirs = [event async for event in official.status_events(run_id)]
    assert isinstance(ours[0], RunCreated)
    assert ours[0].flow_id == stored.flow_id
    (ended,) = [event for event in ours if isinstance(event, StepCompleted)]
    assert ended.result == {"duration_ms": 100}
    assert isinstance(ours[-1], RunCompleted)
    assert ours[-1].status is RunStatus.COMPLETED
    # The same events, in the same order, at the same times.
    assert [type(event).__name__ for event in ours] == [
        "".join(word.capitalize() for word in event.WhichOneof("event").split("_"))
        for event in theirs
    ]
    assert [event.sequence_number for event in ours] == [
        event.sequence_number for event in theirs
    ]
    for event, event_of_theirs in zip(ours, theirs, strict=True):
        assert event.timestamp is not None
        told = event_of_theirs.timestamp.ToDatetime(tzinfo=UTC)
        # One rounds the nanoseconds, the other cuts them off.
        assert abs(event.timestamp - told) <= timedelta(microseconds=1)


@asyncio_only
async def test_a_run_that_we_cancel_has_ended_for_the_official_client() -> None:
    async def wait() -> None:
        heard.append(await official.get_run(run_id, wait=True))

    heard: list[Any] = []
    async with both() as (runtime, official):
        stored = await official.store_flow(SLEEP)
        run_id = (await official.submit(stored.flow_id, [LONG])).summary.run_id
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await anyio.sleep(0.1)
            assert heard == []
            assert (await runtime.cancel(run_id)).status is RunStatus.CANCELLED
        assert heard[0].summary.status == common_pb2.EXECUTION_STATUS_CANCELLED
        seen = await official.get_run(run_id)
        assert seen.summary.status == common_pb2.EXECUTION_STATUS_CANCELLED


@asyncio_only
async def test_a_run_that_the_official_client_cancels_has_ended_for_us() -> None:
    async def wait(how: Any) -> None:
        heard.append(await how)

    heard: list[Any] = []
    async with both() as (runtime, official):
        submitted = await runtime.submit(SLEEP, LONG)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait, runtime.get_result(submitted))
            tasks.start_soon(wait, runtime.run(SLEEP, LONG))
            runs = await running(runtime, 2)
            assert heard == []
            for run in runs:
                request = runs_pb2.CancelRunRequest(run_id=run.run_id)
                await official._runs_stub.CancelRun(request)
        assert [each.error.code for each in heard] == ["CANCELLED"] * 2
        assert {each.run_id for each in heard} == {run.run_id for run in runs}
        assert submitted in {run.run_id for run in runs}


@asyncio_only
async def test_a_run_that_we_started_is_awaited_by_the_official_client() -> None:
    async with both() as (runtime, official):
        run_id = await runtime.submit(SLEEP, 200)
        answer = await official.get_run(run_id, wait=True)
        assert answer.summary.status == common_pb2.EXECUTION_STATUS_COMPLETED
        assert [step.step_id for step in answer.steps] == ["a"]
        (item,) = await official.get_run_items(run_id)
        assert item["output"] == {"duration_ms": 200}
        kinds = [
            event.WhichOneof("event") async for event in official.status_events(run_id)
        ]
        assert (kinds[0], kinds[-1]) == ("run_created", "run_completed")
        assert "step_completed" in kinds


@asyncio_only
async def test_a_batch_that_we_started_is_read_by_the_official_client() -> None:
    async with both() as (runtime, official):
        batch = await runtime.submit_batch(ECHO, [{"n": n} for n in range(4)], 2)
        await official.get_run(batch, wait=True)
        items = await official.get_run_items(batch)
    assert [each.get("item_index", 0) for each in items] == [0, 1, 2, 3]
    assert [each["output"] for each in items] == [{"n": n} for n in range(4)]


@asyncio_only
async def test_a_flow_that_one_client_stored_is_known_to_the_other() -> None:
    async with both() as (runtime, official):
        theirs = await official.store_flow(ECHO)
        assert await runtime.store_flow(ECHO) == theirs.flow_id
        other = {**ECHO, "name": "other"}
        ours = await runtime.store_flow(other)
        assert (await official.store_flow(other)).flow_id == ours
        answer = await official.run(ours, {"x": "y"})
        assert answer.results[0].status == common_pb2.EXECUTION_STATUS_COMPLETED
        result = await runtime.run(FlowId(theirs.flow_id), {"x": 1})
        assert result.unwrap() == {"x": 1}
        assert (await runtime.validate(FlowId(theirs.flow_id))).is_valid
        # A built flow with whole numbers: what we stored, the official client can run.
        flow_id = await runtime.store_flow(built())
        answer = await official.run(flow_id, INPUT, variables={"limit": 4})
        assert answer.results[0].status == common_pb2.EXECUTION_STATUS_COMPLETED
        declared = await official.get_flow_variables(flow_id)
        assert set(declared.variables) == set(await runtime.get_flow_variables(flow_id))


def test_both_clients_meet_from_threads_of_their_own() -> None:
    """The server in a thread, ours under trio in another, the official one in a third."""

    async def theirs() -> str:
        official: Any
        async with stepflow_py.StepflowClient.connect(target) as official:
            stored = await official.store_flow(SLEEP)
            began = await official.submit(stored.flow_id, [100])
            of_theirs.set_result(began.summary.run_id)
            run_id = await asyncio.wrap_future(of_ours)
            return str((await official.get_run(run_id, wait=True)).summary.run_id)

    async def ours() -> Any:
        async with StepflowClient(url) as client:
            with anyio.fail_after(30):
                of_ours.set_result(await client.submit(SLEEP, 100))
                run_id = await anyio.to_thread.run_sync(of_theirs.result, 30)
                events = [event async for event in client.events(run_id)]
                return events[-1], await client.get_result(run_id)

    of_theirs: Future[str] = Future()
    of_ours: Future[str] = Future()
    with StepflowRuntime.start(CONFIG) as runtime, ThreadPoolExecutor(2) as pool:
        target, url = f"127.0.0.1:{runtime.port}", runtime.url
        waited = pool.submit(asyncio.run, theirs())
        followed = pool.submit(lambda: anyio.run(ours, backend="trio"))
        last, result = followed.result(60)
        assert waited.result(60) == of_ours.result()
    assert isinstance(last, RunCompleted)
    assert last.run_id == result.run_id == of_theirs.result()
    assert result.unwrap() == {"duration_ms": 100}


# -- workers ---------------------------------------------------------------------------

WORKER = EXAMPLES / "python_worker"
# As the example's, without its onError.
SHOUT = {
    "name": "shout",
    "description": "Calls a Python function",
    "steps": [
        {"id": "loud", "component": "/python/shout", "input": {"$input": "$"}},
    ],
    "output": {"$step": "loud", "path": "$.text"},
}


def lines(error: FlowError | None) -> list[str]:
    """What the worker printed: one entry, of several lines."""
    assert error is not None
    (printed,) = (entry for entry in error.logs if entry.stream == "stderr")
    return printed.message.split("\n")


def assert_is_traceback(printed: list[str], last: str) -> None:
    """The worker's own lines, from the first to the exception's."""
    assert printed[0].startswith("Component shout failed: ")
    assert printed[1] == "Traceback (most recent call last):"
    assert any('worker.py", line' in line for line in printed)
    assert last in printed
    assert printed.count("Traceback (most recent call last):") == 1


@each_backend
async def test_a_workers_exception_is_in_the_result(worker_env: dict[str, str]) -> None:
    config = WORKER / "stepflow-config.yml"
    async with StepflowRuntime.start(config, env=worker_env) as runtime:
        with anyio.fail_after(30):
            result = await runtime.run(SHOUT, {"text": ""})
            submitted = await runtime.submit(SHOUT, {"text": ""})
            later = await runtime.get_result(submitted)
            async with StepflowClient(runtime.url) as client:
                elsewhere = await client.run(SHOUT, {"text": ""})
            assert (await runtime.run(SHOUT, {"text": "a"})).unwrap() == "A!"
    for each in (result, later, elsewhere):
        error = each.error
        assert error is not None
        assert error.code == "COMPONENT_FAILED"
        assert error.message == "there is nothing to shout"
        assert (error.component, error.step_id) == ("/python/shout", "loud")
        assert error.attempts == 1
    assert elsewhere.error is not None
    assert elsewhere.error.logs == ()
    assert str(elsewhere.error) == (
        "step 'loud' (/python/shout): there is nothing to shout (COMPONENT_FAILED)"
    )
    raised = "ValueError: there is nothing to shout"
    for each in (result, later):
        assert_is_traceback(lines(each.error), raised)
        assert f"\n  {raised}" in str(each.error)
        assert '    raise ValueError("there is nothing to shout")' in str(each.error)
        with pytest.raises(FlowFailedError) as caught:
            each.unwrap()
        assert str(caught.value) == f"run {each.run_id} failed: {each.error}"


@each_backend
async def test_the_attempts_of_a_worker_are_counted(worker_env: dict[str, str]) -> None:
    """The example's onError tries once more, after the second that the server takes."""
    config = WORKER / "stepflow-config.yml"
    async with StepflowRuntime.start(config, env=worker_env) as runtime:
        with anyio.fail_after(30):
            result = await runtime.run(WORKER / "shout.yaml", {"text": ""})
            events = [event async for event in runtime.events(result.run_id)]
    started = [each.attempt for each in events if isinstance(each, StepStarted)]
    assert started == [1, 2]
    assert result.error is not None
    assert result.error.attempts == 2
    assert "(COMPONENT_FAILED, tried 2 times)" in str(result.error)
    assert_is_traceback(lines(result.error), "ValueError: there is nothing to shout")


@each_backend
async def test_each_item_of_a_batch_has_its_own_traceback(
    worker_env: dict[str, str],
) -> None:
    config = WORKER / "stepflow-config.yml"
    inputs: list[dict[str, Any]] = [{"text": ""}, {"text": "a"}, {}, {"text": 5}]
    async with StepflowRuntime.start(config, env=worker_env) as runtime:
        with anyio.fail_after(30):
            batch = await runtime.submit_batch(SHOUT, inputs)
            info, results = await runtime.get_batch(batch)
    assert info.status is RunStatus.FAILED
    assert (info.items.completed, info.items.failed) == (1, 3)
    assert results[1].unwrap() == "A!"
    raised = {
        0: "ValueError: there is nothing to shout",
        2: "KeyError: 'text'",
        3: "AttributeError: 'int' object has no attribute 'upper'",
    }
    for index, last in raised.items():
        error = results[index].error
        assert error is not None
        assert error.message == last.partition(": ")[2]
        assert error.attempts == 1
        assert_is_traceback(lines(error), last)
        others = set(raised.values()) - {last}
        assert others.isdisjoint(lines(error))


OWN_WORKER = """
import asyncio, os
from stepflow_py.worker import StepflowServer
from stepflow_py.worker.grpc_worker import run_grpc_worker

server = StepflowServer(include_builtins=False)

class Wordless(Exception):
    pass

def fail_here(words):
    raise ValueError(words)

def fail_there(words):
    raise ValueError(words)

@server.component
def shout(how: dict) -> dict:
    if how["how"] == "cause":
        try:
            {}["inner"]
        except KeyError as exc:
            raise RuntimeError("outer") from exc
    if how["how"] == "same words":
        try:
            raise ValueError("same")
        except ValueError as exc:
            raise RuntimeError("same") from exc
    if how["how"] == "here":
        fail_here(how["words"])
    if how["how"] == "there":
        fail_there(how["words"])
    if how["how"] == "several lines":
        raise ValueError("first\\nsecond")
    if how["how"] == "no words":
        raise Wordless
    raise ExceptionGroup("many", [ValueError("one"), OSError("two")])

asyncio.run(
    run_grpc_worker(
        server=server,
        tasks_url=os.environ["STEPFLOW_TASKS_URL"],
        queue_name=os.environ["STEPFLOW_QUEUE_NAME"],
    )
)
"""


@pytest.fixture
def own_worker(tmp_path: Path) -> dict[str, Any]:
    """The configuration of a worker that fails in several ways."""
    path = tmp_path / "worker.py"
    path.write_text(OWN_WORKER)
    plugin = {
        "type": "grpc",
        "command": "python3",
        "args": [str(path)],
        "queueName": "python",
    }
    return {
        "plugins": {"python": plugin},
        "routes": {"/python": [{"plugin": "python"}]},
        "retry": {"transportMaxRetries": 0},
    }


TRACEBACKS = {
    "cause": ["KeyError: 'inner'", "RuntimeError: outer"],
    "same words": ["ValueError: same", "RuntimeError: same"],
    "several lines": ["ValueError: first", "second"],
    "no words": ["Wordless"],
    "group": ["ValueError: one", "OSError: two", "many (2 sub-exceptions)"],
}


@each_backend
async def test_runs_that_fail_alike_do_not_get_each_others_tracebacks(
    own_worker: dict[str, Any], worker_env: dict[str, str]
) -> None:
    """With the same words at the same time, from two places."""

    async def fail(how: str, words: str) -> None:
        result = await runtime.run(SHOUT, {"how": how, "words": words})
        assert result.error is not None
        told.append((how, "\n".join(entry.message for entry in result.error.logs)))

    told: list[tuple[str, str]] = []
    async with StepflowRuntime.start(own_worker, env=worker_env) as runtime:
        with anyio.fail_after(60):
            for number in range(15):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(fail, "here", f"words {number}")
                    tasks.start_soon(fail, "there", f"words {number}")
    assert len(told) == 30
    for how, log in told:
        other = {"here": "there", "there": "here"}[how]
        assert f"in fail_{other}" not in log


@asyncio_only
async def test_a_traceback_of_any_kind_is_whole(
    own_worker: dict[str, Any], worker_env: dict[str, str]
) -> None:
    """The server passes on the message only; the rest is what the worker printed."""
    missing = {}
    async with StepflowRuntime.start(own_worker, env=worker_env) as runtime:
        with anyio.fail_after(30):
            for how, expected in TRACEBACKS.items():
                result = await runtime.run(SHOUT, {"how": how})
                printed = lines(result.error)[1:]
                ends = ["Traceback (most recent call last):", *expected]
                missing[how] = [
                    end
                    for end in ends
                    if not any(line.endswith(end) for line in printed)
                ]
    assert missing == {how: [] for how in TRACEBACKS}
