"""A Stepflow workflow server inside your Python program."""

from __future__ import annotations

import logging as _logging

from .errors import ApiError as ApiError
from .errors import BinaryNotFoundError as BinaryNotFoundError
from .errors import ConnectionLostError as ConnectionLostError
from .errors import FlowDefinitionError as FlowDefinitionError
from .errors import FlowFailedError as FlowFailedError
from .errors import FlowNotFoundError as FlowNotFoundError
from .errors import FlowSyntaxError as FlowSyntaxError
from .errors import InvalidFlowError as InvalidFlowError
from .errors import RunLostError as RunLostError
from .errors import RuntimeStoppedError as RuntimeStoppedError
from .errors import ServerCrashedError as ServerCrashedError
from .errors import ServerError as ServerError
from .errors import ServerStartError as ServerStartError
from .errors import StepflowError as StepflowError
from .executor import Diagnostic as Diagnostic
from .executor import FlowError as FlowError
from .executor import FlowResult as FlowResult
from .executor import FlowSource as FlowSource
from .executor import FlowStatus as FlowStatus
from .executor import StepflowExecutor as StepflowExecutor
from .logs.config import LogConfig as LogConfig
from .logs.entry import LogEntry as LogEntry
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
