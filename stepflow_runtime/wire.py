"""What the server speaks, as msgspec Structs; no other module knows its field names.

A leaf, and forgiving: a field that the server adds is ignored, one that it leaves out
has a default, and a number without a name becomes a word that carries the number. The
shapes and the numbers of enums are those that servers of 0.12 and 0.13 were seen to send;
their published schema differs (it promises names where numbers travel).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from math import isinf
from typing import Any, Final
from urllib.parse import urlencode

import msgspec

from .events import (
    ItemCompleted,
    RunCompleted,
    RunCreated,
    RunEvent,
    RunStatus,
    StepCompleted,
    StepReady,
    StepsNeeded,
    StepStarted,
    SubRunCreated,
    UnknownEvent,
)
from .executor import (
    ComponentInfo,
    ComponentList,
    Diagnostic,
    FlowError,
    FlowResult,
    FlowStatus,
    FlowVariable,
    Health,
    ItemCounts,
    RunInfo,
    StepInfo,
)

__all__ = [
    "API",
    "HEALTH",
    "NOT_UNDERSTOOD",
    "NO_REASON",
    "SUPPORTED",
    "ApiFault",
    "RunAnswer",
    "RunDetails",
    "RunItems",
    "StoredBlob",
    "StoredFlow",
    "blob_request",
    "component_list",
    "data_blob_request",
    "decode_blob",
    "decode_components",
    "decode_event",
    "decode_flow",
    "decode_flow_variables",
    "decode_health",
    "decode_nothing",
    "decode_run",
    "decode_run_details",
    "decode_run_items",
    "decode_run_list",
    "decode_run_steps",
    "decode_stored_blob",
    "decode_stored_flow",
    "decode_summary",
    "encode",
    "event",
    "fault_of",
    "flow_request",
    "flow_result",
    "flow_variables",
    "health",
    "is_of_server",
    "outdated_version",
    "query",
    "run_info",
    "run_request",
    "step_info",
]

SUPPORTED: Final = "Stepflow 0.12 and 0.13"

API: Final = "/api/v1"
HEALTH: Final = f"{API}/health"

encode: Final = msgspec.json.Encoder().encode

# What decoding raises: it counts the levels of what is nested, and does not look at all texts.
NOT_UNDERSTOOD: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_ERROR_CODES = (
    "UNSPECIFIED",
    "TIMEOUT",
    "INVALID_INPUT",
    "COMPONENT_FAILED",
    "CANCELLED",
    "UNREACHABLE",
    "COMPONENT_NOT_FOUND",
    "RESOURCE_UNAVAILABLE",
    "EXPRESSION_FAILURE",
    "ORCHESTRATOR_ERROR",
    "WORKER_ERROR",
)
_DIAGNOSTIC_LEVELS = {1: "fatal", 2: "error", 3: "warning"}

# As plain numbers: this is asked in every call.
_COMPLETED: Final = RunStatus.COMPLETED.value
_ENDED: Final = frozenset(each.value for each in RunStatus if each.is_final)
_KNOWN: Final = frozenset(each.value for each in RunStatus if each.value)

_EXACT_INTEGERS = 2**53


class _Answer(msgspec.Struct, frozen=True, rename="camel", gc=False):
    """How all of them are read."""


class _WireDiagnostic(_Answer, frozen=True):
    kind: str = ""
    level: int = 0
    formatted: str = ""
    path: str | None = None

    def translated(self) -> Diagnostic:
        level = _DIAGNOSTIC_LEVELS.get(self.level, f"level {self.level}")
        return Diagnostic(level, self.formatted, self.path, self.kind)


class _WireDiagnostics(_Answer, frozen=True):
    diagnostics: tuple[_WireDiagnostic, ...] = ()


class StoredFlow(_Answer, frozen=True):
    """The answer to ``POST /flows``."""

    flow_id: str
    stored: bool = True
    diagnostics: _WireDiagnostics = _WireDiagnostics()

    def findings(self) -> list[Diagnostic]:
        return [each.translated() for each in self.diagnostics.diagnostics]


class StoredBlob(_Answer, frozen=True):
    """The answer to ``POST /blobs``."""

    blob_id: str


class _Blob(_Answer, frozen=True):
    """The answer to ``GET /blobs/{id}``; of a binary one, without the bytes."""

    data: Any
    blob_type: str = "data"


class _Flow(_Answer, frozen=True):
    """The answer to ``GET /flows/{id}``."""

    flow: dict[str, Any]


class _Items(_Answer, frozen=True):
    total: int = 0
    completed: int = 0
    running: int = 0
    failed: int = 0
    cancelled: int = 0


class _Summary(_Answer, frozen=True):
    run_id: str
    status: int = 0
    flow_id: str | None = None
    flow_name: str | None = None
    items: _Items = _Items()
    created_at: datetime | None = None
    completed_at: datetime | None = None
    root_run_id: str | None = None
    parent_run_id: str | None = None
    orchestrator_id: str | None = None
    finished_at_seqno: int | None = None

    @property
    def has_ended(self) -> bool:
        return self.status in _ENDED or (
            self.completed_at is not None and self.status not in _KNOWN
        )


class _Item(_Answer, frozen=True):
    status: int = 0
    output: Any = None
    error_message: str | None = None
    error_code: int = 0
    item_index: int = 0


class _Step(_Answer, frozen=True):
    step_id: str
    step_index: int = 0
    item_index: int = 0
    status: int = 0
    component: str | None = None
    output: Any = None
    error_message: str | None = None
    error_code: int = 0
    journal_seqno: int = 0
    updated_at: datetime | None = None


class RunAnswer(_Answer, frozen=True):
    """The answer to ``POST /runs``; ``results`` counts only once the run ended."""

    summary: _Summary
    results: tuple[_Item, ...] = ()


class _RunSummary(_Answer, frozen=True):
    """The answer to ``POST /runs/{id}/cancel``, and what matters of most others."""

    summary: _Summary


class RunDetails(_Answer, frozen=True):
    """The answer to ``GET /runs/{id}``."""

    summary: _Summary
    steps: tuple[_Step, ...] = ()


class RunItems(_Answer, frozen=True):
    """The answer to ``GET /runs/{id}/items``."""

    results: tuple[_Item, ...] = ()


class _RunList(_Answer, frozen=True):
    """The answer to ``GET /runs``."""

    runs: tuple[_Summary, ...] = ()


class _RunSteps(_Answer, frozen=True):
    """The answer to ``GET /runs/{id}/steps``."""

    steps: tuple[_Step, ...] = ()


class _Component(_Answer, frozen=True):
    path: str = ""
    component: str = ""  # what 0.12 calls the path
    component_id: str = ""
    plugin: str = ""
    description: str = ""
    input_schema: dict[str, Any] | None = None
    output_schema: dict[str, Any] | None = None


class _FailedPlugin(_Answer, frozen=True):
    plugin: str = ""
    error: str = ""


class _Components(_Answer, frozen=True):
    """The answer to ``GET /components``."""

    components: tuple[_Component, ...]
    failed_plugins: tuple[_FailedPlugin, ...] = ()


class _Variable(_Answer, frozen=True):
    required: bool = False
    default_value: Any = None
    description: str | None = None
    env_var: str | None = None
    schema: dict[str, Any] | None = None


class _Variables(_Answer, frozen=True):
    """The answer to ``GET /flows/{id}/variables``."""

    variables: dict[str, _Variable] = {}


class _Build(_Answer, frozen=True):
    git_version: str | None = None


class _Health(_Answer, frozen=True):
    """The answer to ``GET /health``; ``version`` is what servers before 0.12 had."""

    status: str
    timestamp: datetime | None = None
    build: _Build = _Build()
    version: str | None = None


class _Event(_Answer, frozen=True):
    """One event of ``GET /runs/{id}/events``: its name is the only key of ``event``."""

    event: Any = None
    sequence_number: int = 0
    timestamp: datetime | None = None


class ApiFault(_Answer, frozen=True):
    code: int = 0
    message: str = ""
    status: str = ""


class _ApiFaultBody(_Answer, frozen=True):
    error: ApiFault


class _Nothing(_Answer, frozen=True):
    """An answer that says no more than that it was done."""


def _number(literal: str) -> int | float:
    """Give back as an ``int`` what the server's detour through protobuf made a float.

    Every number comes back with a fraction (``3`` as ``3.0``). Within 2**53 a float
    names one integer exactly; beyond it, and for the negative zero, it stays a float.

    :raises ValueError: if it is beyond all floats, which is an error elsewhere, too
    """
    value = float(literal)
    if value.is_integer() and abs(value) <= _EXACT_INTEGERS:
        return int(value) if value or literal[0] != "-" else value
    if isinf(value):
        raise ValueError("Number out of range")
    return value


decode_stored_flow = msgspec.json.Decoder(StoredFlow).decode
decode_stored_blob = msgspec.json.Decoder(StoredBlob).decode
# A blob is stored as it was sent: its numbers need no mending.
decode_blob = msgspec.json.Decoder(_Blob).decode
decode_flow = msgspec.json.Decoder(_Flow, float_hook=_number).decode
decode_flow_variables = msgspec.json.Decoder(_Variables, float_hook=_number).decode
decode_run = msgspec.json.Decoder(RunAnswer, float_hook=_number).decode
decode_summary = msgspec.json.Decoder(_RunSummary).decode
decode_run_details = msgspec.json.Decoder(RunDetails).decode
decode_run_items = msgspec.json.Decoder(RunItems, float_hook=_number).decode
decode_run_list = msgspec.json.Decoder(_RunList).decode
decode_run_steps = msgspec.json.Decoder(_RunSteps, float_hook=_number).decode
decode_components = msgspec.json.Decoder(_Components).decode
decode_health = msgspec.json.Decoder(_Health).decode
decode_event = msgspec.json.Decoder(_Event, float_hook=_number).decode
decode_nothing = msgspec.json.Decoder(_Nothing).decode
_decode_fault = msgspec.json.Decoder(_ApiFaultBody).decode


def flow_request(encoded_flow: bytes, *, dry_run: bool = False) -> bytes:
    """``POST /flows``: the document is spliced in as it was encoded, once."""
    tail = b',"dryRun":true}' if dry_run else b"}"
    return b'{"flow":' + encoded_flow + tail


def blob_request(encoded_flow: bytes) -> bytes:
    """``POST /blobs``: the same document as a blob of the kind that runs accept."""
    return b'{"blobType":"flow","data":' + encoded_flow + b"}"


def data_blob_request(encoded_data: bytes, filename: str | None) -> bytes:
    """``POST /blobs`` with any JSON value but ``null``, which it refuses."""
    head = b'{"blobType":"data",'
    if filename is not None:
        head += b'"filename":' + encode(filename) + b","
    return head + b'"data":' + encoded_data + b"}"


def run_request(
    flow_id: str,
    inputs: Sequence[Any],
    *,
    overrides: Mapping[str, Any] | None = None,
    variables: Mapping[str, Any] | None = None,
    max_concurrent: int | None = None,
    wait: int = 0,
) -> bytes:
    """``POST /runs``.

    The server wants overrides under ``steps`` and each value under ``value``; given any
    other way it answers 400 or ignores them. It closes the connection if the most that
    may run at once is 0.

    :param wait: for how many whole seconds the server may wait for the run's end before it
        answers; 0: not at all
    """
    body: dict[str, Any] = {"flowId": str(flow_id), "input": inputs}
    if wait:
        body["wait"] = True
        body["timeoutSecs"] = wait
    if overrides:
        steps = {step: {"value": value} for step, value in overrides.items()}
        body["overrides"] = {"steps": steps}
    if variables:
        body["variables"] = variables
    if max_concurrent is not None:
        body["maxConcurrency"] = max_concurrent
    return encode(body)


def query(**parameters: str | float | bool | None) -> str:
    """The query of a URL, with its question mark; what is None is left out."""
    given = {
        name: str(value).lower() if isinstance(value, bool) else value
        for name, value in parameters.items()
        if value is not None
    }
    return f"?{urlencode(given)}" if given else ""


def fault_of(body: bytes) -> ApiFault:
    """The server's error, or an ``ApiFault`` that carries the plain text it sent."""
    try:
        return _decode_fault(body).error
    except NOT_UNDERSTOOD:
        return ApiFault(message=body.decode(errors="replace").strip())


