"""Secrets that users hand over are in nothing that we emit, and files of ours are theirs alone.

Everything that is given here has ``MARK`` in it. What is searched: the repr and str of what
is public, errors with all that they hold and were caused by, log records of every logger at
DEBUG, warnings, processes' arguments, files. What a workflow returns, or says in its own
errors, is not ours to hide: no run's output, and no step's message, is searched.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import socket
import stat
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from anyio.abc import AnyByteStream

from stepflow_runtime import (
    FlowId,
    LogConfig,
    ServerStartError,
    StepflowClient,
    StepflowError,
    StepflowRuntime,
    SubmitInterruptedError,
    backup_store,
)
from stepflow_runtime.private import check_unplanted
from stepflow_runtime.server.options import ServerOptions

from .conftest import ECHO, TRIO, each_backend
from .test_remote_transport import OK, Handle, answering, read_head, serving, silent

pytestmark = pytest.mark.anyio

MARK = "mArKeD"
PASSWORD = f"{MARK}-password"

SECRET_FLOW = {
    "schemas": {
        "type": "object",
        "properties": {
            "variables": {
                "type": "object",
                "properties": {"token": {"type": "integer", "is_secret": True}},
            }
        },
    },
    "steps": [{"id": "a", "component": "/noop", "input": {"$variable": "token"}}],
    "output": "done",
}


class Everything(logging.Handler):
    """Keeps what any logger says, at any level, as a program's own handler would show it."""

    def __init__(self) -> None:
        super().__init__(level=1)
        self.said: list[str] = []
        self.setFormatter(logging.Formatter("%(name)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(self.format(record) + repr(record.__dict__))


@pytest.fixture(autouse=True)
def everything() -> Iterator[Everything]:
    """No logger, whoever's it is, says the mark in any of these tests."""
    handler = Everything()
    loggers = [logging.getLogger()]
    names = ("stepflow_runtime", "stepflow.server", "httpx", "httpcore", "asyncio")
    loggers += map(logging.getLogger, names)
    before = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(1)
    loggers[0].addHandler(handler)
    yield handler
    loggers[0].removeHandler(handler)
    for each, level in zip(loggers, before, strict=True):
        each.setLevel(level)
    assert [line for line in handler.said if MARK in line] == []


def told_by(error: BaseException) -> str:
    """All that one can see of an error without looking for it: also in another process."""
    seen, texts = set(), []
    left: list[BaseException | None] = [error]
    while left:
        each = left.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        texts += [str(each), repr(each), repr(each.__dict__), repr(each.args)]
        left += [each.__cause__, each.__context__]
        if isinstance(each, BaseExceptionGroup):
            left += each.exceptions
    texts += traceback.format_exception(error)
    if isinstance(error, StepflowError):
        texts.append(repr(pickle.dumps(error)))
    return "\n".join(texts)


def assert_silent(*things: object) -> None:
    for each in things:
        told = told_by(each) if isinstance(each, BaseException) else f"{each}\n{each!r}"
        assert [line for line in told.splitlines() if MARK in line] == []


def _asyncio_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


# -- a runtime -------------------------------------------------------------------------


@each_backend
async def test_a_runtime_that_works_tells_no_secret(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    config = {
        "plugins": {"builtin": {"type": "builtin"}},
        "routes": {"/": [{"plugin": "builtin", "params": {"apiKey": PASSWORD}}]},
    }
    env = {
        "DB_PASSWORD": PASSWORD,
        "HTTPS_PROXY": f"http://user:{PASSWORD}@proxy.invalid",
        "STEPFLOW_OTHER_LOG_LEVEL": "trace",
    }
    log_config = LogConfig(level="trace", file_path=log)
    async with StepflowRuntime.start(config, env=env, log_config=log_config) as runtime:
        result = await runtime.run(SECRET_FLOW, variables={"token": PASSWORD})
        assert result.is_success
        run = await runtime.get_run(result.run_id)
        assert_silent(runtime, result, run, runtime._options, runtime._supervisor)
        process = psutil.Process(runtime.pid)
        children = psutil.Process().children(recursive=True)
        assert_silent(process.cmdline(), *(each.cmdline() for each in children))
        assert_silent(await anext(runtime.state_changes()))
    assert_silent(*runtime.get_recent_logs(100_000))
    assert "***" in log.read_text()  # the server logs its routes
    assert_silent(log.read_text())


BUILTIN = {"builtin": {"type": "builtin"}}
ROUTES = {"/": [{"plugin": "builtin"}]}
POSTGRES = f"postgres://user:{PASSWORD}@127.0.0.1:1/db?sslpassword={MARK}-in-query"


def with_plugin(**fields: object) -> dict[str, Any]:
    return {"plugins": {**BUILTIN, "mine": fields}, "routes": ROUTES}


@pytest.mark.parametrize(
    "options",
    [
        {"binary": "/nonexistent"},
        {"storage": POSTGRES},
        {"config_path": {**with_plugin(), "plugins": {"mine": {"token": PASSWORD}}}},
        {"config_path": with_plugin(type="grpc", command="sh", env=PASSWORD)},
        {"config_path": with_plugin(type="grpc", command=["x"], env={"T": PASSWORD})},
        {
            "config_path": with_plugin(
                type="grpc",
                command="/bin/sh",
                args=["-c", "echo $API_TOKEN $MULTI_LINE_KEY >&2; exit 3"],
                env={
                    "API_TOKEN": PASSWORD,
                    "MULTI_LINE_KEY": f"{MARK} line 1\n{MARK} line 2",
                },
            )
        },
        {
            "config_path": with_plugin(
                type="nats", url=f"nats://u:{PASSWORD}@127.0.0.1:1"
            )
        },
        {"log_config": LogConfig(file_path="/nonexistent/log")},
    ],
    ids=lambda options: next(iter(options)),
)
@each_backend
async def test_a_start_that_fails_tells_no_secret(options: dict[str, Any]) -> None:
    env = {"MY_SECRET": PASSWORD}
    with pytest.raises(ServerStartError) as raised:
        async with StepflowRuntime.start(**options, env=env):
            raise AssertionError
    assert_silent(raised.value, *raised.value.recent_logs, raised.value.exit)


@each_backend
async def test_what_a_dying_server_prints_of_its_environment_is_starred(
    fake_server: Callable[[str], Path], tmp_path: Path
) -> None:
    binary = fake_server("env; env >&2; exit 3")
    env = {"MY_SECRET": PASSWORD, "PROXY": f"http://u:{PASSWORD}@h", "SHORT_PW": "abc"}
    with pytest.raises(ServerStartError, match=r"MY_SECRET=\*\*\*") as raised:
        async with StepflowRuntime.start(binary=binary, env=env):
            raise AssertionError
    assert_silent(raised.value)
    assert "SHORT_PW=abc" in str(raised.value)  # it could be a part of any word


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"env": {"TOKEN": f"{MARK}\0"}}, ValueError),
        ({"env": {"TOKEN": [MARK]}}, TypeError),
        ({"env": [MARK]}, TypeError),
        ({"config_path": {"token": {MARK}}}, ValueError),
        ({"config_path": [MARK]}, TypeError),
        ({"storage": f"mysql://u:{MARK}@h/db"}, ValueError),
        ({"storage": f"postgres://u:{MARK} @h/db"}, ValueError),
        ({"storage": f"postgres://u:{MARK}@h/db".encode()}, TypeError),
        ({"storage": "x", "lease": [f"http://u:{MARK}@h:1"]}, ValueError),
        ({"storage": "x", "lease": [f"http://h:1?token={MARK}"]}, ValueError),
        ({"storage": "x", "lease": [f"http://u:{MARK}@h:1".encode()]}, TypeError),
        ({"storage": "x", "lease": f"http://u:{MARK}@h:1"}, TypeError),
    ],
)
def test_an_option_that_is_refused_is_not_quoted(
    options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error) as raised:
        ServerOptions(**options)
    assert_silent(raised.value)


