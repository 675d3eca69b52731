"""A start that fails explains itself, in time, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from stepflow_runtime import (
    BinaryNotFoundError,
    LogConfig,
    LogEntry,
    RestartPolicy,
    RuntimeState,
    ServerStartError,
    StepflowRuntime,
)
from stepflow_runtime.server import binary as binary_module

from .conftest import ECHO, EXAMPLES, each_backend, wait_until

BUILTIN = {"type": "builtin"}


async def failing_start(**options: Any) -> ServerStartError:
    runtime = StepflowRuntime.start(**options)
    with pytest.raises(ServerStartError) as caught:
        async with runtime:
            pytest.fail("it started")
    assert runtime.state is RuntimeState.FAILED
    message = str(caught.value)
    assert "\x1b" not in message
    assert "backtrace" not in message
    assert "│" not in message
    assert not re.search(r"\bat crates/", message)
    return caught.value


def worker_config(command: str, *args: str) -> dict[str, Any]:
    return {
        "plugins": {
            "py": {
                "type": "grpc",
                "command": command,
                "args": list(args),
                "queueName": "py",
            }
        },
        "routes": {"/": [{"plugin": "py"}]},
    }


pytestmark = pytest.mark.anyio


# -- the configuration -----------------------------------------------------------------


async def test_a_missing_configuration_file(tmp_path: Path) -> None:
    error = await failing_start(config_path=tmp_path / "nope.yml")
    assert f"Failed to read config file: {tmp_path}/nope.yml" in str(error)
    assert "No such file or directory" in str(error)
    assert error.exit is not None and error.exit.code == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1,\n", "did not find expected node content at line 2 column 1"),
        ("just words\n", "Failed to parse config YAML"),
        ("plugins: {}\n", "missing field `routes`"),
        (
            "plugins: {x: {type: nosuch}}\nroutes: {}\n",
            "plugins.x: unknown variant `nosuch`, expected one of `builtin`",
        ),
        (
            "plugins: {b: {type: builtin}}\nroutes: {/: [{plugin: zz}]}\n",
            "plugin not found: zz",
        ),
    ],
)
@each_backend
async def test_a_wrong_configuration_file(
    tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / "config.yml"
    path.write_text(text)
    error = await failing_start(config_path=path)
    assert words in str(error)
    assert str(path) in str(error)


@each_backend
async def test_a_wrong_configuration_given_as_a_mapping() -> None:
    error = await failing_start(
        config_path={"plugins": {"x": {"type": "nosuch"}}, "routes": {}}
    )
    assert "unknown variant `nosuch`, expected one of" in str(error)
    assert "the configuration given as a mapping" in str(error)


@each_backend
async def test_a_port_that_is_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        error = await failing_start(port=port)
    assert f"0.0.0.0:{port}" in str(error)
    assert "Address already in use" in str(error)


# -- workers ---------------------------------------------------------------------------


@each_backend
async def test_a_worker_command_that_does_not_exist() -> None:
    error = await failing_start(config_path=worker_config("/no/such/worker"))
    assert "Failed to spawn gRPC worker: /no/such/worker" in str(error)


async def test_a_worker_that_dies_with_a_traceback(tmp_path: Path) -> None:
    """The server would wait 30 s for it."""
    (tmp_path / "worker.py").write_text("import there_is_no_such_module\n")
    config = worker_config("python3", str(tmp_path / "worker.py"))
    with anyio.fail_after(15):
        error = await failing_start(config_path=config)
    assert "Traceback (most recent call last)" in str(error)
    assert "No module named 'there_is_no_such_module'" in str(error)
    assert "a worker that it started failed with exit code 1" in str(error)


@each_backend
async def test_a_worker_that_is_killed_by_a_signal() -> None:
    config = worker_config("sh", "-c", "echo 'now I die' >&2; kill -SEGV $$")
    with anyio.fail_after(15):
        error = await failing_start(config_path=config)
    assert "now I die" in str(error)
    assert "exit code -11" in str(error)


@each_backend
async def test_a_worker_that_goes_to_the_background_is_no_failure() -> None:
    """A launcher that exits with 0 may have handed over to somebody we do not see."""
    config = worker_config("sh", "-c", "echo 'over to you' >&2; exit 0")
    error = await failing_start(config_path=config, startup_timeout=1.3)
    assert "over to you" in str(error)
    assert "a worker that it started has ended with exit code 0" in str(error)
    assert "1.3 s (startup_timeout)" in str(error)


@each_backend
async def test_a_relative_configuration_path_does_not_break_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given "c.json", the server would spawn workers in the directory "", and fail."""
    (tmp_path / "c.json").write_text(
        json.dumps(worker_config("sh", "-c", "echo $PWD >&2"))
    )
    monkeypatch.chdir(tmp_path)
    error = await failing_start(config_path="c.json", startup_timeout=1)
    assert "Failed to spawn" not in str(error)
    assert any(entry.message == str(tmp_path) for entry in error.recent_logs)