def is_of_server(body: bytes) -> bool:
    """True for an error that is Stepflow's own, not that of a proxy before it."""
    fault = fault_of(body)
    return bool(fault.status) or fault.message.startswith("Failed to ")


def run_info(summary: _Summary) -> RunInfo:
    items = summary.items
    return RunInfo(
        run_id=summary.run_id,
        status=RunStatus(summary.status),
        flow_id=summary.flow_id,
        flow_name=summary.flow_name,
        items=ItemCounts(
            items.total, items.completed, items.running, items.failed, items.cancelled
        ),
        created_at=summary.created_at,
        completed_at=summary.completed_at,
        root_run_id=summary.root_run_id,
        parent_run_id=summary.parent_run_id,
        orchestrator_id=summary.orchestrator_id,
        last_sequence_number=summary.finished_at_seqno,
    )


def flow_result(summary: _Summary, item: _Item | None) -> FlowResult:
    """What one item of a run came to.

    The items of a cancelled run stay "running" for ever, so the run's own status has
    the last word on them.
    """
    if item is not None and item.status == _COMPLETED:
        return FlowResult(
            status=FlowStatus.SUCCESS,
            run_id=summary.run_id,
            item_index=item.item_index,
            output=item.output,
        )
    index = 0 if item is None else item.item_index
    number = summary.status
    if item is not None and (item.status in _ENDED or not summary.has_ended):
        number = item.status
    if number not in _ENDED and not summary.has_ended:
        return FlowResult(
            status=FlowStatus.RUNNING, run_id=summary.run_id, item_index=index
        )
    return FlowResult(
        status=FlowStatus.FAILED,
        run_id=summary.run_id,
        item_index=index,
        error=_flow_error(number, item),
    )


