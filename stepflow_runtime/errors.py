"""Every exception that a user can catch, in one small tree.

``StepflowError`` is the root. Below it, three families that ask for different
reactions:

* ``FlowDefinitionError``: the workflow that was handed in is wrong; mend the file.
* ``ServerError``: the server could not be started, died, or was stopped.
* ``ApiError`` and ``ConnectionLostError``: the server refused a request, or the
  conversation with it broke off.

``UnrepresentableValueError`` is about a value that JSON, or the server, would change or
drop; ``RunTimeoutError`` about the patience of the caller, by ``timeout=``.
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
    "AccessDeniedError",
    "ApiError",
    "BackupError",
    "BinaryNotFoundError",
    "ConflictError",
    "ConnectionLostError",
    "FlowDefinitionError",
    "FlowFailedError",
    "FlowNotFoundError",
    "FlowSyntaxError",
    "InvalidFlowError",
    "InvalidRequestError",
    "NotFoundError",
    "RunLostError",
    "RunTimeoutError",
    "RuntimeStoppedError",
    "ServerCrashedError",
    "ServerError",
    "ServerFaultError",
    "ServerStartError",
    "StepflowError",
    "SubmitInterruptedError",
    "UnrepresentableValueError",
    "UnsupportedServerError",
]


class StepflowError(Exception):
    """The root of everything this library raises on its own account."""

    def __reduce__(self) -> tuple[Any, ...]:
        # As it stands: an exception that crosses a process pool is not made anew, since
        # its arguments are not those of its constructor.
        return _rebuilt, (type(self), self.args), self.__dict__


def _rebuilt(cls: type[StepflowError], args: tuple[Any, ...]) -> StepflowError:
    error = cls.__new__(cls, *args)
    error.args = (
        args  # which an OSError, such as a TimeoutError, takes by __init__ only
    )
    return error


# -- the workflow that was handed in ---------------------------------------------------


class FlowDefinitionError(StepflowError):
    """The workflow cannot be run as it was handed in.

    :ivar source: where it came from: the file's path, or ``"<mapping>"``
    """

    def __init__(self, message: str, *, source: str) -> None:
        super().__init__(message)
        self.source = source


class FlowNotFoundError(FlowDefinitionError):
    """The workflow file does not exist or cannot be read.

    It may also be something other than a regular file, such as a pipe, or too long.
    """


class FlowSyntaxError(FlowDefinitionError):
    """The workflow file is not well-formed YAML or JSON, or is too much of it.

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


# -- the values that were handed in ----------------------------------------------------


class UnrepresentableValueError(StepflowError, ValueError):
    """A value that would not arrive as it is, refused before anything was sent.

    :ivar path: where it is, as a JSON path into the argument (``$.items[3].id``)
    """

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(message)
        self.path = path


# -- the workflow that ran -------------------------------------------------------------


class FlowFailedError(StepflowError):
    """Raised by :meth:`FlowResult.unwrap` when there is no output to return.

    :ivar result: the result that was unwrapped
    """

    def __init__(self, message: str, *, result: FlowResult) -> None:
        super().__init__(message)
        self.result = result


class RunTimeoutError(StepflowError, TimeoutError):
    """The ``timeout`` of a call was over before the call was.

    :ivar run_id: the run that it waited for, or ``None`` if that was not known yet
    """

    def __init__(self, message: str, *, run_id: str | None = None) -> None:
        super().__init__(message)
        self.run_id = run_id


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


class BackupError(StepflowError):
    """A store cannot be copied, or not to where it is to go."""


# -- the conversation with it ----------------------------------------------------------


class ApiError(StepflowError):
    """The server refused a request.

    Of its subclasses each asks for another reaction; what is none of them (a redirection,
    a status that nobody has thought of) is an ``ApiError`` itself.

    :ivar status: the HTTP status
    :ivar code: the server's name for the error (``"NOT_FOUND"``), or ``None`` where it
        answered without one
    :ivar reason: the server's words, or ``""``
    :ivar run_id: the run that the request was about, or ``None``
    :ivar flow_id: the flow that it was about, or ``None``
    :ivar blob_id: the blob that it was about, or ``None``
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str | None = None,
        reason: str = "",
        run_id: str | None = None,
        flow_id: str | None = None,
        blob_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.reason = reason
        self.run_id = run_id
        self.flow_id = flow_id
        self.blob_id = blob_id


class InvalidRequestError(ApiError):
    """The server does not accept the request as it is: an ill-formed id, too large a body."""


class AccessDeniedError(ApiError):
    """The server, or a proxy before it, wants other credentials (401, 403, 407)."""


class NotFoundError(ApiError):
    """The server does not know the run, flow or blob."""


class ConflictError(ApiError):
    """Not in the state that it is in: deleting a run that is not over, for example."""


class ServerFaultError(ApiError):
    """The server, or a proxy before it, could not do it (5xx, 429); perhaps later."""


class UnsupportedServerError(ApiError):
    """What answers is no Stepflow server of a version that this library can speak with."""


class ConnectionLostError(StepflowError):
    """The server took no connection, broke it off, or answered something not HTTP.

    :ivar unsent: True if the request cannot have reached the server, so that repeating
        it is safe
    """

    def __init__(self, message: str, *, unsent: bool = False) -> None:
        super().__init__(message)
        self.unsent = unsent


class SubmitInterruptedError(ConnectionLostError):
    """Nobody knows whether the server took the run: the connection broke after it was sent.

    The server tells a run's id only in its answer, and takes none from its client; so it
    cannot be asked. (A runtime with its ``storage`` in a file looks there, and finds out.)
    What to do depends on the workflow:

    * If it may run twice, submit it again, or have that done: ``on_unknown="resubmit"``.
    * If not, look whether it is there: give runs a mark of their own, such as a workflow's
      name or an id in the input, and look for it by ``list_runs(flow_name=...)``, or where
      the workflow leaves its traces.

    A run that the server did take goes on, and is not cancelled.
    """


# Tracebacks name exceptions as users import them. Other classes keep the module that they
# were built in, since their annotations are resolved there.
for _value in list(globals().values()):
    if isinstance(_value, type) and issubclass(_value, StepflowError):
        _value.__module__ = __package__
del _value
