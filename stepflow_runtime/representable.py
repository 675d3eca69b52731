"""From what a user hands in to what JSON carries, or a refusal before anything is sent.

Contract: what :func:`representable` returns consists of exact builtins (``dict`` with
``str`` keys, ``list``, ``str``, ``int``, ``float``, ``bool``, ``None``), and the server
reads from its JSON the same value. What JSON or the server would change, drop or choke on
is an ``UnrepresentableValueError`` that says where it is and what to do instead. The
argument is never changed; where there is nothing to convert it is returned itself.

It runs over every input of every call. So the loops look at the children themselves,
make nothing, and know no path: a refusal collects its path on the way out.
"""

from __future__ import annotations

import datetime
import json
import os
from collections import deque
from collections.abc import (
    Callable,
    ItemsView,
    Iterator,
    KeysView,
    Mapping,
    ValuesView,
)
from collections.abc import Set as AbstractSet
from decimal import Decimal
from enum import Enum
from functools import lru_cache
from typing import Any, Final, NoReturn, Self
from uuid import UUID

import msgspec

from .errors import UnrepresentableValueError

__all__ = ["EXACT", "SIXTY_FOUR_BITS", "representable"]

# What goes through the protobuf of a run becomes a float on the way.
EXACT: Final = (-(2**53), 2**53)
# What the server keeps as JSON text, such as a blob's data, is an i64 or a u64.
SIXTY_FOUR_BITS: Final = (-(2**63), 2**64 - 1)

_BUILTINS = frozenset({dict, list, str, int, float, bool, type(None)})
# An enum of a model of a path: more steps than this to a builtin are an endless chain.
_MOST_STEPS = 8
_SHOWN = 60


def representable(
    value: Any,
    *,
    name: str = "input",
    depth: int = 125,
    whole: tuple[int, int] = EXACT,
) -> Any:
    """``value`` in JSON's builtins: itself if it is that already, else a converted copy.

    Only the parts that need it are copied. Beside the builtins and their subclasses it
    takes dataclasses, attrs classes, msgspec Structs, pydantic models, enums, tuples,
    deques, sets, mappings, dates and times, UUIDs, Decimals and paths. Exceptions of their
    own code pass through, but for a ``RecursionError``: it becomes the refusal's cause.

    :param name: what messages call the argument
    :param depth: how many containers may be inside one another; ``[]`` is one
    :param whole: the least and the greatest integer
    :raises UnrepresentableValueError: if it would not arrive as it is
    """
    try:
        low, high = whole
        return _value(value, depth, low, high)
    except _Refused as exc:
        refusal = exc
    except RecursionError as exc:
        refusal = _Refused.too_deep(value, _NO_STACK, exc)
    # Outside of the handlers, and without the trail: an error that somebody keeps must not
    # keep the values that it passed on its way.
    path, problem, cause = refusal.path(), refusal.problem(), refusal.cause
    del refusal
    raise UnrepresentableValueError(f"{name} {path}: {problem}", path=path) from cause


# -- the walk --------------------------------------------------------------------------


def _value(value: Any, left: int, low: int, high: int) -> Any:
    kind = type(value)
    if kind is dict:
        return _dict(value, left, low, high)
    if kind is list:
        return _list(value, left, low, high)
    if kind in _BUILTINS:
        _check_scalar(value, low, high)
        return value
    plain = _builtin(value)
    try:
        return _value(plain, left, low, high)
    except _Refused as refusal:
        # The copy is new every time; only the original tells that it contains itself.
        refusal.trail.append((value, None))
        raise


def _dict(value: dict[Any, Any], left: int, low: int, high: int) -> dict[str, Any]:
    if left <= 0:
        raise _Refused.too_deep(value, _TOO_DEEP)
    left -= 1
    names: dict[Any, str] | None = None
    changed: dict[Any, Any] | None = None
    for key, child in value.items():
        if (type(key) is not str or not key.isascii()) and names is None:
            names = _names(value)
        kind = type(child)
        if kind is str:
            if child.isascii():
                continue
        elif kind is int:
            if low <= child <= high:
                continue
        elif kind is float:
            if child - child == 0.0:  # the quickest test for what is finite
                continue
        elif kind is bool or child is None:
            continue
        try:
            new = _WALKS.get(kind, _value)(child, left, low, high)
        except (_Refused, RecursionError) as exc:
            raise _inside(exc, value, names[key] if names else key) from None
        if new is not child:
            changed = changed or {}
            changed[key] = new
    if changed is None and not names:
        return value
    names, changed = names or {}, changed or {}
    return {names.get(key, key): changed.get(key, value[key]) for key in value}