# -- the binary ------------------------------------------------------------------------


async def test_no_binary_at_the_given_place(tmp_path: Path) -> None:
    error = await failing_start(binary=tmp_path / "nope")
    assert isinstance(error, BinaryNotFoundError)
    assert str(tmp_path / "nope") in str(error)
    assert "STEPFLOW_SERVER_BINARY" in str(error)


@each_backend
async def test_no_binary_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPFLOW_SERVER_BINARY", str(tmp_path / "nope"))
    error = await failing_start()
    assert isinstance(error, BinaryNotFoundError)
    assert "the environment variable STEPFLOW_SERVER_BINARY" in str(error)


@each_backend
async def test_no_package_with_a_binary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binary_module, "_PACKAGE", "there_is_no_such_package")
    error = await failing_start()
    assert isinstance(error, BinaryNotFoundError)
    assert "pip install" in str(error)


@each_backend
async def test_the_environment_can_name_a_binary(
    real_binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "server"
    link.symlink_to(real_binary)
    monkeypatch.setenv("STEPFLOW_SERVER_BINARY", str(link))
    async with StepflowRuntime.start() as runtime:
        assert (await runtime.run(ECHO, 1)).output == 1


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (b"#!/bin/sh\n", 0o644, "is not executable"),
        (b"\x7fELF of another kind", 0o755, "not a program for this platform"),
        (b"#!/there/is/no/such/loader\n", 0o755, "cannot be executed"),
    ],
)
@each_backend
async def test_a_binary_that_cannot_be_executed(
    tmp_path: Path, content: bytes, mode: int, words: str
) -> None:
    path = tmp_path / "server"
    path.write_bytes(content)
    path.chmod(mode)
    error = await failing_start(binary=path)
    assert words in str(error)
    assert "STEPFLOW_SERVER_BINARY" in str(error)


@each_backend
async def test_a_directory_is_no_binary(tmp_path: Path) -> None:
    assert "is not a file" in str(await failing_start(binary=tmp_path))


# -- the deadline ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("exec sleep 100", "before it could announce its port"),
        ("while :; do printf xxxxxxxxxxxxxxxxxxxxxxxxx; done", "announce its port"),
        ('while :; do echo \'{"port": "x"}\'; done', "announce its port"),
        ("exec 1>&- 2>&-; exec sleep 100", "It printed nothing"),
        ("trap '' TERM; while :; do sleep 0.1; done", "announce its port"),
    ],
)
async def test_a_server_that_never_announces_a_port(
    fake_server: Callable[[str], Path], script: str, words: str
) -> None:
    with anyio.fail_after(5):
        error = await failing_start(binary=fake_server(script), startup_timeout=0.3)
    assert words in str(error)
    assert ": 0.3 s (startup_timeout)" in str(error)
    assert len(str(error)) < 5000


async def test_a_server_that_never_answers_health(
    fake_server: Callable[[str], Path],
) -> None:
    async def accept_and_say_nothing(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await anyio.sleep_forever()

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(anyio.abc.SocketAttribute.local_port)
    script = fake_server(f"echo '{{\"port\":{port}}}'; exec sleep 100")
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, accept_and_say_nothing)
        with anyio.fail_after(5):
            error = await failing_start(binary=script, port=port, startup_timeout=0.3)
        tasks.cancel_scope.cancel()
    assert f"before it answered a health request on port {port}" in str(error)


@each_backend
async def test_a_server_on_whose_port_nobody_listens(
    fake_server: Callable[[str], Path], free_tcp_port: int
) -> None:
    script = fake_server(f"echo '{{\"port\":{free_tcp_port}}}'; exec sleep 100")
    error = await failing_start(binary=script, port=free_tcp_port, startup_timeout=0.3)
    assert "no connection to the server" in str(error)
    assert f"[Errno {errno.ECONNREFUSED}]" in str(error)


@each_backend
async def test_a_server_on_another_port_than_it_was_told(
    fake_server: Callable[[str], Path],
) -> None:
    script = fake_server("echo '{\"port\":1}'; exec sleep 100")
    error = await failing_start(binary=script, startup_timeout=0.3)
    assert "before it could announce its port" in str(error)
    assert "port 1 was announced, and it was told to take another" in str(error)


