"""What an executor does, and the values it returns.

A leaf: it knows neither servers nor transports. ``StepflowExecutor`` is the protocol
that code should ask for when it does not care where its workflows run.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

import msgspec

from .errors import FlowFailedError

__all__ = [
    "Diagnostic",
    "FlowError",
    "FlowResult",
    "FlowSource",
    "FlowStatus",
    "StepflowExecutor",
]

FlowSource: TypeAlias = "str | os.PathLike[str] | Mapping[str, Any]"
"""A workflow: the path of a YAML or JSON file, or the document itself."""


class FlowStatus(enum.Enum):
    """How a flow ended."""

    SUCCESS = "success"
    FAILED = "failed"
    SKIPPED = "skipped"


class FlowError(msgspec.Struct, frozen=True):
    """Why a flow failed: a value, not an exception.

    :ivar code: the server's name of the error's kind, e.g. ``"COMPONENT_FAILED"``;
        ``"CODE_<n>"`` for a number that this version knows no name for
    :ivar message: the server's words
    """

    code: str
    message: str


class FlowResult(msgspec.Struct, frozen=True, kw_only=True):
    """How one run of a flow ended.

    :ivar status: success, failed or skipped
    :ivar output: the flow's output (any JSON value) if it succeeded, else ``None``
    :ivar error: why it failed, or ``None``
    :ivar run_id: the server's id of the run
    """

    status: FlowStatus
    run_id: str
    output: Any = None
    error: FlowError | None = None

    @property
    def is_success(self) -> bool:
        return self.status is FlowStatus.SUCCESS

    @property
    def is_failed(self) -> bool:
        return self.status is FlowStatus.FAILED

    @property
    def is_skipped(self) -> bool:
        """True for a flow that the server chose not to run.

        Stepflow 0.13 reports no flow so; it is part of the vocabulary of results.
        """
        return self.status is FlowStatus.SKIPPED

    def unwrap(self) -> Any:
        """Return the output.

        :raises FlowFailedError: if there is none, because the flow failed or was
            skipped
        """
        if self.is_success:
            return self.output
        raise FlowFailedError(self._verdict(), result=self)

    def _verdict(self) -> str:
        reason = f": {self.error.message} ({self.error.code})" if self.error else ""
        return f"run {self.run_id} {_VERDICTS[self.status]}{reason}"


_VERDICTS = {FlowStatus.FAILED: "failed", FlowStatus.SKIPPED: "was skipped"}


class Diagnostic(msgspec.Struct, frozen=True):
    """One finding of the server's analysis of a workflow.

    :ivar level: ``"fatal"``, ``"error"``, ``"warning"``, or ``"level <n>"`` for a number
        that this version knows no name for
    :ivar message: the finding, for people
    :ivar path: where in the document, as a JSON path (``$.steps[0].input``), or ``None``
    :ivar kind: the finding's kind, for programs (``"undefinedStepReference"``)
    """

    level: str
    message: str
    path: str | None = None
    kind: str = ""

    def __str__(self) -> str:
        return f"{self.path or '$'}: {self.level}: {self.message}"


@runtime_checkable
class StepflowExecutor(Protocol):
    """Anything that runs workflows: an embedded server or one elsewhere."""

    async def run(
        self,
        flow: FlowSource,
        input: Any = None,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        variables: Mapping[str, Any] | None = None,
    ) -> FlowResult:
        """Run ``flow`` on ``input`` and wait for its end."""
        ...
