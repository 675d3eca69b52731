"""``python -m benchmarks.comparison``: the official launcher and client, and ours, side by side.

Each trial is done by both in turn, each time in a program of its own. Some six minutes;
the official pair has most of them, in time-outs and in ends that wait for a worker.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from ..__main__ import server_version
from ..machine import this_machine
from ..report import decode
from .arena import once, united
from .page import Compared, Found, fill, machine, tables
from .subjects import SUBJECTS
from .trials import TRIALS, Trial

__all__ = ["main"]

SPEED: Final = Path("docs/plots/results.json")


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = _parser().parse_args(arguments)
    compared = Compared(
        command=_command(chosen.only),
        at=time.strftime("%Y-%m-%d %H:%M %Z"),
        machine=this_machine(server_version()),
        found=[],
    )
    print(machine(compared), flush=True)
    for found in _tried(chosen.only or list(TRIALS.values())):
        compared.found.append(found)
        print(f"\n{tables([found])}", flush=True)
    if chosen.json:
        chosen.json.write_bytes(msgspec.json.format(msgspec.json.encode(compared)))
    if chosen.page:
        text = chosen.page.read_text()
        results = decode(SPEED.read_bytes())
        chosen.page.write_text(fill(text, compared, results))


def _tried(trials: Sequence[Trial]) -> Iterator[Found]:
    for trial in trials:
        yield Found(
            trial.name, trial.section, trial.about, trial.rounds, _in_turns(trial)
        )


def _in_turns(trial: Trial) -> dict[str, dict[str, float | int | str]]:
    rounds = [
        {subject: once(trial, subject) for subject in SUBJECTS}
        for _ in range(trial.rounds)
    ]
    return {subject: united([each[subject] for each in rounds]) for subject in SUBJECTS}


def _command(only: Sequence[Trial] | None) -> str:
    words = "python -m benchmarks.comparison"
    return f"{words} --only '{';'.join(each.name for each in only)}'" if only else words


def _trials(names: str) -> list[Trial]:
    try:
        return [TRIALS[name] for name in names.split(";")]
    except KeyError as exc:
        raise argparse.ArgumentTypeError(
            f"there is no trial {exc}; there are {'; '.join(TRIALS)}"
        ) from exc


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.comparison", description=__doc__
    )
    parser.add_argument(
        "--only", type=_trials, metavar="TRIAL[;TRIAL]", help="these trials, not all"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write what was found there"
    )
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="fill the tables of that page"
    )
    return parser


if __name__ == "__main__":
    main()