@each_backend
async def test_a_server_that_ends_says_how(fake_server: Callable[[str], Path]) -> None:
    script = fake_server("echo out; echo err >&2; exit 7")
    error = await failing_start(binary=script)
    assert "It exited with code 7" in str(error)
    assert error.exit is not None
    assert (error.exit.code, error.exit.signal) == (7, None)
    assert [(e.stream, e.message) for e in error.recent_logs] == [
        ("stdout", "out"),
        ("stderr", "err"),
    ] or [(e.stream, e.message) for e in error.recent_logs] == [
        ("stderr", "err"),
        ("stdout", "out"),
    ]


@each_backend
async def test_a_server_that_is_killed_says_by_what(
    fake_server: Callable[[str], Path],
) -> None:
    error = await failing_start(binary=fake_server("kill -SEGV $$"))
    assert "It was killed by SIGSEGV" in str(error)


@each_backend
async def test_a_first_start_that_fails_is_not_repeated(
    fake_server: Callable[[str], Path], tmp_path: Path
) -> None:
    script = fake_server(f"echo once >> {tmp_path}/starts; exit 1")
    await failing_start(
        binary=script, restart_policy=RestartPolicy.ALWAYS, max_restarts=5
    )
    assert (tmp_path / "starts").read_text() == "once\n"


# -- values that cannot work -----------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"port": 70000}, ValueError, "port must be from 0 to 65535"),
        ({"port": -1}, ValueError, "port"),
        ({"port": "80"}, TypeError, "port"),
        ({"port": True}, TypeError, "port"),
        ({"startup_timeout": -1}, ValueError, "startup_timeout"),
        ({"startup_timeout": 0}, ValueError, "startup_timeout"),
        ({"startup_timeout": float("nan")}, ValueError, "startup_timeout"),
        ({"startup_timeout": 10**400}, ValueError, "startup_timeout"),
        ({"startup_timeout": "30"}, TypeError, "startup_timeout"),
        ({"shutdown_timeout": -1}, ValueError, "shutdown_timeout"),
        ({"health_interval": 0}, ValueError, "health_interval"),
        ({"health_timeout": 0}, ValueError, "health_timeout"),
        ({"max_health_failures": 0}, ValueError, "max_health_failures"),
        ({"max_restarts": -1}, ValueError, "max_restarts"),
        ({"max_restarts": 1.5}, TypeError, "max_restarts"),
        ({"restart_policy": "never"}, TypeError, "restart_policy"),
        ({"log_config": "info"}, TypeError, "log_config"),
        ({"config_path": 5}, TypeError, "config_path"),
        ({"config_path": {"a": object()}}, ValueError, "config_path"),
        ({"config_path": {"a": float("inf")}}, ValueError, "config_path"),
        ({"config_path": {"a": "x" * 2**20}}, ValueError, "config_path"),
        ({"env": [("A", "b")]}, TypeError, "env"),
        ({"env": {"A": 1}}, TypeError, "env"),
        ({"env": {"A=B": "secret"}}, ValueError, "env"),
        ({"env": {"A": "nul\0"}}, ValueError, "env"),
        ({"inherit_env": "yes"}, TypeError, "inherit_env"),
        ({"on_crash": 5}, TypeError, "on_crash"),
        ({"binary": 5}, TypeError, "binary"),
    ],
)
@each_backend
async def test_a_value_that_cannot_work_is_refused_by_name(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        StepflowRuntime.start(**options)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("level", "loud"),
        ("level", None),
        ("format", "yaml"),
        ("capture", 1),
        ("python_logger", 5),
        ("file_path", 5),
        ("file_path", ""),
        ("file_path", "a\0b"),
        ("otlp_endpoint", 4317),
        ("otlp_endpoint", "localhost:4317"),
        ("otlp_endpoint", "http://localhost"),
        ("otlp_endpoint", "http://:4317"),
        ("otlp_endpoint", "http://[::1:4317"),
        ("otlp_endpoint", "http://h\u00f6st:4317"),
        ("otlp_endpoint", "https://collector:4317"),
        ("otlp_endpoint", "http://user:secret@collector:4317"),
        ("otlp_traces", True),
        ("otlp_metrics", True),
        ("otlp_traces", 1),
        ("keep", 0),
        ("keep", True),
        ("keep", 1.5),
        ("redact", "x"),
    ],
)
def test_so_is_one_of_the_log_config(field: str, value: Any) -> None:
    with pytest.raises(
        (ValueError, TypeError), match=rf"log_config\.{field}"
    ) as caught:
        LogConfig(**{field: value})
    assert "secret" not in str(caught.value)


