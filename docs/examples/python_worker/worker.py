"""A worker: Python functions that workflows call as components.

Started by the Stepflow server, which tells it where it is through the environment.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

from stepflow_py.worker import StepflowServer
from stepflow_py.worker.grpc_worker import run_grpc_worker

server = StepflowServer(include_builtins=False)


@server.component
def shout(input: dict[str, Any]) -> dict[str, Any]:
    """Turn text into loud text."""
    if not input["text"]:
        raise ValueError("there is nothing to shout")
    return {"text": input["text"].upper() + "!"}


if __name__ == "__main__":
    asyncio.run(
        run_grpc_worker(
            server=server,
            tasks_url=os.environ["STEPFLOW_TASKS_URL"],
            queue_name=os.environ["STEPFLOW_QUEUE_NAME"],
        )
    )
