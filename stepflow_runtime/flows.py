"""A workflow from a path or a document: read, parsed, and encoded for the server.

Contract: what comes out of :func:`load` is a mapping that JSON can carry, with the key
under which it may be cached. Whatever is wrong with the source is a
``FlowDefinitionError`` that names it. Files are YAML 1.2's core schema, as the server
reads them: ``on``, ``no`` and dates are strings, there are no merge keys, and a key
that stands twice is an error instead of a silent choice.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import msgspec

from . import wire
from .bounded import MOST_DIGITS, MOST_LEVELS, MOST_VALUES, read_file
from .errors import (
    FlowDefinitionError,
    FlowNotFoundError,
    FlowSyntaxError,
    InvalidFlowError,
    UnrepresentableValueError,
)
from .executor import FlowSource
from .nearby import is_nearby
from .representable import representable

__all__ = [
    "FileKey",
    "Flow",
    "as_path",
    "content_key",
    "encode",
    "from_environment",
    "load",
    "look_at",
    "parse",
    "stat_key",
    "step_ids",
    "without_retry_limits",
]

MAPPING_SOURCE = "<mapping>"


class FileKey(msgspec.Struct, frozen=True):
    """What tells one state of a file from the next."""

    path: str
    device: int
    inode: int
    mtime_ns: int
    ctime_ns: int
    size: int


class Flow(NamedTuple):
    """A workflow that is ready to be sent.

    :ivar encoded: the document as JSON
    :ivar source: the file's path, or ``"<mapping>"``
    :ivar is_empty: whether there is nothing in it to be run
    """

    encoded: bytes
    source: str
    is_empty: bool = False


def load(flow: FlowSource) -> Flow:
    """Read and parse ``flow``. Blocks on the file system if it is a path.

    :raises FlowNotFoundError: if the file is missing or unreadable, if it is no regular
        file, or a longer one than :data:`.bounded.LARGEST_FILE`
    :raises FlowSyntaxError: if it is not well-formed YAML or JSON, or beyond the limits of
        :mod:`.bounded`
    :raises InvalidFlowError: if it holds no mapping, or something JSON cannot carry
    :raises TypeError: if ``flow`` is neither a path nor a document
    """
    if isinstance(flow, Mapping | msgspec.Struct):
        return encode(flow, MAPPING_SOURCE)
    path = as_path(flow)
    return encode(parse(_read(path), str(path)), str(path))


def look_at(path: str) -> tuple[FileKey, bool]:
    """The key of the file's present state, and whether the next look will not wait.

    Blocks on the file system.

    :raises FlowNotFoundError: if it is missing
    :raises TypeError: if it is not the path of a file, but something else
    """
    key = stat_key(str(as_path(path)))
    return key, is_nearby(path)


def stat_key(path: str) -> FileKey:
    """The key of the file's present state. Blocks on the file system.

    :raises FlowNotFoundError: if it is missing
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the name
        raise _not_found(Path(path), exc) from exc
    # The path as it is written is not enough, nor are time and size: the working
    # directory can change, and a file can be put in another's place with its times.
    return FileKey(
        path,
        status.st_dev,
        status.st_ino,
        status.st_mtime_ns,
        status.st_ctime_ns,
        status.st_size,
    )


def content_key(flow: Flow) -> bytes:
    """The key of a workflow by its content."""
    from hashlib import sha256  # brings OpenSSL

    return sha256(flow.encoded).digest()


def as_path(flow: object) -> Path:
    if isinstance(flow, str) and "\n" in flow:
        raise TypeError(
            "flow is a string of several lines: pass the path of a workflow file, or the "
            "document as a mapping (yaml.safe_load of the text)"
        )
    if flow == "":
        raise ValueError("flow is empty: pass the path of a workflow file")
    if isinstance(flow, str | os.PathLike):
        return Path(flow)
    raise TypeError(
        "flow must be the path of a workflow file, a mapping, what FlowBuilder.build() "
        f"returns, or a FlowId, not {type(flow).__name__}"
    )


def parse(text: bytes, source: str) -> Mapping[str, Any]:
    """Parse the text of a workflow file; JSON if ``source`` ends in ``.json``.

    :raises FlowSyntaxError: with line and column, if it is not well-formed
    :raises InvalidFlowError: if it is something other than a mapping
    """
    document = (_parse_json if source.endswith(".json") else _parse_yaml)(text, source)
    if not isinstance(document, dict):
        found = (
            "nothing"
            if document is None
            else f"a {_KINDS.get(type(document), 'value')}"
        )
        raise InvalidFlowError(
            f"{source}: a workflow is a mapping with steps and output, but this file holds "
            f"{found}",
            source=source,
        )
    return document


_KINDS = {list: "list", str: "string", int: "number", float: "number", bool: "boolean"}


def without_retry_limits(encoded: bytes) -> bytes:
    """A workflow without its steps' ``onError.maxRetries``.

    The server's flow analysis turns every number into a float before it looks, and then
    refuses this one for not being an integer. It is the only integer of the flow format.
    """
    if b'"maxRetries"' not in encoded:
        return encoded
    document = msgspec.json.decode(encoded)
    steps = document.get("steps")
    for step in steps if isinstance(steps, list) else ():
        on_error = step.get("onError") if isinstance(step, dict) else None
        if isinstance(on_error, dict) and _is_u32(on_error.get("maxRetries")):
            del on_error["maxRetries"]
    return wire.encode(document)


def _is_u32(value: object) -> bool:
    """Anything else is for the server to refuse."""
    return type(value) is int and 0 <= value < 2**32


def _read(path: Path) -> bytes:
    try:
        return read_file(path)
    except OSError as exc:
        raise _not_found(path, exc) from exc


