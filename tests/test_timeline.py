"""``timeline()``: what happened in a run, from a real server."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest

from stepflow_runtime import (
    NotFoundError,
    Omitted,
    RunStatus,
    RunTimeoutError,
    StepflowClient,
    StepflowRuntime,
    StepState,
    Timeline,
)

from .conftest import SLEEP, each_backend
from .executors import CONFIG

pytestmark = [pytest.mark.anyio, each_backend]

COMPLETED, FAILED = StepState.COMPLETED, StepState.FAILED
UNKNOWN_RUN = "01a20912-0000-7000-8000-000000000000"

# The outer step has another place than the inner one: events name the wrong one.
INNERMOST = {
    "steps": [
        {
            "id": "wait",
            "component": "/sleep",
            "input": {"duration_ms": {"$input": "$"}},
        }
    ],
    "output": {"$step": "wait"},
}
INNER = {
    "name": "inner",
    "steps": [
        {"id": "unused", "component": "/noop", "input": 1},
        {
            "id": "each",
            "component": "/map",
            "input": {"workflow": {"$literal": INNERMOST}, "items": {"$input": "$"}},
        },
    ],
    "output": {"$step": "each"},
}
OUTER = {
    "name": "outer",
    "steps": [
        {"id": "first", "component": "/noop", "input": {"$input": "$"}},
        {"id": "never", "component": "/noop", "input": 1},
        {
            "id": "all",
            "component": "/map",
            "input": {"workflow": {"$literal": INNER}, "items": {"$step": "first"}},
        },
        {"id": "aside", "component": "/sleep", "input": {"duration_ms": 30}},
    ],
    "output": [{"$step": "all"}, {"$step": "aside"}],
}
# Of a batch: an item whose input is no number fails.
EITHER = {
    "steps": [
        {
            "id": "wait",
            "component": "/sleep",
            "input": {"duration_ms": {"$input": "$"}},
        },
        {"id": "after", "component": "/noop", "input": {"$step": "wait"}},
    ],
    "output": {"$step": "after"},
}


def shape(timeline: Timeline) -> Any:
    """What it says, without times of reading."""
    return [
        [
            (s.step_id, s.item_index, s.state, s.attempts, s.output)
            for s in timeline.steps
        ],
        [shape(run) for run in timeline.sub_runs],
    ]


async def test_runs_within_runs_are_told_with_their_own_steps() -> None:
    async with StepflowRuntime.start(CONFIG) as runtime:
        result = await runtime.run(OUTER, [[5, 10], [15]])
        timeline = await runtime.timeline(result.run_id)
        async with StepflowClient(runtime.url) as client:
            elsewhere = await client.timeline(result.run_id.upper())
    assert (timeline.run_id, timeline.status) == (result.run_id, RunStatus.COMPLETED)
    assert (timeline.flow_name, timeline.notes) == ("outer", ())
    assert [step.step_id for step in timeline.steps] == ["first", "all", "aside"]
    (inner,) = timeline.sub_runs
    assert (inner.flow_name, inner.parent_step_id) == ("inner", "all")
    assert [(s.step_id, s.item_index) for s in inner.steps] == [
        ("each", 0),
        ("each", 1),
    ]
    assert [run.parent_step_id for run in inner.sub_runs] == ["each", "each"]
    waits = [step for run in inner.sub_runs for step in run.steps]
    assert [(s.step_id, s.component, s.state) for s in waits] == [
        ("wait", "/sleep", COMPLETED)
    ] * 3
    assert sorted(s.output["duration_ms"] for s in waits) == [5, 10, 15]
    assert all(s.duration and s.duration >= timedelta(milliseconds=5) for s in waits)
    # What happens inside happens meanwhile.
    whole = timeline.steps[1]
    assert whole.started and whole.ended and whole.waited is not None
    for step in waits:
        assert step.started and step.ended
        assert whole.started <= step.started <= step.ended <= whole.ended
    assert timeline.duration and whole.duration and timeline.duration >= whole.duration
    assert timeline.states == {
        ("first",): COMPLETED,
        ("never",): StepState.UNUSED,
        ("all",): COMPLETED,
        ("aside",): COMPLETED,
        ("all", "unused"): StepState.UNUSED,
        ("all", "each"): COMPLETED,
        ("all", "each", "wait"): COMPLETED,
    }
    told = {(log.run_id, log.step_id) for log in timeline.logs}
    assert {(inner.run_id, "each"), (result.run_id, "all")} <= told
    assert (shape(elsewhere), elsewhere.logs) == (shape(timeline), ())


async def test_attempts_are_told_with_their_pauses_and_reasons() -> None:
    flow = {
        "steps": [
            {"id": "ok", "component": "/noop", "input": 1},
            {"id": "bad", "component": "/eval", "input": {"no": {"$step": "ok"}}},
            {"id": "after", "component": "/noop", "input": {"$step": "bad"}},
        ],
        "output": {"$step": "after"},
    }
    config = {**CONFIG, "retry": {"transportMaxRetries": 1}}
    async with StepflowRuntime.start(config) as runtime:
        result = await runtime.run(flow)
        timeline = await runtime.timeline(result.run_id)
    # Who takes something from it fails after it, and is not the reason.
    assert result.error is not None and result.error.step_id == "bad"
    _, bad, after = timeline.steps
    assert [each.number for each in bad.attempts] == [1, 2]
    first, second = bad.attempts
    assert (first.state, first.pause, first.reason) == (FAILED, 0, "transport error")
    assert (second.state, second.pause, second.reason) == (FAILED, 1, None)
    assert first.ended == second.started and second.started and second.ended
    assert second.ended - second.started >= timedelta(seconds=second.pause)
    assert bad.error is not None and bad.error.code == "UNREACHABLE"
    assert after.state is FAILED
    assert timeline.items[0].state is FAILED and timeline.items[0].error is not None
    assert "since what it takes from bad is not there" in timeline.html()


async def test_a_run_that_goes_on_or_was_cancelled_is_told_so_far() -> None:
    flow = {
        "steps": [
            *SLEEP["steps"],
            {"id": "b", "component": "/noop", "input": {"$step": "a"}},
        ],
        "output": {"$step": "b"},
    }
    async with StepflowRuntime.start(CONFIG) as runtime:
        run_id = await runtime.submit(flow, 60_000)
        with anyio.fail_after(15):
            while not await runtime.get_steps(run_id):  # noqa: ASYNC110
                await anyio.sleep(0.01)
        timeline = await runtime.timeline(run_id)
        assert [step.state for step in timeline.steps] == [
            StepState.RUNNING,
            StepState.WAITING,
        ]
        assert timeline.ended is None and timeline.duration
        assert timeline.items[0].state is StepState.RUNNING
        await runtime.cancel(run_id)
        timeline = await runtime.timeline(run_id)
        assert timeline.status is RunStatus.CANCELLED
        assert [step.state for step in timeline.steps] == [
            StepState.CANCELLED,
            StepState.UNUSED,
        ]
        assert timeline.items[0].state is StepState.CANCELLED
        with pytest.raises(RunTimeoutError, match="has not been read to its end"):
            await runtime.timeline(run_id, timeout=0.001)
        with pytest.raises(NotFoundError):
            await runtime.timeline(UNKNOWN_RUN)


async def test_of_a_large_batch_the_outputs_are_those_that_one_wants_to_see() -> None:
    inputs: list[Any] = ["bad" if n % 50 == 49 else 0 for n in range(250)]
    long = {"x": "y" * 300_000}
    async with StepflowRuntime.start(CONFIG) as runtime:
        batch_id = await runtime.submit_batch(EITHER, inputs, max_concurrent=50)
        await runtime.get_batch(batch_id)
        timeline = await runtime.timeline(batch_id)
        wide = await runtime.run(
            {
                "steps": [{"id": "a", "component": "/noop", "input": {"$input": "$"}}],
                "output": 1,
            }
            | {"output": {"$step": "a"}},
            long,
        )
        of_wide = await runtime.timeline(wide.run_id)
    states = [item.state for item in timeline.items]
    assert states == [FAILED if each == "bad" else COMPLETED for each in inputs]
    assert len(timeline.steps) == 500
    shown = {s.item_index for s in timeline.steps if not isinstance(s.output, Omitted)}
    failed = {n for n, each in enumerate(inputs) if each == "bad"}
    assert len(shown) == 100 and failed < shown and 0 in shown and 240 not in shown
    assert all(item.duration is not None for item in timeline.items)
    assert any("250 items" in note for note in timeline.notes)
    (step,) = of_wide.steps
    assert step.output == Omitted(300_008) == of_wide.items[0].output
    assert "300,008 bytes" in of_wide.html()


async def test_it_is_the_same_after_a_restart(tmp_path: Path) -> None:
    storage = str(tmp_path / "runs.sqlite")
    async with StepflowRuntime.start(CONFIG, storage=storage) as runtime:
        result = await runtime.run(OUTER, [[1], [2, 3]])
        before = await runtime.timeline(result.run_id)
    async with StepflowRuntime.start(CONFIG, storage=storage) as runtime:
        after = await runtime.timeline(result.run_id)
    assert shape(after) == shape(before)
    # A store in a file tells times in whole seconds; the journal does not.
    assert (after.started, after.ended) == (before.started, before.ended)
    assert after.started and after.started.microsecond
    assert before.logs and not after.logs
