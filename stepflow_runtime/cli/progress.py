"""How far a run, or a batch, has come: what is shown, apart from how.

Contract: pure, and a function of the *set* of events: in whatever order they come, and
however often, the picture is the same. So a stream may be followed twice, and what a later
look brings may be added to what an earlier one has.

Of a nested run (of ``/map``, ``/iterate``, ``/eval``) the items are counted, and its steps
not named: Stepflow 0.13 gives them the names of the outer flow's steps. Nor does it tell which
step has started it; that is concluded, where it can be.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from enum import IntEnum
from typing import Final, NamedTuple

from ..events import (
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

__all__ = ["BatchProgress", "Phase", "Row", "RunProgress"]

# The last segment of the path of a component that starts runs.
_NESTING: Final = frozenset({"map", "iterate", "eval"})


class Phase(IntEnum):
    """Where a step of an item is; what is later in here is later in its life."""

    WAITING = 0
    RUNNING = 1
    COMPLETED = 2
    FAILED = 3

    @property
    def is_over(self) -> bool:
        return self >= Phase.COMPLETED


class Row(NamedTuple):
    """What is to be seen of a step, or of the runs that one has started.

    :ivar depth: how deep it is nested, from 0
    :ivar total: how many items it is about; of a step that starts no runs 1
    :ivar elapsed: seconds since it was begun, or that it took; None: it was not begun
    """

    label: str
    depth: int
    phase: Phase
    done: int
    failed: int
    total: int
    elapsed: float | None
    attempt: int = 1


class _Step:
    """A step of one item."""

    __slots__ = ("attempt", "ended", "index", "phase", "started")

    def __init__(self) -> None:
        self.phase = Phase.WAITING
        self.index: int | None = None
        self.attempt = 1
        self.started: float | None = None
        self.ended: float | None = None

    def elapsed(self, now: float) -> float | None:
        if self.started is None:
            return None
        return max(0.0, (now if self.ended is None else self.ended) - self.started)


class _Item:
    """An item of a run: its steps, and how many of those that it needs are over."""

    __slots__ = ("failed", "over", "steps")

    def __init__(self) -> None:
        self.steps: dict[str, _Step] = {}
        self.over = 0
        self.failed = 0

    def step(self, step_id: str) -> _Step:
        found = self.steps.get(step_id)
        if found is None:
            found = self.steps[step_id] = _Step()
        return found

    def advance(self, step: _Step, phase: Phase) -> None:
        if phase <= step.phase:
            return
        self.over += phase.is_over and not step.phase.is_over
        self.failed += phase is Phase.FAILED
        step.phase = phase

    @property
    def is_over(self) -> bool:
        return self.over == len(self.steps) > 0


class _Run:
    def __init__(self) -> None:
        self.items: dict[int, _Item] = {}
        self.item_count = 0
        self.parent: str | None = None
        self.flow_id = ""
        self.created: float | None = None
        self.ended: float | None = None
        self.status = RunStatus.RUNNING
        self.done = 0
        self.failed = 0

    def item(self, index: int) -> _Item:
        found = self.items.get(index)
        if found is None:
            found = self.items[index] = _Item()
        return found

    @property
    def counts(self) -> tuple[int, int, int]:
        """Items that are over, those of them that failed, and all."""
        total = max(self.item_count, len(self.items))
        failed = min(self.failed, total)
        if self.status is RunStatus.FAILED:
            failed = max(failed, 1)
        return total if self.status.is_final else self.done, failed, total


class RunProgress:
    """A run and all that it starts.

    :param run_id: the run
    """

    def __init__(self, run_id: str) -> None:
        self._root_id = run_id
        self._runs: dict[str, _Run] = {run_id: _Run()}
        self._components: dict[str, str] = {}
        self._last = 0

    @property
    def last_sequence_number(self) -> int:
        return self._last

    @property
    def status(self) -> RunStatus:
        return self._root.status

    @property
    def _root(self) -> _Run:
        return self._runs[self._root_id]

    def add(self, event: RunEvent) -> None:
        """Take an event in."""
        self._last = max(self._last, event.sequence_number)
        run = self._run(event.run_id)
        moment = None if event.timestamp is None else event.timestamp.timestamp()
        match event:
            case RunCreated() | SubRunCreated():
                run.item_count = max(run.item_count, event.item_count)
                run.flow_id = event.flow_id or run.flow_id
                run.created = _earlier(run.created, moment)
                if isinstance(event, SubRunCreated):
                    run.parent = event.parent_run_id
                    self._run(event.parent_run_id)
            case RunCompleted():
                if event.status.is_final:
                    run.status = event.status
                run.ended = _later(run.ended, moment)
            case StepsNeeded():
                self._need(run, event)
            case StepReady() | StepStarted() | StepCompleted():
                self._advance(run, event, moment)

    def learn_components(self, components: Mapping[str, str]) -> None:
        """What the steps call, by step id, as far as it is known."""
        self._components |= components

    @property
    def wants_components(self) -> bool:
        """True if they would help to tell which step has started a run."""
        return any(
            run.parent == self._root_id
            and self._may_have_started(run)
            and not all(id in self._components for id, _ in self._begun(run))
            for run in self._runs.values()
        )

    def _run(self, run_id: str) -> _Run:
        found = self._runs.get(run_id)
        if found is None:
            found = self._runs[run_id] = _Run()
        return found

    def _need(self, run: _Run, event: StepsNeeded) -> None:
        item = run.item(event.item_index)
        was_over, had_failed = item.is_over, item.failed > 0
        for step_id in event.step_ids:
            item.step(step_id)
        _recount(run, item, was_over, had_failed)

    def _advance(
        self,
        run: _Run,
        event: StepReady | StepStarted | StepCompleted,
        moment: float | None,
    ) -> None:
        item = run.item(event.item_index)
        was_over, had_failed = item.is_over, item.failed > 0
        step = item.step(event.step_id)
        step.index = event.step_index
        if isinstance(event, StepStarted):
            step.attempt = max(step.attempt, event.attempt)
            step.started = _earlier(step.started, moment)
            item.advance(step, Phase.RUNNING)
        elif isinstance(event, StepCompleted):
            step.ended = _later(step.ended, moment)
            has_failed = event.status is RunStatus.FAILED
            item.advance(step, Phase.FAILED if has_failed else Phase.COMPLETED)
        _recount(run, item, was_over, had_failed)

    # -- the picture -------------------------------------------------------------------

    def elapsed(self, now: float) -> float:
        root = self._root
        if root.created is None:
            return 0.0
        return max(0.0, (now if root.ended is None else root.ended) - root.created)

    @property
    def counts(self) -> tuple[int, int]:
        """Steps that are over, and all that are known to be needed."""
        item = self._root.item(0)
        return item.over, len(item.steps)

    def rows(self, now: float) -> list[Row]:
        """The steps in the workflow's order, and below each what it has started.

        :param now: the time, as the server's clock has it
        """
        groups = self._groups()
        rows: list[Row] = []
        steps = self._root.item(0).steps
        places = {step_id: place for place, step_id in enumerate(steps)}
        for step_id in sorted(
            steps, key=lambda each: _order(steps[each], places[each])
        ):
            step = steps[step_id]
            nested = list(self._nested(groups, (self._root_id, step_id), 1, now))
            done, failed, total = _tally(nested) if nested else (0, 0, 1)
            if not nested:
                done = int(step.phase.is_over)
                failed = int(step.phase is Phase.FAILED)
            rows.append(
                Row(
                    *(step_id, 0, step.phase, done, failed, total),
                    *(step.elapsed(now), step.attempt),
                )
            )
            rows += nested
        # Nobody knows whose these are.
        rows += self._nested(groups, (self._root_id, None), 0, now)
        return rows

    def _groups(self) -> dict[tuple[object, str | None], list[str]]:
        """The ids of the runs that were started, by who has started them."""
        groups: dict[tuple[object, str | None], list[str]] = {}
        for run_id, run in self._runs.items():
            if run.parent is not None and run.parent != run_id:
                step_id = self._starter(run) if run.parent == self._root_id else None
                groups.setdefault((run.parent, step_id), []).append(run_id)
        return groups

    def _nested(
        self,
        groups: Mapping[tuple[object, str | None], list[str]],
        place: tuple[object, str | None],
        depth: int,
        now: float,
    ) -> Iterator[Row]:
        """A row for all runs of one level, since there may be thousands."""
        level = groups.get(place, [])
        seen = {self._root_id}
        while level:
            seen.update(level)
            yield self._row_of(level, depth, now)
            level = [
                each
                for run_id in level
                for each in groups.get((run_id, None), ())
                if each not in seen
            ]
            depth += 1

    def _row_of(self, run_ids: Iterable[str], depth: int, now: float) -> Row:
        runs = [self._runs[each] for each in run_ids]
        done, failed, total = (
            sum(each) for each in zip(*(r.counts for r in runs), strict=True)
        )
        is_over = all(run.status.is_final for run in runs)
        label = "items" if len(runs) == 1 else f"items of {len(runs)} runs"
        started = min((r.created for r in runs if r.created is not None), default=None)
        ended = max((r.ended for r in runs if r.ended is not None), default=now)
        elapsed = None
        if started is not None:
            elapsed = max(0.0, (ended if is_over else now) - started)
        over = Phase.FAILED if failed else Phase.COMPLETED
        phase = over if is_over else Phase.RUNNING
        return Row(label, depth, phase, done, failed, total, elapsed)

    # -- who has started a run -----------------------------------------------------------

    def _starter(self, run: _Run) -> str | None:
        begun = [
            (step_id, step)
            for step_id, step in self._begun(run)
            if self._components.get(step_id, "/map").rpartition("/")[2] in _NESTING
        ]
        return begun[0][0] if len(begun) == 1 else None

    def _may_have_started(self, run: _Run) -> bool:
        return len(list(self._begun(run))) > 1

    def _begun(self, run: _Run) -> Iterator[tuple[str, _Step]]:
        """The steps of the outermost run that were under way when this one was created."""
        if run.created is None:
            return
        for step_id, step in self._root.item(0).steps.items():
            if step.started is None or step.started > run.created:
                continue
            if step.ended is None or step.ended >= run.created:
                yield step_id, step


def _recount(run: _Run, item: _Item, was_over: bool, had_failed: bool) -> None:
    run.done += item.is_over - was_over
    run.failed += (item.failed > 0) - had_failed


def _order(step: _Step, place: int) -> tuple[int, int]:
    """The server tells steps' places when it begins them, and before that their order."""
    return (place if step.index is None else step.index, place)


