"""Floats, written so that the server reads the number that is meant.

Stepflow's JSON parser (serde_json without its feature ``float_roundtrip``, seen in 0.12 and
0.13) does not round correctly: it makes a float of the digits, and multiplies or divides that
by a float power of ten, each with a rounding of its own. A float that takes 16 or 17 digits,
as results of computations do, arrives off by one unit in the last place in one of ten cases.

Contract: :func:`literal` finds digits that come out right there, and, nearly always, for a
parser that rounds correctly too. One in fifty of the floats that need such digits is none
that the server's parser ever arrives at; that is sent as it is.
"""

from __future__ import annotations

import math
import operator
import re
from typing import Any, Final

import msgspec

__all__ = ["exactly", "literal", "may_be_misread", "misread"]

_POWERS: Final = tuple(float(f"1e{exponent}") for exponent in range(309))

# Numbers of fewer characters have fewer than 16 digits. Those and their powers of ten are
# floats without rounding, unless the power is a large one.
_SHORT: Final = 16

# How many digits are tried: the parser's 64 bits hold 19, or 20 that begin low.
_COUNTS: Final = (19, 18, 20, 17, 16)


def exactly(value: Any) -> Any:
    """A JSON value with digits in the place of floats, where those need them.

    Returned itself if there is nothing to be replaced; never changed.
    """
    kind = type(value)
    if kind is float:
        digits = literal(value)
        return value if digits is None else msgspec.Raw(digits.encode())
    if kind is list:
        exact = [exactly(each) if type(each) in _MAY_HAVE else each for each in value]
        return value if _are_same(exact, value) else exact
    if kind is dict:
        values = list(value.values())
        exact = [exactly(each) if type(each) in _MAY_HAVE else each for each in values]
        if _are_same(exact, values):
            return value
        return dict(zip(value, exact, strict=True))
    return value


_MAY_HAVE: Final = frozenset({float, list, dict})


def _are_same(some: list[Any], others: list[Any]) -> bool:
    return all(map(operator.is_, some, others))


def may_be_misread(text: bytes) -> bool:
    """True if there is a number in a JSON text that is not short."""
    return _LONG_NUMBER.search(text) is not None


_LONG_NUMBER: Final = re.compile(rb"[0-9.]{15}|[0-9]e-?[0-9]")


def literal(value: float) -> str | None:
    """Digits for a finite float that the server reads as that.

    None if its ``repr`` will do, or nothing will.
    """
    text = repr(value)
    if len(text) < _SHORT and "e" not in text:
        return None
    wanted = abs(value)
    digits, exponent = _parts(text)
    if _read(digits, exponent) == wanted:
        return None
    found = _search(wanted)
    if found is None:
        return None
    return f"-{found}" if value < 0 else found


def misread(text: str) -> float:
    """What the server makes of the digits of a number that is not negative."""
    return _read(*_parts(text))


def _search(wanted: float) -> str | None:
    numerator, denominator = wanted.as_integer_ratio()
    magnitude = math.floor(math.log10(wanted))
    only_there = None
    for count in _COUNTS:
        exponent = magnitude - count + 1
        if exponent >= 0:
            exact = numerator // (denominator * 10**exponent)
        else:
            exact = numerator * 10**-exponent // denominator
        for read in _neighbours(float(exact)):
            # The whole numbers that become this float on the way.
            reach = int(math.ulp(read)) // 2
            for within in (reach, reach - 1):  # where it ends, it may round elsewhere
                digits = min(max(exact, int(read) - within), int(read) + within)
                if digits >= 2**64 or _read(digits, exponent) != wanted:
                    continue
                text = f"{digits}e{exponent}"
                if float(text) == wanted:
                    return text
                only_there = only_there or text
    return only_there


def _neighbours(value: float) -> list[float]:
    below, above = math.nextafter(value, 0), math.nextafter(value, math.inf)
    return [
        value,
        below,
        above,
        math.nextafter(below, 0),
        math.nextafter(above, math.inf),
    ]


def _parts(text: str) -> tuple[int, int]:
    """The digits of a number as one whole number, and its power of ten."""
    mantissa, _, exponent = text.lstrip("-").partition("e")
    # The 0 of "1.0" is a digit there like any other.
    whole, _, fraction = mantissa.partition(".")
    return int(whole + fraction), int(exponent or 0) - len(fraction)


def _read(digits: int, exponent: int) -> float:
    value = float(digits)
    while exponent < -308 and value:
        value /= 1e308
        exponent += 308
    if exponent > 308:
        return math.inf
    if exponent >= 0:
        return value * _POWERS[exponent]
    return value / _POWERS[-exponent] if exponent >= -308 else value
