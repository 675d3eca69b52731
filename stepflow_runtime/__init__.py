"""A Stepflow workflow server inside your Python program.

Names are imported from their modules when they are first asked for: a program that only talks
to a server elsewhere does not load what it takes to run one.

PYTEST_DONT_REWRITE, since this may be imported before pytest is, which would warn of that.
"""

from __future__ import annotations

import logging as _logging
from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .backup import backup_store as backup_store
    from .client import StepflowClient as StepflowClient
    from .components import component as component
    from .errors import AccessDeniedError as AccessDeniedError
    from .errors import ApiError as ApiError
    from .errors import BackupError as BackupError
    from .errors import BinaryNotFoundError as BinaryNotFoundError
    from .errors import ConflictError as ConflictError
    from .errors import ConnectionLostError as ConnectionLostError
    from .errors import FlowDefinitionError as FlowDefinitionError
    from .errors import FlowFailedError as FlowFailedError
    from .errors import FlowNotFoundError as FlowNotFoundError
    from .errors import FlowSyntaxError as FlowSyntaxError
    from .errors import InvalidFlowError as InvalidFlowError
    from .errors import InvalidRequestError as InvalidRequestError
    from .errors import NotFoundError as NotFoundError
    from .errors import RunLostError as RunLostError
    from .errors import RunTimeoutError as RunTimeoutError
    from .errors import RuntimeStoppedError as RuntimeStoppedError
    from .errors import ServerCrashedError as ServerCrashedError
    from .errors import ServerError as ServerError
    from .errors import ServerFaultError as ServerFaultError
    from .errors import ServerStartError as ServerStartError
    from .errors import StepflowError as StepflowError
    from .errors import SubmitInterruptedError as SubmitInterruptedError
    from .errors import UnrepresentableValueError as UnrepresentableValueError
    from .errors import UnsupportedServerError as UnsupportedServerError
    from .events import ItemCompleted as ItemCompleted
    from .events import RunCompleted as RunCompleted
    from .events import RunCreated as RunCreated
    from .events import RunEvent as RunEvent
    from .events import RunStatus as RunStatus
    from .events import StepCompleted as StepCompleted
    from .events import StepReady as StepReady
    from .events import StepsNeeded as StepsNeeded
    from .events import StepStarted as StepStarted
    from .events import SubRunCreated as SubRunCreated
    from .events import UnknownEvent as UnknownEvent
    from .executor import ComponentInfo as ComponentInfo
    from .executor import ComponentList as ComponentList
    from .executor import Diagnostic as Diagnostic
    from .executor import FlowError as FlowError
    from .executor import FlowId as FlowId
    from .executor import FlowResult as FlowResult
    from .executor import FlowSource as FlowSource
    from .executor import FlowStatus as FlowStatus
    from .executor import FlowVariable as FlowVariable
    from .executor import Health as Health
    from .executor import ItemCounts as ItemCounts
    from .executor import RunInfo as RunInfo
    from .executor import StepflowExecutor as StepflowExecutor
    from .executor import StepInfo as StepInfo
    from .executor import ValidationResult as ValidationResult
    from .graph import Edge as Edge
    from .graph import Graph as Graph
    from .graph import GraphStep as GraphStep
    from .graph import StepState as StepState
    from .logs.config import LogConfig as LogConfig
    from .logs.entry import LogEntry as LogEntry
    from .logs.ring import LogFollower as LogFollower
    from .runtime import StepflowRuntime as StepflowRuntime
    from .server.process import ServerExit as ServerExit
    from .server.restart import RestartPolicy as RestartPolicy
    from .server.state import RuntimeState as RuntimeState
    from .server.state import StateChange as StateChange
    from .timeline import Omitted as Omitted
    from .timeline import StepAttempt as StepAttempt
    from .timeline import Timeline as Timeline
    from .timeline import TimelineItem as TimelineItem
    from .timeline import TimelineLog as TimelineLog
    from .timeline import TimelineStep as TimelineStep

__version__ = "0.1.0"

_PLACES = {
    "backup": ("backup_store",),
    "client": ("StepflowClient",),
    "components": ("component",),
    "errors": (
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
    ),
    "events": (
        "ItemCompleted",
        "RunCompleted",
        "RunCreated",
        "RunEvent",
        "RunStatus",
        "StepCompleted",
        "StepReady",
        "StepsNeeded",
        "StepStarted",
        "SubRunCreated",
        "UnknownEvent",
    ),
    "executor": (
        "ComponentInfo",
        "ComponentList",
        "Diagnostic",
        "FlowError",
        "FlowId",
        "FlowResult",
        "FlowSource",
        "FlowStatus",
        "FlowVariable",
        "Health",
        "ItemCounts",
        "RunInfo",
        "StepflowExecutor",
        "StepInfo",
        "ValidationResult",
    ),
    "graph": (
        "Edge",
        "Graph",
        "GraphStep",
        "StepState",
    ),
    "logs.config": ("LogConfig",),
    "logs.entry": ("LogEntry",),
    "logs.ring": ("LogFollower",),
    "runtime": ("StepflowRuntime",),
    "server.process": ("ServerExit",),
    "server.restart": ("RestartPolicy",),
    "server.state": (
        "RuntimeState",
        "StateChange",
    ),
    "timeline": (
        "Omitted",
        "StepAttempt",
        "Timeline",
        "TimelineItem",
        "TimelineLog",
        "TimelineStep",
    ),
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names}

# Sorted, as dir() is.
__all__ = sorted(_MODULES)  # noqa: PLE0605

# Programs that configure no logging get nothing printed by us.
_logging.getLogger(__name__).addHandler(_logging.NullHandler())


def __getattr__(name: str) -> object:
    if (module := _MODULES.get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
