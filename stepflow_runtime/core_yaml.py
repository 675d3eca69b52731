"""YAML 1.2's core schema, as the server reads it.

A leaf. Contract: ``on``, ``no`` and dates are strings, there are no merge keys, no tags but
the core schema's, and a key that stands twice, or that is no string, is an error. Imported
where a file is read: PyYAML takes some milliseconds to come.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, NoReturn

import yaml

__all__ = ["YamlSyntaxError", "parse"]


class YamlSyntaxError(Exception):
    """What is wrong, and where.

    :ivar line: from 1; None if that is not known
    :ivar column: from 1, likewise
    """

    def __init__(
        self, problem: str, line: int | None = None, column: int | None = None
    ) -> None:
        super().__init__(problem)
        self.line = line
        self.column = column


def parse(text: bytes) -> Any:
    """Parse one document.

    :raises YamlSyntaxError: if it is not well-formed; its cause is PyYAML's own error
    """
    try:
        return yaml.load(text, Loader=_CoreSchemaLoader)
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        problem = ", ".join(filter(None, (exc.problem, exc.context))) or "not YAML"
        if mark is None:
            raise YamlSyntaxError(problem) from exc
        raise YamlSyntaxError(problem, mark.line + 1, mark.column + 1) from exc
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as exc:
        raise YamlSyntaxError(str(exc).replace("\n", " ")) from exc
    except RecursionError as exc:
        raise YamlSyntaxError("nested too deeply") from exc


class _CoreSchemaLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """PyYAML's safe loader with YAML 1.2's core schema in place of YAML 1.1."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}
    yaml_constructors: ClassVar[dict[str | None, Any]] = {}


_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_CORE_SCHEMA = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", "~nN\0"),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", _INT.pattern, "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        _FLOAT.pattern + r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
)


def _construct_mapping(loader: Any, node: yaml.MappingNode) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"a key must be a string, found {key!r}",
                key_node.start_mark,
            )
        if key in mapping:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} stands twice", key_node.start_mark
            )
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


def _construct_sequence(loader: Any, node: yaml.SequenceNode) -> list[Any]:
    return [loader.construct_object(child, deep=True) for child in node.value]


def _construct_int(loader: Any, node: yaml.ScalarNode) -> int:
    text: str = node.value
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text[2:] if base != 10 else text, base)


def _construct_float(loader: Any, node: yaml.ScalarNode) -> float:
    text: str = node.value
    if _FLOAT.fullmatch(text):
        return float(text)
    raise yaml.constructor.ConstructorError(
        None, None, f"{text} is a number that JSON cannot carry", node.start_mark
    )


def _construct_bool(loader: Any, node: yaml.ScalarNode) -> bool:
    return bool(node.value.lower() == "true")


def _refuse_tag(loader: Any, node: yaml.Node) -> NoReturn:
    raise yaml.constructor.ConstructorError(
        None, None, f"the tag {node.tag} is not known here", node.start_mark
    )


def _set_up_loader() -> None:
    for tag, pattern, first in _CORE_SCHEMA:
        _CoreSchemaLoader.add_implicit_resolver(
            tag,
            re.compile(rf"(?:{pattern})\Z"),
            ["" if c == "\0" else c for c in first],
        )
    add = _CoreSchemaLoader.add_constructor
    add("tag:yaml.org,2002:map", _construct_mapping)
    add("tag:yaml.org,2002:seq", _construct_sequence)
    add("tag:yaml.org,2002:str", lambda loader, node: node.value)
    add("tag:yaml.org,2002:null", lambda loader, node: None)
    add("tag:yaml.org,2002:bool", _construct_bool)
    add("tag:yaml.org,2002:int", _construct_int)
    add("tag:yaml.org,2002:float", _construct_float)
    add(None, _refuse_tag)


_set_up_loader()
