"""The server's log in the hands of others: logging's own tools, structlog, pytest.

What docs/how-to/logging.md shows is run by test_docs.py; here is what it says besides.
"""

from __future__ import annotations

import io
import json
import logging
import pickle
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from logging.handlers import QueueHandler, QueueListener
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import anyio
import pytest
import structlog

from stepflow_runtime import LogConfig, StepflowRuntime

from .conftest import ASYNCIO, ECHO, EXAMPLES, TRIO, wait_until

pytestmark = pytest.mark.anyio

# The threads that call handlers know of no event loop.
one_backend = pytest.mark.parametrize("anyio_backend", [ASYNCIO])
the_other = pytest.mark.parametrize("anyio_backend", [TRIO])

LOGGER = logging.getLogger("stepflow.server")


@contextmanager
def handled_by(handler: logging.Handler, level: str = "INFO") -> Iterator[None]:
    old = LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(level)
    try:
        yield
    finally:
        LOGGER.setLevel(old)
        LOGGER.removeHandler(handler)


# -- logging ---------------------------------------------------------------------------

DICT_CONFIG = """
import asyncio
import logging.config
import sys
from stepflow_runtime import StepflowRuntime

def configure(disable, **loggers):
    out = {"class": "logging.StreamHandler", "stream": "ext://sys.stdout"}
    logging.config.dictConfig({
        "version": 1,
        "disable_existing_loggers": disable,
        "handlers": {"out": out},
        "root": {"level": "INFO", "handlers": ["out"]},
        "loggers": loggers,
    })

with StepflowRuntime.start() as runtime:
    configure(True)
    asyncio.run(runtime.run(sys.argv[1], {"value": 5}))
print(logging.getLogger("stepflow_runtime").disabled)
with StepflowRuntime.start() as runtime:
    configure(True, **{"stepflow.server": {"level": "TRACE"}})
    asyncio.run(runtime.run(sys.argv[1], {"value": 5}))
print(logging.getLogger("stepflow.server").level)
configure(False)
print(logging.getLogger("stepflow_runtime").disabled)
"""


def test_a_dict_config_after_the_start_silences_loggers_that_it_does_not_name() -> None:
    done = run("-c", DICT_CONFIG, str(EXAMPLES / "nested.yaml"))
    assert (done.returncode, done.stderr) == (0, "")
    silenced, *logged, level, spared = done.stdout.splitlines()
    assert (silenced, level, spared) == ("True", "5", "False")
    assert any("Starting items execution" in line for line in logged)


@one_backend
async def test_a_slow_handler_behind_a_queue_holds_up_nothing() -> None:
    free = threading.Event()

    class Slow(logging.StreamHandler[io.StringIO]):
        def emit(self, record: logging.LogRecord) -> None:
            free.wait(30)
            super().emit(record)

    slow = Slow(io.StringIO())
    form = "{asctime} {levelname} {stepflow.target} {stepflow.run_id} {message}"
    slow.setFormatter(logging.Formatter(form, style="{"))
    queue = SimpleQueue[logging.LogRecord]()
    listener = QueueListener(queue, slow)
    listener.start()
    try:
        with handled_by(QueueHandler(queue)), anyio.fail_after(10):
            async with StepflowRuntime.start() as runtime:
                result = await runtime.run(ECHO, 1)
        assert slow.stream.getvalue() == ""
    finally:
        free.set()
        listener.stop()
    entries = runtime.get_recent_logs(1000)
    lines = slow.stream.getvalue().splitlines()
    assert len(lines) == len(entries)
    for line, entry in zip(lines, entries, strict=True):
        assert line.endswith(
            f" {entry.level} {entry.target} {entry.run_id} {entry.message}"
        )
    assert any(result.run_id in line for line in lines)


@the_other
async def test_a_record_can_be_sent_to_another_process() -> None:
    """By a SocketHandler, or a QueueHandler with a queue of multiprocessing's."""
    queue = SimpleQueue[logging.LogRecord]()
    with handled_by(QueueHandler(queue)):
        async with StepflowRuntime.start() as runtime:
            pass
    record = queue.get()
    copy = logging.makeLogRecord(pickle.loads(pickle.dumps(record.__dict__)))
    assert vars(copy)["stepflow"] == runtime.get_recent_logs()[0]
    assert copy.getMessage() == record.getMessage()


# -- structlog -------------------------------------------------------------------------


def bind_entry(_: object, method: str, event: Any) -> Any:
    entry = event["_record"].stepflow
    return {
        **event,
        "method": method,
        "timestamp": entry.timestamp.isoformat(),
        "run_id": entry.run_id,
    }


@the_other
async def test_structlog_formats_entries_of_every_level() -> None:
    handler = logging.StreamHandler(io.StringIO())
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                bind_entry,
                structlog.stdlib.add_log_level,
                structlog.stdlib.add_logger_name,
                structlog.processors.MaybeTimeStamper(fmt="iso"),
            ],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    with handled_by(handler, "TRACE"):
        async with StepflowRuntime.start(
            log_config=LogConfig(level="trace")
        ) as runtime:
            result = await runtime.run(ECHO, 1)
    entries = runtime.get_recent_logs(10_000)
    events = [json.loads(line) for line in handler.stream.getvalue().splitlines()]
    assert [
        (each["event"], each["timestamp"], each["run_id"], each["level"].upper())
        for each in events
    ] == [(e.message, e.timestamp.isoformat(), e.run_id, e.level) for e in entries]
    assert {each["level"] for each in events} >= {"trace", "debug", "info"}
    assert {each["logger"] for each in events} == {"stepflow.server"}
    assert result.run_id in {each["run_id"] for each in events}


# -- pytest ----------------------------------------------------------------------------


@pytest.fixture
async def runtime() -> AsyncIterator[StepflowRuntime]:
    """A server that is there before a test's own logging, and after it."""
    async with StepflowRuntime.start() as runtime:
        yield runtime


@one_backend
async def test_caplog_has_the_records_of_a_server_that_lives_on(
    runtime: StepflowRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "stepflow.server"):
        result = await runtime.run(ECHO, 1)
        with anyio.fail_after(10):
            async for entry in runtime.logs(run_id=result.run_id, recent=1000):
                if "Items execution completed" in entry.message:
                    break
        await wait_until(lambda: entry.message in caplog.messages)
    records = [r for r in caplog.records if r.name == "stepflow.server"]
    assert {vars(record)["stepflow"].run_id for record in records} >= {result.run_id}
    assert {record.levelname for record in records} == {"INFO"}


FAILING = f"""
import asyncio
from stepflow_runtime import StepflowRuntime

def test_that_fails():
    with StepflowRuntime.start() as runtime:
        asyncio.run(runtime.run({str(EXAMPLES / "nested.yaml")!r}, {{"value": 5}}))
    assert False
"""


def test_a_test_that_fails_is_shown_with_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    file = tmp_path / "test_sample.py"
    file.write_text(FAILING)
    done = run("-m", "pytest", "-qp", "no:cacheprovider", "--log-level=INFO", str(file))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Starting items execution" in done.stdout


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
