"""Worker threads for what blocks, apart from those of the program.

The program's own threads share a limit, and when all of them are busy a call waits: the
end of a server must not wait for them, and where they wait for us, it would be for ever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar, TypeVarTuple, Unpack

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread

__all__ = ["run_abandonable", "run_blocking"]

T = TypeVar("T")
Args = TypeVarTuple("Args")


async def run_blocking(function: Callable[[Unpack[Args]], T], *args: *Args) -> T:
    """Call ``function`` in a thread, at once. Cancellation waits for it."""
    return await anyio.to_thread.run_sync(
        function, *args, limiter=anyio.CapacityLimiter(1)
    )


async def run_abandonable(function: Callable[[Unpack[Args]], T], *args: *Args) -> T:
    """Call ``function`` in a thread that nobody has to wait for.

    Cancellation leaves it alone, and so does the end of the program: a function that
    never returns keeps neither from going on.
    """
    outcome: Future[T] = Future()
    ended = anyio.Event()
    token = anyio.lowlevel.current_token()

    def call() -> None:
        try:
            outcome.set_result(function(*args))
        except BaseException as exc:  # noqa: BLE001 - raised where it is waited for
            outcome.set_exception(exc)
        with suppress(RuntimeError):  # the event loop has ended in the meantime
            anyio.from_thread.run_sync(ended.set, token=token)

    threading.Thread(target=call, daemon=True).start()
    await ended.wait()
    return outcome.result()
