"""What SIGTERM does to a program with a runtime in it.

By itself it ends Python at once: no ``finally`` runs, and the server would be left to the
guard. Contract: while a runtime lives that was started in the main thread, SIGTERM unwinds
the program as ``sys.exit`` does, the blocks around runtimes first, so that servers are
stopped; and then the program dies of SIGTERM all the same, as whoever sent it expects.

A handler that is there already is the program's own (a web server's, asyncio's) and is
left alone, and so is one that comes later. SIGINT is never touched: Python, asyncio and
trio make a KeyboardInterrupt of it, and the blocks unwind by themselves.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Final

import anyio
import anyio.lowlevel

from ..forks import forget_in_child
from ..loops import post

__all__ = ["Watch", "unwinding_on_sigterm"]

# What shells say of a program that died of a signal.
_EXIT_CODE: Final = 128 + signal.SIGTERM


def _die(signal: Any = signal, os: Any = os) -> None:
    """Die of SIGTERM, even when this module is half gone."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


class Watch:
    """A runtime that SIGTERM has to reach.

    :param interrupt: makes the block around it unwind; None: there is no block, or it is
        an ordinary one of the main thread
    """

    def __init__(self, interrupt: Callable[[], object] | None = None) -> None:
        self.interrupt = interrupt


class _Desk:
    """Who watches, and what became of it: one for the process."""

    def __init__(self) -> None:
        self._watches: list[Watch] = []
        self.has_struck = False
        forget_in_child(self)

    def add(self, watch: Watch) -> None:
        """Watch, if this is the main thread and nobody else does it."""
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            with suppress(ValueError):  # a subinterpreter
                signal.signal(signal.SIGTERM, self._strike)
        if self._has_handler():
            self._watches.append(watch)

    def remove(self, watch: Watch) -> None:
        """Stop watching. The last one restores what was there, where that is possible."""
        with suppress(ValueError):
            self._watches.remove(watch)
        is_main = threading.current_thread() is threading.main_thread()
        # In another thread the handler has to stay; with nobody watching it does what
        # would have been done without it.
        if is_main and not self._watches and self._has_handler():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def forget(self) -> None:
        """In a forked child: the parent's runtimes are not its business."""
        self._watches.clear()
        self.has_struck = False

    def _has_handler(self) -> bool:
        return signal.getsignal(signal.SIGTERM) == self._strike

    def _strike(self, number: int, frame: FrameType | None) -> None:
        if not self._watches:
            _die()
        if self.has_struck:
            # It is on its way. Some senders signal twice: a process, and then its group.
            return
        self.has_struck = True
        interrupts = [each.interrupt for each in self._watches if each.interrupt]
        for interrupt in reversed(interrupts):
            interrupt()
        if not interrupts:
            _unwind_main_thread(frame)


_desk: Final = _Desk()


class _LastWord:
    """Dies of SIGTERM when it is taken apart, at the end of the interpreter."""

    def __del__(self, die: Callable[[], None] = _die) -> None:
        die()


@atexit.register
def _prepare_last_word() -> None:
    """Have the program die of the SIGTERM that has unwound it, when all else is done.

    Not here: ``atexit`` runs its functions in the reverse order of their registration, and
    there is no being the last one. What hangs on ``sys.last_value`` is let go by the
    interpreter right after them, and after the standard streams were flushed. Should it
    not come to that, the exit code says the same.
    """
    if _desk.has_struck:
        for name in ("last_exc", "last_value", "last_traceback"):
            setattr(sys, name, None)
        sys.last_value = _LastWord()  # type: ignore[assignment]


def watch(interrupt: Callable[[], object] | None = None) -> Watch:
    """Let SIGTERM unwind the program for as long as a runtime lives."""
    new = Watch(interrupt)
    _desk.add(new)
    return new


def unwatch(watch: Watch) -> None:
    _desk.remove(watch)


@contextmanager
def unwinding_on_sigterm() -> Iterator[None]:
    """Let SIGTERM cancel this block of async code, and raise SystemExit after it."""
    token = anyio.lowlevel.current_token()
    with anyio.CancelScope() as scope:
        mine = watch(lambda: post(token, scope.cancel))
        try:
            yield
        finally:
            unwatch(mine)
    if scope.cancel_called:
        raise SystemExit(_EXIT_CODE)


def _exit() -> None:
    raise SystemExit(_EXIT_CODE)


def _unwind_main_thread(frame: FrameType | None) -> None:
    """Raise SystemExit in the main thread, where that breaks nothing."""
    with suppress(RuntimeError):
        # Between two steps, and not in the middle of the loop's own work.
        asyncio.get_running_loop().call_soon_threadsafe(_exit)
        return
    trio: Any = sys.modules.get("trio")
    on_sigint = signal.getsignal(signal.SIGINT)
    if trio is not None and trio.lowlevel.in_trio_run() and callable(on_sigint):
        # trio knows where an exception may be raised, but does it for Ctrl-C only.
        on_sigint(signal.SIGINT, frame)
        return
    _exit()
