"""Lines that belong together are one log entry: tracebacks and panics."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from http.client import RemoteDisconnected
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepflow_runtime import LogEntry, StepflowRuntime
from stepflow_runtime.logs import grouping
from stepflow_runtime.logs.grouping import PATIENCE, Grouper

from .conftest import ECHO, each_backend, wait_until

# -- what really arrives ---------------------------------------------------------------

# Printed by stepflow-py 0.13.0 under Python 3.11, where nothing else is said.
HANDLER = """\
  File "/v/stepflow_py/worker/task_handler.py", line 323, in handle_task
    output = await execute_component(
             ^^^^^^^^^^^^^^^^^^^^^^^^
  File "/v/stepflow_py/worker/task_handler.py", line 512, in execute_component
    output = component.function(*args, **path_params)
             ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
"""

FAILURES = {
    "an exception": """\
Component fail failed: there is nothing to shout
Traceback (most recent call last):
<HANDLER>
  File "/w/worker.py", line 21, in fail
    if how == "plain": raise ValueError("there is nothing to shout")
                       ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
ValueError: there is nothing to shout
""",
    "a cause": """\
Component fail failed: outer
Traceback (most recent call last):
  File "/w/worker.py", line 23, in fail
    try: {}["inner"]
         ~~^^^^^^^^^
KeyError: 'inner'

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
<HANDLER>
  File "/w/worker.py", line 24, in fail
    except KeyError as exc: raise RuntimeError("outer") from exc
                            ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
RuntimeError: outer
""",
    "a context, and messages of several lines": """\
Component fail failed: outer
most
Traceback (most recent call last):
  File "/w/worker.py", line 29, in fail
    try: raise KeyError("in\\nner")
         ^^^^^^^^^^^^^^^^^^^^^^^^^
KeyError: 'in\\nner'

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "/w/worker.py", line 31, in fail
    try: raise ValueError("middle\\nof\\n\\nit") from exc
         ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
ValueError: middle
of

it

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
<HANDLER>
  File "/w/worker.py", line 32, in fail
    except ValueError: raise RuntimeError("outer\\nmost")
                       ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
RuntimeError: outer
most
""",
    "a cause that was never raised": """\
Component fail failed: outer
ValueError: never raised

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
<HANDLER>
  File "/w/worker.py", line 78, in fail
    if how == "unraised": raise RuntimeError("outer") from ValueError("never raised")
                          ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
RuntimeError: outer
""",
    "a cause with the same words": """\
Component fail failed: same
lines
Traceback (most recent call last):
  File "/w/worker.py", line 80, in fail
    try: raise ValueError("same\\nlines")
         ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
ValueError: same
lines

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
<HANDLER>
  File "/w/worker.py", line 81, in fail
    except ValueError as exc: raise RuntimeError(str(exc)) from exc
                              ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
RuntimeError: same
lines
""",
    "a message with blank lines": """\
Component fail failed: first
second

fourth
Traceback (most recent call last):
<HANDLER>
  File "/w/worker.py", line 33, in fail
    if how == "lines": raise ValueError("first\\nsecond\\n\\nfourth")
                       ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
ValueError: first
second

fourth
""",
    "a message that looks like anything": """\
Component fail failed: a

b: c
  indented
Traceback of nothing
Traceback (most recent call last):
<HANDLER>
  File "/w/worker.py", line 36, in fail
    if how == "strange": raise Strange
                         ^^^^^^^^^^^^^
Strange: a

b: c
  indented
Traceback of nothing
""",
    "a message with a traceback in it": """\
Component fail failed: it failed:
Traceback (most recent call last):
  File "<string>", line 1, in <module>
  File "/lib/json/__init__.py", line 346, in loads
    return _default_decoder.decode(s)
           ^^^^^^^^^^^^^^^^^^^^^^^^^^
  File "/lib/json/decoder.py", line 337, in decode
    obj, end = self.raw_decode(s, idx=_w(s, 0).end())
               ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  File "/lib/json/decoder.py", line 353, in raw_decode
    obj, end = self.scan_once(s, idx)
               ^^^^^^^^^^^^^^^^^^^^^^
json.decoder.JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)
Traceback (most recent call last):
<HANDLER>
  File "/w/worker.py", line 77, in fail
    raise RuntimeError(f"it failed:\\n{done.stderr}")
