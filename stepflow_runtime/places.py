"""Where in a workflow's text its parts stand.

Contract: for each path a line and a column, from 1: that of the value, or, where the text has
none, of the nearest thing that it is in. Only for text that :func:`.flows.parse` takes; read
once more, and only when somebody asks. Nothing here recurses over what the text says.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, Final

__all__ = ["places", "segments"]

# A path as the server writes it: $.steps[0].input["a.b"].
_SEGMENT: Final = re.compile(
    r"\.(?P<name>[^.\[\]]+)|\[(?P<index>\d+)\]|\[(?P<quoted>\"(?:[^\"\\]|\\.)*\")\]"
)

Segment = str | int
Place = tuple[int, int]


def places(text: bytes, source: str, paths: Sequence[str]) -> list[Place]:
    """The places of what these paths name.

    :param source: what the text was called when it was parsed
    """
    wanted = _Wanted()
    for path in paths:
        wanted.add(segments(path))
    if source.endswith(".json"):
        _walk(wanted, _json_marks(text))
    else:
        from .core_yaml import marks

        _walk(wanted, marks(text))
    return [wanted.place(segments(path)) for path in paths]


def segments(path: str) -> list[Segment]:
    """The names and indices of a path, as far as it can be read."""
    found: list[Segment] = []
    place = 1 if path.startswith("$") else 0
    while match := _SEGMENT.match(path, place):
        place = match.end()
        if match["index"] is not None:
            found.append(int(match["index"]))
        elif match["quoted"] is not None:
            found.append(_unquoted(match["quoted"]))
        else:
            found.append(match["name"])
    return found


def _unquoted(text: str) -> str:
    try:
        return str(json.loads(text))
    except ValueError:
        return text[1:-1]


class _Wanted:
    """A tree of what is looked for, and where it was found."""

    __slots__ = ("children", "found")

    def __init__(self) -> None:
        self.children: dict[Segment, _Wanted] = {}
        self.found: Place | None = None

    def add(self, path: Sequence[Segment]) -> None:
        node = self
        for segment in path:
            node = node.children.setdefault(segment, _Wanted())

    def place(self, path: Sequence[Segment]) -> Place:
        node, place = self, self.found or (1, 1)
        for segment in path:
            node = node.children[segment]
            place = node.found or place
        return place


class _Level:
    """A container that is being walked through; ``node`` is None where nothing is wanted."""

    __slots__ = ("is_list", "key", "next", "node")

    def __init__(self, node: _Wanted | None, is_list: bool) -> None:
        self.node = node
        self.is_list = is_list
        self.next = 0
        self.key: str | None = None


def _walk(wanted: _Wanted, marks: Iterator[tuple[str, Any, Place]]) -> None:
    """Go through a document.

    :param marks: ``"list"``, ``"map"``, ``"end"``, or ``"value"`` with a text that may be a
        key; each with its place
    """
    levels: list[_Level] = []
    for kind, text, place in marks:
        if kind == "end":
            levels.pop()
            continue
        node: _Wanted | None = wanted
        if levels:
            level = levels[-1]
            if not level.is_list and level.key is None:
                level.key = text or ""  # an alias has no text
                continue
            node = _child(level)
        if node is not None:
            node.found = place
        if kind != "value":
            levels.append(_Level(node, kind == "list"))


def _child(level: _Level) -> _Wanted | None:
    segment: Segment
    if level.is_list:
        segment, level.next = level.next, level.next + 1
    else:
        segment, level.key = level.key or "", None
    return None if level.node is None else level.node.children.get(segment)


# -- JSON ------------------------------------------------------------------------------

_MARKS: Final = re.compile(
    r'(?P<string>"[^"\\]*+(?:\\.[^"\\]*+)*+")|(?P<open>[\[{])|(?P<close>[\]}])'
    r"|(?P<other>[^\s,:\[\]{}\"]+)",
    re.DOTALL,
)


def _json_marks(text: bytes) -> Iterator[tuple[str, Any, Place]]:
    decoded = text.decode(json.detect_encoding(text), "surrogatepass")
    begins = [0, *(match.end() for match in re.finditer("\n", decoded))]
    for match in _MARKS.finditer(decoded):
        at = match.start()
        line = bisect_right(begins, at)
        place = (line, at - begins[line - 1] + 1)
        if match["open"]:
            yield ("list" if match["open"] == "[" else "map"), None, place
        elif match["close"]:
            yield "end", None, place
        else:
            string = match["string"]
            yield "value", _unquoted(string) if string else match["other"], place
