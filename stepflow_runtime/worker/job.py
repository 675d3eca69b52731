"""What a worker is told: which functions, and how the program finds its modules.

A leaf. It stands in the arguments of a process, for all on this machine to see; nothing of
it is a secret.
"""

from __future__ import annotations

import sys
from typing import Self

import msgspec

from ..components import Place

__all__ = ["Job"]


class Job(msgspec.Struct, frozen=True):
    """One worker's.

    :ivar places: of its functions
    :ivar path: the program's ``sys.path``
    :ivar directory: the program's working directory
    """

    places: tuple[Place, ...]
    path: tuple[str, ...]
    directory: str = ""

    @classmethod
    def of(cls, places: tuple[Place, ...]) -> Self:
        """One whose worker finds modules as this process does."""
        return cls(places, tuple(each for each in sys.path if isinstance(each, str)))

    def in_directory(self, directory: str) -> Self:
        """The same, in a working directory; what of the path is relative, is so to that."""
        return msgspec.structs.replace(self, directory=directory)

    def told(self) -> str:
        """As JSON."""
        return msgspec.json.encode(self).decode()
