"""Much at once: batches, large values, long streams of events.

One server for both sides; theirs is the client on a channel to it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

from anyio.from_thread import BlockingPortal

from stepflow_runtime import FlowId, StepflowRuntime

from .. import peers
from ..measure import Case, Plan, Row, Sample, against, in_turns, row

__all__ = ["CASES", "Pair", "our_batch", "pair", "their_batch"]


class Pair:
    """A runtime and the official client on its server, in one event loop."""

    def __init__(
        self,
        portal: BlockingPortal,
        runtime: StepflowRuntime,
        client: Any,
        flow_id: FlowId,
    ) -> None:
        self.portal = portal
        self.runtime = runtime
        self.client = client
        self.flow_id = flow_id


@contextmanager
def pair() -> Iterator[Pair]:
    """The client has the limits of its messages raised, as far as its API goes."""
    with peers.lane("asyncio") as portal:
        start = StepflowRuntime.start(log_config=peers.QUIET)
        with portal.wrap_async_context_manager(start) as runtime:
            client = portal.call(_connect, runtime.port)
            flow_id = portal.call(runtime.store_flow, peers.FLOW)
            try:
                yield Pair(portal, runtime, client, flow_id)
            finally:
                portal.call(client.close)


async def _connect(port: int) -> Any:
    from stepflow_py import StepflowClient

    options = [
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
    ]
    return StepflowClient.connect(f"127.0.0.1:{port}", options=options)


# -- batches ---------------------------------------------------------------------------


async def our_batch(both: Pair, size: int) -> Sample:
    """Items per second, from the call to the results as Python values."""
    inputs = [{"n": number} for number in range(size)]
    began = time.perf_counter()
    batch_id = await both.runtime.submit_batch(both.flow_id, inputs)
    _, results = await both.runtime.get_batch(batch_id)
    took = time.perf_counter() - began
    assert results[-1].output == inputs[-1]
    return Sample(size / took, {"ms": 1e3 * took})


async def their_batch(both: Pair, size: int, *, as_values: bool = False) -> Sample:
    """The same, to the results as messages, or as Python values."""
    from google.protobuf.json_format import MessageToDict

    inputs = [{"n": number} for number in range(size)]
    began = time.perf_counter()
    answer = await both.client.run(both.flow_id, inputs)
    results = answer.results
    if as_values:
        results = [MessageToDict(each.output) for each in results]
    took = time.perf_counter() - began
    assert len(results) == size
    return Sample(size / took, {"ms": 1e3 * took})


def batch(plan: Plan) -> list[Row]:
    ours, messages, values = "ours", "official, as messages", "official, as values"
    with pair() as both:
        call = both.portal.call
        found = in_turns(
            {
                ours: partial(call, our_batch, both, plan.batch),
                messages: partial(call, their_batch, both, plan.batch),
                values: partial(
                    call, partial(their_batch, both, plan.batch, as_values=True)
                ),
            },
            plan.rounds,
        )
    case = f"batch of {plan.batch:,}"
    return [
        row(
            case,
            ours,
            "items/s",
            found[ours],
            against(found, ours, messages, "at least", 1.0),
            against(found, ours, values),
            note="results are Python values",
        ),
        row(case, messages, "items/s", found[messages]),
        row(case, values, "items/s", found[values]),
    ]


# -- large values ----------------------------------------------------------------------


def _text(size: int) -> dict[str, Any]:
    return {"text": "x" * size}


def _records(size: int) -> dict[str, Any]:
    """Some 56 bytes each."""
    return {
        "rows": [
            {"id": number, "name": f"row {number}", "value": number * 0.5 + 0.25}
            for number in range(size // 53)
        ]
    }


async def _our_megabytes(both: Pair, value: Any, megabytes: int) -> Sample:
    began = time.perf_counter()
    result = await both.runtime.run(both.flow_id, value)
    took = time.perf_counter() - began
    assert result.unwrap().keys() == value.keys()
    return Sample(2 * megabytes / took, {"ms": 1e3 * took})


async def _their_megabytes(both: Pair, value: Any, megabytes: int) -> Sample:
    from google.protobuf.json_format import MessageToDict

    began = time.perf_counter()
    answer = await both.client.run(both.flow_id, value)
    output = MessageToDict(answer.results[0].output)
    took = time.perf_counter() - began
    assert output.keys() == value.keys()
    return Sample(2 * megabytes / took, {"ms": 1e3 * took})


def _bare_megabytes(both: Pair, value: Any, megabytes: int) -> Sample:
    """The request made before the clock starts, the answer's bytes read by nobody."""
    body = peers.run_body(both.flow_id) | {"input": [value], "timeoutSecs": 60}
    request = peers.post("/api/v1/runs", json.dumps(body).encode())
    assert both.runtime.port is not None
    with peers.connect(both.runtime.port) as connection:
        began = time.perf_counter()
        peers.exchange(connection, request)
        took = time.perf_counter() - began
    return Sample(2 * megabytes / took, {"ms": 1e3 * took})


