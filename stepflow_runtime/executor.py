"""What an executor does, and the values it takes and returns.

A leaf: it knows neither servers nor transports. ``StepflowExecutor`` is the protocol
that code should ask for when it does not care where its workflows run.
"""

from __future__ import annotations

import enum
import os
from collections.abc import AsyncIterator, Iterable, Mapping
from datetime import datetime
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    Protocol,
    TypeAlias,
    TypeVar,
    runtime_checkable,
)

import msgspec

from .errors import FlowFailedError
from .events import RunEvent, RunStatus
from .logs.entry import LogEntry
from .reprs import component_list_repr, repr_of

if TYPE_CHECKING:
    from .timeline import Timeline

__all__ = [
    "ClosableIterator",
    "ComponentInfo",
    "ComponentList",
    "Diagnostic",
    "FlowError",
    "FlowId",
    "FlowResult",
    "FlowSource",
    "FlowStatus",
    "FlowVariable",
    "Health",
    "ItemCounts",
    "OnUnknown",
    "Overrides",
    "RunInfo",
    "StepInfo",
    "StepflowExecutor",
    "ValidationResult",
    "Variables",
]


T_co = TypeVar("T_co", covariant=True)


class FlowId(str):
    """The id of a workflow that a server has stored; stands for the workflow in calls.

    :meth:`StepflowExecutor.store_flow` returns one. ``FlowId("...")`` makes one of an id
    that comes from elsewhere: a plain string would be the path of a file.
    """

    __slots__ = ()


FlowSource: TypeAlias = "str | os.PathLike[str] | Mapping[str, Any] | msgspec.Struct"
"""A workflow: the path of a YAML or JSON file; the document itself, as a mapping or as what
``stepflow_py.worker.FlowBuilder`` builds; or a :class:`FlowId`."""

Overrides: TypeAlias = "Mapping[str, Mapping[str, Any]]"
"""Properties to merge into steps, by step id: ``{"step1": {"input": {"x": 1}}}``. The server
merges them as a JSON merge patch (RFC 7396): what is not named stays, ``None`` removes."""

Variables: TypeAlias = "Mapping[str, Any]"
"""Values for a flow's ``$variable`` references, by name."""

OnUnknown: TypeAlias = Literal["raise", "resubmit"]
"""What follows where nobody knows whether the server took a run; see ``run``."""


class ClosableIterator(Protocol[T_co]):
    """An async iterator that ``contextlib.aclosing`` takes."""

    def __aiter__(self) -> AsyncIterator[T_co]: ...

    async def __anext__(self) -> T_co: ...

    async def aclose(self) -> None:
        """End what it has under way, at once."""
        ...


class FlowStatus(enum.Enum):
    """How a flow ended; or that it has not."""

    SUCCESS = "success"
    FAILED = "failed"
    SKIPPED = "skipped"
    RUNNING = "running"
    """Not over yet: only where one looks without waiting (``get_batch(wait=False)``)."""


