"""Workflow files of somebody who means harm: an error of ours, soon, and little memory."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import anyio
import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflow_runtime import (
    FlowDefinitionError,
    FlowNotFoundError,
    FlowSyntaxError,
    ServerStartError,
    StepflowRuntime,
)
from stepflow_runtime.bounded import (
    LARGEST_FILE,
    MOST_ALIASED,
    MOST_LEVELS,
    MOST_VALUES,
    read_file,
)
from stepflow_runtime.core_yaml import YamlSyntaxError, parse
from stepflow_runtime.flows import load
from stepflow_runtime.server.options import ServerOptions

from .conftest import ECHO, each_backend
from .weigh import Load

# -- what it costs ---------------------------------------------------------------------

EMOJI = "😀".encode()  # from it on, Python needs four bytes for each character
FULL = LARGEST_FILE - 100


def lines(line: str, count: int) -> bytes:
    return "".join(line.format(i, i - 1) for i in range(1, count)).encode()


# By name: the file's content, and what the error says of it.
REFUSED: dict[str, tuple[bytes, str]] = {
    "aliases.yaml": (
        b"a0: &a0 [x, x]\n" + lines("a{0}: &a{0} [*a{1}, *a{1}]\n", 60),
        "too much: more than 250000 values",
    ),
    "alias keys.yaml": (
        b"a0: &a0 {x: y}\n" + lines("a{0}: &a{0} {{x: *a{1}, y: *a{1}}}\n", 60),
        "too much: more than 250000 values",
    ),
    "alias texts.yaml": (
        b"a: &a " + b"x" * 100_000 + b"\nb: [" + b"*a," * 100_000 + b"]",
        "too much: aliases stand for more than 1048576 characters",
    ),
    "endless.yaml": (b"a: &a [*a]", "1:8: this alias stands for what it is in"),
    "deep flow.yaml": (b"[" * 900, "1:126: nested too deeply"),
    # Here libyaml may be before us: since 0.2.6 it has a limit of its own, of 1000.
    "deeper flow.yaml": (b"[" * 10_000, "nest"),
    "deep block.yaml": (b"- " * 1_000_000, "1:251: nested too deeply"),
    "deep keys.yaml": (b"? " * 1_000_000, "a key must be a string"),
    "deep maps.yaml": (b"{a: " * 1_000_000, "nested too deeply"),
    "indented.yaml": (
        b"".join(b" " * i + b"a:\n" for i in range(3000)),
        "nested too deeply",
    ),
    "lists.yaml": (b"[" + b"[]," * 2_000_000, "too much"),
    "anchors.yaml": (lines("- &a{0} x\n", 400_000), "too much"),
    "directives.yaml": (lines("%TAG !{0}! b\n", 300_000) + b"--- a", "100 %TAG"),
    "directives.utf16.yaml": (
        (lines("%TAG !{0}! b\n", 100_000) + b"--- a").decode().encode("utf-16"),
        "100 %TAG",
    ),
    "documents.yaml": (b"---\n" * 1_000_000, "another document"),
    "tag.yaml": (
        b"a: !!python/object/apply:os.system [exit 3]",
        "1:4: the tag !!python/object/apply:os.system is not known",
    ),
    "long tag.yaml": (b"!" + b"a" * FULL + b" x", "is not known here"),
    "twice.yaml": (b"a: 1\n" * 1_000_000, "2:1: the key 'a' stands twice"),
    "long key.yaml": (b"? " + b"a" * FULL + b"\n: 1\n? []", "a key must be a string"),
    "integer.yaml": (b"a: " + b"1" * FULL, "more than 640 digits"),
    "hexadecimal.yaml": (
        b"? 0x" + b"f" * FULL + b"\n: 1",
        "a key must be a string, found a long integer",
    ),
    "nearly a number.yaml": (b"1." + b"1" * FULL + b"x", "holds a string"),
    "binary.yaml": (random.Random(8).randbytes(FULL), "unacceptable character"),
    "zeros.yaml": (bytes(FULL), "not allowed"),
    "deep.json": (b"[" * FULL, "1:126: nested too deeply"),
    "lists.json": (b"[" + b"[]," * (FULL // 3) + b"1]", "too much"),
    "open.json": (b'{"a": "' + b'\\"' * (FULL // 2), "Unterminated string"),
    "integer.json": (b'{"a": ' + b"1" * FULL + b"}", "digits"),
    "twice.json": (
        b'{"a": 1, "' + b"b" * 1_000_000 + b'": 1, "' + b"b" * 1_000_000 + b'": 2}',
        "bbb' stands twice",
    ),
    "surrogate.json": (b'{"a": "\\ud800"}', "lone surrogate"),
    "binary.json": (random.Random(8).randbytes(FULL), "not UTF-8"),
}
# As large as they may be, of what takes most memory.
LOADED = {
    "text.yaml": b"a: " + EMOJI + b"a" * FULL,
    "mappings.yaml": b"a: [" + b"{a: 1}," * 80_000 + b"]\nb: " + EMOJI + b"a" * 5_000_000,
    "anchors of lists.yaml": b"a:\n" + lines("- &aaaaaaaaaaaaaaaaaaaaaaaa{0} [x]\n", 99_999),
    "tags.yaml": lines("%TAG !{0}! b\n", 99) + b"---\na:\n" + b"- !!str x\n" * 240_000,
    "text.json": b'{"a": "' + EMOJI + b"a" * FULL + b'"}',
    "objects.json": b'{"a": ['
    + b'{"a":1},' * 80_000
    + b'1], "b": "'
    + EMOJI
    + b"a" * 5_000_000
    + b'"}',
}  # fmt: skip


@pytest.fixture
def no_files(tmp_path: Path) -> Iterator[dict[str, str]]:
    """What is there under a name, but no file; and what the error says of it."""
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    (tmp_path / "link.yaml").symlink_to("/dev/zero")
    with open(tmp_path / "large.yaml", "wb") as large:
        large.truncate(100 * 2**20)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket.yaml"))
        yield {
            "pipe.yaml": "Is a pipe",
            "loop.yaml": "Too many levels of symbolic links",
            "link.yaml": "Is a device",
            "/dev/zero": "Is a device",
            "socket.yaml": "Is a socket",
            "large.yaml": f"Is 104857600 bytes long, and at most {LARGEST_FILE} are read",
            ".": "Is a directory",
        }


def test_what_is_hostile_is_refused_in_a_second_and_100_megabytes(
    tmp_path: Path, no_files: dict[str, str]
) -> None:
    contents = {name: content for name, (content, _) in REFUSED.items()} | LOADED
    for name, content in contents.items():
        assert len(content) <= LARGEST_FILE
        (tmp_path / name).write_bytes(content)
    words = {name: words for name, (_, words) in REFUSED.items()} | no_files
    names = [*words, *LOADED]
    answer = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.weigh",
            *(str(tmp_path / name) for name in names),
        ],
        cwd=Path(__file__).parent.parent,
        check=True,
        stdout=subprocess.PIPE,
        timeout=240,
    ).stdout
    loads = dict(zip(names, msgspec.json.decode(answer, type=list[Load]), strict=True))
    assert {name for name in names if loads[name].outcome == "loaded"} == set(LOADED)
    for name in no_files:
        assert loads[name].outcome == "FlowNotFoundError"
    for name in REFUSED:
        assert loads[name].outcome in ("FlowSyntaxError", "InvalidFlowError")
    for name, expected in words.items():
        assert expected in loads[name].message
        assert len(loads[name].message) < 1000
    # A second, on a machine that does nothing else.
    assert {name: load for name, load in loads.items() if load.seconds > 3} == {}
    assert {name: load for name, load in loads.items() if load.megabytes > 100} == {}


# -- where the limits are --------------------------------------------------------------


def nested(levels: int) -> tuple[str, str]:
    inner = levels - 1
    return f"a: {'[' * inner}{']' * inner}", f'{{"a": {"[" * inner}{"]" * inner}}}'


def with_values(count: int) -> tuple[str, str]:
    items = ",".join(
        ["12345"] * (count - 3)
    )  # beside the mapping, the key and the list
    return f"a: [{items}]", f'{{"a": [{items}]}}'


@pytest.mark.parametrize(
    ("document", "most", "words"),
    [
        (nested, MOST_LEVELS, "nested too deeply|is inside of 125 containers"),
        (with_values, MOST_VALUES, "too much: more than 250000 values"),
        (
            lambda count: (f"a: &a {'x' * count}\nb: *a",),
            MOST_ALIASED,
            "too much: aliases stand for more than 1048576 characters",
        ),
    ],
)
def test_what_is_within_the_limits_is_read(
    tmp_path: Path, document: Callable[[int], tuple[str, ...]], most: int, words: str
) -> None:
    for text, suffix in zip(document(most), ("yaml", "json"), strict=False):
        path = tmp_path / f"flow.{suffix}"
        path.write_text(text)
        assert json.loads(load(path).encoded)
    for text, suffix in zip(document(most + 1), ("yaml", "json"), strict=False):
        path = tmp_path / f"flow.{suffix}"
        path.write_text(text)
        with pytest.raises(FlowDefinitionError, match=words):
            load(path)


def test_an_alias_is_the_object_that_it_stands_for() -> None:
    # So a file's memory is that of its text, however large its document is as JSON.
    document = parse(b"a: &a {b: &b [1]}\nc: [*a, *b]\nd: *b")
    assert document == {"a": {"b": [1]}, "c": [{"b": [1]}, [1]], "d": [1]}
    assert document["c"][0] is document["a"]
    assert document["d"] is document["c"][1] is document["a"]["b"]


def test_python_may_be_told_to_go_deep_and_to_convert_long_integers() -> None:
    # In a process of its own: it would crash, or take minutes.
    program = """
