"""Serving the functions of a job: tasks are pulled, handled and reported as stepflow-py does.

Contract: a task that was taken is claimed at once, and told of until it is over, so that the
server notices within seconds when this process is gone. What a function does, whatever it
raises, ends its own step and nothing else. Only the pulling is our own: stepflow-py's keeps
every task for ever, takes 4 MiB at most, and shares a connection with its answers, on which
the server's small packets wait for each other, 40 ms a step.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import uuid
from collections.abc import Callable
from typing import Any, Final

import grpc.aio
import msgspec
from stepflow_py.proto import (
    CompleteTaskRequest,
    ListComponentsResult,
    PullTasksRequest,
    TaskAssignment,
    TaskError,
)
from stepflow_py.proto.common_pb2 import TASK_ERROR_CODE_INVALID_INPUT
from stepflow_py.worker import StepflowServer
from stepflow_py.worker.task_handler import (
    build_component_info_list,
    complete_task_with_retry,
    handle_task,
)

from ..components import declared
from . import loading, printing
from .calling import Call
from .job import Job
from .pulling import pull

__all__ = ["work"]

# Each costs a heartbeat a second, also while it waits for a thread.
_MOST_CLAIMED: Final = 256

_TOO_DEEP: Final = (
    "the input has too many containers inside one another for a worker to read (some thirty "
    "are sure to arrive): flatten it, or send the inner part as a string of JSON"
)

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
)


def work(told: str, ready: int | None) -> int:
    """Be the worker of a job, until the server is gone; return the exit code.

    :param ready: a descriptor that is written to when the server knows us
    """
    job = msgspec.json.decode(told, type=Job)
    faulthandler.enable(all_threads=False)
    printing.set_up()
    try:
        server = _server(job)
    except BaseException as exc:  # noqa: BLE001 - a script may well call exit()
        printing.report(exc)
        return 1
    try:
        asyncio.run(_serve(server, ready))
    except grpc.aio.AioRpcError:
        return 0  # the server is gone, or will be
    return 0


def _server(job: Job) -> StepflowServer:
    server = StepflowServer(include_builtins=False)
    loading.enter(job)
    with loading.under_way():
        functions = {place.name: loading.load(place) for place in job.places}
    for name, function in functions.items():
        _register(server, name, function)
    return server


def _register(server: StepflowServer, name: str, function: Callable[..., Any]) -> None:
    told = declared(function)
    call = Call(name, function, told.inputs)

    async def component(input: Any) -> Any:
        return await call(input)

    # By annotations that are no strings: stepflow-py takes them as they are.
    component.__annotations__ = {"input": Any, "return": Any}
    server.component(component, id=name, description=_description(function))
    # In the place of its methods, which would ask the annotations of our function.
    vars(server.get_component(name)).update(
        input_schema=lambda: told.input_schema,
        output_schema=lambda: told.output_schema,
    )


def _description(function: Callable[..., Any]) -> str:
    import inspect

    return inspect.getdoc(function) or ""


async def _serve(server: StepflowServer, ready: int | None) -> None:
    url, queue = os.environ["STEPFLOW_TASKS_URL"], os.environ["STEPFLOW_QUEUE_NAME"]
    worker = str(uuid.uuid4())
    turns = asyncio.Semaphore(_MOST_CLAIMED)
    under_way: set[asyncio.Task[None]] = set()
    async with grpc.aio.insecure_channel(url, options=_OPTIONS) as channel:
        request = PullTasksRequest(queue_name=queue, worker_id=worker)
        stream = pull(channel, request)
        await stream.initial_metadata()
        if ready is not None:
            os.write(ready, b"1")
            os.close(ready)
        async for task in stream:
            if task.HasField("list_components"):
                handling = _tell_components(server, task)
            elif task.HasField("execute"):
                await turns.acquire()  # handle_task gives it back
                handling = handle_task(server, task, turns, worker, queue)
            else:
                handling = _refuse(task)
            handled = asyncio.create_task(handling)
            under_way.add(handled)
            handled.add_done_callback(under_way.discard)


async def _tell_components(server: StepflowServer, task: TaskAssignment) -> None:
    known = ListComponentsResult(components=build_component_info_list(server))
    await _complete(task, list_components=known)


async def _refuse(task: TaskAssignment) -> None:
    error = TaskError(code=TASK_ERROR_CODE_INVALID_INPUT, message=_TOO_DEEP)
    await _complete(task, error=error)


async def _complete(task: TaskAssignment, **outcome: Any) -> None:
    request = CompleteTaskRequest(task_id=task.task_id, **outcome)
    url = task.context.orchestrator_service_url
    await complete_task_with_retry(url, request, task.task_id)