class FlowError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a flow failed: a value, not an exception.

    :ivar code: the server's name of the error's kind, e.g. ``"COMPONENT_FAILED"``;
        ``"CODE_<n>"`` for a number that this version knows no name for
    :ivar message: the server's words; of a failed Python worker its exception's
    :ivar step_id: the step that failed, or ``None`` where it was none, or is not known
    :ivar component: that step's component (``"/python/shout"``), or ``None``
    :ivar attempts: how often that step was tried, or ``None`` if it is not known
    :ivar logs: what an embedded server and its workers logged of it, at the levels WARN and
        ERROR, oldest first: the chain of causes, a worker's traceback. From a server
        elsewhere there are none
    """

    code: str
    message: str
    step_id: str | None = None
    component: str | None = None
    attempts: int | None = None
    logs: tuple[LogEntry, ...] = ()

    __repr__ = repr_of()

    def _repr_html_(self) -> str:
        from .notebook import error_html

        return error_html(self)

    def __str__(self) -> str:
        """All of it, for people: a line, and the log entries below it."""
        where = f"step {self.step_id!r}" if self.step_id is not None else ""
        if self.component is not None:
            where += f" ({self.component})" if where else self.component
        tried = f", tried {self.attempts} times" if (self.attempts or 0) > 1 else ""
        line = f"{where}: " if where else ""
        line += f"{self.message} ({self.code}{tried})"
        told = "\n".join([line, *(entry.message for entry in self.logs)])
        return told.replace("\n", "\n  ")


class FlowResult(msgspec.Struct, frozen=True, kw_only=True):
    """How one run of a flow ended, or one item of a batch.

    :ivar status: success, failed or skipped; or running, where nobody waited
    :ivar output: the flow's output (any JSON value) if it succeeded, else ``None``
    :ivar error: why it failed, or ``None``
    :ivar run_id: the server's id of the run; the items of a batch share one
    :ivar item_index: its place among the inputs of the run, from 0
    """

    status: FlowStatus
    run_id: str
    output: Any = None
    error: FlowError | None = None
    item_index: int = 0

    __repr__ = repr_of()

    def _repr_html_(self) -> str:
        from .notebook import result_html

        return result_html(self)

    @property
    def is_success(self) -> bool:
        """Whether the flow succeeded, and there is an ``output``."""
        return self.status is FlowStatus.SUCCESS

    @property
    def is_failed(self) -> bool:
        """Whether the flow failed, and there is an ``error``."""
        return self.status is FlowStatus.FAILED

    @property
    def is_skipped(self) -> bool:
        """True for a flow that the server chose not to run.

        Stepflow 0.13 reports no flow so; it is part of the vocabulary of results.
        """
        return self.status is FlowStatus.SKIPPED

    @property
    def is_running(self) -> bool:
        """Whether it was not over when it was asked for."""
        return self.status is FlowStatus.RUNNING

    def unwrap(self) -> Any:
        """Return the output.

        :raises FlowFailedError: if there is none, because the flow failed, was skipped or
            is not over
        """
        if self.is_success:
            return self.output
        raise FlowFailedError(self._verdict(), result=self)

    def _verdict(self) -> str:
        item = f", item {self.item_index}," if self.item_index else ""
        reason = f": {self.error}" if self.error else ""
        return f"run {self.run_id}{item} {_VERDICTS[self.status]}{reason}"


_VERDICTS = {
    FlowStatus.FAILED: "failed",
    FlowStatus.SKIPPED: "was skipped",
    FlowStatus.RUNNING: "is not over yet",
}


class Diagnostic(msgspec.Struct, frozen=True):
    """One finding of the server's analysis of a workflow.

    :ivar level: ``"fatal"``, ``"error"``, ``"warning"``, or ``"level <n>"`` for a number
        that this version knows no name for
    :ivar message: the finding, for people
    :ivar path: where in the document, as a JSON path (``$.steps[0].input``), or ``None``
    :ivar kind: the finding's kind, for programs (``"undefinedStepReference"``)
    """

    level: str
    message: str
    path: str | None = None
    kind: str = ""

    __repr__ = repr_of()

    def __str__(self) -> str:
        return f"{self.path or '$'}: {self.level}: {self.message}"


class ValidationResult(msgspec.Struct, frozen=True, kw_only=True):
    """What the server thinks of a workflow that it did not store.

    :ivar diagnostics: all findings, in the server's order
    """

    diagnostics: tuple[Diagnostic, ...] = ()

    __repr__ = repr_of("is_valid", "errors", "warnings")

    def _repr_html_(self) -> str:
        from .notebook import validation_html

        return validation_html(self)

    @property
    def is_valid(self) -> bool:
        """True if it would run: nothing fatal was found, and no error."""
        return not self.errors

    @property
    def errors(self) -> tuple[Diagnostic, ...]:
        """The findings of the levels fatal and error."""
        return tuple(d for d in self.diagnostics if d.level in ("fatal", "error"))

    @property
    def warnings(self) -> tuple[Diagnostic, ...]:
        """The diagnostics that keep no workflow from being run."""
        return tuple(d for d in self.diagnostics if d.level == "warning")


class ComponentInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A component that workflows can use.

    :ivar path: its path within its plugin's routes, e.g. ``"/noop"``
    :ivar component_id: its id within its plugin
    :ivar plugin: the plugin that has it, by its name in the configuration
    :ivar description: what it does, or ``""``
    :ivar input_schema: the JSON schema of its input, or ``None``
    :ivar output_schema: the JSON schema of its output, or ``None``
    """

    path: str
    component_id: str = ""
    plugin: str = ""
    description: str = ""
    input_schema: Mapping[str, Any] | None = None
    output_schema: Mapping[str, Any] | None = None

    __repr__ = repr_of("path", "plugin", "description")


