"""Functions that tests/test_components.py serves: a worker imports this module, too."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import datetime
import enum
import functools
import logging
import os
import sys
import threading
from collections.abc import Callable
from decimal import Decimal
from typing import Annotated, Any, Literal, TypedDict

import msgspec

from stepflow_runtime import component

if path := os.environ.get("TEST_IMPORT_FAILS"):
    raise LookupError(f"no luck with {path}")


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Point:
    x: int
    y: float = 0.5


class Tree(msgspec.Struct):
    value: int
    children: list[Tree] = []


class Options(TypedDict, total=False):
    fast: bool


class Model:
    """What pydantic's models look like from outside."""

    def __init__(self, number: int) -> None:
        self.number = number

    @classmethod
    def model_validate(cls, value: dict[str, Any]) -> Model:
        if value["number"] < 0:
            raise ValueError("a number below 0")
        return cls(value["number"])

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return {"$ref": "#/$defs/Inner", "$defs": {"Inner": {"type": "object"}}}

    def model_dump(self, **options: Any) -> dict[str, Any]:
        return {"number": self.number}


@component
def greet(name: str, times: int = 1) -> str:
    """Greets somebody.

    As often as it is told to.
    """
    return " ".join([f"Hello, {name}!"] * times)


@component(name="every-kind")
def every_kind(  # type: ignore[no-untyped-def]
    point: Point,
    colour: Colour,
    when: datetime.datetime,
    price: Decimal,
    tree: Tree,
    options: Options,
    by_number: dict[int, str],
    model: Model,
    small: Annotated[int, msgspec.Meta(ge=0, le=9)] = 3,
    mode: Literal["slow", "quick"] = "slow",
    maybe: int | None = None,
    anything=None,
) -> dict[str, Any]:
    assert type(point.x) is type(small) is int
    assert type(point.y) is float
    assert isinstance(tree.children[0], Tree)
    assert isinstance(model, Model)
    assert list(by_number) == [7]
    assert when.tzinfo is datetime.UTC
    return {
        "point": point,
        "colour": colour,
        "when": when,
        "price": price + 1,
        "tree": tree,
        "options": options,
        "model": model,
        "small": small,
        "mode": mode,
        "maybe": maybe,
        "anything": anything,
    }


@component
def returns(what: str) -> Any:
    deep: Any = 1
    for _ in range(31):
        deep = {"a": deep}
    return {
        "bytes": b"x",
        "object": object(),
        "long": "x" * 5_000_000,
        "numbers": [1] * 400_000,
        "deep": deep,
        "exact": 2**53 + 1,
        "nothing": None,
    }[what]


def _refuse(amount: int) -> None:
    raise OverflowError(f"{amount} is too much")


@component
def fails(how: str) -> None:
    logging.getLogger("tests.fails").warning("it will fail: %s", how)
    sys.stdout.write(f"a print of {how}\n")
    match how:
        case "call":
            _refuse(3)
        case "key":
            raise KeyError("name")
        case "exit":
            sys.exit("bye")
        case "stop":
            raise StopIteration(1)
        case "cause":
            try:
                _refuse(4)
            except OverflowError as exc:
                raise RuntimeError("two\nlines") from exc


@component
async def fails_later(how: str) -> None:
    await asyncio.sleep(0)
    raise asyncio.CancelledError if how == "cancelled" else SystemExit(3)


_BARRIER = threading.Barrier(3)


@component
def meet() -> int:
    """Returns when three calls are under way."""
    return _BARRIER.wait(30)


_OWN: contextvars.ContextVar[int] = contextvars.ContextVar("own", default=0)


@component
async def count_in_context() -> int:
    _OWN.set(_OWN.get() + 1)
    return _OWN.get()


@component
def describe_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "directory": os.getcwd(),
        "argv": sys.argv[1:],
        "main": __name__,
    }


def plain(text: str) -> str:
    return text.upper()


def through(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        return function(*arguments, **named)

    return call


@through
async def wrapped(number: int) -> int:
    return number + 1
