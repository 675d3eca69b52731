"""A web application with a Stepflow server in it: uvicorn app:app"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import anyio
import msgspec
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field

from stepflow_runtime import (
    FlowFailedError,
    FlowResult,
    InvalidRequestError,
    NotFoundError,
    RestartPolicy,
    RunTimeoutError,
    RuntimeState,
    ServerError,
    StepflowError,
    StepflowRuntime,
)

NAP = Path(__file__).with_name("nap.yaml")
LONGEST_WAIT = 30.0


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, StepflowRuntime]]:
    async with StepflowRuntime.start(
        restart_policy=RestartPolicy.ON_FAILURE
    ) as runtime:
        yield {"stepflow": runtime}


app = FastAPI(lifespan=lifespan)


def the_runtime(request: Request) -> StepflowRuntime:
    runtime: StepflowRuntime = request.state.stepflow
    return runtime


Runtime = Annotated[StepflowRuntime, Depends(the_runtime)]


class Nap(BaseModel):
    name: str
    duration_ms: Annotated[int, Field(ge=0)] = 10
    where: str | None = "bed"

    def as_arguments(self) -> dict[str, Any]:
        known = {} if self.where is None else {"where": self.where}
        return {"input": self.model_dump(exclude={"where"}), "variables": known}


# -- run, and answer with the output ---------------------------------------------------


@app.post("/naps")
async def take_a_nap(nap: Nap, request: Request, runtime: Runtime) -> Any:
    result = await run_while_connected(request, runtime, nap)
    return result.unwrap() if result is not None else Response(status_code=499)


async def run_while_connected(
    request: Request, runtime: StepflowRuntime, nap: Nap
) -> FlowResult | None:
    """Run the workflow. If the client goes away, the run is cancelled: None."""
    outcome: FlowResult | StepflowError | None = None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(cancel_when_gone, request, tasks.cancel_scope)
        try:
            outcome = await runtime.run(NAP, **nap.as_arguments(), timeout=LONGEST_WAIT)
        except StepflowError as exc:  # raised below, outside of the task group
            outcome = exc
        tasks.cancel_scope.cancel()
    if isinstance(outcome, StepflowError):
        raise outcome
    return outcome


async def cancel_when_gone(request: Request, scope: anyio.CancelScope) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


# -- submit, and follow ----------------------------------------------------------------


@app.post("/runs", status_code=202)
async def submit(nap: Nap, runtime: Runtime) -> dict[str, str]:
    return {"run_id": await runtime.submit(NAP, **nap.as_arguments())}


@app.get("/runs/{run_id}")
async def output(run_id: str, runtime: Runtime) -> Any:
    """Wait for the run's end. The run is not this request's, and goes on in any case."""
    result = await runtime.get_result(run_id, timeout=LONGEST_WAIT)
    return result.unwrap()


@app.get("/runs/{run_id}/events")
async def events(run_id: str, runtime: Runtime) -> StreamingResponse:
    """What happens in a run, as server-sent events."""
    await runtime.get_run(run_id)  # who asks for what is not there hears it now
    return StreamingResponse(
        server_sent(runtime, run_id), media_type="text/event-stream"
    )


async def server_sent(runtime: StepflowRuntime, run_id: str) -> AsyncIterator[bytes]:
    async with aclosing(runtime.events(run_id)) as following:
        async for event in following:
            kind, data = type(event).__name__.encode(), msgspec.json.encode(event)
            yield b"event: %b\ndata: %b\n\n" % (kind, data)


# -- what becomes of failures ----------------------------------------------------------


def problem(status: int, detail: str) -> JSONResponse:
    headers = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse({"detail": detail}, status, headers)


@app.exception_handler(FlowFailedError)
async def failed(request: Request, exc: FlowFailedError) -> JSONResponse:
    # str(exc) has log lines and a traceback, too: they are for your own log.
    error = exc.result.error
    return problem(422, f"{error.code}: {error.message}" if error else "cancelled")


@app.exception_handler(InvalidRequestError)
@app.exception_handler(NotFoundError)
async def unknown(request: Request, exc: StepflowError) -> JSONResponse:
    return problem(404, "there is no such run")


@app.exception_handler(RunTimeoutError)
async def too_long(request: Request, exc: RunTimeoutError) -> JSONResponse:
    return problem(504, "the run took too long")


@app.exception_handler(ServerError)  # crashed, lost, being stopped
async def unavailable(request: Request, exc: ServerError) -> JSONResponse:
    return problem(503, "no workflow server at the moment")


# -- how it stands ---------------------------------------------------------------------


@app.get("/ready")
async def ready(runtime: Runtime, response: Response) -> dict[str, str]:
    """503 while the server is being restarted."""
    if runtime.state is not RuntimeState.READY:
        response.status_code = 503
    return {"state": runtime.state.value}


@app.get("/live")
async def live(runtime: Runtime, response: Response) -> dict[str, str]:
    """503 when the server has been given up: only a new process has another."""
    if runtime.state.is_final:
        response.status_code = 503
    return {"state": runtime.state.value}
