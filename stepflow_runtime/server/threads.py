"""Worker threads for what blocks, apart from those of the program."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple, Unpack

import anyio
import anyio.to_thread

__all__ = ["run_blocking"]

T = TypeVar("T")
Args = TypeVarTuple("Args")


async def run_blocking(
    function: Callable[[Unpack[Args]], T],
    *args: *Args,
    abandon_on_cancel: bool = False,
) -> T:
    """Call ``function`` in a thread, at once.

    The program's own threads share a limit, and when all of them are busy a call waits:
    the end of a server must not wait for them.
    """
    return await anyio.to_thread.run_sync(
        function,
        *args,
        limiter=anyio.CapacityLimiter(1),
        abandon_on_cancel=abandon_on_cancel,
    )
