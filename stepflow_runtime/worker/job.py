"""What a worker is told: which functions, and how the program finds its modules.

A leaf. It stands in the arguments of a process, for all on this machine to see; nothing of
it is a secret.
"""

from __future__ import annotations

import os
import sys

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
    directory: str

    @classmethod
    def here(cls, places: tuple[Place, ...]) -> str:
        """One in whose worker all is as it is here, as JSON."""
        directory = os.getcwd()
        path = [
            os.path.join(directory, each) for each in sys.path if isinstance(each, str)
        ]
        job = cls(places, tuple(path), directory)
        return msgspec.json.encode(job).decode()
