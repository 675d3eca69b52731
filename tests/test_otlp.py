"""Logs, traces and metrics of the real server, at a receiver of OpenTelemetry's protocol."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from stepflow_runtime import LogConfig, ServerStartError, StepflowRuntime

from .conftest import ASYNCIO, ECHO, TRIO, each_backend, wait_until
from .otlp_receiver import OtlpReceiver, attributes

pytestmark = pytest.mark.anyio

# The server sends spans once a second, and takes that second when it stops, too.
slow = pytest.mark.parametrize("anyio_backend", [ASYNCIO])
slow_too = pytest.mark.parametrize("anyio_backend", [TRIO])


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture
def nobody() -> Iterator[str]:
    """An endpoint that refuses connections: bound, so that nobody else gets the port."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


@pytest.fixture
def silent() -> Iterator[str]:
    """An endpoint that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


async def wait_until_it_heeds_sigterm(runtime: StepflowRuntime) -> None:
    """A server is READY before it has a handler: some milliseconds long SIGTERM kills it.

    With it goes what it has not sent.
    """
    status = Path(f"/proc/{runtime.pid}/status")

    def heeds() -> int:
        _, _, caught = status.read_text().partition("SigCgt:")
        return int(caught.split()[0], 16) >> (signal.SIGTERM - 1) & 1

    await wait_until(heeds)


# -- what arrives ----------------------------------------------------------------------


@each_backend
async def test_the_logs_of_a_run_arrive_and_a_stop_sends_the_last_ones(
    receiver: OtlpReceiver,
) -> None:
    config = LogConfig(otlp_endpoint=receiver.endpoint)
    async with StepflowRuntime.start(log_config=config) as runtime:
        result = await runtime.run(ECHO, 1)
        await wait_until_it_heeds_sigterm(runtime)
    records = receiver.log_records()
    of_the_run = [
        record
        for record in records
        if attributes(record).get("run_id") == result.run_id
        and attributes(record).get("flow_id")
    ]
    assert any("completed" in record.body.string_value for record in of_the_run)
    assert {(each.severity_text, each.severity_number) for each in of_the_run} == {
        ("INFO", 9)
    }
    assert "shutdown complete" in str(records)
    assert {each["service.name"] for each in receiver.resources()} == {
        "stepflow-server"
    }
    # Nothing else was asked for, and nothing of this was printed.
    assert receiver.spans() == receiver.metrics() == []
    assert runtime.get_recent_logs() == []


@slow
async def test_traces_and_metrics_arrive_when_they_are_asked_for(
    receiver: OtlpReceiver,
) -> None:
    config = LogConfig(
        otlp_endpoint=receiver.endpoint, otlp_traces=True, otlp_metrics=True
    )
    async with StepflowRuntime.start(log_config=config) as runtime:
        result = await runtime.run(ECHO, 1)
        await wait_until_it_heeds_sigterm(runtime)
    spans = {span.name: span for span in receiver.spans()}
    assert spans["step"].parent_span_id == spans["run_execution"].span_id
    assert attributes(spans["run_execution"])["run_id"] == result.run_id
    (trace_id,) = {span.trace_id.hex() for span in spans.values()}
    assert trace_id in {
        attributes(record).get("trace_id") for record in receiver.log_records()
    }
    assert "step.executions_total" in {metric.name for metric in receiver.metrics()}


@slow_too
async def test_a_variable_keeps_the_logs_here_while_traces_go_to_the_collector(
    receiver: OtlpReceiver,
) -> None:
    config = LogConfig(otlp_endpoint=receiver.endpoint, otlp_traces=True)
    env = {"STEPFLOW_LOG_DESTINATION": "stdout"}
    async with StepflowRuntime.start(log_config=config, env=env) as runtime:
        result = await runtime.run(ECHO, 1)
        await wait_until_it_heeds_sigterm(runtime)
    (trace_id,) = {span.trace_id.hex() for span in receiver.spans()}
    assert receiver.log_records() == []
    assert (result.run_id, trace_id) in {
        (entry.run_id, entry.trace_id) for entry in runtime.get_recent_logs()
    }


@each_backend
async def test_the_lowest_level_does_not_log_the_sending_of_logs(
    receiver: OtlpReceiver,
) -> None:
    config = LogConfig(level="trace", otlp_endpoint=receiver.endpoint)
    env = {"OTEL_BLRP_SCHEDULE_DELAY": "20"}
    async with StepflowRuntime.start(log_config=config, env=env) as runtime:
        await runtime.run(ECHO, 1)
        await wait_until(lambda: receiver.requests)
        await wait_until_it_heeds_sigterm(runtime)
    records = receiver.log_records()
    assert {"DEBUG", "INFO"} <= {record.severity_text for record in records}
    modules = {attributes(record)["module_path"] for record in records}
    assert all(module.startswith("stepflow_") for module in modules)


@each_backend
async def test_a_collector_gets_the_headers_and_attributes_that_env_names(
    receiver: OtlpReceiver,
) -> None:
    env = {
        "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20x",
        "OTEL_RESOURCE_ATTRIBUTES": "service.name=mine,deployment.environment=test",
    }
    config = LogConfig(otlp_endpoint=receiver.endpoint)
    async with StepflowRuntime.start(log_config=config, env=env) as runtime:
        await wait_until_it_heeds_sigterm(runtime)
    assert {each.headers["authorization"] for each in receiver.requests} == {"Bearer x"}
    assert {
        (each["service.name"], each["deployment.environment"])
        for each in receiver.resources()
    } == {("mine", "test")}


# -- what does not ---------------------------------------------------------------------


@each_backend
async def test_a_collector_that_is_not_there_harms_nothing_and_is_told_of(
    nobody: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "stepflow.server")
    config = LogConfig(otlp_endpoint=nobody)
    with anyio.fail_after(10):
        async with StepflowRuntime.start(log_config=config) as runtime:
            assert (await runtime.run(ECHO, 1)).unwrap() == 1
            await wait_until_it_heeds_sigterm(runtime)
    # What the server still prints is captured as ever.
    printed = "\n".join(entry.message for entry in runtime.get_recent_logs())
    assert "failed to flush records" in printed
    assert {entry.stream for entry in runtime.get_recent_logs()} == {"stderr"}
    assert "failed to flush records" in caplog.text


@each_backend
async def test_a_collector_that_never_answers_holds_a_stop_no_longer_than_allowed(
    silent: str,
) -> None:
    config = LogConfig(otlp_endpoint=silent)
    # It would wait for the answer for 5 s.
    started = StepflowRuntime.start(log_config=config, shutdown_timeout=0.3)
    async with started as runtime:
        assert (await runtime.run(ECHO, 1)).unwrap() == 1
        await wait_until_it_heeds_sigterm(runtime)
        since = anyio.current_time()
    assert anyio.current_time() - since < 3


@each_backend
async def test_why_a_start_failed_arrives_at_the_collector(
    receiver: OtlpReceiver,
) -> None:
    config = LogConfig(otlp_endpoint=receiver.endpoint)
    with pytest.raises(ServerStartError):
        async with StepflowRuntime.start({"plugins": {}}, log_config=config):
            pass
    (record,) = (
        each for each in receiver.log_records() if each.severity_text == "ERROR"
    )
    assert "Failed to load configuration" in record.body.string_value
