"""Who we are compared with, each used as its own documentation says.

- the official pair: ``StepflowOrchestrator`` starts a server, ``StepflowClient`` talks to it
- httpx: the client that one would take without a library
- raw sockets: about the least that a Python program can do for a run
- wrk, a load generator in C: what the server can do at most
- the bare binary: a server without any care

And ourselves, on each kind of event loop: a lane is a thread with a loop of its own, in which a
side lives from round to round while the others have their turns.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, Final, Protocol

import stepflow_orchestrator
from anyio.from_thread import BlockingPortal, start_blocking_portal

from stepflow_runtime import LogConfig, StepflowClient, StepflowRuntime

from .measure import Sample, load, of_latencies

__all__ = [
    "BINARY",
    "CONFIG",
    "FLOW",
    "QUIET",
    "Load",
    "bare_server",
    "clients",
    "connect",
    "environment",
    "exchange",
    "has_wrk",
    "hosted",
    "httpx_client",
    "in_lane",
    "lane",
    "official",
    "ours",
    "post",
    "raw",
    "run_body",
    "store",
    "wrk",
]

BINARY: Final = Path(stepflow_orchestrator.__file__).parent / "bin" / "stepflow-server"
FLOW: Final[dict[str, Any]] = {
    "name": "echo",
    "description": "Returns its input",
    "steps": [{"id": "a", "component": "/noop", "input": {"$input": "$"}}],
    "output": {"$step": "a"},
}
# What a runtime without a configuration has, too.
CONFIG: Final[dict[str, Any]] = {
    "plugins": {"builtin": {"type": "builtin"}},
    "routes": {"/builtin": [{"plugin": "builtin"}], "/": [{"plugin": "builtin"}]},
}
QUIET: Final = LogConfig(level="error")
INPUT: Final = {"n": 1}

_COMPLETED = 2


class Load(Protocol):
    """A side under load."""

    def __call__(self, at_once: int, seconds: float) -> Sample: ...


def environment() -> dict[str, str]:
    """For new interpreters: they may write, and find, compiled modules, as users' do."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


# -- lanes -----------------------------------------------------------------------------


@contextmanager
def lane(loop: str) -> Iterator[BlockingPortal]:
    """A thread with an event loop: asyncio, uvloop or trio."""
    if loop == "uvloop":
        portal = start_blocking_portal("asyncio", {"use_uvloop": True})
    else:
        portal = start_blocking_portal(loop)
    with portal as entered:
        yield entered


Runs = Callable[[], Awaitable[object]]


@contextmanager
def in_lane(
    loop: str, block: Callable[[], AbstractAsyncContextManager[Runs]]
) -> Iterator[Load]:
    """A side that lives in a lane: its block is entered there, and its runs are made there."""
    with lane(loop) as portal, portal.wrap_async_context_manager(block()) as run:
        yield lambda at_once, seconds: portal.call(load, run, at_once, seconds)


@asynccontextmanager
async def ours(log_config: LogConfig = QUIET, **options: Any) -> AsyncIterator[Runs]:
    """A runtime in the caller's task."""
    async with StepflowRuntime.start(log_config=log_config, **options) as runtime:
        flow_id = await runtime.store_flow(FLOW)
        (await runtime.run(flow_id, INPUT)).unwrap()
        yield partial(runtime.run, flow_id, INPUT)


@asynccontextmanager
async def hosted(log_config: LogConfig = QUIET) -> AsyncIterator[Runs]:
    """A runtime in a background thread, its calls made here."""
    runtime = await StepflowRuntime.start_async(log_config=log_config)
    try:
        flow_id = await runtime.store_flow(FLOW)
        (await runtime.run(flow_id, INPUT)).unwrap()
        yield partial(runtime.run, flow_id, INPUT)
    finally:
        await runtime.stop_async()


