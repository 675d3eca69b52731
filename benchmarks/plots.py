"""``python -m benchmarks.plots results.json``: the plots and tables of ``docs/performance.md``.

Everything on the page that was measured is made here, so that it is of one run: SVG files
beside the results, and the tables between the page's marks. Readable on light and on dark
pages: nothing behind, and nothing very dark or very light.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from .measure import Row, spread
from .report import Results, decode, machine_lines, markdown, number

__all__ = ["main"]

PAGE: Final = Path("docs/performance.md")
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
MEASURED: Final = re.compile(
    r"(<!-- measured: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL
)

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
    rates: dict[str, dict[str, str]] = {}
    for each in results.rows:
        case, _, level = each.case.partition(" at ")
        if case == "stores":
            rates.setdefault(each.side, {})[level] = number(value(each))
    levels = list(dict.fromkeys(level for side in rates.values() for level in side))
    lines = [
        [
            side,
            *(of_side.get(level, "") for level in levels),
            _left_by_run(results, side),
        ]
        for side, of_side in rates.items()
    ]
    head = ["", *(f"runs/s at {level}" for level in levels), "KB of RSS a run"]
    return markdown(head, lines)


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


def machine(results: Results) -> str:
    return f"```text\n{machine_lines(results)}\n```"


TABLES: Final = {
    "costs": costs,
    "machine": machine,
    "promises": promises,
    "stores": stores,
}


def fill(page: str, results: Results) -> str:
    """A page with what stands between its marks made anew."""

    def table(found: re.Match[str]) -> str:
        return f"{found[1]}\n{TABLES[found['name']](results)}\n\n{found[3]}"

    return MEASURED.sub(table, page)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plots", description=__doc__
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--plots", type=Path, default=PLOTS)
    chosen = parser.parse_args()
    results = decode(chosen.results.read_bytes())
    chosen.plots.mkdir(exist_ok=True)
    plot_concurrency(results.rows, chosen.plots / "concurrency.svg")
    plot_batches(results.rows, chosen.plots / "batch.svg")
    plot_memory(results.rows, chosen.plots / "memory.svg")
    chosen.page.write_text(fill(chosen.page.read_text(), results))
    print(f"wrote {chosen.page} and the plots in {chosen.plots}")


if __name__ == "__main__":
    main()
