"""The servers of a client: which of them is asked, and which one after it.

Contract: the one that answers is kept to (sticky). One that fails gives its place to the next,
and is asked last for some seconds; it is never left out, since all others may fail, too. Nothing
is sent from here, and nothing waits.

Tasks in several threads share one. What they tell about a server may come in any order, and
costs at worst a request to one that is gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from .transport import Transport

__all__ = ["PENALTY", "Server", "Servers"]

# For how many seconds a server that failed is asked only after the others: about what one
# takes that is started again.
PENALTY: Final = 5.0


class Server:
    """One server, and the way there.

    :ivar url: without credentials
    :ivar prefix: what comes before the paths of the API
    :ivar is_known: whether it is one of a version that is supported
    :ivar unwell_until: when its penalty ends; 0 without one
    """

    __slots__ = ("is_known", "prefix", "transport", "unwell_until", "url")

    def __init__(self, url: str, prefix: str, transport: Transport) -> None:
        self.url = url
        self.prefix = prefix
        self.transport = transport
        self.is_known = False
        self.unwell_until = 0.0


class Servers:
    """Servers that share a store, so that each can answer for all.

    :param servers: in the order in which they are to be tried
    """

    def __init__(
        self, servers: Sequence[Server], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.all: Final = tuple(servers)
        self.are_several: Final = len(self.all) > 1
        self.favourite = self.all[0]
        self._clock = clock

    def in_turn(self) -> Sequence[Server]:
        """All of them, in the order in which they are to be asked now."""
        if not self.are_several:
            return self.all
        now = self._clock()
        at = self.all.index(self.favourite)
        ring = self.all[at:] + self.all[:at]
        # Of those with a penalty, who has failed longest ago has had most time to recover.
        return sorted(ring, key=lambda server: max(server.unwell_until - now, 0.0))

    def answered(self, server: Server) -> None:
        """It is well; and kept to, unless another one is, and is well."""
        if server.unwell_until:
            server.unwell_until = 0.0
        if server is not self.favourite and self.favourite.unwell_until:
            self.favourite = server

    def failed(self, server: Server) -> None:
        """It has not answered, or not for itself: another one's turn."""
        if not self.are_several:
            return
        server.unwell_until = self._clock() + PENALTY
        if server is self.favourite:
            self.favourite = self.in_turn()[0]

    def close(self) -> None:
        for server in self.all:
            server.transport.close()

    async def aclose(self) -> None:
        for server in self.all:
            await server.transport.aclose()