@asynccontextmanager
async def official(level: str = "error") -> AsyncIterator[Runs]:
    """Stepflow's own launcher and client.

    From ``info`` on, its server freezes after some forty runs, since nobody reads its pipes. So
    they are read here, by threads, as a program would have to do by hand.
    """
    from stepflow_orchestrator import OrchestratorConfig, StepflowOrchestrator
    from stepflow_py import StepflowClient

    config = OrchestratorConfig(config=CONFIG, log_level=level)
    async with StepflowOrchestrator.start(config) as orchestrator:
        process = orchestrator._process
        assert process is not None
        with drained(process.stdout, process.stderr):
            async with StepflowClient.connect(orchestrator.url) as client:
                flow_id = (await client.store_flow(FLOW)).flow_id
                answer = await client.run(flow_id, INPUT)
                assert answer.summary.status == _COMPLETED, answer
                try:
                    yield partial(client.run, flow_id, INPUT)
                finally:
                    # The threads end with the pipes, and those with the server.
                    process.terminate()


@asynccontextmanager
async def httpx_client(port: int) -> AsyncIterator[Runs]:
    """httpx as it is, with as many connections as there are runs."""
    import httpx

    body = run_body(store(port))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", limits=limits, trust_env=False, timeout=60
    ) as client:

        async def run() -> object:
            answer = await client.post("/api/v1/runs", json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()

        await run()
        yield run


@asynccontextmanager
async def clients(*urls: str | list[str]) -> AsyncIterator[Runs]:
    """A client of each, which take the runs in turn."""
    async with AsyncExitStack() as stack:
        runs = []
        for url in urls:
            client = await stack.enter_async_context(StepflowClient(url))
            flow_id = await client.store_flow(FLOW)
            (await client.run(flow_id, INPUT)).unwrap()
            runs.append(partial(client.run, flow_id, INPUT))
        turns = cycle(runs)
        yield lambda: next(turns)()


# -- the bare binary -------------------------------------------------------------------


@contextmanager
def bare_server(
    level: str = "error",
    *,
    drain: bool = False,
    config: dict[str, Any] = CONFIG,
    identity: str = "alone",
) -> Iterator[tuple[int, int]]:
    """A server started by hand: its port and its pid.

    :param identity: who it is to those that it shares a store with
    """
    with subprocess.Popen(
        [str(BINARY), "--port", "0", "--config-stdin", "--log-level", level]
        + ["--log-format", "json", "--orchestrator-id", identity],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(config).encode())
        server.stdin.close()
        try:
            line = server.stdout.readline()
            while not line.startswith(b'{"port"'):
                line = server.stdout.readline()
            port = json.loads(line)["port"]
            with drained(*[server.stdout] if drain else []):
                try:
                    yield port, server.pid
                finally:
                    server.kill()
        finally:
            server.kill()


@contextmanager
def drained(*pipes: Any) -> Iterator[None]:
    """Have threads read pipes and throw away what comes, in as few calls as possible."""
    threads = [threading.Thread(target=_drain, args=(pipe,)) for pipe in pipes]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.join()


def _drain(pipe: Any) -> None:
    while os.read(pipe.fileno(), 1 << 20):
        pass


# -- raw sockets -----------------------------------------------------------------------


def run_body(flow_id: str) -> dict[str, Any]:
    """A run in one request."""
    return {"flowId": flow_id, "input": [INPUT], "wait": True, "timeoutSecs": 1}


def post(path: str, body: bytes) -> bytes:
    """A request's bytes."""
    return (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def exchange(connection: socket.socket, request: bytes) -> bytes:
    """The body of the answer to a request; nothing is decoded."""
    connection.sendall(request)
    head, _, body = connection.recv(1 << 20).partition(b"\r\n\r\n")
    size = int(head.lower().partition(b"content-length:")[2].split(maxsplit=1)[0])
    parts, have = [body], len(body)
    while have < size:
        parts.append(connection.recv(1 << 20))
        have += len(parts[-1])
    assert head.startswith(b"HTTP/1.1 200"), (head, parts[0][:500])
    return b"".join(parts)


def connect(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def store(port: int, flow: dict[str, Any] = FLOW) -> str:
    """Store a flow on a server; return its id."""
    with connect(port) as connection:
        body = json.dumps({"flow": flow}).encode()
        answer = exchange(connection, post("/api/v1/flows", body))
    flow_id = json.loads(answer)["flowId"]
    assert isinstance(flow_id, str)
    return flow_id


def raw(port: int, flow_id: str, at_once: int, seconds: float) -> Sample:
    """Runs over sockets by one thread, which sends a run again whenever an answer is there.

    No answer is looked at, but for its end. One at a time needs no readiness.
    """
    request = post("/api/v1/runs", json.dumps(run_body(flow_id)).encode())
    connections = {
        each.fileno(): each for each in (connect(port) for _ in range(at_once))
    }
    try:
        work = _raw_alone if at_once == 1 else _raw_many
        began, cost = time.perf_counter(), time.process_time()
        latencies = work(connections, request, began + seconds)
        cost = time.process_time() - cost
        return of_latencies(latencies, time.perf_counter() - began, cost)
    finally:
        for each in connections.values():
            each.close()


def _raw_alone(
    connections: dict[int, socket.socket], request: bytes, until: float
) -> list[float]:
    (connection,) = connections.values()
    latencies = []
    began = time.perf_counter()
    while began < until:
        connection.send(request)
        answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"}"), answer
        now = time.perf_counter()
        latencies.append(now - began)
        began = now
    return latencies


def _raw_many(
    connections: dict[int, socket.socket], request: bytes, until: float
) -> list[float]:
    latencies: list[float] = []
    began = {}
    with select.epoll() as poll:
        for number, connection in connections.items():
            poll.register(number, select.EPOLLIN)
            began[number] = time.perf_counter()
            connection.send(request)
        under_way = len(connections)
        while under_way:
            for number, _ in poll.poll():
                connection = connections[number]
                answer = connection.recv(65536)
                assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"}"), (
                    answer
                )
                now = time.perf_counter()
                latencies.append(now - began[number])
                if now < until:
                    began[number] = now
                    connection.send(request)
                else:
                    under_way -= 1
    return latencies


# -- wrk -------------------------------------------------------------------------------


def has_wrk() -> bool:
    return shutil.which("wrk") is not None


def wrk(port: int, flow_id: str, at_once: int, seconds: float) -> Sample:
    """The load generator, with one thread of its own; it measures for whole seconds."""
    whole = max(1, round(seconds))
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(
            'wrk.method = "POST"\n'
            'wrk.headers["Content-Type"] = "application/json"\n'
            f"wrk.body = [[{json.dumps(run_body(flow_id))}]]\n"
        )
        script.flush()
        done = subprocess.run(
            [
                "wrk",
                "-t1",
                f"-c{at_once}",
                f"-d{whole}s",
                "--latency",
                "-s",
                script.name,
            ]
            + [f"http://127.0.0.1:{port}/api/v1/runs"],
            capture_output=True,
            text=True,
            check=True,
        )
    assert "Non-2xx" not in done.stdout, done.stdout
    found = dict(_wrk_fields(done.stdout))
    return Sample(found.pop("rate"), found)


def _wrk_fields(output: str) -> Iterator[tuple[str, float]]:
    names = {"50%": "p50 ms", "99%": "p99 ms", "Requests/sec:": "rate"}
    for line in output.splitlines():
        words = line.split()
        if len(words) == 2 and words[0] in names:
            yield names[words[0]], _wrk_number(words[1])


def _wrk_number(word: str) -> float:
    """A number, in milliseconds if it is a time."""
    for unit, factor in (("us", 1e-3), ("ms", 1.0), ("s", 1e3)):
        if word.endswith(unit):
            return float(word.removesuffix(unit)) * factor
    return float(word)
