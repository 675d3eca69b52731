"""A block that has to be left in the task that entered it."""

from __future__ import annotations

import os
from contextlib import AbstractAsyncContextManager, suppress
from types import TracebackType
from typing import TypeVar

import anyio

from ..server.supervisor import Supervisor

__all__ = ["SameTask"]

T = TypeVar("T")

_LEFT_ELSEWHERE = (
    "this runtime was entered in one task and is left in another, as some test frameworks do "
    "with fixtures; the server was stopped. A block of structured concurrency belongs to one "
    "task: where there are two, host the runtime in a thread, by `runtime = await "
    "StepflowRuntime.start_async(...)` and `await runtime.stop_async()`"
)


class SameTask(AbstractAsyncContextManager[T]):
    """Sees to it that a server is stopped even where its block cannot be left."""

    def __init__(
        self, block: AbstractAsyncContextManager[T], supervisor: Supervisor
    ) -> None:
        self._block = block
        self._supervisor = supervisor

    async def __aenter__(self) -> T:
        # The coroutine itself, and not its id, which another one may get after its end.
        self._entered_by = os.getpid()
        self._entered_in = anyio.get_current_task().coro
        return await self._block.__aenter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        if os.getpid() != self._entered_by:
            return None  # a forked child unwinds: nothing in here is its own
        if anyio.get_current_task().coro is self._entered_in:
            return await self._block.__aexit__(exc_type, exc, traceback)
        self._supervisor.ask_to_stop()
        await self._supervisor.wait_stopped()
        with suppress(RuntimeError):
            await self._block.__aexit__(exc_type, exc, traceback)
        raise RuntimeError(_LEFT_ELSEWHERE) from exc
