"""What is known of a run from its events, in whatever order they come, and its drawing."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from stepflow_runtime import (
    RunCompleted,
    RunCreated,
    RunEvent,
    RunStatus,
    StepCompleted,
    StepsNeeded,
    StepStarted,
    SubRunCreated,
)
from stepflow_runtime.cli.drawing import ASCII, UNICODE, Glyphs, draw_batch, draw_run
from stepflow_runtime.cli.progress import BatchProgress, Phase, RunProgress

BEGIN = datetime(2026, 11, 23, tzinfo=UTC)
STEPS = ("a", "b", "c")


def at(seconds: float) -> datetime:
    return BEGIN + timedelta(seconds=seconds)


@st.composite
def histories(draw: st.DrawFn) -> list[RunEvent]:
    """A run whose steps start runs, which start runs."""
    events: list[RunEvent] = []

    def life(run_id: str, items: int, depth: int) -> None:
        for item in range(items):
            add(StepsNeeded, run_id, item_index=item, step_ids=STEPS)
            for index, step in enumerate(STEPS[: draw(st.integers(0, 3))]):
                where = {"item_index": item, "step_index": index, "step_id": step}
                for attempt in range(draw(st.integers(1, 2))):
                    add(StepStarted, run_id, attempt=attempt + 1, **where)
                if depth and draw(st.booleans()):
                    sub_run, count = f"{run_id}.{len(events)}", draw(st.integers(1, 2))
                    about = {"parent_run_id": run_id, "flow_id": "f"}
                    add(SubRunCreated, sub_run, item_count=count, **about)
                    life(sub_run, count, depth - 1)
                ends = (RunStatus.COMPLETED, RunStatus.FAILED)
                if draw(st.booleans()):
                    add(
                        StepCompleted,
                        run_id,
                        status=draw(st.sampled_from(ends)),
                        **where,
                    )
        if draw(st.booleans()):
            add(RunCompleted, run_id, status=RunStatus.COMPLETED)

    def add(kind: type[RunEvent], run_id: str, **fields: object) -> None:
        number = len(events)
        events.append(
            kind(sequence_number=number, run_id=run_id, timestamp=at(number), **fields)
        )

    add(RunCreated, "r", item_count=1)
    life("r", 1, 2)
    return events


def progress_of(events: list[RunEvent]) -> RunProgress:
    progress = RunProgress("r")
    for event in events:
        progress.add(event)
    return progress


@given(histories(), st.integers())
def test_the_order_of_events_and_their_repetition_change_nothing(
    events: list[RunEvent], seed: int
) -> None:
    now = at(len(events)).timestamp()
    shuffled = [*events, *events[::2]]
    Random(seed).shuffle(shuffled)
    straight, other = progress_of(events), progress_of(shuffled)
    # Before a step is begun, only the order in which it is told of says its place.
    assert sorted(straight.rows(now), key=repr) == sorted(other.rows(now), key=repr)
    assert straight.counts == other.counts
    assert straight.last_sequence_number == other.last_sequence_number


@given(histories())
def test_more_events_are_never_less_progress(events: list[RunEvent]) -> None:
    progress = RunProgress("r")
    done = 0
    for event in events:
        progress.add(event)
        for row in progress.rows(at(0).timestamp()):
            assert 0 <= row.failed <= row.total >= row.done >= 0
        over, total = progress.counts
        assert done <= over <= total
        done = over


@given(
    histories(),
    st.text(max_size=30),
    st.integers(4, 120),
    st.integers(2, 12),
    st.sampled_from([ASCII, UNICODE]),
)
def test_a_drawing_is_no_larger_than_its_terminal(
    events: list[RunEvent], name: str, width: int, height: int, glyphs: Glyphs
) -> None:
    progress = progress_of(events)
    lines = draw_run(progress, name, at(5000).timestamp(), width, height, glyphs)
    assert len(lines) <= max(height, 3)
    for line in lines:
        assert cell_len(line.text) <= width
        assert line.text.isprintable()


def test_what_has_no_room_is_what_waits_or_is_over() -> None:
    ids = tuple(f"s{place}" for place in range(20))
    events: list[RunEvent] = [
        StepsNeeded(sequence_number=1, run_id="r", step_ids=ids),
        *(
            StepStarted(sequence_number=2, run_id="r", step_index=n, step_id=ids[n])
            for n in range(12)
        ),
        *(
            StepCompleted(
                sequence_number=3,
                run_id="r",
                step_index=n,
                step_id=ids[n],
                status=RunStatus.COMPLETED,
            )
            for n in range(10)
        ),
    ]
    lines = draw_run(progress_of(events), "flow", 0.0, 40, 6, ASCII)
    assert [line.text.split()[:2] for line in lines] == [
        ["flow", "10"],
        ["+", "s8"],
        ["+", "s9"],
        [">", "s10"],
        [">", "s11"],
        ["...", "8"],
    ]
    assert lines[-1].text.strip() == "... 8 waiting, 8 completed"


def test_a_nested_run_belongs_to_the_step_that_can_have_started_it() -> None:
    def event(kind: type[RunEvent], second: float, **fields: object) -> RunEvent:
        about = {"sequence_number": 0, "timestamp": at(second), "run_id": "r"}
        return kind(**{**about, **fields})  # type: ignore[arg-type]

    progress = progress_of(
        [
            event(StepStarted, 0, step_index=0, step_id="a"),
            event(StepStarted, 0, step_index=1, step_id="b"),
            event(SubRunCreated, 1, run_id="s", parent_run_id="r", item_count=3),
        ]
    )
    now = at(2).timestamp()
    assert [row.label for row in progress.rows(now)] == ["a", "b", "items"]
    assert progress.wants_components
    progress.learn_components({"a": "/builtin/map", "b": "/sleep"})
    rows = progress.rows(now)
    assert [(row.label, row.depth) for row in rows] == [
        ("a", 0),
        ("items", 1),
        ("b", 0),
    ]
    assert (rows[0].total, rows[0].phase) == (3, Phase.RUNNING)


@given(st.lists(st.floats(0.001, 5), max_size=50), st.integers(0, 10))
def test_a_batch_ends_when_its_rate_says(pauses: list[float], kept: int) -> None:
    progress = BatchProgress(0.0, kept + 2 * len(pauses))
    for _ in range(kept):
        progress.keep(has_failed=False)
    now = 0.0
    for pause in pauses:
        now += pause
        progress.begin()
        progress.end(now, has_failed=True)
        rate, remaining = progress.rate(now), progress.remaining(now)
        assert rate >= 0
        if remaining is not None:
            assert remaining * rate == pytest.approx(progress.total - progress.done)  # type: ignore[operator]
        for line in draw_batch(progress, now, 40, ASCII):
            assert cell_len(line.text) <= 40
    assert (progress.done, progress.failed) == (kept + len(pauses), len(pauses))
    assert progress.running == 0