def _not_found(path: Path, exc: OSError | ValueError) -> FlowNotFoundError:
    reason = getattr(exc, "strerror", None) or exc
    return FlowNotFoundError(
        f"cannot read the workflow file {path}: {reason} (working directory: "
        f"{_working_directory()})",
        source=str(path),
    )


def _working_directory() -> str:
    try:
        return os.getcwd()
    except OSError:
        return "gone"


def encode(document: Any, source: str) -> Flow:
    """Make a document ready to be sent.

    :raises InvalidFlowError: if it holds something that JSON cannot carry, or no mapping
    """
    try:
        plain = representable(document, name="the workflow's value at")
    except UnrepresentableValueError as exc:
        raise InvalidFlowError(
            f"{source}: this workflow cannot be sent: {exc}", source=source
        ) from exc
    if not isinstance(plain, dict):
        raise InvalidFlowError(
            f"{source}: a workflow is a mapping, not {type(plain).__name__}",
            source=source,
        )
    is_empty = not plain.get("steps") and "output" not in plain
    return Flow(wire.encode(plain), source, is_empty)


# -- what is in a workflow -------------------------------------------------------------


def step_ids(document: Mapping[str, Any]) -> list[str]:
    """The ids of a workflow's steps, in its order."""
    steps = document.get("steps")
    return [
        step["id"]
        for step in (steps if isinstance(steps, list) else ())
        if isinstance(step, dict) and isinstance(step.get("id"), str)
    ]


def from_environment(
    annotated: Mapping[str, str], environ: Mapping[str, str] = os.environ
) -> dict[str, Any]:
    """The variables that are set in the environment.

    A text that is JSON counts as that, as the server's own tools read it; unless it would
    not arrive as it is, like a number of twenty digits, which is an id more likely.

    :param annotated: names of environment variables, by name of the flow's variable
    """
    return {
        name: _value_of(environ[variable], name, variable)
        for name, variable in annotated.items()
        if variable in environ
    }


def _value_of(text: str, name: str, variable: str) -> Any:
    """No error shows the text: it may be a secret."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UnrepresentableValueError(
            f"variables $.{name}: the environment variable {variable} is not valid Unicode",
            path=f"$.{name}",
        ) from None
    try:
        return representable(
            json.loads(
                text,
                parse_constant=_refuse_constant,
                parse_float=_exact_float,
                object_pairs_hook=_unique_pairs,
            )
        )
    except (ValueError, RecursionError):
        return text


def _exact_float(text: str) -> float:
    value = float(text)
    if Decimal(text) != Decimal(repr(value)):
        raise ValueError("it would lose digits")
    return value


# -- JSON ------------------------------------------------------------------------------


# What a text so short can hold takes neither long nor much memory.
_SHORT = 2**20
# No stack is full with so many containers inside one another.
_SAFE_LEVELS = 10_000

_JSON_MARKS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{\]},:]', re.DOTALL)


def _parse_json(text: bytes, source: str) -> Any:
    try:
        decoded = text.decode(json.detect_encoding(text), "surrogatepass")
        if _may_be_too_much(text):
            _check_marks(decoded)
        return json.loads(
            decoded,
            parse_constant=_refuse_constant,
            parse_int=None if _refuses_long_integers() else _whole,
            object_pairs_hook=_unique_pairs,
        )
    except json.JSONDecodeError as exc:
        raise _syntax_error(source, exc.msg, exc.lineno, exc.colno) from exc
    except UnicodeDecodeError as exc:
        raise _syntax_error(source, f"not UTF-8: {exc.reason}") from exc
    except (ValueError, RecursionError) as exc:
        raise _syntax_error(source, str(exc)) from exc


def _may_be_too_much(text: bytes) -> bool:
    """Whether it is worth a closer look, which takes longer than to parse."""
    # What is too deep Python refuses by itself, unless it has been told not to.
    is_guarded = sys.getrecursionlimit() <= _SAFE_LEVELS
    if len(text) <= (_SHORT if is_guarded else _SAFE_LEVELS):
        return False
    marks = len(text) - len(text.translate(None, b",:[{"))
    return marks >= (MOST_VALUES if is_guarded else _SAFE_LEVELS)


def _check_marks(text: str) -> None:
    levels, values = 0, 1
    for match in _JSON_MARKS.finditer(text):
        mark = text[match.start()]
        if mark in "[{":
            levels += 1
        elif mark in "]}":
            levels -= 1
        if mark in ",:[{":
            values += 1
        if levels > MOST_LEVELS:
            problem = f"nested too deeply: inside more than {MOST_LEVELS} levels"
            raise json.JSONDecodeError(problem, text, match.start())
        if values > MOST_VALUES:
            problem = f"too much: more than {MOST_VALUES} values"
            raise json.JSONDecodeError(problem, text, match.start())


def _refuses_long_integers() -> bool:
    """Whether Python does it by itself, which costs nothing."""
    return 0 < sys.get_int_max_str_digits() <= sys.int_info.default_max_str_digits


def _whole(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"an integer of more than {MOST_DIGITS} digits")
    return int(text)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:60]!r} stands twice in one object")
    return unique


# -- YAML ------------------------------------------------------------------------------


def _parse_yaml(text: bytes, source: str) -> Any:
    from . import core_yaml  # only who has workflow files pays for it

    try:
        return core_yaml.parse(text)
    except core_yaml.YamlSyntaxError as exc:
        raise _syntax_error(source, str(exc), exc.line, exc.column) from exc.__cause__


def _syntax_error(
    source: str, problem: str, line: int | None = None, column: int | None = None
) -> FlowDefinitionError:
    place = f"{source}:{line}:{column}" if line is not None else source
    return FlowSyntaxError(
        f"{place}: {problem}", source=source, line=line, column=column
    )
