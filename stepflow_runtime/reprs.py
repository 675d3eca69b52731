"""Reprs that fit into a line, whatever a value holds.

A leaf. Contract: a repr has no line break and at most :data:`LONGEST` characters, and takes
no longer for a large value than for a small one. It tells the fields that matter and are
not as they are by default; what is long is cut (``…``), the longest first, and of what
has parts of our own only the number is told. What is a secret by its name is starred: a
notebook keeps the repr beside the HTML, and logs keep it, too. Nothing is raised.

``rich`` and ``pprint`` of the fields show all that there is.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from .server.secrecy import Secrets

__all__ = ["LONGEST", "component_list_repr", "repr_of"]

# Characters.
LONGEST: Final = 200
_SHORTEST: Final = 12

# Of one text. What is beyond is shown nowhere, and need not be looked at.
_LONGEST_TEXT: Final = 2_000

# So many values are looked through for secrets, and so deep.
_MOST_VALUES: Final = 500
_DEEPEST: Final = 30


def repr_of(*names: str) -> Callable[[Any], str]:
    """A ``__repr__`` for a Struct of ours.

    :param names: the fields and properties that it tells, in this order; none: all fields
    """

    def short_repr(value: Any) -> str:
        from .server.secrecy import Secrets

        told = [each for _, each in _told(value)]
        secrets = Secrets.of(_excerpt(told, [_MOST_VALUES]))
        return _struct(value, secrets, LONGEST)

    short_repr.names = names  # type: ignore[attr-defined]
    return short_repr


def component_list_repr(components: Any) -> str:
    """The repr of a ``ComponentList``: what can be called, and what is missing."""
    from .server.secrecy import Secrets

    paths = [getattr(each, "path", None) for each in components]
    told = [("", _text(paths, Secrets(), LONGEST)[1:-1])] if paths else []
    if components.failed_plugins:
        failed = _text([*components.failed_plugins], Secrets(), LONGEST)
        told.append(("failed_plugins=", failed))
    head = f"<ComponentList of {len(paths)}"
    shown = "; ".join(_fitted(told, LONGEST - len(head) - 3))
    return f"{head}: {shown}>" if shown else f"{head}>"


def _struct(value: Any, secrets: Secrets, room: int) -> str:
    name = type(value).__name__
    room -= len(name) + 2
    fields = []
    for field, told in _told(value):
        fields.append((f"{field}=", _text(told, secrets, room)))
    return f"{name}({', '.join(_fitted(fields, room))})"


def _told(value: Any) -> Iterator[tuple[str, Any]]:
    """What it has to say: what is not there, or as it is by default, is not told."""
    fields = value.__struct_fields__
    # Those of the last fields.
    backwards = zip(reversed(fields), reversed(value.__struct_defaults__), strict=False)
    defaults = dict(backwards)
    for name in getattr(type(value).__repr__, "names", ()) or fields:
        told = getattr(value, name, None)
        default = defaults.get(name, msgspec.NODEFAULT)
        if told is None or told is default:
            continue
        if isinstance(told, int | str | float) and told == default:
            continue
        if isinstance(told, list | tuple | dict) and not told:
            continue
        yield name, told


def _fitted(fields: list[tuple[str, str]], room: int) -> Iterator[str]:
    """As many fields as there is room for, the long ones cut to one length."""
    while fields:
        names = sum(len(name) + 2 for name, _ in fields)
        lengths = [len(text) for _, text in fields]
        longest = _longest(lengths, room - names)
        if longest >= min(_SHORTEST, max(lengths)) or len(fields) == 1:
            yield from (name + _cut(text, max(longest, 1)) for name, text in fields)
            return
        # One less, and what stands for it.
        room -= 3 if fields[-1] != _MORE else 0
        fields = [each for each in fields if each != _MORE][:-1] + [_MORE]


_MORE: Final = ("…", "")


def _longest(lengths: Sequence[int], room: int) -> int:
    """How long each may be, so that all of them fit."""
    left = len(lengths)
    for length in sorted(lengths):
        if length * left > room:
            return room // left
        room -= length
        left -= 1
    return max(lengths, default=0)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


# -- values ----------------------------------------------------------------------------


def _text(value: Any, secrets: Secrets, room: int) -> str:
    """As much of it as there is room for."""
    text = ""
    for piece in _pieces(value, secrets, room):
        text += piece
        if len(text) > room:
            return _cut(text, room)
    return text


def _pieces(value: Any, secrets: Secrets, room: int) -> Iterator[str]:
    # Each container begins with a character, so that nesting ends where the room does.
    if isinstance(value, msgspec.Struct):
        yield _struct(value, secrets, room)
    elif isinstance(value, Mapping):
        yield "{"
        for place, (key, inner) in enumerate(value.items()):
            yield ", " if place else ""
            yield from _pieces(key, secrets, room)
            yield ": "
            yield from _pieces(inner, secrets, room)
        yield "}"
    elif isinstance(value, list | tuple):
        if value and isinstance(value[0], msgspec.Struct):
            yield f"<{len(value)} {type(value[0]).__name__}>"
            return
        yield "["
        for place, inner in enumerate(value):
            yield ", " if place else ""
            yield from _pieces(inner, secrets, room)
        yield "]"
    else:
        yield _atom(value, secrets)


def _atom(value: Any, secrets: Secrets) -> str:
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, str):
        return repr(_starred(value[:_LONGEST_TEXT], secrets))
    if isinstance(value, datetime):
        return value.isoformat(" ", "milliseconds")
    if isinstance(value, int) and value.bit_length() > 4 * LONGEST:
        return f"<int of {value.bit_length()} bits>"  # to write it could be refused
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    return f"<{type(value).__name__}>"  # by hand: nothing that a server gives


def _starred(text: str, secrets: Secrets) -> str:
    if not secrets:
        return text
    encoded = text.encode(errors="surrogatepass")
    return secrets.starred([encoded])[0].decode(errors="surrogatepass")


def _excerpt(value: Any, budget: list[int], depth: int = 0) -> Any:
    """What of a value is looked through for secrets: mappings, lists and texts."""
    budget[0] -= 1
    if budget[0] < 0 or depth > _DEEPEST:
        return None
    if isinstance(value, str):
        return value[:_LONGEST_TEXT]
    if isinstance(value, msgspec.Struct):
        value = [getattr(value, name, None) for name in value.__struct_fields__]
    if isinstance(value, list | tuple):
        some = value[: budget[0]]
        return [_excerpt(each, budget, depth + 1) for each in some]
    if isinstance(value, Mapping):
        items = islice(value.items(), budget[0])
        return {name: _excerpt(each, budget, depth + 1) for name, each in items}
    return None