def _list(value: list[Any], left: int, low: int, high: int) -> list[Any]:
    if left <= 0:
        raise _Refused.too_deep(value, _TOO_DEEP)
    left -= 1
    # By identity, and no index: counting would cost a list of numbers a quarter more.
    changed: dict[int, Any] | None = None
    for child in value:
        kind = type(child)
        if kind is str:
            if child.isascii():
                continue
        elif kind is int:
            if low <= child <= high:
                continue
        elif kind is float:
            if child - child == 0.0:
                continue
        elif kind is bool or child is None:
            continue
        try:
            new = _WALKS.get(kind, _value)(child, left, low, high)
        except (_Refused, RecursionError) as exc:
            raise _inside(exc, value, _position(value, child)) from None
        if new is not child:
            changed = changed or {}
            changed[id(child)] = new
    if changed is None:
        return value
    return [changed.get(id(child), child) for child in value]


# Straight from one container into the next: a level takes one frame of Python's stack.
_WALKS: dict[Any, Callable[[Any, int, int, int], Any]] = {dict: _dict, list: _list}


def _position(value: list[Any], child: Any) -> int:
    """Where the refused ``child`` is: at its first place, as there it was met first."""
    return next((i for i, each in enumerate(value) if each is child), len(value))


def _check_scalar(value: Any, low: int, high: int) -> None:
    if type(value) is str:
        _check_text(value)
    elif type(value) is int and not low <= value <= high:
        limits = "±2^53" if (low, high) == EXACT else f"{low}..{high}"
        raise _Refused(
            f"{_shown(value)} is beyond {limits}, and would lose digits: send it as a string"
        )
    elif type(value) is float and value - value != 0.0:
        _refuse_number({"nan": "NaN", "inf": "Infinity"}.get(repr(value), "-Infinity"))


def _refuse_number(text: str) -> NoReturn:
    raise _Refused(
        f"{text} is no number of JSON, and would be lost: send None or a string"
    )


def _check_text(text: str, what: str = "") -> None:
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        where = f"the lone surrogate {text[exc.start]!a} at {exc.start}"
        raise _Refused(
            f"{what}{_shown(text)} has {where}, and UTF-8 has no form for it: replace it, or "
            "base64-encode the bytes that it stands for"
        ) from None


def _names(mapping: dict[Any, Any]) -> dict[Any, str]:
    """The keys as JSON has them; empty if they are that already."""
    names: dict[Any, str] = {}
    taken: set[str] = set()
    for key in mapping:
        names[key] = name = _name(key)
        if name in taken:
            _refuse_twin(name)
        taken.add(name)
    return names if any(type(key) is not str for key in names) else {}


def _name(key: Any) -> str:
    name = key.value if isinstance(key, Enum) else key
    if not isinstance(name, str):
        raise _Refused(
            f"{_shown_key(key)} is of type {_type_name(key)}, and the keys of JSON are "
            "strings: use str(key)"
        )
    name = str.__str__(name)
    _check_text(name, "the key ")
    return name


def _refuse_twin(key: Any) -> NoReturn:
    raise _Refused(
        f"{_shown_key(key)} is there twice, and one entry would be lost: rename one of them"
    )


# -- the way out -----------------------------------------------------------------------

_TOO_DEEP = (
    "is inside of {count} containers, and the server reads no deeper: flatten it, or send "
    "the inner part as a string of JSON"
)
_NO_STACK = "is inside of {count} containers, and Python's stack is full: flatten it"


