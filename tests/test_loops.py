"""What is waited for across event loops: announcements and slots, and loops that end."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Coroutine
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import trio

from stepflow_runtime.loops import (
    Announcer,
    Slot,
    Slots,
    Waker,
    current_loop,
    has_ended,
    in_event_loop,
)

from .conftest import each_backend, wait_until


def slots(number: int) -> Slots:
    return Slots(number, on_reclaim=lambda slot: None)


def abandon(coroutine: Coroutine[Any, Any, object]) -> None:
    """Begin with it in an event loop, and close that loop in the middle."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(coroutine)
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    task._log_destroy_pending = False  # type: ignore[attr-defined]


# -- where are we ----------------------------------------------------------------------


@pytest.mark.anyio
async def test_in_a_loop_there_is_a_loop_and_in_its_threads_there_is_none() -> None:
    assert in_event_loop()
    assert not has_ended(current_loop())
    assert not await anyio.to_thread.run_sync(in_event_loop)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_loop_that_has_ended_is_known_to_have(backend: str) -> None:
    async def here() -> Any:
        return current_loop()

    loop = anyio.run(here, backend=backend)
    assert not in_event_loop()
    assert has_ended(loop)


def test_a_trio_that_is_just_being_imported_does_no_harm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys
    from types import ModuleType

    monkeypatch.setitem(sys.modules, "trio", ModuleType("trio"))
    assert not in_event_loop()


# -- announcements ---------------------------------------------------------------------


@each_backend
@pytest.mark.anyio
async def test_what_happens_just_before_the_wait_is_not_missed() -> None:
    """Between the first look and the registration: nobody could be woken for that."""
    looks = 0

    def condition() -> bool:
        nonlocal looks
        looks += 1
        return looks > 1  # and no announcement will follow

    with anyio.fail_after(5):
        await Announcer().wait_until(condition)


@pytest.mark.anyio
async def test_an_announcement_reaches_tasks_of_every_loop_and_threads() -> None:
    announcer = Announcer()
    happened = threading.Event()
    seen: list[str] = []

    async def wait(name: str) -> None:
        await announcer.wait_until(happened.is_set)
        seen.append(name)

    def block() -> None:
        assert announcer.block_until(happened.is_set, 15)
        seen.append("thread")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait, "here")
        tasks.start_soon(anyio.to_thread.run_sync, anyio.run, wait, "asyncio")
        tasks.start_soon(anyio.to_thread.run_sync, trio.run, wait, "trio")
        tasks.start_soon(anyio.to_thread.run_sync, block)
        await wait_until(lambda: len(announcer._waiting) == 4)
        happened.set()
        announcer.announce()
    assert sorted(seen) == ["asyncio", "here", "thread", "trio"]
    assert announcer._waiting == set()


def test_a_block_that_nothing_ends_is_bounded() -> None:
    assert not Announcer().block_until(lambda: False, 0.01)


def test_waiters_whose_loop_has_ended_are_forgotten() -> None:
    announcer = Announcer()
    abandon(announcer.wait_until(lambda: False))
    announcer.announce()
    assert announcer._waiting == set()


# -- slots -----------------------------------------------------------------------------


@pytest.mark.anyio
async def test_so_many_may_enter_and_the_others_wait() -> None:
    ours = slots(2)
    inside = most = entered = 0

    async def enter() -> None:
        nonlocal inside, most, entered
        slot = await ours.acquire()
        inside += 1
        entered += 1
        most = max(most, inside)
        await anyio.sleep(0.001)
        inside -= 1
        slot.release()

    async with anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(enter)
    assert (most, entered) == (2, 20)
    assert ours.taken == ()


@each_backend
@pytest.mark.anyio
async def test_a_slot_handed_to_a_task_that_is_cancelled_goes_on_to_the_next() -> None:
    ours = slots(1)
    slot = await ours.acquire()
    scope = anyio.CancelScope()
    entered = anyio.Event()

    async def first() -> None:
        with scope:
            await ours.acquire()

    async def second() -> None:
        (await ours.acquire()).release()
        entered.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(first)
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(second)
        await anyio.wait_all_tasks_blocked()
        slot.release()  # to the first one, which is woken ...
        scope.cancel()  # ... and cancelled before it runs
        with anyio.fail_after(5):
            await entered.wait()
    assert ours.taken == ()


def test_a_waiter_whose_loop_has_ended_costs_no_slot_and_gives_none() -> None:
    async def main() -> None:
        slot = await ours.acquire()
        await anyio.to_thread.run_sync(abandon, ours.acquire())
        slot.release()
        with anyio.fail_after(5):
            slot = await ours.acquire()
        gc.collect()  # the abandoned one is closed now, at the latest
        assert list(ours.taken) == [slot]
        slot.release()
        assert list(ours.taken) == []

    ours = slots(1)
    asyncio.run(main())


def test_the_slots_of_tasks_whose_loop_has_ended_are_reclaimed() -> None:
    async def hold() -> None:
        slot = await ours.acquire()
        kept.append(slot)
        try:
            await asyncio.sleep(100)
        finally:
            slot.release()

    async def main() -> None:
        with anyio.fail_after(5):
            slot = await ours.acquire()
        for each in kept:
            each.release()  # too late, and without effect
        assert ours.taken == (slot,)

    reclaimed: list[Slot] = []
    kept: list[Slot] = []
    ours = Slots(3, on_reclaim=reclaimed.append)
    for _ in range(3):
        abandon(hold())
    asyncio.run(main())
    assert sorted(map(id, reclaimed)) == sorted(map(id, kept))


def test_garbage_that_gives_its_slot_back_in_the_middle_of_an_acquisition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may be collected wherever memory is asked for: in the same thread."""

    first: Slot | None = None

    async def main() -> None:
        nonlocal first
        first = await ours.acquire()
        with anyio.fail_after(5):
            second = await ours.acquire()
        assert ours.taken == (second,)

    def make_and_collect(self: Waker) -> None:
        made(self)
        assert first is not None
        with ours._lock:
            first.release()

    made = Waker.__init__
    monkeypatch.setattr(Waker, "__init__", make_and_collect)
    ours = slots(1)
    asyncio.run(main())


def test_threads_that_compete_lose_no_slot() -> None:
    async def enter() -> None:
        for _ in range(300):
            slot = await ours.acquire()
            with anyio.move_on_after(0):
                await anyio.lowlevel.checkpoint()
            slot.release()

    def live() -> None:
        async def main() -> None:
            async with anyio.create_task_group() as tasks:
                for _ in range(5):
                    tasks.start_soon(enter)

        anyio.run(main)

    ours = slots(3)
    threads = [threading.Thread(target=live) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert ours.taken == ()
