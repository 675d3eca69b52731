"""Progress as lines of a given width: the drawing, apart from the terminal.

A leaf. Contract: pure. No line is wider than asked for, in columns and not in characters; there
are no more lines than asked for; without Unicode, nothing but ASCII of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from rich.cells import cell_len, set_cell_size

from .progress import BatchProgress, Phase, Row, RunProgress
from .text import one_line, seconds

__all__ = ["ASCII", "UNICODE", "Glyphs", "Line", "draw_batch", "draw_run"]

# A terminal that is narrower has no room for bars.
_WITH_BARS: Final = 60
_BAR: Final = 20


class Glyphs(NamedTuple):
    marks: dict[Phase, str]
    full: str
    empty: str
    more: str


UNICODE: Final = Glyphs(
    {
        Phase.WAITING: "·",
        Phase.RUNNING: "▸",
        Phase.COMPLETED: "✔",
        Phase.FAILED: "✘",
    },
    full="━",
    empty="─",
    more="…",
)
ASCII: Final = Glyphs(
    {Phase.WAITING: ".", Phase.RUNNING: ">", Phase.COMPLETED: "+", Phase.FAILED: "x"},
    full="#",
    empty="-",
    more="...",
)


class Line(NamedTuple):
    """:ivar phase: what its colour is to tell; None: nothing"""

    text: str
    phase: Phase | None = None


def draw_run(
    progress: RunProgress,
    name: str,
    now: float,
    width: int,
    height: int,
    glyphs: Glyphs,
) -> list[Line]:
    rows = progress.rows(now)
    done, total = progress.counts
    title = f"{one_line(name)}  {done} of {total} steps"
    shown, hidden = _chosen(rows, max(1, height - 2))
    has_counts = any(row.total > 1 for row in shown)
    lines = [Line(_with_right(title, seconds(progress.elapsed(now)), width))]
    lines += [_line(row, width, glyphs, has_counts) for row in shown]
    if hidden:
        rest = f"  {glyphs.more} {_summary(hidden)}"
        lines.append(Line(set_cell_size(rest, min(width, cell_len(rest)))))
    return lines


def _chosen(rows: Sequence[Row], room: int) -> tuple[list[Row], list[Row]]:
    """The rows to be seen where there is no room for all: what is under way before all."""
    if len(rows) <= room:
        return list(rows), []
    weight = {
        Phase.RUNNING: 0,
        Phase.FAILED: 1,
        Phase.COMPLETED: 2,
        Phase.WAITING: 3,
    }
    # Of those that are over, the last ones; of those that wait, the first.
    places = sorted(
        range(len(rows)),
        key=lambda place: (
            weight[rows[place].phase],
            -place if rows[place].phase.is_over else place,
        ),
    )
    kept = set(places[:room])
    hidden = [row for place, row in enumerate(rows) if place not in kept]
    return [rows[place] for place in sorted(kept)], hidden


def _summary(rows: Sequence[Row]) -> str:
    counts = (
        (sum(row.phase is phase for row in rows), phase.name.lower()) for phase in Phase
    )
    return ", ".join(f"{count} {name}" for count, name in counts if count)


def _line(row: Row, width: int, glyphs: Glyphs, has_counts: bool) -> Line:
    left = f"{'  ' * row.depth}{glyphs.marks[row.phase]} {one_line(row.label)}"
    if row.attempt > 1:
        left += f" (attempt {row.attempt})"
    right = seconds(row.elapsed) if row.elapsed is not None else ""
    right = f"{right:>8}"
    if has_counts:
        count = f"{row.done}/{row.total}" if row.total > 1 else ""
        right = f"{count:>12}{right}"
    if width >= _WITH_BARS:
        right = _bar(row.done, row.total, _BAR, glyphs) + right
    return Line(_with_right(left, right, width), row.phase)


def _bar(done: int, total: int, width: int, glyphs: Glyphs) -> str:
    full = width * min(done, total) // total if total else 0
    return glyphs.full * full + glyphs.empty * (width - full)


def _with_right(left: str, right: str, width: int) -> str:
    """Both in one line, the right one whole, if there is room for it at all."""
    room = width - cell_len(right) - 1
    if room < 1:
        return set_cell_size(left, width)
    return f"{set_cell_size(left, room)} {right}"


def draw_batch(
    progress: BatchProgress, now: float, width: int, glyphs: Glyphs
) -> list[Line]:
    words = batch_words(progress, now)
    phase = Phase.FAILED if progress.failed else Phase.RUNNING
    if progress.total is None:
        return [Line(_fitted(words, width), phase)]
    count = f"{progress.done}/{progress.total}"
    share = f"{100 * progress.done // progress.total if progress.total else 100:>3}%"
    bar = _bar(progress.done, progress.total, max(4, width - len(count) - 7), glyphs)
    first = f"{bar} {share} {count}"
    return [Line(_fitted([first], width), phase), Line(_fitted(words[1:], width))]


def _fitted(words: Sequence[str], width: int) -> str:
    """As many of them as there is room for."""
    text = words[0] if words else ""
    for word in words[1:]:
        if cell_len(f"{text}  {word}") > width:
            break
        text = f"{text}  {word}"
    return set_cell_size(text, min(width, cell_len(text)))


def batch_words(progress: BatchProgress, now: float) -> list[str]:
    of = "" if progress.total is None else f" of {progress.total}"
    words = [f"{progress.done}{of} items", f"{progress.failed} failed"]
    words.append(f"{progress.running} running")
    words.append(f"{progress.rate(now):.1f}/s")
    words.append(seconds(progress.elapsed(now)))
    if progress.running and (remaining := progress.remaining(now)) is not None:
        words.insert(4, f"ETA {seconds(remaining)}")
    return words