class _Refused(Exception):
    """A refusal on its way out.

    :ivar trail: the containers that it has left, innermost first, each with the key or the
        index that leads on, or ``None`` if it is the original of the one before
    """

    def __init__(self, problem: str) -> None:
        self._problem = problem
        self._is_depth = False
        self.trail: list[tuple[Any, str | int | None]] = []
        self.cause: BaseException | None = None

    @classmethod
    def too_deep(
        cls, value: Any, problem: str, cause: BaseException | None = None
    ) -> Self:
        refusal = cls(problem)
        refusal._is_depth = True
        refusal.trail.append((value, None))
        refusal.cause = cause
        return refusal

    def problem(self) -> str:
        if cycle := self._cycle():
            start = _path(self.trail[cycle[0] + 1 :])
            return (
                f"is {start} again, which contains itself and has no end: leave it out"
            )
        if self._is_depth:
            count = sum(part is not None for _, part in self.trail)
            return self._problem.format(count=count)
        return self._problem

    def path(self) -> str:
        cycle = self._cycle()
        return _path(self.trail[cycle[1] + 1 :] if cycle else self.trail)

    def _cycle(self) -> tuple[int, int] | None:
        """Where in the trail a container is met first, and where again."""
        met: dict[int, int] = {}
        for place in reversed(range(len(self.trail))):
            first = met.setdefault(id(self.trail[place][0]), place)
            if first != place:
                return first, place
        return None


def _inside(
    exc: _Refused | RecursionError, container: Any, part: str | int
) -> _Refused:
    if isinstance(exc, RecursionError):
        # It may strike here again. Then it is for the next container out, with more room.
        return _Refused.too_deep(container, _NO_STACK, exc)
    exc.trail.append((container, part))
    return exc


def _path(trail: list[tuple[Any, str | int | None]]) -> str:
    return "$" + "".join(_step(part) for _, part in reversed(trail) if part is not None)


def _step(part: str | int) -> str:
    if isinstance(part, str) and part.isidentifier():
        return f".{part}"
    return f"[{json.dumps(part)}]"


