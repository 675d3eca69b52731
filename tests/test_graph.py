"""A workflow's graph: what it is made of, and that no document is too strange for it."""

from __future__ import annotations

import re
import stat
import time
import xml.etree.ElementTree as ET
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepflow_runtime import Edge, Graph, StepState
from stepflow_runtime.graph import MOST_DRAWN

from .test_command import command

SVG = "{http://www.w3.org/2000/svg}"

INNER = {
    "steps": [{"id": "wait", "component": "/sleep", "input": {"$input": "$"}}],
    "output": {"$step": "wait"},
}
FLOW: dict[str, Any] = {
    "name": "report",
    "steps": [
        {"id": "read", "component": "/python/read", "input": {"$input": "$.url"}},
        {
            "id": "each",
            "component": "/map",
            "input": {"workflow": {"$literal": INNER}, "items": [{"$step": "read"}]},
            "onError": {"action": "retry"},
        },
        {"id": "spare", "component": "/noop", "mustExecute": True, "input": 1},
        {"id": "quote", "component": "/noop", "input": {"$literal": {"$step": "read"}}},
    ],
    "output": {
        "$coalesce": [{"$step": "each"}, {"$step": "read", "path": "$.x"}],
    },
}


def test_the_graph_is_what_the_steps_take_from_each_other() -> None:
    graph = Graph.of(FLOW)
    assert [step.id for step in graph.steps] == ["read", "each", "spare", "quote"]
    assert set(graph.edges) == {
        Edge(None, 0),
        Edge(0, 1),
        Edge(1, None, is_certain=False),
        Edge(0, None, is_certain=False),
    }
    assert (graph.steps[1].on_error, graph.steps[2].must_execute) == ("retry", True)
    (inner,) = graph.steps[1].nested
    assert set(inner.edges) == {Edge(None, 0), Edge(0, None)}
    assert (graph.name, graph.size, graph.is_cut) == ("report", 5, False)


def test_older_expressions_are_read_too() -> None:
    steps = [
        {"id": "a", "component": "/x", "input": {"$from": {"workflow": "input"}}},
        {"id": "b", "component": "/x", "input": {"k": {"$from": {"step": "a"}}}},
    ]
    assert set(Graph.of({"steps": steps}).edges) == {Edge(None, 0), Edge(0, 1)}


def test_the_text_for_mermaid() -> None:
    states = {
        "read": StepState.COMPLETED,
        "each": StepState.FAILED,
        ("each", "wait"): StepState.FAILED,
    }
    lines = Graph.of(FLOW).mermaid(states).splitlines()
    assert lines[:9] == [
        "flowchart TD",
        '  s0["✓ read<br/>/python/read"]:::completed',
        '  subgraph s1["✗ each<br/>/map"]',
        '    s1_0_0["✗ wait<br/>/sleep"]:::failed',
        "    s1_0_in([input])",
        "    s1_0_out([output])",
        "    s1_0_in --> s1_0_0",
        "    s1_0_0 --> s1_0_out",
        "  end",
    ]
    assert "  s0 -.-> sout" in lines
    assert [line.split()[1] for line in lines if "classDef" in line] == [
        "completed",
        "failed",
    ]


def boxes(svg: str) -> dict[str, tuple[float, float, float, float]]:
    """Each step's box, by its title: left, top, right, bottom."""
    found = {}
    for group in ET.fromstring(svg).iter(f"{SVG}g"):
        title, box = group.find(f"{SVG}title"), group.find(f"{SVG}rect")
        if title is not None and box is not None and title.text is not None:
            x, y, w, h = (float(box.attrib[k]) for k in ("x", "y", "width", "height"))
            found[title.text] = (x, y, x + w, y + h)
    return found


def test_in_the_drawing_no_box_lies_upon_another_and_edges_lead_down() -> None:
    steps = [
        {
            "id": f"s{n}",
            "component": "/noop",
            "input": [{"$step": f"s{m}"} for m in range(n) if n % (m + 2) == 0],
        }
        for n in range(40)
    ]
    graph = Graph.of({"steps": steps, "output": {"$step": "s39"}})
    places = boxes(graph.svg())
    assert len(places) == 40
    for one, other in combinations(places.values(), 2):
        apart = one[2] <= other[0] or other[2] <= one[0]
        assert apart or one[3] <= other[1] or other[3] <= one[1]
    for edge in graph.edges:
        if edge.source is not None and edge.target is not None:
            above, below = f"s{edge.source} (/noop)", f"s{edge.target} (/noop)"
            assert places[above][3] < places[below][1]


