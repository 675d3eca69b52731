"""Where the parts of a workflow's text stand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from stepflow_runtime.places import places, segments

KEYS = st.text(max_size=6)
DOCUMENTS = st.dictionaries(
    KEYS,
    st.recursive(
        st.none() | st.booleans() | st.integers(0, 99) | KEYS,
        lambda each: (
            st.lists(each, max_size=3) | st.dictionaries(KEYS, each, max_size=3)
        ),
        max_leaves=12,
    ),
    max_size=4,
)


def paths_of(value: Any, path: str = "$") -> list[tuple[str, Any]]:
    """Each part of a document, by the path that the server would name it by."""
    found = [(path, value)]
    if isinstance(value, dict):
        for key, each in value.items():
            found += paths_of(each, f"{path}[{json.dumps(key)}]")
    if isinstance(value, list):
        for index, each in enumerate(value):
            found += paths_of(each, f"{path}[{index}]")
    return found


@given(DOCUMENTS, st.sampled_from([None, 1]))
def test_at_each_place_in_json_the_value_begins(
    document: dict[str, Any], indent: int | None
) -> None:
    text = json.dumps(document, indent=indent)
    lines = text.split("\n")
    named = paths_of(document)
    found = places(text.encode(), "x.json", [path for path, _ in named])
    for (path, value), (line, column) in zip(named, found, strict=True):
        behind = "\n".join([lines[line - 1][column - 1 :], *lines[line:]])
        assert json.JSONDecoder().raw_decode(behind)[0] == value, path


@given(DOCUMENTS, st.booleans())
def test_each_place_in_yaml_is_that_of_its_node(
    document: dict[str, Any], is_flow_style: bool
) -> None:
    text = yaml.safe_dump(document, default_flow_style=is_flow_style)
    named = list(nodes_of(yaml.compose(text, Loader=yaml.SafeLoader)))
    found = places(text.encode(), "x.yaml", [path for path, _ in named])
    assert found == [place for _, place in named]


def nodes_of(node: Any, path: str = "$") -> Iterator[tuple[str, tuple[int, int]]]:
    """The places of PyYAML's own nodes, which it composes by recursion."""
    yield path, (node.start_mark.line + 1, node.start_mark.column + 1)
    if isinstance(node, yaml.MappingNode):
        for key, each in node.value:
            yield from nodes_of(each, f"{path}[{json.dumps(key.value)}]")
    if isinstance(node, yaml.SequenceNode):
        for index, each in enumerate(node.value):
            yield from nodes_of(each, f"{path}[{index}]")


YAML = """\
a: &x
  "b.c": [1, {d: 2}]
e: *x
f:
- - deep
"""


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("$", (1, 1)),
        ("$.a", (1, 4)),
        ('$.a["b.c"][1].d', (2, 18)),
        ("$.a['b", (1, 4)),
        ("$.e", (3, 4)),
        ('$.e["b.c"]', (3, 4)),  # the alias, and not what it stands for
        ("$.f[0][0]", (5, 5)),
        ("$.f[0][7].name", (5, 3)),  # not there: the nearest that is
        ("$.missing", (1, 1)),
    ],
)
def test_a_place_in_yaml(path: str, place: tuple[int, int]) -> None:
    assert places(YAML.encode(), "flow.yaml", ["$.e", path]) == [(3, 4), place]


def test_a_path_that_cannot_be_read_is_read_as_far_as_it_can() -> None:
    assert segments('$.a[0]["x\\"y"].b[oops].c') == ["a", 0, 'x"y', "b"]
    assert segments("") == segments("$") == []


def test_what_is_hostile_takes_no_stack() -> None:
    deep = b"[" * 120 + b"1" + b"]" * 120
    assert places(b'{"a":%s}' % deep, "x.json", ["$.a" + "[0]" * 120]) == [(1, 126)]
    assert places(b"a: %s" % deep, "x", ["$.a" + "[0]" * 120]) == [(1, 124)]
