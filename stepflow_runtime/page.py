"""A timeline as a page: one HTML document, for anybody to open anywhere.

Contract: it needs nothing else, loads nothing and holds no script, and says so to the browser
(``Content-Security-Policy``). It is ASCII, so that it stays what it is in whatever encoding it
is written. No text of a workflow, a run or a log is more than text in it, and what is a secret
by its name is starred. Bounded: of what there is too much, the first or the worst is shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from .executor import FlowError
from .graph import Graph, GraphStep, StepState
from .page_style import STYLE
from .page_words import (
    PEEK,
    Values,
    as_text,
    counted,
    cut,
    lasting,
    mark,
    number_of,
)
from .timeline import (
    StepAttempt,
    Timeline,
    TimelineItem,
    TimelineLog,
    TimelineStep,
)

__all__ = ["Page", "as_html", "strip"]

_POLICY: Final = (
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
)

# So many items are shown step by step on one axis; of more, some on axes of their own.
_FEW_ITEMS: Final = 20
_MOST_SHOWN: Final = 20
_MOST_ROWS: Final = 1_500
_CHUNK: Final = 500

# Characters: of a value, and of all values together.
_LONGEST: Final = 16_000
_MOST_TEXT: Final = 4_000_000
_LONGEST_LOG: Final = 4_000

_FEW_LOGS: Final = 40
_MOST_LINKS: Final = 20

_MOST_TICKS: Final = 6
_COLUMNS: Final = 200
_BUCKETS: Final = 160

_BY_STATUS: Final = {
    "COMPLETED": StepState.COMPLETED,
    "FAILED": StepState.FAILED,
    "RECOVERY_FAILED": StepState.FAILED,
    "CANCELLED": StepState.CANCELLED,
    "RUNNING": StepState.RUNNING,
}


def as_html(timeline: Timeline) -> str:
    page = "".join(Page(timeline).parts())
    return page.encode("ascii", "xmlcharrefreplace").decode()


# -- time ------------------------------------------------------------------------------


class _Axis:
    """Where in a stretch of time something is, in percent of it."""

    def __init__(self, times: Iterable[datetime | None]) -> None:
        known = [each for each in times if each is not None]
        self.start = min(known, default=datetime(1970, 1, 1, tzinfo=UTC))
        self.end = max(known, default=self.start)
        self.seconds = max((self.end - self.start).total_seconds(), 1e-6)

    def place(self, time: datetime) -> float:
        share = (time - self.start).total_seconds() / self.seconds
        return min(max(share, 0.0), 1.0) * 100

    def bar(
        self,
        kind: str,
        start: datetime,
        end: datetime,
        title: str = "",
        label: str = "",
    ) -> str:
        # A server's clock may be set back: what ends before it begins has no length.
        left, right = self.place(start), self.place(max(start, end))
        told = f' title="{as_text(title)}"' if title else ""
        return (
            f'<i class="{kind}"{told} style="left:min({left:.2f}%,100% - 3px);'
            f'width:{right - left:.2f}%">{label}</i>'
        )

    @property
    def tick(self) -> float:
        """Seconds from one tick to the next: 1, 2 or 5 of a power of ten."""
        exponent, least = -6, self.seconds / _MOST_TICKS
        while 10.0 ** (exponent + 1) < least:
            exponent += 1
        unit = 10.0**exponent
        return next(unit * by for by in (1, 2, 5, 10, 20) if unit * by >= least * 0.999)

    def head(self) -> str:
        tick = self.tick
        labels = "".join(
            f'<span style="left:{number * tick / self.seconds * 100:.2f}%">'
            f"{lasting(timedelta(seconds=number * tick)) if number else '0'}</span>"
            for number in range(int(self.seconds / tick * 0.96) + 1)
        )
        return f'<div class="axis"><span></span><span class="track">{labels}</span><span></span></div>'

    @property
    def style(self) -> str:
        return f"--tick:{self.tick / self.seconds * 100:.3f}%"


def _times_of(timeline: Timeline, *, deep: bool = True) -> Iterator[datetime | None]:
    yield from (timeline.started, timeline.ended, timeline.seen)
    for step in timeline.steps:
        yield from _times_of_step(step)
    for run in timeline.sub_runs if deep else ():
        yield from _times_of(run)


def _times_of_step(step: TimelineStep) -> Iterator[datetime | None]:
    yield from (step.ready, step.ended)
    yield from (attempt.started for attempt in step.attempts)


# -- the page --------------------------------------------------------------------------


class Page:
    """What is in the page of a run; a notebook shows some of it.

    :param most_rows: so many rows of the chart, at most
    :param longest: so many characters of a value
    :param most_text: and about so many of all values
    """

    def __init__(
        self,
        timeline: Timeline,
        *,
        most_rows: int = _MOST_ROWS,
        longest: int = _LONGEST,
        most_text: int = _MOST_TEXT,
    ) -> None:
        self._timeline = timeline
        self._values = Values(_values_of(timeline), longest=longest, most=most_text)
        self._axis = _Axis(_times_of(timeline))
        self._rows_left = most_rows
        self._rows_left_out = 0
        self._runs = {each.run_id: n for n, each in enumerate(_all_runs(timeline))}
        self._lines_of: dict[tuple[str, int | None, str], list[int]] = {}
        for place, log in enumerate(timeline.logs):
            if log.step_id is not None:
                key = (log.run_id, log.item_index, log.step_id)
                self._lines_of.setdefault(key, []).append(place)
        self._rows: dict[tuple[str, int | None, str], str] = {}
        self._failed: dict[tuple[str, int], dict[int, str]] = {}
        for run in _all_runs(timeline):
            for step in run.steps:
                if step.state is StepState.FAILED:
                    of_item = self._failed.setdefault((run.run_id, step.item_index), {})
                    of_item[step.step_index] = step.step_id
        self._shown_items: set[int] = set()

    def parts(self) -> Iterator[str]:
        timeline = self._timeline
        # Lines of the log link to the rows that there are, so these come first.
        steps = [*self._steps()]
        name = timeline.flow_name or "Run"
        yield (
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            '<meta name="referrer" content="no-referrer">'
            f"<title>{as_text(cut(name, 100))}: {timeline.status.name.lower()}</title>"
            f"<style>{STYLE}</style></head><body>"
        )
        yield from self._head(name)
        yield from self._graph()
        yield from steps
        yield from self._all_items()
        yield from self._log()
        yield f"<footer>Run {as_text(timeline.run_id)}</footer></body></html>\n"

    # -- the head ----------------------------------------------------------------------

    def _head(self, name: str) -> Iterator[str]:
        yield f"<header><h1>{as_text(cut(name, 200))}</h1>{self._badge()}</header>"
        facts = "".join(
            f"<div><dt>{title}</dt><dd>{text}</dd></div>"
            for title, text in self._facts()
        )
        yield f'<dl class="facts">{facts}</dl>'
        yield self._links()
        yield self._notes()

    def _links(self) -> str:
        timeline = self._timeline
        links = [("graph", "Graph"), ("steps", "Steps")]
        links += [("items", "Items")] if len(timeline.items) > 1 else []
        links += [("log", "Log")] if timeline.logs else []
        anchors = (f'<a href="#{anchor}">{title}</a>' for anchor, title in links)
        return f"<nav>{''.join(anchors)}</nav>"

    def _notes(self) -> str:
        notes = list(self._timeline.notes)
        if self._rows_left_out:
            rows = number_of(self._rows_left_out, "row")
            notes.append(f"{rows} of the chart left out: there are too many.")
        lines = "".join(f"<li>{as_text(note)}</li>" for note in notes)
        return f'<ul class="notes">{lines}</ul>' if lines else ""

    def _badge(self) -> str:
        status = self._timeline.status.name
        state = _BY_STATUS.get(status, StepState.WAITING)
        word = status.lower().replace("_", " ")
        return f'<span class="badge {state.value}">{state.mark} {word}</span>'

    def _facts(self) -> Iterator[tuple[str, str]]:
        timeline = self._timeline
        duration = lasting(timeline.duration)
        yield "Duration", duration if timeline.ended else f"{duration} so far"
        if timeline.started is not None:
            yield "Started", f"{timeline.started:%Y-%m-%d %H:%M:%S.%f}"[:-3] + " UTC"
        if len(timeline.items) > 1:
            counts = Counter(item.state for item in timeline.items)
            yield "Items", f"{len(timeline.items):,}: {counted(counts)}"
        steps = [step for run in _all_runs(timeline) for step in run.steps]
        yield "Steps", counted(Counter(step.state for step in steps)) or "none"
        if retried := sum(len(step.attempts) > 1 for step in steps):
            yield "Tried again", number_of(retried, "step")
        if timeline.sub_runs:
            yield "Sub-runs", f"{len(self._runs) - 1:,}"
        yield "Run", f"<code>{as_text(timeline.run_id)}</code>"
        if timeline.flow_id is not None:
            short = cut(timeline.flow_id, 17)
            yield (
                "Workflow",
                f'<code title="{as_text(timeline.flow_id)}">{as_text(short)}</code>',
            )

    def _graph(self) -> Iterator[str]:
        yield '<h2 id="graph">Graph</h2>'
        if self._timeline.graph is None:
            yield "<p>The server does not have this workflow any more.</p>"
        else:
            svg = self._timeline.graph.svg(self._timeline.states)
            yield f'<div class="graph">{svg}</div>'

    # -- steps -------------------------------------------------------------------------

    def _steps(self) -> Iterator[str]:
        yield '<h2 id="steps">Steps</h2>'
        if self._is_batch:
            yield from self._overview()
            yield from self._some_items()
        else:
            yield from self._chart_of_all()

    @property
    def _is_batch(self) -> bool:
        """Whether there are too many items to be shown step by step on one axis."""
        return len(self._timeline.items) > _FEW_ITEMS

    def _chart_of_all(self) -> Iterator[str]:
        rows = self._run_rows(self._timeline, self._axis, 0)
        yield from self._chart(self._axis, rows)

    def _chart(self, axis: _Axis, rows: Iterable[str]) -> Iterator[str]:
        yield f'<div style="{axis.style}">{axis.head()}'
        yield from rows
        yield "</div>"

    def _run_rows(self, run: Timeline, axis: _Axis, depth: int) -> Iterator[str]:
        by_item: dict[int, list[TimelineStep]] = {}
        for step in run.steps:
            by_item.setdefault(step.item_index, []).append(step)
        inner = _by_parent(run)
        several = len(run.items) > 1
        chosen = run.items if len(run.items) <= _FEW_ITEMS else _worth_seeing(run.items)
        for item in chosen:
            steps = by_item.get(item.index, ())
            if several:
                if not self._take_row(len(steps) + 1):
                    continue
                yield self._item_row(item, axis, depth)
            yield from self._item_steps(run, steps, inner, axis, depth + several)
        if len(chosen) < len(run.items):
            yield _more_items(run.items, chosen, depth)
            return  # what they have started is not shown either
        for sub_runs in inner.values():  # of nobody knows which item
            for sub_run in sub_runs:
                yield from self._sub_run(sub_run, axis, depth + 1)

    def _item_steps(
        self,
        run: Timeline,
        steps: Iterable[TimelineStep],
        inner: dict[tuple[str | None, int | None], list[Timeline]],
        axis: _Axis,
        depth: int,
    ) -> Iterator[str]:
        for step in sorted(steps, key=_order):
            if self._take_row():
                yield self._step_row(run, step, axis, depth)
            for sub_run in inner.pop((step.step_id, step.item_index), ()):
                yield from self._sub_run(sub_run, axis, depth + 1)

    def _sub_run(self, run: Timeline, axis: _Axis, depth: int) -> Iterator[str]:
        if not self._take_row():
            return
        name = run.flow_name or "sub-run"
        start, end = run.started, run.ended or run.seen
        bar = axis.bar("run", start, end) if start and end else ""
        yield (
            f'<div class="row run" id="run{self._runs[run.run_id]}">'
            f'<span class="name" style="--depth:{depth}">{as_text(cut(name, 100))}'
            f"<small>{number_of(len(run.items), 'item')}: "
            f"{counted(Counter(item.state for item in run.items))}</small></span>"
            f'<span class="track">{bar}</span>'
            f'<span class="time">{lasting(run.duration)}</span></div>'
        )
        yield from self._run_rows(run, axis, depth + 1)

    def _take_row(self, needed: int = 1) -> bool:
        if self._rows_left < needed:
            self._rows_left_out += needed
            return False
        self._rows_left -= 1
        return True

    def _item_row(self, item: TimelineItem, axis: _Axis, depth: int) -> str:
        bar = ""
        if item.started and (end := item.ended):
            bar = axis.bar("run", item.started, end)
        return (
            f'<div class="row item"><span class="name" style="--depth:{depth}">'
            f"{mark(item.state)} item {item.index:,}</span>"
            f'<span class="track">{bar}</span>'
            f'<span class="time">{lasting(item.duration)}</span></div>'
        )

    def _step_row(
        self, run: Timeline, step: TimelineStep, axis: _Axis, depth: int
    ) -> str:
        anchor = f"s{self._runs[run.run_id]}-{step.item_index}-{step.step_index}"
        self._rows.setdefault((run.run_id, step.item_index, step.step_id), anchor)
        self._rows.setdefault((run.run_id, None, step.step_id), anchor)
        component = f"<small>{as_text(cut(step.component or '', 60))}</small>"
        title = f"{step.step_id} ({step.component})"
        body = "".join(self._body(run, step))
        return (
            f'<details class="row" id="{anchor}"><summary title="{as_text(cut(title, 300))}">'
            f'<span class="name" style="--depth:{depth}">{mark(step.state)} '
            f"{as_text(cut(step.step_id, 80))}{component}</span>"
            f'<span class="track">{"".join(_bars(step, run.seen, axis))}</span>'
            f'<span class="time">{lasting(_so_far(step, run.seen))}</span></summary>'
            f'<div class="body" style="--depth:{depth}">{body}</div></details>'
        )

    def _body(self, run: Timeline, step: TimelineStep) -> Iterator[str]:
        words = self._circumstances(run, step)
        yield f"<p>{step.state.value.capitalize()}{words}.</p>"
        if len(step.attempts) > 1:
            yield from self._attempts(step)
        if step.error is not None:
            yield self._error(step.error)
        definition = _definition(run.graph, step)
        if definition is not None and definition.input is not None:
            yield self._values.block(
                "Input", definition.input, "as the workflow has it"
            )
        if step.state is StepState.COMPLETED:
            yield self._values.block("Output", step.output)
        lines = self._lines_of.get((run.run_id, step.item_index, step.step_id), [])
        if lines:
            links = " ".join(
                f'<a href="#l{place}">{place + 1}</a>' for place in lines[:_MOST_LINKS]
            )
            more = f" and {len(lines) - _MOST_LINKS:,} more" * (
                len(lines) > _MOST_LINKS
            )
            yield f"<h3>Log lines</h3><p>{links}{more}</p>"

    def _circumstances(self, run: Timeline, step: TimelineStep) -> str:
        words = f", after it had waited {lasting(step.waited)}" if step.waited else ""
        failed = self._failed.get((run.run_id, step.item_index), {})
        if step.state is StepState.FAILED and run.graph is not None:
            # The server lets a step fail whose input cannot be had, with the same words.
            sources = _sources(run.graph, step.step_index)
            names = [
                as_text(cut(failed[each], 80)) for each in sources if each in failed
            ]
            if names:
                words += f", since what it takes from {', '.join(names)} is not there"
        return words

    def _attempts(self, step: TimelineStep) -> Iterator[str]:
        yield (
            "<table><tr><th>Attempt</th><th>Begun</th><th>Took</th>"
            "<th>Paused before</th><th>Ended</th></tr>"
        )
        for attempt in step.attempts:
            begun = _since(attempt.started, self._axis.start)
            took = None
            if attempt.started and attempt.ended:
                took = (
                    attempt.ended - attempt.started - timedelta(seconds=attempt.pause)
                )
            pause = timedelta(seconds=attempt.pause) if attempt.pause else None
            reason = ""
            if attempt.reason:
                reason = f": {as_text(cut(self._values.text(attempt.reason), 2_000))}"
            yield (
                f"<tr><td>{attempt.number}</td><td>{begun}</td><td>{lasting(took)}</td>"
                f"<td>{lasting(pause)}</td>"
                f"<td>{mark(attempt.state)} {attempt.state.value}{reason}</td></tr>"
            )
        yield "</table>"

    def _error(self, error: FlowError) -> str:
        lines = [f"{error.code}: {error.message}", *(log.message for log in error.logs)]
        return self._values.block_of_text("Error", self._values.text("\n".join(lines)))

    # -- many items --------------------------------------------------------------------

    def _overview(self) -> Iterator[str]:
        """A line for each step, over all items."""
        yield (
            '<div class="wide"><table><tr><th>Step</th><th>Items</th><th class="n">Median'
            '</th><th class="n">95 of 100</th><th class="n">Longest</th>'
            '<th class="n">Tried again</th><th>At a time</th></tr>'
        )
        by_place: dict[int, list[TimelineStep]] = {}
        for step in self._timeline.steps:
            by_place.setdefault(step.step_index, []).append(step)
        for place in sorted(by_place)[:_MOST_ROWS]:
            yield self._overview_row(by_place[place])
        yield "</table></div>"

    def _overview_row(self, steps: Sequence[TimelineStep]) -> str:
        first = steps[0]
        timed = sorted(
            (s.duration, s.item_index) for s in steps if s.duration is not None
        )
        median = timed[len(timed) // 2][0] if timed else None
        slow = timed[int(len(timed) * 0.95)][0] if timed else None
        longest, item = timed[-1] if timed else (None, None)
        of_item = "" if item is None else f' <a href="#i{item}">item {item:,}</a>'
        retried = sum(len(step.attempts) > 1 for step in steps)
        counts = counted(Counter(step.state for step in steps))
        return (
            f"<tr><td>{as_text(cut(first.step_id, 60))}<br><small>"
            f"{as_text(cut(first.component or '', 60))}</small></td><td>{counts}</td>"
            f'<td class="n">{lasting(median)}</td><td class="n">{lasting(slow)}</td>'
            f'<td class="n">{lasting(longest)}{of_item}</td><td class="n">{retried:,}</td>'
            f"<td>{self._spark(steps)}</td></tr>"
        )

    def _spark(self, steps: Iterable[TimelineStep]) -> str:
        """How many were under way, over the time of the run."""
        changes = [0] * (_BUCKETS + 1)
        seen = self._timeline.seen or self._axis.end
        for step in steps:
            if step.started is not None:
                first = int(self._axis.place(step.started) / 100 * (_BUCKETS - 1))
                last = int(self._axis.place(step.ended or seen) / 100 * (_BUCKETS - 1))
                changes[first] += 1
                changes[last + 1] -= 1
        heights, height = [], 0
        for change in changes[:-1]:
            height += change
            heights.append(height)
        most = max(heights)
        if not most:
            return ""
        path = "".join(
            f"L{x} {24 - each / most * 22:.1f}h1" for x, each in enumerate(heights)
        )
        return (
            f'<svg class="spark" viewBox="0 0 {_BUCKETS} 24" preserveAspectRatio="none" '
            f'role="img"><title>at most {most:,} in {_bucket(self._axis)}</title>'
            f'<path d="M0 24{path}V24z"/></svg>'
        )

    def _some_items(self) -> Iterator[str]:
        """The steps of those that one will want to see, each on an axis of its own."""
        chosen = _worth_seeing(self._timeline.items)
        by_item: dict[int, list[TimelineStep]] = {item.index: [] for item in chosen}
        for step in self._timeline.steps:
            if step.item_index in by_item:
                by_item[step.item_index].append(step)
        inner = _by_parent(self._timeline)
        yield "<h2>Some items: those that failed, the longest, the first</h2>"
        for item in chosen:
            steps = by_item[item.index]
            if not self._take_row(len(steps) + 1):
                continue
            self._shown_items.add(item.index)
            axis = _Axis(time for step in steps for time in _times_of_step(step))
            yield (
                f'<details class="items" id="d{item.index}"><summary>{mark(item.state)} '
                f"item {item.index:,} &middot; {lasting(item.duration)}</summary>"
            )
            rows = self._item_steps(self._timeline, steps, inner, axis, 0)
            yield from self._chart(axis, rows)
            yield f'<div class="body">{self._end_of(item)}</div></details>'
        if left := sum(map(len, inner.values())):
            yield f"<p>{number_of(left, 'sub-run')} of other items not shown.</p>"

    def _end_of(self, item: TimelineItem) -> str:
        if item.error is not None:
            return self._error(item.error)
        if item.state is StepState.COMPLETED:
            return self._values.block("Output", item.output)
        return ""

    def _all_items(self) -> Iterator[str]:
        items = self._timeline.items
        if len(items) <= 1:
            return
        yield '<h2 id="items">Items</h2>'
        yield strip(items)
        for first in range(0, len(items), _CHUNK):
            chunk = items[first : first + _CHUNK]
            counts = counted(Counter(item.state for item in chunk))
            is_open = " open" if len(items) <= _CHUNK else ""
            yield (
                f'<details class="items" id="c{first // _CHUNK}"{is_open}><summary>'
                f"{chunk[0].index:,} to {chunk[-1].index:,}: {counts}</summary><ol>"
            )
            yield from map(self._line, chunk)
            yield "</ol></details>"

    def _line(self, item: TimelineItem) -> str:
        bar = ""
        if item.started and item.ended:
            bar = self._axis.bar(item.state.value, item.started, item.ended)
        number = f"{item.index:,}"
        if item.index in self._shown_items:
            number = f'<a href="#d{item.index}">{number}</a>'
        told = ""
        if item.error is not None:
            told = self._values.text(f"{item.error.code}: {item.error.message}")
        elif item.state is StepState.COMPLETED:
            told = self._values.peek(item.output)
        return (
            f'<li id="i{item.index}"><span class="n">{number}</span>{mark(item.state)}'
            f'<span class="track">{bar}</span><span class="n">{lasting(item.duration)}'
            f'</span><span class="peek">{as_text(cut(told, PEEK))}</span></li>'
        )

    # -- the log -----------------------------------------------------------------------

    def _log(self) -> Iterator[str]:
        logs = self._timeline.logs
        if not logs:
            return
        is_open = " open" if len(logs) <= _FEW_LOGS else ""
        yield (
            f'<h2 id="log">Log</h2><details class="items"{is_open}><summary>'
            f'{number_of(len(logs), "line")}</summary><ol class="log">'
        )
        for place, log in enumerate(logs):
            yield self._log_line(place, log)
        yield "</ol></details>"

    def _log_line(self, place: int, log: TimelineLog) -> str:
        entry = log.entry
        step = ""
        if log.step_id is not None:
            step = as_text(cut(log.step_id, 40))
            key = (log.run_id, log.item_index, log.step_id)
            if (anchor := self._rows.get(key)) is not None:
                step = f'<a href="#{anchor}">{step}</a>'
        level = entry.level if entry.level in ("WARN", "ERROR") else ""
        message = cut(self._values.text(entry.message), _LONGEST_LOG)
        return (
            f'<li id="l{place}" class="{level}"><span class="time">'
            f"{_since(entry.timestamp, self._axis.start)}</span><b>{as_text(entry.level)}</b>"
            f"<span>{step}</span><span>{as_text(message)}</span></li>"
        )


def _values_of(timeline: Timeline) -> Iterator[Any]:
    if timeline.graph is not None:
        yield [step.input for step in timeline.graph.steps]
    yield from (step.output for step in timeline.steps)
    yield from (item.output for item in timeline.items)
    for run in timeline.sub_runs:
        yield from _values_of(run)


def _all_runs(timeline: Timeline) -> Iterator[Timeline]:
    yield timeline
    for run in timeline.sub_runs:
        yield from _all_runs(run)


def _worth_seeing(items: Sequence[TimelineItem]) -> Sequence[TimelineItem]:
    """Those that failed, the longest, and the first."""
    failed = [item for item in items if item.state is StepState.FAILED]
    ended = [item for item in items if item.duration is not None]
    longest = sorted(ended, key=lambda item: item.duration or timedelta(), reverse=True)
    some = [*failed[: _MOST_SHOWN // 2], *longest[: _MOST_SHOWN // 4], *items]
    return list({item.index: item for item in some}.values())[:_MOST_SHOWN]


def _more_items(
    items: Sequence[TimelineItem], chosen: Sequence[TimelineItem], depth: int
) -> str:
    shown = {item.index for item in chosen}
    others = [item for item in items if item.index not in shown]
    return (
        f'<div class="row run"><span class="name" style="--depth:{depth}">'
        f"{number_of(len(others), 'more item')}<small>"
        f"{counted(Counter(item.state for item in others))}</small></span></div>"
    )


def _by_parent(
    run: Timeline,
) -> dict[tuple[str | None, int | None], list[Timeline]]:
    """The sub-runs by the step, and its item, below which they are to be shown."""
    only = run.items[0].index if len(run.items) == 1 else None
    found: dict[tuple[str | None, int | None], list[Timeline]] = {}
    for each in run.sub_runs:
        item = each.parent_item_index if each.parent_item_index is not None else only
        found.setdefault((each.parent_step_id, item), []).append(each)
    return found


def _definition(graph: Graph | None, step: TimelineStep) -> GraphStep | None:
    if graph is None or not 0 <= step.step_index < len(graph.steps):
        return None
    return graph.steps[step.step_index]


def _sources(graph: Graph, place: int) -> Iterator[int]:
    """The steps that a step takes something from."""
    for edge in graph.edges:
        if edge.target == place and edge.source is not None:
            yield edge.source


_LATEST: Final = datetime.max.replace(tzinfo=UTC)


def _order(step: TimelineStep) -> tuple[datetime, int]:
    return step.started or _LATEST, step.step_index


def _since(time: datetime | None, start: datetime) -> str:
    if time is None:
        return ""
    return f"+{lasting(time - start)}" if time >= start else f"-{lasting(start - time)}"


def _bucket(axis: _Axis) -> str:
    return lasting(timedelta(seconds=axis.seconds / _BUCKETS))


def _so_far(step: TimelineStep, seen: datetime | None) -> timedelta | None:
    if (
        step.state is StepState.RUNNING
        and step.started is not None
        and seen is not None
    ):
        return seen - step.started
    return step.duration


def _bars(step: TimelineStep, seen: datetime | None, axis: _Axis) -> Iterator[str]:
    if (
        step.ready is not None
        and step.started is not None
        and step.started > step.ready
    ):
        waited = f"waited {lasting(step.waited)}"
        yield axis.bar("wait", step.ready, step.started, waited)
    for attempt in step.attempts:
        yield from _attempt_bars(attempt, seen, axis, len(step.attempts) > 1)


def _attempt_bars(
    attempt: StepAttempt, seen: datetime | None, axis: _Axis, is_one_of_several: bool
) -> Iterator[str]:
    start, end = attempt.started, attempt.ended or seen
    if start is None or end is None:
        return
    if attempt.pause:
        again = min(start + timedelta(seconds=attempt.pause), max(end, start))
        yield axis.bar("pause", start, again, f"paused {lasting(again - start)}")
        start = again
    label = str(attempt.number) if is_one_of_several else ""
    title = f"attempt {attempt.number}: {attempt.state.value}, {lasting(end - start)}"
    yield axis.bar(attempt.state.value, start, max(end, start), title, label)


def strip(items: Sequence[TimelineItem]) -> str:
    """All items at a glance: a square each, by state; those that failed are the largest."""
    columns = min(_COLUMNS, max(len(items), 50))
    size = 6
    height = -(-len(items) // columns) * size
    paths = []
    for state in StepState:
        margin = 0 if state is StepState.FAILED else 1
        side = size - 2 * margin if state is not StepState.UNUSED else 2
        squares = [
            f"M{n % columns * size + margin} {n // columns * size + margin}"
            f"h{side}v{side}h-{side}z"
            for n, item in enumerate(items)
            if item.state is state
        ]
        if squares:
            paths.append(f'<path class="{state.value}" d="{"".join(squares)}"/>')
    links = (
        "".join(_chunk_links(len(items), columns, size)) if len(items) > _CHUNK else ""
    )
    return (
        f'<svg class="strip" viewBox="0 0 {columns * size} {height}" role="img">'
        f"<title>The states of all items</title>{''.join(paths)}{links}</svg>"
    )


def _chunk_links(count: int, columns: int, size: int) -> Iterator[str]:
    starts = range(0, count, columns)
    for first in starts:
        last = min(first + columns, count) - 1
        yield (
            f'<a href="#c{first // _CHUNK}"><title>items {first:,} to {last:,}</title>'
            f'<rect y="{first // columns * size}" width="{columns * size}" '
            f'height="{size}"/></a>'
        )
