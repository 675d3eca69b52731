"""Workflows from files and mappings: what is read, and how faults are told."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from stepflow_runtime import (
    FlowDefinitionError,
    FlowNotFoundError,
    FlowSyntaxError,
    InvalidFlowError,
    StepflowRuntime,
)
from stepflow_runtime.flows import load, parse, stat_key, without_retry_limits

from .conftest import EXAMPLES, each_backend

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner)
    ),
    max_leaves=20,
)


def yaml_value(text: str) -> Any:
    return parse(f"v: {text}\n".encode(), "flow.yaml")["v"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("no", "no"),
        ("2024-01-01", "2024-01-01"),
        ("2024-01-01 10:00:00", "2024-01-01 10:00:00"),
        ("012", 12),
        ("0o14", 12),
        ("0xfF", 255),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("-7", -7),
        ("+7", 7),
        ("1.5", 1.5),
        (".5", 0.5),
        ("1e3", 1000.0),
        ("1.", 1.0),
        ("true", True),
        ("False", False),
        ("tRUE", "tRUE"),
        ("null", None),
        ("~", None),
        ("", None),
        ("'null'", "null"),
        ("!!str 5", "5"),
        ("[a, {b: c}]", ["a", {"b": "c"}]),
        ("{<<: {a: 1}}", {"<<": {"a": 1}}),
        ("=", "="),
    ],
)
def test_yaml_is_read_by_its_1_2_core_schema(text: str, value: Any) -> None:
    read = yaml_value(text)
    assert read == value
    assert type(read) is type(value)


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), JSON))
def test_json_files_are_read_as_they_are(document: dict[str, Any]) -> None:
    text = json.dumps(document).encode()
    assert parse(text, "flow.json") == document


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), JSON))
def test_what_yaml_writes_is_read_back(document: dict[str, Any]) -> None:
    # Quoted and tagged: what YAML 1.1 leaves plain can be a number in 1.2 (1e3).
    text = yaml.safe_dump(document, default_style='"').encode()
    assert parse(text, "flow.yaml") == json.loads(json.dumps(document))


@given(st.binary())
@pytest.mark.parametrize("name", ["flow.yaml", "flow.json"])
def test_garbage_is_one_of_our_errors(name: str, text: bytes) -> None:
    try:
        assert isinstance(parse(text, name), dict)
    except FlowDefinitionError as error:
        assert error.source == name


@pytest.mark.parametrize(
    ("name", "text", "place", "words"),
    [
        ("f.yaml", "a: 1\nb: [1,\n", (3, 1), "while parsing a flow"),
        ("f.yaml", "a: 1\na: 2\n", (2, 1), "the key 'a' stands twice"),
        ("f.yaml", "a:\n  1: x\n", (2, 3), "a key must be a string, found 1"),
        ("f.yaml", "a: !!python/object:os.system x\n", (1, 4), "tag"),
        ("f.yaml", "a: .inf\n", (1, 4), "JSON cannot carry"),
        ("f.yaml", "a: *nowhere\n", (1, 4), "undefined alias"),
        ("f.yaml", "a: 1\n---\nb: 2\n", (2, 1), "another document"),
        ("f.json", '{\n"a" 1}', (2, 5), "delimiter"),
        ("f.json", '{"a": NaN}', (None, None), "NaN is not JSON"),
        ("f.json", '{"a": 1, "a": 2}', (None, None), "stands twice"),
        ("f.json", "[" * 100_000, (None, None), ""),
        ("f.yaml", "[" * 10_000, (None, None), ""),
    ],
)
def test_a_syntax_error_tells_the_place(
    name: str, text: str, place: tuple[int | None, int | None], words: str
) -> None:
    with pytest.raises(FlowSyntaxError) as caught:
        parse(text.encode(), name)
    assert words in str(caught.value)
    if place != (None, None):
        assert (caught.value.line, caught.value.column) == place
        assert str(caught.value).startswith(f"{name}:{place[0]}:{place[1]}: ")


def test_bytes_that_are_no_text_are_a_syntax_error() -> None:
    for name in ("f.yaml", "f.json"):
        with pytest.raises(FlowSyntaxError, match=name):
            parse(b"a: \xff\xfe\x00", name)


@pytest.mark.parametrize(
    ("text", "found"),
    [("[1]", "a list"), ("words", "a string"), ("", "nothing"), ("5", "a number")],
)
def test_something_other_than_a_mapping_is_no_workflow(text: str, found: str) -> None:
    with pytest.raises(InvalidFlowError, match=f"holds {found}"):
        parse(text.encode(), "flow.yaml")


def test_a_missing_file_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FlowNotFoundError, match="No such file or directory") as caught:
        load(tmp_path / "nope.yaml")
    assert str(Path.cwd()) in str(caught.value)
    assert caught.value.source == str(tmp_path / "nope.yaml")
    with pytest.raises(FlowNotFoundError, match="Is a directory"):
        load(str(tmp_path))
    with pytest.raises(FlowNotFoundError, match="embedded null"):
        load(Path("a\0b"))
    with pytest.raises(FlowNotFoundError, match="embedded null"):
        stat_key("a\0b")


def test_other_things_are_no_workflow() -> None:
    with pytest.raises(TypeError, match="several lines"):
        load("steps: []\noutput: 1\n")
    with pytest.raises(TypeError, match="not int"):
        load(5)  # type: ignore[arg-type]
    with pytest.raises(InvalidFlowError, match=r"value at \$\.a"):
        load({"a": object()})
    loop: dict[str, Any] = {}
    loop["a"] = loop
    with pytest.raises(InvalidFlowError, match=r"value at \$\.a"):
        load(loop)


def test_only_whole_retry_limits_are_taken_out() -> None:
    def step(limit: Any) -> dict[str, Any]:
        return {"id": "a", "onError": {"action": "retry", "maxRetries": limit}}

    odd = [step("many"), step(-1), step(2**32), step(1.5), step(True), {"id": "c"}, 5]
    encoded = json.dumps({"steps": [step(2), *odd], "output": 1}).encode()
    assert json.loads(without_retry_limits(encoded)) == {
        "steps": [{"id": "a", "onError": {"action": "retry"}}, *odd],
        "output": 1,
    }
    for text in (b"{}", b'{"steps":5,"x":"\\"maxRetries\\""}', b'{"maxRetries":1}'):
        assert json.loads(without_retry_limits(text)) == json.loads(text)


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda p: p.stem)
def test_examples_are_plain_yaml(path: Path) -> None:
    assert json.loads(load(path).encoded) == yaml.safe_load(path.read_text())


def test_any_kind_of_mapping_and_sequence_will_do() -> None:
    flow = MappingProxyType({"steps": (MappingProxyType({"id": "a"}),)})
    assert json.loads(load(flow).encoded) == {"steps": [{"id": "a"}]}


def test_a_missing_file_in_a_missing_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(FlowNotFoundError, match="working directory: gone"):
        load("flow.yaml")


# -- by the real server ----------------------------------------------------------------


@pytest.mark.anyio
@each_backend
@pytest.mark.parametrize(
    ("flow", "words"),
    [
        ({"steps": [{"id": "a"}]}, "missing field `component`"),
        ({"steps": 5}, "expected a sequence"),
        (
            {
                "steps": [
                    {"id": "a", "component": "/noop", "input": {"$step": "nowhere"}},
                    {"id": "a", "component": "/noop"},
                ]
            },
            "$.steps[0].input: fatal: Step 'a' references undefined step 'nowhere'",
        ),
        (
            {
                "steps": [
                    {
                        "id": "a",
                        "component": "/noop",
                        "onError": {"action": "retry", "maxRetries": "many"},
                    }
                ]
            },
            "expected u32",
        ),
    ],
)
async def test_the_server_says_what_is_invalid(
    flow: dict[str, Any], words: str
) -> None:
    async with StepflowRuntime.start() as runtime:
        with pytest.raises(InvalidFlowError) as caught:
            await runtime.run(flow)
    assert words in str(caught.value)
    if "fatal" in words:
        assert {each.level for each in caught.value.diagnostics} >= {"fatal", "warning"}
        assert "undefinedStepReference" in {d.kind for d in caught.value.diagnostics}


@pytest.mark.anyio
@each_backend
async def test_files_that_are_no_workflow(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [")
    (tmp_path / "list.yaml").write_text("- a")
    async with StepflowRuntime.start() as runtime:
        with pytest.raises(FlowNotFoundError):
            await runtime.run(tmp_path / "nope.yaml")
        with pytest.raises(FlowSyntaxError, match=r"bad\.yaml:2:1: "):
            await runtime.run(tmp_path / "bad.yaml")
        with pytest.raises(InvalidFlowError, match="a list"):
            await runtime.run(tmp_path / "list.yaml")


def test_the_interpreter_survives_deep_nesting() -> None:
    assert sys.getrecursionlimit() < 10_000  # or the tests above show nothing