def step_info(step: _Step) -> StepInfo:
    status = RunStatus(step.status)
    error = None
    if status.is_final and status is not RunStatus.COMPLETED:
        error = FlowError(
            code=_error_code(step.error_code),
            message=step.error_message or NO_REASON,
            step_id=step.step_id,
            component=step.component,
        )
    return StepInfo(
        step_id=step.step_id,
        status=status,
        step_index=step.step_index,
        item_index=step.item_index,
        component=step.component,
        output=step.output,
        error=error,
        updated_at=step.updated_at,
    )


def component_list(found: _Components) -> ComponentList:
    return ComponentList(
        (
            ComponentInfo(
                path=each.path or each.component,
                component_id=each.component_id,
                plugin=each.plugin,
                description=each.description,
                input_schema=each.input_schema,
                output_schema=each.output_schema,
            )
            for each in found.components
        ),
        failed_plugins={each.plugin: each.error for each in found.failed_plugins},
    )


def flow_variables(found: _Variables) -> dict[str, FlowVariable]:
    return {
        name: FlowVariable(
            required=each.required,
            default=each.default_value,
            description=each.description,
            env_var=each.env_var,
            schema=each.schema,
        )
        for name, each in found.variables.items()
    }


def outdated_version(body: bytes) -> str | None:
    """What a server before 0.12 says that its version is; later ones tell a commit."""
    try:
        return decode_health(body).version
    except NOT_UNDERSTOOD:
        return None


