"""Every exception that a user can catch, in one small tree.

``StepflowError`` is the root. Below it, three families that ask for different
reactions:

* ``FlowDefinitionError``: the workflow that was handed in is wrong; mend the file.
* ``ServerError``: the server could not be started, died, or was stopped.
* ``ApiError`` and ``ConnectionLostError``: the server refused a request, or the
  conversation with it broke off.

``FlowFailedError`` stands apart: the workflow ran, and failed. It is raised only by
``FlowResult.unwrap()``; by itself a failed flow is a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .executor import Diagnostic, FlowResult
    from .logs.entry import LogEntry
    from .server.process import ServerExit

__all__ = [
    "ApiError",
    "BinaryNotFoundError",
    "ConnectionLostError",
    "FlowDefinitionError",
    "FlowFailedError",
    "FlowNotFoundError",
    "FlowSyntaxError",
    "InvalidFlowError",
    "RunLostError",
    "RuntimeStoppedError",
    "ServerCrashedError",
    "ServerError",
    "ServerStartError",
    "StepflowError",
]


class StepflowError(Exception):
    """The root of everything this library raises on its own account."""

    def __reduce__(self) -> tuple[Any, ...]:
        # As it stands: an exception that crosses a process pool is not made anew, since
        # its arguments are not those of its constructor.
        return _rebuilt, (type(self), self.args), self.__dict__


def _rebuilt(cls: type[StepflowError], args: tuple[Any, ...]) -> StepflowError:
    return cls.__new__(cls, *args)


# -- the workflow that was handed in ---------------------------------------------------


class FlowDefinitionError(StepflowError):
    """The workflow cannot be run as it was handed in.

    :ivar source: where it came from: the file's path, or ``"<mapping>"``
    """

    def __init__(self, message: str, *, source: str) -> None:
        super().__init__(message)
        self.source = source


class FlowNotFoundError(FlowDefinitionError):
    """The workflow file does not exist or cannot be read."""


class FlowSyntaxError(FlowDefinitionError):
    """The workflow file is not well-formed YAML or JSON.

    :ivar line: the line of the fault, counted from 1, or ``None`` if it is not known
    :ivar column: the column of the fault, counted from 1, or ``None``
    """

    def __init__(
        self,
        message: str,
        *,
        source: str,
        line: int | None = None,
        column: int | None = None,
    ) -> None:
        super().__init__(message, source=source)
        self.line = line
        self.column = column


class InvalidFlowError(FlowDefinitionError):
    """The document is readable, but it is not a workflow that the server accepts.

    :ivar diagnostics: what the server found, in its order; empty if the document did
        not get as far as the server's analysis
    """

    def __init__(
        self, message: str, *, source: str, diagnostics: Sequence[Diagnostic] = ()
    ) -> None:
        super().__init__(message, source=source)
        self.diagnostics = tuple(diagnostics)


# -- the workflow that ran -------------------------------------------------------------


class FlowFailedError(StepflowError):
    """Raised by :meth:`FlowResult.unwrap` when there is no output to return.

    :ivar result: the result that was unwrapped
    """

    def __init__(self, message: str, *, result: FlowResult) -> None:
        super().__init__(message)
        self.result = result


# -- the server ------------------------------------------------------------------------


class ServerError(StepflowError):
    """The embedded server is not there to be used."""


class ServerStartError(ServerError):
    """The server did not become ready.

    The message tells the phase that failed, the exit code or signal, the server's own
    words and the last log lines.

    :ivar exit: how the process ended, or ``None`` if it was never started
    :ivar recent_logs: the log entries of this attempt, oldest first
    """

    def __init__(
        self,
        message: str,
        *,
        exit: ServerExit | None = None,
        recent_logs: Sequence[LogEntry] = (),
    ) -> None:
        super().__init__(message)
        self.exit = exit
        self.recent_logs = tuple(recent_logs)


class BinaryNotFoundError(ServerStartError):
    """There is no ``stepflow-server`` binary that could be started."""


class ServerCrashedError(ServerError):
    """The server ended unasked and will not be restarted.

    :ivar exit: how the process ended
    """

    def __init__(self, message: str, *, exit: ServerExit) -> None:
        super().__init__(message)
        self.exit = exit


class RunLostError(ServerCrashedError):
    """The server died under this call, and the run died with its in-memory store.

    The server itself is being restarted: the next call will find it ready.
    """


class RuntimeStoppedError(ServerError):
    """The runtime is not running: not entered yet, being stopped, or stopped."""


# -- the conversation with it ----------------------------------------------------------


class ApiError(StepflowError):
    """The server refused a request.

    :ivar status: the HTTP status
    :ivar code: the server's name for the error (``"NOT_FOUND"``), or ``None`` where it
        answered without one
    """

    def __init__(self, message: str, *, status: int, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class ConnectionLostError(StepflowError):
    """The server took no connection, broke it off, or answered something not HTTP.

    :ivar unsent: True if the request cannot have reached the server, so that repeating
        it is safe
    """

    def __init__(self, message: str, *, unsent: bool = False) -> None:
        super().__init__(message)
        self.unsent = unsent
