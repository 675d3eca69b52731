"""What a forked child lets go of.

A child of ``os.fork`` (multiprocessing's method "fork", too) inherits every descriptor, and
none of the threads. Contract: in it, what stands for the parent's servers is closed at
once, without a word to the server, so that the child keeps no pipe and no connection
open; and it can have runtimes of its own.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Protocol

__all__ = ["forget_in_child"]


class Forgettable(Protocol):
    def forget(self) -> None:
        """Close what was inherited. Must not wait, nor raise; once or more often."""
        ...


_held: weakref.WeakSet[Forgettable] = weakref.WeakSet()


def forget_in_child(held: Forgettable) -> None:
    """Have ``held.forget()`` called in every child forked from now on."""
    _held.add(held)


def _forget_all() -> None:
    for held in tuple(_held):
        held.forget()


def _register(after_in_child: Callable[[], None]) -> None:
    if hasattr(os, "register_at_fork"):  # not on Windows, which knows no fork
        os.register_at_fork(after_in_child=after_in_child)


_register(_forget_all)
