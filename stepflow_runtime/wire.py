"""What the server speaks, as msgspec Structs; no other module knows its field names.

A leaf, and forgiving: a field that the server adds is ignored, one that it leaves out
has a default, and a number without a name becomes a word that carries the number. The
shapes and the numbers of enums are those that a 0.13 server was seen to send; its
published schema differs (it promises names where numbers travel).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from .executor import Diagnostic, FlowError, FlowResult, FlowStatus

__all__ = [
    "API",
    "HEALTH",
    "ApiFault",
    "RunAnswer",
    "RunDetails",
    "RunItems",
    "StoredBlob",
    "StoredFlow",
    "blob_request",
    "decode_run",
    "decode_run_details",
    "decode_run_items",
    "decode_stored_blob",
    "decode_stored_flow",
    "encode",
    "fault_of",
    "flow_request",
    "flow_result",
    "run_request",
]

API: Final = "/api/v1"
HEALTH: Final = f"{API}/health"


def _simpler(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")


encode = msgspec.json.Encoder(enc_hook=_simpler).encode

RUNNING, COMPLETED, FAILED, CANCELLED, PAUSED, RECOVERY_FAILED = range(1, 7)
_ENDED = frozenset({COMPLETED, FAILED, CANCELLED, RECOVERY_FAILED})

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

_EXACT_INTEGERS = 2**53


class _WireDiagnostic(msgspec.Struct, frozen=True, rename="camel", gc=False):
    kind: str = ""
    level: int = 0
    formatted: str = ""
    path: str | None = None

    def translated(self) -> Diagnostic:
        level = _DIAGNOSTIC_LEVELS.get(self.level, f"level {self.level}")
        return Diagnostic(level, self.formatted, self.path, self.kind)


class _WireDiagnostics(msgspec.Struct, frozen=True, rename="camel", gc=False):
    diagnostics: tuple[_WireDiagnostic, ...] = ()


class StoredFlow(msgspec.Struct, frozen=True, rename="camel", gc=False):
    flow_id: str
    stored: bool = True
    diagnostics: _WireDiagnostics = _WireDiagnostics()

    def findings(self) -> list[Diagnostic]:
        return [each.translated() for each in self.diagnostics.diagnostics]


class StoredBlob(msgspec.Struct, frozen=True, rename="camel", gc=False):
    blob_id: str


class _Summary(msgspec.Struct, frozen=True, rename="camel", gc=False):
    run_id: str
    status: int = 0

    @property
    def has_ended(self) -> bool:
        return self.status in _ENDED


class _Item(msgspec.Struct, frozen=True, rename="camel", gc=False):
    status: int = 0
    output: Any = None
    error_message: str | None = None
    error_code: int = 0


class RunAnswer(msgspec.Struct, frozen=True, rename="camel", gc=False):
    """The answer to ``POST /runs``; ``results`` is filled only once the run ended."""

    summary: _Summary
    results: tuple[_Item, ...] = ()


class RunDetails(msgspec.Struct, frozen=True, rename="camel", gc=False):
    """The answer to ``GET /runs/{id}``."""

    summary: _Summary


class RunItems(msgspec.Struct, frozen=True, rename="camel", gc=False):
    """The answer to ``GET /runs/{id}/items``."""

    results: tuple[_Item, ...] = ()


class ApiFault(msgspec.Struct, frozen=True, rename="camel", gc=False):
    code: int = 0
    message: str = ""
    status: str = ""


class _ApiFaultBody(msgspec.Struct, frozen=True, rename="camel", gc=False):
    error: ApiFault


def _number(literal: str) -> int | float:
    """Give back as an ``int`` what the server's detour through protobuf made a float.

    Every number comes back with a fraction (``3`` as ``3.0``). Within 2**53 a float
    names one integer exactly; beyond it, and for the negative zero, it stays a float.
    """
    value = float(literal)
    if value.is_integer() and abs(value) <= _EXACT_INTEGERS:
        return int(value) if value or literal[0] != "-" else value
    return value


decode_stored_flow = msgspec.json.Decoder(StoredFlow).decode
decode_stored_blob = msgspec.json.Decoder(StoredBlob).decode
decode_run = msgspec.json.Decoder(RunAnswer, float_hook=_number).decode
decode_run_details = msgspec.json.Decoder(RunDetails).decode
decode_run_items = msgspec.json.Decoder(RunItems, float_hook=_number).decode
_decode_fault = msgspec.json.Decoder(_ApiFaultBody).decode


def flow_request(encoded_flow: bytes, *, dry_run: bool = False) -> bytes:
    """``POST /flows``: the document is spliced in as it was encoded, once."""
    tail = b',"dryRun":true}' if dry_run else b"}"
    return b'{"flow":' + encoded_flow + tail


def blob_request(encoded_flow: bytes) -> bytes:
    """``POST /blobs``: the same document as a blob of the kind that runs accept."""
    return b'{"blobType":"flow","data":' + encoded_flow + b"}"


def run_request(
    flow_id: str,
    inputs: Sequence[Any],
    *,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> bytes:
    """``POST /runs`` that is answered when the run has ended.

    The server wants overrides under ``steps`` and each value under ``value``; given any
    other way it answers 400 or ignores them.
    """
    body: dict[str, Any] = {"flowId": flow_id, "input": inputs, "wait": True}
    if overrides:
        for step, value in overrides.items():
            if not isinstance(value, Mapping):
                raise TypeError(
                    f"overrides[{step!r}] must be a mapping of the step's properties, like "
                    f'{{"input": ...}}, not {type(value).__name__}'
                )
        steps = {step: {"value": value} for step, value in overrides.items()}
        body["overrides"] = {"steps": steps}
    if variables:
        body["variables"] = variables
    return encode(body)


def fault_of(body: bytes) -> ApiFault:
    """The server's error, or an ``ApiFault`` that carries the plain text it sent."""
    try:
        return _decode_fault(body).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ApiFault(message=body.decode(errors="replace").strip())


def flow_result(summary: _Summary, item: _Item | None) -> FlowResult:
    """What one item of an ended run came to.

    The items of a cancelled run stay "running" for ever, so the run's own status has
    the last word on them.
    """
    status = (
        item.status if item is not None and item.status in _ENDED else summary.status
    )
    if item is not None and status == COMPLETED:
        return FlowResult(
            status=FlowStatus.SUCCESS, run_id=summary.run_id, output=item.output
        )
    return FlowResult(
        status=FlowStatus.FAILED, run_id=summary.run_id, error=_flow_error(status, item)
    )


def _flow_error(status: int, item: _Item | None) -> FlowError:
    if item is not None and item.error_message:
        return FlowError(_error_code(item.error_code), item.error_message)
    if status == CANCELLED:
        return FlowError("CANCELLED", "the run was cancelled")
    if status == RECOVERY_FAILED:
        return FlowError("ORCHESTRATOR_ERROR", "the server could not recover the run")
    return FlowError("UNSPECIFIED", "the server gave no reason")


def _error_code(number: int) -> str:
    if 0 <= number < len(_ERROR_CODES):
        return _ERROR_CODES[number]
    return f"CODE_{number}"
