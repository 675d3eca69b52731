"""What values look like in a notebook: one element, bounded, and nothing in it is foreign."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflow_runtime import (
    ComponentInfo,
    ComponentList,
    Diagnostic,
    FlowError,
    FlowResult,
    FlowStatus,
    Graph,
    LogEntry,
    StepState,
    Timeline,
    ValidationResult,
    notebook,
)
from stepflow_runtime.notebook import LARGEST

from .test_docs import python
from .test_report import (
    ATTRIBUTES,
    JSON,
    OURS,
    STYLE,
    TEXT,
    Reader,
    batch,
    one_step,
    timelines,
)

NOON = datetime(2026, 11, 30, 12, tzinfo=UTC)


def shown(value: Any) -> Reader:
    """What a browser makes of it; no element, attribute or style is any but ours."""
    html = value._repr_html_()
    assert len(html) < LARGEST + 20_000
    html.encode()
    reader = Reader(html)
    assert not reader.others
    assert reader.ids == [] and reader.links == set()
    allowed = OURS.keys() - {"html", "meta", "head", "body"} | {"thead", "tbody"} - {
        "h1",
        "h2",
        "h3",
    }
    for tag, attributes in reader.elements:
        assert tag in allowed, tag
        assert attributes.keys() <= ATTRIBUTES - {"http-equiv", "content", "name"}
        if "style" in attributes:
            assert STYLE.fullmatch(attributes["style"] or ""), attributes
        classes = (attributes.get("class") or "").split()
        assert all(re.fullmatch(r"stepflow-\w+", each) for each in classes), classes
    assert [tag for tag, _ in reader.elements].count("style") == 1
    return reader


def text_of(value: Any) -> str:
    """What one can read, without the style."""
    return "".join(shown(value).texts[1:])


ENTRIES = st.builds(
    LogEntry,
    timestamp=st.just(NOON),
    level=TEXT,
    message=TEXT,
    stream=st.just("stderr"),
)
ERRORS = st.builds(
    FlowError,
    code=TEXT,
    message=TEXT,
    step_id=st.none() | TEXT,
    component=st.none() | TEXT,
    attempts=st.none() | st.integers(),
    logs=st.lists(ENTRIES, max_size=2).map(tuple),
)
RESULTS = st.builds(
    FlowResult,
    status=st.sampled_from(FlowStatus),
    run_id=TEXT,
    output=JSON,
    error=st.none() | ERRORS,
    item_index=st.integers(),
)
FINDINGS = st.builds(
    Diagnostic,
    level=TEXT | st.sampled_from(["fatal", "error", "warning"]),
    message=TEXT,
    path=st.none() | TEXT,
    kind=TEXT,
)
SCHEMAS = st.dictionaries(
    st.sampled_from(["properties", "required", "type", "$ref"]) | TEXT,
    JSON | st.dictionaries(TEXT, JSON | st.dictionaries(st.just("type"), JSON)),
)
COMPONENTS = st.builds(
    ComponentList,
    st.lists(
        st.builds(
            ComponentInfo,
            path=TEXT,
            plugin=TEXT,
            description=TEXT,
            input_schema=st.none() | SCHEMAS,
        ),
        max_size=2,
    ),
    failed_plugins=st.dictionaries(TEXT, TEXT, max_size=2),
)


@settings(max_examples=120)
@given(
    RESULTS
    | ERRORS
    | COMPONENTS
    | st.builds(ValidationResult, diagnostics=st.lists(FINDINGS).map(tuple))
    | timelines()
    | timelines().map(lambda timeline: timeline.graph)
)
def test_no_text_is_more_than_text(value: Any) -> None:
    shown(value)


def test_styles_stay_within_their_own_output() -> None:
    for value in (one_step(), FlowResult(status=FlowStatus.SUCCESS, run_id="r")):
        (style,) = re.findall(r"<style>(.*?)</style>", value._repr_html_(), re.DOTALL)
        assert "@import" not in style and "url(" not in style
        assert "<" not in style
        plain = re.sub(
            r"@media ?(?:print|\([^)]*\))\{((?:[^{}]*\{[^{}]*\})*)\}", r"\1", style
        )
        selectors = re.findall(r"([^{}]+)\{[^{}]*\}", plain)
        assert len(selectors) > 10
        for selector in selectors:
            for one in selector.split(","):
                assert one.strip().startswith(".stepflow-"), one


def test_a_result_shows_its_output_or_why_there_is_none() -> None:
    result = FlowResult(
        status=FlowStatus.SUCCESS,
        run_id="the-run",
        output={"a": [1, True]},
        item_index=7,
    )
    told = text_of(result)
    assert "✓ success run the-run · item 7" in told
    assert '{\n  "a": [\n    1,\n    true\n  ]\n}' in told
    entry = LogEntry(
        timestamp=NOON,
        level="WARN",
        message="Traceback (most recent call last):\n  File",
        stream="stderr",
    )
    error = FlowError(
        code="COMPONENT_FAILED",
        message="ValueError: no",
        step_id="price",
        component="/python/price",
        attempts=3,
        logs=(entry, entry),
    )
    failed = FlowResult(status=FlowStatus.FAILED, run_id="r", error=error)
    told = text_of(failed)
    assert "✗ failed run r" in told
    assert "COMPONENT_FAILED · step price · /python/price · tried 3 times" in told
    assert "ValueError: no" in told and "2 entries of the log" in told
    assert "Traceback (most recent call last):\n  File" in told
    tags = [tag for tag, _ in shown(failed).elements]
    assert "details" in tags and "details" in [tag for tag, _ in shown(error).elements]
    running = FlowResult(status=FlowStatus.RUNNING, run_id="r")
    assert text_of(running) == "▸ running run r"


def test_findings_are_a_table_of_level_and_path() -> None:
    found = ValidationResult(
        diagnostics=(
            Diagnostic("fatal", "no such step", "$.steps[0].input"),
            Diagnostic("warning", "no name"),
            Diagnostic("level 9", "new"),
        )
    )
    told = text_of(found)
    assert "✗ not valid 1 error · 1 warning" in told
    assert "✗ fatal$.steps[0].inputno such step" in told
    assert "! warning$no name" in told and "level 9$new" in told
    assert text_of(ValidationResult()) == "✓ valid"
    many = ValidationResult(diagnostics=(Diagnostic("error", "x" * 9_999),) * 500)
    assert "500 errors" in text_of(many) and "400 more findings" in text_of(many)


def test_components_are_a_table_and_plugins_that_failed_come_first() -> None:
    schema = {
        "properties": {
            "order": {"$ref": "#/$defs/Order"},
            "discount": {"type": ["number", "null"]},
            "other": True,
        },
        "required": ["order"],
    }
    price = ComponentInfo(
        path="/python/price",
        plugin="python",
        description="What\n  it costs.",
        input_schema=schema,
    )
    told = text_of(ComponentList([price], failed_plugins={"llm": "is not there"}))
    assert told.startswith("✗ plugin llm failedis not there1 component")
    assert "/python/pricepythonWhat it costs." in told
    assert "order Order, discount? number | null, other? " in told
    assert "100 more components" in text_of(ComponentList([price] * 300))


def test_a_timeline_shows_graph_and_bars() -> None:
    reader = shown(one_step())
    told = "".join(reader.texts[1:])
    assert "✓ completed" in told and "1 completed" in told
    assert "hunter22" not in told and "***" in told
    tags = [tag for tag, _ in reader.elements]
    assert "svg" in tags and "details" in tags
    bars = [
        (attributes["class"], attributes["style"])
        for tag, attributes in reader.elements
        if tag == "i"
    ]
    assert [each for each, _ in bars] == [
        "stepflow-failed",
        "stepflow-pause",
        "stepflow-completed",
    ]
    assert "width:25.00%" in (bars[0][1] or "")


@pytest.mark.parametrize("count", [100, 10_000])
def test_a_batch_is_a_summary(count: int) -> None:
    timeline = batch(count)
    told = text_of(timeline)
    assert f"{count:,}: " in told and "failed" in told
    assert "Median" in told
    assert len(timeline._repr_html_()) < 60_000


def huge(depth: int = 0) -> Timeline:
    """More of everything than a notebook should keep."""
    one = one_step(
        output="<" * 50_000, error=FlowError(code="&" * 999, message="&" * 99_999)
    )
    steps = tuple(one.steps[0] for _ in range(200))
    attempts = steps[0].attempts * 2_000
    many = msgspec.structs.replace(steps[0], attempts=attempts)
    flow = {"steps": [{"id": f"s{n}", "component": "/x"} for n in range(500)]}
    return msgspec.structs.replace(
        one,
        steps=(*steps, many),
        graph=Graph.of(flow),
        notes=("&" * 999_999,),
        sub_runs=() if depth else (huge(1),) * 50,
    )


def test_what_is_too_much_is_left_out_and_said() -> None:
    long = FlowResult(status=FlowStatus.SUCCESS, run_id="r", output="&" * 3_000_000)
    assert "the first of 3,000,002 characters" in text_of(long)
    assert len(long._repr_html_()) < 60_000
    assert "And more, which is too much for a notebook" in text_of(huge())
    larger = FlowResult(status=FlowStatus.SUCCESS, run_id="r", output="&" * 9_000_000)
    assert "Output left out (9,000,002 bytes)" in text_of(larger)
    graph = Graph.of(
        {"steps": [{"id": f"s{n}", "component": "/x"} for n in range(500)]}
    )
    assert "500 steps: too many to be drawn in a notebook" in text_of(graph)


def test_what_no_server_gives_is_shown_all_the_same() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    loop: list[Any] = []
    loop.append(loop)
    for output in (deep, loop, object(), "\ud800", {"\udfff": float("nan")}, {1, 2}):
        shown(FlowResult(status=FlowStatus.SUCCESS, run_id="\ud800", output=output))


def test_what_is_a_secret_by_its_name_is_starred_as_in_the_repr() -> None:
    output = {"said": "it is sk-0123456", "api_key": "sk-0123456"}
    error = FlowError(code="X", message="cannot reach http://me:hunter22@host/")
    for value in (
        FlowResult(status=FlowStatus.SUCCESS, run_id="r", output=output),
        FlowResult(status=FlowStatus.FAILED, run_id="r", output=output, error=error),
        error,
    ):
        assert "sk-0" not in value._repr_html_() + repr(value)
        assert "hunter22" not in value._repr_html_() + repr(value)


def test_states_are_told_by_marks_and_colours_that_light_and_dark_can_bear() -> None:
    """Text of these colours is to be read on white as on black: 3.5 to 1, at the least."""
    colours = set(re.findall(r"--\w+:(#[0-9a-f]{6});", notebook._STYLE))
    assert len(colours) > 4
    for colour in colours:
        for ground in ("#ffffff", "#111111"):
            lighter, darker = sorted(map(luminance, (colour, ground)), reverse=True)
            assert (lighter + 0.05) / (darker + 0.05) > 3.5, colour
    for state in StepState:
        assert state.mark.strip()


def luminance(colour: str) -> float:
    """As the guidelines for accessible web content (WCAG) have it."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (
        each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4
        for each in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_what_makes_html_is_imported_when_it_is_wanted() -> None:
    code = (
        "import sys, stepflow_runtime.executor, stepflow_runtime.timeline\n"
        "wanted = ('notebook', 'page', 'drawing', 'server', 'reprs')\n"
        "print([n for n in wanted if f'stepflow_runtime.{n}' in sys.modules])"
    )
    assert python("-c", code).stdout == "['reprs']\n"
