"""YAML 1.2's core schema, as the server reads it.

Contract: ``on``, ``no`` and dates are strings, there are no merge keys, no tags but
the core schema's, and a key that stands twice, or that is no string, is an error. Imported
where a file is read: PyYAML takes some milliseconds to come.

The text may be hostile. So nothing here recurses over what it says, and what is too deep,
too much, or would be too much once its aliases are replaced by what they stand for, is
refused where it begins, before the rest is looked at.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple, NoReturn

import yaml

from .bounded import MOST_ALIASED, MOST_DIGITS, MOST_LEVELS, MOST_VALUES

__all__ = ["YamlSyntaxError", "marks", "parse"]

# For each tag libyaml compares all of these, and it reads them before we hear of any.
_MOST_DIRECTIVES = 100
_DIRECTIVE = re.compile(rb"(?:^|[\r\n]|\xc2\x85|\xe2\x80[\xa8\xa9])%TAG\b")

_SHOWN = 60


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

    Where the text has an alias, the result has the very object that the alias stands for.

    :raises YamlSyntaxError: if it is not well-formed, or beyond the limits; its cause is
        PyYAML's own error, if there is one
    """
    try:
        return _Builder(_in_utf_8(text)).document()
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        problem = ", ".join(filter(None, (exc.problem, exc.context))) or "not YAML"
        if mark is None:
            raise YamlSyntaxError(problem) from exc
        raise YamlSyntaxError(problem, mark.line + 1, mark.column + 1) from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise YamlSyntaxError(str(exc).replace("\n", " ")) from exc


def marks(text: bytes) -> Iterator[tuple[str, str | None, tuple[int, int]]]:
    """Where things stand in a text that :func:`parse` takes.

    :return: in the order of the text ``"map"`` and ``"list"``, which an ``"end"`` follows, and
        ``"value"``, with its text; an alias is a value. Each with its line and column, from 1
    """
    next_event = _EventSource(_in_utf_8(text)).get_event
    while type(event := next_event()) is not yaml.StreamEndEvent:
        kind = _MARKED.get(type(event))
        if kind is not None:
            mark = event.start_mark
            yield kind, getattr(event, "value", None), (mark.line + 1, mark.column + 1)


_MARKED: Final = {
    yaml.ScalarEvent: "value",
    yaml.AliasEvent: "value",
    yaml.MappingStartEvent: "map",
    yaml.SequenceStartEvent: "list",
    yaml.MappingEndEvent: "end",
    yaml.SequenceEndEvent: "end",
}


def _in_utf_8(text: bytes) -> bytes:
    if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = text.decode("utf-16").encode()
    # The first look is cheap, and nearly always enough.
    if (
        text.count(b"%TAG") > _MOST_DIRECTIVES
        and len(_DIRECTIVE.findall(text)) > _MOST_DIRECTIVES
    ):
        raise YamlSyntaxError(f"more than {_MOST_DIRECTIVES} %TAG directives")
    return text


# -- from events to values -------------------------------------------------------------

# Without libyaml the same events come from Python's code: within the same memory, but some
# ten times as slow.
_EventSource: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _NoKey:
    """In place of a key that is still to come."""


class _Anchored(NamedTuple):
    """What an anchor stands for, and how much it is with its own aliases replaced."""

    value: Any
    values: int
    characters: int


class _Level:
    """A container that is being filled.

    :ivar anchor: its name, or None
    :ivar values: how many there were before it
    :ivar characters: likewise
    """

    __slots__ = ("anchor", "characters", "container", "key", "values")

    def __init__(
        self, container: Any, anchor: str | None, values: int, characters: int
    ) -> None:
        self.container = container
        self.key: Any = _NoKey
        self.anchor = anchor
        self.values = values
        self.characters = characters


