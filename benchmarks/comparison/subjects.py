"""The two that are compared, behind one face, so that each trial is written once.

Each is used as its own documentation says: the official pair as ``StepflowOrchestrator``,
to whose ``url`` a ``StepflowClient`` is connected; ours by ``StepflowRuntime.start``. What
a trial wants beyond that is passed on as the option that each has for it.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .. import peers
from .processes import server_pid

__all__ = [
    "OFFICIAL",
    "OURS",
    "SUBJECTS",
    "RunFailedError",
    "Server",
    "Subject",
    "Wanted",
]

OFFICIAL: Final = "official"
OURS: Final = "ours"

_COMPLETED = 2


class Wanted(msgspec.Struct, frozen=True):
    """What a trial asks for.

    :ivar config: a configuration, or its file
    :ivar level: of the log; both have ``info`` where nothing is said
    :ivar startup_timeout: seconds; None: what it has by itself
    :ivar is_restarted: whether the server is to come back when it died, if there is a way
    :ivar is_printed: whether its log goes to the terminal
    """

    config: Mapping[str, Any] | Path = msgspec.field(
        default_factory=lambda: peers.CONFIG
    )
    level: str = "info"
    startup_timeout: float | None = None
    is_restarted: bool = False
    is_printed: bool = False


class Server(Protocol):
    """A server that was started."""

    @property
    def port(self) -> int: ...

    @property
    def pid(self) -> int: ...

    async def run(self, flow: Mapping[str, Any], value: object) -> Any:
        """The output of a run; an exception that says what was said, if it failed."""
        ...


class Subject(msgspec.Struct, frozen=True):
    """One of the two.

    :ivar start: a block with a server in it
    :ivar requirement: what one installs
    :ivar sources: where its launcher and client are, by module
    """

    start: Callable[[Wanted], AbstractAsyncContextManager[Server]]
    requirement: str
    sources: tuple[str, ...]

    def needed(self) -> set[str]:
        """The packages that are installed with it, itself included."""
        return set(_needed(Requirement(self.requirement)))

    def lines(self) -> int:
        """How many lines of Python they are."""
        return sum(
            len(path.read_text(encoding="utf-8").splitlines())
            for name in self.sources
            for path in _files(name)
        )


def _needed(requirement: Requirement) -> Iterator[str]:
    yield canonicalize_name(requirement.name)
    for line in metadata.requires(requirement.name) or ():
        needed = Requirement(line)
        if _applies(needed, requirement.extras):
            yield from _needed(needed)


def _applies(needed: Requirement, extras: Iterable[str]) -> bool:
    marker = needed.marker
    return marker is None or any(
        marker.evaluate({"extra": extra}) for extra in ("", *extras)
    )


def _files(module: str) -> Iterable[Path]:
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin)
    return path.parent.rglob("*.py") if path.name == "__init__.py" else [path]


class RunFailedError(Exception):
    """A run of the official pair failed: there, that is an answer and no exception."""


class _OfficialServer:
    def __init__(self, orchestrator: Any, client: Any) -> None:
        self.port: int = orchestrator.port
        self.pid = server_pid()
        self._client = client
        self._stored: dict[str, str] = {}

    async def run(self, flow: Mapping[str, Any], value: object) -> Any:
        from google.protobuf import json_format

        key = json.dumps(flow)
        if key not in self._stored:
            self._stored[key] = await self._store(flow)
        answer = await self._client.run(self._stored[key], value)
        (result,) = answer.results
        if answer.summary.status != _COMPLETED:
            raise RunFailedError(f"an answer: {result.error_message}")
        return json_format.MessageToDict(result.output)

    async def _store(self, flow: Mapping[str, Any]) -> str:
        answer = await self._client.store_flow(flow)
        if not answer.stored:
            told = [each.message for each in answer.diagnostics.diagnostics]
            raise RunFailedError(f"an answer: {'; '.join(told)}")
        flow_id: str = answer.flow_id
        return flow_id


@asynccontextmanager
async def _official(wanted: Wanted) -> AsyncIterator[Server]:
    from stepflow_orchestrator import OrchestratorConfig, StepflowOrchestrator
    from stepflow_py import StepflowClient

    options: dict[str, Any] = {"pipe_output": wanted.is_printed}
    if isinstance(wanted.config, Path):
        options["config_path"] = wanted.config
    else:
        options["config"] = dict(wanted.config)
    if wanted.startup_timeout is not None:
        options["startup_timeout"] = wanted.startup_timeout
    config = OrchestratorConfig(log_level=wanted.level, **options)
    async with (
        StepflowOrchestrator.start(config) as orchestrator,
        StepflowClient.connect(orchestrator.url) as client,
    ):
        yield _OfficialServer(orchestrator, client)


class _OurServer:
    def __init__(self, runtime: Any) -> None:
        self.port: int = runtime.port
        self._runtime = runtime

    @property
    def pid(self) -> int:
        pid: int = self._runtime.pid
        return pid

    async def run(self, flow: Mapping[str, Any], value: object) -> Any:
        return (await self._runtime.run(flow, value)).unwrap()


@asynccontextmanager
async def _ours(wanted: Wanted) -> AsyncIterator[Server]:
    from stepflow_runtime import LogConfig, RestartPolicy, StepflowRuntime

    options: dict[str, Any] = {}
    if wanted.startup_timeout is not None:
        options["startup_timeout"] = wanted.startup_timeout
    if wanted.is_restarted:
        options["restart_policy"] = RestartPolicy.ON_FAILURE
    log_config = LogConfig(level=wanted.level, capture=not wanted.is_printed)
    async with StepflowRuntime.start(
        wanted.config, log_config=log_config, **options
    ) as runtime:
        yield _OurServer(runtime)


SUBJECTS: Final = {
    OFFICIAL: Subject(
        _official, "stepflow-py[local]", ("stepflow_orchestrator", "stepflow_py.client")
    ),
    OURS: Subject(_ours, "stepflow-runtime", ("stepflow_runtime",)),
}
