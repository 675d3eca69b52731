"""Where trials take place: each in a program of its own, bounded in time, cleaned up after.

Whatever a program leaves behind is looked at, told, and then ended here.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

import msgspec

from .. import peers
from .processes import MARK, kill, kinds, marked, wait_gone
from .trials import Answer, Trial

__all__ = ["Answers", "TrialError", "ended_as", "once", "united"]

Answers = dict[str, Answer]

# How long what is to end by itself has for it, after its program.
PATIENCE: Final = 3.0
LEFT: Final = "left 3 s after the program's end"
LONG_PATIENCE: Final = 45.0
LATER: Final = "left 45 s after that"
ENDED_HERE: Final = "not within {limit:g} s"

_ENDED_WELL: Final = "exit code 0"


class TrialError(Exception):
    """A trial's program failed where that is no answer."""


def once(trial: Trial, subject: str) -> Answers:
    """Have one of the two do a trial; leave nothing behind, whatever it leaves."""
    mark = uuid.uuid4().hex
    try:
        with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as printed:
            end = _end_of_program(trial, subject, mark, told, printed)
            answers = _read(told)
            if trial.tells_end is not None:
                answers[trial.tells_end] = end
            elif end != _ENDED_WELL:
                printed.seek(0)
                words = printed.read().decode(errors="replace")
                raise TrialError(f"{trial.name}, {subject}: {end}\n{words}")
        if trial.tells_left:
            answers[LEFT] = kinds(wait_gone(mark, PATIENCE))
        if trial.tells_later:
            answers[LATER] = kinds(wait_gone(mark, LONG_PATIENCE))
        return answers
    finally:
        kill(marked(mark))


def _end_of_program(
    trial: Trial, subject: str, mark: str, told: IO[bytes], printed: IO[bytes]
) -> str:
    command = [sys.executable, "-m", "benchmarks.comparison.inside"]
    with _program(
        [*command, trial.name, subject, str(told.fileno())],
        cwd=Path(__file__).parents[2],
        env=_environment(mark),
        pass_fds=[told.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=printed,
    ) as process:
        try:
            return ended_as(process.wait(trial.limit))
        except subprocess.TimeoutExpired:
            return ENDED_HERE.format(limit=trial.limit)


@contextmanager
def _program(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    process = subprocess.Popen(command, **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _environment(mark: str) -> Mapping[str, str]:
    """In which ``python3`` is this interpreter, and nothing steers a server."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    inherited = {
        name: value
        for name, value in peers.environment().items()
        if not (name.startswith("STEPFLOW_") or name.lower().endswith("_proxy"))
    }
    return {**inherited, "PATH": path, MARK: mark}


def _read(told: IO[bytes]) -> Answers:
    told.seek(0)
    lines = told.read().splitlines()
    return dict(msgspec.json.decode(line, type=tuple[str, Answer]) for line in lines)


def ended_as(code: int) -> str:
    """How a program ended, by its exit code."""
    return f"exit code {code}" if code >= 0 else f"of {signal.Signals(-code).name}"


def united(rounds: Sequence[Answers]) -> Answers:
    """One answer to each question: of numbers the median, of words all that differ."""
    questions = dict.fromkeys(question for each in rounds for question in each)
    return {
        question: _united([each[question] for each in rounds if question in each])
        for question in questions
    }


def _united(answers: Sequence[Answer]) -> Answer:
    numbers = [each for each in answers if isinstance(each, int | float)]
    if len(numbers) == len(answers):
        return statistics.median(numbers)
    return " / ".join(dict.fromkeys(map(str, answers)))