@pytest.mark.parametrize(
    "endpoint",
    [
        f"http://u:{MARK}@h:4317",
        f"http://h:4317?token={MARK}",
        f"http://h:4317/#{MARK}",
        f"https://u:{MARK}@h",
        f"http://u:{MARK}/x@h:1",
        f"http://u:{MARK}@h:4317".encode(),
    ],
)
def test_a_collectors_address_with_a_secret_is_refused_unquoted(
    endpoint: Any,
) -> None:
    # It goes to the server as an argument, which everybody on this machine can read.
    with pytest.raises((ValueError, TypeError)) as raised:
        LogConfig(otlp_endpoint=endpoint)
    assert_silent(raised.value)


def test_an_unreadable_configuration_file_is_not_quoted(tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    for text in (f"password: '{MARK}", f"a: [{MARK}", f"a: {MARK}: b", f"- {MARK}"):
        path.write_text(text)
        with pytest.raises(ServerStartError) as raised:
            ServerOptions(config_path=path, storage="runs.db").anchored()
        assert_silent(raised.value)


# -- a client --------------------------------------------------------------------------

UNAUTHORIZED = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n"
MOVED = b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n"
FAULT = b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n"


async def broken(stream: AnyByteStream) -> None:
    await stream.receive()


def handles_of(way: str) -> list[Handle | None]:
    if way == "tls":
        return [answering(FAULT)]
    if way == "proxy":
        return [answering(FAULT), broken]
    answers = [answering(each) for each in (UNAUTHORIZED, MOVED)]
    return [*answers, broken, silent, None]


@pytest.mark.parametrize(
    "anyio_backend", [pytest.param(("asyncio", {"debug": True}), id="asyncio"), TRIO]
)
@pytest.mark.parametrize("way", ["direct", "httpx", "proxy", "tls"])
async def test_a_client_that_fails_tells_no_secret(
    way: str, monkeypatch: pytest.MonkeyPatch, everything: Everything
) -> None:
    if (loop := _asyncio_loop()) is not None:
        loop.slow_callback_duration = 0  # so that it tells of each
    monkeypatch.setattr("stepflow_runtime.client._PAUSES", (0.01,))
    for handle in handles_of(way):
        async with serving(handle or silent) as port, httpx.AsyncClient() as given:
            if handle is None:
                port = _free_port()
            if way == "proxy":
                proxy = f"http://user:{PASSWORD}@127.0.0.1:{port}"
                monkeypatch.setenv("http_proxy", proxy)
                monkeypatch.setenv("no_proxy", "")
            client = StepflowClient(
                f"http{'s' * (way == 'tls')}://user:{PASSWORD}@127.0.0.1:{port}/",
                headers={"X-Api-Key": PASSWORD, "Cookie": PASSWORD},
                timeout=0.2,
                http_client=given if way == "httpx" else None,
            )
            with pytest.raises(StepflowError) as raised:
                async with client:
                    assert_silent(client, client.url)
                    variables = {"token": PASSWORD}
                    await client.run(SECRET_FLOW, MARK, variables=variables)
            assert_silent(raised.value)
    assert loop is None or any("Executing" in line for line in everything.said)


async def answer_all_but_submits(stream: AnyByteStream) -> None:
    head = await read_head(stream)
    while b"/runs" not in head:
        await stream.send(OK)
        head = await read_head(stream)


@each_backend
async def test_a_submit_whose_fate_is_unknown_tells_no_secret() -> None:
    async with (
        serving(answer_all_but_submits) as port,
        StepflowClient(f"http://u:{PASSWORD}@127.0.0.1:{port}") as client,
    ):
        with pytest.raises(SubmitInterruptedError) as raised:
            await client.submit(FlowId("0" * 64), MARK, variables={"token": PASSWORD})
    assert_silent(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        f"http://u:{MARK}@h:port",
        f"http://u:{MARK}/x@h",
        f"http://u:{MARK}?x@h",
        f"http://u:{MARK}#x@h",
        f"http://u:{MARK}[@h",
        f"http://h/?token={MARK}",
        f"ftp://u:{MARK}@h",
        f"http://u:{MARK}@h".encode(),
    ],
)
def test_a_url_that_is_refused_is_not_quoted(url: Any) -> None:
    for given in (url, [url]):
        with pytest.raises((ValueError, TypeError)) as raised:
            StepflowClient(given)
        assert_silent(raised.value)


