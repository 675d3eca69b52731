"""StepflowClient: the executor over the Stepflow HTTP API.

Contract: it turns calls into requests and answers into values; it knows neither how
bytes travel (``transport``) nor what the fields are called (``wire``). One client
speaks to one life of one server: what it remembers of the flows it stored holds as long
as that server's store does. Tasks of several event loops, in several threads, may use one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any, Final, TypeVar, TypeVarTuple, Unpack

import anyio
import anyio.lowlevel
import anyio.to_thread
import msgspec

from . import flows, wire
from .errors import ApiError, ConnectionLostError, InvalidFlowError
from .executor import Diagnostic, FlowResult, FlowSource
from .transport import Response, Transport

__all__ = ["StepflowClient"]

T = TypeVar("T")
Args = TypeVarTuple("Args")

# Threads that look after workflow files.
_FILE_THREADS: Final = 4

# The server answers a waiting request at once for a run that is paused.
_STILL_RUNNING_PAUSE: Final = 0.1

# How many flows we remember having stored. A program that makes up flows as it goes must
# not make us grow with it; forgetting one costs two requests.
_REMEMBERED_FLOWS: Final = 1000


class StepflowClient:
    """Runs workflows on the server at the other end of ``transport``."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._flow_ids: dict[bytes | flows.FileKey, str] = {}
        self._lock = threading.Lock()

    async def run(
        self,
        flow: FlowSource,
        input: Any = None,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        variables: Mapping[str, Any] | None = None,
    ) -> FlowResult:
        """See :meth:`stepflow_runtime.StepflowRuntime.run`."""
        flow_id = await self.store_flow(flow)
        request = wire.run_request(
            flow_id, [input], overrides=overrides, variables=variables
        )
        answer = await self._ask(wire.decode_run, "POST", "/runs", request)
        if not answer.summary.has_ended:
            # The server waits 300 s and then answers with a run that goes on.
            try:
                answer = await self._wait_for_end(answer)
            except ConnectionLostError as exc:
                exc.unsent = False  # the run was sent, and taken
                raise
        return wire.flow_result(
            answer.summary, answer.results[0] if answer.results else None
        )

    async def store_flow(self, flow: FlowSource) -> str:
        """Store a workflow on the server, unless it is known to be there; return its id.

        :raises FlowDefinitionError: if the workflow cannot be read or is not valid
        :raises ApiError: if the server refuses it for another reason
        :raises ConnectionLostError: if there was no answer
        """
        if isinstance(flow, Mapping):
            loaded = flows.load(flow)
            key: bytes | flows.FileKey = sha256(loaded.encoded).digest()
            if (known := self._flow_ids.get(key)) is not None:
                return known
        else:
            key = await self._in_thread(flows.stat_key, flows.as_path(flow))
            if (known := self._flow_ids.get(key)) is not None:
                return known
            loaded = await self._in_thread(flows.load, flow)
        flow_id = await self._store(loaded)
        self._remember(key, flow_id)
        return flow_id

    async def _in_thread(
        self, function: Callable[[Unpack[Args]], T], *args: *Args
    ) -> T:
        """Call ``function`` where it may block.

        The program's own threads may all be waiting for this very call.
        """
        return await anyio.to_thread.run_sync(function, *args, limiter=_threads())

    async def aclose(self) -> None:
        """Close the way to the server; calls under way fail."""
        await self._transport.aclose()

    async def _store(self, flow: flows.Flow) -> str:
        """Have the flow analysed, then stored, in two requests.

        ``POST /flows`` would do both, but it takes every number of the document through a
        float: a step with the input ``duration_ms: 50`` is stored with ``50.0``, and a
        component that wants an integer fails. ``POST /blobs`` stores what it is given,
        and runs take its id; but it looks at nothing.
        """
        await self._analyse(flow)
        request = wire.blob_request(flow.encoded)
        return (
            await self._ask(wire.decode_stored_blob, "POST", "/blobs", request)
        ).blob_id

    async def _analyse(self, flow: flows.Flow) -> None:
        request = wire.flow_request(
            flows.without_retry_limits(flow.encoded), dry_run=True
        )
        response = await self._transport.request("POST", f"{wire.API}/flows", request)
        if response.status in (400, 422):
            raise InvalidFlowError(
                f"{flow.source}: {wire.fault_of(response.body).message}",
                source=flow.source,
            )
        findings = _decoded(wire.decode_stored_flow, response).findings()
        if any(each.level == "fatal" for each in findings):
            raise InvalidFlowError(
                _listed(flow.source, findings), source=flow.source, diagnostics=findings
            )

    async def _wait_for_end(self, answer: wire.RunAnswer) -> wire.RunAnswer:
        summary = answer.summary
        run = f"/runs/{summary.run_id}"
        while not summary.has_ended:
            await anyio.sleep(_STILL_RUNNING_PAUSE)
            details = await self._ask(
                wire.decode_run_details, "GET", f"{run}?wait=true"
            )
            summary = details.summary
        items = await self._ask(wire.decode_run_items, "GET", f"{run}/items")
        return wire.RunAnswer(summary=summary, results=items.results)

    async def _ask(
        self,
        decode: Callable[[bytes], T],
        method: str,
        path: str,
        body: bytes | None = None,
    ) -> T:
        return _decoded(
            decode, await self._transport.request(method, wire.API + path, body)
        )

    def _remember(self, key: bytes | flows.FileKey, flow_id: str) -> None:
        with self._lock:
            while len(self._flow_ids) >= _REMEMBERED_FLOWS:
                del self._flow_ids[next(iter(self._flow_ids))]
            self._flow_ids[key] = flow_id


_file_threads: anyio.lowlevel.RunVar[anyio.CapacityLimiter] = anyio.lowlevel.RunVar(
    "stepflow_runtime file threads"
)


def _threads() -> anyio.CapacityLimiter:
    """The limit of this event loop: a limiter belongs to one."""
    try:
        return _file_threads.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(_FILE_THREADS)
        _file_threads.set(limiter)
        return limiter


def _decoded(decode: Callable[[bytes], T], response: Response) -> T:
    """The value in an answer.

    :raises ApiError: if the answer is an error, or is not what was asked for: a server
        answers 200 without a body to a path that it does not know
    """
    if response.status >= 400:
        fault = wire.fault_of(response.body)
        message = fault.message or "no reason given"
        raise ApiError(
            f"the server answered {response.status}: {message}",
            status=response.status,
            code=fault.status or None,
        )
    try:
        return decode(response.body)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise ApiError(
            "the server's answer is not of the shape that this version knows "
            f"({response.content_type or 'no content type'}: {exc}); it supports "
            "Stepflow 0.13",
            status=response.status,
        ) from exc


def _listed(source: str, findings: Sequence[Diagnostic]) -> str:
    faults = [str(each) for each in findings if each.level in ("fatal", "error")]
    return "\n  ".join([f"{source} is not a valid workflow:", *faults])
