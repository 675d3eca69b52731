"""Python functions as components: which may be some, how a worker finds them, what they take.

Contract: what cannot be a component is refused with the function's name, and with what to do
instead, before anything is started. A function is known to a worker by where it stands, the
module and its name there, and is never pickled. The same annotations tell the schemas that
are shown and the conversions that are made: :func:`declared` is asked here and in the worker.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType, MethodType
from typing import Any, Final, NamedTuple, TypeVar, overload

import msgspec

__all__ = [
    "Declared",
    "Place",
    "component",
    "converted",
    "declared",
    "places_of",
]

F = TypeVar("F", bound=Callable[..., Any])

_REFERENCE: Final = "#/$defs/"
_MARK: Final = "__stepflow_component__"
_LONGEST_NAME: Final = 100
_NAME_SIGNS: Final = frozenset("_-.")

_MODULE_ADVICE: Final = "move it to the top of a module"


@overload
def component(function: F, /) -> F: ...


@overload
def component(*, name: str) -> Callable[[F], F]: ...


def component(
    function: F | None = None, /, *, name: str | None = None
) -> F | Callable[[F], F]:
    """Mark a function as one that workflows can call, as ``/python/<name>``.

    It stays the function that it was. The option ``components`` of
    :meth:`StepflowRuntime.start` takes it, and serves it::

        @component
        def greet(name: str, times: int = 1) -> str:
            return f"Hello, {name}! " * times

    A step's input has the parameters' names, and is converted to their annotations by the
    rules of msgspec; one without an annotation takes anything. The function may be
    ``async``. It has to stand at the top of a module, or of the program's script.

    :param name: how workflows call it; the function's own name otherwise
    :raises TypeError: if it is no function that a worker can find and call
    :raises ValueError: if the name is none that a workflow can call
    """

    def mark(function: F) -> F:
        _check_function(function)
        setattr(function, _MARK, _checked_name(name or function.__name__))
        return function

    if name is not None:
        _checked_name(name)
    return mark if function is None else mark(function)


class Place(msgspec.Struct, frozen=True):
    """Where a function stands.

    :ivar name: the component's
    :ivar module: the module's name; None: the program's script
    :ivar file: the module's file, or the script
    :ivar attribute: the function's name in it
    """

    name: str
    module: str | None
    file: str | None
    attribute: str


def places_of(functions: object) -> tuple[Place, ...]:
    """Where the functions of ``components=`` stand.

    :raises ValueError: if one of them cannot be found or called by a worker
    :raises TypeError: if one is no function, or takes or returns what JSON cannot carry
    """
    if isinstance(functions, str) or not isinstance(functions, Sequence):
        raise TypeError(
            "components must be a list of functions, [greet], not "
            f"{type(functions).__name__}"
        )
    places: dict[str, Place] = {}
    for function in functions:
        place = _place_of(function)
        if place.name in places:
            raise ValueError(
                f"components: there are two by the name {place.name!r}: rename one, by "
                f"@component(name=...)"
            )
        places[place.name] = place
        try:
            declared(function)
        except (TypeError, ValueError) as exc:
            raise type(exc)(f"components: {exc}") from exc.__cause__
    return tuple(places.values())


def _place_of(function: Any) -> Place:
    try:
        _check_function(function)
        name = getattr(function, _MARK, None) or _checked_name(function.__name__)
    except (TypeError, ValueError) as exc:
        raise type(exc)(f"components: {exc}") from None
    module = sys.modules.get(function.__module__)
    # Another decorator may have put its own in the function's place.
    there = getattr(module, function.__name__, None)
    if module is None or not callable(there):
        raise ValueError(
            f"components: {_shown(function)} is not to be found in its module by that name: "
            f"{_MODULE_ADVICE}, and leave it there"
        )
    file = getattr(module, "__file__", None)
    if function.__module__ != "__main__":
        return Place(name, function.__module__, file, function.__name__)
    if not file or _is_interactive(function):
        raise ValueError(
            f"components: {_shown(function)} was typed in, in a notebook or an interactive "
            "session, or came by -c or standard input. A worker is a process of its own, "
            "and reads functions from files: write it into a module (in a notebook, "
            "%%writefile my_components.py at the top of its cell) and import it"
        )
    spec = getattr(module, "__spec__", None)
    by_name = getattr(spec, "name", None)  # python -m
    named = None if by_name == "__main__" else by_name
    return Place(name, named, file, function.__name__)


def _is_interactive(function: FunctionType) -> bool:
    """True for what IPython has read: a script that it runs may have a file."""
    return function.__code__.co_filename.startswith("<") or "ipykernel" in sys.modules


def _check_function(function: Any) -> None:
    what = _shown(function)
    if isinstance(function, MethodType):
        raise TypeError(f"{what} is a method, and its object stays here: {_WRAP_IT}")
    if not isinstance(function, FunctionType):
        raise TypeError(f"{what} is no function: {_WRAP_IT}")
    if function.__name__ == "<lambda>":
        raise TypeError(f"{what} is a lambda, which no worker can find: use def")
    if "<locals>" in function.__qualname__:
        raise TypeError(
            f"{what} is defined inside of a function, where no worker can find it: "
            f"{_MODULE_ADVICE}"
        )
    if "." in function.__qualname__:
        raise TypeError(f"{what} is defined in a class: {_MODULE_ADVICE}")
    _check_kind(function)


_WRAP_IT: Final = "write a function around it, with def at the top of a module"


def _check_kind(function: FunctionType) -> None:
    import inspect

    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(f"{_shown(function)} is a generator: return a list")
    for each in _parameters(function).values():
        if each.kind is each.VAR_POSITIONAL or each.kind is each.VAR_KEYWORD:
            raise TypeError(
                f"{_shown(function)} takes {each}, and a step's input has names that are "
                "known: take a list, or a dict, by one parameter"
            )
        if each.kind is each.POSITIONAL_ONLY:
            raise TypeError(
                f"{_shown(function)} takes {each.name!r} by position alone, and a step's "
                "input has names: leave out the /"
            )


def _parameters(function: Callable[..., Any]) -> Mapping[str, Any]:
    """Those of its signature, without a look at what they are annotated with.

    That may be further down in the module, and not be there yet for a decorator.
    """
    import inspect

    if sys.version_info >= (3, 14):  # up to there they were evaluated by ``def`` itself
        from annotationlib import Format

        return inspect.signature(function, annotation_format=Format.STRING).parameters
    return inspect.signature(function).parameters


def _shown(function: Any) -> str:
    name = getattr(function, "__qualname__", None) or repr(function)
    return f"{getattr(function, '__module__', None) or '?'}.{name}"


def _checked_name(name: object) -> str:
    """A component's name: one segment of a path, without what has a meaning there."""
    if not isinstance(name, str):
        raise TypeError(f"the name of a component must be a string, not {name!r}")
    is_good = name.isascii() and 0 < len(name) <= _LONGEST_NAME
    is_good = is_good and all(each.isalnum() or each in _NAME_SIGNS for each in name)
    if not is_good or not name.strip("."):
        raise ValueError(
            f"the name of a component must be of letters, digits, _, - and ., at most "
            f"{_LONGEST_NAME}, not {name!r}"
        )
    return name