class _Builder:
    """Builds one document from the events of its text."""

    def __init__(self, text: bytes) -> None:
        self._source = _EventSource(text)
        self._levels: list[_Level] = []
        self._anchored: dict[str, _Anchored | None] = {}
        self._values = 0
        self._characters = 0
        self._aliased = 0

    def document(self) -> Any:
        next_event = self._source.get_event
        next_event()  # the start of the stream
        if type(next_event()) is yaml.StreamEndEvent:
            return None
        value = self._root(next_event)
        next_event()  # the document's end
        if type(event := next_event()) is not yaml.StreamEndEvent:
            _refuse(event, "another document begins here, and a file holds one")
        return value

    def _root(self, next_event: Callable[[], Any]) -> Any:
        levels = self._levels
        while True:
            event = next_event()
            kind = type(event)
            if kind is yaml.ScalarEvent:
                value = self._scalar(event)
            elif kind is yaml.MappingStartEvent:
                self._descend(event, {}, "map")
                continue
            elif kind is yaml.SequenceStartEvent:
                self._descend(event, [], "seq")
                continue
            elif kind is yaml.AliasEvent:
                value = self._alias(event)
            else:
                value = self._ascend()
            if not levels:
                return value
            level = levels[-1]
            if type(level.container) is list:
                level.container.append(value)
            elif level.key is _NoKey:
                level.key = _checked_key(event, value, level.container)
            else:
                level.container[level.key] = value
                level.key = _NoKey

    def _scalar(self, event: yaml.ScalarEvent) -> Any:
        text = event.value
        value = _value(event, text)
        if event.anchor is not None:
            self._define(event, _Anchored(value, 1, len(text)))
        self._count(event, 1, len(text))
        return value

    def _descend(self, event: Any, container: Any, kind: str) -> None:
        levels = self._levels
        if len(levels) == MOST_LEVELS:
            _refuse(event, f"nested too deeply: inside more than {MOST_LEVELS} levels")
        if levels and levels[-1].key is _NoKey and type(levels[-1].container) is dict:
            _refuse(event, f"a key must be a string, found a {_NAMES[kind]}")
        if event.tag not in (None, "!", _PREFIX + kind):
            _refuse_tag(event, f"a {_NAMES[kind]}")
        if event.anchor is not None:
            self._define(event, None)
        levels.append(_Level(container, event.anchor, self._values, self._characters))
        self._count(event, 1, 0)

    def _ascend(self) -> Any:
        level = self._levels.pop()
        if level.anchor is not None:
            self._anchored[level.anchor] = _Anchored(
                level.container,
                self._values - level.values,
                self._characters - level.characters,
            )
        return level.container

    def _define(self, event: Any, anchored: _Anchored | None) -> None:
        if event.anchor in self._anchored:
            _refuse(event, f"the anchor {_shown(event.anchor)} stands twice")
        self._anchored[event.anchor] = anchored

    def _alias(self, event: yaml.AliasEvent) -> Any:
        if event.anchor not in self._anchored:
            _refuse(event, f"undefined alias {_shown(event.anchor)}")
        anchored = self._anchored[event.anchor]
        if anchored is None:
            _refuse(event, "this alias stands for what it is in, and has no end")
        self._count(event, anchored.values, anchored.characters)
        self._aliased += anchored.characters
        if self._aliased > MOST_ALIASED:
            _refuse(
                event,
                f"too much: aliases stand for more than {MOST_ALIASED} characters",
            )
        return anchored.value

    def _count(self, event: Any, values: int, characters: int) -> None:
        self._values += values
        self._characters += characters
        if self._values > MOST_VALUES:
            _refuse(
                event,
                f"too much: more than {MOST_VALUES} values, with aliases counted as what "
                "they stand for",
            )


def _checked_key(event: Any, key: Any, mapping: dict[str, Any]) -> str:
    if type(key) is not str:
        _refuse(event, f"a key must be a string, found {_shown(key)}")
    if key in mapping:
        _refuse(event, f"the key {_shown(key)} stands twice")
    return key


def _refuse(event: Any, problem: str) -> NoReturn:
    mark = event.start_mark
    raise YamlSyntaxError(problem, mark.line + 1, mark.column + 1)


def _refuse_tag(event: Any, what: str) -> NoReturn:
    tag = event.tag.replace(_PREFIX, "!!", 1)
    if tag.removeprefix("!!") in _NAMES:
        _refuse(event, f"the tag {tag} does not fit {what}")
    _refuse(event, f"the tag {_cut(tag)} is not known here")


def _shown(value: Any) -> str:
    """For a message, cut."""
    if isinstance(value, int) and value.bit_length() > 190:  # repr() may refuse it
        return "a long integer"
    return _cut(repr(value[: _SHOWN + 1] if isinstance(value, str) else value))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


# -- scalars ---------------------------------------------------------------------------

_PREFIX = "tag:yaml.org,2002:"
_NAMES = {
    "map": "mapping",
    "seq": "list",
    "str": "string",
    "null": "null",
    "bool": "boolean",
    "int": "integer",
    "float": "number",
}

_WORDS: Final[dict[str, Any]] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_NO_NUMBER = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_FIRST_OF_NUMBERS = frozenset("-+.0123456789")


def _value(event: yaml.ScalarEvent, text: str) -> Any:
    tag = event.tag
    if tag is not None and tag != "!":
        return _tagged(event, tag, text)
    if not event.implicit[0]:  # in quotes
        return text
    if text in _WORDS:
        return _WORDS[text]
    if text[0] in _FIRST_OF_NUMBERS:
        return _number(event, text)
    return text


def _number(event: yaml.ScalarEvent, text: str) -> Any:
    if _INT.fullmatch(text):
        return _int(event, text)
    if _FLOAT.fullmatch(text):
        return float(text)
    _check_finite(event, text)
    return text


def _check_finite(event: yaml.ScalarEvent, text: str) -> None:
    if _NO_NUMBER.fullmatch(text):
        _refuse(event, f"{text} is a number that JSON cannot carry")


def _int(event: yaml.ScalarEvent, text: str) -> int:
    base = _BASES.get(text[:2], 10)
    if base == 10 and len(text) > MOST_DIGITS:
        _refuse(event, f"an integer of more than {MOST_DIGITS} digits")
    return int(text[2:] if base != 10 else text, base)


_BASES = {"0o": 8, "0x": 16}


def _tagged(event: yaml.ScalarEvent, tag: str, text: str) -> Any:
    """What is tagged with a kind has to be of that kind; in quotes or not is the same."""
    kind = tag.removeprefix(_PREFIX) if tag.startswith(_PREFIX) else ""
    if kind == "str":
        return text
    if kind == "int" and _INT.fullmatch(text):
        return _int(event, text)
    if kind == "float":
        if _FLOAT.fullmatch(text):
            return float(text)
        _check_finite(event, text)
    if kind in ("null", "bool") and text in _WORDS:
        value = _WORDS[text]
        if (value is None) == (kind == "null"):
            return value
    _refuse_tag(event, _shown(text))
