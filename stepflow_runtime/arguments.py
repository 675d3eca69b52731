"""What calls are given, checked before anything is sent.

A leaf. Contract: what is of the wrong kind is a ``TypeError``, what cannot work a
``ValueError``, each with the argument's name; a value that would not arrive as it is, an
``UnrepresentableValueError``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final
from urllib.parse import quote
from uuid import UUID

from .numerals import exactly
from .representable import representable

__all__ = [
    "as_batch",
    "as_header",
    "as_input",
    "as_inputs",
    "as_overrides",
    "as_segment",
    "as_server_writes",
    "as_variables",
    "check_count",
    "check_flag",
    "check_max_concurrent",
    "check_on_unknown",
    "check_text",
    "check_timeout",
    "check_uuid",
]

_FOREVER: Final = 100 * 365 * 24 * 3600

# What the server can count to, where it counts items.
_MOST: Final = 2**32 - 1

# How deep the server reads JSON, less what a request puts around a value.
_DEEPEST: Final = 125
_DEEPEST_OVERRIDE: Final = 123


def as_input(value: object) -> Any:
    return exactly(representable(value, name="input", depth=_DEEPEST))


def as_batch(inputs: object) -> list[Any]:
    """All inputs of a batch."""
    items = list(as_inputs(inputs))
    if not items:
        raise ValueError("inputs is empty: a batch needs at least one")
    checked: list[Any] = exactly(
        representable(items, name="inputs", depth=_DEEPEST + 1)
    )
    return checked


def as_overrides(overrides: object) -> Mapping[str, Any] | None:
    if overrides is None:
        return None
    if not isinstance(overrides, Mapping):
        raise TypeError(
            "overrides must be a mapping of step ids to properties, like "
            f'{{"step1": {{"input": ...}}}}, not {type(overrides).__name__}'
        )
    for step, properties in overrides.items():
        if not isinstance(properties, Mapping):
            raise TypeError(
                f"overrides[{step!r}] must be a mapping of the step's properties, like "
                f'{{"input": ...}}, not {type(properties).__name__}'
            )
    checked: Mapping[str, Any] = exactly(
        representable(overrides, name="overrides", depth=_DEEPEST_OVERRIDE + 1)
    )
    return checked


def as_variables(variables: object) -> Mapping[str, Any] | None:
    if variables is None:
        return None
    if not isinstance(variables, Mapping):
        raise TypeError(
            "variables must be a mapping of names to values, not "
            f"{type(variables).__name__}"
        )
    checked: Mapping[str, Any] = exactly(
        representable(variables, name="variables", depth=_DEEPEST + 1)
    )
    return checked


def as_inputs(inputs: object) -> Iterable[Any]:
    if isinstance(inputs, str | bytes | Mapping) or not isinstance(inputs, Iterable):
        raise TypeError(
            "inputs must be a list of inputs, or another iterable, not "
            f"{type(inputs).__name__}"
        )
    return inputs


def check_max_concurrent(number: object) -> None:
    if number is not None:
        check_count("max_concurrent", number, least=1)


def check_count(name: str, number: object, *, least: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name} must be a whole number, not {number!r}")
    if not least <= number <= _MOST:
        raise ValueError(f"{name} must be from {least} to {_MOST}, not {number}")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")


def check_on_unknown(value: object) -> None:
    if value not in ("raise", "resubmit"):
        raise ValueError(f'on_unknown must be "raise" or "resubmit", not {value!r}')


def check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {type(value).__name__}")
    if not value:
        raise ValueError(f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} has a lone surrogate: {value!a}") from None


def check_uuid(name: str, value: object) -> None:
    check_text(name, value)
    try:
        UUID(str(value))
    except ValueError:
        raise ValueError(f"{name} is not the id of a run: {value!r}") from None


def as_server_writes(run_id: str) -> str:
    """A run's id in the form that the server gives it: others are taken, too."""
    try:
        return str(UUID(run_id))
    except ValueError:
        return run_id


def as_header(name: str, value: str) -> str:
    if not (value.isascii() and value.isprintable()):
        raise ValueError(
            f"{name}: the server takes only printable ASCII here, not {value!r}"
        )
    return value


def as_segment(name: str, value: object) -> str:
    """An id as a part of a URL's path."""
    check_text(name, value)
    if value in (".", ".."):
        raise ValueError(
            f"{name} must be an id, not {value!r}"
        )  # URLs have a use for it
    return quote(str(value), safe="")


def check_timeout(seconds: object) -> None:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"timeout must be a number of seconds or None, not {seconds!r}")
    if not 0 < seconds < _FOREVER and seconds != math.inf:
        raise ValueError(
            "timeout must be more than 0 seconds and less than a century, or infinite"
        )
