"""What is tried: the same lines for both, each in a program of its own.

A trial gets one of the two subjects, and tells answers to questions; a count, what was said,
or, where the question begins with "time", seconds. ``arena`` adds what becomes of the program, and what it leaves.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import sys
import time
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import msgspec
import psutil

from .. import peers
from .processes import MARK, addresses, kinds, wait_gone
from .subjects import RunFailedError, Server, Subject, Wanted

__all__ = ["TRIALS", "Answer", "Tell", "Trial"]

Answer = float | int | str
Tell = Callable[[str, Answer], None]
Perform = Callable[[Subject, Tell], Coroutine[Any, Any, None]]


class Trial(msgspec.Struct, frozen=True):
    """One of the things that are tried.

    :ivar name: in one word or two, as the command line takes it
    :ivar section: of the page
    :ivar about: what is done
    :ivar limit: seconds after which its program is ended
    :ivar rounds: how often it is done
    :ivar tells_end: the question that the end of the program answers, if any does
    :ivar tells_left: whether it matters what the program leaves behind
    :ivar tells_later: and whether that ends by itself in the next minute
    """

    name: str
    section: str
    about: str
    perform: Perform
    limit: float = 30.0
    rounds: int = 1
    tells_end: str | None = None
    tells_left: bool = False
    tells_later: bool = False
    is_for_trio: bool = False


TRIALS: Final[dict[str, Trial]] = {}


def trial(
    name: str, section: str, about: str, **details: Any
) -> Callable[[Perform], Perform]:
    def register(perform: Perform) -> Perform:
        TRIALS[name] = Trial(name, section, about, perform, **details)
        return perform

    return register


# -- what they are given ---------------------------------------------------------------

WORKER: Final = (
    Path(__file__).parents[2] / "docs/examples/python_worker/stepflow-config.yml"
)
SLEEP: Final[dict[str, Any]] = {
    "steps": [
        {
            "id": "a",
            "component": "/sleep",
            "input": {"duration_ms": {"$input": "$.ms"}},
        }
    ],
    "output": {"$step": "a"},
}
SHOUT: Final[dict[str, Any]] = {
    "steps": [{"id": "a", "component": "/python/shout", "input": {"$input": "$"}}],
    "output": {"$step": "a"},
}
LITERAL: Final[dict[str, Any]] = {
    "steps": [{"id": "a", "component": "/sleep", "input": {"duration_ms": 5}}],
    "output": {"$step": "a"},
}
RETRYING: Final[dict[str, Any]] = {
    "steps": [
        {
            "id": "a",
            "component": "/noop",
            "input": {"$input": "$"},
            "onError": {"action": "retry", "maxRetries": 2},
        }
    ],
    "output": {"$step": "a"},
}
WRONG: Final[dict[str, Any]] = {
    "plugins": {"builtin": {"type": "builtin"}, "mine": {"type": "nosuch"}},
    "routes": {"/": [{"plugin": "builtin"}]},
}


def with_worker(*command: str) -> dict[str, Any]:
    """A configuration whose worker is that command."""
    worker = {
        "type": "grpc",
        "command": command[0],
        "args": list(command[1:]),
        "queueName": "mine",
    }
    return {
        "plugins": {"builtin": {"type": "builtin"}, "mine": worker},
        "routes": {"/mine": [{"plugin": "mine"}], "/": [{"plugin": "builtin"}]},
    }


# -- helpers ---------------------------------------------------------------------------


def words(exc: BaseException) -> str:
    """What an exception says, in one line."""
    details = getattr(exc, "details", None)  # what grpc.aio has in the place of words
    said = f"{details()}" if callable(details) else f"{exc}"
    kind = "" if isinstance(exc, RunFailedError) else f"{type(exc).__name__}: "
    return " ".join(f"{kind}{said}".split())


def around(word: str, text: str) -> str:
    """The place of a text where a word is."""
    before, found, after = text.partition(word)
    return f"... {before[-30:]}{word}{after[:40]} ..." if found else "nothing"


@contextmanager
def timing(tell: Tell, question: str) -> Iterator[None]:
    began = time.monotonic()
    try:
        yield
    finally:
        tell(question, time.monotonic() - began)


def tell_left(tell: Tell, question: str) -> None:
    """What there is besides this program, three seconds after now at the latest."""
    tell(question, kinds(wait_gone(os.environ[MARK], 3)))


async def failing_start(
    subject: Subject, wanted: Wanted, tell: Tell, reason: str | None = None
) -> None:
    """A start that fails: after how long, and whether the reason is told."""
    try:
        with timing(tell, "time until the error"):
            async with subject.start(wanted):
                tell("the error", "none: it started")
    except Exception as exc:  # noqa: BLE001 - whatever it is, is the answer
        tell("the error", words(exc))
        if reason is not None:
            tell(f"what it says of `{reason}`", around(reason, words(exc)))


# -- starting --------------------------------------------------------------------------


@trial("port", "starting", "Where the server listens, according to `/proc/net/tcp`")
async def port(subject: Subject, tell: Tell) -> None:
    async with subject.start(Wanted()) as server:
        tell("the port is bound to", addresses(server.port))


@trial(
    "wrong configuration",
    "starting",
    "A start with a plugin of the type `nosuch`",
    tells_left=True,
    rounds=3,
)
async def wrong_configuration(subject: Subject, tell: Tell) -> None:
    await failing_start(subject, Wanted(WRONG), tell, "nosuch")


@trial(
    "wrong worker",
    "starting",
    "A start with a Python worker that fails as it imports `nosuch`",
    limit=60,
    tells_left=True,
)
async def wrong_worker(subject: Subject, tell: Tell) -> None:
    config = with_worker(sys.executable, "-c", "import nosuch")
    await failing_start(subject, Wanted(config), tell, "nosuch")


@trial(
    "start-up time-out",
    "starting",
    "A start with `startup_timeout=2`, and a worker (`sleep 60`) that never connects",
    limit=60,
    tells_left=True,
)
async def startup_timeout(subject: Subject, tell: Tell) -> None:
    wanted = Wanted(with_worker("sleep", "60"), startup_timeout=2)
    await failing_start(subject, wanted, tell)


@trial(
    "cancelled start",
    "starting",
    "A start with a Python worker, cancelled (`task.cancel()`) after 0.3 s",
    limit=60,
    tells_left=True,
)
async def cancelled_start(subject: Subject, tell: Tell) -> None:
    async def start() -> None:
        async with subject.start(Wanted(WORKER)):
            tell("started before", "yes")

    task = asyncio.create_task(start())
    await asyncio.sleep(0.3)
    task.cancel()
    with timing(tell, "time until the task has ended"):
        await asyncio.wait([task])
    await asyncio.to_thread(tell_left, tell, "left after 3 s, the program going on")


@trial(
    "proxy",
    "starting",
    "A start with `startup_timeout=5` where the environment has `http_proxy` (and no "
    "`no_proxy`), and a run",
    limit=40,
    tells_left=True,
)
async def proxy(subject: Subject, tell: Tell) -> None:
    os.environ["http_proxy"] = "http://127.0.0.1:9"
    await try_run(subject, Wanted(startup_timeout=5), tell)


@trial(
    "stray variable",
    "starting",
    "A start where the environment has `STEPFLOW_CONFIG`, meant for another server, and a run",
    limit=40,
    tells_left=True,
)
async def stray_variable(subject: Subject, tell: Tell) -> None:
    os.environ["STEPFLOW_CONFIG"] = "/etc/stepflow/other.yml"
    await try_run(subject, Wanted(), tell)


async def try_run(subject: Subject, wanted: Wanted, tell: Tell) -> None:
    try:
        async with subject.start(wanted) as server:
            await server.run(peers.FLOW, {"n": 1})
        tell("a run", "works")
    except Exception as exc:  # noqa: BLE001 - whatever it is, is the answer
        tell("a run", words(exc))


@trial(
    "trio",
    "starting",
    "Start, run and stop in a `trio.run`",
    is_for_trio=True,
    tells_left=True,
)
async def under_trio(subject: Subject, tell: Tell) -> None:
    await try_run(subject, Wanted(), tell)


# -- running ---------------------------------------------------------------------------

RUNS: Final = 1000
PATIENCE: Final = 10.0


async def many_runs(subject: Subject, wanted: Wanted, tell: Tell) -> None:
    answered = 0
    async with subject.start(wanted) as server:
        with suppress(TimeoutError):
            for _ in range(RUNS):
                async with asyncio.timeout(PATIENCE):
                    await server.run(peers.FLOW, {"n": 1})
                answered += 1
    tell(f"runs answered, of {RUNS:,}", answered)


@trial(
    "runs, level info",
    "running",
    f"{RUNS:,} runs, one after the other, with the log level that both have by default; "
    f"one that has no answer after {PATIENCE:g} s ends the trial",
    limit=90,
)
async def runs(subject: Subject, tell: Tell) -> None:
    await many_runs(subject, Wanted(), tell)


@trial("runs, level error", "running", "The same at level `error`", limit=90)
async def runs_quiet(subject: Subject, tell: Tell) -> None:
    await many_runs(subject, Wanted(level="error"), tell)


@trial(
    "runs, log printed",
    "running",
    "The same at level `info`, with the log on the terminal (`pipe_output=True`; ours "
    "`LogConfig(capture=False)`)",
    limit=90,
)
async def runs_printed(subject: Subject, tell: Tell) -> None:
    await many_runs(subject, Wanted(is_printed=True), tell)


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += record.name.startswith("stepflow.server")


@trial(
    "log", "running", "Ten runs at level `info`, with a handler on Python's root logger"
)
async def log(subject: Subject, tell: Tell) -> None:
    records = _Records()
    logging.basicConfig(level=logging.INFO, handlers=[records])
    async with subject.start(Wanted()) as server:
        for _ in range(10):
            await server.run(peers.FLOW, {"n": 1})
    tell("the server's log lines that became Python log records", records.count)


@trial(
    "failed step", "running", "A Python component that raises `ValueError` in a worker"
)
async def failed_step(subject: Subject, tell: Tell) -> None:
    async with subject.start(Wanted(WORKER)) as server:
        try:
            await server.run(SHOUT, {"text": ""})
        except Exception as exc:  # noqa: BLE001 - whatever it is, is the answer
            tell("the run's error", words(exc))
            tell("what it says of `worker.py`", around("worker.py", words(exc)))


def _yes(value: bool) -> str:
    return "yes" if value else "no"


@trial(
    "killed server",
    "running",
    "SIGKILL for the server while a run of 15 s is waited for",
    limit=60,
    rounds=3,
)
async def killed_server(subject: Subject, tell: Tell) -> None:
    await lost_server(subject, tell, signal.SIGKILL, {"ms": 15_000}, 10)


@trial(
    "frozen server",
    "running",
    "SIGSTOP for the server while a run is waited for, up to 60 s",
    limit=120,
)
async def frozen_server(subject: Subject, tell: Tell) -> None:
    await lost_server(subject, tell, signal.SIGSTOP, {"ms": 1_000}, 60)


async def lost_server(
    subject: Subject, tell: Tell, number: int, value: object, limit: float
) -> None:
    async with subject.start(Wanted()) as server:
        task = asyncio.create_task(server.run(SLEEP, value))
        await asyncio.sleep(0.5)
        os.kill(server.pid, number)
        with timing(tell, "time until the caller hears"):
            await asyncio.wait([task], timeout=limit)
        tell("what it hears", _outcome(task))
        task.cancel()
        await asyncio.wait([task])


def _outcome(task: asyncio.Task[Any]) -> str:
    if not task.done():
        return "nothing"
    error = task.exception()
    return "a result" if error is None else words(error)


@trial(
    "cancelled run",
    "running",
    "A call that waits for a run of 15 s is cancelled (`task.cancel()`) after 0.5 s",
)
async def cancelled_run(subject: Subject, tell: Tell) -> None:
    async with subject.start(Wanted()) as server:
        task = asyncio.create_task(server.run(SLEEP, {"ms": 15_000}))
        await asyncio.sleep(0.5)
        task.cancel()
        await asyncio.wait([task])
        await asyncio.sleep(1)
        status = await asyncio.to_thread(status_of_run, server.port)
        tell("the run's status on the server, 1 s later", status)


def status_of_run(port: int) -> str:
    """That of the only run of a server, which has numbers for them."""
    url = f"http://127.0.0.1:{port}/api/v1/runs"
    with urllib.request.urlopen(url) as answer:
        (run,) = msgspec.json.decode(answer.read())["runs"]
    return {1: "running", 2: "completed", 3: "failed", 4: "cancelled"}[run["status"]]


@trial(
    "restart",
    "running",
    "SIGKILL for the server, and runs until one succeeds, 10 s at most (ours with "
    "`restart_policy=RestartPolicy.ON_FAILURE`)",
    rounds=3,
)
async def restart(subject: Subject, tell: Tell) -> None:
    async with subject.start(Wanted(is_restarted=True)) as server:
        await server.run(peers.FLOW, {"n": 1})
        os.kill(server.pid, signal.SIGKILL)
        began = time.monotonic()
        found = await _wait_success(server, began + 10)
        took = time.monotonic() - began
        tell("time until a run succeeds", took if found else "none did")


async def _wait_success(server: Server, until: float) -> bool:
    while time.monotonic() < until:
        with suppress(Exception):
            await server.run(peers.FLOW, {"n": 1})
            return True
        await asyncio.sleep(0.01)
    return False


# -- the event loop --------------------------------------------------------------------


TICK: Final = 0.001


class _Ticker:
    """A task beside, which notes how much later than it should it was woken."""

    def __init__(self) -> None:
        self.longest = 0.0

    async def tick(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(TICK)
            late = time.perf_counter() - before - TICK
            self.longest = max(self.longest, late)

    def take(self) -> float:
        longest, self.longest = self.longest, 0.0
        return longest


@trial(
    "event loop",
    "running",
    "A task beside that sleeps 1 ms again and again: how much later it was woken, at most "
    "(in the second life of a server in a program, so that all is imported)",
    rounds=5,
)
async def event_loop(subject: Subject, tell: Tell) -> None:
    async with subject.start(Wanted()):
        pass
    ticker = _Ticker()
    ticking = asyncio.create_task(ticker.tick())
    await asyncio.sleep(0.1)
    ticker.take()
    async with subject.start(Wanted()):
        tell("during a start, ms", ticker.take() * 1000)
    tell("during a stop, ms", ticker.take() * 1000)
    ticking.cancel()


# -- ending ----------------------------------------------------------------------------


async def stopping(subject: Subject, wanted: Wanted, tell: Tell) -> None:
    async with subject.start(wanted) as server:
        await server.run(peers.FLOW, {"n": 1})
        began = time.monotonic()
    tell("time to stop", time.monotonic() - began)
    await asyncio.to_thread(tell_left, tell, "left after 3 s, the program going on")


@trial("stop", "ending", "The block is left, idle", rounds=5, tells_left=True)
async def stop(subject: Subject, tell: Tell) -> None:
    await stopping(subject, Wanted(), tell)


@trial(
    "stop, worker",
    "ending",
    "The block is left, with a Python worker connected",
    rounds=3,
    limit=60,
    tells_left=True,
    tells_later=True,
)
async def stop_worker(subject: Subject, tell: Tell) -> None:
    await stopping(subject, Wanted(WORKER), tell)


@trial(
    "exception", "ending", "The body of the block raises a `KeyError`", tells_left=True
)
async def exception(subject: Subject, tell: Tell) -> None:
    try:
        async with subject.start(Wanted()):
            raise KeyError("name")
    except Exception as exc:  # noqa: BLE001 - whatever it is, is the answer
        tell("what arrives outside", words(exc))


ENDS: Final = "the program ends"


async def signalled(subject: Subject, wanted: Wanted, number: int) -> None:
    async with subject.start(wanted) as server:
        await server.run(peers.FLOW, {"n": 1})
        os.kill(os.getpid(), number)
        await asyncio.sleep(30)


@trial(
    "SIGINT",
    "ending",
    "Ctrl-C for the program, idle",
    limit=60,
    tells_end=ENDS,
    tells_left=True,
)
async def sigint(subject: Subject, tell: Tell) -> None:
    await signalled(subject, Wanted(), signal.SIGINT)


@trial(
    "SIGTERM",
    "ending",
    "SIGTERM for the program, idle",
    tells_end=ENDS,
    tells_left=True,
)
async def sigterm(subject: Subject, tell: Tell) -> None:
    await signalled(subject, Wanted(), signal.SIGTERM)


@trial(
    "SIGKILL",
    "ending",
    "SIGKILL for the program, idle",
    tells_end=ENDS,
    tells_left=True,
)
async def sigkill(subject: Subject, tell: Tell) -> None:
    await signalled(subject, Wanted(), signal.SIGKILL)


@trial(
    "SIGKILL, worker",
    "ending",
    "SIGKILL for the program, with a Python worker connected",
    tells_end=ENDS,
    tells_left=True,
    tells_later=True,
)
async def sigkill_worker(subject: Subject, tell: Tell) -> None:
    await signalled(subject, Wanted(WORKER), signal.SIGKILL)


# -- what arrives ----------------------------------------------------------------------

VALUES: Final[dict[str, object]] = {
    "1": 1,
    "1.0": 1.0,
    "2**53 + 1": 2**53 + 1,
    "0.1 + 0.2": 0.1 + 0.2,
    "-0.0": -0.0,
    "float('nan')": float("nan"),
    "b'x'": b"x",
    "{1: 'x'}": {1: "x"},
}


@trial(
    "values",
    "values",
    'The input `{"v": value}` comes back from a flow that returns its input',
)
async def values(subject: Subject, tell: Tell) -> None:
    async with subject.start(Wanted()) as server:
        for name, value in VALUES.items():
            try:
                output = await server.run(peers.FLOW, {"v": value})
                tell(f"`{name}`", repr(output["v"]))
            except Exception as exc:  # noqa: BLE001 - whatever it is, is the answer
                tell(f"`{name}`", words(exc))


FLOATS: Final = 10_000


@trial("floats", "values", f"A list of {FLOATS:,} random floats between 0 and 1")
async def floats(subject: Subject, tell: Tell) -> None:
    sent = [random.random() for _ in range(FLOATS)]
    async with subject.start(Wanted()) as server:
        came = (await server.run(peers.FLOW, {"v": sent}))["v"]
    differ = sum(a != b for a, b in zip(sent, came, strict=True))
    tell("come back as another number", differ)


@trial(
    "large values",
    "values",
    "A text of 10 million characters, sent and returned",
    limit=60,
)
async def large_values(subject: Subject, tell: Tell) -> None:
    text = "x" * 10_000_000
    async with subject.start(Wanted(level="error")) as server:
        try:
            output = await server.run(peers.FLOW, {"v": text})
            tell("it arrives", _yes(output["v"] == text))
        except Exception as exc:  # noqa: BLE001 - whatever it is, is the answer
            tell("it arrives", words(exc))


@trial(
    "numbers in workflows", "values", "Workflows that are passed as a mapping", limit=60
)
async def numbers_in_workflows(subject: Subject, tell: Tell) -> None:
    flows = {"`duration_ms: 5` for `/sleep`": LITERAL, "`maxRetries: 2`": RETRYING}
    async with subject.start(Wanted()) as server:
        for name, flow in flows.items():
            try:
                await server.run(flow, {"n": 1})
                tell(name, "works")
            except Exception as exc:  # noqa: BLE001 - whatever it is, is the answer
                tell(name, words(exc))


# -- what it takes ---------------------------------------------------------------------


@trial("installed", "footprint", "What is installed")
async def installed(subject: Subject, tell: Tell) -> None:
    tell("packages, itself included", len(subject.needed()))
    tell(
        "lines of Python (the launcher and the client; ours: all of it)",
        subject.lines(),
    )


@trial(
    "footprint",
    "footprint",
    "The Python process, after 100 runs at level `error`",
    rounds=3,
)
async def footprint(subject: Subject, tell: Tell) -> None:
    async with subject.start(Wanted(level="error")) as server:
        for _ in range(100):
            await server.run(peers.FLOW, {"n": 1})
        here = psutil.Process()
        tell("MiB of memory", here.memory_info().rss / 2**20)
        tell("threads", here.num_threads())
        tell("open descriptors", here.num_fds())
        tell("processes besides, the server aside", len(here.children()) - 1)
    tell("modules imported", len(sys.modules))
