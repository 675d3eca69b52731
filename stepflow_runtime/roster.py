"""Who hears of the runtimes of this process: somebody who looks after all of them.

A leaf. Contract: between the beginning and the end of :func:`hearing` the listener is
called with each supervisor when it is made, in the thread that makes it. Nothing is kept
here: who wants to hold them, does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from .server.supervisor import Supervisor

__all__ = ["Listener", "hearing", "tell"]

Listener: TypeAlias = "Callable[[Supervisor], object]"

# Replaced, never changed: threads make runtimes while others begin to listen.
_listeners: tuple[Listener, ...] = ()


@contextmanager
def hearing(listener: Listener) -> Iterator[None]:
    """Have the listener hear of each supervisor that is made from now on."""
    global _listeners
    _listeners = (*_listeners, listener)
    try:
        yield
    finally:
        _listeners = tuple(each for each in _listeners if each is not listener)


def tell(supervisor: Supervisor) -> None:
    for listener in _listeners:
        listener(supervisor)
