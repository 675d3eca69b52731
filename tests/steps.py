"""Cancel at a scripted point: before the n-th step of any task, under either backend.

A step is a stretch between two suspensions. Cancelling before each of them in turn tries
a cancellation at every checkpoint that a piece of code, with all its tasks, passes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import sniffio
import trio


class StepCounter:
    """Counts steps, and calls ``at_step`` before the n-th."""

    def __init__(self, number: int, at_step: Callable[[], None]) -> None:
        self._number = number
        self._at_step = at_step
        self.steps = 0

    def step(self) -> None:
        if self.steps == self._number:
            self._at_step()
        self.steps += 1

    @property
    def fired(self) -> bool:
        return self.steps > self._number


class _TrioInstrument(trio.abc.Instrument):
    def __init__(self, counter: StepCounter) -> None:
        self._counter = counter

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task.name != "<init>" and not task.name.startswith("trio._core"):
            self._counter.step()


class _Stepped:
    """An awaitable that counts each resumption of the one that it wraps."""

    def __init__(self, coro: Coroutine[Any, Any, Any], counter: StepCounter) -> None:
        self._coro = coro
        self._counter = counter

    def __await__(self) -> Generator[Any, Any, Any]:
        value: Any = None
        error: BaseException | None = None
        while True:
            self._counter.step()
            try:
                waited_for = (
                    self._coro.throw(error) if error else self._coro.send(value)
                )
            except StopIteration as stop:
                return stop.value
            try:
                value, error = (yield waited_for), None
            except BaseException as exc:  # noqa: BLE001 - thrown into the wrapped one
                value, error = None, exc


def _counting_factory(
    counter: StepCounter,
) -> Callable[..., asyncio.Task[Any]]:
    def factory(
        loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **kwargs: Any
    ) -> asyncio.Task[Any]:
        async def stepped() -> Any:
            return await _Stepped(coro, counter)

        return asyncio.Task(stepped(), loop=loop, **kwargs)

    return factory


@contextmanager
def cancelling_at_step(
    number: int, cancel: Callable[[], None]
) -> Iterator[StepCounter]:
    """Call ``cancel`` before the n-th step that any task takes inside this block.

    Under asyncio only tasks that are made inside count, so make the first one inside.
    """
    counter = StepCounter(number, cancel)
    if sniffio.current_async_library() == "trio":
        instrument = _TrioInstrument(counter)
        trio.lowlevel.add_instrument(instrument)
        try:
            yield counter
        finally:
            trio.lowlevel.remove_instrument(instrument)
    else:
        loop = asyncio.get_running_loop()
        before = loop.get_task_factory()
        loop.set_task_factory(_counting_factory(counter))
        try:
            yield counter
        finally:
            loop.set_task_factory(before)


async def in_a_task(function: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Await ``function()`` in a task of its own, so that its steps count too."""
    import anyio

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(function)