RuntimeError: it failed:
Traceback (most recent call last):
  File "<string>", line 1, in <module>
  File "/lib/json/__init__.py", line 346, in loads
    return _default_decoder.decode(s)
           ^^^^^^^^^^^^^^^^^^^^^^^^^^
  File "/lib/json/decoder.py", line 337, in decode
    obj, end = self.raw_decode(s, idx=_w(s, 0).end())
               ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  File "/lib/json/decoder.py", line 353, in raw_decode
    obj, end = self.scan_once(s, idx)
               ^^^^^^^^^^^^^^^^^^^^^^
json.decoder.JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)
""",
    "no message": """\
Component fail failed:\x20
Traceback (most recent call last):
<HANDLER>
  File "/w/worker.py", line 37, in fail
    if how == "no words": raise Wordless
                          ^^^^^^^^^^^^^^
Wordless
""",
    "a message of spaces": """\
Component fail failed:   lead
  indented second
Traceback (most recent call last):
<HANDLER>
  File "/w/worker.py", line 64, in fail
    if how == "spaces": raise ValueError("  lead\\n  indented second")
                        ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
ValueError:   lead
  indented second
""",
    "a group": """\
Component fail failed: many (2 sub-exceptions)
  + Exception Group Traceback (most recent call last):
  |   File "/v/stepflow_py/worker/task_handler.py", line 323, in handle_task
  |     output = await execute_component(
  |              ^^^^^^^^^^^^^^^^^^^^^^^^
  |   File "/v/stepflow_py/worker/task_handler.py", line 512, in execute_component
  |     output = component.function(*args, **path_params)
  |              ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  |   File "/w/worker.py", line 38, in fail
  |     if how == "group": raise ExceptionGroup("many", [ValueError("one"), OSError("two\\nlines")])
  |                        ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  | ExceptionGroup: many (2 sub-exceptions)
  +-+---------------- 1 ----------------
    | ValueError: one
    +---------------- 2 ----------------
    | OSError: two
    | lines
    +------------------------------------
""",
    "a group that ends with a group, and what came of it": """\
Component fail failed: after a group
  + Exception Group Traceback (most recent call last):
  |   File "/w/worker.py", line 44, in fail
  |     raise ExceptionGroup("inner", [mk(ValueError("one")), ExceptionGroup("deep", [mk(KeyError("k"))])])
  | ExceptionGroup: inner (2 sub-exceptions)
  +-+---------------- 1 ----------------
    | Traceback (most recent call last):
    |   File "/w/worker.py", line 41, in mk
    |     try: raise e
    |          ^^^^^^^
    | ValueError: one
    +---------------- 2 ----------------
    | ExceptionGroup: deep (1 sub-exception)
    +-+---------------- 1 ----------------
      | Traceback (most recent call last):
      |   File "/w/worker.py", line 41, in mk
      |     try: raise e
      |          ^^^^^^^
      | KeyError: 'k'
      +------------------------------------

During handling of the above exception, another exception occurred:

  + Exception Group Traceback (most recent call last):
  |   File "/w/worker.py", line 46, in fail
  |     try: raise ExceptionGroup("many\\nlines", [g, mk(note(TypeError("t"), "note of t"))])
  |          ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  | ExceptionGroup: many
  | lines (2 sub-exceptions)
  +-+---------------- 1 ----------------
    | Exception Group Traceback (most recent call last):
    |   File "/w/worker.py", line 44, in fail
    |     raise ExceptionGroup("inner", [mk(ValueError("one")), ExceptionGroup("deep", [mk(KeyError("k"))])])
    | ExceptionGroup: inner (2 sub-exceptions)
    +-+---------------- 1 ----------------
      | Traceback (most recent call last):
      |   File "/w/worker.py", line 41, in mk
      |     try: raise e
      |          ^^^^^^^
      | ValueError: one
      +---------------- 2 ----------------
      | ExceptionGroup: deep (1 sub-exception)
      +-+---------------- 1 ----------------
        | Traceback (most recent call last):
        |   File "/w/worker.py", line 41, in mk
        |     try: raise e
        |          ^^^^^^^
        | KeyError: 'k'
        +------------------------------------
    +---------------- 2 ----------------
    | Traceback (most recent call last):
    |   File "/w/worker.py", line 41, in mk
    |     try: raise e
    |          ^^^^^^^
    | TypeError: t
    | note of t
    +------------------------------------

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
<HANDLER>
  File "/w/worker.py", line 47, in fail
    except ExceptionGroup as g: raise RuntimeError("after a group") from g
                                ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
RuntimeError: after a group
""",
    "a group in the context of an exception": """\
Component fail failed: many (1 sub-exception)
Traceback (most recent call last):
  File "/w/worker.py", line 49, in fail
    try: raise ValueError("first")
         ^^^^^^^^^^^^^^^^^^^^^^^^^
ValueError: first

During handling of the above exception, another exception occurred:

  + Exception Group Traceback (most recent call last):
  |   File "/v/stepflow_py/worker/task_handler.py", line 323, in handle_task
  |     output = await execute_component(
  |              ^^^^^^^^^^^^^^^^^^^^^^^^
  |   File "/v/stepflow_py/worker/task_handler.py", line 512, in execute_component
  |     output = component.function(*args, **path_params)
  |              ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  |   File "/w/worker.py", line 50, in fail
  |     except ValueError: raise ExceptionGroup("many", [ValueError("one")])
  |                        ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  | ExceptionGroup: many (1 sub-exception)
  +-+---------------- 1 ----------------
    | ValueError: one
    +------------------------------------
""",
    "a syntax error": """\
Component fail failed: '(' was never closed (<code>, line 1)
Traceback (most recent call last):
<HANDLER>
  File "/w/worker.py", line 51, in fail
    if how == "syntax": compile("a = (\\nb = 5 +* 3\\n", "<code>", "exec")
                        ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  File "<code>", line 1
    a = (
        ^
SyntaxError: '(' was never closed
""",
    "a recursion": """\
Component fail failed: maximum recursion depth exceeded
Traceback (most recent call last):
<HANDLER>
  File "/w/worker.py", line 57, in fail
    f(0)
  File "/w/worker.py", line 56, in f
    def f(n): return f(n+1)
                     ^^^^^^
  File "/w/worker.py", line 56, in f
    def f(n): return f(n+1)
                     ^^^^^^
  File "/w/worker.py", line 56, in f
    def f(n): return f(n+1)
                     ^^^^^^
  [Previous line repeated 985 more times]
RecursionError: maximum recursion depth exceeded
""",
    "a blank line in a call, as Python 3.13 shows it": """\
Component fail failed: 'str' object cannot be interpreted as an integer
Traceback (most recent call last):
  File "/v/stepflow_py/worker/task_handler.py", line 323, in handle_task
    output = await execute_component(
             ^^^^^^^^^^^^^^^^^^^^^^^^
    ...<6 lines>...
    )
    ^
  File "/v/stepflow_py/worker/task_handler.py", line 512, in execute_component
    output = component.function(*args, **path_params)
  File "/w/worker.py", line 92, in fail
    int(
    ~~~^
        "a",
        ^^^^
   \x20
   \x20
        base="b",
        ^^^^^^^^^
    )
    ^
TypeError: 'str' object cannot be interpreted as an integer
""",
}

UNCAUGHT = {
    "in a thread": """\
Traceback (most recent call last):
  File "/lib/threading.py", line 1045, in _bootstrap_inner
    self.run()
  File "/lib/threading.py", line 982, in run
    self._target(*self._args, **self._kwargs)
  File "/w/worker.py", line 66, in <lambda>
    t = threading.Thread(target=lambda: 1/0); t.start(); t.join()
                                        ~^~
ZeroDivisionError: division by zero
""",
    "with lines below": """\
Traceback (most recent call last):
  File "<string>", line 1, in <module>
ValueError: 1 error
field
  is required
""",
    "a group, as Python 3.11 shows it": """\
  + Exception Group Traceback (most recent call last):
  |   File "<string>", line 1, in <module>
  | ExceptionGroup: g (1 sub-exception)
  +-+---------------- 1 ----------------
    | ValueError: 1 error
field
    +------------------------------------
""",
    "a syntax error of the program": """\
  File "/w/syn.py", line 2
    a = (
        ^
SyntaxError: '(' was never closed
""",
}

NOTES = """\
a note
note of
two lines

"""

# Of stepflow-server 0.13.0, asked for a run with "maxConcurrency": 0.
PANIC = """\
thread 'tokio-runtime-worker' (16912) panicked at crates/stepflow-plugin/src/subflow.rs:258:20:
mpsc bounded channel requires buffer > 0
"""
HINT = """\
note: run with `RUST_BACKTRACE=1` environment variable to display a backtrace
"""
BACKTRACE = """\
stack backtrace:
   0: __rustc::rust_begin_unwind
   1: core::panicking::panic_fmt
   2: stepflow_plugin::subflow::subflow_channel
   3: stepflow_execution::executor::submit_run::{{closure}}
   4: <stepflow_grpc::services::runs_service::RunsServiceImpl as stepflow_proto::stepflow::v1::runs_service_server::RunsService>::create_run::{{closure}}
  33: tokio::runtime::task::harness::Harness<T,S>::poll
  34: tokio::runtime::blocking::pool::Inner::run
"""
OMITTED = """\
note: Some details are omitted, run with `RUST_BACKTRACE=full` for a verbose backtrace.
"""
FULL_BACKTRACE = """\
stack backtrace:
   0:     0x56398cbdeab2 - <std::sys::backtrace::BacktraceLock::print::DisplayBacktrace as core::fmt::Display>::fmt::hdadc7c28d26d7ce3
   1:     0x56398cbf25ea - core::fmt::write::h469843d235cc4241
  46:     0x7f823ea801f5 - start_thread
                               at ./nptl/pthread_create.c:442:8
  48:                0x0 - <unknown>
"""

LOG_LINES = [
    b'{"timestamp":"2026-11-23T02:27:44.413575+00:00","level":"INFO","message":"Starting"}',
    b'{"timestamp": "2026-11-23T18:31:39.622868+00:00", "level": "INFO", "message": "x"}',
]


def lines_of(text: str) -> list[bytes]:
    return text.removesuffix("\n").replace("<HANDLER>\n", HANDLER).encode().split(b"\n")


def text_of(text: str) -> bytes:
    return b"\n".join(lines_of(text))


def feed(grouper: Grouper, *texts: str) -> list[bytes]:
    lines = [line for text in texts for line in lines_of(text)]
    return [entry for line in lines for entry in grouper.feed(line)]


# -- tracebacks ------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAILURES)
def test_what_a_worker_prints_of_a_failure_is_one_entry(name: str) -> None:
    grouper = Grouper()
    assert (feed(grouper, FAILURES[name]), grouper.is_open) == ([], True)
    assert grouper.pause() == [text_of(FAILURES[name])]
    assert (grouper.pause(), grouper.flush(), grouper.is_open) == ([], [], False)


@pytest.mark.parametrize("name", set(FAILURES) - {"a cause that was never raised"})
def test_a_failure_ends_with_the_message_that_the_worker_has_announced(
    name: str,
) -> None:
    """What is printed right after it is not of it, though no pause comes between."""
    grouper = Grouper()
    assert feed(grouper, FAILURES[name], "a print") == [
        text_of(FAILURES[name]),
        b"a print",
    ]
    assert not grouper.is_open


def test_each_of_several_failures_is_an_entry() -> None:
    grouper = Grouper()
    ended = feed(grouper, *FAILURES.values())
    assert [*ended, *grouper.flush()] == [text_of(each) for each in FAILURES.values()]


def test_notes_are_entries_of_their_own() -> None:
    """Nothing tells them from what a component prints next."""
    grouper = Grouper()
    failure = FAILURES["an exception"]
    assert feed(grouper, failure, NOTES) == [text_of(failure), *lines_of(NOTES)]


def test_notes_of_a_cause_are_within() -> None:
    cause = FAILURES["a cause"].replace("'inner'\n", f"'inner'\n{NOTES}")
    grouper = Grouper()
    assert feed(grouper, cause, "a print") == [text_of(cause), b"a print"]


def test_the_newline_that_a_message_ends_with_stays_in_its_place() -> None:
    failure = FAILURES["a message that looks like anything"]
    grouper = Grouper()
    assert feed(grouper, failure, "\n", "a print") == [
        text_of(failure),
        b"",
        b"a print",
    ]


@pytest.mark.parametrize("name", UNCAUGHT)
def test_a_traceback_that_nothing_announces_ends_with_a_pause(name: str) -> None:
    grouper = Grouper()
    assert feed(grouper, UNCAUGHT[name]) == []
    assert grouper.pause() == [text_of(UNCAUGHT[name])]


@pytest.mark.parametrize("after", [FAILURES["an exception"], PANIC])
def test_or_what_follows_is_in_doubt_and_each_line_an_entry(after: str) -> None:
    traceback, rest = UNCAUGHT["with lines below"].split("field\n")
    grouper = Grouper()
    assert feed(grouper, traceback, "field\n", rest, after) == [
        text_of(traceback),
        b"field",
        *lines_of(rest),
    ]
    assert grouper.flush() == [text_of(after)]


def test_chatter_after_a_traceback_is_not_held_back_for_long() -> None:
    """A worker that prints without a pause."""
    grouper = Grouper()
    chatter = [f"print {number}" for number in range(1000)]
    traceback = UNCAUGHT["in a thread"]
    assert feed(grouper, traceback, *chatter) == [
        text_of(traceback),
        *(each.encode() for each in chatter),
    ]
    assert not grouper.is_open


@pytest.mark.parametrize("stranger", [*LOG_LINES, b"a print"])
def test_a_strangers_line_among_the_frames_cuts_the_traceback(stranger: bytes) -> None:
    lines = lines_of(FAILURES["an exception"])
    grouper = Grouper()
    ended = [
        text
        for line in [*lines[:5], stranger, *lines[5:]]
        for text in grouper.feed(line)
    ]
    assert ended == [b"\n".join(lines[:5]), stranger, *lines[5:]]


@pytest.mark.parametrize("line", LOG_LINES)
def test_a_log_line_ends_a_group(line: bytes) -> None:
    for text in (FAILURES["a group"], UNCAUGHT["in a thread"], PANIC):
        grouper = Grouper()
        assert feed(grouper, text) == []
        assert grouper.feed(line) == [text_of(text), line]


def test_an_announcement_without_a_traceback_keeps_nothing_back() -> None:
    grouper = Grouper()
    assert feed(grouper, "Component a failed: x", "a print") == []
    assert grouper.feed(LOG_LINES[0]) == [
        b"Component a failed: x",
        b"a print",
        LOG_LINES[0],
    ]


def test_an_indented_traceback() -> None:
    """As handlers print it that indent what they are given."""
    lines = [b"    " + line for line in lines_of(UNCAUGHT["in a thread"])]
    grouper = Grouper()
    assert [text for line in lines for text in grouper.feed(line)] == []
    assert grouper.feed(b"a print") == []
    assert grouper.feed(LOG_LINES[0]) == [b"\n".join(lines), b"a print", LOG_LINES[0]]


def test_lines_may_end_as_those_of_windows_do() -> None:
    lines = [line + b"\r" for line in lines_of(FAILURES["a cause"])]
    grouper = Grouper()
    assert [text for line in lines for text in grouper.feed(line)] == []
    assert grouper.feed(b"a print\r") == [b"\n".join(lines), b"a print\r"]


# -- panics ----------------------------------------------------------------------------


@pytest.mark.parametrize("end", [HINT, BACKTRACE + OMITTED])
@pytest.mark.parametrize("more", ["", "  left: 1\n right: 2\n", "some\n\n more\n"])
def test_a_panic_ends_with_its_note(more: str, end: str) -> None:
    grouper = Grouper()
    panic = PANIC + more + end
    assert feed(grouper, "\n", panic, "a print") == [b"", text_of(panic), b"a print"]


def test_a_whole_backtrace_has_no_note() -> None:
    grouper = Grouper()
    panic = PANIC + FULL_BACKTRACE
    assert feed(grouper, panic, "a print") == [text_of(panic), b"a print"]


def test_a_second_panic_has_no_note_and_ends_with_a_pause() -> None:
    grouper = Grouper()
    panic = PANIC + "several\nlines\n"
    assert feed(grouper, panic) == []
    assert grouper.pause() == [text_of(panic)]


def test_or_its_later_lines_are_in_doubt() -> None:
    grouper = Grouper()
    assert feed(grouper, PANIC, " indented", "a print", PANIC) == [
        text_of(PANIC) + b"\n indented",
        b"a print",
    ]
    assert grouper.flush() == [text_of(PANIC)]


@pytest.mark.parametrize(
    "header",
    [
        "thread 'main' panicked at src/main.rs:2:5:",
        "thread '<unnamed>' (7) panicked at src/main.rs:2:5:",
        "thread 'it's' panicked at src/main.rs:2:5:",
        "thread 'main' panicked at 'as Rust did before 1.73', src/main.rs:2:5",
    ],
)
def test_panics_of_any_thread_and_age(header: str) -> None:
    grouper = Grouper()
    panic = f"{header}\n{HINT}"
    assert feed(grouper, panic, "a print") == [text_of(panic), b"a print"]


# -- pauses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (PANIC + BACKTRACE + OMITTED, 1),
        (PANIC + BACKTRACE + OMITTED, 3),
        (PANIC + BACKTRACE + OMITTED, -1),
        (FAILURES["an exception"], 1),
        (FAILURES["an exception"], 5),
        (FAILURES["an exception"], -1),
        (FAILURES["a message with blank lines"], 3),
        (FAILURES["a message with blank lines"], -1),
        (FAILURES["a group"], -1),
        (FAILURES["a cause"], 8),
    ],
)
def test_a_pause_does_not_end_what_cannot_be_over(text: str, place: int) -> None:
    """The server takes its time for a backtrace, and a starved process for anything."""
    lines = lines_of(text)
    grouper = Grouper()
    ended = [entry for line in lines[:place] for entry in grouper.feed(line)]
    for _ in range(PATIENCE - 1):
        ended += grouper.pause()
    assert ended == []
    ended += [entry for line in lines[place:] for entry in grouper.feed(line)]
    assert [*ended, *grouper.pause()] == [b"\n".join(lines)]


def test_but_many_do() -> None:
    grouper = Grouper()
    feed(grouper, PANIC, BACKTRACE)
    ended = [text for _ in range(PATIENCE) for text in grouper.pause()]
    assert ended == [text_of(PANIC + BACKTRACE)]
    assert feed(grouper, OMITTED) == lines_of(OMITTED)


def test_lines_that_come_now_and_then_do_not_keep_a_group_open() -> None:
    """An announcement without a traceback, and a worker that prints every 0.1 s."""
    grouper = Grouper()
    ended = feed(grouper, "Component a failed: x")
    prints = 0
    while not ended:
        prints += 1
        ended = [*feed(grouper, "a print"), *grouper.pause(), *grouper.pause()]
    assert prints == PATIENCE // 2


# -- what holds for all lines ----------------------------------------------------------

KNOWN = sorted(
    {
        line
        for text in (*FAILURES.values(), *UNCAUGHT.values(), NOTES, PANIC, HINT)
        for line in lines_of(text)
    }
    | {*lines_of(BACKTRACE), *lines_of(OMITTED), *lines_of(FULL_BACKTRACE)}
    | {*LOG_LINES, b"", b" ", b"a print"}
)
LINES = st.sampled_from(KNOWN) | st.binary(max_size=20).filter(
    lambda line: b"\n" not in line
)
# Random lines, and runs of what really arrives.
RUNS = st.lists(
    LINES.map(lambda line: [line])
    | st.sampled_from([lines_of(text) for text in FAILURES.values()])
    | st.sampled_from([lines_of(PANIC + BACKTRACE + OMITTED), lines_of(PANIC)]),
    max_size=12,
).map(lambda runs: [line for run in runs for line in run])
PAUSES = st.lists(st.booleans(), max_size=40)


def texts_of(lines: list[bytes], pauses: list[bool]) -> list[list[bytes]]:
    """What comes back after each line, each pause, and the end."""
    grouper = Grouper()
    ended = []
    for place, line in enumerate(lines):
        ended.append(grouper.feed(line))
        if place < len(pauses) and pauses[place]:
            ended.append(grouper.pause())
    ended.append(grouper.flush())
    assert not grouper.is_open
    return ended


@given(RUNS, PAUSES)
def test_nothing_is_lost_and_the_order_stays(
    lines: list[bytes], pauses: list[bool]
) -> None:
    texts = [text for ended in texts_of(lines, pauses) for text in ended]
    assert b"\n".join(texts) == b"\n".join(lines)


@given(st.lists(LINES), PAUSES)
def test_nor_of_any_mix_of_lines(lines: list[bytes], pauses: list[bool]) -> None:
    texts = [text for ended in texts_of(lines, pauses) for text in ended]
    assert b"\n".join(texts) == b"\n".join(lines)


@given(RUNS, PAUSES)
def test_groups_are_bounded_whatever_comes(
    lines: list[bytes], pauses: list[bool]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping, "MOST_LINES", 4)
        patch.setattr(grouping, "MOST_BYTES", 100)
        texts = [text for ended in texts_of(lines, pauses) for text in ended]
    assert b"\n".join(texts) == b"\n".join(lines)
    for text in texts:
        assert text.count(b"\n") < 4
        assert len(text) <= 100 or text in lines


@given(st.lists(LINES))
def test_a_line_that_opens_nothing_comes_back_at_once(lines: list[bytes]) -> None:
    grouper = Grouper()
    for line in lines:
        was_open = grouper.is_open
        ended = grouper.feed(line)
        assert was_open or grouper.is_open or ended == [line]
        assert was_open or not grouper.is_open or ended == []
        # Whatever is given back here is complete, and nothing after it is withheld.
        assert not ended or not was_open or grouper.is_open or ended[-1].endswith(line)


def test_a_long_traceback_is_cut() -> None:
    frames = [b'  File "x.py", line 1, in f', b"    f()"] * grouping.MOST_LINES
    lines = [b"Traceback (most recent call last):", *frames]
    first, *others = (text for ended in texts_of(lines, []) for text in ended)
    assert first.count(b"\n") == grouping.MOST_LINES - 1
    assert others == lines[grouping.MOST_LINES :]


def test_long_lines_are_cut() -> None:
    long = b"    " + b"x" * (grouping.MOST_BYTES // 2)
    lines = [b"Traceback (most recent call last):", long, long, long]
    texts = [text for ended in texts_of(lines, []) for text in ended]
    assert texts == [b"\n".join(lines[:2]), long, long]
    alone = [PANIC.encode().strip() + b"x" * grouping.MOST_BYTES, b"a print"]
    assert [text for ended in texts_of(alone, []) for text in ended] == alone


# -- in a runtime ----------------------------------------------------------------------

# The entry point of these is runtime.get_recent_logs(), behind the pump of the real
# server's standard error.

WORKER = """
import asyncio, os, sys
from stepflow_py.worker import StepflowServer
from stepflow_py.worker.grpc_worker import run_grpc_worker

server = StepflowServer(include_builtins=False)

@server.component
def fail(how: dict) -> dict:
    how = how["how"]
    if how == "lines":
        raise ValueError("first\\nsecond\\n\\nlast")
    if how == "cause":
        try:
            raise ValueError("in\\nner")
        except ValueError as exc:
            raise RuntimeError("outer\\nmost") from exc
    if how == "same words":
        try:
            raise ValueError("same")
        except ValueError as exc:
            raise RuntimeError("same") from exc
    if how == "group":
        raise ExceptionGroup("many", [ValueError("one"), OSError("t\\nwo")])
    if how == "syntax":
        compile("a = (", "<it>", "exec")
    print("all", "is", "well", file=sys.stderr, sep="\\n")
    return {}

asyncio.run(
    run_grpc_worker(
        server=server,
        tasks_url=os.environ["STEPFLOW_TASKS_URL"],
        queue_name=os.environ["STEPFLOW_QUEUE_NAME"],
    )
)
"""
ENDS = {
    "lines": "ValueError: first\nsecond\n\nlast",
    "cause": "RuntimeError: outer\nmost",
    "same words": "RuntimeError: same",
    "group": f"    | OSError: t\n    | wo\n    +{'-' * 36}",
    "syntax": "SyntaxError: '(' was never closed",
}
FAIL = {
    "steps": [{"id": "a", "component": "/python/fail", "input": {"$input": "$"}}],
    "output": {"$step": "a"},
}


@pytest.fixture
def worker(tmp_path: Path) -> dict[str, Any]:
    """The configuration of a worker that fails in several ways."""
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
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


def printed(runtime: StepflowRuntime) -> list[LogEntry]:
    entries = runtime.get_recent_logs(10_000)
    return [entry for entry in entries if entry.stream == "stderr"]


@pytest.mark.anyio
@each_backend
async def test_a_workers_failure_is_one_entry(
    worker: dict[str, Any], worker_env: dict[str, str]
) -> None:
    async with StepflowRuntime.start(worker, env=worker_env) as runtime:
        with anyio.fail_after(30):
            errors = {}
            for how in ENDS:
                errors[how] = (await runtime.run(FAIL, {"how": how})).error
            assert (await runtime.run(FAIL, {"how": "well"})).is_success
            await wait_until(lambda: printed(runtime)[-1].message == "well")
    # The prints are not of the last failure, and not of each other.
    *failures, all_, is_, well = (entry.message for entry in printed(runtime))
    assert [all_, is_, well] == ["all", "is", "well"]
    for failure, (how, end) in zip(failures, ENDS.items(), strict=True):
        error = errors[how]
        assert error is not None
        assert failure.startswith(f"Component fail failed: {error.message}\n")
        assert "Traceback (most recent call last):\n" in failure
        assert failure.endswith(f"\n{end}")
        assert [entry.message for entry in error.logs if entry.stream == "stderr"] == [
            failure
        ]


def panic(runtime: StepflowRuntime, flow_id: str) -> None:
    """Ask for what this version of the server does not survive, but for the connection."""
    body = {"flowId": flow_id, "input": [1], "maxConcurrency": 0}
    request = urllib.request.Request(
        f"{runtime.url}/api/v1/runs",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with pytest.raises((RemoteDisconnected, urllib.error.URLError)):
        urllib.request.urlopen(request, timeout=10)


@pytest.mark.anyio
@each_backend
@pytest.mark.parametrize(
    ("backtrace", "ends"),
    [
        ("0", ["to display a backtrace", "requires buffer > 0"]),
        ("1", ["for a verbose backtrace."] * 2),
    ],
)
async def test_a_panic_of_the_server_is_one_entry(
    backtrace: str, ends: list[str]
) -> None:
    def panics() -> list[str]:
        return [e.message for e in printed(runtime) if "panicked at" in e.message]

    env = {"RUST_BACKTRACE": backtrace}
    async with StepflowRuntime.start(env=env) as runtime:
        with anyio.fail_after(60):
            flow_id = await runtime.store_flow(ECHO)
            for _ in ends:
                await anyio.to_thread.run_sync(panic, runtime, flow_id)
            await wait_until(lambda: len(panics()) == len(ends))
    for message, end in zip(panics(), ends, strict=True):
        assert message.startswith("thread 'tokio-")
        assert message.endswith(end)
    # Besides, there is the empty line that comes before each of them.
    assert {entry.message for entry in printed(runtime)} == {"", *panics()}
