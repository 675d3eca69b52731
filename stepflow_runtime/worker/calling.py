"""One function, called with a step's input: converted, run, and its result judged.

Contract: what a call raises is one of stepflow-py's errors, with the function's own exception
as its cause, and with a message that tells its type; ``SystemExit`` ends no worker. A function
that is not ``async`` runs in a thread, so that neither others nor heartbeats wait for it.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, TypeAlias

import msgspec
from stepflow_py.worker.exceptions import (
    StepflowError,
    StepflowExecutionError,
    StepflowValidationError,
)
from stepflow_py.worker.task_handler import python_to_proto_value

from ..components import converted
from ..errors import UnrepresentableValueError
from ..representable import representable

__all__ = ["Call", "FunctionFailed", "InputRefused", "OutputRefused"]

_THREADS: Final = ThreadPoolExecutor(32, thread_name_prefix="component")

# The server reads no deeper: a dict of protobuf's is three messages, of which it takes 100.
_DEPTH: Final = 30

# What the server takes is 4 MiB, with what is around it. A number of one digit takes two
# bytes as JSON, and eleven there.
_MOST_BYTES: Final = 4 * 2**20 - 4096
_SURELY_FITS: Final = _MOST_BYTES // 12
_LONGEST_MESSAGE: Final = 20_000


class FunctionFailed(StepflowExecutionError):
    """A function raised; what it raised is the cause."""


class InputRefused(StepflowValidationError):
    """A step's input does not fit the function, which was not called."""


class OutputRefused(StepflowExecutionError):
    """What a function returned would not arrive as it is."""


class Call:
    """A component's function, as it is called.

    :param inputs: the Struct of its parameters
    """

    def __init__(
        self, name: str, function: Callable[..., Any], inputs: type[msgspec.Struct]
    ) -> None:
        self._name = name
        self._function = function
        self._inputs = inputs
        self._is_async = inspect.iscoroutinefunction(function)

    async def __call__(self, input: Any) -> Any:
        returned, raised = await self._outcome(self._arguments(input))
        if raised is None:
            return self._output(returned)
        if isinstance(raised, StepflowError):
            raise raised  # by who knows stepflow-py, and what its errors stand for
        raise FunctionFailed(_words(raised)) from raised

    def _arguments(self, input: Any) -> dict[str, Any]:
        try:
            inputs = converted(input, self._inputs)
        except msgspec.ValidationError as exc:
            raise InputRefused(f"the input does not fit {self._name}: {exc}") from None
        given = {name: getattr(inputs, name) for name in inputs.__struct_fields__}
        return {
            name: value for name, value in given.items() if value is not msgspec.UNSET
        }

    async def _outcome(self, arguments: dict[str, Any]) -> _Outcome:
        if self._is_async:
            return await _awaited(self._function(**arguments))
        context = contextvars.copy_context()
        call = partial(context.run, _called, self._function, arguments)
        loop = asyncio.get_running_loop()
        returned, raised = await loop.run_in_executor(_THREADS, call)
        if inspect.isawaitable(returned):  # a decorator hides that it is async
            return await _awaited(returned)
        return returned, raised

    def _output(self, returned: Any) -> Any:
        try:
            output = representable(returned, name="what it returned,", depth=_DEPTH)
        except UnrepresentableValueError as exc:
            raise OutputRefused(f"{self._name}: {exc}") from None
        if len(msgspec.json.encode(output)) > _SURELY_FITS:
            size = python_to_proto_value(output).ByteSize()
            if size > _MOST_BYTES:
                raise OutputRefused(
                    f"{self._name}: what it returned takes {size} bytes, and the server "
                    f"takes {_MOST_BYTES} of one step: store it elsewhere, and return where"
                )
        return output


# What a function returned, or what it raised: a future takes no StopIteration.
_Outcome: TypeAlias = tuple[Any, BaseException | None]


def _called(function: Callable[..., Any], arguments: dict[str, Any]) -> _Outcome:
    try:
        return function(**arguments), None
    except BaseException as exc:  # noqa: BLE001 - raised where it is waited for
        return None, exc


async def _awaited(returned: Awaitable[Any]) -> _Outcome:
    try:
        return await returned, None
    except BaseException as exc:  # noqa: BLE001 - nobody cancels these tasks but they
        return None, exc


def _words(exc: BaseException) -> str:
    """An exception as the last line of a traceback has it."""
    kind = type(exc)
    known = kind.__module__ in ("builtins", "__main__", "__mp_main__")
    name = kind.__qualname__ if known else f"{kind.__module__}.{kind.__qualname__}"
    try:
        text = str(exc)[:_LONGEST_MESSAGE]
    except Exception:  # noqa: BLE001 - the user's own code
        text = "<its message cannot be had>"
    return f"{name}: {text}" if text else name
