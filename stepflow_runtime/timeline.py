"""What happened in a run and when: a value, and a page that shows it.

A leaf. Contract: the values say what the server's journal says; what it does not tell is
``None``, and what was left out is told by ``notes``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

import msgspec

from .events import RunStatus
from .executor import FlowError
from .graph import Graph, StepState
from .logs.entry import LogEntry
from .reprs import repr_of

__all__ = [
    "Omitted",
    "StepAttempt",
    "Timeline",
    "TimelineItem",
    "TimelineLog",
    "TimelineStep",
]


class Omitted(msgspec.Struct, frozen=True):
    """Stands for an output that was left out.

    :ivar size: how long it is as JSON, in bytes; ``None`` if it was not asked for
    """

    size: int | None = None


class StepAttempt(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One attempt at a step.

    :ivar number: which one, from 1; the server's restart begins one, too
    :ivar started: when it was begun. The server counts the pause before it as a part of it
    :ivar ended: when it ended, or the next one began; ``None`` if it goes on, or nobody knows
    :ivar state: how it ended
    :ivar pause: seconds that it waited first, as far as the log tells
    :ivar reason: why it failed, as far as the log or the result tells
    """

    number: int
    state: StepState
    started: datetime | None = None
    ended: datetime | None = None
    pause: float = 0.0
    reason: str | None = None

    __repr__ = repr_of("number", "state", "started", "ended", "pause", "reason")


class TimelineStep(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A step of one item of a run.

    :ivar step_id: its id in the workflow
    :ivar step_index: its place in the workflow, from 0
    :ivar item_index: the item, from 0
    :ivar component: what it calls, or ``None``
    :ivar state: how it stands
    :ivar ready: when what it takes was there, or ``None``
    :ivar attempts: how often it was begun, and when
    :ivar output: its output (any JSON value) if it completed; :class:`Omitted` where that was
        left out
    :ivar error: why it failed, or ``None``
    """

    step_id: str
    step_index: int
    item_index: int
    state: StepState
    component: str | None = None
    ready: datetime | None = None
    attempts: tuple[StepAttempt, ...] = ()
    output: Any = None
    error: FlowError | None = None

    __repr__ = repr_of(
        "step_id", "state", "item_index", "component", "attempts", "output", "error"
    )

    @property
    def started(self) -> datetime | None:
        """When its first attempt began, or ``None``."""
        return self.attempts[0].started if self.attempts else None

    @property
    def ended(self) -> datetime | None:
        """When it ended, or ``None`` if it has not."""
        return self.attempts[-1].ended if self.attempts else None

    @property
    def duration(self) -> timedelta | None:
        """From its first attempt to its end, or ``None``."""
        return between(self.started, self.ended)

    @property
    def waited(self) -> timedelta | None:
        """From when it could be begun until it was, or ``None``."""
        return between(self.ready, self.started)


class TimelineItem(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An item of a run: what became of one input.

    :ivar index: its place among the inputs, from 0
    :ivar state: how it stands
    :ivar started: when its first step was begun, or ``None``
    :ivar ended: when its last step ended, or ``None``
    :ivar output: its output (any JSON value) if it completed; :class:`Omitted` where that was
        left out
    :ivar error: why it failed, or ``None``
    """

    index: int
    state: StepState
    started: datetime | None = None
    ended: datetime | None = None
    output: Any = None
    error: FlowError | None = None

    __repr__ = repr_of("index", "state", "output", "error")

    @property
    def duration(self) -> timedelta | None:
        """From its beginning to its end, or ``None``."""
        return between(self.started, self.ended)


class TimelineLog(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the run's log, and what it tells of.

    :ivar entry: the line
    :ivar run_id: the run that it tells of: this one or a sub-run
    :ivar item_index: the item, or ``None``
    :ivar step_id: the step, or ``None``
    """

    entry: LogEntry
    run_id: str
    item_index: int | None = None
    step_id: str | None = None

    __repr__ = repr_of("entry", "item_index", "step_id")


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    """What happened in a run, as ``timeline()`` returns it.

    :ivar run_id: the run
    :ivar status: how it stands
    :ivar flow_id: its workflow, or ``None``
    :ivar flow_name: the name in that workflow, or ``None``
    :ivar started: when it was begun (aware, UTC), or ``None``
    :ivar ended: when it ended, or ``None``
    :ivar seen: up to when this tells: the end, or when the server was asked
    :ivar graph: the workflow's graph, or ``None`` if the server has forgotten it
    :ivar items: its items, in the order of the inputs
    :ivar steps: the steps that were begun or needed, item by item, in the workflow's order
    :ivar sub_runs: the runs that its steps have started, in the order in which they were
    :ivar parent_step_id: of a sub-run, the step that has started it, as far as is known
    :ivar parent_item_index: of a sub-run, the item of that step, as far as is known
    :ivar logs: what an embedded server logged of it and its sub-runs, oldest first
    :ivar notes: what is not in here, for people
    """

    run_id: str
    status: RunStatus
    flow_id: str | None = None
    flow_name: str | None = None
    started: datetime | None = None
    ended: datetime | None = None
    seen: datetime | None = None
    graph: Graph | None = None
    items: tuple[TimelineItem, ...] = ()
    steps: tuple[TimelineStep, ...] = ()
    sub_runs: tuple[Timeline, ...] = ()
    parent_step_id: str | None = None
    parent_item_index: int | None = None
    logs: tuple[TimelineLog, ...] = ()
    notes: tuple[str, ...] = ()

    __repr__ = repr_of(
        "run_id", "status", "flow_name", "items", "steps", "sub_runs", "logs"
    )

    def _repr_html_(self) -> str:
        from .notebook import timeline_html

        return timeline_html(self)

    @property
    def duration(self) -> timedelta | None:
        """From its beginning to its end, or to when it was looked at."""
        return between(self.started, self.ended or self.seen)

    @property
    def states(self) -> dict[tuple[str, ...], StepState]:
        """How the steps of the workflow stand, those of nested flows too, over all items.

        By their ids: ``("outer", "inner")`` is a step of a flow that stands in a step. It is what :meth:`Graph.svg` and :meth:`Graph.mermaid` take.
        """
        found: dict[tuple[str, ...], Counter[StepState]] = {}
        self._count(found, ())
        unused = StepState.UNUSED if self.status.is_final else StepState.WAITING
        return {
            path: _together(counts) if counts else unused
            for path, counts in found.items()
        }

    def _count(
        self, found: dict[tuple[str, ...], Counter[StepState]], path: tuple[str, ...]
    ) -> None:
        # A step that nothing needed is in no event.
        for each in self.graph.steps if self.graph is not None else ():
            found.setdefault((*path, each.id), Counter())
        for step in self.steps:
            found.setdefault((*path, step.step_id), Counter())[step.state] += 1
        for run in self.sub_runs:
            if run.parent_step_id is not None:
                run._count(found, (*path, run.parent_step_id))

    def html(self) -> str:
        """A page that shows all of it, in one document that needs nothing else.

        There is no script in it and it loads nothing. What looks like a secret, by the name
        that it has, is starred.
        """
        from .page import as_html

        return as_html(self)


def between(start: datetime | None, end: datetime | None) -> timedelta | None:
    return None if start is None or end is None else end - start


_FROM_WORST = (
    StepState.FAILED,
    StepState.RUNNING,
    StepState.CANCELLED,
    StepState.WAITING,
    StepState.COMPLETED,
    StepState.UNUSED,
)


def _together(counts: Mapping[StepState, int]) -> StepState:
    return next(state for state in _FROM_WORST if counts.get(state))