import sys
from stepflow_runtime import FlowSyntaxError
from stepflow_runtime.flows import parse
sys.setrecursionlimit(1_000_000)
sys.set_int_max_str_digits(0)
for text in (b"[" * 1_000_000, b'{"a": ' + b"1" * 5_000_000 + b"}", b"1" * 5_000_000):
    for name in ("f.json", "f.yaml"):
        try:
            parse(text, name)
        except FlowSyntaxError as error:
            print(str(error)[:60])
"""
    said = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    ).stdout
    assert len(re.findall("nested too deeply|exceeded maximum nesting", said)) == 2
    assert said.count("an integer of more than 640 digits") == 4


# -- what is read ----------------------------------------------------------------------


def test_a_file_without_a_size_is_read_up_to_the_limit() -> None:
    path = Path("/proc/filesystems")
    assert path.stat().st_size == 0
    content = path.read_bytes()
    assert read_file(path) == content
    assert read_file(path, len(content)) == content
    with pytest.raises(OSError, match="Is more than 50 bytes long"):
        read_file(path, 50)


@pytest.mark.parametrize(
    ("make", "words"), [(os.mkfifo, "Is a pipe"), (os.mkdir, "Is a directory")]
)
def test_what_takes_a_files_place_is_not_waited_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], None],
    words: str,
) -> None:
    path = tmp_path / "flow.yaml"
    path.write_text("{}")
    stat = os.stat

    def stat_and_replace(name: Path) -> os.stat_result:
        status = stat(name)
        path.unlink()
        make(path)
        return status

    with monkeypatch.context() as patched:
        patched.setattr("stepflow_runtime.bounded.os.stat", stat_and_replace)
        with pytest.raises(OSError, match=words):
            read_file(path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, "Is a pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "Is a device"),
        (lambda path: path.write_bytes(bytes(LARGEST_FILE + 1)), "at most"),
        (lambda path: path.write_bytes(b"- " * 100_000), "nested too deeply"),
    ],
)
def test_configuration_files_are_read_with_the_same_care(
    tmp_path: Path, make: Callable[[Path], None], words: str
) -> None:
    path = tmp_path / "config.yml"
    make(path)
    options = ServerOptions(config_path=path, storage=tmp_path / "runs.db")
    with pytest.raises(ServerStartError, match=words):
        options.anchored()


def test_a_configuration_files_name_may_be_impossible(tmp_path: Path) -> None:
    options = ServerOptions(config_path="a\0b", storage=tmp_path / "runs.db")
    with pytest.raises(ServerStartError, match="embedded null"):
        options.anchored()


# -- YAML, as before -------------------------------------------------------------------


class _Reference(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The core schema as PyYAML has such things done: by nodes, and recursively."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}
    yaml_constructors: ClassVar[dict[str | None, Any]] = {}


_FLOAT = (
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
PREFIX = "tag:yaml.org,2002:"
KINDS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "null": ("~|null|Null|NULL|", lambda text: None),
    "bool": ("true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "int": (
        "[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
        lambda text: int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)),
    ),
    "float": (
        _FLOAT,
        float,  # which fails for those of the second line
    ),
    "str": ("(?s:.*)", str),
}


def _construct(loader: Any, node: yaml.Node) -> Any:
    def build(inner: yaml.Node) -> Any:
        return loader.construct_object(inner, deep=True)

    kind = node.tag.removeprefix(PREFIX)
    if isinstance(node, yaml.MappingNode) and kind == "map":
        pairs = [(build(key), build(value)) for key, value in node.value]
        if all(type(key) is str for key, _ in pairs) and len(dict(pairs)) == len(pairs):
            return dict(pairs)
    elif isinstance(node, yaml.SequenceNode) and kind == "seq":
        return [build(each) for each in node.value]
    elif isinstance(node, yaml.ScalarNode) and kind in KINDS:
        pattern, convert = KINDS[kind]
        if re.fullmatch(pattern, node.value):
            return convert(node.value)
    raise ValueError(node)


_Reference.add_constructor(None, _construct)
for _kind, (_pattern, _) in KINDS.items():
    if _kind != "str":  # which is what nothing else matches
        _Reference.add_implicit_resolver(
            PREFIX + _kind, re.compile(rf"(?:{_pattern})\Z"), None
        )

_PIECES = (
    *("- ", ": ", "? ", "\n", "\n", "  ", " ", "[", "]", "{", "}", ",", "#", "---\n"),
    *("...\n", "&a ", "&b ", "*a ", "*b ", "!", "!!", "!!str ", "!!int ", "!!float "),
    *("!!null ", "!!bool ", "!!map ", "!!seq ", "!!set ", "%TAG ! x\n", "%YAML 1.2\n"),
    *("|\n", ">-\n", "'", '"', "\\", "a", "b", "key", "<<", "~", "null", "true", "0"),
    *("12", "0x1F", "0o7", "-", "+", ".5", "1e3", ".inf", "1:30", "\t", "\r", "\ufeff"),
    *("é", "😀", "\x85", "\u2028", "\0"),
)
_SCALARS = st.sampled_from(
    ["", "a", "1", "-1.5", "no", "~", "on\noff", "é", "<<", "1e5"]
)
_DOCUMENTS = st.builds(
    yaml.safe_dump,
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | _SCALARS,
        lambda inner: st.lists(inner) | st.dictionaries(_SCALARS, inner),
        max_leaves=20,
    ).flatmap(lambda shared: st.sampled_from([shared, [shared, {"x": shared}]])),
    default_flow_style=st.sampled_from([None, True, False]),
    default_style=st.sampled_from([None, '"', "'", "|", ">"]),
)


@given(
    st.lists(st.sampled_from(_PIECES)).map(lambda pieces: "".join(pieces).encode())
    | _DOCUMENTS.map(lambda text: str(text).encode())
    | st.binary()
)
@settings(max_examples=300)
def test_what_pyyaml_composes_is_what_is_built(text: bytes) -> None:
    try:
        expected = repr(yaml.load(text, Loader=_Reference))
    except (yaml.YAMLError, ValueError):
        with pytest.raises(YamlSyntaxError):
            parse(text)
    else:
        assert repr(parse(text)) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("!!map [a]", "the tag !!map does not fit a list"),
        ("!!seq {a: b}", "the tag !!seq does not fit a mapping"),
        ("!!str [a]", "the tag !!str does not fit a list"),
        ("!!bool maybe", "the tag !!bool does not fit 'maybe'"),
        ("!!null 0", "the tag !!null does not fit '0'"),
        ("!!int 1_000", "the tag !!int does not fit '1_000'"),
        ("!!float 0x10", "the tag !!float does not fit '0x10'"),
        ("!!float .nan", "JSON cannot carry"),
        ("[&a x, &a y]", "the anchor 'a' stands twice"),
        ("{[a]: 1}", "a key must be a string, found a list"),
    ],
)
def test_a_tag_has_to_fit(text: str, words: str) -> None:
    with pytest.raises(YamlSyntaxError, match=re.escape(words)) as caught:
        parse(f"v: {text}".encode())
    assert caught.value.line == 1
    assert caught.value.column is not None


# -- by the real server ----------------------------------------------------------------


@pytest.mark.anyio
@each_backend
async def test_a_runtime_takes_no_harm(
    tmp_path: Path, no_files: dict[str, str]
) -> None:
    bomb = tmp_path / "bomb.yaml"
    bomb.write_bytes(REFUSED["aliases.yaml"][0])
    flow = tmp_path / "flow.yaml"
    with anyio.fail_after(30):
        async with StepflowRuntime.start() as runtime:
            for name, words in no_files.items():
                for call in (runtime.run, runtime.validate):
                    with pytest.raises(FlowNotFoundError, match=words):
                        await call(tmp_path / name)
            for call in (runtime.run, runtime.validate):
                with pytest.raises(FlowSyntaxError, match="too much"):
                    await call(bomb)
            # A file that was read is known by its state, and a pipe in its place is not it.
            flow.write_text(json.dumps(ECHO))
            assert (await runtime.run(flow, 1)).unwrap() == 1
            flow.unlink()
            os.mkfifo(flow)
            with pytest.raises(FlowNotFoundError, match="Is a pipe"):
                await runtime.run(flow, 2)
            flow.unlink()
            flow.write_text(json.dumps(ECHO))
            assert (await runtime.run(flow, 3)).unwrap() == 3
