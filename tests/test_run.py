"""The main promise: a workflow runs on a real server, the same under every event loop."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest
from blockbuster import BlockBuster

from stepflow_runtime import (
    FlowFailedError,
    FlowNotFoundError,
    FlowStatus,
    LogConfig,
    RuntimeState,
    RuntimeStoppedError,
    StepflowExecutor,
    StepflowRuntime,
    UnrepresentableValueError,
    api,
    wire,
)

from .conftest import ECHO, EXAMPLES, SLEEP, each_backend

pytestmark = pytest.mark.anyio


async def test_a_flow_given_as_a_mapping_returns_its_output() -> None:
    async with StepflowRuntime.start() as runtime:
        result = await runtime.run(
            ECHO, {"x": 1, "f": 1.5, "n": None, "l": [True, "s"]}
        )
    assert result.is_success and not result.is_failed and not result.is_skipped
    assert result.output == {"x": 1, "f": 1.5, "n": None, "l": [True, "s"]}
    assert type(result.output["x"]) is int
    assert result.error is None
    assert result.unwrap() == result.output


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
@pytest.mark.parametrize("kind", [str, Path])
@each_backend
async def test_a_flow_can_be_a_path(tmp_path: Path, suffix: str, kind: type) -> None:
    path = tmp_path / f"flow{suffix}"
    path.write_text(json.dumps(ECHO))
    async with StepflowRuntime.start() as runtime:
        assert (await runtime.run(kind(path), "x")).unwrap() == "x"


@each_backend
async def test_a_flow_file_that_changes_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "flow.json"
    async with StepflowRuntime.start() as runtime:
        path.write_text(json.dumps({**ECHO, "output": 1}))
        assert (await runtime.run(path)).output == 1
        path.write_text(json.dumps({**ECHO, "output": "two"}))
        assert (await runtime.run(path)).output == "two"


@each_backend
async def test_a_file_put_in_anothers_place_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another inode or directory: name, size and modification time are the same."""
    for name, output in (("a", 1), ("b", 2), ("other", 3)):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "flow.json"
        path.write_text(json.dumps({**ECHO, "output": output}))
        os.utime(path, (1, 1))
    async with StepflowRuntime.start() as runtime:
        for name, output in (("a", 1), ("b", 2)):
            monkeypatch.chdir(tmp_path / name)
            assert (await runtime.run("flow.json")).output == output
        os.replace(tmp_path / "other" / "flow.json", "flow.json")
        assert (await runtime.run("flow.json")).output == 3


@each_backend
async def test_a_file_of_this_machine_is_looked_at_without_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "flow.json"
    path.write_text(json.dumps(ECHO))
    threads: list[object] = []

    async def counted(function: Callable[..., Any], *args: Any) -> Any:
        threads.append(function)
        return await in_thread(function, *args)

    in_thread = api._in_thread
    monkeypatch.setattr(api, "_in_thread", counted)
    async with StepflowRuntime.start() as runtime:
        assert (await runtime.run(path, 1)).output == 1
        first = len(threads)
        assert first > 0
        for number in range(10):
            assert (await runtime.run(path, number)).output == number
        assert len(threads) == first
        path.unlink()
        with pytest.raises(FlowNotFoundError):
            await runtime.run(path)


@each_backend
async def test_a_program_may_forbid_all_blocking_calls(
    tmp_path: Path, blockbuster: BlockBuster
) -> None:
    blockbuster.functions["os.stat"].can_block_functions.pop()
    path = tmp_path / "flow.json"
    path.write_text(json.dumps(ECHO))
    async with StepflowRuntime.start() as runtime:
        for number in range(3):
            assert (await runtime.run(path, number)).output == number


@each_backend
async def test_threads_of_the_program_can_all_wait_for_runs() -> None:
    """As the synchronous endpoints of a web framework do."""

    def endpoint() -> None:
        result = anyio.from_thread.run(
            runtime.run, EXAMPLES / "nested.yaml", {"value": 1}
        )
        outputs.append(result.output)

    outputs: list[Any] = []
    threads = int(anyio.to_thread.current_default_thread_limiter().total_tokens)
    async with StepflowRuntime.start() as runtime:
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                for _ in range(threads + 5):
                    tasks.start_soon(partial(anyio.to_thread.run_sync, endpoint))
    assert outputs == [{"inner": {"wrapped": 1}}] * (threads + 5)


@each_backend
async def test_what_cannot_be_sent_is_refused() -> None:
    async with StepflowRuntime.start() as runtime:
        with pytest.raises(UnrepresentableValueError, match="of type object"):
            await runtime.run(ECHO, object())
        with pytest.raises(TypeError, match=r"overrides\['a'\] must be a mapping"):
            await runtime.run(ECHO, 1, {"a": 5})  # type: ignore[dict-item]


