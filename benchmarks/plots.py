"""``python -m benchmarks.plots results.json``: the plots and tables of the pages.

Everything on them that was measured is made here, so that a page is of one run: SVG files
beside the results, and the tables between the pages' marks. Readable on light and on dark
pages: nothing behind, and nothing very dark or very light.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from .cases.stores import ALL_KEPT, IN_MEMORY, IN_SQL, KEPT, SQLITE, UNSYNCED
from .measure import Row, spread
from .report import Results, decode, filled, machine_lines, markdown, number

__all__ = ["main"]

PAGES: Final = [Path("docs/performance.md"), Path("docs/durability.md")]
PLOTS: Final = Path("docs/plots")

GREY: Final = "#808080"
COLOURS: Final = {
    "ours": "#3b8ed0",
    "ours, in memory": "#3b8ed0",
    "ours, sqlite": "#3aa57a",
    "ours, recycled": "#a06cc8",
    "official": "#d9822b",
    "limit": GREY,
}
Series = tuple[list[float], list[float]]
Value = Callable[[Row], float]


# -- plots -----------------------------------------------------------------------------


def value(row: Row) -> float:
    return spread(row.samples).median


def also(name: str, row: Row) -> float:
    return spread(row.also[name]).median


def series(rows: Iterable[Row], case: str, of: Value) -> dict[str, Series]:
    """The lines of a plot, by side."""
    found: dict[str, Series] = {}
    for each in rows:
        if each.case == case and each.x is not None and each.samples:
            xs, ys = found.setdefault(each.side, ([], []))
            xs.append(each.x)
            ys.append(of(each))
    return found


def draw(
    axes: Any, lines: Mapping[str, Series], *, x: str, y: str, **scale: str
) -> None:
    """One panel."""
    for name, (xs, ys) in lines.items():
        axes.plot(
            xs,
            ys,
            label=name,
            color=COLOURS.get(name),
            marker="o",
            markersize=3.5,
            linestyle="--" if name == "limit" else "-",
        )
    axes.set(xlabel=x, ylabel=y, **scale)
    for axis, kind in ((axes.xaxis, "xscale"), (axes.yaxis, "yscale")):
        axis.set_major_formatter(lambda tick, _: f"{tick:,g}")
        if scale.get(kind) == "log":
            axis.set_minor_formatter(lambda *_: "")
    if scale.get("yscale") != "log" and axes.get_ylim()[0] > 0:
        axes.set_ylim(bottom=0)
    axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, labelcolor=GREY)


def panels(path: Path, *draws: Callable[[Any], None]) -> None:
    """Panels side by side, as a file."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    style: dict[Any, Any] = {
        "axes.edgecolor": GREY,
        "axes.labelcolor": GREY,
        "font.size": 9,
        "svg.fonttype": "none",  # text stays text, and the file small
        "svg.hashsalt": "stepflow",  # the same results make the same file
        "xtick.color": GREY,
        "ytick.color": GREY,
    }
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(
            1, len(draws), figsize=(4.4 * len(draws), 3.2), layout="constrained"
        )
        for each, panel in zip(draws, [axes] if len(draws) == 1 else axes, strict=True):
            each(panel)
        figure.savefig(path, transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    # matplotlib leaves blanks at the ends of lines.
    lines = path.read_text().splitlines()
    path.write_text("".join(f"{line.rstrip()}\n" for line in lines))


def plot_concurrency(rows: Sequence[Row], path: Path) -> None:
    rates = series(rows, "growth-concurrency", value)
    latencies = series(rows, "growth-concurrency", partial(also, "p50 ms"))
    at_once = "runs at a time"
    panels(
        path,
        lambda axes: draw(axes, rates, x=at_once, y="runs/s", xscale="log"),
        lambda axes: draw(
            axes, latencies, x=at_once, y="ms a run, p50", xscale="log", yscale="log"
        ),
    )


def plot_batches(rows: Sequence[Row], path: Path) -> None:
    rates = series(rows, "growth-batch", value)
    took = series(rows, "growth-batch", partial(also, "ms"))
    log = {"xscale": "log", "yscale": "log"}
    panels(
        path,
        lambda axes: draw(axes, rates, x="items in a batch", y="items/s", **log),
        lambda axes: draw(axes, took, x="items in a batch", y="ms a batch", **log),
    )


def plot_memory(rows: Sequence[Row], path: Path) -> None:
    server = series(rows, "growth-memory", value)
    ours = series(rows, "growth-memory", partial(also, "this process, MB grown"))
    panels(
        path,
        lambda axes: draw(axes, server, x="runs made", y="RSS of the server, MB"),
        lambda axes: draw(
            axes, ours, x="runs made", y="growth of the caller's RSS, MB"
        ),
    )


# -- tables ----------------------------------------------------------------------------


def promises(results: Results) -> str:
    """Every row that has a promise."""
    lines = [
        [
            f"{each.case}: {each.side}",
            f"{number(value(each))} {each.unit}",
            f"{check.measured.median:.2f} × {check.against}" if check.against else "",
            f"{'≥' if check.at_least else '≤'} {check.promise:g}",
            "ok" if check.is_kept else f"**missed**{_reason(check.reason)}",
        ]
        for each in results.rows
        for check in each.checks
        if check.promise is not None
    ]
    return markdown(["", "median", "beside", "promise", ""], lines)


def _reason(reason: str) -> str:
    return f": {reason}" if reason else ""


def stores(results: Results) -> str:
    """Rates by store and level, and what a run leaves in the server's memory."""
    rates, levels = _rates(results, "stores")
    left = {side: _left_by_run(results, f"ours, {side}") for side in rates}
    lines = [
        [side, *(of_side.get(level, "") for level in levels), left[side]]
        for side, of_side in rates.items()
        if left[side]
    ]
    head = ["", *(f"runs/s at {level}" for level in levels), "KB of RSS a run"]
    return markdown(head, lines)


def _rates(
    results: Results, case: str
) -> tuple[dict[str, dict[str, str]], Sequence[str]]:
    """Medians by side and level; and the levels."""
    found: dict[str, dict[str, str]] = {}
    for each in results.rows:
        name, _, level = each.case.rpartition(" at ")
        if name == case:
            found.setdefault(each.side, {})[level] = number(value(each))
    return found, list(
        dict.fromkeys(level for side in found.values() for level in side)
    )


def _left_by_run(results: Results, side: str) -> str:
    """What the last row of the series says."""
    found = [
        also("KB/run", each)
        for each in results.rows
        if each.case == "growth-memory" and each.side == side and each.x
    ]
    return number(found[-1]) if found else ""


def costs(results: Results) -> str:
    """What the server keeps of a run."""
    lines = [
        [each.side, number(value(each))]
        for each in results.rows
        if each.case == "growth-costs"
    ]
    return markdown(["what is made", "KB of the server's memory"], lines)


def kept(results: Results) -> str:
    """Stores by speed, and by what they keep through what."""
    rates, levels = _rates(results, "stores")
    lines = [
        [side, *(of_side[level] for level in levels), *KEPT.get(side, ALL_KEPT)]
        for side, of_side in rates.items()
    ]
    head = ["", *(f"runs/s at {level}" for level in levels)]
    told = ["left by a crash of the server", "by a crash of the machine, or no power"]
    return markdown([*head, *told], lines)


# What a run goes through, each part measured by a store that does no more than that.
PARTS: Final = {
    "HTTP, the workflow, our client": IN_MEMORY,
    "SQL: some 30 statements, each passed to a thread and back": IN_SQL,
    "writing some 45 pages to the file, and its locks": UNSYNCED,
    "12 syncs": SQLITE,
}


def parts(results: Results) -> str:
    """Where the milliseconds of a run go: differences of medians, one run at a time."""
    took = {
        each.side: also("p50 ms", each)
        for each in results.rows
        if each.case == "stores at 1"
    }
    if not took.keys() >= set(PARTS.values()):
        return ""
    lines, before = [], 0.0
    for name, side in PARTS.items():
        lines.append(
            [name, number(took[side] - before), f"{number(took[side])}, {side}"]
        )
        before = took[side]
    return markdown(["", "ms a run", "of so many with the store"], lines)


def by_steps(results: Results) -> str:
    found = series(results.rows, "stores, by steps", value)
    steps = next(iter(found.values()), ([], []))[0]
    lines = [[side, *map(number, ys)] for side, (_, ys) in found.items()]
    head = ["ms a run", *(f"{each:g} step{'s'[: each > 1]}" for each in steps)]
    return markdown(head, lines)


def by_way(results: Results) -> str:
    """Of batches and ``run_many``."""
    found: dict[str, dict[str, str]] = {}
    for each in results.rows:
        if each.unit == "items/s" and each.case.startswith("stores, "):
            way = each.case.removeprefix("stores, ")
            found.setdefault(each.side, {})[way] = number(value(each))
    ways = list(dict.fromkeys(way for side in found.values() for way in side))
    lines = [[side, *map(of_side.__getitem__, ways)] for side, of_side in found.items()]
    return markdown(["items/s", *ways], lines)


def slow(results: Results) -> str:
    """Rates where a sync takes longer, and the part of the runs that fail."""
    rates, levels = _rates(results, "stores, slow disk")
    failed: dict[str, dict[str, str]] = {}
    for each in results.rows:
        if each.unit == "% failed":
            case = each.case.removeprefix("stores, ")
            failed.setdefault(each.side, {})[case] = f"{value(each):.0f} %"
    cases = list(dict.fromkeys(case for side in failed.values() for case in side))
    lines = [
        [
            side,
            *(of_side[level] for level in levels),
            *(failed.get(side, {}).get(case, "") for case in cases),
        ]
        for side, of_side in rates.items()
    ]
    head = ["", *(f"runs/s at {level}" for level in levels)]
    told = [f"failed: {case}" for case in cases]
    return markdown([*head, *told], lines)


def disk(results: Results) -> str:
    """What a sync takes here."""
    found = [each for each in results.rows if each.case == "stores, a sync"]
    return "".join(
        f"A sync after a page was appended takes {number(value(each))} ms on this disk "
        f"({number(also('p99 ms', each))} at p99)."
        for each in found
    )


def machine(results: Results) -> str:
    return f"```text\n{machine_lines(results)}\n```"


TABLES: Final = {
    "costs": costs,
    "disk": disk,
    "machine": machine,
    "promises": promises,
    "stores": stores,
    "stores-by-steps": by_steps,
    "stores-by-way": by_way,
    "stores-kept": kept,
    "stores-parts": parts,
    "stores-slow": slow,
}


def fill(page: str, results: Results) -> str:
    """A page with what stands between its marks made of the results, if all is there."""
    return filled(page, lambda name: TABLES[name](results))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plots", description=__doc__
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--page", type=Path, nargs="+", default=PAGES)
    parser.add_argument("--plots", type=Path, default=PLOTS)
    chosen = parser.parse_args()
    results = decode(chosen.results.read_bytes())
    _draw_all(results.rows, chosen.plots)
    for page in chosen.page:
        text = page.read_text()
        filled = fill(text, results)
        page.write_text(filled)
        print(f"{page}: {'not all of it was measured' if filled == text else 'filled'}")


def _draw_all(rows: Sequence[Row], folder: Path) -> None:
    """Those whose series were measured."""
    folder.mkdir(exist_ok=True)
    plots = {
        "growth-concurrency": (plot_concurrency, "concurrency.svg"),
        "growth-batch": (plot_batches, "batch.svg"),
        "growth-memory": (plot_memory, "memory.svg"),
    }
    measured = {each.case for each in rows}
    for case, (plot, name) in plots.items():
        if case in measured:
            plot(rows, folder / name)


if __name__ == "__main__":
    main()
