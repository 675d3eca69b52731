"""What SIGTERM does to a program with a runtime in it.

By itself it ends Python at once: no ``finally`` runs, and the server would be left to the
guard. Contract: while a runtime lives that was started in the main thread, SIGTERM unwinds
the program as ``sys.exit`` does, the blocks around runtimes first, so that servers are
stopped; and then the program dies of SIGTERM all the same, as whoever sent it expects.

A second SIGTERM within a second changes nothing; a later one is raised in the main thread
wherever that is, so that a blocked event loop can be ended, too.

A handler that is there already is the program's own (a web server's, asyncio's) and is
left alone, and so is one that comes later. SIGINT is never touched: Python, asyncio and
trio make a KeyboardInterrupt of it, and the blocks unwind by themselves.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Final

import anyio

from ..forks import forget_in_child
from ..loops import current_loop, in_event_loop, post

__all__ = [
    "Watch",
    "begin_end",
    "prepare_last_word",
    "unwatch",
    "unwinding_on_sigterm",
    "watch",
]

# What shells say of a program that died of a signal.
_EXIT_CODE: Final = 128 + signal.SIGTERM

# Some senders signal twice: a process, and then its group. Later than this it is
# somebody who finds that it takes too long.
_REPETITION: Final = 1.0


def _die(signal: Any = signal, os: Any = os) -> None:
    """Die of SIGTERM, even when this module is half gone."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


class Watch:
    """A runtime that SIGTERM has to reach.

    :param interrupt: makes the block around it unwind, and returns False if there is no
        event loop to do so; None: there is no block, or it is an ordinary one
    """

    def __init__(self, interrupt: Callable[[], bool] | None = None) -> None:
        self.interrupt = interrupt
        self.was_struck = False
        self.is_leaving = False
        """True when it needs no other signal: its runtime is on the way to its end."""


class _Desk:
    """Who watches, and what became of it: one for the process."""

    def __init__(self) -> None:
        self._watches: list[Watch] = []
        self._struck_at = -math.inf
        self.has_struck = False
        self.is_program_ending = False
        forget_in_child(self)

    def add(self, watch: Watch) -> None:
        """Watch, if this is the main thread and nobody else does it."""
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            with suppress(ValueError):  # a subinterpreter
                signal.signal(signal.SIGTERM, self._strike)
        if self._has_handler():
            if not self._watches:
                self.has_struck = False  # a program that goes on has not died of it
            self._watches.append(watch)

    def remove(self, watch: Watch) -> None:
        """Stop watching. The last one restores what was there, where that is possible."""
        with suppress(ValueError):
            self._watches.remove(watch)
        if not self._watches:
            self.restore()

    def restore(self) -> None:
        """Take the handler away, if that is possible, and SIGTERM has not struck.

        In another thread than the main one it has to stay; with nobody watching it does
        what would have been done without it. And a program that unwinds is not to be
        killed by a second signal.
        """
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and self._has_handler() and not self.has_struck:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def forget(self) -> None:
        """In a forked child: the parent's runtimes are not its business."""
        self._watches.clear()
        self._struck_at = -math.inf
        self.has_struck = False

    def _has_handler(self) -> bool:
        return signal.getsignal(signal.SIGTERM) == self._strike

    def _strike(self, number: int, frame: FrameType | None) -> None:
        if self.is_program_ending:
            self.has_struck = True
            return
        now = time.monotonic()
        fresh = [each for each in self._watches if not each.was_struck]
        if fresh:
            self._struck_at = now
            self.has_struck = True
            self._unwind(fresh, frame)
        elif now - self._struck_at >= _REPETITION:
            self._struck_at = now
            self._strike_again(frame)

    def _strike_again(self, frame: FrameType | None) -> None:
        if not self._watches and not self.has_struck:
            _die()
        if not self._watches or any(not each.is_leaving for each in self._watches):
            # It was told, and did not hear: a blocked event loop, or a caught exception.
            _raise_in_main_thread(frame)

    def _unwind(self, watches: list[Watch], frame: FrameType | None) -> None:
        heard = False
        for each in reversed(watches):
            each.was_struck = True
            if each.interrupt is not None and each.interrupt():
                heard = True
        if not (heard and in_event_loop()):
            _unwind_main_thread(frame)


_desk: Final = _Desk()


class _LastWord:
    """Dies of SIGTERM when it is taken apart, at the end of the interpreter."""

    def __del__(self, die: Callable[[], None] = _die) -> None:
        die()


def begin_end() -> None:
    """The program is ending: SIGTERM has nothing left to unwind, and is only noted."""
    _desk.is_program_ending = True


def prepare_last_word() -> None:
    """Have the program die of the SIGTERM that has unwound it, when all else is done.

    Not at once: ``atexit`` runs its functions in the reverse order of their registration,
    and there is no being the last one. What hangs on ``sys.last_value`` is let go by the
    interpreter right after them, and after the standard streams were flushed. Should it
    not come to that, the exit code says the same.
    """
    _desk.restore()
    if _desk.has_struck:
        for name in ("last_exc", "last_value", "last_traceback"):
            setattr(sys, name, None)
        sys.last_value = _LastWord()  # type: ignore[assignment]


def watch(interrupt: Callable[[], bool] | None = None) -> Watch:
    """Let SIGTERM unwind the program for as long as a runtime lives."""
    new = Watch(interrupt)
    _desk.add(new)
    return new


def unwatch(watch: Watch) -> None:
    _desk.remove(watch)


@contextmanager
def unwinding_on_sigterm() -> Iterator[None]:
    """Let SIGTERM cancel this block of async code, and raise SystemExit after it."""
    loop = current_loop()
    with anyio.CancelScope() as scope:

        def hear() -> None:
            mine.is_leaving = True
            scope.cancel()

        mine = watch(lambda: post(loop, hear))
        try:
            yield
        finally:
            unwatch(mine)
    if mine.was_struck:
        raise SystemExit(_EXIT_CODE)


def _exit() -> None:
    raise SystemExit(_EXIT_CODE)


def _unwind_main_thread(frame: FrameType | None) -> None:
    """Raise SystemExit in the main thread, where that breaks nothing."""
    call_soon = getattr(current_loop(), "call_soon_threadsafe", None)
    if call_soon is None:
        _raise_in_main_thread(frame)
    else:
        # Between two steps, and not in the middle of asyncio's own work.
        with suppress(RuntimeError):
            call_soon(_exit)
            return
        _raise_in_main_thread(frame)


def _raise_in_main_thread(frame: FrameType | None) -> None:
    on_sigint = signal.getsignal(signal.SIGINT)
    if callable(on_sigint) and getattr(on_sigint, "__module__", "").startswith("trio."):
        # trio knows where an exception may be raised, but does it for Ctrl-C only. Where
        # that has another handler, it has to be raised wherever trio may be.
        on_sigint(signal.SIGINT, frame)
        return
    _exit()
