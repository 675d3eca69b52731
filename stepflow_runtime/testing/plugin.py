"""The pytest plugin: runtimes as fixtures, their log in the report, and a look for leaks.

Loaded by pytest wherever this package is installed, so it imports nothing that costs until
a test uses a runtime. Contract: the fixtures are synchronous, and what they give works in
whichever event loop a test has: anyio's plugin, pytest-asyncio, pytest-trio, or none. Each
process of pytest-xdist has its own. What is watched is watched only: no test's outcome
depends on it, but the session's does, if runtimes or processes are left at its end.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import pytest

from .. import roster
from .faults import thaw_all

if TYPE_CHECKING:
    from ..runtime import StepflowRuntime
    from ..server.supervisor import Supervisor
    from .watching import Watch

__all__ = [
    "stepflow_options",
    "stepflow_runtime",
    "stepflow_runtime_module",
    "stepflow_runtime_session",
]

# What users write: names of ini options, and of the marker.
LEAKS: Final = "stepflow_leaks"
LOG_LINES: Final = "stepflow_log_lines"
MARKER: Final = "stepflow"

# What a process of pytest-xdist hands to the one that has the terminal.
_HANDED_OVER: Final = "stepflow_runtime_left_behind"


# -- fixtures --------------------------------------------------------------------------


@pytest.fixture(scope="session")
def stepflow_options() -> Mapping[str, Any]:
    """The options of ``StepflowRuntime.start`` for the runtimes of the other fixtures.

    To be overridden, in a ``conftest.py`` or a test module. ``@pytest.mark.stepflow(...)``
    adds to them.
    """
    return {}


@pytest.fixture
def stepflow_runtime(
    request: pytest.FixtureRequest, stepflow_options: Mapping[str, Any]
) -> Iterator[StepflowRuntime]:
    """A runtime of the test's own, READY, and stopped after it."""
    yield from _runtime(request, stepflow_options)


@pytest.fixture(scope="module")
def stepflow_runtime_module(
    request: pytest.FixtureRequest, stepflow_options: Mapping[str, Any]
) -> Iterator[StepflowRuntime]:
    """A runtime that the tests of a module share, READY, and stopped after the last one."""
    yield from _runtime(request, stepflow_options)


@pytest.fixture(scope="session")
def stepflow_runtime_session(
    request: pytest.FixtureRequest, stepflow_options: Mapping[str, Any]
) -> Iterator[StepflowRuntime]:
    """A runtime that all tests share, READY, and stopped at the end of the session.

    With pytest-xdist, all tests of a worker process.
    """
    yield from _runtime(request, stepflow_options)


def _runtime(
    request: pytest.FixtureRequest, options: Mapping[str, Any]
) -> Iterator[StepflowRuntime]:
    runtime = _start({**options, **_marked_options(request.node)})
    try:
        yield runtime
    finally:
        thaw_all()  # a frozen server would be waited for
        runtime.stop()


def _marked_options(node: pytest.Item | pytest.Collector) -> dict[str, Any]:
    """What markers say, the nearest one last."""
    options: dict[str, Any] = {}
    for marker in reversed(list(node.iter_markers(MARKER))):
        if marker.args:
            raise pytest.UsageError(
                f"{node.nodeid}: @pytest.mark.{MARKER} takes the options of "
                f"StepflowRuntime.start by their names, not {marker.args!r}"
            )
        options.update(marker.kwargs)
    return options


def _start(options: Mapping[str, Any]) -> StepflowRuntime:
    """Start one that no event loop owns, READY on return."""
    from ..loops import in_event_loop
    from ..runtime import StepflowRuntime

    # SIGTERM ends pytest at once, as ever: as a SystemExit it would fail one test only.
    start = partial(StepflowRuntime.start, **{"handle_signals": False, **options})
    if not in_event_loop():
        return start()
    # pytest itself was started in a loop, by a notebook's cell.
    with ThreadPoolExecutor(1) as elsewhere:
        return elsewhere.submit(start).result()


# -- hooks -----------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(
        LEAKS,
        "what to do about Stepflow runtimes and processes that are left at the end of the "
        "session: error, warn or ignore",
        default="error",
    )
    parser.addini(
        LOG_LINES,
        "how many entries of a Stepflow server's log a failed test shows at most",
        default="200",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        f"{MARKER}(**options): options of StepflowRuntime.start for the runtime of the "
        "fixture stepflow_runtime, or, in pytestmark, of stepflow_runtime_module",
    )
    plugin = _Plugin(config)
    config.pluginmanager.register(plugin, "stepflow_runtime_watch")
    config.add_cleanup(plugin.close)


class _Plugin:
    def __init__(self, config: pytest.Config) -> None:
        self._log_lines = _log_lines(config)
        self._leaks = _leaks(config)
        self._watch: Watch | None = None
        self._origin = "the session"
        self._left: list[str] = []
        self._hearing = ExitStack()
        self._hearing.enter_context(roster.hearing(self._hear))
        self.close = self._hearing.close

    def _hear(self, supervisor: Supervisor) -> None:
        if self._watch is None:
            from .watching import Watch

            self._watch = Watch()
            self._watch.origin = self._origin
        self._watch.hear(supervisor)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item
    ) -> Generator[None, object, object]:
        self._origin = item.nodeid
        if self._watch is not None:
            self._watch.begin(item.nodeid)
        try:
            return (yield)
        finally:
            thaw_all()  # of those that tests share, too
            if self._watch is not None:
                self._watch.end()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self,
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.failed and self._watch is not None:
            for title, text in self._watch.news(self._log_lines):
                report.sections.append((f"{title} during {report.when}", text))
        return report

    @pytest.hookimpl(trylast=True)  # after the last fixtures are done with
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._leaks == "ignore":
            return
        if self._watch is not None:
            self._left += self._watch.left_behind()
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput[_HANDED_OVER] = self._left
        elif self._left and self._leaks == "error" and not session.exitstatus:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A worker of pytest-xdist has come to its end; one that crashed tells nothing."""
        output = getattr(node, "workeroutput", None) or {}
        worker = node.gateway.id
        self._left += [f"[{worker}] {each}" for each in output.get(_HANDED_OVER, ())]

    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter
    ) -> None:
        if self._left:
            terminalreporter.section("left behind by stepflow-runtime", red=True)
            for each in self._left:
                terminalreporter.write_line(each)
            if self._leaks == "error":
                terminalreporter.write_line(
                    "Runtimes end with their block, by stop() or by stop_async(); those of the "
                    f'fixtures by themselves. The ini option "{LEAKS}" can be "warn" or '
                    '"ignore".'
                )


def _log_lines(config: pytest.Config) -> int:
    value = cast(str, config.getini(LOG_LINES))
    try:
        return max(int(value), 0)
    except ValueError:
        raise pytest.UsageError(
            f"the ini option {LOG_LINES} must be a number, not {value!r}"
        ) from None


def _leaks(config: pytest.Config) -> Literal["error", "warn", "ignore"]:
    value = config.getini(LEAKS)
    if value not in ("error", "warn", "ignore"):
        raise pytest.UsageError(
            f'the ini option {LEAKS} must be "error", "warn" or "ignore", not {value!r}'
        )
    return cast(Literal["error", "warn", "ignore"], value)