def health(found: _Health) -> Health:
    return Health(
        status=found.status,
        timestamp=found.timestamp,
        version=found.version or found.build.git_version,
    )


_EVENTS: Final[Mapping[str, type[RunEvent]]] = {
    each.__name__: each
    for each in (
        RunCreated,
        StepsNeeded,
        StepReady,
        StepStarted,
        StepCompleted,
        ItemCompleted,
        SubRunCreated,
        RunCompleted,
    )
}


def event(found: _Event) -> RunEvent:
    """The event by its class; ``UnknownEvent`` if it has none, or another shape."""
    kind, data = _kind_and_data(found.event)
    common = {"sequence_number": found.sequence_number, "timestamp": found.timestamp}
    if (known := _EVENTS.get(kind)) is not None:
        names = _EVENT_FIELDS[known].items()
        fields = {name: data[camel] for name, camel in names if camel in data}
        with suppress(msgspec.ValidationError, RecursionError):
            return msgspec.convert({**fields, **common}, known)
    run_id = data.get("runId")
    return UnknownEvent(
        sequence_number=found.sequence_number,
        timestamp=found.timestamp,
        run_id=run_id if isinstance(run_id, str) else "",
        kind=kind,
        data=data,
    )


def _kind_and_data(event: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(event, dict) and len(event) == 1:
        ((kind, data),) = event.items()
        return kind, data if isinstance(data, dict) else {"value": data}
    return (event, {}) if isinstance(event, str) else ("", {"value": event})


def _camel(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(map(str.title, others))


_EVENT_FIELDS: Final = {
    known: {name: _camel(name) for name in known.__struct_fields__}
    for known in _EVENTS.values()
}


def _flow_error(status: int, item: _Item | None) -> FlowError:
    if item is not None and item.error_message:
        return FlowError(code=_error_code(item.error_code), message=item.error_message)
    words = _VERDICTS.get(RunStatus(status))
    if words is not None:
        return FlowError(code=words[0], message=words[1])
    if status not in _KNOWN:
        return FlowError(
            code=f"STATUS_{status}", message="it ended in a way that has no name here"
        )
    if item is None or item.status == RunStatus.RUNNING.value:
        return FlowError(code="ORCHESTRATOR_ERROR", message=_NOT_RESUMED)
    return FlowError(code=_error_code(item.error_code), message=NO_REASON)


_VERDICTS: Final = {
    RunStatus.CANCELLED: ("CANCELLED", "the run was cancelled"),
    RunStatus.RECOVERY_FAILED: (
        "ORCHESTRATOR_ERROR",
        "the server could not recover the run",
    ),
}

# So a run stands that was interrupted by a crash while it had started runs of its own.
_NOT_RESUMED: Final = (
    "the server gave the run up before its end: "
    "it could not go on with it after a restart"
)

NO_REASON: Final = "the server gave no reason"


def _error_code(number: int) -> str:
    if 0 <= number < len(_ERROR_CODES):
        return _ERROR_CODES[number]
    return f"CODE_{number}"
