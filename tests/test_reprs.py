"""Reprs: one line, short, whatever is in a value; and what else shows values is as it was."""

from __future__ import annotations

import math
import pickle
import sys
from datetime import UTC, datetime
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.pretty import pretty_repr

import stepflow_runtime
from stepflow_runtime import (
    ComponentInfo,
    ComponentList,
    Diagnostic,
    Edge,
    FlowError,
    FlowResult,
    FlowStatus,
    ItemCounts,
    LogEntry,
    Omitted,
    RunInfo,
    RunStatus,
    ServerExit,
    StepStarted,
    Timeline,
    ValidationResult,
)

NOON = datetime(2026, 11, 30, 12, tzinfo=UTC)
RUN = "01a22a13-3221-7b33-b67a-655bb4c0f208"

STRUCTS = [
    value
    for value in (getattr(stepflow_runtime, name) for name in stepflow_runtime.__all__)
    if isinstance(value, type) and issubclass(value, msgspec.Struct)
    if value not in (Edge, ItemCounts, Omitted)  # numbers, and no more than five
]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=400)
    | st.sampled_from(["\ud800", "\n\r\u2028\x1b[31m", "x" * 5000]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
    ),
    max_leaves=20,
)
OURS = st.sampled_from(
    [
        FlowError(code="C", message="m" * 300, step_id="s"),
        (FlowError(code="C", message="m"),) * 3,
        ItemCounts(10**6, 10**6, 10**6, 10**6, 10**6),
        RunStatus.RUNNING,
        NOON,
    ]
)


def is_short(text: str) -> bool:
    return len(text) <= 200 and text.isprintable()


@settings(max_examples=150)
@given(kind=st.sampled_from(STRUCTS), data=st.data())
def test_a_repr_is_one_short_line_whatever_is_in_it(
    kind: type[msgspec.Struct], data: st.DataObject
) -> None:
    fields = dict.fromkeys(kind.__struct_fields__, JSON | OURS)
    if kind is ValidationResult:  # what it tells is counted from these
        fields = {"diagnostics": st.lists(st.builds(Diagnostic, st.text(), JSON))}
    assert is_short(repr(kind(**data.draw(st.fixed_dictionaries(fields)))))


def test_a_repr_tells_what_one_wants_to_know() -> None:
    error = FlowError(code="COMPONENT_FAILED", message="no", step_id="a", attempts=2)
    failed = FlowResult(status=FlowStatus.FAILED, run_id=RUN, error=error)
    assert repr(FlowResult(status=FlowStatus.SUCCESS, run_id=RUN, output={"n": 1})) == (
        f"FlowResult(status=SUCCESS, run_id='{RUN}', output={{'n': 1}})"
    )
    assert repr(failed) == (
        f"FlowResult(status=FAILED, run_id='{RUN}', error=FlowError("
        "code='COMPONENT_FAILED', message='no', step_id='a', attempts=2))"
    )
    found = (Diagnostic("error", "x", "$.a"), Diagnostic("warning", "y"))
    assert repr(ValidationResult(diagnostics=found)) == (
        "ValidationResult(is_valid=False, errors=<1 Diagnostic>, warnings=<1 Diagnostic>)"
    )
    run = RunInfo(
        run_id=RUN,
        status=RunStatus.FAILED,
        flow_name="x",
        items=ItemCounts(3, 2, 0, 1),
        created_at=NOON,
    )
    assert repr(run) == (
        f"RunInfo(run_id='{RUN}', status=FAILED, flow_name='x', items=ItemCounts(total=3, "
        "completed=2, failed=1), created_at=2026-11-30 12:00:00.000+00:00)"
    )
    schema = {"properties": {"api_key": {"type": "string"}}}  # names, and no secret
    openai = ComponentInfo(path="/x", description="takes a string", input_schema=schema)
    assert repr(openai) == "ComponentInfo(path='/x', description='takes a string')"
    components = ComponentList(
        [ComponentInfo(path="/noop")], failed_plugins={"python": "is not there"}
    )
    assert repr(components) == (
        "<ComponentList of 1: '/noop'; failed_plugins=['python']>"
    )
    started = StepStarted(sequence_number=3, run_id=RUN, step_id="a", attempt=2)
    assert repr(started) == (
        f"StepStarted(sequence_number=3, run_id='{RUN}', step_id='a', attempt=2)"
    )


def test_of_long_values_the_longest_are_cut_and_ids_stay_whole() -> None:
    entry = LogEntry(
        timestamp=NOON, level="WARN", message="x" * 9999, stream="stderr", run_id=RUN
    )
    assert f"run_id='{RUN}'" in repr(entry) and "message='xxxxx" in repr(entry)
    assert 190 < len(repr(entry)) <= 200
    many = Timeline(run_id=RUN, status=RunStatus.RUNNING, logs=(entry,) * 500)  # type: ignore[arg-type]
    assert "logs=<500 LogEntry>" in repr(many)
    left = repr(ServerExit(code=1, pid=2, recent_logs=[entry] * 9))
    assert left == "ServerExit(code=1, pid=2, uptime=0.0, was_hung=False)"


def test_a_repr_looks_at_a_part_of_what_is_large() -> None:
    class Counting(list[Any]):
        seen = 0

        def __iter__(self) -> Any:
            for each in super().__iter__():
                Counting.seen += 1
                yield each

    values = Counting([{"n": n} for n in range(100_000)])
    result = FlowResult(status=FlowStatus.SUCCESS, run_id=RUN, output=values)
    assert is_short(repr(result))
    assert Counting.seen < 1_000


def test_what_is_a_secret_by_its_name_is_starred_wherever_it_stands() -> None:
    output = {"said": "it is sk-0123456", "api_key": "sk-0123456", "url": "x://u:pw@h"}
    text = repr(FlowResult(status=FlowStatus.SUCCESS, run_id=RUN, output=output))
    assert "sk-0" not in text and "pw" not in text and text.count("***") == 3


def test_reprs_of_what_no_server_gives_do_not_raise() -> None:
    deep: Any = []
    for _ in range(5_000):
        deep = [deep]
    loop: dict[str, Any] = {}
    loop["again"] = loop
    limit = sys.get_int_max_str_digits()
    for output in (deep, loop, 10 ** (limit + 1), object(), math.nan, b"x"):
        result = FlowResult(status=FlowStatus.SUCCESS, run_id=RUN, output=output)
        assert is_short(repr(result))


def test_all_that_is_in_a_value_is_still_there_for_others() -> None:
    result = FlowResult(status=FlowStatus.SUCCESS, run_id=RUN, output=["x" * 300])
    assert "x" * 300 in pretty_repr(result)
    assert result.output == ["x" * 300]
    copy = pickle.loads(pickle.dumps(result))
    assert copy == result and repr(copy) == repr(result)
    encoded = msgspec.json.encode(result)
    assert msgspec.json.decode(encoded, type=FlowResult) == result
    for kind in STRUCTS:
        assert kind.__struct_config__.frozen
