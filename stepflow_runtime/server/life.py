"""One life of a server after the other, as those see it who may have it replaced."""

from __future__ import annotations

from typing import Protocol

import msgspec

__all__ = ["Life", "Server"]


class Life(msgspec.Struct, frozen=True):
    """One life of the server that is READY."""

    incarnation: int
    pid: int
    port: int


class Server(Protocol):
    """What is replaced when it is due."""

    async def wait_life(self, after: int) -> Life:
        """Wait until a life later than that incarnation is READY."""
        ...

    async def wait_life_over(self, incarnation: int) -> None:
        """Wait until that life is not READY any more."""
        ...

    def replace(self, incarnation: int) -> bool:
        """Have it ended, and another one started; False if it is not READY any more."""
        ...