def _shown(value: Any) -> str:
    """A scalar for a message, cut."""
    if isinstance(value, int) and value.bit_length() > 190:  # repr() may refuse it
        return f"an integer of {value.bit_length()} bits"
    text = repr(value[: _SHOWN + 1] if isinstance(value, str | bytes) else value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _shown_key(key: Any) -> str:
    is_scalar = isinstance(key, str | int | float | bytes | Enum | type(None))
    return f"the key {_shown(key)}" if is_scalar else "a key"


def _type_name(value: Any) -> str:
    kind = type(value)
    prefix = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{prefix}{kind.__qualname__}"


# -- what is no builtin ----------------------------------------------------------------
#
# One level at a time, where msgspec's to_builtins would go all the way down: so what is
# inside is judged like everything else, and its path, its depth and its cycles are known.


def _builtin(value: Any) -> Any:
    """``value`` as an exact builtin; its children are left as they are."""
    for _ in range(_MOST_STEPS):
        kind: Any = type(value)
        value = _conversion(kind)(value)
        if type(value) in _BUILTINS:
            return value
    _refuse_object(value)


@lru_cache(maxsize=256)
def _conversion(kind: type) -> Callable[[Any], Any]:
    """What brings a value of this type a step nearer to a builtin, or refuses it."""
    if issubclass(kind, Enum):
        return _of_enum
    if hasattr(kind, "model_dump"):  # pydantic's models
        return _of_model
    if hasattr(kind, "__dataclass_fields__"):
        return _of_dataclass
    if hasattr(kind, "__attrs_attrs__"):
        return _of_attrs
    fitting = (convert for kinds, convert in _CONVERSIONS if issubclass(kind, kinds))
    return next(fitting, _refuse_object)


def _of_enum(value: Enum) -> Any:
    return value.value


def _of_model(value: Any) -> Any:
    return value.model_dump(mode="json", by_alias=True)


def _of_dataclass(value: Any) -> dict[str, Any]:
    import dataclasses  # who has one has imported it

    return _of_fields(value, dataclasses.fields(value))


def _of_attrs(value: Any) -> dict[str, Any]:
    return _of_fields(value, type(value).__attrs_attrs__)


def _of_fields(value: Any, fields: Any) -> dict[str, Any]:
    items = {field.name: getattr(value, field.name) for field in fields}
    return {name: item for name, item in items.items() if item is not msgspec.UNSET}


def _of_struct(value: msgspec.Struct) -> dict[str, Any] | list[Any]:
    """As msgspec writes it: renamed, tagged, and without what it leaves out."""
    config = value.__struct_config__
    items = [getattr(value, field) for field in value.__struct_fields__]
    if config.array_like:
        return items if config.tag is None else [config.tag, *items]
    defaults = value.__struct_defaults__
    required = [msgspec.NODEFAULT] * (len(items) - len(defaults))
    plain = {} if config.tag_field is None else {config.tag_field: config.tag}
    for name, item, default in zip(
        value.__struct_encode_fields__, items, [*required, *defaults], strict=True
    ):
        omitted = config.omit_defaults and _is_default(item, default)
        if item is not msgspec.UNSET and not omitted:
            plain[name] = item
    return plain


def _is_default(item: Any, default: Any) -> bool:
    """Whether ``omit_defaults`` omits it: msgspec looks at identity, and what is empty."""
    if item is default:
        return True
    is_empty = type(item) in (list, dict, set) and not item
    return is_empty and getattr(default, "factory", None) is type(item)


def _of_mapping(value: Mapping[Any, Any]) -> dict[Any, Any]:
    plain: dict[Any, Any] = {}
    for key, item in value.items():
        if key in plain:  # some mappings are multidicts
            _refuse_twin(key)
        plain[key] = item
    return plain


def _of_set(value: AbstractSet[Any]) -> list[Any]:
    try:
        return sorted(value)
    except TypeError:  # of kinds that have no order
        return list(value)


def _of_decimal(value: Decimal) -> str:
    if not value.is_finite():
        _refuse_number(str(value))
    return str(value)


def _of_path(value: os.PathLike[Any]) -> Any:
    path = os.fspath(value)
    return _refuse_bytes(path) if isinstance(path, bytes) else path


def _of_moment(value: Any) -> Any:
    plain = value if type(value) in _MOMENTS else _without_subclass(value)
    if getattr(value, "tzinfo", None) is not None:
        _check_offset(value.utcoffset())
    return msgspec.to_builtins(plain)


def _without_subclass(value: Any) -> Any:
    """As msgspec wants it, if the subclass (pandas', pendulum's) adds nothing."""
    kind = next(kind for kind in _MOMENTS if isinstance(value, kind))
    text = kind.isoformat(value)
    if value.isoformat() != text:  # nanoseconds, or not a time
        _refuse_object(value)
    return kind.fromisoformat(text)


def _check_offset(offset: datetime.timedelta | None) -> None:
    if offset is None:
        raise _Refused(
            "a time of day in a zone without a fixed offset, and the zone would be lost: "
            "send a datetime, or isoformat() and the zone's name"
        )
    if offset % datetime.timedelta(minutes=1):
        raise _Refused(
            f"the UTC offset {offset} is not of whole minutes, and would be rounded: use "
            "astimezone(datetime.timezone.utc)"
        )


def _of_duration(value: datetime.timedelta) -> Any:
    plain = datetime.timedelta(value.days, value.seconds, value.microseconds)
    return msgspec.to_builtins(plain) if plain == value else _refuse_object(value)


def _refuse_bytes(value: Any) -> NoReturn:
    raise _Refused(
        f"{_type_name(value)} has no form in JSON, and would arrive as text: base64-encode "
        "it, or store that with put_blob and send the blob's id"
    )


def _refuse_iterator(value: Any) -> NoReturn:
    raise _Refused(
        f"an iterator of type {_type_name(value)}, and it can be read only once: pass a list "
        "of what it yields"
    )


def _refuse_object(value: Any) -> NoReturn:
    advice = (
        "call its tolist()"
        if hasattr(type(value), "tolist")  # numpy's arrays and scalars, array.array
        else "make it a dict, a list, a string or a number first"
    )
    raise _Refused(
        f"an object of type {_type_name(value)}, and JSON has no form for it: {advice}"
    )


_MOMENTS: tuple[Any, ...] = (datetime.datetime, datetime.date, datetime.time)

# The first that fits. The unbound methods give the exact builtin, whatever a subclass
# does to str() and float().
_CONVERSIONS: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
    (_MOMENTS, _of_moment),
    (datetime.timedelta, _of_duration),
    (UUID, str),
    (Decimal, _of_decimal),
    (msgspec.Struct, _of_struct),
    ((list, tuple, deque, KeysView, ValuesView, ItemsView), list),
    ((set, frozenset), _of_set),
    (Mapping, _of_mapping),
    (os.PathLike, _of_path),
    ((bytes, bytearray, memoryview), _refuse_bytes),
    (Iterator, _refuse_iterator),
)
