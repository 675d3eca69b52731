"""What was found, as tables: for the terminal, and for the page. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import msgspec

from ..machine import Machine
from ..measure import Row, spread
from ..report import Results, filled, machine_lines, markdown, number
from .subjects import OFFICIAL, OURS
from .trials import Answer

__all__ = ["Compared", "Found", "fill", "shown", "speed", "tables", "time"]

HEAD: Final = ["", "official pair", "stepflow-runtime"]

# Longer words are cut; whoever wants them all has the JSON.
LONGEST: Final = 120
_PLAIN: Final = re.compile(r"[\w ,.+-]+")

# Of the page of speed: what is told here of it, by case and by side.
_SPEED: Final = {
    "a script, from its start to its end": ("cold", "official", "ours, asyncio"),
    "the import, to the first name that is used": (
        "import",
        "import stepflow_py",
        "from stepflow_runtime import StepflowRuntime",
    ),
    "start, until it can be used": ("start", "official", "ours, asyncio"),
    "one run at a time": ("run at 1", "official", "ours, asyncio"),
    "10 runs at a time": ("run at 10", "official", "ours, asyncio"),
    "50 runs at a time": ("run at 50", "official", "ours, asyncio"),
    "200 runs at a time": ("run at 200", "official", "ours, asyncio"),
    "a batch of 10,000": ("batch of 10,000", "official, as messages", "ours"),
}


class Found(msgspec.Struct, frozen=True):
    """What a trial has shown, by subject."""

    trial: str
    section: str
    about: str
    rounds: int
    answers: dict[str, dict[str, Answer]]


class Compared(msgspec.Struct, frozen=True):
    """All that one run of the command has shown."""

    command: str
    at: str
    machine: Machine
    found: list[Found]


def tables(found: Iterable[Found]) -> str:
    """A table in which each trial has a line of its own, and then its questions."""
    return _table(HEAD, [line for each in found for line in _lines(each)])


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Words are to be read from the left; nothing, if there is nothing in it."""
    rule = ["---"] * len(head)
    rows = [f"| {' | '.join(cells)} |" for cells in (head, rule, *lines)]
    return "\n".join(rows) if lines else ""


def _lines(found: Found) -> Iterator[list[str]]:
    rounds = f" (median of {found.rounds})" if found.rounds > 1 else ""
    yield [f"**{found.about}**{rounds}", "", ""]
    official, ours = found.answers[OFFICIAL], found.answers[OURS]
    for question in dict.fromkeys([*official, *ours]):
        yield [question, _shown(official, question), _shown(ours, question)]


def _shown(answers: Mapping[str, Answer], question: str) -> str:
    answer = answers.get(question, "")
    if question.startswith("time ") and isinstance(answer, int | float):
        return time(answer)
    return shown(answer) if answer != "" else ""


def time(seconds: float) -> str:
    """A time, as people read it."""
    return f"{number(seconds)} s" if seconds >= 1 else f"{number(seconds * 1000)} ms"


def shown(answer: Answer) -> str:
    """An answer in a cell; what a server or a library has said, as code."""
    if isinstance(answer, int):
        return f"{answer:,}"
    if isinstance(answer, float):
        return number(answer)
    if _PLAIN.fullmatch(answer):
        return answer
    cut = answer if len(answer) <= LONGEST else f"{answer[:LONGEST]} …"
    return f"`{cut.replace('`', chr(39)).replace('|', chr(166))}`"


def speed(results: Results) -> str:
    """What was measured of speed, of the results of the benchmarks."""
    rows = {(each.case, each.side): each for each in results.rows}
    lines = [
        [f"{about}, {rows[case, ours].unit}"]
        + [_median(rows[case, side]) for side in (official, ours)]
        for about, (case, official, ours) in _SPEED.items()
    ]
    return markdown([f"{results.at}", *HEAD[1:]], lines)


def _median(row: Row) -> str:
    return number(spread(row.samples).median)


def fill(page: str, compared: Compared, results: Results) -> str:
    """The page with its tables made anew, if all of them were measured."""

    def make(name: str) -> str:
        if name == "speed":
            return speed(results)
        if name == "machine":
            return f"```text\n{machine(compared)}\n```"
        return tables(_of(name, compared.found))

    return filled(page, make)


def machine(compared: Compared) -> str:
    """What was compared where, and when."""
    return machine_lines(
        Results(compared.command, compared.at, compared.machine, rows=[])
    )


def _of(section: str, found: Sequence[Found]) -> list[Found]:
    return [each for each in found if each.section == section]
