"""What it costs to load workflow files: ``python -m tests.weigh FILE...``.

A process for each file, so that its peak of memory is its own, and that the end of one is
not the end of all. Prints a list of :class:`Load` as JSON, in the order of the files.
"""

from __future__ import annotations

import os
import resource
import sys
import time

import msgspec

from stepflow_runtime import StepflowError, flows


class Load(msgspec.Struct):
    """How the loading of a file ended.

    :ivar outcome: the name of the error, or ``"loaded"``
    :ivar seconds: of the processor
    :ivar megabytes: by how much the peak of memory has grown
    """

    outcome: str
    message: str = ""
    seconds: float = 0.0
    megabytes: float = 0.0


def weigh(path: str) -> Load:
    before, began = _peak(), time.process_time()
    try:
        flows.load(path)
        load = Load("loaded")
    except StepflowError as exc:
        load = Load(type(exc).__name__, str(exc))
    load.seconds = time.process_time() - began
    load.megabytes = _peak() - before
    return load


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _weigh_apart(path: str) -> Load:
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
        os.write(writer, msgspec.json.encode(weigh(path)))
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as answer:
        encoded = answer.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return (
        msgspec.json.decode(encoded, type=Load) if encoded else Load(f"exit {status}")
    )


if __name__ == "__main__":
    loads = [_weigh_apart(path) for path in sys.argv[1:]]
    sys.stdout.buffer.write(msgspec.json.encode(loads))
