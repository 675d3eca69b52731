"""How a timeline is made: a server's journal of a run, put together.

Contract: what the server says is taken as it is, and each time from the journal, since what
else it tells of times may be in whole seconds. A server of 0.13 names the steps of sub-runs
wrongly: by the ids that stand at the same places in the outer flow; their places are right.
Nor does it have the workflows of sub-runs: those are the ones that stand in the outer flow.
Bounded in what is asked for and what is kept; what goes beyond it is left out with a note.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any, Final, NamedTuple, TypeAlias

import anyio
import msgspec

from .errors import NotFoundError
from .events import (
    RunCompleted,
    RunCreated,
    RunEvent,
    RunStatus,
    StepCompleted,
    StepReady,
    StepsNeeded,
    StepStarted,
    SubRunCreated,
)
from .executor import FlowError, FlowResult, FlowStatus, RunInfo, StepInfo
from .following import EventFollower
from .graph import Graph, StepState
from .logs.entry import LogEntry
from .timeline import (
    Omitted,
    StepAttempt,
    Timeline,
    TimelineItem,
    TimelineLog,
    TimelineStep,
)

__all__ = ["Source", "read_timeline"]

# A run that goes on has no last event, nor may one that was cancelled or given up: there
# comes nothing for so long. The first one may need a connection.
_FIRST_EVENT: Final = 10.0
_QUIET: Final = 0.5
_QUIET_OF_ENDED: Final = 5.0

# Of the run and its sub-runs together: steps of items.
_MOST_STEPS: Final = 200_000
_MOST_SUB_RUNS: Final = 1_000
_DEEPEST: Final = 50

# Of so many items at most, and of so many sub-runs, the outputs of steps are asked for: of
# those that failed first, and then of the others.
_MOST_DETAILED: Final = 100
_MOST_DETAILED_RUNS: Final = 50

# What outputs may take: one, and all of them. As JSON, in bytes.
_LARGEST_OUTPUT: Final = 256 * 1024
_MOST_OUTPUT: Final = 8 * 2**20

# Lines, and runs whose lines are asked for.
_MOST_LOGS: Final = 2_000
_MOST_LOGGED_RUNS: Final = 20
_MOST_EXPLAINED: Final = 20


_OVER: Final = (RunStatus.COMPLETED, RunStatus.FAILED)


@dataclass(frozen=True)
class Source:
    """What is asked, all of one run.

    :ivar run: how a run stands
    :ivar document: a workflow, by its id
    :ivar steps: the steps of a run, or of one item of it
    :ivar results: what became of each item
    :ivar events: what happened in it and its sub-runs
    :ivar now: the server's clock
    :ivar logs: what was logged of these runs, so many lines at most
    :ivar logs_of_failures: as ``ApiExecutor._logs_of_failures``
    """

    run: Callable[[str], Awaitable[RunInfo]]
    document: Callable[[str], Awaitable[Mapping[str, Any]]]
    steps: Callable[[str, int | None], Awaitable[Sequence[StepInfo]]]
    results: Callable[[str], Awaitable[Sequence[FlowResult]]]
    events: Callable[[str], EventFollower]
    now: Callable[[], Awaitable[datetime | None]]
    logs: Callable[[Sequence[str], int], Awaitable[Sequence[LogEntry]]]
    logs_of_failures: Callable[
        [str, datetime | None, Sequence[FlowError]],
        Awaitable[Sequence[tuple[LogEntry, ...]]],
    ]


async def read_timeline(source: Source, run_id: str) -> Timeline:
    """Ask for everything, and put it together.

    :raises NotFoundError: if the server does not know the run
    """
    info = await source.run(run_id)
    # A run that was cancelled goes on all the same.
    is_over = info.status in _OVER
    seen = _aware(info.completed_at if is_over else await source.now())
    history = _History(info)
    await history.read_events(source, seen)
    await history.read_flow(source)
    await history.read_outputs(source)
    history.match_flows()
    return await history.told(source, seen)


# -- what events tell ------------------------------------------------------------------


@dataclass
class _Step:
    """A step of one item."""

    step_id: str
    ready: datetime | None = None
    starts: list[tuple[int, datetime | None]] = field(default_factory=list)
    ended: datetime | None = None
    status: RunStatus = RunStatus.UNKNOWN

    @property
    def is_running(self) -> bool:
        return bool(self.starts) and not self.status.is_final


@dataclass
class _Run:
    """The run, or one of its sub-runs."""

    run_id: str
    flow_id: str | None = None
    item_count: int = 1
    parent: _Run | None = None
    depth: int = 0
    begun_by: frozenset[tuple[int, int]] = frozenset()
    status: RunStatus = RunStatus.RUNNING
    started: datetime | None = None
    ended: datetime | None = None
    graph: Graph | None = None
    steps: dict[tuple[int, int], _Step] = field(default_factory=dict)
    running: set[tuple[int, int]] = field(default_factory=set)
    needed: dict[int, datetime | None] = field(default_factory=dict)
    needed_ids: dict[int, tuple[str, ...]] = field(default_factory=dict)
    details: dict[tuple[int, int], StepInfo] = field(default_factory=dict)
    sub_runs: list[_Run] = field(default_factory=list)

    def step_id(self, place: int, told: str) -> str:
        """What the events tell comes last: those of sub-runs are wrong."""
        if self.graph is not None and 0 <= place < len(self.graph.steps):
            return self.graph.steps[place].id
        if (known := self.ids.get(place)) is not None:
            return known
        return told if self.parent is None else f"step {place}"

    def fits(self, graph: Graph) -> bool:
        """Whether it can be the graph of this run, by the steps that it has."""
        ids = {place: step.id for place, step in enumerate(graph.steps)}
        return all(place in ids for _, place in self.steps) and all(
            ids.get(place) == step_id for place, step_id in self.ids.items()
        )

    @cached_property
    def ids(self) -> Mapping[int, str]:
        """The steps that are known, by their places."""
        return {place: info.step_id for (_, place), info in self.details.items()}

    @property
    def parent_place(self) -> int | None:
        """The step that has started it, if there is only one that can have."""
        places = {place for _, place in self.begun_by}
        if (
            len(places) > 1
            and self.parent is not None
            and self.parent.graph is not None
        ):
            steps = self.parent.graph.steps
            places = {
                each for each in places if steps[each : each + 1] and steps[each].nested
            }
        return places.pop() if len(places) == 1 else None

    @property
    def parent_item(self) -> int | None:
        items = {item for item, place in self.begun_by if place == self.parent_place}
        return items.pop() if len(items) == 1 else None

    def component(self, place: int) -> str | None:
        if self.graph is not None and 0 <= place < len(self.graph.steps):
            return self.graph.steps[place].component or None
        return None


class _History:
    def __init__(self, info: RunInfo) -> None:
        self._info = info
        self._root = _Run(
            info.run_id, info.flow_id, info.items.total, started=_aware(info.created_at)
        )
        self._root.status = info.status
        self._root.ended = _aware(info.completed_at)
        self._runs = {info.run_id: self._root}
        self._steps = 0
        self._left_out: Counter[str] = Counter()
        self._results: Sequence[FlowResult] = ()
        self._notes: list[str] = []
        self._budget = _Budget()

    async def read_events(self, source: Source, until: datetime | None) -> None:
        has_ended = self._info.status in _OVER
        quiet = _QUIET_OF_ENDED if has_ended else _QUIET
        events = source.events(self._info.run_id)
        try:
            with anyio.move_on_after(_FIRST_EVENT) as scope:
                async for event in events:
                    if not has_ended and _is_after(event, until):
                        return
                    self._take(event)
                    # Not at each of a hundred thousand: a deadline is a timer.
                    now = anyio.current_time()
                    if not now + quiet / 2 < scope.deadline <= now + quiet:
                        scope.deadline = now + quiet
            if scope.cancelled_caught and has_ended:
                self._notes.append(
                    "The server's events of this run end before it does."
                )
        finally:
            events.close()

    def _take(self, event: RunEvent) -> None:
        if event.timestamp is not None and event.timestamp.tzinfo is None:
            event = msgspec.structs.replace(event, timestamp=_aware(event.timestamp))
        if isinstance(event, SubRunCreated):
            self._take_sub_run(event)
        elif (run := self._runs.get(event.run_id)) is not None:
            self._take_of(run, event)

    def _take_of(self, run: _Run, event: RunEvent) -> None:
        match event:
            case RunCreated():
                run.started = event.timestamp or run.started
            case StepsNeeded():
                run.needed[event.item_index] = event.timestamp
                run.needed_ids[event.item_index] = event.step_ids
            case StepReady():
                if (step := self._step(run, event)) is not None:
                    step.ready = event.timestamp
            case StepStarted():
                if (step := self._step(run, event)) is not None:
                    step.starts.append((event.attempt, event.timestamp))
                    run.running.add((event.item_index, event.step_index))
            case StepCompleted():
                if (step := self._step(run, event)) is not None:
                    step.ended, step.status = event.timestamp, event.status
                    run.running.discard((event.item_index, event.step_index))
            case RunCompleted():
                run.ended = event.timestamp or run.ended
                if run.parent is not None:
                    run.status = event.status

    def _step(
        self, run: _Run, event: StepReady | StepStarted | StepCompleted
    ) -> _Step | None:
        key = (event.item_index, event.step_index)
        if (step := run.steps.get(key)) is None:
            if self._steps == _MOST_STEPS:
                self._left_out["events of steps"] += 1
                return None
            self._steps += 1
            step = run.steps[key] = _Step(event.step_id)
        return step

    def _take_sub_run(self, event: SubRunCreated) -> None:
        parent = self._runs.get(event.parent_run_id)
        is_one_too_many = len(self._runs) > _MOST_SUB_RUNS
        if parent is None or is_one_too_many or parent.depth == _DEEPEST:
            self._left_out["sub-runs"] += 1
            return
        if event.run_id in self._runs:  # told again after a restart
            return
        run = _Run(event.run_id, event.flow_id, event.item_count, parent)
        run.depth = parent.depth + 1
        run.started = event.timestamp
        # The events do not say which step has started it.
        run.begun_by = frozenset(parent.running)
        parent.sub_runs.append(run)
        self._runs[event.run_id] = run

    # -- what else the server knows ----------------------------------------------------

    async def read_flow(self, source: Source) -> None:
        with suppress(NotFoundError):  # its store was in memory, and it was restarted
            if self._root.flow_id is not None:
                self._root.graph = Graph.of(await source.document(self._root.flow_id))

    def match_flows(self) -> None:
        """Find the flows of sub-runs inside of the others, from the outermost on."""
        for run in self._runs.values():
            if run.parent is None or (outer := run.parent.graph) is None:
                continue
            place = run.parent_place
            steps = outer.steps if place is None else outer.steps[place : place + 1]
            nested = (each for step in steps for each in step.nested)
            run.graph = next(filter(run.fits, nested), None)

    async def read_outputs(self, source: Source) -> None:
        self._results = await source.results(self._info.run_id)
        runs = list(self._runs.values())
        # Sub-runs in which something failed come first.
        runs[1:] = sorted(runs[1:], key=lambda run: run.status is not RunStatus.FAILED)
        for run in runs[:_MOST_DETAILED_RUNS]:
            await self._read_steps(source, run)
        if (left := len(runs) - _MOST_DETAILED_RUNS) > 0:
            self._notes.append(f"The outputs of {left:,} sub-runs are left out.")

    async def _read_steps(self, source: Source, run: _Run) -> None:
        items: Iterable[int | None] = (None,)
        if run.item_count > _MOST_DETAILED:
            items = self._chosen(run)
            self._notes.append(
                f"Of {run.item_count:,} items, the outputs of steps are here for "
                f"{_MOST_DETAILED}: for those that failed, and the first ones."
            )
        for item in items:
            try:
                found = await source.steps(run.run_id, item)
            except NotFoundError:
                if run.parent is None:
                    raise
                return
            for info in found:
                key = (info.item_index, info.step_index)
                run.details[key] = msgspec.structs.replace(
                    info, output=self._budget.within(info.output)
                )

    def _chosen(self, run: _Run) -> list[int]:
        failed = {
            item for (item, _), s in run.steps.items() if s.status is RunStatus.FAILED
        }
        if run is self._root:
            failed |= {each.item_index for each in self._results if each.is_failed}
        chosen = dict.fromkeys(sorted(failed)[:_MOST_DETAILED])
        chosen |= dict.fromkeys(range(min(run.item_count, _MOST_DETAILED)))
        return list(chosen)[:_MOST_DETAILED]

    # -- putting it together -----------------------------------------------------------

    async def told(self, source: Source, seen: datetime | None) -> Timeline:
        timeline = self._timeline(self._root, seen or self._root.ended)
        logs = await self._logs(source)
        timeline = _with_pauses(timeline, logs)
        timeline = await _with_reasons(timeline, source)
        self._notes += [
            f"{count:,} {what} are left out: there are too many."
            for what, count in self._left_out.items()
        ]
        if self._budget.left_out:
            self._notes.append(
                f"{self._budget.left_out:,} outputs are left out: they are too long, or too many."
            )
        return msgspec.structs.replace(timeline, logs=logs, notes=tuple(self._notes))

    def _timeline(self, run: _Run, seen: datetime | None) -> Timeline:
        steps = tuple(self._timeline_steps(run))
        parent_id = None
        if run.parent is not None and (place := run.parent_place) is not None:
            parent_id = run.parent.step_id(place, "")
        return Timeline(
            run_id=run.run_id,
            status=run.status,
            flow_id=run.flow_id,
            flow_name=run.graph.name if run.graph else self._name(run),
            started=run.started,
            ended=run.ended,
            seen=seen if run.status is RunStatus.CANCELLED else run.ended or seen,
            graph=run.graph,
            items=tuple(self._items(run, steps)),
            steps=steps,
            sub_runs=tuple(self._timeline(each, seen) for each in run.sub_runs),
            parent_step_id=parent_id,
            parent_item_index=run.parent_item,
        )

    def _name(self, run: _Run) -> str | None:
        return self._info.flow_name if run is self._root else None

    def _timeline_steps(self, run: _Run) -> Iterator[TimelineStep]:
        waiting = StepState.UNUSED if run.status.is_final else StepState.WAITING
        keys = {*run.steps, *self._needed(run)}
        for item, place in sorted(keys):
            step = run.steps.get((item, place)) or _Step("")
            info = run.details.get((item, place))
            state = _state(step, run.status) or waiting
            output: Any = None
            if state is StepState.COMPLETED:
                output = Omitted() if info is None else info.output
            yield TimelineStep(
                step_id=run.step_id(place, step.step_id),
                step_index=place,
                item_index=item,
                component=(info.component if info else None) or run.component(place),
                state=state,
                ready=step.ready or run.needed.get(item),
                attempts=tuple(_attempts(step, state)),
                output=output,
                error=info.error if info is not None else None,
            )

    def _needed(self, run: _Run) -> Iterator[tuple[int, int]]:
        """What was needed and not begun. Of sub-runs the ids are wrong: of nobody knows whom."""
        if run.parent is not None or run.graph is None:
            return
        places = {step.id: place for place, step in enumerate(run.graph.steps)}
        left = _MOST_STEPS - self._steps
        for item, ids in run.needed_ids.items():
            for step_id in ids:
                key = (item, places.get(step_id, -1))
                if key[1] >= 0 and key not in run.steps and left > 0:
                    left -= 1
                    yield key

    def _items(
        self, run: _Run, steps: Sequence[TimelineStep]
    ) -> Iterator[TimelineItem]:
        by_item: dict[int, list[TimelineStep]] = {}
        for step in steps:
            by_item.setdefault(step.item_index, []).append(step)
        results: Mapping[int, FlowResult] = {}
        if run is self._root:
            results = {each.item_index: each for each in self._results}
        for index in sorted({*by_item, *results}):
            of_item = by_item.get(index, [])
            result = results.get(index)
            yield TimelineItem(
                index=index,
                state=_item_state(result, of_item, run.status),
                started=min(_times(s.started for s in of_item), default=None),
                ended=max(_times(s.ended for s in of_item), default=None),
                output=None if result is None else self._budget.within(result.output),
                error=None if result is None else result.error,
            )

    async def _logs(self, source: Source) -> tuple[TimelineLog, ...]:
        entries = await source.logs([*self._runs][:_MOST_LOGGED_RUNS], _MOST_LOGS)
        if len(entries) == _MOST_LOGS:
            self._notes.append(f"Of the log there are the newest {_MOST_LOGS:,} lines.")
        return tuple(self._linked(entries))

    def _linked(self, entries: Iterable[LogEntry]) -> Iterator[TimelineLog]:
        retries = self._retries()
        for entry in entries:
            if (match := _RETRY.search(entry.message)) is not None:
                if (log := _of_retry(entry, match, retries)) is not None:
                    yield log
            elif (run := self._runs.get(entry.run_id or "")) is not None:
                item, place = self._place(run, entry)
                step_id = None if place is None else run.step_id(place, "")
                yield TimelineLog(
                    entry=entry, run_id=run.run_id, item_index=item, step_id=step_id
                )

    def _retries(self) -> dict[tuple[str, int], list[_Retry]]:
        """Where steps were begun again, by step and attempt."""
        found: dict[tuple[str, int], list[_Retry]] = {}
        for run in self._runs.values():
            for (item, place), step in run.steps.items():
                for number, started in step.starts[1:]:
                    if started is not None:
                        step_id = run.step_id(place, step.step_id)
                        retry = _Retry(started, run.run_id, item)
                        found.setdefault((step_id, number), []).append(retry)
        return found

    def _place(self, run: _Run, entry: LogEntry) -> tuple[int | None, int | None]:
        """Of which item and step it tells. What the message says is right; ``step_id`` is
        often that of the step before.
        """
        only = 0 if run.item_count == 1 else None
        if match := _BY_PLACE.search(entry.message):
            return int(match[1]), int(match[2])
        ids = (
            {}
            if run.graph is None
            else {s.id: n for n, s in enumerate(run.graph.steps)}
        )
        if match := _BY_ID.search(entry.message):
            return only, ids.get(match[1])
        place = ids.get(entry.step_id or "")
        if (match := _BY_COMPONENT.match(entry.message)) is None:
            return only, place
        if place is not None and run.component(place) == match[1]:
            return only, place
        alike = [n for n in ids.values() if run.component(n) == match[1]]
        return only, alike[0] if len(alike) == 1 else None


_BY_PLACE: Final = re.compile(r"\bitem=(\d{1,9}), step=(\d{1,9})\b")
_BY_ID: Final = re.compile(r"\bstep '([^']+)'")
_BY_COMPONENT: Final = re.compile(r"Component '([^']+)' routed to ")
_RETRY: Final = re.compile(
    r"Retrying step '(.*)' \(reason: (\w+), attempt: (\d{1,9}), "
    r"delay: (\d{1,6}(?:\.\d{1,6})?)(m?s)\)"
)

# A retry is logged right after it has gone into the journal.
_AT_ONCE: Final = timedelta(seconds=0.1)


class _Retry(NamedTuple):
    started: datetime
    run_id: str
    item: int


def _of_retry(
    entry: LogEntry,
    match: re.Match[str],
    retries: Mapping[tuple[str, int], Sequence[_Retry]],
) -> TimelineLog | None:
    """The line of a retry names no run, or any: its time tells which one it is of."""
    key = (match[1], int(match[3]))
    distances = [
        (abs(entry.timestamp - each.started), each) for each in retries.get(key, ())
    ]
    distance, retry = min(distances, default=(_AT_ONCE, None))
    if retry is None or distance >= _AT_ONCE:
        return None
    return TimelineLog(
        entry=entry, run_id=retry.run_id, item_index=retry.item, step_id=match[1]
    )


def _aware(time: datetime | None) -> datetime | None:
    """Servers tell the offset; times with and without one cannot be compared."""
    if time is None or time.tzinfo is not None:
        return time
    return time.replace(tzinfo=UTC)


def _is_after(event: RunEvent, until: datetime | None) -> bool:
    time = _aware(event.timestamp)
    return until is not None and time is not None and time > until


def _state(step: _Step, run: RunStatus) -> StepState | None:
    match step.status:
        case RunStatus.COMPLETED:
            return StepState.COMPLETED
        case RunStatus.FAILED | RunStatus.RECOVERY_FAILED:
            return StepState.FAILED
        case RunStatus.CANCELLED:
            return StepState.CANCELLED
    if not step.starts:
        return None
    return StepState.CANCELLED if run.is_final else StepState.RUNNING


def _attempts(step: _Step, state: StepState) -> Iterator[StepAttempt]:
    for place, (number, started) in enumerate(step.starts):
        is_last = place == len(step.starts) - 1
        yield StepAttempt(
            number=number,
            state=state if is_last else StepState.FAILED,
            started=started,
            ended=step.ended if is_last else step.starts[place + 1][1],
        )


def _item_state(
    result: FlowResult | None, steps: Sequence[TimelineStep], run: RunStatus
) -> StepState:
    if result is not None and result.status is FlowStatus.SUCCESS:
        return StepState.COMPLETED
    if result is not None and result.is_failed:
        cancelled = result.error is not None and result.error.code == "CANCELLED"
        return StepState.CANCELLED if cancelled else StepState.FAILED
    # How items ended the server tells when all have.
    states = {step.state for step in steps}
    if StepState.FAILED in states:
        return StepState.FAILED
    if states == {StepState.COMPLETED}:
        return StepState.COMPLETED
    if run.is_final:
        return (
            StepState.CANCELLED if StepState.CANCELLED in states else StepState.UNUSED
        )
    return StepState.RUNNING if states - {StepState.WAITING} else StepState.WAITING


def _times(times: Iterable[datetime | None]) -> list[datetime]:
    return [each for each in times if each is not None]


class _Budget:
    """How much of outputs is kept."""

    def __init__(self) -> None:
        self._left = _MOST_OUTPUT
        self.left_out = 0

    def within(self, output: Any) -> Any:
        if output is None or isinstance(output, bool | int | float):
            return output
        size = len(msgspec.json.encode(output))
        if size > min(self._left, _LARGEST_OUTPUT):
            self.left_out += 1
            return Omitted(size)
        self._left -= size
        return output


# -- what only the log tells -----------------------------------------------------------


_Pauses: TypeAlias = "dict[tuple[str, int | None, str, int], tuple[float, str]]"


def _with_pauses(timeline: Timeline, logs: Sequence[TimelineLog]) -> Timeline:
    """With the pauses before attempts, and why those before them failed."""
    found: _Pauses = {}
    for log in logs:
        if (match := _RETRY.search(log.entry.message)) and log.step_id is not None:
            pause = float(match[4]) / (1000 if match[5] == "ms" else 1)
            key = (log.run_id, log.item_index, log.step_id, int(match[3]))
            found[key] = pause, match[2].replace("_", " ")
    return _paused(timeline, found) if found else timeline


def _paused(run: Timeline, found: _Pauses) -> Timeline:
    steps = tuple(
        _paused_step(run.run_id, step, found) if len(step.attempts) > 1 else step
        for step in run.steps
    )
    sub_runs = tuple(_paused(each, found) for each in run.sub_runs)
    return msgspec.structs.replace(run, steps=steps, sub_runs=sub_runs)


def _paused_step(run_id: str, step: TimelineStep, found: _Pauses) -> TimelineStep:
    attempts = []
    for attempt in step.attempts:
        key = (run_id, step.item_index, step.step_id)
        pause, _ = found.get((*key, attempt.number), (0.0, ""))
        _, reason = found.get((*key, attempt.number + 1), (0.0, None))
        attempts.append(msgspec.structs.replace(attempt, pause=pause, reason=reason))
    return msgspec.structs.replace(step, attempts=tuple(attempts))


async def _with_reasons(timeline: Timeline, source: Source) -> Timeline:
    """With what was logged of the failures: a worker's traceback, say."""
    failed = [step for step in timeline.steps if step.error is not None]
    failed = failed[:_MOST_EXPLAINED]
    errors = [step.error for step in failed if step.error is not None]
    if not errors:
        return timeline
    found = await source.logs_of_failures(timeline.run_id, timeline.started, errors)
    explained = {
        (step.item_index, step.step_index): msgspec.structs.replace(
            step, error=msgspec.structs.replace(error, logs=logs)
        )
        for step, error, logs in zip(failed, errors, found, strict=True)
    }
    steps = (
        explained.get((step.item_index, step.step_index), step)
        for step in timeline.steps
    )
    return msgspec.structs.replace(timeline, steps=tuple(steps))
