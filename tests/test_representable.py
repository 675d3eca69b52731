"""What JSON carries as it is, what is converted for it, and what is refused, and where."""

from __future__ import annotations

import array
import copy
import dataclasses
import datetime
import enum
import gc
import json
import re
import uuid
import weakref
from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepflow_runtime.errors import UnrepresentableValueError
from stepflow_runtime.representable import SIXTY_FOUR_BITS, representable

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=20,
)


class Colour(enum.Enum):
    RED = "red"
    DEEP = ("a", Decimal("1.5"))
    NOTHING = float("nan")


class Size(str, enum.Enum):  # noqa: UP042
    SMALL = "S"


class Level(enum.IntEnum):
    LOW = 1


class Flags(enum.Flag):
    A = 1
    B = 2


class Text(str):
    def __str__(self) -> str:
        return "not this"


class Whole(int): ...


class Real(float):
    def __float__(self) -> float:
        return 0.0


class Items(list[Any]): ...


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass
class Point:
    x: Any
    _y: Any = 2


class Tagged(msgspec.Struct, rename="camel", tag="point", omit_defaults=True):
    some_value: Any
    with_default: int = 3
    unset: int | msgspec.UnsetType = msgspec.UNSET
    many: list[int] = []
    fresh: list[int] = msgspec.field(default_factory=lambda: [1])


class Arrayed(msgspec.Struct, array_like=True, tag=7):
    some_value: Any
    with_default: int = 3


class Holder(msgspec.Struct):
    some_value: Any


class Model:
    """What pydantic's models look like from outside."""

    def __init__(self, dumped: Any) -> None:
        self.dumped = dumped

    def model_dump(self, *, mode: str, by_alias: bool) -> Any:
        assert mode == "json"
        assert by_alias
        return self.dumped


@dataclasses.dataclass
class Attribute:
    name: str


class WithAttrs:
    """What attrs' classes look like from outside."""

    __attrs_attrs__ = (Attribute("x"), Attribute("_y"))

    def __init__(self, x: Any) -> None:
        self.x = x
        self._y = 2
        self.extra = 3


class Fspath:
    def __init__(self, path: str | bytes) -> None:
        self.path = path

    def __fspath__(self) -> str | bytes:
        return self.path


class Moment(datetime.datetime): ...


class Nanoseconds(datetime.datetime):
    def isoformat(self, *args: Any, **kwargs: Any) -> str:
        return super().isoformat(*args, **kwargs) + "007"


class LongDuration(datetime.timedelta):
    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


class Multidict(Mapping[str, int]):
    def __getitem__(self, key: str) -> int:
        return 1

    def __iter__(self) -> Iterator[str]:
        return iter(["a", "a"])

    def __len__(self) -> int:
        return 2


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def resolve(path: str, value: Any) -> Any:
    """What the path points at; every character of it has to count."""
    assert path[0] == "$"
    place = 1
    pattern = re.compile(r'\.(?P<name>\w+)|\[(?P<json>\d+|"(?:[^"\\]|\\.)*")\]')
    while place < len(path):
        step = pattern.match(path, place)
        assert step, path[place:]
        value = value[step["name"] or json.loads(step["json"])]
        place = step.end()
    return value


def refusal(value: Any, **options: Any) -> UnrepresentableValueError:
    with pytest.raises(UnrepresentableValueError) as caught:
        representable(value, **options)
    return caught.value


# -- what is plain already -------------------------------------------------------------


@given(JSON)
def test_plain_json_comes_back_as_the_same_object(value: Any) -> None:
    before = copy.deepcopy(value)
    assert representable(value) is value
    assert value == before


@given(JSON)
def test_the_result_survives_a_round_trip_through_json(value: Any) -> None:
    result = representable(
        {"tuple": (value,), "mapping": MappingProxyType({"v": value})}
    )
    assert msgspec.json.decode(msgspec.json.encode(result)) == result