async def test_a_failed_flow_is_a_result_and_unwrap_raises() -> None:
    step = {"id": "a", "component": "/noop", "input": {"$variable": "v"}}
    flow = {"steps": [step], "output": {"$step": "a"}}
    async with StepflowRuntime.start() as runtime:
        result = await runtime.run(flow)
    assert result.is_failed and not result.is_success
    assert result.status is FlowStatus.FAILED
    assert result.output is None
    assert result.error is not None
    assert result.error.code == "EXPRESSION_FAILURE"
    assert result.error.message == "Undefined variable: v"
    with pytest.raises(FlowFailedError, match="Undefined variable: v") as caught:
        result.unwrap()
    assert caught.value.result is result


@each_backend
async def test_variables_and_overrides_reach_the_flow() -> None:
    flow = {
        "steps": [
            {"id": "a", "component": "/noop", "input": {"v": {"$variable": "v"}}}
        ],
        "output": {"$step": "a"},
    }
    async with StepflowRuntime.start() as runtime:
        assert (await runtime.run(flow, variables={"v": [1]})).output == {"v": [1]}
        overridden = await runtime.run(flow, None, {"a": {"input": {"v": 2}}})
        assert overridden.output == {"v": 2}


@each_backend
async def test_whole_numbers_in_a_workflow_reach_components_as_integers() -> None:
    """``POST /flows`` would make 10 a 10.0, and /sleep would refuse it."""
    step = {"id": "a", "component": "/sleep", "input": {"duration_ms": 10}}
    async with StepflowRuntime.start() as runtime:
        result = await runtime.run({"steps": [step], "output": {"$step": "a"}})
    assert result.unwrap() == {"duration_ms": 10}


async def test_runs_at_the_same_time_each_get_their_own_result() -> None:
    results: dict[int, Any] = {}

    async def run(number: int) -> None:
        results[number] = (await runtime.run(ECHO, number)).output

    async with StepflowRuntime.start() as runtime, anyio.create_task_group() as tasks:
        for number in range(300):
            tasks.start_soon(run, number)
    assert results == {number: number for number in range(300)}


