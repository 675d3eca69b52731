"""What goes through a real server comes back as it was."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import json
import math
import random
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stepflow_runtime import LogConfig, StepflowRuntime, UnrepresentableValueError
from stepflow_runtime.numerals import literal, misread

from .conftest import ECHO, each_backend

EXACT = 2**53

texts = st.text(st.characters(codec="utf-8"))
# A float without a fraction comes back as an int; so does a negative zero.
floats = st.floats(allow_nan=False, allow_infinity=False).filter(
    lambda value: (
        not (value.is_integer() and abs(value) <= EXACT) and is_reachable(value)
    )
)
scalars = (
    st.none() | st.booleans() | st.integers(-EXACT, EXACT) | floats | texts
) | st.sampled_from(["$input", "$.", "\0", "\x7f", "\u2028", "no", "012", "1e5"])
keys = texts | st.sampled_from(["$input", "$step", "$literal", "$variable", "$if", ""])
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.dictionaries(keys, inner),
    max_leaves=30,
)


def is_reachable(value: float) -> bool:
    """False for the odd float that the server's parser never arrives at."""
    return literal(value) is not None or misread(repr(abs(value))) == abs(value)


def typed(value: Any) -> Any:
    """The value with the type of each leaf, so that ``1 == 1.0 == True`` is none."""
    if isinstance(value, dict):
        return {key: typed(each) for key, each in value.items()}
    if isinstance(value, list):
        return [typed(each) for each in value]
    return type(value).__name__, value


@pytest.fixture(scope="module")
def running() -> Iterator[StepflowRuntime]:
    with StepflowRuntime.start(log_config=LogConfig(level="error")) as runtime:
        yield runtime


@pytest.fixture
def _leave_nothing_behind() -> None:
    """The server of this module outlives its tests."""


@settings(max_examples=150)
@given(batch=st.lists(values, min_size=1, max_size=8))
def test_any_json_value_comes_back_equal_types_included(
    running: StepflowRuntime, batch: list[Any]
) -> None:
    async def through() -> list[Any]:
        results = [(await running.run(ECHO, batch[0])).unwrap()]
        if len(batch) > 1:
            batch_id = await running.submit_batch(ECHO, batch[1:])
            results += [
                each.unwrap() for each in (await running.get_batch(batch_id))[1]
            ]
        return results

    for sent, returned in zip(batch, anyio.run(through), strict=True):
        assert typed(returned) == typed(sent)


@settings(max_examples=40)
@given(
    data=st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats(allow_nan=False, allow_infinity=False).filter(is_reachable)
        | texts,
        lambda inner: st.lists(inner) | st.dictionaries(keys, inner),
        max_leaves=20,
    ).filter(lambda data: data is not None)
    | st.binary()
)
@example(data=8275198178977559.0)  # with its ".0" it has 17 digits
def test_any_blob_comes_back_equal_types_included(
    running: StepflowRuntime, data: Any
) -> None:
    async def through() -> Any:
        return await running.get_blob(await running.put_blob(data))

    assert typed(anyio.run(through)) == typed(data)


@settings(max_examples=100)
@given(number=st.floats(allow_nan=False, allow_infinity=False))
def test_digits_are_found_that_a_correct_parser_reads_the_same(number: float) -> None:
    digits = literal(number)
    if digits is not None:
        assert misread(digits.lstrip("-")) == abs(number) != misread(repr(abs(number)))
        assert abs(float(digits) - number) <= math.ulp(number)


def test_floats_that_computations_make_arrive_exactly(running: StepflowRuntime) -> None:
    """One in ten of them does not, if it is sent as it is printed."""
    chance = random.Random(20261123)
    numbers = [chance.random() * 10 ** chance.randint(-9, 9) for _ in range(20_000)]
    reachable = [number for number in numbers if is_reachable(number)]
    assert len(reachable) > 0.99 * len(numbers)
    assert sum(literal(number) is not None for number in numbers) > 500
    result = anyio.run(running.run, ECHO, reachable)
    assert result.unwrap() == reachable
    blob_id = anyio.run(running.put_blob, reachable)
    assert anyio.run(running.get_blob, blob_id) == reachable
    unreachable = [number for number in numbers if not is_reachable(number)]
    for sent, returned in zip(
        unreachable, anyio.run(running.run, ECHO, unreachable).unwrap(), strict=True
    ):
        assert 0 < abs(sent - returned) <= math.ulp(sent)


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: int
    when: datetime.date


