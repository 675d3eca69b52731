"""``components=``: the worker of a program's own functions, and the way to it.

Contract: no I/O. Whatever would keep the worker from coming up, as far as that can be known
from here, is refused with the option's name; and what a configuration has already is never
overruled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Self

from .. import worker
from ..components import places_of
from ..worker.job import Job
from .interpreter import named_interpreter

__all__ = ["Worker"]

_PLUGIN: Final = "python"
_ROUTE: Final = "/python"

# Of its own: a worker of the configuration's that has a queue named "python" must not
# be given our tasks.
_QUEUE: Final = "stepflow-runtime-components"

# For so many seconds a step may wait for its turn. The server's own 30 would fail the steps
# of a batch that the functions take longer for. A worker that is gone is noticed otherwise.
_QUEUE_TIMEOUT: Final = 3600

_PROGRAM: Final = Path(worker.__file__).with_name("__main__.py")


@dataclass(frozen=True)
class Worker:
    """The worker of one runtime.

    :ivar interpreter: what runs it
    :ivar job: what it is told
    """

    interpreter: str
    job: Job

    @classmethod
    def of(cls, functions: object) -> Self | None:
        """The one for these functions; None if there are none.

        :raises ValueError: naming the option, if there can be no worker for them
        :raises TypeError: naming the option, if they are of the wrong kind
        """
        places = places_of(functions)
        if not places:
            return None
        if find_spec("stepflow_py") is None:
            raise ValueError(
                "components: what runs Python functions is not installed: "
                'pip install "stepflow-runtime[components]"'
            )
        interpreter = named_interpreter()
        if interpreter is None:
            raise ValueError(
                "components: there is no Python interpreter to run them by: "
                "sys.executable names none"
            )
        return cls(interpreter, Job.of(places))

    def in_directory(self, directory: str) -> Self:
        """The same, in a working directory."""
        return replace(self, job=self.job.in_directory(directory))

    def added_to(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A configuration, and in it this worker with the way to it.

        :raises ValueError: if something else is in its place
        """
        plugins = _taken(config, "plugins", _PLUGIN)
        routes = _taken(config, "routes", _ROUTE)
        plugin = {
            "type": "grpc",
            "command": self.interpreter,
            # -P: without the program's own directory in the way of other modules.
            "args": ["-P", str(_PROGRAM), self.job.told()],
            "queueName": _QUEUE,
            "queueTimeoutSecs": _QUEUE_TIMEOUT,
        }
        return {
            **config,
            "plugins": {**plugins, _PLUGIN: plugin},
            "routes": {**routes, _ROUTE: [{"plugin": _PLUGIN}]},
        }


def _taken(config: Mapping[str, Any], part: str, name: str) -> Mapping[str, Any]:
    """A part of a configuration, in which a name is still to be had."""
    known = config.get(part)
    if isinstance(known, Mapping) and name not in known:
        return known
    trouble = (
        f"the configuration has {name!r} among its {part} already, where these functions "
        "would be: rename it"
        if isinstance(known, Mapping)
        else f"the configuration has no {part} that are a mapping"
    )
    raise ValueError(f"components: {trouble}")
