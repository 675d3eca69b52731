"""What a forked child lets go of.

A child of ``os.fork`` (multiprocessing's method "fork", too) inherits every descriptor, and
none of the threads. Contract: in it, what stands for the parent's servers is closed at
once, without a word to the server, so that the child keeps no pipe and no connection
open; and it can have runtimes of its own. While a process of ours is being spawned,
nobody forks: a child would keep ends of pipes that are closed here right after.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

__all__ = ["forget_in_child", "no_forks"]


class Forgettable(Protocol):
    def forget(self) -> None:
        """Close what was inherited. Must not wait, nor raise; once or more often."""
        ...


_spawning = threading.Lock()
_forking = threading.local()
_held: weakref.WeakSet[Forgettable] = weakref.WeakSet()


def forget_in_child(held: Forgettable) -> None:
    """Have ``held.forget()`` called in every child forked from now on."""
    _held.add(held)


@contextmanager
def no_forks() -> Iterator[None]:
    """Let every fork of other threads wait until this block has ended."""
    with _spawning:
        yield


def _before() -> None:
    # An exception in here would be dropped, and the fork made all the same: a signal must
    # not take away the knowledge of whether we have the lock.
    _forking.has_lock = False
    while not _forking.has_lock:
        with suppress(BaseException):
            _forking.has_lock = _spawning.acquire(timeout=1)


def _after_in_parent() -> None:
    _forking.has_lock = False
    _spawning.release()


def _after_in_child() -> None:
    global _spawning
    _spawning = threading.Lock()
    for held in tuple(_held):
        with suppress(OSError):
            held.forget()


if hasattr(os, "register_at_fork"):  # not on Windows, which knows no fork
    os.register_at_fork(
        before=_before,
        after_in_parent=_after_in_parent,
        after_in_child=_after_in_child,
    )