# -- files -----------------------------------------------------------------------------


def modes_in(folder: Path) -> dict[str, int]:
    return {each.name: stat.S_IMODE(each.stat().st_mode) for each in folder.iterdir()}


@each_backend
async def test_all_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    given, asked = tmp_path / "given.db", tmp_path / "asked.db"
    store = {"type": "sqlite", "databaseUrl": f"sqlite:{given}?mode=rwc"}
    config = {"plugins": BUILTIN, "routes": ROUTES, "storageConfig": store}
    log_config = LogConfig(file_path=tmp_path / "log")
    async with (
        StepflowRuntime.start(config, log_config=log_config),
        StepflowRuntime.start(storage=asked) as runtime,
    ):
        await runtime.run(ECHO, 1)
        await backup_store(asked, tmp_path / "copy.db")
        found = modes_in(tmp_path)
    assert {"given.db-wal", "asked.db-wal", "asked.db-lock", "copy.db", "log"} <= {
        *found
    }
    assert set(found.values()) == {0o600}


@each_backend
async def test_the_user_may_say_otherwise(tmp_path: Path) -> None:
    store, log = tmp_path / "runs.db", tmp_path / "log"
    store.touch()
    store.chmod(0o640)
    log_config = LogConfig(file_path=log, file_mode=0o640)
    async with StepflowRuntime.start(storage=store, log_config=log_config):
        found = modes_in(tmp_path)
    assert found.pop("runs.db-lock") == 0o600
    assert set(found.values()) == {0o640}
    for mode in (0o440, 0o1640, -1, "0640"):
        with pytest.raises((ValueError, TypeError), match="file_mode"):
            LogConfig(file_mode=mode)  # type: ignore[arg-type]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else, too")
@pytest.mark.parametrize("is_link", [False, True])
@pytest.mark.parametrize("end", ["", "-wal", "-lock"])
def test_what_a_stranger_has_put_into_a_common_directory_is_not_used(
    tmp_path: Path, is_link: bool, end: str
) -> None:
    common = tmp_path / "tmp"
    common.mkdir()
    common.chmod(0o1777)
    path, planted = common / "it", common / f"it{end}"
    target = tmp_path / "target"
    planted.symlink_to(target) if is_link else planted.touch(mode=0o666)
    os.chown(planted, 12345, 12345, follow_symlinks=False)
    with pytest.raises(ServerStartError, match="another user's"):
        StepflowRuntime.start(storage=path)
    if not end:
        with pytest.raises(ServerStartError, match="another user's"):
            StepflowRuntime.start(log_config=LogConfig(file_path=path))
    assert not target.exists()
    # Its owner's, and where nobody else could have put it, it is the user's affair.
    os.chown(common, 12345, 12345)
    check_unplanted(planted)
    os.chown(common, 0, 0)
    common.chmod(0o755)
    check_unplanted(planted)