def _tally(nested: list[Row]) -> tuple[int, int, int]:
    first = nested[0]
    return first.done, first.failed, first.total


def _earlier(one: float | None, other: float | None) -> float | None:
    return min((each for each in (one, other) if each is not None), default=None)


def _later(one: float | None, other: float | None) -> float | None:
    return max((each for each in (one, other) if each is not None), default=None)


# -- batches ---------------------------------------------------------------------------

# A rate is that of the last so many seconds: what was before says little of what comes.
_WINDOW: Final = 30.0
_MOST_SAMPLES: Final = 256


class BatchProgress:
    """How many items of a batch have ended.

    :param total: how many there are; None: nobody knows, as they come through a pipe
    :param now: the time by a clock that nobody sets back
    """

    def __init__(self, now: float, total: int | None = None) -> None:
        self.total = total
        self.done = 0
        self.failed = 0
        self.running = 0
        self.kept = 0
        """Of those that are done, how many were so before."""
        self._began = now
        self._samples: deque[tuple[float, int]] = deque([(now, 0)], _MOST_SAMPLES)

    def begin(self) -> None:
        self.running += 1

    def end(self, now: float, *, has_failed: bool) -> None:
        self.running -= 1
        self.done += 1
        self.failed += has_failed
        last, _ = self._samples[-1]
        if now - last >= _WINDOW / _MOST_SAMPLES:
            self._samples.append((now, self.done - self.kept))

    def keep(self, *, has_failed: bool) -> None:
        """An item that was done before."""
        self.done += 1
        self.kept += 1
        self.failed += has_failed

    def elapsed(self, now: float) -> float:
        return now - self._began

    def rate(self, now: float) -> float:
        """Items a second."""
        while len(self._samples) > 1 and now - self._samples[1][0] > _WINDOW:
            self._samples.popleft()
        since, count = self._samples[0]
        return (self.done - self.kept - count) / (now - since) if now > since else 0.0

    def remaining(self, now: float) -> float | None:
        """Seconds until the end, as it looks; None: that cannot be said."""
        rate = self.rate(now)
        if self.total is None or not rate:
            return None
        return max(0, self.total - self.done) / rate
