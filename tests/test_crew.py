"""The crew: jobs that outlive the call that they come from, and never their crew."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest

from stepflow_runtime.crew import Crew, CrewGoneError, Job, Kind
from stepflow_runtime.loops import current_loop

from .conftest import wait_until

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def at_work() -> AsyncIterator[Crew]:
    crew = Crew()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(crew.work)
        try:
            await crew.wait_at_work()
            yield crew
        finally:
            crew.dismiss()


def sent(job: Job[Any] | None) -> Job[Any]:
    assert job is not None
    return job


async def test_what_a_job_returns_or_raises_goes_to_who_waits() -> None:
    async def returns() -> int:
        await anyio.lowlevel.checkpoint()
        return 7

    async def raises() -> None:
        raise LookupError("mine")

    async with at_work() as crew:
        assert await sent(crew.send(returns)).wait() == 7
        failing = sent(crew.send(raises))
        with pytest.raises(LookupError, match="mine"):
            await failing.wait()
        assert await sent(crew.send(returns)).wait() == 7  # it has harmed nobody


async def test_a_job_comes_from_any_thread_and_is_done_in_the_crews_loop() -> None:
    loops: list[Any] = []

    async def note() -> None:
        loops.append(current_loop())

    async with at_work() as crew:
        job = await anyio.to_thread.run_sync(crew.send, note)
        await sent(job).wait()
    assert loops == [current_loop()]


async def test_a_job_can_be_waited_for_in_another_loop() -> None:
    async def returns() -> int:
        return 7

    async with at_work() as crew:
        job = sent(crew.send(returns))
        assert await anyio.to_thread.run_sync(anyio.run, job.wait) == 7


async def test_a_job_goes_on_when_its_sender_is_cancelled() -> None:
    done = anyio.Event()

    async def takes_a_moment() -> None:
        await go.wait()
        done.set()

    async with at_work() as crew:
        go = anyio.Event()
        with anyio.move_on_after(0.01) as scope:
            await sent(crew.send(takes_a_moment)).wait()
        assert scope.cancelled_caught
        go.set()
        with anyio.fail_after(10):
            await done.wait()


async def test_a_cancelled_job_ends_and_who_waits_is_told() -> None:
    began, ended = anyio.Event(), anyio.Event()

    async def endless() -> None:
        began.set()
        try:
            await anyio.sleep_forever()
        finally:
            ended.set()

    async with at_work() as crew:
        job = sent(crew.send(endless))
        await began.wait()
        await anyio.to_thread.run_sync(job.cancel)
        with anyio.fail_after(10), pytest.raises(CrewGoneError):
            await job.wait()
        assert ended.is_set()
        never = sent(crew.send(endless))
        never.cancel()  # before it has begun
        with anyio.fail_after(10), pytest.raises(CrewGoneError):
            await never.wait()


async def test_jobs_end_with_their_crew_and_none_comes_after_it() -> None:
    async def endless() -> None:
        await anyio.sleep_forever()

    told: list[int] = []
    async with at_work() as crew:
        jobs = [sent(crew.send(endless)) for _ in range(3)]
        jobs[0].when_ended(lambda: told.append(1))
    for job in jobs:
        with anyio.fail_after(10), pytest.raises(CrewGoneError):
            await job.wait()
    assert told == [1]
    assert crew.send(endless) is None


async def test_settling_waits_for_what_is_under_way_but_not_for_ever() -> None:
    async def waits() -> None:
        await go.wait()

    async with at_work() as crew:
        go = anyio.Event()
        crew.send(waits, Kind.ERRAND)
        await crew.settle(0.01)
        assert crew.has_errands
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(crew.settle, 10)
            go.set()
        assert not crew.has_errands


async def test_settling_stops_iterations_and_leaves_calls_alone() -> None:
    """What an iteration leaves behind when it is stopped is waited for, too."""
    done: list[str] = []

    async def part() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            crew.send(errand, Kind.ERRAND)

    async def errand() -> None:
        await anyio.sleep(0.01)
        done.append("errand")

    async with at_work() as crew:
        call = sent(crew.send(anyio.sleep_forever))
        crew.send(part, Kind.PART)
        await anyio.sleep(0.01)
        await crew.settle(10)
        assert done == ["errand"]
        assert not call.has_ended


async def test_a_cancellation_around_it_waits_until_it_is_dismissed() -> None:
    done: list[int] = []

    async def errand() -> None:
        await anyio.sleep(0.01)
        done.append(1)

    crew = Crew()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(crew.work)
        await crew.wait_at_work()
        tasks.cancel_scope.cancel()
        crew.send(errand, Kind.ERRAND)
        with anyio.CancelScope(shield=True):
            await crew.settle(10)
        crew.dismiss()
    assert done == [1]


def test_a_crew_without_a_loop_hires_a_thread_with_its_first_job() -> None:
    async def where() -> threading.Thread:
        return threading.current_thread()

    crew = Crew(may_hire=True)
    before = threading.active_count()
    first = anyio.run(sent(crew.send(where)).wait)
    second = anyio.run(sent(crew.send(where)).wait, backend="trio")
    assert first is second and first.daemon
    crew.dismiss()
    deadline = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert crew.send(where) is None


def test_blocking_until_all_is_settled() -> None:
    done = []

    async def job() -> None:
        await anyio.sleep(0.05)
        done.append(1)

    crew = Crew(may_hire=True)
    crew.send(job, Kind.ERRAND)
    crew.block_until_settled(10)
    assert done == [1]
    crew.dismiss()


async def test_many_jobs_from_many_threads_are_all_done() -> None:
    done: list[int] = []

    async def note(number: int) -> None:
        await anyio.lowlevel.checkpoint()
        done.append(number)

    async with at_work() as crew:

        def send(start: int) -> None:
            for number in range(start, start + 50):
                crew.send(lambda number=number: note(number))  # type: ignore[misc]

        async with anyio.create_task_group() as tasks:
            for start in range(0, 500, 50):
                tasks.start_soon(anyio.to_thread.run_sync, send, start)
        await wait_until(lambda: len(done) == 500)
    assert sorted(done) == list(range(500))
