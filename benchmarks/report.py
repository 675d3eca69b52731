"""Results as tables, as JSON, and beside earlier ones. Pure: returns text, prints nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec

from .machine import Machine, differences
from .measure import Check, Row, Spread, spread

__all__ = [
    "Results",
    "comparison",
    "decode",
    "encode",
    "filled",
    "machine_lines",
    "markdown",
    "number",
    "summary",
    "table",
]

MEASURED: Final = re.compile(
    r"(<!-- measured: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL
)

# A change that is not told: single rounds differ by more.
_NOISE: Final = 0.05


class Results(msgspec.Struct, frozen=True):
    """All that one run of the benchmarks has shown."""

    command: str
    at: str
    machine: Machine
    rows: list[Row]


def encode(results: Results) -> bytes:
    """A line for each row, so that files of two runs can be read side by side."""
    head = msgspec.json.encode(msgspec.structs.replace(results, rows=[]))
    rows = b",\n".join(map(msgspec.json.encode, results.rows))
    return head.removesuffix(b"]}") + b"\n" + rows + b"\n]}\n"


def decode(content: bytes) -> Results:
    return msgspec.json.decode(content, type=Results)


def number(value: float) -> str:
    """With three digits or so, as people read it."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def table(rows: Sequence[Row]) -> str:
    """Rows of one case, side by side with what was promised."""
    also = list(dict.fromkeys(name for each in rows for name in each.also))
    head = ["", rows[0].unit, "", *also, "beside", "ratio", "", "promise", ""]
    cells = [line for each in rows for line in _lines(each, also)]
    notes = [f"    {each.side}: {each.note}" for each in rows if each.note]
    return "\n".join([_aligned([head, *cells]), *notes, *_reasons(rows)])


def _lines(row: Row, also: Sequence[str]) -> Iterable[list[str]]:
    """A row with its first check, and a line for each other one."""
    name = row.side if row.x is None else f"{row.side}, {row.x:g}"
    shown = [name, *_spread_cells(row), *(_median(row.also.get(key)) for key in also)]
    for check in row.checks or (None,):
        yield [*shown, *_check_cells(check)]
        shown = [""] * len(shown)


def _spread_cells(row: Row) -> list[str]:
    if not row.samples:
        return ["-", ""]
    found = spread(row.samples)
    return [number(found.median), _range(found) if len(row.samples) > 1 else ""]


def _median(values: Sequence[float] | None) -> str:
    return number(spread(values).median) if values else ""


def _range(found: Spread) -> str:
    return f"({number(found.low)} to {number(found.high)})"


def _check_cells(check: Check | None) -> list[str]:
    if check is None:
        return [""] * 5
    if check.against is None:
        ratio = ["", ""]
    else:
        ratio = [f"{check.measured.median:.2f} x", _range(check.measured)]
    return [check.against or "", *ratio, _promise(check), _verdict(check)]


def _promise(check: Check) -> str:
    if check.promise is None:
        return ""
    return f"{'>=' if check.at_least else '<='} {check.promise:g}"


def _verdict(check: Check) -> str:
    return {None: "", True: "ok", False: "MISSED"}[check.is_kept]


def _reasons(rows: Sequence[Row]) -> list[str]:
    return [
        f"    missed by {each.side}: {check.reason}"
        for each in rows
        for check in each.checks
        if check.is_kept is False and check.reason
    ]


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Names to the left, numbers to the right; columns in which nothing stands are left out."""
    columns = [
        column for column in zip(*lines, strict=True) if any(column) or column is lines
    ]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in zip(*columns, strict=True)
    )


def summary(rows: Iterable[Row]) -> str:
    """How many promises were kept, and which were not."""
    verdicts = [
        (each, check)
        for each in rows
        for check in each.checks
        if check.is_kept is not None
    ]
    missed = [
        f"    {each.case}: {each.side}, "
        f"{number(check.measured.median)}{f' x {check.against}' if check.against else ''}"
        f" (promised {_promise(check)})"
        for each, check in verdicts
        if not check.is_kept
    ]
    kept = len(verdicts) - len(missed)
    return "\n".join([f"{kept} promises kept, {len(missed)} missed", *missed])


def machine_lines(results: Results) -> str:
    """What was measured on, and by which command."""
    machine = results.machine
    packages = ", ".join(
        f"{name} {version}" for name, version in machine.packages.items()
    )
    system = f"Linux {machine.kernel}; load before: {machine.load:g}"
    return "\n".join(
        [
            f"{results.command} ({results.at}, {machine.commit})",
            f"{machine.cpu}, {machine.cores} cores, {machine.memory_gb} GB, {system}",
            f"Python {machine.python}; stepflow-server {machine.server}",
            packages,
        ]
    )


def comparison(old: Results, new: Results) -> str:
    """Median beside median, of what both have."""
    before = {each.key: each for each in old.rows}
    pairs = [(before[each.key], each) for each in new.rows if each.key in before]
    lines = [["", "unit", "old", "new", "change"]]
    lines += [_change(*pair) for pair in pairs if all(each.samples for each in pair)]
    found = differences(old.machine, new.machine)
    warning = (
        ["not the same machine, so mind what you compare:", *(f"  {x}" for x in found)]
        if found
        else []
    )
    return "\n".join([*warning, _aligned(lines)])


def _change(old: Row, new: Row) -> list[str]:
    before, now = spread(old.samples).median, spread(new.samples).median
    change = now / before - 1 if before else 0.0
    x = "" if new.x is None else f", {new.x:g}"
    told = f"{change:+.0%}" if abs(change) >= _NOISE else "same"
    return [f"{new.case}: {new.side}{x}", new.unit, number(before), number(now), told]


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table for a page, or nothing if there is nothing in it."""
    lines = list(lines)
    if not lines:
        return ""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def filled(page: str, make: Callable[[str], str]) -> str:
    """A page with what stands between its marks made anew, by the mark's name.

    All of it, or none: a page is of one run, so one that was only measured in part is left.
    """
    made = {found["name"]: make(found["name"]) for found in MEASURED.finditer(page)}
    if not all(made.values()):
        return page
    return MEASURED.sub(
        lambda found: f"{found[1]}\n{made[found['name']]}\n\n{found[3]}", page
    )