@each_backend
async def test_a_run_that_outlasts_the_servers_patience_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server answers a waiting request after 300 s though the run goes on."""

    def counted(body: bytes) -> wire.RunDetails:
        waits.append(body)
        return decode(body)

    waits: list[bytes] = []
    decode = wire.decode_run_details
    monkeypatch.setattr(wire, "decode_run_details", counted)
    monkeypatch.setattr(api, "_NEXT_WAIT", 1)
    async with StepflowRuntime.start() as runtime:
        assert (await runtime.run(SLEEP, 2500)).unwrap() == {"duration_ms": 2500}
    assert len(waits) == 2


@each_backend
async def test_the_configuration_can_be_a_mapping_or_a_file(tmp_path: Path) -> None:
    config = {
        "plugins": {"b": {"type": "builtin"}},
        "routes": {"/only": [{"plugin": "b"}]},
    }
    flow = {"steps": [{"id": "a", "component": "/only/noop"}], "output": {"$step": "a"}}
    async with StepflowRuntime.start(config) as runtime:
        assert (await runtime.run(flow)).is_success
        assert (await runtime.run(ECHO)).is_failed  # there is no route for /noop
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    for kind in (str, Path):
        async with StepflowRuntime.start(kind(path)) as runtime:
            assert (await runtime.run(flow)).is_success


@pytest.mark.parametrize("prefix", ["", "/builtin"])
@each_backend
async def test_the_default_configuration_has_both_names_of_a_component(
    prefix: str,
) -> None:
    step = {"id": "a", "component": f"{prefix}/noop", "input": {"$input": "$"}}
    async with StepflowRuntime.start() as runtime:
        result = await runtime.run({"steps": [step], "output": {"$step": "a"}}, "x")
    assert result.unwrap() == "x"


async def test_the_handle_tells_where_the_server_is_and_how_it_fares() -> None:
    runtime = StepflowRuntime.start()
    states = [runtime.state]
    assert repr(runtime) == "<StepflowRuntime new>"
    with pytest.raises(RuntimeStoppedError, match="not started"):
        _ = runtime.url
    async with runtime:
        states.append(runtime.state)
        assert runtime.url == f"http://127.0.0.1:{runtime.port}"
        assert repr(runtime) == f"<StepflowRuntime ready at {runtime.url}>"
        assert runtime.pid is not None
        os.kill(runtime.pid, 0)
        assert (runtime.restarts, runtime.last_exit) == (0, None)
        assert isinstance(runtime, StepflowExecutor)
    states.append(runtime.state)
    assert states == [RuntimeState.NEW, RuntimeState.READY, RuntimeState.STOPPED]
    assert runtime.pid is None


async def test_a_handle_that_was_left_says_so() -> None:
    runtime = StepflowRuntime.start()
    async with runtime:
        pass
    with pytest.raises(RuntimeStoppedError, match="is stopped"):
        await runtime.run(ECHO)
    with pytest.raises(RuntimeStoppedError, match="used before"):
        async with runtime:
            pytest.fail("entered twice")


@each_backend
async def test_the_port_can_be_chosen(free_tcp_port: int) -> None:
    async with StepflowRuntime.start(port=free_tcp_port) as runtime:
        assert runtime.port == free_tcp_port
        assert (await runtime.run(ECHO, 1)).output == 1


# -- the examples ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("example", "input", "variables", "output"),
    [
        (
            "greeting",
            {"name": "Ada"},
            None,
            {
                "to": "Ada",
                "messages": [
                    {
                        "role": "system",
                        "content": "You greet people. Be brief, and do not ask questions.",
                    },
                    {"role": "user", "content": "Ada"},
                ],
            },
        ),
        (
            "fan_out",
            {"items": [1, "b"]},
            None,
            {
                "successful": 2,
                "results": [
                    {"outcome": "success", "result": {"item": 1}},
                    {"outcome": "success", "result": {"item": "b"}},
                ],
            },
        ),
        ("nested", {"value": [1]}, None, {"inner": {"wrapped": [1]}}),
        (
            "read_file",
            {"path": str(EXAMPLES / "on_error.yaml")},
            None,
            {
                "format": "yaml",
                "data": {
                    "name": "on-error",
                    "description": "Reads a file, and goes on with a default if that fails",
                    "steps": [
                        {
                            "id": "read",
                            "component": "/load_file",
                            "onError": {
                                "action": "useDefault",
                                "defaultValue": {"data": "nothing to read"},
                            },
                            "input": {"path": {"$input": "$.path"}},
                        }
                    ],
                    "output": {"$step": "read", "path": "$.data"},
                },
            },
        ),
        ("variables", {}, {"city": "Oslo"}, {"city": "Oslo", "units": "metric"}),
        ("on_error", {"path": "/there/is/no/such/file"}, None, "nothing to read"),
    ],
)
@each_backend
async def test_the_examples_do_what_they_say(
    example: str, input: Any, variables: Any, output: Any
) -> None:
    config = {
        "plugins": {"builtin": {"type": "builtin"}},
        "routes": {
            "/builtin": [{"plugin": "builtin"}],
            "/": [{"plugin": "builtin"}],
        },
        # A built-in component that fails is tried again for 4 s, unless told otherwise.
        "retry": {"transportMaxRetries": 0},
    }
    async with StepflowRuntime.start(config) as runtime:
        result = await runtime.run(
            EXAMPLES / f"{example}.yaml", input, variables=variables
        )
    assert result.unwrap() == output


async def test_a_python_function_in_a_worker_is_a_component(
    worker_env: dict[str, str],
) -> None:
    folder = EXAMPLES / "python_worker"
    async with StepflowRuntime.start(
        folder / "stepflow-config.yml", env=worker_env
    ) as runtime:
        result = await runtime.run(folder / "shout.yaml", {"text": "hello"})
        assert result.unwrap() == "HELLO!"
        # onError's maxRetries: 1 is a limit that the server's HTTP API would not take.
        failed = await runtime.run(folder / "shout.yaml", {"text": ""})
    assert failed.error is not None
    assert failed.error.code == "COMPONENT_FAILED"
    assert failed.error.message == "there is nothing to shout"
    raised = [
        entry
        for entry in runtime.get_recent_logs(2000)
        if entry.message.endswith("\nValueError: there is nothing to shout")
    ]
    assert len(raised) == 2  # the first attempt and one more


# -- logs ------------------------------------------------------------------------------


@each_backend
async def test_log_lines_go_to_the_python_logger_and_to_recent_logs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("DEBUG", "stepflow.server")
    async with StepflowRuntime.start(log_config=LogConfig(level="debug")) as runtime:
        result = await runtime.run(ECHO, 1)
        # A server that is stopped in its first moments ends without a word.
        await anyio.sleep(0.5)
    entries = runtime.get_recent_logs(10_000)
    assert [r.getMessage() for r in caplog.records if r.name == "stepflow.server"] == [
        entry.message for entry in entries
    ]
    of_run = [entry for entry in entries if entry.run_id == result.run_id]
    assert any("Items execution completed" in entry.message for entry in of_run)
    assert {entry.level for entry in entries} >= {"INFO", "DEBUG"}
    assert "Graceful shutdown complete" in " ".join(entry.message for entry in entries)
    assert runtime.get_recent_logs(3) == entries[-3:]
    assert runtime.get_recent_logs(0) == []


@each_backend
async def test_ten_thousand_runs_at_level_trace_do_not_stall(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The official launcher, which drains no pipe, freezes at run 39."""
    caplog.set_level("ERROR")
    logs = LogConfig(level="trace", keep=1_000_000)
    async with StepflowRuntime.start(log_config=logs) as runtime:
        runs: set[str] = set()

        async def run_many() -> None:
            for number in range(500):
                result = await runtime.run(ECHO, number)
                assert result.output == number
                runs.add(result.run_id)

        with anyio.fail_after(240):
            async with anyio.create_task_group() as tasks:
                for _ in range(20):
                    tasks.start_soon(run_many)
    assert len(runs) == 10_000
    # Nothing was lost: each run's last line is there, once.
    ended = [
        entry.run_id
        for entry in runtime.get_recent_logs(1_000_000)
        if entry.message.startswith("Items execution completed")
    ]
    assert len(ended) == 10_000
    assert set(ended) == runs
