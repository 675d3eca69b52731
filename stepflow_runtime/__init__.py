"""A Stepflow workflow server inside your Python program."""

from __future__ import annotations

import logging as _logging

from .client import StepflowClient as StepflowClient
from .errors import AccessDeniedError as AccessDeniedError
from .errors import ApiError as ApiError
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
from .logs.config import LogConfig as LogConfig
from .logs.entry import LogEntry as LogEntry
from .logs.ring import LogFollower as LogFollower
from .runtime import StepflowRuntime as StepflowRuntime
from .server.process import ServerExit as ServerExit
from .server.restart import RestartPolicy as RestartPolicy
from .server.state import RuntimeState as RuntimeState
from .server.state import StateChange as StateChange

__version__ = "0.1.0"

# Programs that configure no logging get nothing printed by us.
_logging.getLogger(__name__).addHandler(_logging.NullHandler())

# Tracebacks name exceptions as users import them. Other classes keep the module that they
# were built in, since their annotations are resolved there.
for _value in list(locals().values()):
    if isinstance(_value, type) and issubclass(_value, StepflowError):
        _value.__module__ = __name__
del _value