def payload(plan: Plan) -> list[Row]:
    rows: list[Row] = []
    for megabytes in plan.megabytes:
        for name, make in (("text", _text), ("records", _records)):
            # Of records a server makes 10 MB in a second.
            rounds = (
                plan.rounds if megabytes < 10 or make is _text else plan.slow_payloads
            )
            if rounds:
                case = f"payload, {megabytes} MB of {name}"
                value = make(megabytes * 1_000_000)
                with pair() as both:
                    rows += _payload(case, both, value, megabytes, rounds)
    return rows


def _payload(
    case: str, both: Pair, value: Any, megabytes: int, rounds: int
) -> list[Row]:
    """All sides, unless theirs is refused."""
    ours, official, limit = "ours", "official", "limit"
    call = both.portal.call
    sides: dict[str, Callable[[], Sample]] = {
        ours: partial(call, _our_megabytes, both, value, megabytes),
        official: partial(call, _their_megabytes, both, value, megabytes),
        limit: partial(_bare_megabytes, both, value, megabytes),
    }
    refusal = call(_refusal, both.client.run(both.flow_id, value))
    if refusal:
        del sides[official]
    found = in_turns(sides, rounds, warm=rounds > 1)
    checks = [against(found, ours, limit)]
    if not refusal:
        checks.insert(0, against(found, ours, official, "at least", 1.5))
    unit = "MB/s, in and out"
    return [
        row(case, ours, unit, found[ours], *checks),
        row(
            case,
            official,
            unit,
            found.get(official, []),
            note=f"refused: {refusal}" if refusal else "",
        ),
        row(case, limit, unit, found[limit]),
    ]


async def _refusal(call: Awaitable[object]) -> str:
    """What is said to a call that is too large, whatever the client allows."""
    import grpc

    try:
        await call
    except grpc.aio.AioRpcError as exc:
        return str(exc.details())
    return ""


# -- events ----------------------------------------------------------------------------


async def _our_events(both: Pair, run_id: str) -> Sample:
    count = 0
    began = time.perf_counter()
    async for _ in both.runtime.events(run_id):
        count += 1
    return Sample(count / (time.perf_counter() - began), {"events": count})


async def _their_events(both: Pair, run_id: str) -> Sample:
    count = 0
    began = time.perf_counter()
    async for _ in both.client.status_events(run_id):
        count += 1
    return Sample(count / (time.perf_counter() - began), {"events": count})


def events(plan: Plan) -> list[Row]:
    """All events of a batch that is over, from the server's journal."""
    ours, official = "ours", "official"
    with pair() as both:
        call = both.portal.call
        inputs = range(plan.batch // 5)
        run_id = call(both.runtime.submit_batch, both.flow_id, inputs)
        call(both.runtime.get_batch, run_id)
        found = in_turns(
            {
                ours: partial(call, _our_events, both, run_id),
                official: partial(call, _their_events, both, run_id),
            },
            plan.rounds,
        )
    check = against(found, ours, official, "at least", 1.0)
    return [
        row("events", ours, "events/s", found[ours], check),
        row("events", official, "events/s", found[official]),
    ]


CASES: Final = (
    Case("batch", "a batch, its results included", batch),
    Case("payload", "large inputs and outputs", payload),
    Case("events", "the events of a large batch", events),
)
