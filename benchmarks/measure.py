"""What is measured, and how sides are compared: turn by turn, round by round.

A machine is never equally fast for long. So the sides of a case take turns, A B C A B C ...,
and a ratio is the median of the rounds' ratios, not the ratio of two medians.

Pure, except for :func:`in_turns` and :func:`load`, which let time pass.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Final, Literal

import anyio
import msgspec

__all__ = [
    "CPU",
    "FULL",
    "QUICK",
    "Case",
    "Check",
    "Plan",
    "Row",
    "Sample",
    "Spread",
    "against",
    "alone",
    "in_turns",
    "load",
    "of_latencies",
    "quantile",
    "ratios",
    "row",
    "spread",
    "timed",
]


class Plan(msgspec.Struct, frozen=True):
    """How much is measured."""

    rounds: int  # turns of each side under load
    rounds_of_growth: int
    seconds: float  # how long such a turn lasts
    starts: int  # turns where a turn starts a process
    slow_starts: int  # and where it takes a second or more to do so
    levels: tuple[int, ...]  # runs at a time
    levels_of_growth: tuple[int, ...]
    batches: tuple[int, ...]
    batch: int
    batch_stored: int  # where each item is written to disk
    megabytes: tuple[int, ...]
    slow_payloads: int  # turns where one takes ten seconds
    slow_syncs: int  # runs where each takes a quarter of a second
    log_lines: int
    log_flood: int  # bytes
    blocked: float  # seconds that an event loop is held up
    soak: int  # runs
    memory: int  # runs whose cost in memory is looked at


FULL: Final = Plan(
    rounds=8,
    rounds_of_growth=4,
    seconds=0.4,
    starts=15,
    slow_starts=5,
    levels=(1, 10, 50, 200),
    levels_of_growth=(1, 2, 5, 10, 20, 50, 100, 200),
    batches=(1, 10, 100, 1_000, 10_000, 30_000),
    batch=10_000,
    batch_stored=1_000,
    megabytes=(1, 50),
    slow_payloads=1,
    slow_syncs=100,
    log_lines=200_000,
    log_flood=100_000_000,
    blocked=4.0,
    soak=200_000,
    memory=50_000,
)
QUICK: Final = Plan(
    rounds=3,
    rounds_of_growth=2,
    seconds=0.2,
    starts=3,
    slow_starts=1,
    levels=(1, 50),
    levels_of_growth=(1, 50),
    batches=(1, 100, 3_000),
    batch=10_000,
    batch_stored=100,
    megabytes=(1, 50),
    slow_payloads=0,
    slow_syncs=0,
    log_lines=100_000,
    log_flood=30_000_000,
    blocked=1.0,
    soak=20_000,
    memory=3_000,
)


class Spread(msgspec.Struct, frozen=True):
    """What many measurements come to."""

    median: float
    low: float
    high: float


class Sample(msgspec.Struct, frozen=True):
    """What one turn has shown."""

    value: float
    also: Mapping[str, float] = {}


class Check(msgspec.Struct, frozen=True, omit_defaults=True):
    """A side beside another one, or beside what was promised, or both.

    Without ``against`` the value itself is looked at; without ``promise`` nothing was
    promised, and the ratio is only told.
    """

    measured: Spread
    against: str | None = None
    promise: float | None = None
    at_least: bool = True
    reason: str = ""

    @property
    def is_kept(self) -> bool | None:
        if self.promise is None:
            return None
        if self.at_least:
            return self.measured.median >= self.promise
        return self.measured.median <= self.promise


class Row(msgspec.Struct, frozen=True, omit_defaults=True):
    """One side of a case."""

    case: str
    side: str
    unit: str
    samples: tuple[float, ...]
    also: Mapping[str, tuple[float, ...]] = {}
    checks: tuple[Check, ...] = ()
    x: float | None = None  # of a series: what the value depends on
    note: str = ""

    @property
    def key(self) -> tuple[str, str, float | None]:
        return self.case, self.side, self.x


class Case(msgspec.Struct, frozen=True):
    """Something to measure, by its name on the command line."""

    name: str
    about: str
    measure: Callable[[Plan], list[Row]]


def spread(values: Iterable[float]) -> Spread:
    ordered = sorted(values)
    return Spread(statistics.median(ordered), ordered[0], ordered[-1])


def quantile(values: Iterable[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * part), len(ordered) - 1)]


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Of what was measured in the same round, each."""
    return spread(mine / other for mine, other in zip(ours, theirs, strict=True))


# Of this process, for a run.
CPU: Final = "CPU µs"

Direction = Literal["at least", "at most"]


def against(
    sides: Mapping[str, Sequence[Sample]],
    side: str,
    other: str,
    direction: Direction | None = None,
    promise: float | None = None,
    reason: str = "",
) -> Check:
    """A side beside another one."""
    measured = ratios(
        [each.value for each in sides[side]], [each.value for each in sides[other]]
    )
    return Check(measured, other, promise, direction != "at most", reason)


def alone(
    values: Iterable[float], direction: Direction, promise: float, reason: str = ""
) -> Check:
    """A side's value beside what was promised of it."""
    return Check(spread(values), None, promise, direction != "at most", reason)


def row(
    case: str,
    side: str,
    unit: str,
    samples: Sequence[Sample],
    *checks: Check,
    x: float | None = None,
    note: str = "",
) -> Row:
    """A side's samples as a row."""
    also = {
        name: tuple(_rounded(each.also[name]) for each in samples)
        for name in (samples[0].also if samples else ())
    }
    values = tuple(_rounded(each.value) for each in samples)
    return Row(case, side, unit, values, also, checks, x, note)


def _rounded(value: float) -> float:
    """No more digits than anybody believes."""
    return float(f"{value:.6g}")


def in_turns(
    sides: Mapping[str, Callable[[], Sample]], rounds: int, *, warm: bool = True
) -> dict[str, list[Sample]]:
    """Let each side measure once in each round.

    :param warm: whether there is a first round that does not count
    """
    if warm:
        for measure in sides.values():
            measure()
    samples: dict[str, list[Sample]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, measure in sides.items():
            samples[name].append(measure())
    return samples


def timed(action: Callable[[], object]) -> Sample:
    """Milliseconds that something takes."""
    began = time.perf_counter()
    action()
    return Sample(1e3 * (time.perf_counter() - began))


async def load(
    run: Callable[[], Awaitable[object]], at_once: int, seconds: float
) -> Sample:
    """Runs per second with so many under way, how long they take, and what they cost us.

    By time and not by number: of a side that takes 40 ms for a run there are fewer. The cost
    is processor time of this process, which others on the machine change least.
    """
    latencies: list[float] = []

    async def work() -> None:
        now = time.perf_counter()
        while now < until:
            await run()
            began, now = now, time.perf_counter()
            latencies.append(now - began)

    began, cost = time.perf_counter(), time.process_time()
    until = began + seconds
    async with anyio.create_task_group() as tasks:
        for _ in range(at_once):
            tasks.start_soon(work)
    cost = time.process_time() - cost
    return of_latencies(latencies, time.perf_counter() - began, cost)


def of_latencies(latencies: Sequence[float], seconds: float, cost: float) -> Sample:
    """The same, from what was measured."""
    return Sample(
        len(latencies) / seconds,
        {
            "p50 ms": 1e3 * quantile(latencies, 0.5),
            "p99 ms": 1e3 * quantile(latencies, 0.99),
            CPU: 1e6 * cost / len(latencies),
        },
    )
