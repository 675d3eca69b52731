"""``python -m benchmarks.comparison.inside TRIAL SUBJECT DESCRIPTOR``: a trial's program.

It does one trial once, and writes what it finds as lines of JSON into the descriptor.
"""

from __future__ import annotations

import asyncio
import os
import sys
from functools import partial

import msgspec

from .subjects import SUBJECTS
from .trials import TRIALS, Answer

__all__ = ["main"]


def main(name: str, subject: str, descriptor: str) -> None:
    trial = TRIALS[name]
    tell = partial(_tell, int(descriptor))
    if trial.is_for_trio:
        import trio

        trio.run(trial.perform, SUBJECTS[subject], tell)
    else:
        asyncio.run(trial.perform(SUBJECTS[subject], tell))


def _tell(descriptor: int, question: str, answer: Answer) -> None:
    os.write(descriptor, msgspec.json.encode((question, answer)) + b"\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
