"""What is decided without I/O: restarts, reports in words, commands, wire shapes."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepflow_runtime import FlowError, FlowStatus, LogConfig, RestartPolicy, wire
from stepflow_runtime.logs.entry import LogEntry, decode
from stepflow_runtime.server.diagnosis import (
    Failures,
    causes,
    last_words,
    without_ansi,
)
from stepflow_runtime.server.lease import is_lost
from stepflow_runtime.server.options import DEFAULT_CONFIG, ServerOptions
from stepflow_runtime.server.process import ServerExit
from stepflow_runtime.server.restart import MAX_BACKOFF, GiveUp, Restart, decide

# -- leases ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("looks", "lost"),
    [
        ([None, 0], False),  # it may be just being made
        ([None, 0, 0], True),
        ([7, 0, 0], True),
        ([6, 7, 8], False),
        ([7, 7], False),  # two looks between two renewals
        ([6, 7, 7, 8], False),
        ([7, 7, 7], True),
        ([8, 1, 1], False),  # a fresh server's
        ([7, 7, None], False),  # without an etcd it cannot be renewed
        ([7, 7, None, 7], False),
        ([None, None, None], False),
    ],
)
def test_a_lease_is_lost_when_it_is_missing_or_not_renewed(
    looks: list[int | None], lost: bool
) -> None:
    assert is_lost(looks) is lost


# -- restarts --------------------------------------------------------------------------


@given(
    policy=st.sampled_from(RestartPolicy),
    exit_code=st.integers(-64, 255),
    restarts=st.integers(0, 10_000),
    max_restarts=st.integers(0, 10_000),
    chance=st.floats(0, 1),
)
def test_what_follows_a_crash(
    policy: RestartPolicy,
    exit_code: int,
    restarts: int,
    max_restarts: int,
    chance: float,
) -> None:
    decision = decide(
        policy,
        exit_code=exit_code,
        restarts=restarts,
        max_restarts=max_restarts,
        chance=chance,
    )
    wanted = policy is RestartPolicy.ALWAYS or (
        policy is RestartPolicy.ON_FAILURE and exit_code != 0
    )
    if wanted and restarts < max_restarts:
        assert isinstance(decision, Restart)
        assert 0 <= decision.delay <= MAX_BACKOFF
        assert decision.delay == 0 or restarts > 0
    else:
        assert isinstance(decision, GiveUp)
        assert decision.reason


def test_the_backoff_doubles_up_to_its_limit() -> None:
    delays = []
    for restarts in range(9):
        decision = decide(
            RestartPolicy.ALWAYS,
            exit_code=1,
            restarts=restarts,
            max_restarts=9,
            chance=1.0,
        )
        assert isinstance(decision, Restart)
        delays.append(decision.delay)
    assert delays == [0, 0.25, 0.5, 1, 2, 4, 5, 5, 5]


@pytest.mark.parametrize(
    ("exit", "words", "signal"),
    [
        (ServerExit(code=3, pid=1), "exited with code 3", None),
        (ServerExit(code=-9, pid=1), "was killed by SIGKILL", "SIGKILL"),
        (ServerExit(code=-63, pid=1), "was killed by signal 63", "signal 63"),
        (ServerExit(code=-9, pid=1, was_hung=True), "answered no health", "SIGKILL"),
    ],
)
def test_an_exit_in_words(exit: ServerExit, words: str, signal: str | None) -> None:
    assert words in str(exit)
    assert exit.signal == signal


# -- reports ---------------------------------------------------------------------------

REPORT = (
    "Server error: \x1b[1mFailed to create executor\x1b[22m\n"
    "├╴at \x1b[3mcrates/stepflow-server/src/bin/main.rs:145:10\x1b[23m\n"
    "├╴Failed to create service from configuration\n"
    "│\n"
    "├─▶ \x1b[1mConfiguration error\x1b[22m\n"
    "│   ├╴at \x1b[3mcrates/stepflow-server/src/environment.rs:263:18\x1b[23m\n"
    "│   ╰╴Failed to instantiate plugin for 'py'\n"
    "│\n"
    "╰─▶ \x1b[1merror initializing plugin\x1b[22m\n"
    "    ├╴at \x1b[3mcrates/stepflow-grpc/src/grpc_plugin_config.rs:57:13\x1b[23m\n"
    "    ├╴backtrace (1)\n"
    "    ╰╴queueName is required for gRPC plugins\n"
    "\n"
    "━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━\n"
    "\n"
    "backtrace no. 1\n"
    "   0: error_stack::report::Report<C>::from_frame\n"
)


def test_a_report_is_reduced_to_its_chain_of_causes() -> None:
    assert causes(REPORT) == [
        "Failed to create executor",
        "Failed to create service from configuration",
        "Configuration error",
        "Failed to instantiate plugin for 'py'",
        "error initializing plugin",
        "queueName is required for gRPC plugins",
    ]


@given(st.text())
def test_any_text_goes_through_the_reduction(text: str) -> None:
    assert all(line.strip() for line in causes(text))
    shown = without_ansi(f"\x1b[1m{text}\x1b\x1b[0m[2J\x9b2J")
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", shown)


def test_the_last_words_are_the_error_and_the_workers_stderr() -> None:
    fatal = {
        "timestamp": "2026-11-23T02:27:44+00:00",
        "level": "ERROR",
        "message": REPORT,
    }
    entries = [
        decode(b"chatter", "stdout"),
        decode(b"\x1b[31mTraceback\x1b[0m", "stderr"),
        decode(json.dumps(fatal).encode(), "stdout"),
    ]
    words = last_words(entries)
    assert "  queueName is required" in words
    assert "  Traceback" in words
    assert "chatter" not in words
    assert "\x1b" not in words
    assert "chatter" in last_words(entries[:1])
    assert last_words([]) == "It printed nothing."


def test_endless_lines_do_not_make_an_endless_message() -> None:
    entries = [decode(b"\x1b[31m" + b"x" * 1_000_000, "stderr")] * 100
    words = last_words(entries)
    assert len(words) < 60 * 520
    assert "\x1b" not in words


def test_all_lines_of_the_last_traceback_are_among_the_last_words() -> None:
    traceback = (
        b"Traceback (most recent call last):\n  File x\n\x1b[31mKeyError\x1b[0m: 5"
    )
    words = last_words([decode(b"\rstarting\r", "stderr"), decode(traceback, "stderr")])
    assert words == (
        "standard error (server and workers):\n"
        "  \n  starting\n"
        "  Traceback (most recent call last):\n    File x\n  KeyError: 5"
    )


def test_of_many_lines_the_last_ones_are() -> None:
    def told(*entries: bytes) -> list[str]:
        words = last_words([decode(each, "stderr") for each in entries])
        return words.splitlines()[1:]

    def numbered(*numbers: int) -> bytes:
        return b"\n".join(b"%d" % number for number in numbers)

    last_60 = [f"  {number}" for number in range(40, 100)]
    assert told(numbered(*range(100))) == last_60
    assert told(numbered(*range(50)), numbered(*range(50, 100))) == last_60
    assert told(*(numbered(number) for number in range(100))) == last_60


# -- what was logged of a failure ------------------------------------------------------

FRAMES = "Traceback (most recent call last):\n  File x, line 5\n"
BOXED = "  + Exception Group Traceback (most recent call last):\n  | File x\n  +----\n"


def printed(message: str, frames: str = FRAMES, *, name: str = "shout") -> LogEntry:
    """What a worker prints of a component that raised."""
    ended = message if message.endswith("\n") else f"{message}\n"
    text = f"Component {name} failed: {ended}{frames}ValueError: {message}"
    return decode(text.encode(), "stderr")


def logs_of(message: str, *entries: LogEntry, **details: Any) -> list[LogEntry]:
    error = FlowError(
        code="COMPONENT_FAILED", message=message, component="/python/shout"
    )
    failures = Failures(entries, "r", details.get("since"))
    return list(failures.of(msgspec.structs.replace(error, **details.get("error", {}))))


@pytest.mark.parametrize("frames", [FRAMES, BOXED])
@pytest.mark.parametrize(
    "message",
    [
        "no",
        "two\nlines",
        "\n\nlate",
        "ends\n",
        " spaces \n too",
        "\u2028\x85\r",
        FRAMES,
    ],
)
def test_a_traceback_is_known_by_the_words_of_its_error(
    message: str, frames: str
) -> None:
    of_it = printed(message, frames)
    others = [printed(f"{message} more"), printed(f"{message}\nmore"), printed("other")]
    assert logs_of(message, *others, of_it, *others) == [of_it]


@pytest.mark.parametrize("message", ["", wire.NO_REASON])
def test_an_error_without_words_has_a_traceback_too(message: str) -> None:
    of_it = printed("")
    assert logs_of(message, printed("no"), of_it) == [of_it]


def test_of_tracebacks_that_are_alike_the_newest_is_taken() -> None:
    first, second = printed("no"), printed("no")
    (found,) = logs_of("no", first, second)
    assert found is second
    assert logs_of("no", first, printed("no", BOXED)) == []


def test_a_traceback_is_of_the_errors_component_and_time() -> None:
    earlier, now, later = printed("no"), datetime.now(UTC), printed("no")
    assert logs_of("no", printed("no", name="whisper"), later) == [later]
    assert logs_of("no", printed("no", name="whisper")) == []
    assert logs_of("no", earlier, since=now) == []
    assert logs_of("no", earlier, later, since=now) == [later]
    anywhere = printed("no", name="whisper")
    assert logs_of("no", anywhere, error={"component": None}) == [anywhere]


def test_a_traceback_may_begin_with_a_cause_that_was_never_raised() -> None:
    link = "The above exception was the direct cause of the following exception:"
    of_it = printed("no\nnever", f"KeyError: 5\n\n{link}\n\n{FRAMES}")
    assert logs_of("no\nnever", of_it) == [of_it]
    assert logs_of("no", of_it) == []


def test_a_report_that_a_pause_has_cut_is_put_together() -> None:
    announced = decode(b"Component shout failed: no\nnever", "stderr")
    rest = decode(FRAMES.encode(), "stderr")
    stranger = decode(b"a print", "stderr")
    assert logs_of("no\nnever", announced, rest, stranger) == [announced, rest]
    assert logs_of("no\nnever", announced, stranger, rest) == []
    assert logs_of("no\nnever", stranger, announced) == []


def test_what_the_server_says_of_the_run_is_there_in_plain_words() -> None:
    def said(**fields: Any) -> LogEntry:
        line = {"timestamp": "2026-11-23T02:27:44Z", "level": "WARN", **fields}
        return decode(json.dumps(line).encode(), "stdout")

    told = said(message=REPORT, diags={"run_id": "r"})
    others = [
        said(message="of another run", diags={"run_id": "s"}),
        said(message="no trouble", level="INFO", diags={"run_id": "r"}),
        said(message="of another step", diags={"run_id": "r", "step_id": "b"}),
    ]
    logs = logs_of("no", told, *others, printed("no"), error={"step_id": "a"})
    assert [entry.stream for entry in logs] == ["stdout", "stderr"]
    assert logs[0].message == "\n".join(causes(REPORT))
    assert not Failures([told, *others], "r", None).is_all
    last = said(message="Items execution completed: r", level="INFO")
    assert Failures([told, last], "r", None).is_all


# -- commands --------------------------------------------------------------------------


def command(options: ServerOptions, **inherited: str) -> Any:
    return options.command(inherited, port=0, orchestrator_id="me")


def test_the_default_command() -> None:
    made = command(ServerOptions(log_config=LogConfig(level="warn")))
    assert made.argv == (
        *("--port", "0", "--orchestrator-id", "me", "--log-level", "warn"),
        *("--log-destination", "stdout", "--log-format", "json", "--config-stdin"),
    )
    assert json.loads(made.stdin) == DEFAULT_CONFIG


def test_a_configuration_path_is_made_absolute_when_it_is_anchored() -> None:
    options = ServerOptions(config_path="c.yml").anchored()
    made = command(options)
    assert made.argv[-2:] == ("--config", str(Path.cwd() / "c.yml"))
    assert made.stdin is None


def test_an_option_has_the_say_over_a_variable_in_env() -> None:
    env = {"STEPFLOW_PORT": "1", "STEPFLOW_CONFIG": "x", "STEPFLOW_LOG_LEVEL": "error"}
    free = command(ServerOptions(env=env))
    assert not {"--port", "--config-stdin", "--log-level"} & set(free.argv)
    assert free.stdin is None
    bound = command(ServerOptions(env=env, port=5, config_path={}))
    assert {"--port", "--config-stdin"} <= set(bound.argv)
    assert bound.stdin == b"{}"


@pytest.mark.parametrize(
    ("config", "format"),
    [
        (LogConfig(format="text"), "json"),  # entries are made of it
        (LogConfig(format="text", capture=False), "text"),
        (LogConfig(format="json", capture=False), "json"),
    ],
)
def test_lines_that_are_not_captured_are_printed_in_their_format(
    config: LogConfig, format: str
) -> None:
    argv = command(ServerOptions(log_config=config)).argv
    assert argv[argv.index("--log-format") + 1] == format


COLLECTOR = "http://collector:4317"


def log_words(env: dict[str, str] | None = None, **fields: Any) -> set[str]:
    """The arguments that a LogConfig makes beyond those that are always there."""
    config = LogConfig(**fields)
    usual = command(ServerOptions(log_config=LogConfig(level=config.level)))
    made = command(ServerOptions(log_config=config, env=env or {}))
    return set(made.argv) - set(usual.argv)


def test_logs_and_on_request_traces_and_metrics_go_to_a_collector() -> None:
    logs = {"otlp", "--otlp-endpoint", COLLECTOR}
    assert log_words(otlp_endpoint=COLLECTOR) == logs
    traced = log_words(otlp_endpoint=COLLECTOR, otlp_traces=True)
    assert traced == logs | {"--trace-enabled"}
    measured = log_words(otlp_endpoint=COLLECTOR, otlp_metrics=True)
    assert measured == logs | {"--metrics-enabled"}


@pytest.mark.parametrize("level", ["trace", "debug"])
def test_what_sends_the_logs_does_not_log_at_the_lowest_levels(level: str) -> None:
    assert log_words(level=level) == set()
    quiet = {"--other-log-level", "info"}
    assert quiet <= log_words(level=level, otlp_endpoint=COLLECTOR)
    env = {"STEPFLOW_OTHER_LOG_LEVEL": "debug"}
    assert not quiet & log_words(env, level=level, otlp_endpoint=COLLECTOR)


def test_a_variable_in_env_has_no_say_over_the_options_of_a_log_config() -> None:
    env = {
        "STEPFLOW_OTLP_ENDPOINT": "http://elsewhere:4317",
        "STEPFLOW_TRACE_ENABLED": "false",
        "STEPFLOW_METRICS_ENABLED": "false",
        "STEPFLOW_LOG_LEVEL": "error",
        "STEPFLOW_LOG_FORMAT": "json",
    }
    fields = {"otlp_endpoint": COLLECTOR, "otlp_traces": True, "otlp_metrics": True}
    words = {COLLECTOR, "--trace-enabled", "--metrics-enabled"}
    assert words <= log_words(env, **fields)
    config = LogConfig(level="warn", capture=False, format="text")
    assert {"warn", "text"} <= set(
        command(ServerOptions(log_config=config, env=env)).argv
    )


def test_a_variable_in_env_keeps_the_logs_from_a_collector() -> None:
    env = {"STEPFLOW_LOG_DESTINATION": "stdout"}
    words = log_words(env, otlp_endpoint=COLLECTOR, otlp_traces=True)
    assert words == {"--otlp-endpoint", COLLECTOR, "--trace-enabled"}


def test_what_is_inherited() -> None:
    inherited = {"PATH": "/bin", "STEPFLOW_PORT": "1", "stepflow_x": "2"}
    assert command(ServerOptions(), **inherited).env == {"PATH": "/bin"}
    made = command(ServerOptions(env={"STEPFLOW_X": "3"}), **inherited)
    assert made.env == {"PATH": "/bin", "STEPFLOW_X": "3"}


def test_what_is_handed_down_where_nothing_is_inherited() -> None:
    needed = {"PATH": "/bin", "HOME": "/h", "LANG": "C", "TMPDIR": "/t", "TZ": "UTC"}
    inherited = {**needed, "TOKEN": "1", "HTTP_PROXY": "http://p", "STEPFLOW_X": "2"}
    options = ServerOptions(inherit_env=False, env={"X": "3", "TZ": None})
    assert command(options, **inherited).env == {
        **{name: value for name, value in needed.items() if name != "TZ"},
        "X": "3",
    }


def test_none_unsets_a_variable_and_sets_no_flag() -> None:
    env = {"TOKEN": None, "NOBODYS": None, "STEPFLOW_LOG_LEVEL": None, "KEPT": ""}
    made = command(ServerOptions(env=env), TOKEN="1", PATH="/bin", KEPT="x")
    assert made.env == {"PATH": "/bin", "KEPT": ""}
    assert "--log-level" in made.argv


def test_windows_takes_no_notice_of_the_case_of_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inherited = {"PATH": "old", "SYSTEMROOT": "r", "SECRET": "s"}
    options = ServerOptions(env={"Path": "new", "secret": None})
    monkeypatch.setattr("stepflow_runtime.server.options.os.name", "nt")
    assert command(options, **inherited).env == {"Path": "new", "SYSTEMROOT": "r"}
    options = ServerOptions(inherit_env=False)
    assert command(options, SystemRoot="r", Other="o").env == {"SystemRoot": "r"}


def test_proxies_are_kept_from_the_loopback() -> None:
    env = command(ServerOptions(), HTTP_PROXY="http://p", no_proxy="example.org").env
    assert env["no_proxy"] == "example.org,127.0.0.1,localhost,::1"
    assert env["NO_PROXY"] == env["no_proxy"]
    given = command(ServerOptions(env={"no_proxy": "mine"}), http_proxy="http://p").env
    assert given["no_proxy"] == "mine"


def test_secrets_are_not_in_a_repr() -> None:
    options = ServerOptions(env={"TOKEN": "hush"}, config_path={"password": "hush"})
    assert "hush" not in repr(command(options, SECRET="hush"))
    assert "hush" not in repr(options)


# -- the wire --------------------------------------------------------------------------

JSON_NUMBERS = st.integers(-(2**53), 2**53) | st.floats(
    allow_nan=False, allow_infinity=False
)


@given(JSON_NUMBERS)
def test_numbers_come_back_whole_where_they_are(number: float) -> None:
    """The server sends every number with a fraction or an exponent."""
    sent = json.dumps(float(number))
    body = f'{{"summary":{{"runId":"r"}},"results":[{{"output":{sent}}}]}}'.encode()
    output = wire.decode_run(body).results[0].output
    assert output == number
    if isinstance(number, int):
        assert type(output) is int
    assert str(float(output)) == str(float(number))  # the negative zero stays


@given(st.integers(0, 20), st.integers(0, 20), st.none() | st.text())
def test_every_status_and_code_has_a_meaning(
    status: int, code: int, message: str | None
) -> None:
    item = {"status": status, "errorCode": code, "errorMessage": message, "output": 1}
    answer = wire.decode_run(
        msgspec.json.encode(
            {"summary": {"runId": "r", "status": status, "new": 1}, "results": [item]}
        )
    )
    result = wire.flow_result(answer.summary, answer.results[0])
    assert result.is_success == (status == 2)
    if result.is_failed:
        assert result.error is not None and result.error.code and result.error.message


def test_a_cancelled_run_is_a_failed_result() -> None:
    body = b'{"summary":{"runId":"r","status":4},"results":[{"status":1}]}'
    answer = wire.decode_run(body)
    result = wire.flow_result(answer.summary, answer.results[0])
    assert result.status is FlowStatus.FAILED
    assert result.error is not None and result.error.code == "CANCELLED"


def test_the_request_of_a_run() -> None:
    body = wire.run_request(
        "f",
        [1],
        overrides={"a": {"input": 2}},
        variables={"v": 3},
        max_concurrent=4,
        wait=5,
    )
    assert json.loads(body) == {
        "flowId": "f",
        "input": [1],
        "wait": True,
        "timeoutSecs": 5,
        "maxConcurrency": 4,
        "overrides": {"steps": {"a": {"value": {"input": 2}}}},
        "variables": {"v": 3},
    }


def test_an_error_without_json_is_an_error_too() -> None:
    assert wire.fault_of(b"Failed to deserialize").message == "Failed to deserialize"
    assert wire.fault_of(b"").message == ""
    assert wire.fault_of(b'{"error":{"message":"m","status":"S"}}').status == "S"
