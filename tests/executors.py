"""Every way to come by an executor, for the tests of what all of them promise."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.abc
import httpx

from stepflow_runtime import RunEvent, StepflowClient, StepflowRuntime
from stepflow_runtime.api import ApiExecutor
from stepflow_runtime.transport import Response, Stream

__all__ = [
    "CONFIG",
    "KINDS",
    "SYNC",
    "Traffic",
    "executor_of",
    "most_at_a_time",
    "server_by_hand",
    "watch_traffic",
]

CONFIG: Final[Mapping[str, Any]] = {
    "plugins": {"builtin": {"type": "builtin"}},
    "routes": {"/builtin": [{"plugin": "builtin"}], "/": [{"plugin": "builtin"}]},
    # A built-in component that fails is tried again for 4 s, unless told otherwise.
    "retry": {"transportMaxRetries": 0},
}

SYNC: Final = "embedded, started outside of a loop"
KINDS: Final = (
    "embedded, entered",
    "embedded, served",
    "embedded, in a thread",
    SYNC,
    "client, entered",
    "client, not entered",
    "client, with an httpx client",
    "client, of several servers",
)


@asynccontextmanager
async def executor_of(kind: str, server_url: str) -> AsyncIterator[ApiExecutor]:
    """An executor of this kind, all but ``SYNC``; clients are of the server given."""
    match kind:
        case "embedded, entered":
            async with StepflowRuntime.start(CONFIG) as runtime:
                yield runtime
        case "embedded, served":
            async with anyio.create_task_group() as tasks:
                yield await tasks.start(StepflowRuntime.start(CONFIG).serve)
                tasks.cancel_scope.cancel()
        case "embedded, in a thread":
            runtime = await StepflowRuntime.start_async(CONFIG)
            try:
                yield runtime
            finally:
                await runtime.stop_async()
        case "client, entered":
            async with StepflowClient(server_url) as client:
                yield client
        case "client, not entered":
            client = StepflowClient(server_url)
            try:
                yield client
            finally:
                await client.aclose()
        case "client, with an httpx client":
            async with (
                httpx.AsyncClient() as http_client,
                StepflowClient(server_url, http_client=http_client) as client,
            ):
                yield client
        case "client, of several servers":
            # Nobody listens at the first one.
            async with StepflowClient(["http://127.0.0.1:1", server_url]) as client:
                yield client
        case _:
            raise AssertionError(kind)


@contextmanager
def server_by_hand(
    binary: Path, config: Mapping[str, Any] | None = None
) -> Iterator[str]:
    """A server that no library of ours has started; yields its URL."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("STEPFLOW_")}
    command = [str(binary), "--port", "0", "--config-stdin", "--log-level", "error"]
    with subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        stdout = process.stdout
        process.stdin.write(json.dumps(config or CONFIG).encode())
        process.stdin.close()
        port = 0
        while not port:
            line = stdout.readline()
            assert line, "the server ended"
            if line.startswith(b'{"port":'):
                port = json.loads(line)["port"]
        drain = threading.Thread(target=lambda: any(map(bool, stdout)) or stdout.read())
        drain.start()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(10)
            drain.join(10)


class Traffic:
    """What an executor sends.

    :ivar requests: method and path of each request
    :ivar open_streams: how many streams are not closed
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.open_streams = 0


def watch_traffic(executor: ApiExecutor) -> Traffic:
    """Count from now on what ``executor`` sends."""
    traffic = Traffic()
    request, open_stream = executor._request, executor._open_stream

    async def watched_request(
        method: str, path: str, *args: Any, **kw: Any
    ) -> Response:
        traffic.requests.append(f"{method} {path.partition('?')[0]}")
        return await request(method, path, *args, **kw)

    async def watched_stream(
        path: str, *, generation: int | None = None
    ) -> tuple[Stream, int | None]:
        traffic.requests.append(f"GET {path.partition('?')[0]}")
        stream, whose = await open_stream(path, generation=generation)
        return _WatchedStream(stream, traffic), whose

    executor._request = watched_request  # type: ignore[method-assign]
    executor._open_stream = watched_stream  # type: ignore[method-assign]
    return traffic


class _WatchedStream:
    def __init__(self, stream: Stream, traffic: Traffic) -> None:
        self._stream = stream
        self._traffic = traffic
        self._is_open = True
        traffic.open_streams += 1
        self.status = stream.status
        self.content_type = stream.content_type
        self.receive = stream.receive

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._traffic.open_streams -= 1
        self._stream.close()


def most_at_a_time(events: list[RunEvent]) -> int:
    """How many steps of a run were ever under way at once."""
    most = running = 0
    for event in events:
        running += {"StepStarted": 1, "StepCompleted": -1}.get(type(event).__name__, 0)
        most = max(most, running)
    return most