class Order(msgspec.Struct, rename="camel"):
    order_id: uuid.UUID
    total: decimal.Decimal
    lines: tuple[Point, ...]
    note: str | msgspec.UnsetType = msgspec.UNSET


class Model:
    """As pydantic's are seen from outside."""

    def model_dump(self, *, mode: str = "python", **options: Any) -> dict[str, Any]:
        assert mode == "json"
        return {"modelled": True}


@pytest.mark.anyio
@each_backend
async def test_values_of_common_types_arrive_as_json() -> None:
    order = Order(
        uuid.UUID(int=1),
        decimal.Decimal("1.50"),
        (Point(1, datetime.date(2026, 1, 2)),),
    )
    async with StepflowRuntime.start() as runtime:
        result = await runtime.run(
            ECHO,
            {
                "order": order,
                "colour": Colour.RED,
                "path": Path("a/b"),
                "at": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
                "model": Model(),
                "tuple": (1, (2,)),
            },
        )
    assert result.unwrap() == {
        "order": {
            "orderId": "00000000-0000-0000-0000-000000000001",
            "total": "1.50",
            "lines": [{"x": 1, "when": "2026-01-02"}],
        },
        "colour": "red",
        "path": "a/b",
        "at": "2026-01-02T00:00:00Z",
        "model": {"modelled": True},
        "tuple": [1, [2]],
    }


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


@pytest.mark.anyio
@each_backend
async def test_the_limits_are_the_servers() -> None:
    """What is refused here would be refused, or changed, there; what is not, arrives."""
    async with StepflowRuntime.start() as runtime:
        value: Any
        for value in (EXACT, -EXACT, nested(125), {"a": nested(124)}, 1.5e300):
            assert (await runtime.run(ECHO, value)).unwrap() == value
            batch_id = await runtime.submit_batch(ECHO, [value])
            assert (await runtime.get_batch(batch_id))[1][0].unwrap() == value
        step = {"id": "a", "component": "/noop", "input": {"$variable": "v"}}
        variable = {"steps": [step], "output": {"$step": "a"}}
        deep = nested(125)
        assert (await runtime.run(variable, variables={"v": deep})).unwrap() == deep
        replaced = await runtime.run(ECHO, None, {"a": {"input": nested(122)}})
        assert replaced.unwrap() == nested(122)
        deep_blob = nested(125)
        assert await runtime.get_blob(await runtime.put_blob(deep_blob)) == deep_blob
        for value in (EXACT + 1, -EXACT - 1, nested(126), math.inf, math.nan, "\ud800"):
            with pytest.raises(UnrepresentableValueError, match=r"^input \$"):
                await runtime.run(ECHO, value)
        with pytest.raises(UnrepresentableValueError, match="^variables "):
            await runtime.run(ECHO, variables={"v": nested(126)})
        with pytest.raises(UnrepresentableValueError, match="^overrides "):
            await runtime.run(ECHO, overrides={"a": {"input": nested(124)}})
        with pytest.raises(UnrepresentableValueError, match=r"^data \$"):
            await runtime.put_blob([2**64])


@pytest.mark.anyio
@each_backend
async def test_yaml_is_read_as_the_servers_own_tools_read_it(tmp_path: Path) -> None:
    literal = (
        "{on: no, day: 2024-01-01, n: 012, x: 0x1f, o: 0o17, t: true, e: 1e3, y: y}"
    )
    path = tmp_path / "flow.yaml"
    path.write_text(f"output: {literal}\n")
    async with StepflowRuntime.start() as runtime:
        output = (await runtime.run(path)).unwrap()
    assert output == {
        "on": "no",
        "day": "2024-01-01",
        "n": 12,
        "x": 31,
        "o": 15,
        "t": True,
        "e": 1000,
        "y": "y",
    }
    json.dumps(output)
