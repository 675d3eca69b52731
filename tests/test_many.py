"""Many runs at a time: who reads, who leaves, and what of it goes on."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from stepflow_runtime import FlowResult, FlowStatus, RuntimeStoppedError
from stepflow_runtime.crew import Crew
from stepflow_runtime.many import RunMany

from .conftest import each_backend, wait_until

pytestmark = [pytest.mark.anyio, each_backend]


class Runs:
    """Runs that end when they are told to; "stuck" never."""

    def __init__(self, crew: Crew) -> None:
        self.crew = crew
        self.begun: list[Any] = []
        self.cancelled: list[Any] = []

    async def run(self, input: Any) -> FlowResult:
        self.begun.append(input)
        try:
            await (
                anyio.sleep_forever()
                if input == "stuck"
                else anyio.lowlevel.checkpoint()
            )
        except anyio.get_cancelled_exc_class():
            self.cancelled.append(input)
            raise
        if input == "broken":
            raise LookupError("broken")
        return FlowResult(status=FlowStatus.SUCCESS, run_id="r", output=input)

    def many(self, inputs: Iterable[Any], at_once: int | None = None) -> RunMany:
        return RunMany(
            self.run, inputs, at_once, self.crew, lambda: RuntimeStoppedError("gone")
        )


@asynccontextmanager
async def runs() -> AsyncIterator[Runs]:
    crew = Crew()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(crew.work)
        try:
            await crew.wait_at_work()
            with anyio.fail_after(20):
                yield Runs(crew)
        finally:
            crew.dismiss()


async def test_each_input_has_one_result() -> None:
    async with runs() as made:
        found = [pair async for pair in made.many(range(20), 3)]
        assert sorted((index, result.output) for index, result in found) == [
            (number, number) for number in range(20)
        ]
        assert [pair async for pair in made.many([])] == []


async def test_who_reads_slowly_is_not_run_ahead_of() -> None:
    def endless() -> Iterator[int]:
        number = 0
        while True:
            yield number
            number += 1

    async with runs() as made:
        results = made.many(endless(), 3)
        for taken in range(1, 30):
            await anext(results)
            await anyio.sleep(0.001)
            assert len(made.begun) <= taken + 3
        results.close()


async def test_tasks_can_share_an_iterator() -> None:
    found: list[int] = []

    async def read() -> None:
        async for index, _ in results:
            found.append(index)
            await anyio.lowlevel.checkpoint()

    async with runs() as made:
        results = made.many(range(31), 4)
        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(read)
    assert sorted(found) == list(range(31))


async def test_closing_wakes_who_waits_and_cancels_what_runs() -> None:
    async def read() -> None:
        with pytest.raises(StopAsyncIteration):
            await anext(results)
        ended.set()

    async with runs() as made:
        ended = anyio.Event()
        results = made.many(["stuck"] * 5, 3)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            await wait_until(lambda: len(made.begun) == 3)
            await results.aclose()
            await ended.wait()
        await wait_until(lambda: made.cancelled == ["stuck"] * 3)
        assert len(made.begun) == 3
        with pytest.raises(StopAsyncIteration):
            await anext(results)


async def test_a_run_that_raises_ends_the_iteration_with_that() -> None:
    async with runs() as made:
        results = made.many(["stuck", "broken", "stuck"], 3)
        with pytest.raises(LookupError, match="broken"):
            await anext(results)
        await wait_until(lambda: made.cancelled == ["stuck"] * 2)
        with pytest.raises(StopAsyncIteration):
            await anext(results)


async def test_inputs_that_raise_do_so_after_the_results_that_there_are() -> None:
    def inputs() -> Iterator[int]:
        yield from range(3)
        raise LookupError("no more")

    async with runs() as made:
        results = made.many(inputs(), 2)
        found = []
        with pytest.raises(LookupError, match="no more"):
            async for index, _ in results:
                found.append(index)
        assert sorted(found) == [0, 1, 2]
        with pytest.raises(StopAsyncIteration):
            await anext(results)


async def test_a_cancelled_reader_cancels_what_runs() -> None:
    async with runs() as made:
        results = made.many(["stuck"])
        with anyio.move_on_after(0.01) as scope:
            await anext(results)
        assert scope.cancelled_caught
        results.close()
        await wait_until(lambda: made.cancelled == ["stuck"])


async def test_an_iterator_that_nobody_holds_is_closed() -> None:
    async with runs() as made:
        results = made.many([1, "stuck"])
        await anext(results)
        await wait_until(lambda: len(made.begun) == 2)
        del results
        gc.collect()
        await wait_until(lambda: made.cancelled == ["stuck"])


async def test_nobody_to_run_anything_is_told_as_such() -> None:
    async with runs() as made:
        results = made.many(["stuck", "stuck"])
        with anyio.move_on_after(0.01):
            await anext(results)
        others = made.many([1])
    with pytest.raises((RuntimeStoppedError, StopAsyncIteration)):
        await anext(results)
    with pytest.raises(RuntimeStoppedError, match="gone"):
        await anext(others)