@pytest.mark.parametrize("whole", [2**53, -(2**53), 0])
def test_integers_up_to_the_limit_are_carried(whole: int) -> None:
    assert representable(whole) is whole


@pytest.mark.parametrize("whole", [2**64 - 1, -(2**63)])
def test_a_wider_range_can_be_asked_for(whole: int) -> None:
    assert representable([whole], whole=SIXTY_FOUR_BITS) == [whole]


@pytest.mark.parametrize(
    ("value", "path"), [(2**53 + 1, "$"), ({"a": [2**53 + 1]}, "$.a[0]")]
)
def test_the_range_is_that_of_the_call(value: Any, path: str) -> None:
    assert refusal(value).path == path
    assert representable(value, whole=SIXTY_FOUR_BITS) is value


# -- what is converted -----------------------------------------------------------------

UTC = datetime.UTC
WEST = datetime.timezone(datetime.timedelta(hours=-5))

CONVERTED = [
    ((1, (2,)), [1, [2]]),
    (Pair(1, (2,)), [1, [2]]),
    (deque([1, 2]), [1, 2]),
    ({3, 1, 2}, [1, 2, 3]),
    (frozenset("cab"), ["a", "b", "c"]),
    ({Colour.RED}, ["red"]),
    ({"a": 1, "b": 2}.keys(), ["a", "b"]),
    ({"a": 1, "b": 2}.values(), [1, 2]),
    ({"a": 1}.items(), [["a", 1]]),
    (Items([1, (2,)]), [1, [2]]),
    (OrderedDict(a=1), {"a": 1}),
    (defaultdict(int, a=1), {"a": 1}),
    (UserDict({"a": (1,)}), {"a": [1]}),
    (MappingProxyType({"a": 1}), {"a": 1}),
    (Text("plain"), "plain"),
    (Whole(7), 7),
    (Real(1.5), 1.5),
    (Colour.RED, "red"),
    (Colour.DEEP, ["a", "1.5"]),
    (Size.SMALL, "S"),
    (Level.LOW, 1),
    (Flags.A | Flags.B, 3),
    ({Text("k"): 1}, {"k": 1}),
    ({"b": 1, Size.SMALL: 2, "a": 3}, {"b": 1, "S": 2, "a": 3}),
    ({Colour.RED: (1,)}, {"red": [1]}),
    ({"é": (1,), "ü": 2}, {"é": [1], "ü": 2}),
    (Point(1, (2,)), {"x": 1, "_y": [2]}),
    (Point(1, msgspec.UNSET), {"x": 1}),
    (WithAttrs((1,)), {"x": [1], "_y": 2}),
    (Tagged((1,)), {"type": "point", "someValue": [1], "fresh": [1]}),
    (Tagged(1, 4, unset=5), {"type": "point", "someValue": 1, "withDefault": 4, "unset": 5, "fresh": [1]}),
    (Arrayed((1,)), [7, [1], 3]),
    (Holder(msgspec.UNSET), {}),
    (Holder(Point(PurePosixPath("a"))), {"some_value": {"x": "a", "_y": 2}}),
    (Model({"a": (1,)}), {"a": [1]}),
    (Model(Model("deep")), "deep"),
    (Decimal("1.50"), "1.50"),
    (uuid.UUID(int=5), "00000000-0000-0000-0000-000000000005"),
    (PurePosixPath("a/b"), "a/b"),
    (Fspath("a/b"), "a/b"),
    (datetime.datetime(2024, 1, 2, 3, 4, 5), "2024-01-02T03:04:05"),
    (datetime.datetime(2024, 1, 2, 3, 4, 5, 6, UTC), "2024-01-02T03:04:05.000006Z"),
    (datetime.datetime(2024, 1, 2, tzinfo=WEST), "2024-01-02T00:00:00-05:00"),
    (Moment(2024, 1, 2, tzinfo=UTC), "2024-01-02T00:00:00Z"),
    (
        Moment(2024, 10, 27, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin")),
        "2024-10-27T02:30:00+01:00",
    ),
    (datetime.date(2024, 1, 2), "2024-01-02"),
    (datetime.time(3, 4), "03:04:00"),
    (datetime.time(3, 4, tzinfo=UTC), "03:04:00Z"),
    (datetime.timedelta(days=1, seconds=1), "P1DT1S"),
]  # fmt: skip


def same(left: Any, right: Any) -> bool:
    """Equal, with exact types, and with the keys in the same order."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return same(list(left.items()), list(right.items()))
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@pytest.mark.parametrize(("value", "expected"), CONVERTED)
def test_what_has_one_obvious_form_is_converted(value: Any, expected: Any) -> None:
    assert same(representable(value), expected)
    assert same(representable({"a": [0, value]}), {"a": [0, expected]})


def test_sets_without_an_order_are_lists_too() -> None:
    assert sorted(representable({1, "a"}), key=str) == [1, "a"]


def test_only_the_parts_that_need_it_are_copied() -> None:
    plain, odd = {"a": [1]}, {"b": (1,), "c": 2}
    value = {"plain": plain, "list": [plain, odd, (plain,), 1]}
    before = copy.deepcopy(value)
    result = representable(value)
    assert result == {"plain": plain, "list": [plain, {"b": [1], "c": 2}, [plain], 1]}
    assert result["plain"] is plain
    assert result["list"][0] is plain
    assert result["list"][2][0] is plain
    assert same(value, before)


def test_the_same_object_twice_is_no_cycle() -> None:
    shared = (1,)
    assert representable([shared, [shared], shared]) == [[1], [[1]], [1]]


def test_children_are_converted_once_even_beside_keys_that_change() -> None:
    dumps = []

    class Counted(Model):
        def model_dump(self, *, mode: str, by_alias: bool) -> Any:
            dumps.append(self)
            return self.dumped

    value: Any = Counted(1)
    for _ in range(20):
        value = {"child": value, Size.SMALL: 1, "é": 2}
    representable([value])
    assert len(dumps) == 1


LEAVES: st.SearchStrategy[Any] = (
    SCALARS
    | st.datetimes()
    | st.dates()
    | st.times()
    | st.timedeltas()
    | st.uuids()
    | st.decimals(allow_nan=False, allow_infinity=False)
    | st.sampled_from([Colour.RED, Size.SMALL, Level.LOW, [], {}, set(), [1], 3, None])
)


@given(LEAVES, LEAVES, st.data())
def test_structs_are_written_by_the_rules_of_msgspec(
    first: Any, second: Any, data: st.DataObject
) -> None:
    default = data.draw(st.sampled_from([msgspec.NODEFAULT, 3, None, second, [], {}]))
    options: dict[str, Any] = data.draw(
        st.fixed_dictionaries(
            {},
            optional={
                "rename": st.sampled_from(["camel", "kebab", "upper"]),
                "tag": st.sampled_from([True, 3, "t"]),
                "omit_defaults": st.booleans(),
                "array_like": st.booleans(),
                "kw_only": st.booleans(),
            },
        )
    )
    if isinstance(default, set | list | dict):
        default = type(default)()
    fields: list[Any] = [("first_one", Any), ("the_other", Any, default)]
    if default is msgspec.NODEFAULT:
        fields[1] = ("the_other", Any)
    kind = msgspec.defstruct("Drawn", fields, **options)
    value = kind(first_one=first, the_other=second)
    expected = msgspec.to_builtins({"v": value, "s": [value]})
    assert representable({"v": value, "s": [value]}) == expected


def test_struct_fields_that_equal_an_empty_default_are_omitted() -> None:
    kind: Any = msgspec.defstruct(
        "Empty",
        [("a", list[int], []), ("b", dict[str, int], {}), ("c", tuple[int, ...], ())],
        omit_defaults=True,
    )
    for value in (kind(), kind([], {}, ()), kind([1], {"a": 1}, (1,)), kind(a=())):
        assert representable(value) == msgspec.json.decode(msgspec.json.encode(value))


# -- what is refused -------------------------------------------------------------------

LMT = ZoneInfo("Europe/Amsterdam")

BAD_LEAVES = [
    (2**53 + 1, ["9007199254740993 is beyond ±2^53", "lose digits", "as a string"]),
    (-(2**53) - 1, ["-9007199254740993 is beyond ±2^53"]),
    (10**5000, ["an integer of 16610 bits is beyond"]),
    (Whole(2**60), [f"{2**60} is beyond"]),
    (float("nan"), ["NaN is no number of JSON", "send None"]),
    (float("inf"), [" Infinity is no number of JSON"]),
    (float("-inf"), ["-Infinity is no number of JSON"]),
    (Real("nan"), ["NaN is no number"]),
    (Colour.NOTHING, ["NaN is no number"]),
    (Decimal("NaN"), ["NaN is no number"]),
    (Decimal("-Infinity"), ["-Infinity is no number"]),
    ("a\ud800", ["'a\\ud800' has the lone surrogate '\\ud800' at 1", "UTF-8"]),
    (Text("\udfff"), ["lone surrogate '\\udfff' at 0"]),
    ("x" * 99 + "\ud800", [f"'{'x' * 56}... has the lone surrogate", "at 99"]),
    (b"ab", ["bytes has no form", "base64", "put_blob"]),
    (bytearray(b"ab"), ["bytearray has no form", "base64", "put_blob"]),
    (memoryview(b"ab"), ["memoryview has no form", "base64", "put_blob"]),
    (Fspath(b"a"), ["bytes has no form", "base64", "put_blob"]),
    (object(), ["an object of type object", "make it a dict"]),
    (1j, ["of type complex"]),
    (range(3), ["of type range"]),
    (Point, ["of type type"]),
    (Holder, ["of type msgspec._core.StructMeta"]),
    (msgspec.UNSET, ["of type msgspec.UnsetType"]),
    (msgspec.Raw(b"1"), ["of type msgspec.Raw"]),
    (msgspec.msgpack.Ext(1, b""), ["of type msgspec.msgpack.Ext"]),
    (array.array("b"), ["of type array.array", "tolist()"]),
    ((each for each in [1]), ["an iterator of type generator", "pass a list"]),
    (iter([1]), ["an iterator of type list_iterator"]),
    (Nanoseconds(2024, 1, 1), ["of type", "Nanoseconds"]),
    (LongDuration(1), ["of type", "LongDuration"]),
    (datetime.datetime(1900, 1, 1, tzinfo=LMT), ["0:19:32", "whole minutes", "astimezone"]),
    (datetime.time(1, tzinfo=LMT), ["time of day", "zone would be lost"]),
    ({1: 2}, ["the key 1 is of type int", "str(key)"]),
    ({"a": 1, None: 2}, ["the key None is of type NoneType"]),
    ({True: 2}, ["the key True is of type bool"]),
    ({b"k": 2}, ["the key b'k' is of type bytes"]),
    ({(1, 2): 2}, ["a key is of type tuple"]),
    ({Level.LOW: 2}, ["the key <Level.LOW: 1> is of type", "Level"]),
    ({"\ud800": 2}, ["the key '\\ud800' has the lone surrogate"]),
    ({Text("\ud800"): 2}, ["the key '\\ud800' has the lone surrogate"]),
    ({Colour.RED: 1, "red": 2}, ["the key 'red' is there twice", "rename"]),
    (Multidict(), ["the key 'a' is there twice", "rename"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("leaf", "words"), BAD_LEAVES, ids=lambda leaf: type(leaf).__name__
)
def test_what_would_not_arrive_as_it_is_is_refused(leaf: Any, words: list[str]) -> None:
    for value, path in [
        (leaf, "$"),
        ({"a": [leaf]}, "$.a[0]"),
        ([1, "é", {"id": leaf}], "$[2].id"),
        ((deque([leaf]),), "$[0][0]"),
    ]:
        error = refusal(value, name="variables")
        message = str(error)
        assert error.path == path
        assert message.startswith(f"variables {path}: ")
        for word in words:
            assert word in message
        assert len(message) < 250
        assert "\n" not in message
        message.encode()


@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (lambda leaf: {"odd key": {"x": leaf}}, '$["odd key"].x'),
        (lambda leaf: {"é": {'"': leaf}}, '$.é["\\""]'),
        (lambda leaf: {"": {"1": leaf}}, '$[""]["1"]'),
        (lambda leaf: ({"a": 1, Size.SMALL: leaf},), "$[0].S"),
        (lambda leaf: {"a": Point(deque([leaf]))}, "$.a.x[0]"),
        (lambda leaf: {"a": Tagged([leaf])}, "$.a.someValue[0]"),
        (lambda leaf: [Arrayed(leaf)], "$[0][1]"),
        (lambda leaf: [0, 0, Model({"a": leaf})], "$[2].a"),
        (lambda leaf: WithAttrs(UserDict(a=leaf)), "$.x.a"),
        (lambda leaf: [{leaf}], "$[0][0]"),
    ],
)
@pytest.mark.parametrize("leaf", [2**53 + 1, float("nan"), "\ud800", 1j])
def test_the_path_leads_through_whatever_was_converted(
    leaf: Any, wrap: Any, path: str
) -> None:
    error = refusal(wrap(leaf))
    assert error.path == path
    assert str(error).startswith(f"input {path}: ")


def test_the_message_tells_what_why_and_what_instead() -> None:
    assert str(refusal({"items": [0, 0, 0, {"id": 2**53 + 1}]})) == (
        "input $.items[3].id: 9007199254740993 is beyond ±2^53, and would lose digits: "
        "send it as a string"
    )


def test_another_range_is_told_by_its_limits() -> None:
    error = refusal([2**64], whole=SIXTY_FOUR_BITS)
    assert "-9223372036854775808..18446744073709551615" in str(error)


@given(JSON, st.data())
def test_one_bad_leaf_anywhere_is_found_where_it_was_planted(
    value: Any, data: st.DataObject
) -> None:
    bad = data.draw(
        st.sampled_from([float("nan"), 2**53 + 1, "\ud800", b"", object(), {1: 2}])
    )
    root = [value]
    container: Any = root
    while True:
        keys = list(container) if isinstance(container, dict) else range(len(container))
        key: Any = data.draw(st.sampled_from(keys))
        if not container[key] or not isinstance(container[key], dict | list):
            break
        container = container[key]
    container[key] = bad
    error = refusal(root)
    assert resolve(error.path, root) is bad
    assert str(error).startswith(f"input {error.path}: ")


def test_the_first_of_two_bad_leaves_is_told() -> None:
    nan = float("nan")
    assert refusal([0, nan, nan]).path == "$[1]"
    assert refusal([float(2**53 + 2), 2**53 + 2]).path == "$[1]"  # equal, but not it


# -- depth and cycles ------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 125])
def test_as_many_containers_as_allowed_may_be_inside_one_another(depth: int) -> None:
    fits = nested(depth)
    assert representable(fits, depth=depth) is fits
    error = refusal(nested(depth + 1), depth=depth)
    assert error.path == "$" + "[0]" * depth
    assert f"inside of {depth} containers" in str(error)
    assert "contains itself" not in str(error)


@pytest.mark.parametrize("empty", [[], {}, (), set(), Point(1), Model([])])
def test_an_empty_container_is_one_level(empty: Any) -> None:
    representable(empty, depth=1)
    representable({"a": empty}, depth=2)
    assert refusal({"a": empty}, depth=1).path == "$.a"
    assert refusal(empty, depth=0).path == "$"


def test_a_scalar_needs_no_depth() -> None:
    assert representable(Colour.RED, depth=0) == "red"
    assert representable(1, depth=0) == 1


def test_a_level_costs_no_more_than_one_frame() -> None:
    fits = nested(700)
    assert representable(fits, depth=1000) is fits


def test_125_levels_are_the_default() -> None:
    representable(nested(125))
    refusal(nested(126))


def of_list() -> tuple[Any, str, str]:
    value: list[Any] = [0]
    value.append(value)
    return value, "$[1]", "$"


def of_dict() -> tuple[Any, str, str]:
    inner: dict[str, Any] = {}
    inner["a"] = [{"b c": inner}]
    return {"x": inner}, '$.x.a[0]["b c"]', "$.x"


def of_struct() -> tuple[Any, str, str]:
    value = Holder(None)
    value.some_value = (value,)
    return [value], "$[0].some_value[0]", "$[0]"


def of_dataclass() -> tuple[Any, str, str]:
    value = Point(None)
    value.x = value
    return value, "$.x", "$"


def of_mapping() -> tuple[Any, str, str]:
    value: UserDict[str, Any] = UserDict()
    value["a"] = deque([value])
    return [[value]], "$[0][0].a[0]", "$[0][0]"


@pytest.mark.parametrize(
    "make", [of_list, of_dict, of_struct, of_dataclass, of_mapping]
)
def test_what_contains_itself_is_told_where_it_begins_again(make: Any) -> None:
    value, path, start = make()
    error = refusal(value)
    assert error.path == path
    assert f"is {start} again, which contains itself" in str(error)


def test_an_endless_chain_of_models_is_refused() -> None:
    value = Model(None)
    value.dumped = value
    assert "of type" in str(refusal([value]))


@pytest.mark.parametrize("value", [nested(100_000), of_list()[0]])
def test_a_depth_beyond_pythons_stack_is_a_refusal_too(value: Any) -> None:
    error = refusal(value, depth=1_000_000)
    assert error.path.startswith("$[")
    assert isinstance(error.__cause__, RecursionError)


# -- code of the user ------------------------------------------------------------------


class Broken(Mapping[str, int]):
    def __getitem__(self, key: str) -> int:
        raise LookupError("broken")

    def __iter__(self) -> Iterator[str]:
        return iter(["a"])

    def __len__(self) -> int:
        return 1


class BrokenModel(Model):
    def model_dump(self, *, mode: str, by_alias: bool) -> Any:
        raise LookupError("broken")


class EndlessModel(Model):
    def model_dump(self, *, mode: str, by_alias: bool) -> Any:
        return self.model_dump(mode=mode, by_alias=by_alias)


@pytest.mark.parametrize(
    ("value", "path"), [(EndlessModel(1), "$"), ({"a": [EndlessModel(1)]}, "$.a")]
)
def test_but_a_recursion_error_is_a_refusal_near_the_place(
    value: Any, path: str
) -> None:
    error = refusal(value)
    assert path in error.path
    assert isinstance(error.__cause__, RecursionError)


@pytest.mark.parametrize("value", [Broken(), BrokenModel(1)])
def test_exceptions_of_the_users_code_are_not_touched(value: Any) -> None:
    with pytest.raises(LookupError, match="broken") as caught:
        representable({"a": [value]})
    assert caught.type is LookupError


def test_a_kept_refusal_does_not_keep_the_values_that_it_passed() -> None:
    class Passed(UserDict[str, Any]): ...

    value = [Passed(a=1j)]
    passed = weakref.ref(value[0])
    error = refusal(value)
    value.clear()
    gc.collect()
    assert passed() is None
    assert error.__cause__ is None
    assert error.__context__ is None


def test_real_paths_are_strings(tmp_path: Path) -> None:
    assert representable([tmp_path]) == [str(tmp_path)]