@each_backend
async def test_a_start_that_a_log_handler_holds_up_says_so(
    fake_server: Callable[[str], Path],
) -> None:
    free = threading.Event()

    def redact(entry: LogEntry) -> LogEntry:
        free.wait(60)
        return entry

    try:
        error = await failing_start(
            binary=fake_server("echo first; sleep 0.5; echo '{\"port\":1}'; sleep 100"),
            startup_timeout=1,
            log_config=LogConfig(redact=redact),
        )
    finally:
        free.set()
    assert "waits for a log handler, log_config.redact or a file" in str(error)


def test_redaction_needs_entries() -> None:
    with pytest.raises(ValueError, match=r"log_config\.redact needs capture=True"):
        LogConfig(redact=lambda entry: entry, capture=False)

    with pytest.raises(ValueError, match=r"log_config\.redact cannot reach"):
        LogConfig(redact=lambda entry: entry, otlp_endpoint="http://localhost:4317")


def test_a_log_config_can_be_shown_and_compared() -> None:
    assert LogConfig() == LogConfig(level="info")
    assert "redact" not in repr(LogConfig(redact=lambda entry: entry))


# -- what must have no effect ----------------------------------------------------------

STRAY = {
    "STEPFLOW_CONFIG": "/there/is/no/such/file",
    "STEPFLOW_PORT": "1",
    "STEPFLOW_LOG_DESTINATION": "file",
    "STEPFLOW_LOG_FILE": "/there/is/no/such/dir/log",
    "STEPFLOW_LOG_LEVEL": "nonsense",
    "STEPFLOW_LOG_FORMAT": "nonsense",
    "STEPFLOW_ORCHESTRATOR_URL": "http://127.0.0.1:9",
    "STEPFLOW_ORCHESTRATOR_ID": "stray",
    "STEPFLOW_TRACE_ENABLED": "true",
    "STEPFLOW_METRICS_ENABLED": "nonsense",
    "STEPFLOW_TASKS_URL": "127.0.0.1:9",
    "STEPFLOW_QUEUE_NAME": "stray",
    "STEPFLOW_TRANSPORT": "nats",
}
PROXIES = {
    name: "http://127.0.0.1:9"
    for lower in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
    for name in (lower, lower.upper())
}


async def test_stray_variables_and_proxies_have_no_effect(
    monkeypatch: pytest.MonkeyPatch, worker_env: dict[str, str]
) -> None:
    """On the server, nor on a worker: gRPC would send calls to 127.0.0.1 to a proxy."""
    for name, value in {**STRAY, **PROXIES}.items():
        monkeypatch.setenv(name, value)
    async with StepflowRuntime.start(
        EXAMPLES / "python_worker" / "stepflow-config.yml", env=worker_env
    ) as runtime:
        assert runtime.port != 1
        result = await runtime.run(
            EXAMPLES / "python_worker" / "shout.yaml", {"text": "hello"}
        )
        assert result.unwrap() == "HELLO!"


@each_backend
async def test_variables_given_for_the_server_do_have_an_effect(
    free_tcp_port: int, tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps({"plugins": {"b": BUILTIN}, "routes": {"/": [{"plugin": "b"}]}})
    )
    env = {
        "STEPFLOW_PORT": str(free_tcp_port),
        "STEPFLOW_CONFIG": str(config),
        "STEPFLOW_LOG_LEVEL": "trace",
    }
    async with StepflowRuntime.start(env=env) as runtime:
        assert runtime.port == free_tcp_port
        assert (await runtime.run(ECHO, 1)).is_success
        await wait_until(
            lambda: "TRACE" in {entry.level for entry in runtime.get_recent_logs(1000)}
        )
    error = await failing_start(env={"STEPFLOW_CONFIG": "/nope.yml"})
    assert "Failed to read config file: /nope.yml" in str(error)
    assert "named by STEPFLOW_CONFIG in env=" in str(error)


@each_backend
async def test_standard_error_without_a_descriptor_has_no_effect(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Sink:
        def write(self, text: str) -> int:
            return len(text)

    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr("sys." + name, Sink())
    async with StepflowRuntime.start() as runtime:
        assert (await runtime.run(ECHO, 1)).output == 1
    await failing_start(config_path="/nope")


@each_backend
async def test_without_inheritance_only_the_given_variables_are_there(
    fake_server: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOMETHING", "inherited")
    script = fake_server('echo "[$SOMETHING][$GIVEN]"; exit 1')
    for inherit, expected in ((True, "[inherited][x]"), (False, "[][x]")):
        error = await failing_start(
            binary=script, inherit_env=inherit, env={"GIVEN": "x"}
        )
        assert expected in {entry.message for entry in error.recent_logs}