def test_what_is_nested_is_drawn_inside_and_states_are_told_without_colour() -> None:
    svg = Graph.of(FLOW).svg(
        {"each": StepState.FAILED, ("each", "wait"): StepState.FAILED}
    )
    places = boxes(svg)
    outer, inner = places["each (/map): failed"], places["wait (/sleep): failed"]
    assert outer[0] < inner[0] < inner[2] < outer[2]
    assert outer[1] < inner[1] < inner[3] < outer[3]
    assert "✗" in svg and "prefers-color-scheme:dark" in svg
    assert not re.search(r"(?:href|url\(|<script|@import)", svg)


STEP_LINE = re.compile(
    r"(?:flowchart TD|end|classDef .*|class \w+ \w+|\w+\(\[\w+\]\)|\w+ (?:-->|-\.->) \w+"
    r'|(?:subgraph )?\w+\["[^"\[\]`\n]*"\](?::::\w+)?)'
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["a", "b"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["id", "steps", "$step", "$from", "input", "$if", "component"]
            )
            | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
STEPS = st.lists(
    st.fixed_dictionaries(
        {"id": st.sampled_from(["a", "b"]) | st.text(), "component": st.text()},
        optional={"input": VALUES, "onError": VALUES, "mustExecute": VALUES},
    )
    | VALUES,
    max_size=6,
)


@given(st.fixed_dictionaries({}, optional={"steps": STEPS | VALUES, "output": VALUES}))
def test_any_document_has_a_graph_and_no_name_breaks_out(flow: dict[str, Any]) -> None:
    graph = Graph.of(flow)
    states = {step.id: StepState.RUNNING for step in graph.steps}
    root = ET.fromstring(graph.svg(states))
    assert {each.tag.removeprefix(SVG) for each in root.iter()} <= {
        *("svg", "g", "title", "style", "rect", "path", "text")
    }
    assert all(name in ATTRIBUTES for each in root.iter() for name in each.attrib)
    for line in graph.mermaid(states).split("\n"):
        assert STEP_LINE.fullmatch(line.strip()), line


ATTRIBUTES = {
    *("class", "role", "width", "height", "viewBox", "x", "y", "rx", "d", "text-anchor")
}


def chain(count: int) -> dict[str, Any]:
    return {
        "steps": [
            {"id": f"s{n}", "component": "/x", "input": {"$step": f"s{n - 1}"}}
            for n in range(count)
        ]
    }


def test_what_is_too_big_or_runs_in_circles_is_told_so_and_soon() -> None:
    began = time.monotonic()
    assert Graph.of(chain(MOST_DRAWN)).is_drawable
    many = Graph.of(chain(10_000))
    assert "10000 steps, too many to be drawn" in many.svg()
    assert len(many.svg()) < 100_000
    assert many.mermaid().count("\n") == 1
    circle = chain(300)
    circle["steps"][0]["input"] = {"$step": "s299"}
    assert len(boxes(Graph.of(circle).svg())) == 300
    endless: dict[str, Any] = {"steps": [{"id": "a", "component": "/x"}]}
    endless["steps"][0]["input"] = endless
    graph = Graph.of(endless)
    assert graph.is_cut and graph.size < 10
    wide = {"id": "w", "component": "/x", "input": [1] * 400_000}
    assert Graph.of({"steps": [wide] * 5}).is_cut
    assert time.monotonic() - began < 20


def test_the_command_draws_a_workflow(tmp_path: Path) -> None:
    flow = tmp_path / "flow.yaml"
    flow.write_text(
        'steps: [{id: "a\\u001b[2J", component: /noop, input: {$input: $}}]\n'
    )
    done = command("visualize", str(flow))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(
        'flowchart TD\n  s0["a\N{REPLACEMENT CHARACTER}#91;2J<br/>'
    )
    drawing = tmp_path / "flow.svg"
    done = command("visualize", str(flow), "--format", "svg", "--output", str(drawing))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(boxes(drawing.read_text(encoding="utf-8"))) == 1
    assert stat.S_IMODE(drawing.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("text", "told"),
    [("steps: [", "flow.yaml:2:1: "), ("[]", "a workflow is a mapping")],
)
def test_the_command_tells_what_is_wrong(tmp_path: Path, text: str, told: str) -> None:
    flow = tmp_path / "flow.yaml"
    flow.write_text(text)
    done = command("visualize", str(flow))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and told in done.stderr
