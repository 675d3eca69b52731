"""The calls, on scripted answers: what is sent, how often, and what answers become."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import anyio
import msgspec
import pytest

from stepflow_runtime import (
    AccessDeniedError,
    ApiError,
    ConflictError,
    FlowId,
    FlowStatus,
    InvalidFlowError,
    InvalidRequestError,
    NotFoundError,
    RunStatus,
    RunTimeoutError,
    ServerFaultError,
    StepflowError,
    UnrepresentableValueError,
    UnsupportedServerError,
)
from stepflow_runtime.api import ApiExecutor
from stepflow_runtime.crew import Crew
from stepflow_runtime.transport import NO_HEADERS, Heir, Response, Stream

from .conftest import ECHO, each_backend

pytestmark = [pytest.mark.anyio, each_backend]

Answer = Response | bytes | Exception


class Scripted(ApiExecutor):
    """Gives its answers in turn; an exception is raised."""

    def __init__(self, *answers: Answer) -> None:
        super().__init__(Crew())
        self.answers = list(answers)
        self.requests: list[str] = []
        self.bodies: list[Any] = []

    @property
    def _generation(self) -> int | None:
        return None

    async def _request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        headers: Mapping[str, str] = NO_HEADERS,
        held: float = 0.0,
        heir: Heir | None = None,
        repeatable: bool = False,
        generation: int | None = None,
    ) -> Response:
        self.requests.append(f"{method} {path.removeprefix('/api/v1')}")
        self.bodies.append(None if body is None else msgspec.json.decode(body))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, bytes):
            return Response(200, "application/json", answer)
        return answer

    async def _open_stream(
        self, path: str, *, generation: int | None = None
    ) -> tuple[Stream, int | None]:
        raise AssertionError("nothing here follows events")

    @property
    def _is_gone(self) -> bool:
        return False

    def _gone(self) -> StepflowError:
        raise AssertionError


STORED = (b'{"flowId":"f"}', b'{"blobId":"f"}')
RUNNING = b'{"summary":{"runId":"r","status":1}}'
ENDED = b'{"summary":{"runId":"r","status":2},"results":[{"status":2}]}'
HEALTHY = b'{"status":"healthy","version":"0.99.0"}'


def refusal(status: int, code: str = "", message: str = "words") -> Response:
    error = {"error": {"code": status, "message": message, "status": code}}
    return Response(status, "application/json", msgspec.json.encode(error))


# -- flows -----------------------------------------------------------------------------


async def test_a_flow_is_stored_once() -> None:
    executor = Scripted(*STORED, ENDED, ENDED, *STORED, ENDED)
    for flow in (ECHO, dict(ECHO), {**ECHO, "name": "other"}):
        await executor.run(flow)
    assert executor.requests == [
        *("POST /flows", "POST /blobs", "POST /runs"),
        "POST /runs",
        *("POST /flows", "POST /blobs", "POST /runs"),
    ]


async def test_a_flow_that_the_server_has_lost_is_stored_again_once() -> None:
    lost = refusal(404, "NOT_FOUND", "flow 'f' not found")
    executor = Scripted(*STORED, ENDED, lost, *STORED, ENDED)
    await executor.run(ECHO)
    assert (await executor.run(ECHO)).is_success
    assert executor.requests[3:] == [
        *("POST /runs", "POST /flows", "POST /blobs", "POST /runs")
    ]
    executor = Scripted(*STORED, lost, *STORED, lost, *STORED, lost)
    with pytest.raises(NotFoundError) as caught:
        await executor.run(ECHO)  # something else is wrong
    assert caught.value.flow_id == "f"
    executor = Scripted(lost)
    with pytest.raises(NotFoundError):
        await executor.run(FlowId("f"))  # nobody knows what to store


async def test_a_flow_id_is_run_as_it_is() -> None:
    executor = Scripted(ENDED)
    await executor.run(FlowId("abc"), 1)
    assert executor.bodies[0]["flowId"] == "abc"


@pytest.mark.parametrize("flow", [{}, {"steps": []}, {"name": "x", "steps": []}])
async def test_an_empty_workflow_is_refused(flow: dict[str, Any]) -> None:
    """The server would run it, and return null."""
    with pytest.raises(InvalidFlowError, match="neither steps nor an output"):
        await Scripted(STORED[0]).run(flow)
    verdict = await Scripted(STORED[0]).validate(flow)
    assert not verdict.is_valid


async def test_what_a_proxy_refuses_says_nothing_of_the_workflow() -> None:
    page = Response(400, "text/html", b"<html>" + b"x" * 5000)
    with pytest.raises(InvalidRequestError, match="400 to POST /flows: <html>") as e:
        await Scripted(page).validate(ECHO)
    assert len(str(e.value)) < 1200
    plain = Response(422, "text/plain", b"Failed to deserialize the JSON body")
    assert not (await Scripted(plain).validate(ECHO)).is_valid


async def test_what_is_no_workflow_at_all_is_found_invalid() -> None:
    verdict = await Scripted(
        refusal(400, "INVALID_ARGUMENT", "missing field `id`")
    ).validate(ECHO)
    assert not verdict.is_valid
    assert verdict.errors[0].message == "missing field `id`"


# -- waiting ---------------------------------------------------------------------------


async def test_a_paused_run_is_asked_for_with_pauses() -> None:
    paused = RUNNING.replace(b"1", b"5")
    ended = RUNNING.replace(b"1", b"2")
    items = b'{"results":[{"status":2,"output":1.0}]}'
    executor = Scripted(*STORED, paused, paused, paused, ended, items)
    began = anyio.current_time()
    assert (await executor.run(ECHO)).output == 1
    assert anyio.current_time() - began >= 0.2


async def test_a_short_run_is_one_request_that_lets_the_server_wait() -> None:
    executor = Scripted(*STORED, ENDED)
    await executor.run(ECHO, 7)
    assert executor.bodies[-1] == {
        "flowId": "f",
        "input": [7],
        "wait": True,
        "timeoutSecs": 1,
    }


async def test_submitting_does_not_wait() -> None:
    executor = Scripted(*STORED, RUNNING)
    assert await executor.submit(ECHO) == "r"
    assert executor.bodies[-1] == {"flowId": "f", "input": [None]}


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), True, "1"])
async def test_a_timeout_that_cannot_be_is_refused_by_name(timeout: Any) -> None:
    executor = Scripted()
    for call in (
        lambda: executor.run(ECHO, timeout=timeout),
        lambda: executor.submit(ECHO, timeout=timeout),
        lambda: executor.submit_batch(ECHO, [1], timeout=timeout),
        lambda: executor.get_result("r", timeout=timeout),
        lambda: executor.get_batch("r", timeout=timeout),
    ):
        with pytest.raises((ValueError, TypeError), match="timeout must be"):
            await call()
    assert not executor.requests


async def test_a_timeout_names_the_run_if_it_is_known() -> None:
    class Slow(Scripted):
        async def _request(self, method: str, *args: Any, **options: Any) -> Response:
            if self.answers:
                return await super()._request(method, *args, **options)
            await anyio.sleep_forever()
            raise AssertionError

    with pytest.raises(RunTimeoutError, match="run r is being cancelled") as caught:
        await Slow(*STORED, RUNNING).run(ECHO, timeout=0.05)
    assert caught.value.run_id == "r" and isinstance(caught.value, TimeoutError)
    with pytest.raises(RunTimeoutError, match="the run is being") as caught:
        await Slow(*STORED).run(ECHO, timeout=0.05)
    assert caught.value.run_id is None
    with pytest.raises(RunTimeoutError, match="run r is not over yet"):
        await Slow().get_result("r", timeout=0.05)


async def test_a_run_that_is_over_is_not_cancelled() -> None:
    """The server would mark it as cancelled."""
    executor = Scripted(ENDED)
    assert (await executor.cancel("r")).status is RunStatus.COMPLETED
    assert executor.requests == ["GET /runs/r"]


# -- answers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (302, ApiError),
        (400, InvalidRequestError),
        (401, AccessDeniedError),
        (403, AccessDeniedError),
        (404, NotFoundError),
        (407, AccessDeniedError),
        (409, ConflictError),
        (412, ConflictError),
        (413, InvalidRequestError),
        (422, InvalidRequestError),
        (429, ServerFaultError),
        (500, ServerFaultError),
        (503, ServerFaultError),
    ],
)
async def test_each_refusal_has_its_type(status: int, kind: type[ApiError]) -> None:
    with pytest.raises(ApiError, match=f"{status} to GET /runs/r: words") as caught:
        await Scripted(refusal(status, "CODE")).get_run("r")
    error = caught.value
    assert type(error) is kind
    assert (error.status, error.code, error.reason) == (status, "CODE", "words")
    assert (error.run_id, error.flow_id, error.blob_id) == ("r", None, None)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Response(404, "", b""), "404 .* there is nothing of this id"),
        (Response(500, "", b""), "500 .* no reason given"),
        (Response(415, "text/plain", b"plain words\n"), "415 .* plain words"),
        (Response(502, "text/html", b"<html>\xff"), "502 .* <html>"),
        (Response(400, "application/json", b'{"error":"odd"}'), '400 .* {"error"'),
        (Response(400, "application/json", b"null"), "400 .* null"),
    ],
)
async def test_refusals_of_every_form_have_words(answer: Response, words: str) -> None:
    with pytest.raises(ApiError, match=words):
        await Scripted(answer).get_blob("b")


@pytest.mark.parametrize(
    "answer",
    [
        Response(200, "application/grpc", b""),
        Response(200, "text/html", b"<html>a proxy's page"),
        Response(200, "application/json", b'{"runId":"r","status":"completed"}'),
        Response(200, "application/json", b'{"summary":{"runId":"r","status":"done"}}'),
        Response(200, "application/json", b"\xff"),
        Response(200, "application/json", b"[" * 100_000 + b"]" * 100_000),
        Response(
            200, "application/json", b'{"summary":{"runId":"r"},"x":' + b"[" * 9999
        ),
        Response(204, "", b""),
    ],
)
async def test_an_answer_of_another_shape_names_what_was_found(
    answer: Response,
) -> None:
    executor = Scripted(answer, HEALTHY)
    with pytest.raises(UnsupportedServerError, match=r"0\.99\.0.*0\.12 and 0\.13"):
        await executor.get_run("r")
    with pytest.raises(UnsupportedServerError, match="does not tell its version"):
        await Scripted(answer, Response(200, "", b"")).get_run("r")


async def test_a_number_beyond_all_floats_is_no_output() -> None:
    for number in (b"1e999", b"-1e999", b"9" * 400 + b".0"):
        results = b'"results":[{"status":2,"output":%s}]' % number
        answer = b'{"summary":{"runId":"r","status":2},%s}' % results
        with pytest.raises(UnsupportedServerError, match="Number out of range"):
            await Scripted(answer, HEALTHY).run(FlowId("0" * 64))


async def test_a_blob_whose_bytes_are_no_json_is_refused() -> None:
    first = b'{"blobType":"data","data":9007199254740993}'
    for second in (b"9007199254740993 x", b"\xff", b"[" * 9999, b""):
        with pytest.raises(UnsupportedServerError, match="not of the shape"):
            await Scripted(first, second, HEALTHY).get_blob("b")


async def test_results_that_are_gone_are_not_made_up() -> None:
    """So a server answers that was restarted between the two requests."""
    details = b'{"summary":{"runId":"r","status":2,"items":{"total":1}}}'
    for call in ("get_result", "get_batch"):
        executor = Scripted(details, b'{"results":[]}', refusal(404, "NOT_FOUND"))
        with pytest.raises(NotFoundError):
            await getattr(executor, call)("r")


async def test_a_batch_has_a_result_for_each_input_whatever_the_server_lists() -> None:
    summary = {"runId": "b", "status": 4, "items": {"total": 3}}
    details = msgspec.json.encode({"summary": summary})
    items = msgspec.json.encode(
        {"results": [{"itemIndex": 2, "status": 2, "output": 5.0}, {"status": 1}]}
    )
    executor = Scripted(details, items, details)
    _, results = await executor.get_batch("b")
    assert [each.item_index for each in results] == [0, 1, 2]
    assert [each.status for each in results] == [
        *(FlowStatus.FAILED, FlowStatus.FAILED, FlowStatus.SUCCESS)
    ]
    assert results[2].output == 5
    assert results[1].error is not None and results[1].error.code == "CANCELLED"


# -- arguments -------------------------------------------------------------------------

Call = Callable[[Scripted], Awaitable[object]]


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda e: e.submit_batch(ECHO, []), ValueError, "inputs is empty"),
        (lambda e: e.submit_batch(ECHO, "ab"), TypeError, "inputs must be a list"),
        (lambda e: e.submit_batch(ECHO, {"a": 1}), TypeError, "inputs must be a list"),
        (lambda e: e.submit_batch(ECHO, 3), TypeError, "inputs must be a list"),
        (lambda e: e.submit_batch(ECHO, [1], 0), ValueError, "max_concurrent must be"),
        (lambda e: e.submit_batch(ECHO, [1], 2**32), ValueError, "max_concurrent"),
        (lambda e: e.submit_batch(ECHO, [1], True), TypeError, "max_concurrent"),
        (lambda e: e.submit_batch(ECHO, [1], 1.5), TypeError, "max_concurrent"),
        (lambda e: e.run(ECHO, 1, [1]), TypeError, "overrides must be a mapping"),
        (lambda e: e.run(ECHO, 1, {"a": 5}), TypeError, r"overrides\['a'\] must be"),
        (lambda e: e.run(ECHO, variables=[1]), TypeError, "variables must be"),
        (lambda e: e.get_run(""), ValueError, "run_id is empty"),
        (lambda e: e.get_run(3), TypeError, "run_id must be a string"),
        (lambda e: e.cancel(None), TypeError, "run_id must be a string"),
        (lambda e: e.get_blob(b"x"), TypeError, "blob_id must be a string"),
        (lambda e: e.list_runs(status="failed"), TypeError, "status must be"),
        (lambda e: e.list_runs(limit=-1), ValueError, "limit must be"),
        (lambda e: e.list_runs(status=RunStatus.UNKNOWN), ValueError, "UNKNOWN"),
        (lambda e: e.list_runs(root_run_id="zz"), ValueError, "root_run_id is not"),
        (lambda e: e.list_runs(parent_run_id=""), ValueError, "parent_run_id is"),
        (lambda e: e.list_runs(flow_name=5), TypeError, "flow_name must be"),
        (lambda e: e.run(ECHO, variables_from_env="no"), TypeError, "True or False"),
        (lambda e: e.get_run(".."), ValueError, "run_id must be an id"),
        (lambda e: e.get_run("\ud800"), ValueError, "run_id has a lone surrogate"),
        (lambda e: e.run(""), ValueError, "flow is empty"),
        (lambda e: e.run(ECHO, timeout=10**400), ValueError, "timeout must be"),
        (lambda e: e.get_steps("r", item_index=-1), ValueError, "item_index must be"),
        (lambda e: e.put_blob(b"x", filename=""), ValueError, "filename is empty"),
        (lambda e: e.put_blob(b"x", filename="a\r\nb"), ValueError, "printable ASCII"),
        (lambda e: e.put_blob(None), UnrepresentableValueError, "does not store null"),
        (lambda e: e.run(ECHO, 2**53 + 1), UnrepresentableValueError, "lose digits"),
        (
            lambda e: e.run(ECHO, variables={"v": [float("nan")]}),
            UnrepresentableValueError,
            r"variables \$\.v\[0\]",
        ),
        (
            lambda e: e.run(ECHO, None, {"a": {"input": {"x": b""}}}),
            UnrepresentableValueError,
            r"overrides \$\.a\.input\.x",
        ),
        (
            lambda e: e.submit_batch(ECHO, [1, {"x": {1: 2}}]),
            UnrepresentableValueError,
            r"inputs \$\[1\]\.x",
        ),
    ],
)
async def test_what_cannot_work_is_refused_by_name_before_anything_is_sent(
    call: Call, kind: type[Exception], words: str
) -> None:
    executor = Scripted()
    with pytest.raises(kind, match=words):
        await call(executor)
    assert not executor.requests


async def test_an_id_is_one_part_of_a_path_whatever_is_in_it() -> None:
    executor = Scripted(ENDED)
    await executor.get_run("../flows?x=1#y z")
    assert executor.requests == ["GET /runs/..%2Fflows%3Fx%3D1%23y%20z"]
