"""Threads for what blocks, apart from those of the program.

Contract: a call never waits for a free thread, since the end of a server must not wait
for the program's own threads, and where they wait for us, it would be for ever. And no
thread of ours keeps the program from ending: the interpreter joins those of pools before
it tells anybody that it is about to end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar, TypeVarTuple, Unpack

import anyio
import anyio.lowlevel

from .loops import Waker

__all__ = ["run_abandonable", "run_blocking"]

T = TypeVar("T")
Args = TypeVarTuple("Args")


async def run_blocking(function: Callable[[Unpack[Args]], T], *args: *Args) -> T:
    """Call ``function`` in a thread, at once. Cancellation waits for it.

    What it returns is returned: a cancellation in the meantime strikes later.

    :raises RuntimeError: if no thread can be had
    """
    await anyio.lowlevel.checkpoint_if_cancelled()
    with anyio.CancelScope(shield=True):
        outcome = await run_abandonable(function, *args)
    return outcome


async def run_abandonable(function: Callable[[Unpack[Args]], T], *args: *Args) -> T:
    """Call ``function`` in a thread that nobody has to wait for.

    Cancellation leaves it alone, and so does the end of the program: a function that
    never returns keeps neither from going on.

    :raises RuntimeError: if no thread can be had
    """
    outcome: Future[T] = Future()
    ended = Waker()

    def call() -> None:
        try:
            outcome.set_result(function(*args))
        except BaseException as exc:  # noqa: BLE001 - raised where it is waited for
            outcome.set_exception(exc)
        ended.wake()

    threading.Thread(target=call, daemon=True, name="stepflow-runtime worker").start()
    await ended.wait()
    return outcome.result()