# -- what a function takes and returns -------------------------------------------------


class Declared(NamedTuple):
    """What a function's annotations say.

    :ivar inputs: a Struct of its parameters; those that are not given are ``UNSET``
    :ivar input_schema: of a step's input, as JSON schema
    :ivar output_schema: of what it returns; empty if that is not known
    """

    inputs: type[msgspec.Struct]
    input_schema: dict[str, Any]
    output_schema: dict[str, Any]


def declared(function: Callable[..., Any]) -> Declared:
    """What a function takes and returns, by its annotations.

    :raises TypeError: naming the parameter, if nothing of JSON becomes that
    :raises ValueError: if an annotation names what is not there
    """
    hints = _hints(function)
    parameters = _parameters(function)
    fields: list[Any] = []
    for name, each in parameters.items():
        kind = hints.get(name, Any)
        _check_type(function, name, kind)
        if each.default is each.empty:
            fields.append((name, kind))
        else:
            fields.append((name, kind, msgspec.field(default_factory=_unset)))
    inputs = msgspec.defstruct(
        function.__name__, fields, kw_only=True, forbid_unknown_fields=True
    )
    defaults = {name: each.default for name, each in parameters.items()}
    return Declared(
        inputs,
        _input_schema(inputs, defaults),
        _output_schema(hints.get("return", Any)),
    )


def _unset() -> msgspec.UnsetType:
    return msgspec.UNSET


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    import typing

    try:
        return typing.get_type_hints(function, include_extras=True)
    except Exception as exc:  # an annotation can be any expression
        raise ValueError(
            f"an annotation of {_shown(function)} cannot be read: {exc}. What it names has "
            "to be there when the program runs, and not only for type checkers"
        ) from exc


def _check_type(function: Callable[..., Any], name: str, kind: Any) -> None:
    try:
        schema_of(kind)
    except (TypeError, ValueError) as exc:
        raise TypeError(
            f"the parameter {name!r} of {_shown(function)} is of type {kind!r}, which "
            f"nothing in JSON becomes: {exc}"
        ) from exc


def schema_of(kind: Any) -> dict[str, Any]:
    """The JSON schema of a type, pydantic's models included."""
    models: dict[str, Any] = {}

    def of_custom(kind: Any) -> dict[str, Any]:
        if not hasattr(kind, "model_json_schema"):
            raise TypeError(f"{kind!r} is neither a type of msgspec's nor a model")
        schema: dict[str, Any] = kind.model_json_schema()
        models.update(schema.pop("$defs", {}))
        return schema

    (schema,), known = msgspec.json.schema_components(
        [kind], schema_hook=of_custom, ref_template=_REFERENCE + "{name}"
    )
    known = {**models, **known}
    # The type itself stands first, unless it is referred to from within.
    reference = schema.get("$ref", "")
    name = reference.removeprefix(_REFERENCE)
    if name in known and reference not in _texts_of(known):
        schema = known.pop(name)
    return {**schema, "$defs": known} if known else schema


def _texts_of(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set().union(*map(_texts_of, value.values()))
    if isinstance(value, list):
        return set().union(*map(_texts_of, value))
    return {value} if isinstance(value, str) else set()


def converted(value: Any, kind: Any) -> Any:
    """What a value of JSON's is as one of this type.

    :raises msgspec.ValidationError: if it is none
    """
    return msgspec.convert(value, kind, str_keys=True, dec_hook=_of_custom)


def _of_custom(kind: Any, value: Any) -> Any:
    if hasattr(kind, "model_validate"):
        return kind.model_validate(value)
    raise NotImplementedError


def _input_schema(
    inputs: type[msgspec.Struct], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    from .errors import UnrepresentableValueError
    from .representable import representable

    schema = schema_of(inputs)
    for name, shown in schema.get("properties", {}).items():
        try:
            default = representable(defaults[name])
        except UnrepresentableValueError:
            continue  # there is none, or JSON has no form for it
        properties = dict(shown, default=default)
        schema["properties"][name] = properties
    return schema


def _output_schema(kind: Any) -> dict[str, Any]:
    """Empty where msgspec cannot tell: what is returned is judged by what it is."""
    try:
        return schema_of(kind)
    except (TypeError, ValueError):
        return {}
