"""Inputs given to a target, each with a deadline and an eye on the memory.

Contract: what goes wrong with an input is an exception that is raised from :func:`execute`,
a hang and a growth of memory too.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from .mutator import Mutator
from .targets import Target

__all__ = ["CORPUS", "DEADLINE", "corpus_of", "execute", "mutator_for", "put_down"]

CORPUS: Final = Path(__file__).parent / "corpus"

# Seconds that an input may take, on whichever machine: most take milliseconds.
DEADLINE: Final = 10.0

# By which the memory of the process may grow. The longest inputs are of half a megabyte; as
# many empty lines, each of which is checked in five places, take 300 MB.
MOST_GROWTH: Final = 500 * 1024 * 1024


class HangError(Exception):
    """An input took longer than the deadline."""


class GrowthError(Exception):
    """An input took more memory than it may."""


def corpus_of(target: Target) -> dict[str, bytes]:
    """The inputs of a target that are kept in the repository, by their names."""
    files = sorted((CORPUS / target.name).iterdir())
    return {file.name: file.read_bytes() for file in files}


def mutator_for(target: Target, seed: str) -> Mutator:
    return Mutator([*corpus_of(target).values()], target.words, seed)


def execute(target: Target, data: bytes) -> None:
    """Give an input to a target. In the main thread."""
    before = _peak()
    with _deadline():
        target.run(data)
    grown = _peak() - before
    if grown > MOST_GROWTH:
        raise GrowthError(f"{len(data)} bytes took {grown} bytes of memory")


def put_down(folder: Path, target: Target, what: str, data: bytes) -> str:
    """Write an input into a file, and tell how it is given to its target again."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{target.name}-{what}"
    file.unlink(missing_ok=True)
    with os.fdopen(
        os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb"
    ) as f:
        f.write(data)
    return f"python -m tests.fuzz --replay {file} {target.name}"


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _deadline() -> Iterator[None]:
    def on_alarm(*_: Any) -> None:
        raise HangError(f"it took longer than {DEADLINE:g} s")

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, DEADLINE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
