"""How the tasks of one asyncio loop wait for answers: all together.

asyncio takes a descriptor into its selector and out again for each wait, in Python, which
costs more than the rest of a request. So the connections of a loop are in an epoll of ours,
each for as long as it lives, and the loop watches that one descriptor while anybody waits.
What is there is read right where it is noticed, so that a task wakes once, with its answer.

Contract: a hub belongs to the loop that it was made in, and is used there; only
:meth:`Hub.forget` and :meth:`Hub.close` may be called from other threads. What it holds on
to belongs to others: it closes nothing but itself. Only where there is epoll; elsewhere, and
in trio, which needs none of this, tasks wait for their own sockets.
"""

from __future__ import annotations

import select
import sys
from contextlib import suppress
from typing import Any, Protocol

from ..loops import current_loop, post

__all__ = ["Hub", "Member", "can_have_hub"]


class Member(Protocol):
    """What a hub watches.

    :ivar hub: the hub that it is registered with
    :ivar waiter: the future of the task that waits for it, or None
    """

    hub: Hub | None
    waiter: Any

    def fileno(self) -> int: ...

    def take_in(self) -> bool:
        """Read what is there; return whether the task has something to look at."""
        ...


def can_have_hub(loop: Any) -> bool:
    """True for an asyncio loop that can watch an epoll."""
    asyncio = sys.modules.get("asyncio")
    return (
        hasattr(select, "epoll")
        and asyncio is not None
        and isinstance(loop, asyncio.AbstractEventLoop)
    )


class Hub:
    """Watches the sockets of one asyncio loop.

    :ivar loop: that loop
    """

    def __init__(self, loop: Any) -> None:
        self.loop = loop
        self._epoll = select.epoll()
        self._members: dict[int, Member] = {}
        self._waiting = 0
        self._is_closing = False

    async def wait(self, member: Member) -> None:
        """Wait until ``member.take_in()`` has returned true.

        :raises ValueError: if the hub is closed
        """
        self._enter(member)
        # Not before: another loop's hub, which it was with, might have set the result.
        member.waiter = waiter = self.loop.create_future()
        try:
            await waiter
        finally:
            member.waiter = None
            self._leave()

    def forget(self, member: Member) -> None:
        """Watch it no more; to be called before it is closed. From any thread."""
        number = member.fileno()
        if member.hub is self:
            member.hub = None
        if self._members.get(number) is member:
            self._members.pop(number, None)
            with suppress(OSError, ValueError):
                self._epoll.unregister(number)

    def close(self) -> None:
        """Close it, as soon as nobody waits any more. From any thread."""
        self._is_closing = True
        # In its loop, since that must not keep a number that stands for something else by then.
        if self.loop is current_loop():
            self._close_if_idle()
        elif not post(self.loop, self._close_if_idle):
            self._epoll.close()

    def _enter(self, member: Member) -> None:
        if member.hub is not self:
            if member.hub is not None:
                member.hub.forget(member)
            number = member.fileno()
            self._epoll.register(number, select.EPOLLIN)
            self._members[number] = member
            member.hub = self
        if not self._waiting:
            self.loop.add_reader(self._epoll.fileno(), self._on_readable)
        self._waiting += 1

    def _leave(self) -> None:
        self._waiting -= 1
        if not self._waiting:
            with suppress(RuntimeError, ValueError):  # the loop, or this, was closed
                self.loop.remove_reader(self._epoll.fileno())
            if self._is_closing:
                self._close_if_idle()

    def _close_if_idle(self) -> None:
        if not self._waiting:
            self._epoll.close()

    def _on_readable(self) -> None:
        for number, _ in self._epoll.poll(0):
            member = self._members.get(number)
            if member is None:
                continue  # forgotten by another thread in this moment
            waiter = member.waiter
            if member.hub is not self:
                continue  # taken by another loop in this moment, waiter and all
            if waiter is None:
                # It came without being asked for, the end mostly: whoever wants to use
                # this one next will see it.
                self.forget(member)
            elif not waiter.done() and member.take_in():
                waiter.set_result(None)
