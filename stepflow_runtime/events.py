"""What happens in a run, event by event, as ``events()`` yields it.

A leaf. The events are those of a server's journal, in its order.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec

from .reprs import repr_of

__all__ = [
    "ItemCompleted",
    "RunCompleted",
    "RunCreated",
    "RunEvent",
    "RunStatus",
    "StepCompleted",
    "StepReady",
    "StepStarted",
    "StepsNeeded",
    "SubRunCreated",
    "UnknownEvent",
]


class RunStatus(enum.Enum):
    """How a run, an item or a step stands. The values are those of the server's API."""

    UNKNOWN = 0
    """What a newer server says, and this version has no name for."""
    RUNNING = 1
    COMPLETED = 2
    FAILED = 3
    CANCELLED = 4
    PAUSED = 5
    RECOVERY_FAILED = 6
    """The server that took the run over could not go on with it."""

    @classmethod
    def _missing_(cls, value: object) -> RunStatus:
        return cls.UNKNOWN

    @property
    def is_final(self) -> bool:
        """True if it is over."""
        return self in _FINAL


_FINAL = frozenset(
    {
        RunStatus.COMPLETED,
        RunStatus.FAILED,
        RunStatus.CANCELLED,
        RunStatus.RECOVERY_FAILED,
    }
)


class RunEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened in a run.

    :ivar sequence_number: its place in the journal; what happens at once may share one
    :ivar timestamp: when (aware, UTC), or ``None``
    :ivar run_id: the run, or the sub-run
    """

    sequence_number: int
    run_id: str
    timestamp: datetime | None = None

    __repr__ = repr_of()


class RunCreated(RunEvent, frozen=True, kw_only=True):
    """The run was taken.

    :ivar flow_id: its workflow
    :ivar item_count: how many inputs it has
    """

    flow_id: str = ""
    item_count: int = 0


class StepsNeeded(RunEvent, frozen=True, kw_only=True):
    """The server knows which steps an item needs; conditions can bring more later.

    :ivar item_index: the item, from 0
    :ivar step_ids: the steps
    """

    item_index: int = 0
    step_ids: tuple[str, ...] = ()


class StepReady(RunEvent, frozen=True, kw_only=True):
    """What a step waits for is there.

    :ivar item_index: the item, from 0
    :ivar step_index: the step's place in the workflow, from 0
    :ivar step_id: the step
    """

    item_index: int = 0
    step_index: int = 0
    step_id: str = ""


class StepStarted(RunEvent, frozen=True, kw_only=True):
    """A step was begun.

    :ivar item_index: the item, from 0
    :ivar step_index: the step's place in the workflow, from 0
    :ivar step_id: the step
    :ivar attempt: which attempt this is, from 1
    """

    item_index: int = 0
    step_index: int = 0
    step_id: str = ""
    attempt: int = 1


class StepCompleted(RunEvent, frozen=True, kw_only=True):
    """A step ended, well or not.

    :ivar item_index: the item, from 0
    :ivar step_index: the step's place in the workflow, from 0
    :ivar step_id: the step
    :ivar status: ``COMPLETED`` or ``FAILED``
    :ivar result: its output with ``include_results=True``, else ``None``
    """

    item_index: int = 0
    step_index: int = 0
    step_id: str = ""
    status: RunStatus = RunStatus.UNKNOWN
    result: Any = None


class ItemCompleted(RunEvent, frozen=True, kw_only=True):
    """An item ended.

    :ivar item_index: the item, from 0
    :ivar result: its output with ``include_results=True``, else ``None``
    """

    item_index: int = 0
    result: Any = None


class SubRunCreated(RunEvent, frozen=True, kw_only=True):
    """A step has started a run of its own.

    :ivar parent_run_id: the run of that step
    :ivar flow_id: the workflow of the new run
    :ivar item_count: how many inputs it has
    """

    parent_run_id: str = ""
    flow_id: str = ""
    item_count: int = 0


class RunCompleted(RunEvent, frozen=True, kw_only=True):
    """The run ended, well or not. Nothing follows.

    :ivar status: how
    """

    status: RunStatus = RunStatus.UNKNOWN


class UnknownEvent(RunEvent, frozen=True, kw_only=True):
    """An event of a newer server, that this version has no class for.

    :ivar kind: its name
    :ivar data: what it carries
    """

    kind: str = ""
    data: Mapping[str, Any] = {}