class ComponentList(list[ComponentInfo]):
    """The components that there are: a list, that also knows what is missing in it.

    :ivar failed_plugins: why a plugin could not tell its components, by its name
    """

    def __init__(
        self,
        components: Iterable[ComponentInfo] = (),
        *,
        failed_plugins: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(components)
        self.failed_plugins = dict(failed_plugins or {})

    __repr__ = component_list_repr

    def _repr_html_(self) -> str:
        from .notebook import components_html

        return components_html(self)

    @property
    def is_complete(self) -> bool:
        """True if every plugin has told its components."""
        return not self.failed_plugins


class ItemCounts(msgspec.Struct, frozen=True):
    """How many items of a run stand how. Those of a cancelled run stay "running"."""

    total: int = 0
    completed: int = 0
    running: int = 0
    failed: int = 0
    cancelled: int = 0


class RunInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A run, as the server knows it.

    :ivar run_id: its id
    :ivar status: how it stands
    :ivar flow_id: its workflow
    :ivar flow_name: the name in that workflow, or ``None``
    :ivar items: how its items stand; a run of one input has one item
    :ivar created_at: when it was taken (aware, UTC), or ``None``
    :ivar completed_at: when it ended, or ``None``
    :ivar root_run_id: the run that it is a part of in the end; its own id if of none
    :ivar parent_run_id: the run whose step started it, or ``None``
    :ivar orchestrator_id: the server that has it in hand, or ``None``
    :ivar last_sequence_number: that of its last event, once the server knows it, or ``None``
    """

    run_id: str
    status: RunStatus
    flow_id: str | None = None
    flow_name: str | None = None
    items: ItemCounts = ItemCounts()
    created_at: datetime | None = None
    completed_at: datetime | None = None
    root_run_id: str | None = None
    parent_run_id: str | None = None
    orchestrator_id: str | None = None
    last_sequence_number: int | None = None

    __repr__ = repr_of("run_id", "status", "flow_name", "items", "created_at")

    @property
    def has_ended(self) -> bool:
        """Whether it is over, well or not."""
        return self.status.is_final


class StepInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A step of one item of a run, as the server knows it.

    :ivar step_id: its id in the workflow
    :ivar step_index: its place in the workflow, from 0
    :ivar item_index: the item, from 0
    :ivar status: how it stands
    :ivar component: what it calls, or ``None``
    :ivar output: its output (any JSON value) if it completed, else ``None``
    :ivar error: why it failed, or ``None``
    :ivar updated_at: when it last changed (aware, UTC), or ``None``
    """

    step_id: str
    status: RunStatus
    step_index: int = 0
    item_index: int = 0
    component: str | None = None
    output: Any = None
    error: FlowError | None = None
    updated_at: datetime | None = None

    __repr__ = repr_of(
        "step_id", "status", "item_index", "component", "output", "error"
    )


class FlowVariable(msgspec.Struct, frozen=True, kw_only=True):
    """A variable that a workflow declares.

    :ivar required: whether a run without it fails
    :ivar default: the value that it has otherwise, or ``None``
    :ivar description: what it means, or ``None``
    :ivar env_var: the environment variable that ``variables_from_env=True`` takes it from,
        or ``None``
    :ivar schema: the JSON schema of its values, or ``None``
    """

    required: bool = False
    default: Any = None
    description: str | None = None
    env_var: str | None = None
    schema: Mapping[str, Any] | None = None

    __repr__ = repr_of()


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """What a server says of itself.

    :ivar status: ``"healthy"``, or what else it says
    :ivar timestamp: its clock (aware), or ``None``
    :ivar version: its version as far as it tells: 0.13 gives a commit
    """

    status: str
    timestamp: datetime | None = None
    version: str | None = None

    __repr__ = repr_of()

    @property
    def is_healthy(self) -> bool:
        """Whether the server says that it is."""
        return self.status == "healthy"


@runtime_checkable
class StepflowExecutor(Protocol):
    """Anything that runs workflows: an embedded server or one elsewhere.

    The docstrings of the methods are those of :class:`~stepflow_runtime.StepflowRuntime`
    and :class:`~stepflow_runtime.StepflowClient`, which both are one.
    """

    async def run(
        self,
        flow: FlowSource,
        input: Any = None,
        overrides: Overrides | None = None,
        *,
        variables: Variables | None = None,
        variables_from_env: bool = False,
        timeout: float | None = None,
        on_unknown: OnUnknown = "raise",
    ) -> FlowResult: ...

    async def submit(
        self,
        flow: FlowSource,
        input: Any = None,
        overrides: Overrides | None = None,
        *,
        variables: Variables | None = None,
        variables_from_env: bool = False,
        timeout: float | None = None,
        on_unknown: OnUnknown = "raise",
    ) -> str: ...

    async def get_result(
        self, run_id: str, *, timeout: float | None = None
    ) -> FlowResult: ...

    async def submit_batch(
        self,
        flow: FlowSource,
        inputs: Iterable[Any],
        max_concurrent: int | None = None,
        overrides: Overrides | None = None,
        *,
        variables: Variables | None = None,
        variables_from_env: bool = False,
        timeout: float | None = None,
        on_unknown: OnUnknown = "raise",
    ) -> str: ...

    async def get_batch(
        self,
        batch_id: str,
        include_results: bool = True,
        *,
        wait: bool = True,
        timeout: float | None = None,
    ) -> tuple[RunInfo, list[FlowResult]]: ...

    def run_many(
        self,
        flow: FlowSource,
        inputs: Iterable[Any],
        max_concurrent: int | None = None,
        overrides: Overrides | None = None,
        *,
        variables: Variables | None = None,
        variables_from_env: bool = False,
        timeout: float | None = None,
        on_unknown: OnUnknown = "raise",
    ) -> ClosableIterator[tuple[int, FlowResult]]: ...

    async def validate(self, flow: FlowSource) -> ValidationResult: ...

    async def store_flow(self, flow: FlowSource) -> FlowId: ...

    async def get_flow_variables(self, flow: FlowSource) -> dict[str, FlowVariable]: ...

    async def list_components(
        self, *, include_schemas: bool = True
    ) -> ComponentList: ...

    async def cancel(self, run_id: str) -> RunInfo: ...

    async def get_run(self, run_id: str) -> RunInfo: ...

    async def list_runs(
        self,
        *,
        status: RunStatus | None = None,
        flow_name: str | None = None,
        root_run_id: str | None = None,
        parent_run_id: str | None = None,
        roots_only: bool = False,
        limit: int | None = None,
        offset: int = 0,
    ) -> list[RunInfo]: ...

    async def get_steps(
        self, run_id: str, *, item_index: int | None = None
    ) -> list[StepInfo]: ...

    def events(
        self,
        run_id: str,
        *,
        since: int = 0,
        include_results: bool = False,
        include_sub_runs: bool = False,
    ) -> ClosableIterator[RunEvent]: ...

    async def timeline(
        self, run_id: str, *, timeout: float | None = None
    ) -> Timeline: ...

    async def delete_run(self, run_id: str) -> None: ...

    async def put_blob(self, data: Any, *, filename: str | None = None) -> str: ...

    async def get_blob(self, blob_id: str) -> Any: ...

    async def health(self) -> Health: ...
